"""The inside of a decoder, as everything here meets it: sizes, rotary positions, and how a packed row is read."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from attention_masks import GistLayout
from attention_masks.registration import layout_arguments
from hyperllama.errors import UserError


def head_dim(config) -> int:
    """D, the dimensions of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config) -> int:
    """N, the key-value heads of a layer."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def inverse_frequencies(model: PreTrainedModel) -> Tensor:
    """The model's rotary inverse frequencies (D_rotary / 2,)."""
    return model.get_decoder().rotary_emb.inv_freq


def rotary_settings(model: PreTrainedModel) -> dict[str, Any]:
    """The model's rotary settings as a manifest holds them, with the inverse frequencies that they come to."""
    return {**model.config.rope_parameters, "inv_freq": inverse_frequencies(model).float().tolist()}


def packed_arguments(
    model: PreTrainedModel,
    layout: GistLayout,
    backend: str = "auto",
    states: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> dict:
    """Keyword arguments with which `model` reads a packed row (1, T) under `layout`; UserError if it is too long for it.

    `states`: see `attention_masks.registration.layout_arguments`.
    """
    longest = model.config.max_position_embeddings
    if layout.last_position >= longest:
        raise UserError(
            f"a context with its gists and queries takes {layout.last_position + 1} positions, but the model has {longest}; "
            "use fewer shots, shorter examples, or a model with a longer context"
        )
    return layout_arguments(layout, inverse_frequencies(model), backend, states)


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument by which a model, its decoder or its `generate` takes `cache`.

    Its name is `cache` in transformers from 5.24 on and `past_key_values` before; `model.forward` says which, so that a model
    whose code still has the old name gets the old name.
    """
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}
