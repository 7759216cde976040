"""Objectives: pure functions of logits and targets. A loss stays a sum and a count of target tokens until the very end."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# More logits than these are never there at once. At the peak there are three float32 copies of a chunk: its log-probabilities
# and two gradients, 0.8 GB. With 128k words a chunk has 523 rows still, for which a product is bound by arithmetic and not by
# reading the head's weights; and where fewer logits are wanted in all, the head's product need not be computed twice.
LOGITS = 2**26


class TokenLoss(NamedTuple):
    """A summed loss and the number of target tokens in it, so that accumulation and ranks weigh tokens equally."""

    sum: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count


def answer_cross_entropy(logits: Tensor, targets: Tensor) -> TokenLoss:
    """Cross entropy in nats of targets (n,) under logits (n, V), computed in float32."""
    return _counted(F.cross_entropy(logits.float(), targets, reduction="sum"), targets)


def head_chunks(rows: int, vocabulary: int) -> int:
    """Into how many chunks `rows` rows are cut, so that a chunk has at most `LOGITS` logits, or a single row."""
    return max(1, -(-rows // max(1, LOGITS // vocabulary)))


def chunked_cross_entropy(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunks: int) -> TokenLoss:
    """As `answer_cross_entropy` of `head(hidden)`, with the logits of one of `chunks` chunks of rows at a time.

    hidden (n, hidden size); targets (n,). The backward pass computes each chunk's logits again. `head` is called, not its
    weights multiplied: so it may be any module, and ZeRO-3's hooks on it gather its weights.
    """
    # There is nothing random in a head, so no random state needs to be kept.
    sums = [
        checkpoint(_summed, head, rows, wanted, use_reentrant=False, preserve_rng_state=False)
        for rows, wanted in zip(hidden.chunk(chunks), targets.chunk(chunks), strict=True)
    ]
    return _counted(torch.stack(sums).sum(), targets)


def _summed(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def _counted(summed: Tensor, targets: Tensor) -> TokenLoss:
    # Filled on the device: a number that is copied there from the host's memory would have to be waited for.
    return TokenLoss(summed, torch.full((), targets.numel(), dtype=targets.dtype, device=summed.device))
