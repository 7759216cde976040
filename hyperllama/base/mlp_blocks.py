"""Long contexts: a layer's MLP runs over a block of rows at a time, so that its inner states are those of one block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hyperllama.base.decoder import layers_of, part
from hyperllama.base.distributed import gather_whole

# Measured: with so many rows attention holds more than the MLP, and products are as fast as on all rows.
BLOCK_ROWS = 2048


def gather_mlps_whole(model: PreTrainedModel) -> None:
    """Under ZeRO-3, gather all of a layer's MLP when it is called, as training with blocks needs.

    Ranks have contexts of more or fewer blocks, but must call what gathers equally often.
    """
    for layer in layers_of(model):
        if (mlp := part(layer, "mlp")) is not None:
            gather_whole(mlp)


@contextmanager
def mlps_in_blocks(model: PreTrainedModel, rows: int = BLOCK_ROWS, lora=None) -> Iterator[None]:
    """A context in which the `mlp` of each decoder layer takes at most `rows` rows of (1, T, hidden) at a time.

    Rows do not see each other there, so the result is the same. `lora` is the `RowLora` that may act inside, or None. The
    model is as it was when the context ends, also by an exception. For calls without gradients: a backward pass would keep
    every block.
    """
    with ExitStack() as undo:
        for layer in layers_of(model):
            mlp = part(layer, "mlp")
            if mlp is not None:
                undo.callback(_restore, mlp, vars(mlp).get("forward"))
                # Forward alone: hooks on the whole module, such as those of LastLayerSkip, still see all rows.
                mlp.forward = partial(_by_blocks, mlp.forward, rows, lora)
        yield


def _restore(module: torch.nn.Module, own_forward) -> None:
    del module.forward
    if own_forward is not None:  # such as accelerate sets
        module.forward = own_forward


def _by_blocks(forward, rows: int, lora, hidden: Tensor) -> Tensor:
    if hidden.shape[1] <= rows:
        return forward(hidden)
    output = None
    for start in range(0, hidden.shape[1], rows):
        with ExitStack() as shifted:
            if lora is not None:
                shifted.enter_context(lora.from_row(start))
            part = forward(hidden[:, start : start + rows])
        if output is None:
            output = part.new_empty(*hidden.shape[:2], part.shape[2])
        output[:, start : start + rows] = part
    return output
