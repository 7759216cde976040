"""The text of one few-shot episode, and what can draw one."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Protocol


@dataclass(frozen=True)
class Example:
    """One input and its output; `references` are all outputs that count as right, the output among them."""

    input: str
    output: str
    references: tuple[str, ...] = ()

    def accepts(self, answer: str) -> bool:
        """Whether an answer equals a reference, apart from surrounding white space."""
        return answer.strip() in {reference.strip() for reference in self.references or (self.output,)}


@dataclass(frozen=True)
class Episode:
    """What is compressed (an instruction and demonstrations) and what is asked of it (queries)."""

    instruction: str
    demonstrations: tuple[Example, ...]
    queries: tuple[Example, ...]
    task: str = ""


@dataclass(frozen=True)
class Task:
    """A task as its file has it: `demonstrations` are meant to be shown, `examples` to be asked."""

    name: str
    instruction: str
    demonstrations: tuple[Example, ...]
    examples: tuple[Example, ...]


class Source(Protocol):
    """Draws episodes. A new data source is one class with these three members."""

    def draw(self, rng: Random, shots: int, queries: int, index: int) -> Episode:
        """The episode that `rng` decides, the `index`-th of its stream; with fewer shots or queries where there are fewer."""

    def __len__(self) -> int:
        """Episodes that make one epoch; 0 for an endless stream."""

    def texts(self) -> list[str]:
        """All text of the source, to train a tokenizer on; for a generated language, its vocabulary."""


class TaskSource:
    """Episodes from a fixed list of tasks, each equally likely; demonstrations and queries of an episode are distinct.

    Demonstrations are drawn from a task's own demonstrations and its examples, queries from its examples.
    """

    def __init__(self, tasks: list[Task]):
        self.tasks = tasks

    def draw(self, rng: Random, shots: int, queries: int, index: int) -> Episode:
        task = rng.choice(self.tasks)
        asked = rng.sample(range(len(task.examples)), min(queries, len(task.examples)))
        others = [example for i, example in enumerate(task.examples) if i not in set(asked)]
        shown = rng.sample([*task.demonstrations, *others], min(shots, len(task.demonstrations) + len(others)))
        return Episode(task.instruction, tuple(shown), tuple(task.examples[i] for i in asked), task.name)

    def __len__(self) -> int:
        return sum(len(task.examples) for task in self.tasks)

    def texts(self) -> list[str]:
        return [
            text
            for task in self.tasks
            for text in (task.instruction, *(t for e in (*task.demonstrations, *task.examples) for t in (e.input, e.output)))
        ]
