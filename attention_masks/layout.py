"""The reading graph: which segment of a packed row reads the gists of which earlier segments, and where each one stands."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Run:
    """`count` neighbouring segments of one shape: each `tokens` rows that read `reads` gist rows and then themselves."""

    count: int
    tokens: int
    reads: int


@dataclass(frozen=True)
class GistLayout:
    """A packed row of segments: validated, with positions and every index that attention needs, built once per batch.

    Positions: a reader sees the gists that it reads as if they stood directly before it, in the order of `reads`.
    Rotary attention depends on differences only, so segments are placed such that most gists already stand where their
    readers expect them. Where two readers see one gist at different distances, the copy of its key that is gathered for a
    reader is rotated by the entry of `read_shifts`.

    All tensors are int64 and live in one buffer, so `to` is one transfer:

    positions (T,)    rotary position of each row
    gist_rows (S,)    rows that are gists, segment after segment
    gist_slots (S,)   which gist of its segment each of them is, 0 .. gists - 1
    read_rows (R,)    for each reader in the order of `runs`, the rows of the gists that it reads
    read_shifts (R,)  how far the key of each of `read_rows` is to be rotated for its reader
    order (T,)        packed row of each row in the order of `runs`; only used where `reordered`
    inverse (T,)      the inverse of `order`

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
    reordered: bool = field(init=False, compare=False, repr=False)
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
        self._set(segments=segments)
        starts, shifts = _place(segments)
        order, runs = _batch(segments)
        reads = [j for i in order for j in segments[i].reads]
        rows = self.row_starts
        columns = {
            "positions": [p for s, start in zip(segments, starts) for p in range(start, start + s.tokens)],
            "gist_rows": [row for i in range(len(segments)) for row in self.gists_of(i)],
            "gist_slots": [g for s in segments for g in range(s.gists)],
            "read_rows": [row for j in reads for row in self.gists_of(j)],
            "read_shifts": [
                shifts[i][k] for i in order for k, j in enumerate(segments[i].reads) for _ in range(segments[j].gists)
            ],
            "order": [row for i in order for row in range(rows[i], rows[i] + segments[i].tokens)],
        }
        inverse = [0] * self.tokens
        for place, row in enumerate(columns["order"]):
            inverse[row] = place
        columns["inverse"] = inverse
        self._set(
            starts=starts,
            shifts=shifts,
            runs=runs,
            reordered=order != sorted(order),
            shifted=any(columns["read_shifts"]),
            _buffer=torch.tensor([x for column in columns.values() for x in column], dtype=torch.int64),
            _sizes=tuple(len(column) for column in columns.values()),
        )
        self._name_views()

    def gists_of(self, segment: int) -> range:
        """The packed rows of one segment's gists."""
        end = self.row_starts[segment] + self.segments[segment].tokens
        return range(end - self.segments[segment].gists, end)

    def _set(self, **fields):
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _name_views(self):
        names = ("positions", "gist_rows", "gist_slots", "read_rows", "read_shifts", "order", "inverse")
        self._set(**dict(zip(names, self._buffer.split(self._sizes), strict=True)))

    def __getstate__(self):
        # Views would each be pickled with the whole buffer: a worker process sends the buffer once.
        names = ("segments", "starts", "shifts", "runs", "reordered", "shifted", "_buffer", "_sizes")
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
        moved = copy.copy(self)
        moved._set(_buffer=self._buffer.to(device, non_blocking=non_blocking))
        moved._name_views()
        return moved

    def pin_memory(self) -> GistLayout:
        """The same layout in pinned memory; `torch.utils.data.DataLoader` calls this by name."""
        pinned = copy.copy(self)
        pinned._set(_buffer=self._buffer.pin_memory())
        pinned._name_views()
        return pinned


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


def _batch(segments: Sequence[Segment]) -> tuple[list[int], tuple[Run, ...]]:
    """Put segments of one shape next to each other, if that saves calls: their order, and the runs in it."""
    shapes = [(s.tokens, sum(segments[j].gists for j in s.reads)) for s in segments]

    def runs(order):
        found = []
        for i in order:
            if found and (found[-1].tokens, found[-1].reads) == shapes[i]:
                found[-1] = Run(found[-1].count + 1, *shapes[i])
            else:
                found.append(Run(1, *shapes[i]))
        return tuple(found)

    packed = list(range(len(segments)))
    by_shape = sorted(packed, key=lambda i: (segments[i].gists == 0, shapes[i]))
    # Reordering copies queries, keys, values and outputs once each; a quarter of the calls saved pays for that.
    return (by_shape, runs(by_shape)) if len(runs(by_shape)) <= 0.75 * len(runs(packed)) else (packed, runs(packed))
