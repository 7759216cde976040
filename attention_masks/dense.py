"""The dense rendering of a layout: slow, obvious, the oracle that every other rendering is tested against."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention_masks.layout import GistLayout
from attention_masks.rotary import rotate

SCORES = 2**25  # entries of a block of scores: 128 MiB


def dense_mask(layout: GistLayout, rows: range | None = None) -> Tensor:
    """Who sees whom: a boolean (T, T), True where the row's query may see the column's key; of some `rows` (rows, T).

    >>> from attention_masks import Segment
    >>> dense_mask(GistLayout([Segment(2, gists=1), Segment(1, reads=(0,))])).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    rows = range(layout.tokens) if rows is None else rows
    mask = torch.zeros(len(rows), layout.tokens, dtype=torch.bool, device=layout.device)
    for i, asking, place in _asking(layout, rows):
        first = layout.row_starts[i]
        own = torch.arange(first, asking.stop, device=layout.device)
        mask[place, first : asking.stop] = own <= torch.arange(asking.start, asking.stop, device=layout.device)[:, None]
        for j in layout.segments[i].reads:
            gists = layout.gists_of(j)
            mask[place, gists.start : gists.stop] = True
    return mask


def _asking(layout: GistLayout, rows: range) -> Iterator[tuple[int, range, slice]]:
    """Each segment with rows among `rows`, these rows, and where among `rows` they are."""
    for i, (segment, start) in enumerate(zip(layout.segments, layout.row_starts)):
        own = range(max(start, rows.start), min(start + segment.tokens, rows.stop))
        if own:
            yield i, own, slice(own.start - rows.start, own.stop - rows.start)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GistLayout, *, scale: float, inv_freq: Tensor | None, unread: int = 0
) -> Tensor:
    """Softmax over all T keys of each query, in float32. Shapes as in `gist_attention`; `unread` rows are computed too.

    Beyond `SCORES` scores some queries at a time, whose scores the backward pass computes again.
    """
    groups = q.shape[1] // k.shape[1]
    copies = []
    if layout.shifted and inv_freq is not None:
        copies = _copies(layout)
        moved = torch.tensor([row for _, row, _ in copies], device=k.device)
        shifts = torch.tensor([shift for *_, shift in copies], device=k.device)
        k, v = torch.cat([k, rotate(k[:, :, moved], shifts, inv_freq)], 2), torch.cat([v, v[:, :, moved]], 2)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

    def attend(q: Tensor, k: Tensor, v: Tensor, rows: range) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
        # Filled, not added: two masks that are added overflow to -inf. Every row sees itself, so no row is empty.
        weights = scores.masked_fill(~_mask(layout, rows, copies), float("-inf")).softmax(dim=-1)
        return torch.matmul(weights.to(v.dtype), v)

    size = max(1, SCORES // (q.shape[1] * k.shape[2]))
    if size >= layout.tokens:
        return attend(q, k, v, range(layout.tokens))
    blocks = [range(layout.tokens)[start : start + size] for start in range(0, layout.tokens, size)]
    # Nothing is random here, so no random state has to be kept.
    settings = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(attend, part, k, v, rows, **settings) for part, rows in zip(q.split(size, 2), blocks)], 2)


def _copies(layout: GistLayout) -> list[tuple[int, int, int]]:
    """Each gist that a reader sees elsewhere than where it stands: the reader, the gist's row, and how far its key moves."""
    return [
        (i, row, shift)
        for i, segment in enumerate(layout.segments)
        for shift, j in zip(layout.shifts[i], segment.reads)
        if shift
        for row in layout.gists_of(j)
    ]


def _mask(layout: GistLayout, rows: range, copies: list[tuple[int, int, int]]) -> Tensor:
    """The dense mask of `rows` with a column behind it for each of `copies`, which its reader sees instead of the original."""
    mask = torch.cat([dense_mask(layout, rows), torch.zeros(len(rows), len(copies), dtype=torch.bool, device=layout.device)], 1)
    places = {i: place for i, _, place in _asking(layout, rows)}
    for column, (reader, row, _) in enumerate(copies, layout.tokens):
        if reader in places:
            mask[places[reader], row], mask[places[reader], column] = False, True
    return mask
