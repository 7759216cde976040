"""Knowing a base model again: fingerprints of its weights, config and tokenizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hyperllama.base.distributed import gathered
from hyperllama.files import canonical_json, sha256

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


@dataclass(frozen=True)
class BaseIdentity:
    """How a base model is known again: its name for people, and SHA-256 fingerprints for files.

    A quantised base has fingerprints of its own; `quantize` says how to load it.
    """

    name: str
    weights: str
    config: str
    tokenizer: str | None = None
    quantize: str | None = None

    def as_dict(self) -> dict:
        return asdict(self)


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


def identify(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str | None = None) -> BaseIdentity:
    """Fingerprint a base model.

    weights: name, shape and 256 evenly spaced entries of every parameter, rounded to bf16, so that one model loaded in two
    dtypes is the same model, and 7 billion weights take a second. Every kind of tuning moves entries of that sample. Under
    ZeRO-3 all ranks must call it: a parameter at a time is gathered. Of a base in 4 bits only embeddings, norms and head count:
    the bytes of its linear layers are stored differently from device to device.
    """
    digest = []
    for parameter_name, parameter in sorted(model.named_parameters()):
        if not parameter.is_floating_point():
            continue
        with gathered([parameter]):
            sample = spread_sample(parameter.detach(), 256)
            digest.append(f"{parameter_name}{tuple(parameter.shape)}".encode())
            digest.append(sample.to(torch.bfloat16).view(torch.uint8).cpu().numpy().tobytes())
    config = {key: getattr(model.config, key, None) for key in FINGERPRINTED_CONFIG}
    return BaseIdentity(
        name=name or model.config.name_or_path or type(model).__name__,
        weights=sha256(*digest),
        config=sha256(canonical_json({**config, "rope_parameters": model.config.rope_parameters})),
        tokenizer=None if tokenizer is None else sha256(canonical_json(tokenizer.get_vocab())),
        quantize="nf4" if getattr(model, "is_loaded_in_4bit", False) else None,
    )
