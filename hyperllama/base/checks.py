"""What is refused: decoders whose attention gist masks would get wrong, and kernels that cannot run here."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)

from attention_masks import register, rotate, why_not
from hyperllama.base.decoder import head_dim
from hyperllama.errors import UserError

# Config attributes that change what a key means or who may see it, with the values at which they do nothing.
HARMLESS = {
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "attn_logit_softcapping": (None,),
    "attn_logit_softcap": (None,),
    "alibi": (None, False),
    "use_alibi": (None, False),
    "kv_lora_rank": (None,),
    "attention_dropout": (None, 0, 0.0),
    "is_causal": (None, True),
    "num_kv_shared_layers": (None, 0),
}

# Frequencies of these change with the length of the sequence, so a stored key would not stay valid.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def check_config(config, name: str) -> None:
    """Refuse a model whose attention is not plain causal with rotary positions, by the name of the attribute that says so."""
    for attribute, harmless in HARMLESS.items():
        value = getattr(config, attribute, None)
        if value not in harmless:
            raise UserError(
                f"{name}: {attribute}={value!r} is not plain causal attention, which gist masks need; choose another model"
            )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if others:
        raise UserError(f"{name}: layer_types has {', '.join(others)}; gist masks need full_attention in every layer")
    if not all(getattr(config, "no_rope_layers", None) or [1]):
        raise UserError(f"{name}: no_rope_layers leaves layers without rotary positions, which gist masks need")
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping) or "rope_type" not in rope:
        raise UserError(f"{name}: rope_parameters={rope!r} does not describe one rotary embedding for all layers")
    if rope["rope_type"] in LENGTH_DEPENDENT_ROPE:
        raise UserError(
            f"{name}: rope_type={rope['rope_type']!r} changes with the sequence's length, so stored keys would not stay valid"
        )


def prepare(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Check a loaded model, freeze it and set it to gist attention."""
    check_config(model.config, name)
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if getattr(rotary, "inv_freq", None) is None:
        raise UserError(f"{name}: {type(model).__name__} has no rotary_emb.inv_freq; gist masks need rotary positions")
    if not _rotates_as_we_do(model, rotary):
        raise UserError(f"{name}: apply_rotary_pos_emb of {type(model).__name__} pairs dimensions in another way than Llama's")
    model.set_attn_implementation(register())
    return model.requires_grad_(False).eval()


def _rotates_as_we_do(model: PreTrainedModel, rotary: nn.Module) -> bool:
    """Whether `attention_masks.rotate` moves a key to where the model's own code would have computed it."""
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    device = rotary.inv_freq.device
    width = head_dim(model.config)
    key = torch.linspace(-1, 1, 2 * width, device=device).view(1, 1, 2, width)
    near, far = (apply(key, key, *rotary(key, torch.tensor([p], device=device)))[1] for p in ([3, 5], [10, 12]))
    return torch.allclose(rotate(near, torch.tensor([7, 7], device=device), rotary.inv_freq), far, atol=1e-4)


def check_backend(backend: str, config, device: torch.device, dtype: torch.dtype) -> None:
    """UserError if an attention backend that a recipe asks for cannot run on this machine in this dtype."""
    reason = None if backend == "auto" else why_not(backend, device, dtype, head_dim(config))
    if reason:
        raise UserError(f"gist.backend: {backend} cannot run here: {reason}; set it to auto")
