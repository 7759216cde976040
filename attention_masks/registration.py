"""Gist attention inside stock transformers models, through the public attention and mask interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from attention_masks.attention import gist_attention
from attention_masks.layout import GistLayout

NAME = "gist"


@dataclass
class Kept:
    """Asks a pass over a packed row for what attention is given in some of its rows, with positions, at each layer.

    `states`: keys and values (N, rows, D) of the rows `states_of`. `queries`: (H, rows, D) of `queries_of`, if there are any,
    without gradient and scaled as the model scales its scores. Both by the layer's number, in the order of layers. Gradient
    checkpointing computes layers again in the backward pass; what is kept is of the first time, with its gradients.
    """

    states_of: Tensor
    queries_of: Tensor | None = None
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> None:
        """Keep rows of query (1, H, T, D), key and value (1, N, T, D)."""
        # The second time too: checkpointing wants the same operations.
        keys, values = (x[0].index_select(1, self.states_of) for x in (key, value))
        self.states.setdefault(layer, (keys.to(values.dtype), values))
        if self.queries_of is not None and layer not in self.queries:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            # Detached first: what the second time lacks must not have saved anything for the backward pass.
            self.queries[layer] = query.detach()[0, :, self.queries_of] * scale


def register() -> str:
    """Register the attention implementation "gist" with transformers and return its name; calling it again is harmless.

    A model set to it (`model.set_attn_implementation("gist")`) computes gist attention when it is called with a
    `gist_layout`, and transformers' own `sdpa` attention, with caches, padding and generation, when it is not.
    """
    AttentionInterface.register(NAME, gist_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def layout_arguments(
    layout: GistLayout,
    inv_freq: Tensor,
    backend: str = "auto",
    states: Sequence[tuple[Tensor, Tensor]] | None = None,
    apart: bool = False,
) -> dict:
    """Keyword arguments with which a decoder reads one packed row (1, T) under `layout`.

    `states` are keys and values (N, R, D) of each layer that stand in the first R rows instead of what the layer computes
    there: prefixes that come from elsewhere. Keys carry the positions that `layout` gives those rows. With `apart` the decoder
    is handed the other T - R rows only, and computes nothing for the first R.

    The attention mask is a single element of four dimensions: transformers hands such a mask through untouched, so it
    does not build a T x T mask that nobody reads.
    """
    first = states[0][0].shape[1] if apart and states else 0
    return {
        "position_ids": layout.positions[None, first:],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.device),
        "gist_layout": layout,
        "gist_inv_freq": inv_freq,
        "gist_backend": backend,
        "gist_states": states,
    }


def gist_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    gist_layout: GistLayout | None = None,
    gist_inv_freq: Tensor | None = None,
    gist_backend: str = "auto",
    gist_states: Sequence[tuple[Tensor, Tensor]] | None = None,
    gist_unread: int = 0,
    gist_kept: Kept | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query (B, H, T, D), key and value (B, N, T, D) -> (B, T, H, D), no weights.

    Nobody reads this layer's output for the first `gist_unread` rows. `gist_kept` collects what is given. Rows of the layout
    that T lacks are its first, and `gist_states` has them.
    """
    if gist_layout is None:
        ordinary = AttentionInterface()["sdpa"]
        return ordinary(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if gist_layout.shifted and gist_inv_freq is None:
        raise ValueError("this layout moves keys, so gist attention needs gist_inv_freq: pass layout_arguments(...)")
    if gist_kept is not None:
        gist_kept.add(module.layer_idx, query, key, value, scaling)
    absent = gist_layout.tokens - query.shape[2]
    if gist_states:
        key, value = (_replace(rows, states, absent) for rows, states in zip((key, value), gist_states[module.layer_idx]))
        query = pad(query, (0, 0, absent, 0)) if absent else query
    if dropout:
        raise ValueError("gist attention has no dropout: set attention_dropout to 0 in the model's config")
    settings = {"backend": gist_backend, "scale": scaling, "inv_freq": gist_inv_freq, "unread": max(gist_unread, absent)}
    output = gist_attention(query, key, value, gist_layout, **settings)
    return output[:, :, absent:].transpose(1, 2), None


def _replace(rows: Tensor, states: Tensor, absent: int) -> Tensor:
    """rows (1, N, T, D) with `states` (N, R, D) in place of the first R, of which the first `absent` are not there."""
    return torch.cat([states[None].to(rows.dtype), rows[:, :, states.shape[1] - absent :]], dim=2)
