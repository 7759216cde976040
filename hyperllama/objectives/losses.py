"""Losses: pure functions of logits and targets. A loss stays a sum and a count of target tokens until the very end."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyperllama.objectives.mix import summed

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

    def forward(
        self, hidden: Tensor, targets: Tensor, *, weight: Tensor, weights: Mapping[str, float], teacher: Tensor | None = None
    ) -> Tensor:
        """The summed loss of targets (n,) under the logits hidden (n, hidden size) @ weight (V, hidden size).T.

        `weights` are those of objectives by name. `teacher` (n, hidden size) are another model's hidden states at the same
        places, whose logits go to objectives that have a teacher. Where there are more chunks than one, the backward pass
        computes each chunk's logits again.
        """
        chunks = head_chunks(len(targets) * (1 if teacher is None else 2), weight.shape[0])
        if chunks == 1:
            return _summed(hidden, targets, weight, teacher, weights)
        teachers = [None] * len(targets.chunk(chunks)) if teacher is None else teacher.chunk(chunks)
        sums = [
            # Nothing is random here, so no random state has to be kept.
            checkpoint(_summed, *pieces, weights, use_reentrant=False, preserve_rng_state=False)
            for pieces in zip(hidden.chunk(chunks), targets.chunk(chunks), repeat(weight), teachers)
        ]
        return torch.stack(sums).sum()


def _summed(hidden: Tensor, targets: Tensor, weight: Tensor, teacher: Tensor | None, weights: Mapping[str, float]) -> Tensor:
    logits = F.linear(hidden, weight).float()
    with torch.no_grad():
        taught = None if teacher is None else F.linear(teacher, weight).float()
    return summed(weights, logits, targets, taught)


def cross_entropy_sum(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
    """The summed cross entropy in nats of targets (n,) under logits (n, V), computed in float32."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def divergence_from_teacher(logits: Tensor, targets: Tensor, teacher_logits: Tensor) -> Tensor:
    """The summed divergence in nats of rows of logits (n, V) from those of the teacher; targets do not matter."""
    return divergence(logits, teacher_logits)


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The summed Kullback-Leibler divergence in nats of rows of logits (n, V) from those of a teacher (Hinton et al. 2015)."""
    own, taught = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return F.kl_div(own, taught, reduction="sum", log_target=True)


def answer_cross_entropy(logits: Tensor, targets: Tensor) -> TokenLoss:
    """Cross entropy in nats of targets (n,) under logits (n, V), computed in float32."""
    return counted(cross_entropy_sum(logits, targets), targets)


def counted(summed: Tensor, targets: Tensor) -> TokenLoss:
    """A summed loss with the count of its targets (n,)."""
    # Filled on the device: a number that is copied there from the host's memory would have to be waited for.
    return TokenLoss(summed, torch.full((), targets.numel(), dtype=targets.dtype, device=summed.device))
