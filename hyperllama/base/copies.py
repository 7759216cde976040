"""What training may change: a copy of a base, or the base itself where its weights allow it."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from hyperllama.base.distributed import gathered, in_parts, sharded
from hyperllama.errors import UserError


def copy_to_train(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares no weight with a model. Of a model in 4 bits it has whole weights, with the numbers of those.

    Under ZeRO-3 it is in parts too: a parameter at a time is gathered and cut. All ranks must call it.
    """
    quantized = getattr(model, "is_quantized", False)
    # Copied by itself, a parameter in parts would be an empty one. One in 4 bits is cut later, by DeepSpeed's engine.
    copies = {}
    if sharded() and not quantized:
        for parameter in model.parameters():
            with gathered([parameter]):
                weights = parameter.detach().clone()
            copies[id(parameter)] = in_parts(weights, requires_grad=parameter.requires_grad)
    copied = copy.deepcopy(model, copies)
    if not quantized:
        return copied
    copied.state_dict()  # bitsandbytes undoes with this how it may have packed weights to read with them on a CPU
    return copied.dequantize()


def train_all(model: PreTrainedModel, what: str) -> None:
    """Let training change all weights of a model; UserError, which `what` trains them begins, if it is in 4 bits."""
    if getattr(model, "is_quantized", False):
        raise UserError(f"model.quantize: {what} trains the base's weights, which 4 bits cannot be; set it to null")
    model.requires_grad_(True)
