"""Plain text for hyperpretraining: windows of context and continuation, from text files or a column of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, Literal

from hyperllama.data.copies import copied_tokens
from hyperllama.data.episode import Episode, Provenance, TextWindow
from hyperllama.data.hub_datasets import load_split, require_columns
from hyperllama.errors import UserError
from hyperllama.files import read_text, sha256

# More characters than a token has on average in any text, so that a span of text is longer than the window cut from it.
CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True)
class WindowSettings:
    """A window is `min_context_tokens` to `context_tokens` tokens of context, then `prompt_tokens` that are read and as many as
    make up `continuation_tokens` with them that are predicted, then `after_tokens`, which join the context.

    With a prompt of some length and tokens after it, it is HyperTuning's context-augmented language modelling (Phang et al.
    2022, arXiv 2211.12485): pieces A and D are compressed, C is predicted after B. With `split` "random" as many tokens are cut
    in training at two random places, each piece of at least one token: a is compressed, c is predicted after b, as HINT is
    pretrained (Ivison et al. 2023, arXiv 2212.10315). Of each document the last twentieth is held out: `part` "test" reads only
    that, "train" the rest, "all" everything. A share `repeats` of training windows says the same again and again, with a period
    of an eighth to a half of the window: copying is what induction heads are made of (Olsson et al. 2022, arXiv 2209.11895),
    and text alone teaches it late. A model that has none yet learns it from the first `warmup_episodes` windows of training:
    random words of the `repeat_words` commonest (of thousands of words each is seen too seldom to be learned from), said again
    after `repeat_tokens` tokens, later after up to `repeat_spread` more or fewer (`copied_tokens`). `column` is the text of a
    data set of the `datasets` library, of which the first `rows` rows are read; files need neither.
    """

    context_tokens: int = 256
    min_context_tokens: int | None = None
    continuation_tokens: int = 128
    prompt_tokens: int = 1
    after_tokens: int = 0
    split: Literal["fixed", "random"] = "fixed"
    repeats: float = 0.0
    warmup_episodes: int = 0
    repeat_tokens: int = 16
    repeat_spread: int = 8
    repeat_words: int = 100
    column: str = "text"
    rows: int = 10_000
    part: Literal["train", "test", "all"] = "all"

    @property
    def most_tokens(self) -> int:
        """Tokens of a window at most."""
        return self.context_tokens + self.continuation_tokens + self.after_tokens

    def problems(self) -> list[str]:
        """What is wrong with the sizes, a sentence each."""
        found = []
        fewest = self.context_tokens if self.min_context_tokens is None else self.min_context_tokens
        if not 1 <= fewest <= self.context_tokens:
            found.append("min_context_tokens must be between 1 and context_tokens")
        if self.continuation_tokens < 2:
            found.append("continuation_tokens must be at least 2: one to read, one to predict")
        if not 1 <= self.prompt_tokens < max(2, self.continuation_tokens):
            found.append("prompt_tokens must be at least 1, and fewer than continuation_tokens")
        if self.after_tokens < 0:
            found.append("after_tokens must be 0 or more")
        if self.split == "random" and (self.after_tokens or self.prompt_tokens != 1 or self.min_context_tokens is not None):
            found.append("split random draws all sizes, so leave after_tokens, prompt_tokens and min_context_tokens out")
        if not 0 <= self.repeats <= 1:
            found.append("repeats is a share of the windows, between 0 and 1")
        if not 0 <= self.repeat_spread < self.repeat_tokens:
            found.append("repeat_spread must be at least 0 and less than repeat_tokens")
        if self.repeat_words < 1:
            found.append("repeat_words must be at least 1")
        return found


class WindowSource:
    """Windows of documents, each window of text equally likely; `shots` and `queries` have no meaning here."""

    def __init__(self, documents: Sequence[tuple[str, str]], settings: WindowSettings):
        if settings.problems():
            raise UserError(f"data.text: {'; '.join(settings.problems())}")
        self.settings = settings
        self._span = CHARACTERS_PER_TOKEN * settings.most_tokens
        parts = [(name, _part(text, settings.part)) for name, text in documents]
        self.documents = [(name, text) for name, text in parts if text.strip()]
        if not self.documents:
            raise UserError("data.root: its text files are empty; give some text")
        self._cumulative = list(accumulate(len(text) for _, text in self.documents))
        words = Counter(word for _, text in self.documents for word in text.split()) if settings.warmup_episodes else Counter()
        self._common = [word for word, _ in words.most_common(settings.repeat_words)]

    def draw(self, rng: Random, shots: int, queries: int, index: int) -> Episode:
        if index < self.settings.warmup_episodes:
            return self._copy(rng, index / self.settings.warmup_episodes)
        (name, text), fewest = self._document(rng), self.settings.min_context_tokens
        most = self.settings.context_tokens
        context_tokens = most if fewest is None else rng.randint(fewest, most)
        # A window that starts in the last stretch may come out short; the encoder says so, and another is drawn.
        start = rng.randrange(max(1, len(text) - self._span // 4))
        total, sizes = self.settings.most_tokens, None
        if self.settings.split == "random":
            first, second = sorted(rng.sample(range(1, total), 2))
            sizes = (first, total - second, second - first)
        period = rng.randint(max(1, total // 8), max(1, total // 2)) if rng.random() < self.settings.repeats else None
        return self._window(name, text, start, sizes or self._sizes(context_tokens), period)

    def evaluation(self, *, shots: int, queries: int, episodes: int, seed: int) -> list[Episode]:
        """`episodes` windows, at places that the seed decides, with as much context as the settings allow."""
        made = []
        for i in range(episodes):
            rng = Random(f"evaluation/{seed}/{i}")
            name, text = self._document(rng)
            start = rng.randrange(max(1, len(text) - self._span // 2))
            made.append(self._window(name, text, start, self._sizes(self.settings.context_tokens)))
        return made

    def _document(self, rng: Random) -> tuple[str, str]:
        return rng.choices(self.documents, cum_weights=self._cumulative)[0]

    def _sizes(self, context_tokens: int) -> tuple[int, int, int]:
        """Tokens of context, of what is predicted, and of what is read before it."""
        settings = self.settings
        return context_tokens, settings.continuation_tokens - settings.prompt_tokens, settings.prompt_tokens

    def _window(self, name: str, text: str, start: int, sizes: tuple[int, int, int], period: int | None = None) -> Episode:
        if start:  # from the next word on, so that no token is half a word
            end_of_word = text.find(" ", start, start + 200)
            start = end_of_word + 1 if end_of_word >= 0 else start
        window = TextWindow(text[start : start + self._span], *sizes, self.settings.after_tokens, period)
        return Episode("", (), (), f"{name}:{start}", name, window)

    def _copy(self, rng: Random, progress: float) -> Episode:
        sizes = self._sizes(self.settings.context_tokens)
        period = copied_tokens(rng, self.settings.repeat_tokens, self.settings.repeat_spread, progress)
        return self._window("copy", " ".join(rng.choices(self._common, k=period)), 0, sizes, period)

    def __len__(self) -> int:
        return self._cumulative[-1] // self._span + 1

    def texts(self) -> list[str]:
        return [text for _, text in self.documents]

    def fingerprint(self) -> str:
        """SHA-256 of the text."""
        return sha256(*(part for document in self.documents for part in document))

    def provenance(self) -> Provenance:
        names = frozenset(name for name, _ in self.documents)
        part = self.settings.part
        # The train and the test part of one document share nothing.
        return Provenance(frozenset(f"{name} ({part})" for name in names) if part != "all" else names, frozenset(), frozenset())


def read_text_files(root: str) -> list[tuple[str, str]]:
    """(name, text) of one text file, or of every .txt file below a folder. UserError names a file that is not UTF-8."""
    path = Path(root)
    paths = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not paths or not all(p.is_file() for p in paths):
        raise UserError(f"data.root: {root} is neither a text file nor a folder with .txt files")
    return [(str(p.relative_to(path)) if path.is_dir() else p.name, read_text(p, "plain text")) for p in paths]


def load_text_column(name: str, *, config: str | None, split: str, column: str, rows: int) -> list[tuple[str, str]]:
    """(name, text) of the first `rows` rows of a column of a data set, fetched as a stream."""
    loaded = load_split(name, config=config, split=split, streaming=True, rows=rows)
    require_columns(loaded, name, (column,))
    return [(f"{name}[{i}]", row[column]) for i, row in enumerate(loaded)]


def _part(text: str, part: str) -> str:
    cut = len(text) - len(text) // 20
    return {"train": text[:cut], "test": text[cut:], "all": text}[part]


def from_recipe(part: Any) -> WindowSource:
    """The source that a part of a recipe's data describes: text files, or a column of a data set."""
    if not part.hub:
        return WindowSource(read_text_files(part.root), part.text)
    name, _, config = part.hub.partition(":")
    column = {"column": part.text.column, "rows": part.text.rows}
    return WindowSource(load_text_column(name, config=config or None, split=part.split, **column), part.text)
