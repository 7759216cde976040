"""Several processes: parameters that ZeRO-3 has cut into parts, and the end of a process group."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import (
    deepspeed_config,
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

_whole: set[int] = set()  # what a context around has gathered, by id


def processes() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def sharded() -> bool:
    """Whether a parameter may be in parts: under ZeRO-3 only the module that owns it gathers it."""
    return is_deepspeed_zero3_enabled()


@contextmanager
def gathered(parameters: Iterable[Tensor], *, writing: bool = False) -> Iterator[None]:
    """A context in which these parameters are whole on every rank, to be read. Under ZeRO-3 all ranks must enter it.

    With `writing` they may be changed, on every rank alike; of a context around it, what is whole there stays to be read.
    """
    if not sharded():
        yield
        return
    import deepspeed

    # DeepSpeed refuses to gather twice; the first process alone may ask inside for what all have gathered.
    own = {id(parameter): parameter for parameter in parameters if id(parameter) not in _whole}
    with deepspeed.zero.GatheredParameters(list(own.values()), modifier_rank=0 if writing else None):
        _whole.update(own)
        try:
            yield
        finally:
            _whole.difference_update(own)


def gather_with(module: nn.Module, parameter: nn.Parameter) -> None:
    """Under ZeRO-3, gather `parameter` whenever `module` runs, forward or backward, although another module owns it."""
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.zero.register_external_parameter(module, parameter)


def gather_whole(module: nn.Module) -> None:
    """Under ZeRO-3, gather all that is inside `module` whenever it runs, however often it calls its own modules."""
    if sharded():
        from deepspeed.utils import set_z3_leaf_module

        set_z3_leaf_module(module, True)


def in_parts(weights: Tensor, *, requires_grad: bool) -> nn.Parameter:
    """A new parameter of these weights, cut into parts as ZeRO-3 cuts those of a model that is built for it."""
    import deepspeed

    parameter = nn.Parameter(weights, requires_grad=requires_grad)
    deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=deepspeed_config())
    return parameter


def join_deepspeed() -> None:
    """Tell DeepSpeed of the process group: building a model for ZeRO-3 needs it before there is an engine."""
    import deepspeed

    backend = torch.distributed.get_backend() if _joined() else None
    deepspeed.init_distributed(dist_backend=backend)


@contextmanager
def whole_models(arguments: TrainingArguments) -> Iterator[None]:
    """A context in which transformers builds models whole, ZeRO-3 or not."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if arguments.deepspeed:
            set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def close() -> None:
    """Leave the process group, if there is one, when all are done: a process that exits inside it may abort."""
    if _joined():
        barrier()
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait until all processes are here."""
    if _joined():
        torch.distributed.barrier()


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
