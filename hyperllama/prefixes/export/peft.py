"""Prefixes as PEFT adapters and back."""

from __future__ import annotations

import json
import math
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import safetensors.torch
import torch
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad

from hyperllama.base.adapters import LORA, Pairs
from hyperllama.base.loading import load_config
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import read_json, sha256, write_atomically
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix

CONFIG, WEIGHTS, MANIFEST, CARD = "adapter_config.json", "adapter_model.safetensors", "hyperllama.json", "README.md"

TENSOR, CHECKSUM = "prompt_embeddings", "hyperllama_sha256"

KINDS = {"PREFIX_TUNING": "PrefixTuningConfig", "CARTRIDGE": "CartridgeConfig"}

LORA_TENSOR = "base_model.model.model.layers.{layer}.self_attn.{name}.lora_{side}.weight"

PROJECTION = {"embedding.weight", "transform.0.weight", "transform.0.bias", "transform.2.weight", "transform.2.bias"}

STILL_TRUE = ("base", "rotary", "task", "instruction", "text_format", "sink")  # of a manifest, when its prefix is tuned further


def to_peft(
    prefix: Prefix,
    folder: str | Path,
    *,
    kind: Literal["prefix_tuning", "cartridge"] = "prefix_tuning",
    overwrite: bool = False,
) -> Path:
    """Write a prefix as an adapter that stock `PeftModel.from_pretrained(model, folder)` reads; returns the folder.

    It holds adapter_model.safetensors with `prompt_embeddings` (G, L * 2 * N * D) in the prefix's dtype, hyperllama.json with
    the manifest, README.md and, written last, adapter_config.json: without it a folder is no adapter. A cartridge has no frozen
    tokens. A task module that is LoRA and nothing else is written as PEFT's LORA, whatever `kind`. Raises UserError for an
    unknown kind, a peft without cartridges, a task module that no adapter can be, or a folder that holds a model or another
    kind of adapter, such as a hypernetwork, or without `overwrite` files of these names that are not ours; OSError when the
    disk refuses. Warns where `lost_in_generate` does.
    """
    import peft

    folder, peft_type = Path(folder), kind.upper()
    if not hasattr(peft, KINDS.get(peft_type, "")):
        raise UserError(f"kind={kind!r}: peft {peft.__version__} has none; use prefix_tuning, or cartridge with a newer peft")
    kinds = _lora_kinds(prefix)
    _refuse_others_files(folder, bool(kinds), overwrite)
    base = prefix.manifest.base.name if prefix.manifest else None
    if kinds:
        rank = max(prefix.adapters.sizes.values())
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=kinds, lora_dropout=0.0)
        tensors = _lora_tensors(prefix.adapters.pairs, rank)
        checksum = sha256(*(f"{name}{_checksum(tensors[name])}" for name in sorted(tensors)))
    else:
        config = _prefix_config(peft, prefix, peft_type)
        tensors = {TENSOR: _flat(prefix)}
        checksum = _checksum(tensors[TENSOR])
    config.task_type, config.base_model_name_or_path, config.inference_mode = peft.TaskType.CAUSAL_LM, base, True
    with TemporaryDirectory() as temporary:
        config.save_pretrained(temporary)
        config_text = (Path(temporary) / CONFIG).read_text(encoding="utf-8")
    (folder / CONFIG).unlink(missing_ok=True)
    write_atomically(folder / WEIGHTS, safetensors.torch.save(tensors, {"format": "pt", CHECKSUM: checksum}))
    (folder / MANIFEST).unlink(missing_ok=True)
    if prefix.manifest:
        ours = {"manifest": json.loads(prefix.manifest.to_json()), "sha256": checksum}
        write_atomically(folder / MANIFEST, json.dumps(ours, indent=2) + "\n")
    write_atomically(folder / CARD, _card(prefix))
    write_atomically(folder / CONFIG, config_text + "\n")
    if lost := not kinds and lost_in_generate():
        warnings.warn(lost, stacklevel=2)
    return folder


def _refuse_others_files(folder: Path, is_lora: bool, overwrite: bool) -> None:
    """UserError for a file that would be replaced, unless an adapter of ours is there, or the adapter would join a model."""
    if folder.is_file() or (folder / "config.json").exists():  # a model would load the adapter beside it by itself
        raise UserError(f"{folder}: {'a file' if folder.is_file() else 'holds a model'}; give a new folder for the adapter")
    another = is_lora and (folder / MANIFEST).exists()  # of a task module that was LoRA, which may be replaced
    if not another and (folder / CONFIG).exists() and (held := str(_config(folder).get("peft_type"))) not in KINDS:
        raise UserError(f"{folder}: holds a {held} adapter, which would be overwritten; give a new folder")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            ours = CHECKSUM in (file.metadata() or {})
    except (SafetensorError, OSError):
        ours = False
    there = [name for name in (CONFIG, WEIGHTS, MANIFEST, CARD) if (folder / name).exists()]
    if there and not ours and not overwrite:
        raise UserError(f"{folder}: holds {there[0]}, which is not ours; give a new folder, or --overwrite to replace it")


