"""The text of one few-shot episode, and what can draw one."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any, Literal, Protocol

from hyperllama.errors import UserError


@dataclass(frozen=True)
class Example:
    """One input and its output.

    `references` are all outputs that count as right, the output among them. `choices`, where there are some, are all answers
    that the input offers, the right one among them.
    """

    input: str
    output: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    def accepts(self, answer: str) -> bool:
        """Whether an answer equals a reference, apart from surrounding white space."""
        return answer.strip() in {reference.strip() for reference in self.references or (self.output,)}

    @property
    def key(self) -> str:
        """What makes two examples one: their inputs are equal, apart from white space around them."""
        return self.input.strip()

    def with_any_reference(self, rng: Random) -> Example:
        """The same example with one of its references as output."""
        return self if len(self.references) < 2 else dataclasses.replace(self, output=rng.choice(self.references))


def merged(examples: Iterable[Example]) -> tuple[tuple[Example, ...], int, int]:
    """Examples of which no two have the same `key`, so that none is shown when it is asked, and how many were said twice.

    Those that had are one now, at the place of the first: all of their outputs count as right, that of the first is shown. The
    numbers are those of the others, and of those of them whose outputs did not count before.
    """
    kept: dict[str, Example] = {}
    repeated = conflicting = 0
    for example in examples:
        first = kept.setdefault(example.key, example)
        if first is example:
            continue
        known, more = (one.references or (one.output,) for one in (first, example))
        references = tuple(dict.fromkeys([*known, *more]))
        repeated += 1
        if len(references) > len(known):
            conflicting += 1
            choices = first.choices and tuple(dict.fromkeys([*first.choices, *example.choices]))
            kept[example.key] = dataclasses.replace(first, references=references, choices=choices)
    return tuple(kept.values()), repeated, conflicting


def repetition_of(source: Any) -> dict[str, tuple[int, int]]:
    """What a source has found said twice, if it looks for that; see `said_twice`."""
    return source.repetition() if hasattr(source, "repetition") else {}


def tell_twice(counts: Mapping[str, tuple[int, int]]) -> None:
    """Print what `said_twice` says, if it says something."""
    if twice := said_twice(counts):
        print(twice, file=sys.stderr)


def said_twice(counts: Mapping[str, tuple[int, int]]) -> str | None:
    """What a user should know of examples that were said twice, by where they stand: (repeated, conflicting) each."""
    found = {where: both for where, both in counts.items() if both[0]}
    if not found:
        return None
    repeated, conflicting = (sum(both[i] for both in found.values()) for i in (0, 1))
    worst = max(found, key=lambda where: (found[where][1], found[where][0]))
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    with_other = f", {conflicting:,} of them with other outputs, which all count as right" if conflicting else ""
    return f"{worst}{more}: {repeated:,} examples have an input that stands there before and count as one with it{with_other}"


@dataclass(frozen=True)
class TextWindow:
    """Plain text in four pieces of so many tokens: context, prompt, continuation, and what comes after.

    The continuation is to be predicted after the prompt; context and what comes after are what is compressed. With a `period`
    the first so many tokens are said again and again.
    """

    text: str
    context_tokens: int
    continuation_tokens: int
    prompt_tokens: int = 1
    after_tokens: int = 0
    period: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the whole window."""
        return self.context_tokens + self.prompt_tokens + self.continuation_tokens + self.after_tokens


@dataclass(frozen=True)
class Episode:
    """What is compressed (an instruction and demonstrations) and what is asked of it (queries), or a `window` of plain text."""

    instruction: str
    demonstrations: tuple[Example, ...]
    queries: tuple[Example, ...]
    task: str = ""
    category: str = ""
    window: TextWindow | None = None


@dataclass(frozen=True)
class Task:
    """A task as its file has it: `demonstrations` are meant to be shown, `examples` to be asked.

    `category` groups tasks in reports; `datasets` names the data sets that it was made from; `repetition` counts examples that
    its file says twice, and those of them with other outputs (see `merged`).
    """

    name: str
    instruction: str
    demonstrations: tuple[Example, ...]
    examples: tuple[Example, ...]
    category: str = ""
    datasets: tuple[str, ...] = ()
    repetition: tuple[int, int] = (0, 0)

    def distinct(self) -> Task:
        """The same with `merged` demonstrations and examples, and `repetition` of what was said twice."""
        shown, asked = merged(self.demonstrations), merged(self.examples)
        if not (shown[1] or asked[1]):
            return self
        counts = tuple(sum(three) for three in zip(self.repetition, shown[1:], asked[1:]))
        return dataclasses.replace(self, demonstrations=shown[0], examples=asked[0], repetition=counts)


@dataclass(frozen=True)
class Provenance:
    """What a source is made of, to be held against another: names of tasks and data sets, and inputs word for word."""

    tasks: frozenset[str] = frozenset()
    datasets: frozenset[str] = frozenset()
    inputs: frozenset[str] = frozenset()

    def __or__(self, other: Provenance) -> Provenance:
        return Provenance(self.tasks | other.tasks, self.datasets | other.datasets, self.inputs | other.inputs)


Weights = Literal["equal", "size"]


