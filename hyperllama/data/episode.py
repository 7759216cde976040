"""The text of one few-shot episode, and what can draw one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Literal, Protocol


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

    def with_any_reference(self, rng: Random) -> Example:
        """The same example with one of its references as output."""
        return self if len(self.references) < 2 else dataclasses.replace(self, output=rng.choice(self.references))


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

    `category` groups tasks in reports; `datasets` names the data sets that it was made from.
    """

    name: str
    instruction: str
    demonstrations: tuple[Example, ...]
    examples: tuple[Example, ...]
    category: str = ""
    datasets: tuple[str, ...] = ()


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


class TaskSource:
    """Episodes from a fixed list of tasks; demonstrations and queries of an episode are distinct.

    A task is drawn with equal weight, or by its number of examples (`weights="size"`; cap sizes before, as Raffel et al.
    2020, arXiv 1910.10683, section 3.5.2, mix tasks). With `own_demonstrations` a task's own demonstrations are the only ones
    shown, in their order. In training an example that has several references shows one of them at random.
    """

    def __init__(self, tasks: Sequence[Task], *, weights: Weights = "equal", own_demonstrations: bool = False):
        self.tasks, self.own_demonstrations = list(tasks), own_demonstrations
        self._cumulative = list(accumulate(len(task.examples) if weights == "size" else 1 for task in self.tasks))

    def draw(self, rng: Random, shots: int, queries: int, index: int) -> Episode:
        (task,) = rng.choices(self.tasks, cum_weights=self._cumulative)
        asked = rng.sample(range(len(task.examples)), min(queries, len(task.examples)))
        if self.own_demonstrations:
            shown = list(task.demonstrations[:shots])
        else:
            # Indices, not copies: a task can have many thousands of examples.
            own, taken = len(task.demonstrations), set(asked)
            pool = own + len(task.examples)
            drawn = rng.sample(range(pool), min(shots + len(asked), pool))
            kept = [i for i in drawn if i - own not in taken][:shots]
            shown = [task.demonstrations[i] if i < own else task.examples[i - own] for i in kept]
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
                asked = tuple(example for i, example in enumerate(asked) if i not in drawn)
            made.append(Episode(task.instruction, shown, asked[:queries], task.name, task.category))
        return made

    def __len__(self) -> int:
        return sum(len(task.examples) for task in self.tasks)

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
