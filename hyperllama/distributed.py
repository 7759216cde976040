"""Several processes: parameters that ZeRO-3 has cut into parts, and the end of a process group."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch.distributed
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """A context in which these parameters are whole on every rank, to be read. Under ZeRO-3 all ranks must enter it."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def close() -> None:
    """Leave the process group, if there is one: a process that exits inside it may abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
