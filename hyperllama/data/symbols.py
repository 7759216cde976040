"""Symbol tuning (Wei et al. 2023, arXiv 2305.08298): labels are replaced by arbitrary symbols, so only demonstrations can tell.

Every episode gives the labels of one set new symbols: integers, strings of letters, or words (the paper's three kinds, section
3). There is no instruction. One symbol in eight is kept for evaluation and never seen in training.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any, Literal

from hyperllama.data.episode import Episode, Example, Provenance
from hyperllama.data.labelled import LabelledSet, labelled_sets
from hyperllama.data.words import WORDS
from hyperllama.errors import UserError
from hyperllama.files import canonical_json, sha256

KINDS = ("integers", "strings", "words")


@dataclass(frozen=True)
class SymbolSettings:
    """`sets`: names of sets below data.root, or "name" / "name:config" on the hub; empty for all of a folder.

    labels: "symbols", or "original" for the labels that the set came with. `pool` "train" or "test" are disjoint sets of
    symbols; null follows data.split: test symbols for every split but train. data.shots and data.min_shots count
    demonstrations per class (2 to 10 in the paper).
    """

    sets: list[str] = field(default_factory=list)
    labels: Literal["symbols", "original"] = "symbols"
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    pool: Literal["train", "test"] | None = None

    def problems(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            return [f"kinds: choose from {', '.join(KINDS)}, not {', '.join(unknown) or 'none'}"]
        return []


@cache
def symbol_pool(kind: str, split: str) -> tuple[str, ...]:
    """All symbols of one kind that a split may use; train and test share none."""
    if kind == "integers":
        symbols = [str(number) for number in range(10_000)]
    elif kind == "strings":
        rng = Random("strings of letters")  # fixed: the pools must not depend on a run's seed
        letters = "abcdefghijklmnopqrstuvwxyz"
        drawn = dict.fromkeys("".join(rng.choices(letters, k=rng.randint(2, 5))) for _ in range(10_000))
        symbols = [text for text in drawn if text not in set(WORDS)]
    else:
        symbols = list(WORDS)
    return tuple(s for s in symbols if (zlib.crc32(s.encode()) % 8 == 0) == (split == "test"))


class SymbolSource:
    """Episodes of labelled sets, each set equally likely; `shots` counts demonstrations per class."""

    def __init__(self, sets: Sequence[LabelledSet], settings: SymbolSettings, *, instances: int):
        if settings.problems():
            raise UserError(f"data.symbols.{settings.problems()[0]}")
        self.sets, self.settings = list(sets), settings
        self.pool = settings.pool or ("train" if sets[0].split.startswith("train") else "test")
        # By class, so that an episode can take as many of each; a set's cap is shared out over its classes.
        self._rows: list[list[list[dict]]] = []
        for labelled in self.sets:
            by_label = {label: [row for row in labelled.rows if row["label"] == label] for label in labelled.labels}
            share = max(2, instances // len(by_label))
            rng = Random(f"rows of {labelled.name}")
            capped = [rng.sample(rows, share) if len(rows) > share else rows for rows in by_label.values()]
            short = [label for label, rows in zip(by_label, capped) if len(rows) < 2]
            if short:
                raise UserError(
                    f"{labelled.name}: label {short[0]!r} has fewer than two rows, one to show and one to ask; "
                    "leave the set out of data.symbols.sets"
                )
            self._rows.append(capped)

    def draw(self, rng: Random, shots: int, queries: int, index: int) -> Episode:
        return self._episode(rng.randrange(len(self.sets)), rng, shots, queries)

    def evaluation(self, *, shots: int, queries: int, episodes: int, seed: int) -> list[Episode]:
        """`episodes` episodes, the sets in turn."""
        return [self._episode(i % len(self.sets), Random(f"evaluation/{seed}/{i}"), shots, queries) for i in range(episodes)]

    def _episode(self, place: int, rng: Random, shots: int, queries: int) -> Episode:
        labelled, shown, left = self.sets[place], [], []
        names = self._names(labelled, rng)
        for name, rows in zip(names, self._rows[place], strict=True):
            drawn = rng.sample(rows, min(shots + queries, len(rows)))
            share = min(shots, len(drawn) - 1)
            for i, row in enumerate(drawn):
                (shown if i < share else left).append(Example(labelled.text(row), name, (name,), names))
        rng.shuffle(shown)
        asked = rng.sample(left, min(queries, len(left)))
        return Episode("", tuple(shown), tuple(asked), labelled.name, labelled.name)

    def _names(self, labelled: LabelledSet, rng: Random) -> tuple[str, ...]:
        if self.settings.labels == "original":
            return labelled.labels
        return tuple(rng.sample(symbol_pool(rng.choice(self.settings.kinds), self.pool), len(labelled.labels)))

    def __len__(self) -> int:
        return sum(len(rows) for by_label in self._rows for rows in by_label)

    def fingerprint(self) -> str:
        """SHA-256 of the rows that may be drawn."""
        return sha256(canonical_json([self.settings.kinds, [labelled.labels for labelled in self.sets], self._rows]))

    def repetition(self) -> dict[str, tuple[int, int]]:
        """Of each set, how many rows had the text of another and are left out, and how many of them had another label."""
        return {labelled.name: labelled.repetition for labelled in self.sets}

    def texts(self) -> list[str]:
        rows = [labelled.text(row) for labelled, groups in zip(self.sets, self._rows) for rows in groups for row in rows]
        names = [s for kind in self.settings.kinds for s in symbol_pool(kind, self.pool)]
        return rows + (names if self.settings.labels == "symbols" else [label for s in self.sets for label in s.labels])

    def provenance(self) -> Provenance:
        inputs = {labelled.text(row) for labelled, groups in zip(self.sets, self._rows) for rows in groups for row in rows}
        names = frozenset(labelled.name for labelled in self.sets)
        return Provenance(names, names, frozenset(inputs))


def from_recipe(part: Any) -> SymbolSource:
    """The source that a part of a recipe's data describes."""
    return SymbolSource(labelled_sets(part, part.symbols.sets), part.symbols, instances=part.instances_per_task)
