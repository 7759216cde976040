"""Instruction fusion: the encoded instruction as rows of every layer's attention, beside the prefix that is generated."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from hyperllama.base.decoder import head_dim


class Fusion(nn.Module):
    """Encoded tokens in, keys and values at every layer out (Ivison et al. 2023).

    Each layer's own norm and key and value projections are applied, as if the final states were what the layer reads. To the
    projections LoRA of `rank` is added, whose second matrices start at zero: then it is those projections alone.
    """

    def __init__(self, base: PreTrainedModel, rank: int):
        super().__init__()
        layers = base.get_decoder().layers
        hidden, place = base.config.hidden_size, {"device": base.device, "dtype": torch.float32}
        widths = [getattr(layers[0].self_attn, f"{side}_proj").out_features for side in "kv"]
        # Of keys, then of values.
        self.A = nn.ParameterList(nn.Parameter(torch.empty(len(layers), hidden, rank, **place)) for _ in widths)
        self.B = nn.ParameterList(nn.Parameter(torch.zeros(len(layers), rank, width, **place)) for width in widths)
        for a in self.A:
            nn.init.normal_(a, std=hidden**-0.5)
        self.rank = rank

    def forward(self, base: PreTrainedModel, encoded: Tensor) -> list[tuple[Tensor, Tensor]]:
        """encoded (T, hidden), final normalised states -> keys without positions, and values, (N, T, D) at each layer."""
        states = []
        for i, layer in enumerate(base.get_decoder().layers):
            attention = layer.self_attn
            x = layer.input_layernorm(encoded.to(layer.input_layernorm.weight.dtype))
            sides = []
            for side, name in enumerate(("k", "v")):
                rows = getattr(attention, f"{name}_proj")(x)
                if self.rank:
                    rows = rows + linear(linear(x.float(), self.A[side][i].T), self.B[side][i].T).to(rows.dtype)
                rows = rows.unflatten(-1, (-1, head_dim(base.config)))  # (T, N, D)
                norm = getattr(attention, f"{name}_norm", None)  # Qwen3 normalises keys
                sides.append((rows if norm is None else norm(rows)).transpose(0, 1))
            states.append(tuple(sides))
        return states
