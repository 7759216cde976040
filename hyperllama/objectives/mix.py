"""What a hypernetwork is trained for: how much each objective weighs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mix:
    """How much of each objective a loss has: every one is a mean over its own tokens.

    answer: cross entropy of what queries are answered with, or of text's continuation. distillation: divergence of the answers
    behind a prefix from those of the frozen model behind the whole context. reconstruction: cross entropy of the context's own
    tokens, said again from its prefix alone.
    """

    answer: float = 1.0
    distillation: float = 0.0
    reconstruction: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong with the weights, a sentence each."""
        weights = (self.answer, self.distillation, self.reconstruction)
        if min(weights) < 0:
            return ["weights are not negative"]
        return [] if self.answer or self.distillation else ["answer or distillation must weigh something: queries are read"]


ANSWERS = Mix()
