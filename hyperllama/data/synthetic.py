"""Symbol tuning (Wei et al. 2023, arXiv 2305.08298) in miniature: a language in which a task can only be learned in context.

Words fall into categories, the same for all tasks. A task names a few categories by arbitrary symbols; demonstrations show
a word and its symbol; a query is a word that was not shown. Which symbol means which category is different in every task, so
only the demonstrations can tell; or an instruction in words, if categories have names: it says which symbol means which.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from hyperllama.data.copies import copied_tokens
from hyperllama.data.episode import Episode, Example, Provenance
from hyperllama.errors import UserError


@dataclass(frozen=True)
class SyntheticLanguage:
    """Sizes of the language, and what a base model is warmed up on.

    Of the first `warmup_episodes` episodes a share `repeats` are random token sequences to be copied (`copied_tokens`): they
    form the induction heads without which a small model sits at chance for thousands of steps. Of the other episodes a share
    `lists` are the words of `list_categories` categories, one category after the other: they teach the categories.
    With `instructions` categories have names, tasks have instructions such as "call lomabu <3> , call tizera <17>", and in
    lists a name is one more word of its category. `named_categories` of a task's categories are named, all unless given: for
    the others there are only demonstrations. With `instruction_tokens` an instruction is filled up to so many words, or to a
    number drawn from `min_instruction_tokens` on, with remarks between its sentences that are of no use: some words of a
    category that the task does not have ("bafo gimu"). One word may be missing, since a remark and its comma are two. Tasks
    and queries stay what they are without.
    `split` is "train" or "test": sets of categories are dealt to one or the other, so test tasks are unseen.
    """

    categories: int = 16
    words_per_category: int = 8
    symbols: int = 32
    task_categories: int = 4
    repeats: float = 0.0
    repeat_tokens: int = 16
    repeat_spread: int = 8
    warmup_episodes: int = 0
    lists: float = 0.0
    list_categories: int = 4
    instructions: bool = False
    named_categories: int | None = None
    instruction_tokens: int | None = None
    min_instruction_tokens: int | None = None
    split: Literal["train", "test"] = "train"

    def problems(self) -> list[str]:
        """What is wrong with the sizes, a sentence each."""
        found = []
        if not 1 <= self.task_categories <= min(self.categories, self.symbols):
            found.append("task_categories must be at least 1 and at most categories and symbols")
        elif math.comb(self.categories, self.task_categories) < 100:
            found.append(
                "task_categories of categories give fewer than 100 sets to deal to train and test; use more categories"
            )
        if self.words_per_category < 2:
            found.append("words_per_category must be at least 2, so that a query can differ from its demonstration")
        if not 0 <= self.repeats <= 1 or not 0 <= self.lists <= 1:
            found.append("repeats and lists are shares between 0 and 1")
        if not 0 <= self.repeat_spread < self.repeat_tokens:
            found.append("repeat_spread must be at least 0 and less than repeat_tokens")
        if not 1 <= self.list_categories <= self.categories:
            found.append("list_categories must be at least 1 and at most categories")
        return found + self._problems_of_instructions()

    def _problems_of_instructions(self) -> list[str]:
        most, fewest, named = self.instruction_tokens, self.min_instruction_tokens, self.named_categories
        found = []
        if not self.instructions and (most, fewest, named) != (None, None, None):
            found.append("named_categories, instruction_tokens and min_instruction_tokens are of instructions; set it to true")
        if named is not None and not 1 <= named <= self.task_categories:
            found.append("named_categories must be at least 1 and at most task_categories")
        sentences = 4 * (named or self.task_categories) - 1  # three words each, and commas between
        if fewest is not None and (most is None or not sentences <= fewest <= most):
            found.append(f"min_instruction_tokens must be between {sentences}, the sentences alone, and instruction_tokens")
        if most is not None and most < sentences:
            found.append(f"instruction_tokens must be at least {sentences}, the sentences alone")
        if most is not None and self.task_categories == self.categories:
            found.append("instruction_tokens needs a category that a task does not have, for remarks; use more categories")
        return found


class SyntheticSource:
    """Episodes of a `SyntheticLanguage`; endless, so an epoch has no length."""

    def __init__(self, language: SyntheticLanguage):
        if language.problems():
            raise UserError(f"data.synthetic: {'; '.join(language.problems())}")
        self.language = language
        rng = Random("words of the language")  # fixed: every base and every task share one language
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        words: dict[str, None] = {}
        count = language.categories * language.words_per_category
        while len(words) < count + language.categories:
            words["".join(rng.choices(syllables, k=3))] = None
        self.words, names = list(words)[:count], list(words)[count:]
        self.categories = [self.words[i :: language.categories] for i in range(language.categories)]
        self.names = names if language.instructions else []
        self.symbols = tuple(f"<{i}>" for i in range(language.symbols))

    def __len__(self) -> int:
        return 0

    def evaluation(self, *, shots: int, queries: int, episodes: int, seed: int) -> list[Episode]:
        """`episodes` tasks, without any warm-up; neighbours differ."""
        made: list[Episode] = []
        for i in range(episodes):
            attempts = (self.task(Random(f"evaluation/{seed}/{i}/{attempt}"), shots, queries) for attempt in range(100))
            made.append(next(episode for episode in attempts if not made or episode.task != made[-1].task))
        return made

    def provenance(self) -> Provenance:
        return Provenance(frozenset({f"synthetic language, {self.language.split} split"}))

    def texts(self) -> list[str]:
        return [*self.words, *self.symbols, *self.names, *(["call", ","] if self.names else [])]

    def draw(self, rng: Random, shots: int, queries: int, index: int) -> Episode:
        if index < self.language.warmup_episodes and rng.random() < self.language.repeats:
            return self._repeat(rng, index / self.language.warmup_episodes)
        if rng.random() < self.language.lists:
            return self._list(rng)
        return self.task(rng, shots, queries)

    def task(self, rng: Random, shots: int, queries: int) -> Episode:
        """A task of this split: `shots` demonstrations spread evenly over its categories, and `queries` other words."""
        chosen = self._categories(rng)
        names = dict(zip(chosen, rng.sample(self.symbols, len(chosen)), strict=True))
        shown, held_back = [], []
        for place, category in enumerate(chosen):
            words = rng.sample(self.categories[category], self.language.words_per_category)
            share = min((shots + len(chosen) - 1 - place) // len(chosen), len(words) - 1)
            shown += [self._example(word, names[category]) for word in words[:share]]
            held_back += [self._example(word, names[category]) for word in words[share:]]
        rng.shuffle(shown)
        asked = rng.sample(held_back, min(queries, len(held_back)))
        instruction = self._instruction(rng, names) if self.names else ""
        return Episode(instruction, tuple(shown), tuple(asked), "synthetic " + "+".join(map(str, sorted(chosen))))

    def _instruction(self, rng: Random, symbols: dict[int, str]) -> str:
        """What a task's categories are called, drawn after the task itself; remarks and sentences in any order."""
        language, said = self.language, list(symbols)
        if language.named_categories is not None:
            said = rng.sample(said, language.named_categories)
        said = [f"call {self.names[category]} {symbols[category]}" for category in said]
        if language.instruction_tokens is None:
            return " , ".join(said)
        fewest, most = language.min_instruction_tokens, language.instruction_tokens
        missing = (most if fewest is None else rng.randint(fewest, most)) - (4 * len(said) - 1)
        others = [words for category, words in enumerate(self.categories) if category not in symbols]
        while missing > 1:
            words = min(rng.randint(1, min(4, language.words_per_category - 1)), missing - 1)
            words += missing - (words + 1) == 1  # nothing is left that no remark would fill
            said.append(" ".join(rng.sample(rng.choice(others), words)))
            missing -= words + 1
        rng.shuffle(said)
        return " , ".join(said)

    def _example(self, word: str, symbol: str) -> Example:
        return Example(word, symbol, (symbol,), self.symbols)

    def _categories(self, rng: Random) -> list[int]:
        while True:
            chosen = rng.sample(range(self.language.categories), self.language.task_categories)
            dealt_to_test = zlib.crc32(repr(sorted(chosen)).encode()) % 8 == 0
            if dealt_to_test == (self.language.split == "test"):
                return chosen

    def _repeat(self, rng: Random, progress: float) -> Episode:
        length = copied_tokens(rng, self.language.repeat_tokens, self.language.repeat_spread, progress)
        text = " ".join(rng.choices(self.texts(), k=length))
        return Episode("", (), (Example(text, text),), "repeat")

    def _list(self, rng: Random) -> Episode:
        named = [[*words, *self.names[i : i + 1]] for i, words in enumerate(self.categories)]
        chosen = rng.sample(named, self.language.list_categories)
        first, *rest = [word for category in chosen for word in rng.sample(category, len(category))]
        return Episode("", (), (Example(first, " ".join(rest)),), "list")


def from_recipe(part: Any) -> SyntheticSource:
    """The source that a part of a recipe's data describes."""
    return SyntheticSource(part.synthetic)
