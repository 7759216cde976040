"""Gathering the keys and values of gist rows for each reader, with keys moved to where the reader sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_masks.layout import GistLayout
from attention_masks.rotary import rotate


def read_gists(
    k: Tensor, v: Tensor, layout: GistLayout, inv_freq: Tensor | None, *, copies: bool = False
) -> tuple[Tensor, Tensor]:
    """Keys and values (1, N, R, D) of `layout.read_gists`, keys rotated by `read_shifts`; with `copies` (1, N, C, D).

    A gist's gradient is a sum over all its readers, of which there may be thousands: it is taken in float32, whatever the
    dtype of k and v.
    """
    if not len(layout.read_gists):  # gathering nothing would still cost a gradient of full size
        nothing = k.new_empty(*k.shape[:2], 0, k.shape[3])
        return nothing, nothing
    moved = inv_freq if layout.shifted else None
    return _gather(k, layout, copies, moved), _gather(v, layout, copies, None)


def _gather(x: Tensor, layout: GistLayout, copies: bool, inv_freq: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    read = x.index_select(2, layout.gist_rows).to(wide).index_select(2, layout.read_gists)
    if inv_freq is not None:
        read = rotate(read, layout.read_shifts, inv_freq)
    if copies and len(layout.copies) != len(layout.read_gists):
        read = read.index_select(2, layout.copies)
    return read.to(x.dtype)
