"""Choosing and pooling rows of a prefix; each result stands at positions 0, 1, 2, ..."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_masks import rotate
from hyperllama.prefixes.capture import States
from hyperllama.prefixes.prefix import Prefix


def behind_sink(prefix: Prefix, sink: States, inv_freq: Tensor) -> Prefix:
    """A prefix with one row more, the sink, before all others; `sink` has its keys and values (N, 1, D) at position 0."""
    ones = torch.ones(prefix.rows, dtype=torch.long, device=inv_freq.device)
    keys, values = [], []
    for k, v, (sink_k, sink_v) in zip(prefix.keys, prefix.values, sink, strict=True):
        keys.append(torch.cat([sink_k.to(k.dtype), rotate(k, ones, inv_freq)], 1))
        values.append(torch.cat([sink_v.to(v.dtype), v], 1))
    return Prefix(keys, values, prefix.manifest, prefix.adapters)


def last_rows(prefix: Prefix, rows: int, inv_freq: Tensor) -> Prefix:
    """The first row of a prefix and its last `rows` - 1, moved to positions 0, 1, ...; the whole prefix if it has no more.

    Without the first row, where attention goes that has nowhere else to go, a decoder reads hardly better than without any
    (Xiao et al. 2023, arXiv 2309.17453).
    """
    if prefix.rows <= rows:
        return prefix
    device = prefix.keys[0].device
    kept = torch.tensor([0, *range(prefix.rows - rows + 1, prefix.rows)], device=device)
    shifts = torch.arange(rows, device=device) - kept
    keys = [rotate(k[:, kept], shifts, inv_freq) for k in prefix.keys]
    return Prefix(keys, [v[:, kept] for v in prefix.values])


def first_rows(prefix: Prefix, rows: int) -> Prefix:
    """The first `rows` rows of a prefix, which stand where they should already; the whole prefix if it has no more."""
    if prefix.rows <= rows:
        return prefix
    return Prefix([k[:, :rows] for k in prefix.keys], [v[:, :rows] for v in prefix.values])


def mean_pooled(prefix: Prefix, rows: int, inv_freq: Tensor) -> Prefix:
    """The first row as it is, where attention rests, and `rows` - 1 means of neighbours; the whole prefix if it has no more.

    A mean is of nearly as many rows as the others. Keys are averaged without their positions, and the means stand at 1, 2, ...:
    averaging rotated keys would cancel the fast frequencies.
    """
    if prefix.rows <= rows:
        return prefix
    device = prefix.keys[0].device
    back = -torch.arange(prefix.rows, device=device)
    group = torch.arange(prefix.rows - 1, device=device) * (rows - 1) // (prefix.rows - 1) + 1
    group = torch.cat([group.new_zeros(1), group]) if rows > 1 else group.new_zeros(prefix.rows)
    weights = torch.nn.functional.one_hot(group, rows).T.float()  # (rows, G)
    weights = weights / weights.sum(1, keepdim=True)
    places = torch.arange(rows, device=device)
    keys, values = [], []
    for k, v in zip(prefix.keys, prefix.values):
        keys.append(rotate((weights @ rotate(k.float(), back, inv_freq)), places, inv_freq).to(k.dtype))
        values.append((weights @ v.float()).to(v.dtype))
    return Prefix(keys, values)
