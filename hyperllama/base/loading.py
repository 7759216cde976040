"""Loading a frozen decoder and its tokenizer: a local folder, a GGUF file, the hub, or random weights."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from attention_masks import register
from hyperllama.base.checks import check_config, prepare
from hyperllama.base.distributed import gathered, sharded
from hyperllama.base.fingerprints import ROUNDED, sampled
from hyperllama.base.packages import MODELS
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import is_path

# Configs of well-known models, without weights: OWNER--NAME/config.json.
SHIPPED_CONFIGS = Path(__file__).parent.parent.parent / "recipes" / "models"

# What transformers raises about files that it cannot read; the last ones about GGUF files that are damaged.
UNREADABLE = (OSError, ValueError, KeyError, ImportError, NotImplementedError, IndexError, struct.error)
UNREADABLE += (SafetensorError, RuntimeError, AttributeError, TypeError, OverflowError, RecursionError)


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
        # What float16 makes of a checkpoint's numbers is another model to a fingerprint: that is taken before.
        rounds = dtype == "float16" and not quantize
        source = ("float32" if is_gguf(name_or_path) else "auto") if rounds else getattr(torch, dtype)
        settings = {"config": config, "dtype": source, **_quantized(quantize, dtype, device)}
        settings |= base_arguments(name_or_path, weights=True)
        model, found = AutoModelForCausalLM.from_pretrained(revision=revision, output_loading_info=True, **settings)
    except UNREADABLE as error:
        raise UserError(f"{name_or_path}: the model's weights cannot be loaded ({in_one_line(error)})") from error
    if missing := sorted(found["missing_keys"]):  # transformers makes them random
        count = len(missing)
        raise UserError(f"{name_or_path}: {count} of its weights are not in its files, {missing[0]} first; copy it again")
    model.config.name_or_path = name_or_path  # of a GGUF file transformers keeps the folder
    if rounds and model.dtype != torch.float16:
        canonical, model = sampled(model), model.to(torch.float16)
        setattr(model, ROUNDED, (sampled(model, torch.float16), canonical))
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
    # Under ZeRO-3 transformers takes no place: it loads onto the process's device, whole, and DeepSpeed cuts it afterwards.
    return {"quantization_config": settings, **({} if sharded() else {"device_map": {"": device}})}


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
    elif not path.is_dir() and meant_here(name_or_path):
        raise UserError(f"{name_or_path}: no such model folder; train or download the base model first, or correct the path")
    try:
        return AutoConfig.from_pretrained(revision=revision, **base_arguments(name_or_path))
    except UNREADABLE as error:
        if is_gguf(path):
            raise UserError(f"{name_or_path}: transformers cannot read this GGUF file ({in_one_line(error)})") from error
        raise UserError(
            f"{name_or_path}: neither a model folder here nor a model that the hub gives ({in_one_line(error)})"
        ) from error


def meant_here(name: str | Path) -> bool:
    """Whether a name is that of a local file or folder, though there may be none: a path, or one in a folder that is here."""
    return is_path(name) or ("/" in str(name) and Path(name).parent.is_dir())


def base_of(made: str | Path, recorded: str, base_path: str | None) -> str:
    """Where the base of a run or prefix `made` is: `base_path`, or where it was when that was made.

    UserError that says how to name it if it was a folder that is not here.
    """
    if base_path is None and is_path(recorded) and not Path(recorded).expanduser().exists():
        fetched = next((name for name, model in MODELS.items() if Path(model.folder) == Path(recorded)), None)
        how = f"run hyperllama fetch {fetched}, or " if fetched else ""
        raise UserError(
            f"{made}: its base was {recorded}, which is not here; {how}say where it is with --base (in a recipe, model)"
        )
    return base_path or recorded


def find_config(name_or_path: str, revision: str | None = None):
    """As `load_config`, but of a hub model without a `revision` the config that is shipped with us comes first.

    For what needs the sizes of a model and not its weights, so that it needs no network.
    """
    shipped = SHIPPED_CONFIGS / name_or_path.replace("/", "--")
    is_hub_name = name_or_path.count("/") == 1 and not is_path(name_or_path) and not Path(name_or_path).exists()
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


def load_weights_into(model: PreTrainedModel, folder: str | Path) -> None:
    """Give a model the weights of one of its own form that transformers wrote into a folder; UserError if they are none."""
    try:
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict(keep_vars=True)
        # One at a time: under ZeRO-3 both are in parts, of which a state dict would hold nothing.
        for name, weight in model.state_dict(keep_vars=True).items():
            with torch.no_grad(), gathered([saved[name]]), gathered([weight], writing=True):
                if weight.shape != saved[name].shape:
                    raise ValueError(f"{name} is {tuple(saved[name].shape)}, not {tuple(weight.shape)}")
                weight.copy_(saved[name])
    except UNREADABLE as error:
        raise UserError(f"{folder}: the model's weights cannot be loaded ({in_one_line(error)}); copy it again") from error


def default_device() -> str:
    """The GPU of this process, by torchrun's LOCAL_RANK, or "cpu" where there is none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
