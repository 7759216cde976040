"""Knowing a base model again: fingerprints of its weights, config and tokenizer."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hyperllama.base.distributed import gathered
from hyperllama.base.identity import BaseIdentity
from hyperllama.files import canonical_json, sha256, written

ROUNDED = "_hyperllama_rounded"  # of a model: the fingerprint of its weights in its dtype, and as in its checkpoint's

FINGERPRINTED_CONFIG = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
)


def spread(count: int, size: int) -> Tensor:
    """At most `count` places, evenly spaced from 0 to `size` - 1, both among them: whole numbers, exact for every size."""
    count = min(count, size)
    # In int64: float32 has no whole number for every place above 2^24.
    return torch.arange(count) * (size - 1) // max(1, count - 1)


def spread_sample(x: Tensor, count: int) -> Tensor:
    """At most `count` entries of `x`, of any shape, evenly spaced in its order: a tensor (count,). `x` is not copied."""
    places = torch.unravel_index(spread(count, x.numel()).to(x.device), x.shape or (1,))
    return (x if x.dim() else x[None])[places]


def bit_sums(x: Tensor, block: int = 2**22) -> tuple[int, int]:
    """Two sums of the bits of a tensor's entries, plain and weighed by place: a change of any one bit changes both.

    So many entries at a time are copied. Nothing is moved off the device but the sums.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.detach().reshape(-1).view(whole)
    plain = weighed = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(bits), block):
        part = bits[start : start + block].long()
        # Odd weights, so that no bit is lost where sums go round at 64 bits.
        weights = 2 * torch.arange(start, start + len(part), device=x.device) + 1
        plain, weighed = plain + part.sum(), weighed + (part * weights).sum()
    return int(plain), int(weighed)


def identify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
    *,
    full: bool = False,
) -> BaseIdentity:
    """Fingerprint a base model.

    weights: name, shape and 256 evenly spaced entries of every parameter, rounded to bf16, so that one model loaded in two
    dtypes is the same model, and 7 billion weights take a second. Training moves nearly all weights, and so entries of that
    sample; a change of a few weights elsewhere is not seen. `full` adds a fingerprint of all of them, which sees any change of
    a weight in bf16 and takes a second for a billion on a CPU. Under ZeRO-3 all ranks must call it: a parameter at a time is
    gathered. Of a base in 4 bits only embeddings, norms and head count: the bytes of its linear layers are stored differently
    from device to device.
    """
    weights = sampled(model)
    raw, canonical = getattr(model, ROUNDED, (None, None))
    if raw is not None and raw == sampled(model, model.dtype):
        weights = canonical  # loaded in float16, whose numbers round to bf16 in another way than those of the checkpoint
    return BaseIdentity(
        name=written(name or model.config.name_or_path or type(model).__name__),
        weights=weights,
        config=config_fingerprint(model.config),
        tokenizer=None if tokenizer is None else sha256(canonical_json(tokenizer.get_vocab())),
        quantize="nf4" if getattr(model, "is_loaded_in_4bit", False) else None,
        full=sampled(model, count=None) if full else None,
    )


def config_fingerprint(config: PretrainedConfig) -> str:
    """SHA-256 of the sizes and rotary settings of a model, of its config as transformers has it."""
    sizes = {key: _number(getattr(config, key, None)) for key in FINGERPRINTED_CONFIG}
    rotary = {key: _real(value) for key, value in config.rope_parameters.items()}
    return sha256(canonical_json({**sizes, "rope_parameters": rotary}))


def sampled(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16, *, count: int | None = 256) -> str:
    """SHA-256 of `count` entries of every parameter, or of all of them, in a dtype; see `identify`."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.is_floating_point():
            continue
        with gathered([parameter]):
            entries = parameter.detach() if count is None else spread_sample(parameter.detach(), count)
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(entries.to(dtype).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _number(value: Any) -> Any:
    """A whole number without a point: config files write 576 and 576.0 alike."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real(value: Any) -> Any:
    """Numbers of rotary settings, where 100000 and 100000.0 are one, with a point."""
    if isinstance(value, list | tuple):
        return [_real(part) for part in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
