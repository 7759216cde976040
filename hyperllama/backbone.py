"""The frozen decoder underneath: loading it, refusing what gist attention would get wrong, and knowing it again."""

from __future__ import annotations

import importlib.util
import inspect
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from attention_masks import GistLayout, register, rotate, why_not
from attention_masks.registration import layout_arguments
from hyperllama.distributed import gathered
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import canonical_json, sha256

# Configs of well-known models, without weights: OWNER--NAME/config.json.
SHIPPED_CONFIGS = Path(__file__).parent.parent / "recipes" / "models"
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
# What transformers raises about files that it cannot read; the last ones about GGUF files that are damaged.
UNREADABLE = (OSError, ValueError, KeyError, ImportError, NotImplementedError, IndexError, struct.error)
# Frequencies of these change with the length of the sequence, so a stored key would not stay valid.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
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


def load_base(
    name_or_path: str,
    *,
    dtype: str = "float32",
    quantize: str | None = None,
    revision: str | None = None,
    device: str | None = None,
) -> PreTrainedModel:
    """A causal LM from a local folder, a GGUF file or the hub, checked, frozen and set to gist attention.

    `quantize="nf4"` keeps its linear layers in 4 bits, with doubly quantised constants (Dettmers et al. 2023, section 3), by
    bitsandbytes; they compute in `dtype`. Raises UserError if there is no such model, its files lack weights, its attention
    is not plain causal with rotary positions, or bitsandbytes is missing.
    """
    device = device or default_device()
    if quantize and is_gguf(name_or_path):
        raise UserError(f"{name_or_path}: a GGUF file is read in {dtype}; set model.quantize to null")
    config = load_config(name_or_path, revision=revision)
    check_config(config, name_or_path)
    register()
    try:
        settings = {"config": config, "dtype": getattr(torch, dtype), **_quantized(quantize, dtype, device)}
        settings |= base_arguments(name_or_path, weights=True)
        model, found = AutoModelForCausalLM.from_pretrained(revision=revision, output_loading_info=True, **settings)
    except UNREADABLE as error:
        raise UserError(f"{name_or_path}: the model's weights cannot be loaded ({in_one_line(error)})") from error
    if missing := sorted(found["missing_keys"]):  # transformers makes them random
        count = len(missing)
        raise UserError(f"{name_or_path}: {count} of its weights are not in its files, {missing[0]} first; copy it again")
    model.config.name_or_path = name_or_path  # of a GGUF file transformers keeps the folder
    model = prepare(model, name_or_path)
    return model if quantize else model.to(device)


def is_gguf(name_or_path: str | Path) -> bool:
    """Whether a base is named as a GGUF file, llama.cpp's format: by its ending."""
    return str(name_or_path).lower().endswith(".gguf")


def base_arguments(name_or_path: str | Path, *, weights: bool = False) -> dict[str, Any]:
    """The arguments by which `from_pretrained` of transformers finds a folder, a hub model or a GGUF file.

    With `weights` for a model: the weights of a GGUF file are then made whole.
    """
    if not is_gguf(name_or_path):
        return {"pretrained_model_name_or_path": name_or_path}
    # Whole, or transformers would take a file of the same name in the current folder first.
    path = Path(name_or_path).expanduser().resolve()
    found = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": str(path)}
    return found | ({"quantization_config": GgufConfig(dequantize=True)} if weights else {})


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such GGUF file; correct the path")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file, whose first bytes are GGUF; give one, or a folder with config.json")


def _quantized(quantize: str | None, dtype: str, device: str) -> dict[str, Any]:
    if quantize is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantize: needs bitsandbytes; pip install 'hyperllama[quant]', or set it to null")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def random_base(architecture: Mapping[str, Any], *, vocab_size: int, dtype: str = "float32", **special_tokens: int | None):
    """A randomly initialised causal LM; `architecture` holds `model_type` and the fields of its transformers config."""
    config = random_config(architecture, vocab_size=vocab_size, **special_tokens)
    register()
    return prepare(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)), "model.architecture").to(
        default_device()
    )


