"""The page's work, without the page: what a user wants is compressed, and a question is answered behind all that came of it."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from hyperllama.commands.compress import ROWS, Compressor, check_maker
from hyperllama.commands.generate import AnswerStreamer
from hyperllama.data.episode import Task
from hyperllama.data.text import ContextIds
from hyperllama.demo.tasks import pasted, unseen
from hyperllama.errors import UserError
from hyperllama.files import plain_name
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.registry import KINDS
from hyperllama.inference.many import shown_of
from hyperllama.prefixes.prefix import Prefix

T = TypeVar("T")

NOTHING, PREFIX, REFINED, WHOLE = COLUMNS = ("no context", "prefix", "refined prefix", "full context")
MOST_REFINING = 40  # steps
MOST_ASKED = 8_000  # characters of an input


@dataclass(frozen=True)
class Wanted:
    """What a user wants to be compressed: examples as text (see `pasted`), of which the first `shots` are shown.

    `gists` and `refine` as in `hyperllama.commands.compress.compress`.
    """

    text: str
    instruction: str = ""
    task: str = "examples"
    shots: int = 16
    gists: int | None = None
    refine: int = 0


@dataclass(frozen=True)
class Made:
    """What came of it, for one user: `states` by column, keys and values that stand before a query, None for nothing.

    `seconds` by column say how long each took to make. `looks` (G, T) is how much each row looks at each token of the context,
    or the reason why that is not known. `file` is the prefix file, the refined prefix where there is one, alone in its folder.
    `unseen` are outputs of examples that were not shown, by input.
    """

    task: str
    context: ContextIds
    states: dict[str, Prefix | None]
    seconds: dict[str, float]
    looks: Tensor | str
    file: Path
    unseen: dict[str, str] = field(default_factory=dict)

    @property
    def prefix(self) -> Prefix:
        """What is in the file."""
        return self.states.get(REFINED) or self.states[PREFIX]

    def remove(self) -> None:
        """Remove the file and its folder."""
        shutil.rmtree(self.file.parent, ignore_errors=True)


@dataclass(frozen=True)
class Answer:
    """The answer of one column as far as it has come: `first` and `total` are seconds, None while they are not known.

    `rows` and `nbytes` are of the keys and values before the query. `problem` says why there is no answer.
    """

    column: str
    rows: int
    nbytes: int
    text: str = ""
    first: float | None = None
    total: float | None = None
    problem: str = ""


class Demo:
    """A loaded hypernetwork, or a base model in its place, for any number of users: one at a time has the model.

    Prefix files go into folders of their own below `folder`.
    """

    def __init__(self, run: str | Path, folder: str | Path, *, base_path: str | None = None, dtype: str | None = None):
        check_maker(run, None, 0)
        self.folder, self.lock = Path(folder), Lock()
        self.compressor = Compressor.load(run, base_path, gists=2 * ROWS, dtype=dtype)
        self.reader, self.encoder = self.compressor.reader, self.compressor.encoder
        start = self.encoder.start
        self.nothing = self.reader.encode([start])[0] if start else None
        # What is computed for the first time takes longer, and would be told of the first column.
        for behind in (None, self.reader.encode([self.encoder.prompt("a word")])[0]):
            self.reader.generate([self.encoder.prompt("a word")], None if behind is None else [behind], max_new_tokens=2)

    @property
    def parameters(self) -> int:
        """Weights of the base."""
        return sum(weight.numel() for weight in self.reader.model.parameters())

    @property
    def gists(self) -> range:
        """How many gists a prefix may have."""
        hypernetwork = self.compressor.hypernetwork
        most = hypernetwork.num_gists
        return range(max(1, hypernetwork.fewest_gists) if hypernetwork.elastic else most, most + 1)

    @property
    def refines(self) -> bool:
        """Whether what is made can be refined: not task modules."""
        kind = self.compressor.hypernetwork.kind
        return not (kind in KINDS and KINDS[kind].makes_modules)

    def compress(self, wanted: Wanted, tell: Callable[[int, int], object] = lambda step, steps: None) -> Made:
        """Make a prefix, and a refined one, and encode the whole context; `tell` hears of each step of refining.

        UserError for what cannot be compressed, before anything is computed.
        """
        examples = pasted(wanted.text)
        shown = shown_of(Task(wanted.task, "", (), examples), shots=wanted.shots, instruction=wanted.instruction.strip())
        if not 0 <= wanted.refine <= (MOST_REFINING if self.refines else 0):
            raise UserError(f"refine: 0 to {MOST_REFINING} steps, and none for task modules, not {wanted.refine}")
        if wanted.gists is not None and wanted.gists not in self.gists:
            raise UserError(f"rows: {self.gists[0]} to {self.gists[-1]}, not {wanted.gists}")
        maker, refined = self.compressor.of_gists(wanted.gists), None
        refiner = maker.refiner(wanted.refine, tell=lambda step: tell(step, wanted.refine))
        context, manifest = maker.fitting(shown)
        with self.lock:
            made = {"contexts": [context], "gists": wanted.gists}
            prefix, making = timed(lambda: maker.hypernetwork.compress(**made, manifests=[manifest])[0])
            whole, reading = timed(lambda: self.reader.encode([context])[0])
            states, seconds = {NOTHING: self.nothing, PREFIX: prefix}, {PREFIX: making, WHOLE: reading}
            if refiner:
                signed = [replace(manifest, refined=refiner.settings)]
                refined, seconds[REFINED] = timed(lambda: refiner.compress(**made, manifests=signed)[0])
                states[REFINED] = refined
            looks = self._looks(maker.hypernetwork, context, wanted.gists)
        file = self.folder / secrets.token_hex(8) / f"{plain_name(wanted.task)}.safetensors"
        (refined or prefix).save(file)
        own = unseen(examples, wanted.shots)
        return Made(wanted.task, context, {**states, WHOLE: whole}, seconds, looks, file, own)

    @staticmethod
    def _looks(hypernetwork: Hypernetwork, context: ContextIds, gists: int | None) -> Tensor | str:
        try:
            return hypernetwork.looks_at(context, gists=gists)
        except UserError as error:
            return str(error)

    def words(self, made: Made) -> list[str]:
        """The text of each token of the context."""
        return [self.encoder.tokenizer.decode([token]) for token in made.context]

    def ask(self, made: Made, text: str) -> Iterator[tuple[Answer, ...]]:
        """Answers to one input, a column each, one after the other: all of them anew whenever one has grown.

        Greedy, as `hyperllama.commands.generate.Session` answers. UserError for an input that no column has room for. Whoever
        stops listening stops the answers.
        """
        asked = self._begun(made, text)
        heard: SimpleQueue[tuple[Answer, ...] | BaseException | None] = SimpleQueue()
        stopped = Event()
        # Not a generator that holds the lock: it may be left alone between two pieces, or closed by another thread.
        parts = (made, self.encoder.prompt(text.strip()), asked, heard, stopped)
        Thread(target=self._answer_all, args=parts, daemon=True).start()
        try:
            yield tuple(asked)
            while (grown := heard.get()) is not None:
                if isinstance(grown, BaseException):
                    raise grown
                yield grown
        finally:
            stopped.set()

    def _begun(self, made: Made, text: str) -> list[Answer]:
        """The columns before anything is answered."""
        if not text.strip():
            raise UserError("input: is empty; write something to be answered")
        if len(text) > MOST_ASKED:
            raise UserError(f"input: {len(text):,} characters, but the page takes {MOST_ASKED:,}; shorten it")
        prompt, new, begun = self.encoder.prompt(text.strip()), self.encoder.format.answer_tokens, []
        for column in (name for name in COLUMNS if name in made.states):
            state = made.states[column]
            found = [said for _, said in self.reader.too_long([prompt], None if state is None else [state], new)]
            problem = found[0].partition(";")[0] + "; shorten the input" if found else ""
            sizes = (0, 0) if state is None else (state.rows, state.nbytes)
            begun.append(Answer(column, *sizes, problem=problem))
        if all(answer.problem for answer in begun):
            raise UserError(f"input: {begun[0].problem}")
        return begun

    def _answer_all(self, made: Made, prompt: list[int], begun: list[Answer], heard: SimpleQueue, stopped: Event) -> None:
        """Answer in every column that has room, and put all of them into `heard` as they grow; None, or an error, ends it."""
        answers = list(begun)

        def show(place: int, answer: Answer) -> None:
            answers[place] = answer
            heard.put(tuple(answers))

        try:
            with self.lock:
                # Whatever is computed first for a prompt of this length is slower, and that would be told of the first column.
                self.reader.generate([prompt], max_new_tokens=1)
                for place, answer in enumerate(begun):
                    if not answer.problem and not stopped.is_set():
                        self._answer(answer, prompt, made.states[answer.column], stopped, partial(show, place))
            heard.put(None)
        except BaseException as error:  # it belongs to who listens
            heard.put(error)

    def _answer(
        self, answer: Answer, prompt: list[int], state: Prefix | None, stopped: Event, show: Callable[[Answer], object]
    ) -> None:
        stop, behind = self.encoder.format.separator, None if state is None else [state]
        said = _Said(self.encoder.tokenizer, stop, lambda text, first: show(replace(answer, text=text, first=first)))
        settings = {"stop": stop, "max_new_tokens": self.encoder.format.answer_tokens, "streamer": said}
        settings["stopping_criteria"] = [_Stopped(stopped)]
        (tokens,), total = timed(lambda: self.reader.generate([prompt], behind, **settings))
        show(replace(answer, text=self.encoder.answer_of(tokens), first=said.first, total=total))


class _Said(AnswerStreamer):
    """Hands all that has been answered so far to `show`, with the seconds that went by until the first token, `first`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str, show: Callable[[str, float | None], object]):
        super().__init__(tokenizer, stop)
        self.begun, self.text, self.told = time.perf_counter(), "", show
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        """As of every streamer: the prompt comes first, then each token."""
        if self.first is None and not self.next_tokens_are_prompt:
            self.first = time.perf_counter() - self.begun
        super().put(value)

    def show(self, text: str, stream_end: bool) -> None:
        self.text += text
        self.told(self.text.strip(), self.first)


class _Stopped(StoppingCriteria):
    """Ends an answer that nobody listens to any more."""

    def __init__(self, stopped: Event):
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What some work returns, and the seconds that it took."""
    begun = time.perf_counter()
    return work(), time.perf_counter() - begun
