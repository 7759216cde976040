"""What is refused: decoders whose attention gist masks would get wrong, and kernels that cannot run here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from attention_masks import GistLayout, Segment, register, rotate, why_not
from hyperllama.base.decoder import cache_argument, head_dim, inverse_frequencies, packed_arguments
from hyperllama.base.distributed import sharded
from hyperllama.errors import UserError, in_one_line

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
    """Check a loaded model, freeze it and set it to gist attention. UserError for one that cannot read packed rows exactly."""
    check_config(model.config, name)
    kind, rotary = type(model).__name__, getattr(model.get_decoder(), "rotary_emb", None)
    if not isinstance(getattr(rotary, "inv_freq", None), Tensor):
        raise UserError(f"{name}: {kind} has no rotary_emb.inv_freq; gist masks need rotary positions")
    if not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"{name}: {kind} computes attention by code of its own, which no gist mask reaches; choose another model"
        )
    if not _rotates_as_we_do(model, rotary):
        raise UserError(f"{name}: apply_rotary_pos_emb of {kind} pairs dimensions in another way than Llama's")
    model.set_attn_implementation(register())
    model.requires_grad_(False).eval()
    if wrong := differs_from_sequential(model):
        raise UserError(f"{name}: {kind} {wrong}; choose another model")
    return model


def differs_from_sequential(model: PreTrainedModel) -> str | None:
    """What is wrong, in a few words, if packed passes under gist masks are not what the model computes step by step; else None.

    Five tokens, of which the last two are gists, and three that read them: in one packed row, in a packed row that reads the
    gists' stored keys and values, and as stock transformers runs them, with a cache that keeps the gists only, their keys moved
    to positions 0 and 1. Weights in bf16 or float16 are read as float32: a pretrained model can turn their rounding into
    errors of half a state's size, and more on some CPUs than on others. Not for weights that are cut into parts (ZeRO-3) or
    quantised: with those nothing is computed before training or reading begins.
    """
    if sharded() or getattr(model, "is_quantized", False):
        return None
    try:
        with _in_float32(model):
            alone, *packed = _three_ways(model)
    except Exception as error:  # whatever a model's code does with arguments that it does not expect
        return f"cannot read a packed row ({type(error).__name__}: {in_one_line(error)})"
    # Without gist attention a tiny random model is off by some 1e-3. Of one state float32 alone can make as much, so a segment
    # is judged by its median.
    for row, what in zip(packed, ("a packed row", "a stored prefix in a packed row"), strict=True):
        errors = (row - alone[-len(row) :]).norm(dim=-1) / alone[-len(row) :].norm(dim=-1)
        error = max(segment.median().item() for segment in errors.split([len(row) - 3, 3]) if len(segment))
        if not error < 1e-4:
            return f"gives other results for {what} than step by step (off by {100 * error:.2g} %)"
    return None


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Each module's weights as float32 while it computes, and afterwards as they were, bit for bit."""
    hooks = []
    for module in model.modules() if model.dtype in (torch.bfloat16, torch.float16) else ():
        if own := {name: x.dtype for name, x in module.named_parameters(recurse=False) if x.is_floating_point()}:

            def widen(module: nn.Module, arguments, own=own) -> None:
                for name in own:
                    getattr(module, name).data = getattr(module, name).data.float()

            def narrow(module: nn.Module, arguments, result, own=own) -> None:
                for name, dtype in own.items():
                    getattr(module, name).data = getattr(module, name).data.to(dtype)

            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _three_ways(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Final states (8, hidden) of one segment after the other and of the packed row, and (3, hidden) behind stored gists."""
    decoder, device, inv_freq = model.get_decoder(), model.device, inverse_frequencies(model)
    ids = (torch.arange(3, 11, device=device) % model.config.vocab_size)[None]

    def pass_over(rows: Tensor, segments: list[Segment], states=None) -> Tensor:
        arguments = packed_arguments(model, GistLayout(segments).to(device), "dense", states, apart=True)
        return decoder(input_ids=rows, use_cache=False, **arguments).last_hidden_state[0].float()

    packed = pass_over(ids, [Segment(5, gists=2), Segment(3, reads=(0,))])
    cache, gists, stored = DynamicCache(), DynamicCache(), []
    context = decoder(input_ids=ids[:, :5], use_cache=True, **cache_argument(decoder, cache)).last_hidden_state
    back = torch.full((2,), -3, device=device)
    for i, layer in enumerate(cache.layers):
        keys, values = rotate(layer.keys[:, :, 3:], back, inv_freq), layer.values[:, :, 3:]
        gists.update(keys, values, i)
        stored.append((keys[0], values[0]))
    behind = pass_over(ids[:, 5:], [Segment(2, gists=2), Segment(3, reads=(0,))], stored)
    places = torch.arange(2, 5, device=device)[None]
    ones = torch.ones(1, 5, dtype=torch.long, device=device)
    arguments = {"position_ids": places, "attention_mask": ones, **cache_argument(decoder, gists)}
    reader = decoder(input_ids=ids[:, 5:], use_cache=True, **arguments).last_hidden_state
    return torch.cat([context, reader], 1)[0].float(), packed, behind


def _rotates_as_we_do(model: PreTrainedModel, rotary: nn.Module) -> bool:
    """Whether `attention_masks.rotate` moves a key to where the model's own code would have computed it."""
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    device = rotary.inv_freq.device
    width = 2 * len(rotary.inv_freq)
    key = torch.linspace(-1, 1, 2 * width, device=device).view(1, 1, 2, width)
    try:
        near, far = (apply(key, key, *rotary(key, torch.tensor([p], device=device)))[1] for p in ([3, 5], [10, 12]))
    except Exception:  # another signature or another shape
        return False
    moved = rotate(near, torch.tensor([7, 7], device=device), rotary.inv_freq)
    return near.shape == far.shape and torch.allclose(moved, far, atol=1e-4)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """UserError if a tokenizer has tokens, beside one for padding, that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    known = tokenizer.get_vocab() if tokenizer is not None else {}
    beyond = sorted((i, token) for token, i in known.items() if i >= rows and i != tokenizer.pad_token_id)
    if beyond:
        name = model.config.name_or_path or type(model).__name__
        raise UserError(
            f"{name}: has {rows:,} embeddings, none for tokens of its tokenizer such as {beyond[0][1]!r} ({beyond[0][0]}); "
            "take the tokenizer that it was trained with, or resize its embeddings"
        )


def check_backend(backend: str, config, device: torch.device, dtype: torch.dtype) -> None:
    """UserError if an attention backend that a recipe asks for cannot run on this machine in this dtype."""
    reason = None if backend == "auto" else why_not(backend, device, dtype, head_dim(config))
    if reason:
        raise UserError(f"gist.backend: {backend} cannot run here: {reason}; set it to auto")