def lost_in_generate() -> str | None:
    """A sentence if the installed PEFT's `generate` is known to lose a prefix with the installed transformers, else None.

    transformers 5.24 calls the cache `cache`; PEFT up to 0.21.2 puts a prefix where the cache was before. `forward` is right.
    """
    peft, transformers = version("peft"), version("transformers")
    if Version(peft).release <= (0, 21, 2) and Version(transformers).release >= (5, 24):
        return (
            f"PEFT {peft} loses a prefix in generate with transformers {transformers}, though not in forward; generate with "
            "transformers below 5.24 or a newer PEFT, or with hyperllama generate"
        )
    return None


def _lora_kinds(prefix: Prefix) -> list[str]:
    """The projections that a task module which is LoRA stands beside; none for a prefix. UserError for what PEFT cannot say."""
    kinds = list(prefix.adapters.pairs) if prefix.adapters is not None else []
    if set(kinds) - set(LORA):
        raise UserError("PEFT has no adapters beside MLPs; set hint.adapter_size to 0")
    if kinds and prefix.rows:
        raise UserError("PEFT has LoRA or keys and values, not both in one adapter; set gist.tokens to 0 and fusion to false")
    if not kinds and not prefix.rows:
        raise UserError("a prefix without gists cannot be an adapter; give one of at least one gist")
    return sorted(kinds)


def _prefix_config(peft, prefix: Prefix, peft_type: str):
    # With grouped-query heads PEFT means keys and values here, not the model's hidden size and query heads.
    sizes = {"token_dim": prefix.kv_heads * prefix.head_dim, "num_attention_heads": prefix.kv_heads}
    sizes |= {"num_virtual_tokens": prefix.rows, "num_layers": prefix.layers, "num_transformer_submodules": 1}
    sizes |= {"num_frozen_tokens": 0} if peft_type == "CARTRIDGE" else {}
    return getattr(peft, KINDS[peft_type])(**sizes)


def _flat(prefix: Prefix) -> Tensor:
    """(G, L * 2 * N * D), each layer's keys before its values."""
    pairs = torch.stack([tensor.detach() for pair in zip(prefix.keys, prefix.values) for tensor in pair])  # (2L, N, G, D)
    return pairs.permute(2, 0, 1, 3).flatten(1).cpu().contiguous()


def _lora_tensors(pairs: Pairs, rank: int) -> dict[str, Tensor]:
    """LoRA by PEFT's names: A (rank, in) and B (out, rank) of each layer, filled up with zeros to one rank."""
    tensors = {}
    for name, (down, up) in pairs.items():
        missing = rank - down.shape[2]
        sides = {"A": pad(down.transpose(1, 2), (0, 0, 0, missing)), "B": pad(up.transpose(1, 2), (0, missing))}
        for side, layers in sides.items():
            for layer, weight in enumerate(layers):
                tensors[LORA_TENSOR.format(layer=layer, name=name, side=side)] = weight.detach().cpu().contiguous()
    return tensors


def from_peft(
    folder: str | Path, *, kv_heads: int | None = None, head_dim: int | None = None, layers: int | None = None
) -> Prefix:
    """Read a PREFIX_TUNING or CARTRIDGE adapter, ours or anybody's, onto the CPU in its own dtype.

    The model's shape is what the arguments say (N, D, L), else the adapter's config, else its base's. An MLP is folded away.

    Our own adapters come back with their manifest. If PEFT has saved other values beside it since, as it does after further
    tuning, it keeps what is still true (base, rotary embedding, task, instruction, text format) and loses what was said of the
    old values. Other adapters have no manifest, so nothing knows which model may read them.

    Raises UserError for files or tensors that are missing, damaged, pickled, no decoder-only model's prefix, or do not fit.
    """
    config = _config(folder := Path(folder))
    if (held := str(config.get("peft_type"))) not in KINDS:
        raise UserError(f"{folder}: holds a {held} adapter, but only {' and '.join(KINDS)} are prefixes; give one of these")
    if config.get("task_type") == "SEQ_2_SEQ_LM" or config.get("num_transformer_submodules") not in (None, 1):
        raise UserError(f"{folder}: made for an encoder-decoder model; give an adapter of a decoder-only one")
    flat = _read_weights(folder / WEIGHTS)
    said, found = config.get("num_virtual_tokens"), f"{flat.dtype} {tuple(flat.shape)}"
    if flat.ndim != 2 or not flat.is_floating_point() or said not in (None, len(flat)):
        raise UserError(
            f"{folder / WEIGHTS}: {TENSOR} are {found}, not floats of the shape ({said or 'G'}, width); save it again"
        )
    shape = _shape(folder, config, {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim})
    if min(shape.values()) < 1 or 2 * math.prod(shape.values()) != flat.shape[1]:
        raise UserError(f"{folder}: {TENSOR} is {flat.shape[1]} wide, not twice the product of {shape}; give the right ones")
    pairs = flat.view(len(flat), shape["layers"], 2, shape["kv_heads"], shape["head_dim"])
    pairs = pairs.permute(1, 2, 3, 0, 4).contiguous()  # (L, 2, N, G, D)
    prefix = Prefix(pairs[:, 0].unbind(), pairs[:, 1].unbind())
    if (folder / MANIFEST).exists():
        ours = read_json(folder / MANIFEST, "the manifest of a prefix")
        try:
            manifest = Manifest.from_json(json.dumps(ours["manifest"]))
            same = ours["sha256"] == _checksum(flat)
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST}: not a prefix's manifest ({in_one_line(error)}); remove the file") from error
        prefix.manifest = manifest if same else Manifest(**{name: getattr(manifest, name) for name in STILL_TRUE})
    return prefix


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no folder with {CONFIG}; give the folder of an adapter that was saved by PEFT or to_peft")
    config = read_json(folder / CONFIG, "the config of a PEFT adapter")
    return config if isinstance(config, dict) else {}


