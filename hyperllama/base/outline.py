"""A base without numbers: shapes and dtypes alone, to count with. It takes no memory and no time."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from attention_masks import register
from hyperllama.base.decoder import layers_of

# 4 bits; one 8-bit constant for 64 weights, and one of 32 bits for 256 such constants (arXiv 2305.14314, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def outline(config, *, layers: int | None = None, dtype: str = "float32", quantize: str | None = None) -> PreTrainedModel:
    """The base that a transformers config describes, on the meta device, frozen and with gist attention.

    It has the config's first `layers` layers, or all. With `quantize` the linear layers of its decoder are as large as 4 bits
    make them.
    """
    config = config if layers is None else shallow(config, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if quantize:
        for name, module in list(layers_of(model).named_modules()):
            if type(module) is nn.Linear:
                layers_of(model).set_submodule(name, FourBits(module))
    model.set_attn_implementation(register())
    return model.requires_grad_(False)


def shallow(config, layers: int):
    """A copy of a config with the first `layers` layers; settings that list a value for each layer are cut."""
    cut = copy.deepcopy(config)
    depth = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth > layers:
            setattr(cut, name, value[:layers])
    cut.num_hidden_layers = layers
    return cut


class FourBits(nn.Linear):
    """Stands for a frozen linear layer in 4 bits as bitsandbytes has it: packed bytes, unpacked for each product."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.computes_in = layer.weight.dtype
        size = math.ceil(NF4_BYTES * layer.weight.numel())
        packed = torch.empty(size, dtype=torch.uint8, device="meta")
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in the dtype of `x`; the product is in that of the base."""
        product = _Unpacked.apply(x.to(self.computes_in), self.weight, self.out_features)
        return (product if self.bias is None else product + self.bias).to(x.dtype)


class _Unpacked(torch.autograd.Function):
    """A product with weights that are whole for as long as it is computed, there and back."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, out: int) -> Tensor:
        ctx.shape = (out, x.shape[-1])
        ctx.save_for_backward(packed)
        return linear(x, packed.new_empty(ctx.shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (packed,) = ctx.saved_tensors
        return gradient @ packed.new_empty(ctx.shape, dtype=gradient.dtype), None, None
