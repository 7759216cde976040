"""The contract with models: everything that touches the inside of a decoder goes through here, and nothing else does.

A part of a layer has a name of ours, and is looked for under the names that transformers' models give it. A model may lack a
part: Phi-3, for one, projects queries, keys and values at once. Whoever needs a part calls `require` before anything runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from attention_masks import GistLayout
from attention_masks.registration import layout_arguments
from hyperllama.errors import UserError

# Where a part of a layer may be found, by the names that Llama and its relatives give it.
PARTS = {
    "attention": ("self_attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward"),
    "input norm": ("input_layernorm",),
    "query projection": ("self_attn.q_proj",),
    "key projection": ("self_attn.k_proj",),
    "value projection": ("self_attn.v_proj",),
    "output projection": ("self_attn.o_proj",),
    "query norm": ("self_attn.q_norm",),
    "key norm": ("self_attn.k_norm",),
    "norm behind attention": ("post_attention_layernorm",),
    "norm before the mlp": ("pre_feedforward_layernorm",),
    "norm behind the mlp": ("post_feedforward_layernorm",),
}
# Of these nothing depends that a layer's own keys and values are made of.
BEHIND_KEYS = (
    "mlp",
    "query projection",
    "query norm",
    "output projection",
    "norm behind attention",
    "norm before the mlp",
    "norm behind the mlp",
)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a causal LM's decoder."""
    return model.get_decoder().layers


def part(layer: nn.Module, name: str) -> nn.Module | None:
    """A part of a layer by its name in `PARTS`, or None if the layer has none that is known."""
    for path in PARTS[name]:
        try:
            return layer.get_submodule(path)
        except AttributeError:
            continue
    return None


def require(model: PreTrainedModel, parts: Sequence[str], what: str) -> None:
    """UserError unless every layer of the model has all these `parts`; `what` needs them, and begins the sentence."""
    missing = next((name for layer in layers_of(model) for name in parts if part(layer, name) is None), None)
    if missing:
        raise UserError(f"{what} needs the {missing} of each layer, which {type(model).__name__} does not have by itself")


def behind_last_keys(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that compute nothing that a key or a value depends on: the rest of the last layer, and the final norm."""
    found = [part(layers_of(model)[-1], name) for name in BEHIND_KEYS]
    return [module for module in (*found, getattr(model.get_decoder(), "norm", None)) if module is not None]


def keys_and_values(layer: nn.Module, rows: Tensor, added: Sequence[Tensor | None], config) -> tuple[Tensor, Tensor]:
    """What a layer makes of rows (T, hidden) behind its input norm: keys without positions, and values, (N, T, D) each.

    `added` to the two projections, before keys are normalised: (T, N x D) or None. Needs the parts `KEYS_AND_VALUES`.
    """
    norm, sides = part(layer, "key norm"), []
    for name, more in zip(("key projection", "value projection"), added, strict=True):
        side = part(layer, name)(rows)
        sides.append(side if more is None else side + more.to(side.dtype))
    heads = (-1, head_dim(config))
    if norm is None:
        keys = sides[0].unflatten(-1, heads)
    elif norm.weight.numel() == sides[0].shape[-1]:  # OLMoE normalises all heads at once, Qwen3 each by itself
        keys = norm(sides[0]).unflatten(-1, heads)
    else:
        keys = norm(sides[0].unflatten(-1, heads))
    return keys.transpose(0, 1), sides[1].unflatten(-1, heads).transpose(0, 1)


KEYS_AND_VALUES = ("input norm", "key projection", "value projection")


# Models whose logits are what their head returns and nothing else: no scale, no soft cap.
PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3")


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether a model's logits are known to be a product with its head's weights; all others are asked for their logits."""
    head = model.get_output_embeddings()
    return model.config.model_type in PLAIN_HEADS and type(head) is nn.Linear and head.bias is None


def embedding_scale(model: PreTrainedModel) -> float:
    """What a model's embedding layer multiplies its weights by: the square root of the hidden size in Gemma, else 1."""
    return float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))


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
    apart: bool = False,
) -> dict:
    """Keyword arguments with which `model` reads a packed row (1, T) under `layout`; UserError if it is too long for it.

    `states`, `apart`: see `attention_masks.registration.layout_arguments`.
    """
    longest = model.config.max_position_embeddings
    if layout.last_position >= longest:
        raise UserError(
            f"a context with its gists and queries takes {layout.last_position + 1} positions, but the model has {longest}; "
            "use fewer shots, shorter examples, or a model with a longer context"
        )
    return layout_arguments(layout, inverse_frequencies(model), backend, states, apart)


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument by which a model, its decoder or its `generate` takes `cache`.

    Its name is `cache` in transformers from 5.24 on and `past_key_values` before; `model.forward` says which, so that a model
    whose code still has the old name gets the old name.
    """
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def computes_again(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on, so that layers are computed again in the backward pass."""
    # The second name is that of older versions of transformers.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return getattr(model, next(name for name in names if hasattr(type(model), name)))
