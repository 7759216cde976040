"""The dense rendering of a layout: slow, obvious, the oracle that every other rendering is tested against."""

import torch
from torch import Tensor

from attention_masks.layout import GistLayout
from attention_masks.rotary import rotate


def dense_mask(layout: GistLayout) -> Tensor:
    """Who sees whom: a boolean (T, T), True where the row's query may see the column's key.

    >>> from attention_masks import Segment
    >>> dense_mask(GistLayout([Segment(2, gists=1), Segment(1, reads=(0,))])).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    mask = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool, device=layout.device)
    for segment, row in zip(layout.segments, layout.row_starts):
        own = slice(row, row + segment.tokens)
        mask[own, own] = torch.ones(segment.tokens, segment.tokens, dtype=torch.bool, device=layout.device).tril()
        for j in segment.reads:
            gists = layout.gists_of(j)
            mask[own, gists.start : gists.stop] = True
    return mask


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GistLayout, *, scale: float, inv_freq: Tensor | None, unread: int = 0
) -> Tensor:
    """Softmax over the whole T x T matrix in float32. Shapes as in `gist_attention`; `unread` rows are computed too."""
    groups = q.shape[1] // k.shape[1]
    mask = dense_mask(layout)
    if layout.shifted and inv_freq is not None:
        k, v, mask = _with_moved_copies(k, v, mask, layout, inv_freq)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    # Filled, not added: two masks that are added overflow to -inf. Every row sees itself, so no row is empty.
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.matmul(weights.to(v.dtype), v)


def _with_moved_copies(k, v, mask, layout, inv_freq):
    """Append a rotated copy of each gist that a reader sees elsewhere than where it stands, and hide the original."""
    rows, moves, readers = [], [], []
    mask = mask.clone()
    for i, segment in enumerate(layout.segments):
        own = slice(layout.row_starts[i], layout.row_starts[i] + segment.tokens)
        for shift, j in zip(layout.shifts[i], segment.reads):
            if shift:
                gists = layout.gists_of(j)
                mask[own, gists.start : gists.stop] = False
                rows += gists
                moves += [shift] * len(gists)
                readers += [own] * len(gists)
    rows_R = torch.tensor(rows, device=k.device)
    sees_copy = torch.zeros(layout.tokens, len(rows), dtype=torch.bool, device=k.device)
    for column, own in enumerate(readers):
        sees_copy[own, column] = True
    moved = rotate(k[:, :, rows_R], torch.tensor(moves, device=k.device), inv_freq)
    return torch.cat([k, moved], 2), torch.cat([v, v[:, :, rows_R]], 2), torch.cat([mask, sees_copy], 1)
