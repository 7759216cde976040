"""Rows of prefixes as an engine keeps them: by layer, the heads of one rank, in the engine's dtype, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hyperllama.base.identity import BaseIdentity
from hyperllama.errors import UserError
from hyperllama.prefixes.prefix import Prefix, stored_digest
from hyperllama.serving.ticket import Ticket


def heads_of(rank: int, ranks: int, heads: int) -> slice:
    """Which of a model's key-value heads a rank of tensor parallelism holds.

    As engines do: each an equal part, or where there are fewer heads than ranks, neighbours hold the same head.
    """
    if heads >= ranks:
        part = heads // ranks
        return slice(rank * part, (rank + 1) * part)
    return slice(rank * heads // ranks, rank * heads // ranks + 1)


def slots_of(blocks: Sequence[int], block_size: int, first: int, end: int) -> Tensor:
    """Where positions `first` .. `end` - 1 of a request lie in a paged cache of its `blocks`: (end - first), int64."""
    places = torch.arange(first, end)
    return torch.tensor(blocks, dtype=torch.int64)[places // block_size] * block_size + places % block_size


class Sides(NamedTuple):
    """Keys and values by layer, each (rows, heads of this rank, head dimension)."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for side in self for x in side)


class Rows:
    """The rows of prefixes in a store, read when first asked for and kept in at most `most_bytes`, the last used longest.

    One that is larger by itself is read each time. `heads` of all, `rank` of `ranks`: see `heads_of`.
    """

    def __init__(
        self,
        store: str | Path,
        identity: BaseIdentity,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
        most_bytes: int = 2**30,
    ):
        self.store, self.identity, self.most_bytes = Path(store), identity, most_bytes
        self.dtype, self.device, self.rank, self.ranks = dtype, device, rank, ranks
        self._kept: OrderedDict[Ticket, Sides] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, ticket: Ticket) -> Sides:
        """The rows that a ticket names. UserError if its file is not there, damaged, another one, or for another base."""
        if ticket in self._kept:
            self._kept.move_to_end(ticket)
            return self._kept[ticket]
        sides = self._read(ticket)
        if sides.bytes <= self.most_bytes:
            self._kept[ticket] = sides
            self.bytes += sides.bytes
            while self.bytes > self.most_bytes:
                self.bytes -= self._kept.popitem(last=False)[1].bytes
        return sides

    def _read(self, ticket: Ticket) -> Sides:
        if Path(ticket.file).name != ticket.file:
            raise UserError(f"{ticket.file!r}: not the name of a file in {self.store}")
        path = self.store / ticket.file
        prefix = Prefix.load(path, self.identity)
        if (stored_digest(path), prefix.rows) != (ticket.digest, ticket.rows):
            raise UserError(f"{path}: another prefix than the one that was asked for has taken its place; ask again")
        prefix.refuse_modules("an engine fills its cache with")
        own = heads_of(self.rank, self.ranks, prefix.kv_heads)
        # An engine wants rows first, and neighbours in memory.
        move = {"device": self.device, "dtype": self.dtype}
        halves = (prefix.keys, prefix.values)
        sides = Sides(*([x[own].transpose(0, 1).to(**move).contiguous() for x in half] for half in halves))
        if not all(bool(x.isfinite().all()) for side in sides for x in side):
            raise UserError(f"{path}: has numbers that {str(self.dtype).removeprefix('torch.')} cannot hold; serve in bfloat16")
        return sides
