"""Passages that a model makes up behind a context, to be tuned on: how many, how long, how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passages:
    """`count` passages for each context, of at most `tokens` tokens, sampled at `temperature`."""

    count: int = 32
    tokens: int = 64
    temperature: float = 1.0

    def problems(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        found = [] if self.count >= 2 else [f"count: at least 2, one to tune on and one to stop by, not {self.count}"]
        if self.tokens < 2:
            found.append(f"tokens: at least 2, one to read and one to predict, not {self.tokens}")
        if self.temperature <= 0:
            found.append(f"temperature: above 0, not {self.temperature}")
        return found