def _read_weights(path: Path) -> Tensor:
    """The flat tensor of an adapter."""
    if not path.is_file():
        pickle = path.with_suffix(".bin").is_file()
        why = "a pickle can run code, so adapter_model.bin is not read; save" if pickle else "the adapter is not whole; copy"
        raise UserError(f"{path}: no such file, and {why} it again as safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({in_one_line(error)}); copy or save it again") from error
    # PEFT folds an MLP away when it saves; a state_dict that was saved by other means still has it, under longer names.
    encoder = {re.sub(r"^.*(?=embedding\.|transform\.)", "", name): tensor for name, tensor in tensors.items()}
    if set(encoder) == PROJECTION:
        return _folded(path, encoder)
    if set(tensors) != {TENSOR}:
        raise UserError(f"{path}: needs {TENSOR} and no more, not {sorted(tensors)[:5]}; save a prefix alone with PEFT")
    # PEFT leaves our checksum out when it saves: where it is there, nobody has meant to change the values.
    if metadata.get(CHECKSUM) not in (None, _checksum(tensors[TENSOR])):
        raise UserError(f"{path}: damaged, its checksum does not match; copy it again, or export the prefix again")
    return tensors[TENSOR]


def _folded(path: Path, weights: dict[str, Tensor]) -> Tensor:
    """What peft's PrefixEncoder makes of its virtual tokens (G, L * 2 * N * D), float32; UserError if weights do not fit."""
    from peft import PrefixEncoder, PrefixTuningConfig

    gists, width = weights["embedding.weight"].shape
    hidden, layers = len(weights["transform.0.bias"]), len(weights["transform.2.bias"]) // (2 * width)
    sizes = {"num_virtual_tokens": gists, "token_dim": width, "encoder_hidden_size": hidden, "num_layers": layers}
    encoder = PrefixEncoder(PrefixTuningConfig(**sizes, prefix_projection=True))
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: its MLP does not fit together ({in_one_line(error)}); save it with PEFT") from error
    return encoder(torch.arange(gists)).detach()


def _shape(folder: Path, config: dict[str, Any], given: dict[str, int | None]) -> dict[str, int]:
    """Layers, key-value heads and head dimension: as given, or in the adapter's config, or in the base's."""
    said = (config.get(name) for name in ("num_layers", "num_attention_heads", "token_dim"))
    layers, heads, dim = (value if isinstance(value, int) else None for value in said)
    own = {"layers": layers, "kv_heads": heads, "head_dim": dim // heads if heads and dim else None}
    shape = {name: value or own[name] for name, value in given.items()}
    if all(shape.values()):
        return shape
    try:
        if not config.get("base_model_name_or_path"):
            raise UserError("it names no base model")
        base = load_config(config["base_model_name_or_path"]).get_text_config()
    except UserError as error:
        missing = ", ".join(name for name, value in shape.items() if not value)
        raise UserError(f"{folder}: does not say the model's {missing}, so give them ({error})") from error
    heads = base.num_attention_heads
    theirs = {"layers": base.num_hidden_layers, "kv_heads": getattr(base, "num_key_value_heads", None) or heads}
    theirs["head_dim"] = getattr(base, "head_dim", None) or base.hidden_size // heads
    return {name: value or theirs[name] for name, value in shape.items()}


def _checksum(flat: Tensor) -> str:
    return sha256(f"{flat.dtype}{tuple(flat.shape)}", flat.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _card(prefix: Prefix) -> str:
    made = prefix.manifest
    base, query = (made.base.name, made.text_format.get("query")) if made else (None, None)
    if prefix.rows:
        what, ours = f"Keys and values of {prefix.rows} gists", " or `hyperllama.prefixes.export.peft.from_peft(folder)`"
    else:
        what, ours = "LoRA that was generated from an instruction,", ""
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
---

# {"A soft prefix" if prefix.rows else "LoRA"}{f": {made.task}" if made and made.task else ""}

{what} at {prefix.layers} layers of {base or "a model that is not recorded"}, for
`PeftModel.from_pretrained(model, folder)`{ours}.
Queries have no start token{f", and are {json.dumps(query)}" if query else ""}.
"""
