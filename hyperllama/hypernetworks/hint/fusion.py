"""Instruction fusion: the encoded instruction as rows of every layer's attention, beside the prefix that is generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from hyperllama.base.decoder import KEYS_AND_VALUES, keys_and_values, layers_of, part, require


class Fusion(nn.Module):
    """Encoded tokens in, keys and values at every layer out (Ivison et al. 2023).

    Each layer's own norm and key and value projections are applied to what it reads: the states that came to it, or the final
    ones as if it read those. To the projections LoRA of `rank` is added, whose second matrices start at zero: then it is those
    projections alone.
    """

    def __init__(self, base: PreTrainedModel, rank: int):
        super().__init__()
        require(base, KEYS_AND_VALUES, "hint.fusion")
        layers = layers_of(base)
        hidden, place = base.config.hidden_size, {"device": base.device, "dtype": torch.float32}
        widths = [part(layers[0], name).out_features for name in KEYS_AND_VALUES[1:]]
        # Of keys, then of values.
        self.A = nn.ParameterList(nn.Parameter(torch.empty(len(layers), hidden, rank, **place)) for _ in widths)
        self.B = nn.ParameterList(nn.Parameter(torch.zeros(len(layers), rank, width, **place)) for width in widths)
        for a in self.A:
            nn.init.normal_(a, std=hidden**-0.5)
        self.rank = rank

    def forward(self, base: PreTrainedModel, encoded: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """encoded, (T, hidden) for each layer -> keys without positions, and values, (N, T, D) at each layer."""
        states = []
        for i, layer in enumerate(layers_of(base)):
            x = part(layer, "input norm")(encoded[i].to(base.dtype))
            added: list[Tensor | None] = [None, None]
            if self.rank:
                added = [linear(linear(x.to(a.dtype), a[i].T), b[i].T) for a, b in zip(self.A, self.B, strict=True)]
            states.append(keys_and_values(layer, x, added, base.config))
        return states