class Source(Protocol):
    """Draws episodes. A new data source is one class with these members."""

    def draw(self, rng: Random, shots: int, queries: int, index: int) -> Episode:
        """The episode that `rng` decides, the `index`-th of its stream; with fewer shots or queries where there are fewer."""

    def evaluation(self, *, shots: int, queries: int, episodes: int, seed: int) -> list[Episode]:
        """The fixed episodes of an evaluation; at most `episodes` where the source could go on."""

    def __len__(self) -> int:
        """Episodes that make one epoch; 0 for an endless stream."""

    def texts(self) -> Iterable[str]:
        """All text of the source, to train a tokenizer on; for a generated language, its vocabulary."""

    def provenance(self) -> Provenance:
        """What the source is made of."""

    # A source that reads anything also has `fingerprint() -> str | None`, SHA-256 of all that it can draw, None if that is not
    # known. One that looks for inputs said twice has `repetition()`, as `TaskSource`.


def fingerprint_of(source: Any) -> str | None:
    """SHA-256 of all that a source can draw, if it knows."""
    return source.fingerprint() if hasattr(source, "fingerprint") else None


def _others(rng: Random, pool: int, drawn: Sequence[int]) -> Iterator[int]:
    """The rest of range(pool) in random order; what was drawn is enough unless demonstrations and examples share inputs."""
    seen = set(drawn)
    yield from (i for i in rng.sample(range(pool), pool) if i not in seen)


class TaskSource:
    """Episodes from a fixed list of tasks; demonstrations and queries of an episode have different inputs.

    A task is drawn with equal weight, or by its number of examples (`weights="size"`; cap sizes before, as Raffel et al.
    2020, arXiv 1910.10683, section 3.5.2, mix tasks). With `own_demonstrations` a task's own demonstrations are the only ones
    shown, in their order. In training an example that has several references shows one of them at random.
    """

    def __init__(self, tasks: Sequence[Task], *, weights: Weights = "equal", own_demonstrations: bool = False):
        self.tasks, self.own_demonstrations = [task.distinct() for task in tasks], own_demonstrations
        self.weights: Weights = weights
        self._cumulative = list(accumulate(len(task.examples) if weights == "size" else 1 for task in self.tasks))

    def without(self, names: Sequence[str]) -> TaskSource:
        """The same without the tasks of these names; UserError for a name that no task has, or if none is left."""
        if unknown := sorted(set(names) - {task.name for task in self.tasks}):
            raise UserError(f"data.leave_out: there is no task {unknown[0]}; remove it, or correct the name")
        kept = [task for task in self.tasks if task.name not in names]
        if not kept:
            raise UserError("data.leave_out: leaves no task; name fewer")
        return TaskSource(kept, weights=self.weights, own_demonstrations=self.own_demonstrations)

    def draw(self, rng: Random, shots: int, queries: int, index: int) -> Episode:
        (task,) = rng.choices(self.tasks, cum_weights=self._cumulative)
        asked = rng.sample(range(len(task.examples)), min(queries, len(task.examples)))
        taken = {task.examples[i].key for i in asked}
        if self.own_demonstrations:
            shown = [example for example in task.demonstrations if example.key not in taken][:shots]
        else:
            # Indices, not copies: a task can have many thousands of examples.
            own = len(task.demonstrations)
            pool = own + len(task.examples)
            drawn = rng.sample(range(pool), min(shots + len(asked), pool))
            shown = []
            for i in (*drawn, *_others(rng, pool, drawn)):
                if len(shown) == shots:
                    break
                example = task.demonstrations[i] if i < own else task.examples[i - own]
                if example.key not in taken:
                    taken.add(example.key)
                    shown.append(example)
        return Episode(
            task.instruction,
            tuple(example.with_any_reference(rng) for example in shown),
            tuple(task.examples[i].with_any_reference(rng) for i in asked),
            task.name,
            task.category,
        )

    def evaluation(self, *, shots: int, queries: int, episodes: int, seed: int) -> list[Episode]:
        """Every task once: its own first demonstrations, or where it has none some of its examples, and its first examples."""
        made = []
        for task in self.tasks[: episodes or None]:
            shown, asked = task.demonstrations[:shots], task.examples
            if not task.demonstrations:
                drawn = set(Random(f"{seed}/{task.name}").sample(range(len(asked)), min(shots, len(asked) - 1)))
                shown = tuple(asked[i] for i in sorted(drawn))
            taken = {example.key for example in shown}
            asked = tuple(example for example in asked if example.key not in taken)
            made.append(Episode(task.instruction, shown, asked[:queries], task.name, task.category))
        return made

    def __len__(self) -> int:
        return sum(len(task.examples) for task in self.tasks)

    def fingerprint(self) -> str | None:
        """SHA-256 of all tasks, word for word."""
        digest = hashlib.sha256()
        for task in self.tasks:
            digest.update(
                repr((task.name, task.instruction, task.category, task.demonstrations, task.examples)).encode("utf-8")
            )
        return digest.hexdigest()

    def repetition(self) -> dict[str, tuple[int, int]]:
        """Of each task, how many examples were said twice, and with other outputs, as far as it has been read."""
        return {task.name: task.repetition for task in self.tasks}

    def texts(self) -> list[str]:
        return [
            text
            for task in self.tasks
            for text in (task.instruction, *(t for e in (*task.demonstrations, *task.examples) for t in (e.input, e.output)))
        ]

    def provenance(self) -> Provenance:
        return Provenance(
            frozenset(task.name for task in self.tasks),
            frozenset(name for task in self.tasks for name in task.datasets),
            frozenset(e.input for task in self.tasks for e in (*task.demonstrations, *task.examples)),
        )
