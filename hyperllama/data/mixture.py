"""Several sources as one, by weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import accumulate
from operator import or_
from random import Random

from hyperllama.data.episode import Episode, Provenance, Source, fingerprint_of, repetition_of
from hyperllama.errors import UserError
from hyperllama.files import sha256


class MixtureSource:
    """Each episode comes from one of `sources`, drawn by `weights`; the episode's own random numbers decide which.

    `shots` are (fewest, most) of the sources that have their own.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], shots: Sequence[tuple[int, int] | None] | None = None
    ):
        if not sources or len(sources) != len(weights) or not all(weight > 0 for weight in weights):
            raise UserError("data.mixture: needs at least one source, each with a weight above 0")
        self.sources = list(sources)
        self._parts = list(zip(self.sources, shots or [None] * len(self.sources), strict=True))
        self._cumulative = list(accumulate(weights))

    def draw(self, rng: Random, shots: int, queries: int, index: int) -> Episode:
        ((source, own),) = rng.choices(self._parts, cum_weights=self._cumulative)
        return source.draw(rng, rng.randint(*own) if own else shots, queries, index)

    def evaluation(self, *, shots: int, queries: int, episodes: int, seed: int) -> list[Episode]:
        """The evaluation episodes of all sources, one source after the other."""
        asked = {"queries": queries, "episodes": episodes, "seed": seed}
        return [e for source, own in self._parts for e in source.evaluation(shots=own[1] if own else shots, **asked)]

    def __len__(self) -> int:
        sizes = [len(source) for source in self.sources]
        return sum(sizes) if all(sizes) else 0

    def fingerprint(self) -> str | None:
        """SHA-256 of those of the sources that have one."""
        return sha256(*(fingerprint_of(source) or "" for source in self.sources))

    def repetition(self) -> dict[str, tuple[int, int]]:
        """What was said twice in all sources that know."""
        return {name: counts for source in self.sources for name, counts in repetition_of(source).items()}

    def texts(self) -> Iterable[str]:
        return (text for source in self.sources for text in source.texts())

    def provenance(self) -> Provenance:
        return reduce(or_, (source.provenance() for source in self.sources))
