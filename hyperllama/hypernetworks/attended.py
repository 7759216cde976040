"""Which tokens of a context its later tokens attend to: a choice of rows that needs no training.

After SnapKV (Li et al. 2024, arXiv 2404.14469), whose last 64 tokens choose by the mean of their attention. Here a share of the
context chooses by the root mean square, which a few sharp looks raise more than many faint ones (docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = 2**25  # entries of a block of scores: 128 MiB


@torch.no_grad()
def attention_received(queries: Tensor, keys: Tensor) -> Tensor:
    """How much attention each token gets from the last ones, (N, T): root mean square over them and the heads that share keys.

    queries (H, w, D) of the last w tokens, scaled as scores are, and keys (N, T, D), both with positions. Some queries at a
    time, so that a long context has not all of its scores in memory.
    """
    (heads, window, _), (kv_heads, tokens, _) = queries.shape, keys.shape
    columns, looked_at = torch.arange(tokens, device=keys.device), keys.float()[:, None].transpose(2, 3)  # (N, 1, D, T)
    squares = keys.new_zeros(kv_heads, tokens, dtype=torch.float32)
    for block in torch.arange(window, device=keys.device).split(max(1, SCORES // (heads * tokens))):
        groups = queries[:, block].float().unflatten(0, (kv_heads, -1))  # (N, H / N, block, D)
        scores = groups @ looked_at
        hidden = columns > (block + tokens - window)[:, None]
        squares += scores.masked_fill(hidden, -torch.inf).softmax(-1).square().sum((1, 2))
    return (squares * kv_heads / (heads * window)).sqrt()


def most_attended(received: Tensor, rows: int) -> Tensor:
    """`rows` tokens for each key-value head, (N, rows), in their order: the first, the last quarter, the most attended to.

    `received` (N, T), T at least `rows`. The first token is where attention rests (Xiao et al. 2023, arXiv 2309.17453).
    """
    score = received.clone()
    score[:, 0] = torch.inf
    if rows // 4:
        score[:, -(rows // 4) :] = torch.inf
    return score.topk(rows, dim=1).indices.sort(1).values
