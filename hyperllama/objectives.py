"""Objectives: pure functions of logits and targets. A loss stays a sum and a count of target tokens until the very end."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class TokenLoss(NamedTuple):
    """A summed loss and the number of target tokens in it, so that accumulation and ranks weigh tokens equally."""

    sum: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count


def answer_cross_entropy(logits: Tensor, targets: Tensor) -> TokenLoss:
    """Cross entropy in nats of targets (n,) under logits (n, V), computed in float32."""
    summed = F.cross_entropy(logits.float(), targets, reduction="sum")
    return TokenLoss(summed, summed.new_tensor(targets.numel(), dtype=targets.dtype))
