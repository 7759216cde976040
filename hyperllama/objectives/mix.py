"""What a hypernetwork is trained for: objectives by name, and how much each weighs. Nothing here loads torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, make_dataclass
from functools import cache
from typing import Literal


@dataclass(frozen=True)
class Objective:
    """One thing to be trained for: `home` is "module:function" of (logits, targets, teacher logits or None) -> a summed loss.

    logits (n, V) of `rows`: "answers", the tokens that queries are answered with, or "context", the context's own tokens, to be
    said again from its prefix alone. With a `teacher` they come with the logits of the frozen model behind the whole context.
    """

    home: str
    rows: Literal["answers", "context"] = "answers"
    teacher: bool = False
    weight: float = 0.0  # unless a recipe says

    def loss(self) -> Callable:
        """The function."""
        module, name = self.home.split(":")
        return getattr(importlib.import_module(module), name)


# A new objective is a function in a file of its own and a line in this table.
OBJECTIVES: dict[str, Objective] = {
    "answer": Objective("hyperllama.objectives.losses:cross_entropy_sum", weight=1.0),
    "distillation": Objective("hyperllama.objectives.losses:divergence_from_teacher", teacher=True),
    "reconstruction": Objective("hyperllama.objectives.losses:cross_entropy_sum", rows="context"),
}


class _Weights:
    """How much of each objective a loss has: every one is a mean over its own tokens. A field for each of `OBJECTIVES`."""

    def weighing(self, rows: str) -> dict[str, float]:
        """The weights above 0 of objectives of these rows, by name."""
        weights = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: weight for name, weight in weights.items() if weight and OBJECTIVES[name].rows == rows}

    @property
    def taught(self) -> list[str]:
        """The names of objectives that need what the frozen model says with the whole context."""
        return [name for name in self.weighing("answers") if OBJECTIVES[name].teacher]

    @property
    def says_again(self) -> bool:
        """Whether contexts are said again from their prefixes."""
        return bool(self.weighing("context"))

    def problems(self) -> list[str]:
        """What is wrong with the weights, a sentence each."""
        if min(getattr(self, field.name) for field in fields(self)) < 0:
            return ["weights are not negative"]
        of_answers = [name for name, objective in OBJECTIVES.items() if objective.rows == "answers"]
        return [] if self.weighing("answers") else [f"{' or '.join(of_answers)} must weigh something: queries are read"]


def mix_class() -> type:
    """The dataclass of weights of all objectives that there are now."""
    return _mix_class(tuple((name, objective.weight) for name, objective in OBJECTIVES.items()))


@cache
def _mix_class(weights: tuple[tuple[str, float], ...]) -> type:
    named = [(name, float, weight) for name, weight in weights]
    made = make_dataclass("Mix", named, bases=(_Weights,), frozen=True)
    made.__module__, made.__doc__ = __name__, _Weights.__doc__
    return made


Mix = mix_class()
ANSWERS = Mix()


def summed(weights: Mapping[str, float], logits, targets, teacher_logits=None):
    """The loss of rows of logits (n, V) under objectives by their weights, a sum over targets (n,)."""
    return sum(weight * OBJECTIVES[name].loss()(logits, targets, teacher_logits) for name, weight in weights.items())
