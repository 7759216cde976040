"""The reading graph: which segment of a packed row reads the gists of which earlier segments, and where each one stands."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
COLUMNS = (
    "positions",
    "gist_rows",
    "gist_slots",
    "read_gists",
    "read_shifts",
    "copies",
    "seen",
    "plain_ends",
    "row_ends",
    "key_ends",
)


@dataclass(frozen=True)
class Segment:
    """A run of `tokens` rows whose last `gists` rows are gist rows, which reads the gists of the segments in `reads`.

    `reads` holds indices of earlier segments; the reader sees their gists in this order, before itself.
    """

    tokens: int
    gists: int = 0
    reads: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "reads", tuple(self.reads))
        for name, number in [("tokens", self.tokens), ("gists", self.gists), *(("reads", i) for i in self.reads)]:
            if isinstance(number, bool) or not isinstance(number, int):
                raise ValueError(f"a segment's {name} must be whole numbers, not {number!r}")
        if self.tokens < 1:
            raise ValueError(f"a segment needs at least one token, not {self.tokens}")
        if not 0 <= self.gists <= self.tokens:
            raise ValueError(f"a segment of {self.tokens} tokens cannot have {self.gists} gists")
        if len(set(self.reads)) < len(self.reads):
            raise ValueError(f"a segment reads each segment once, not {self.reads}")


# Short readers of the same gists share an attention call, up to this many rows. Scores between them are computed in vain, but
# that costs less than another call with another copy of the gists.
MERGED_ROWS = 64


@dataclass(frozen=True)
class Run:
    """`count` neighbours of one shape: each reads `reads` gist rows, and then each of its parts sees itself, causally.

    A part is a segment, with as many rows as `parts` says. There is one, unless short segments that read the same gists stand
    next to each other.
    """

    count: int
    parts: tuple[int, ...]
    reads: int

    @property
    def tokens(self) -> int:
        """Rows of one of the neighbours."""
        return sum(self.parts)


@dataclass(frozen=True)
class GistLayout:
    """A packed row of segments: validated, with positions and every index that attention needs, built once per batch.

    Positions: a reader sees the gists that it reads as if they stood directly before it, in the order of `reads`.
    Rotary attention depends on differences only, so segments are placed such that most gists already stand where their
    readers expect them. Where two readers see one gist at different distances, the copy of its key that is gathered for a
    reader is rotated by the entry of `read_shifts`.

    All tensors are int64 and live in one buffer, so `to` is one transfer:

    positions (T,)      rotary position of each row
    gist_rows (S,)      rows that are gists, segment after segment
    gist_slots (S,)     which gist of its segment each of them is, 0 .. gists - 1
    read_gists (R,)     what each neighbour in each of `runs` reads, as places in `gist_rows`
    read_shifts (R,)    how far the key of each of these is to be rotated for its reader
    copies (C,)         what each segment reads, as places in `read_gists`; R of them in order, if no run has several parts
    seen (K,)           what each segment from `first_reader` on sees: places in its copies, then C + row for its own rows
    plain_ends (p + 1,) where the segments before `first_reader` begin and end
    row_ends, key_ends (n - p + 1,)  where the others begin and end, among their rows and in `seen`

    Raises ValueError if the list is empty or a segment reads a later segment or one without gists.

    >>> layout = GistLayout([Segment(5, gists=2), Segment(3, reads=(0,))])
    >>> layout.positions.tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    >>> layout.gist_rows.tolist(), layout.compress_rows
    ([3, 4], 5)
    """

    segments: tuple[Segment, ...]
    # The first position of each segment, and how far each of its reads has to be moved to stand where it should.
    starts: tuple[int, ...] = field(init=False, compare=False, repr=False)
    shifts: tuple[tuple[int, ...], ...] = field(init=False, compare=False, repr=False)
    runs: tuple[Run, ...] = field(init=False, compare=False, repr=False)
    shifted: bool = field(init=False, compare=False, repr=False)
    _buffer: Tensor = field(init=False, compare=False, repr=False)
    _sizes: tuple[int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        segments = tuple(self.segments)
        if not segments:
            raise ValueError("a layout needs at least one segment")
        for i, segment in enumerate(segments):
            for j in segment.reads:
                if not 0 <= j < i:
                    raise ValueError(f"segment {i} reads segment {j}, but a segment reads only earlier segments")
                if not segments[j].gists:
                    raise ValueError(f"segment {i} reads segment {j}, which has no gists")
        starts, shifts = _place(segments)
        merged = _merge(segments, shifts)
        self._set(
            segments=segments,
            starts=starts,
            shifts=shifts,
            runs=_runs(segments, merged),
            shifted=any(shift for own in shifts for shift in own),
        )
        columns = self._columns(merged)
        self._set(_buffer=torch.cat(columns), _sizes=tuple(len(column) for column in columns))
        self._name_views()

    def _columns(self, merged: list[list[int]]) -> list[Tensor]:
        """Every index, in the order of `COLUMNS`. `merged` groups neighbouring segments that share what they read."""
        segments, tokens = self.segments, [s.tokens for s in self.segments]
        gists = [s.gists for s in segments]
        first_gist = list(accumulate(gists, initial=0))
        reads = [(i, k, j) for group in merged for i in group[:1] for k, j in enumerate(segments[i].reads)]
        widths = [self.width(i) for i in range(len(segments))]
        groups = [widths[group[0]] for group in merged]
        place = {i: first for group, first in zip(merged, accumulate(groups, initial=0)) for i in group}
        readers = range(self.first_reader, len(segments))
        copied = list(accumulate(widths, initial=0))
        # Of each reader first what it reads, then its own rows.
        firsts = [x for i in readers for x in (copied[i], copied[-1] + self.row_starts[i] - self.plain_rows)]
        lengths = [x for i in readers for x in (widths[i], tokens[i])]
        return [
            _ranges(self.starts, tokens),
            _ranges([row + n - g for row, n, g in zip(self.row_starts, tokens, gists)], gists),
            _ranges([0] * len(gists), gists),
            _ranges([first_gist[j] for *_, j in reads], [gists[j] for *_, j in reads]),
            _repeat([self.shifts[i][k] for i, k, _ in reads], [gists[j] for *_, j in reads]),
            _ranges([place[i] for i in range(len(segments))], widths),
            _ranges(firsts, lengths),
            _ends(tokens[: self.first_reader]),
            _ends(tokens[self.first_reader :]),
            _ends([widths[i] + tokens[i] for i in readers]),
        ]

    def width(self, segment: int) -> int:
        """How many gist rows a segment reads."""
        return sum(self.segments[j].gists for j in self.segments[segment].reads)

    def gists_of(self, segment: int) -> range:
        """The packed rows of one segment's gists."""
        end = self.row_starts[segment] + self.segments[segment].tokens
        return range(end - self.segments[segment].gists, end)

    def _set(self, **fields):
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _name_views(self):
        self._set(**dict(zip(COLUMNS, self._buffer.split(self._sizes), strict=True)))

    def __getstate__(self):
        # Views would each be pickled with the whole buffer: a worker process sends the buffer once.
        names = ("segments", "starts", "shifts", "runs", "shifted", "_buffer", "_sizes")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state):
        self._set(**state)
        self._name_views()

    @cached_property
    def tokens(self) -> int:
        """T, the number of packed rows."""
        return sum(segment.tokens for segment in self.segments)

    @cached_property
    def row_starts(self) -> tuple[int, ...]:
        """The first packed row of each segment."""
        starts, row = [], 0
        for segment in self.segments:
            starts.append(row)
            row += segment.tokens
        return tuple(starts)

    @cached_property
    def run_ends(self) -> tuple[int, ...]:
        """The packed row after the last one of each of `runs`."""
        return tuple(accumulate(run.count * run.tokens for run in self.runs))

    @cached_property
    def first_reader(self) -> int:
        """The first segment that reads others; how many segments there are, if none does."""
        return next((i for i, segment in enumerate(self.segments) if segment.reads), len(self.segments))

    @cached_property
    def plain_rows(self) -> int:
        """Rows before `first_reader`: they see themselves only, so that their keys are used where they stand."""
        return sum(segment.tokens for segment in self.segments[: self.first_reader])

    @cached_property
    def compress_rows(self) -> int:
        """Rows of the compress region: all segments with gists, which two-region packing puts first.

        Raises ValueError if a segment without gists stands before one with gists.
        """
        has_gists = [segment.gists > 0 for segment in self.segments]
        if has_gists != sorted(has_gists, reverse=True):
            raise ValueError("segments with gists must stand before all segments without: LoRA acts on one slice of rows")
        return sum(segment.tokens for segment in self.segments if segment.gists)

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    @cached_property
    def last_position(self) -> int:
        """The largest position of any row."""
        return max(start + segment.tokens - 1 for start, segment in zip(self.starts, self.segments))

    def to(self, device, non_blocking: bool = False) -> GistLayout:
        """The same layout with its indices on `device`, moved in one transfer."""
        if torch.device(device) == self.device:
            return self
        return self._with(self._buffer.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> GistLayout:
        """The same layout in pinned memory; `torch.utils.data.DataLoader` calls this by name."""
        return self._with(self._buffer.pin_memory())

    def _with(self, buffer: Tensor) -> GistLayout:
        moved = copy.copy(self)
        moved._set(_buffer=buffer, _made={})
        moved._name_views()
        return moved

    def once(self, make: Callable[[GistLayout], Made]) -> Made:
        """The result of `make(layout)`, computed at the first call and kept: for what a kernel needs in every layer."""
        made = self.__dict__.setdefault("_made", {})
        if make not in made:
            made[make] = make(self)
        return made[make]


def _place(segments: Sequence[Segment]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Choose each segment's first position, and the shift that remains for each of its reads.

    An edge asks for a fixed distance between a reader and what it reads. Edges are met greedily in packed order: an edge
    between two groups of segments joins them by moving one, an edge within a group leaves a shift (0 where it is met).
    """
    start = [0] * len(segments)
    group = {i: [i] for i in range(len(segments))}
    member_of = list(range(len(segments)))
    shifts = []
    for i, reader in enumerate(segments):
        read_gists = sum(segments[j].gists for j in reader.reads)
        seen, own = 0, []
        for j in reader.reads:
            first_gist = segments[j].tokens - segments[j].gists
            distance = first_gist + read_gists - seen  # what start[i] - start[j] should be
            if member_of[i] != member_of[j]:
                small, large = sorted((member_of[i], member_of[j]), key=lambda g: len(group[g]))
                move = start[j] + distance - start[i]
                if small == member_of[j]:
                    move = -move
                for member in group[small]:
                    start[member] += move
                    member_of[member] = large
                group[large] += group.pop(small)
            own.append(start[i] - start[j] - distance)
            seen += segments[j].gists
        shifts.append(tuple(own))
    for members in group.values():
        lowest = min(start[m] for m in members)
        for m in members:
            start[m] -= lowest
    return tuple(start), tuple(shifts)


def _merge(segments: Sequence[Segment], shifts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Neighbouring segments in groups: short readers of the same gists at the same distance together, others alone."""
    groups: list[list[int]] = []
    rows = 0
    for i, segment in enumerate(segments):
        last = groups[-1][-1] if groups else None
        same = last is not None and segment.reads and (segments[last].reads, shifts[last]) == (segment.reads, shifts[i])
        if same and rows + segment.tokens <= MERGED_ROWS:
            groups[-1].append(i)
            rows += segment.tokens
        else:
            groups.append([i])
            rows = segment.tokens
    return groups


def _runs(segments: Sequence[Segment], merged: list[list[int]]) -> tuple[Run, ...]:
    found: list[Run] = []
    for group in merged:
        parts, reads = tuple(segments[i].tokens for i in group), sum(segments[j].gists for j in segments[group[0]].reads)
        if found and (found[-1].parts, found[-1].reads) == (parts, reads):
            found[-1] = Run(found[-1].count + 1, parts, reads)
        else:
            found.append(Run(1, parts, reads))
    return tuple(found)


def _ranges(firsts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """firsts[0], firsts[0] + 1, ... for lengths[0] numbers, then the same for the others, one after the other."""
    before = accumulate(lengths, initial=0)
    return torch.arange(sum(lengths)) + _repeat([first - seen for first, seen in zip(firsts, before)], lengths)


def _repeat(numbers: Sequence[int], times: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).repeat_interleave(torch.tensor(times, dtype=torch.int64))


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)))
