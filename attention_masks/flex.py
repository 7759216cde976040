"""The block rendering: PyTorch's FlexAttention (Dong et al. 2024, arXiv 2412.05496) under a mask of blocks.

Keys are all rows, then what each segment reads: a query sees a key of its own segment that does not stand after it.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attention_masks.layout import GistLayout
from attention_masks.reading import read_gists

BLOCK = 128


def block_flex_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GistLayout, *, scale: float, inv_freq: Tensor | None, unread: int = 0
) -> Tensor:
    """Attention in one call. Shapes as in `gist_attention`; `unread` rows are computed all the same."""
    read = read_gists(k, v, layout, inv_freq, copies=True)
    k, v = (torch.cat(pair, 2) for pair in zip((k, v), read))
    attention = _compiled() if q.is_cuda else flex_attention
    return attention(q, k, v, block_mask=layout.once(block_mask), scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def why_not_flex(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlexAttention cannot run here, or None."""
    return None if device.type == "cuda" else "FlexAttention has no backward pass without a CUDA GPU"


@cache
def _compiled():
    # Once for all shapes: the length of a packed row changes from batch to batch.
    return torch.compile(flex_attention, dynamic=True)


def block_mask(layout: GistLayout) -> BlockMask:
    """Which blocks of T queries x (T + C) keys are seen in part and which as a whole, from the segments alone.

    FlexAttention's own constructor would evaluate the predicate at every one of T x (T + C) places.
    """
    counts = visible_pairs(layout)
    whole = counts == BLOCK * BLOCK
    part = (counts > 0) & ~whole
    owner_of_row, owner_of_key, place_of_key = (_on(x, layout.device) for x in _owners(layout))

    def sees(batch, head, row, key):
        return (owner_of_row[row] == owner_of_key[key]) & (place_of_key[key] <= row)

    lengths = (len(owner_of_row), len(owner_of_key))
    mask = BlockMask.from_kv_blocks(*_ordered(part), *_ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=lengths)
    return mask.to(layout.device)


def visible_pairs(layout: GistLayout) -> Tensor:
    """How many pairs of a query and a key see each other in each block: (T / 128, (T + C) / 128), rounded up."""
    rows, copies = layout.tokens, len(layout.copies)
    counts = torch.zeros(-(-rows // BLOCK), -(-(rows + copies) // BLOCK), dtype=torch.int64)
    copied = rows
    for i, (segment, start) in enumerate(zip(layout.segments, layout.row_starts)):
        first, own = _overlaps(start, segment.tokens)
        square = slice(first, first + len(own))
        # Blocks of one segment before the diagonal are seen whole, those on it from the diagonal down.
        counts[square, square] += torch.outer(own, own).tril(-1) + torch.diag(own * (own + 1) // 2)
        if width := layout.width(i):
            at, read = _overlaps(copied, width)
            counts[square, at : at + len(read)] += torch.outer(own, read)
            copied += width
    return counts


def _overlaps(start: int, length: int) -> tuple[int, Tensor]:
    """The first block that start .. start + length - 1 touches, and how many of these numbers it and the next blocks hold."""
    first, last = start // BLOCK, (start + length - 1) // BLOCK
    edges = [start, *((block + 1) * BLOCK for block in range(first, last)), start + length]
    return first, torch.tensor([b - a for a, b in pairwise(edges)])


def _owners(layout: GistLayout) -> tuple[Tensor, Tensor, Tensor]:
    """The segment of each row, of each key, and the row from which on a key is seen."""
    segments = torch.arange(len(layout.segments))
    tokens = torch.tensor([segment.tokens for segment in layout.segments])
    widths = torch.tensor([layout.width(i) for i in range(len(segments))])
    rows, readers = segments.repeat_interleave(tokens), segments.repeat_interleave(widths)
    return rows, torch.cat([rows, readers]), torch.cat([torch.arange(len(rows)), torch.zeros_like(readers)])


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """As FlexAttention takes them: how many blocks of keys each block of queries sees, and which ones, these first."""
    numbers = blocks.to(torch.int32)
    order = numbers.argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return numbers.sum(1, dtype=torch.int32)[None, None], order[None, None].contiguous()


def _on(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