def random_config(architecture: Mapping[str, Any], **fields):
    """The transformers config of `random_base`, checked."""
    settings = dict(architecture)
    model_type = settings.pop("model_type", None)
    try:
        config = AutoConfig.for_model(model_type, **{**settings, **fields})
    except (ValueError, TypeError) as error:
        raise UserError(f"model.architecture: {in_one_line(error)}") from error
    check_config(config, "model.architecture")
    return config


def load_config(name_or_path: str, revision: str | None = None):
    """The transformers config of a model, without its weights; UserError if there is none."""
    path = Path(name_or_path).expanduser()
    if is_gguf(path):
        _check_gguf(path)
    elif path.is_file():
        raise UserError(
            f"{name_or_path}: a file, but a base model is a folder with config.json, a .gguf file, or the name of a hub model"
        )
    elif path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{name_or_path}: not a model folder, it has no config.json; give one saved by save_pretrained")
    elif not path.is_dir() and (name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1):
        raise UserError(f"{name_or_path}: no such model folder; train or download the base model first, or correct the path")
    try:
        return AutoConfig.from_pretrained(revision=revision, **base_arguments(name_or_path))
    except UNREADABLE as error:
        if is_gguf(path):
            raise UserError(f"{name_or_path}: transformers cannot read this GGUF file ({in_one_line(error)})") from error
        raise UserError(
            f"{name_or_path}: neither a model folder here nor a model that the hub gives ({in_one_line(error)})"
        ) from error


def find_config(name_or_path: str, revision: str | None = None):
    """As `load_config`, but of a hub model without a `revision` the config that is shipped with us comes first.

    For what needs the sizes of a model and not its weights, so that it needs no network.
    """
    shipped = SHIPPED_CONFIGS / name_or_path.replace("/", "--")
    is_hub_name = (
        name_or_path.count("/") == 1 and not name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).exists()
    )
    if revision is None and is_hub_name and (shipped / "config.json").is_file():
        return load_config(str(shipped))
    return load_config(name_or_path, revision=revision)


def load_tokenizer(name_or_path: str, revision: str | None = None, *, local: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; UserError if there is none. `local` asks no network, only folders and the hub's cache."""
    if is_gguf(name_or_path):
        _check_gguf(Path(name_or_path).expanduser())
    try:
        found = base_arguments(name_or_path)
        return AutoTokenizer.from_pretrained(revision=revision, local_files_only=local, **found)
    except UNREADABLE as error:
        raise UserError(f"{name_or_path}: has no tokenizer that transformers can load ({in_one_line(error)})") from error


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


def load_weights_into(model: PreTrainedModel, folder: str | Path) -> None:
    """Give a model the weights of one of its own form that transformers wrote into a folder."""
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    with torch.no_grad():
        model.load_state_dict(saved.state_dict())


def head_dim(config) -> int:
    """D, the dimensions of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config) -> int:
    """N, the key-value heads of a layer."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def check_backend(backend: str, config, device: torch.device, dtype: torch.dtype) -> None:
    """UserError if an attention backend that a recipe asks for cannot run on this machine in this dtype."""
    reason = None if backend == "auto" else why_not(backend, device, dtype, head_dim(config))
    if reason:
        raise UserError(f"gist.backend: {backend} cannot run here: {reason}; set it to auto")


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


def default_device() -> str:
    """The GPU of this process, by torchrun's LOCAL_RANK, or "cpu" where there is none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def spread(count: int, size: int) -> Tensor:
    """At most `count` places, evenly spaced from 0 to `size` - 1, both among them: whole numbers, exact for every size."""
    count = min(count, size)
    # In int64: float32 has no whole number for every place above 2^24.
    return torch.arange(count) * (size - 1) // max(1, count - 1)


def spread_sample(x: Tensor, count: int) -> Tensor:
    """At most `count` entries of `x`, of any shape, evenly spaced in its order: a tensor (count,). `x` is not copied."""
    places = torch.unravel_index(spread(count, x.numel()).to(x.device), x.shape or (1,))
    return (x if x.dim() else x[None])[places]


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
