"""Objectives: pure functions of logits and targets. A loss stays a sum and a count of target tokens until the very end."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


def head_chunks(rows: int, vocabulary: int) -> int:
    """Into how many chunks `rows` rows are cut, so that a chunk has at most `LOGITS` logits, or a single row."""
    return max(1, -(-rows // max(1, LOGITS // vocabulary)))


class HeadCrossEntropy(nn.Module):
    """Cross entropy of logits that are not there at once: those of an output head without a bias, a chunk of rows at a time.

    It has no weights of its own, and is a module for ZeRO-3's sake, which gathers weights for a call of a module. Ranks have
    more or fewer targets, so more or fewer chunks, but must gather equally often: so this is called once for all chunks, and
    not the head once for each (`hyperllama.distributed.gather_with`).
    """

    def forward(self, hidden: Tensor, targets: Tensor, *, weight: Tensor) -> Tensor:
        """The summed loss of targets (n,) under the logits hidden (n, hidden size) @ weight (V, hidden size).T.

        Where there are more chunks than one, the backward pass computes each chunk's logits again.
        """
        chunks = head_chunks(len(targets), weight.shape[0])
        if chunks == 1:
            return _summed(hidden, targets, weight)
        sums = [
            # Nothing is random here, so no random state has to be kept.
            checkpoint(_summed, rows, wanted, weight, use_reentrant=False, preserve_rng_state=False)
            for rows, wanted in zip(hidden.chunk(chunks), targets.chunk(chunks), strict=True)
        ]
        return torch.stack(sums).sum()


def _summed(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def answer_cross_entropy(logits: Tensor, targets: Tensor) -> TokenLoss:
    """Cross entropy in nats of targets (n,) under logits (n, V), computed in float32."""
    return counted(F.cross_entropy(logits.float(), targets, reduction="sum"), targets)


def counted(summed: Tensor, targets: Tensor) -> TokenLoss:
    """A summed loss with the count of its targets (n,)."""
    # Filled on the device: a number that is copied there from the host's memory would have to be waited for.
    return TokenLoss(summed, torch.full((), targets.numel(), dtype=targets.dtype, device=summed.device))
