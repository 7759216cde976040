"""Recipes: what a training run is, as typed YAML. No torch, no weights: a wrong recipe is told about at once and in full."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hyperllama.data.synthetic import SyntheticLanguage
from hyperllama.data.text import Limits, TextFormat
from hyperllama.errors import UserError


@dataclass(frozen=True)
class ModelRecipe:
    """The base model: a local folder or a hub name with its tokenizer; without one, an `architecture` initialised at random.

    `architecture` holds `model_type` and fields of its transformers config. Its `tokenizer`, "words", knows the words of a
    synthetic language; "bytes" is byte-level BPE of `vocab_size`, trained on the data's own text.
    """

    name_or_path: str | None = None
    revision: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: Literal["words", "bytes"] = "bytes"
    vocab_size: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class GistRecipe:
    """`tokens`: G, how many gists stand for a context. `backend`: the attention kernel, see `attention_masks.BACKENDS`."""

    tokens: int = 16
    backend: str = "auto"


@dataclass(frozen=True)
class LoraRecipe:
    """See `hyperllama.lora.RowLora`. `targets` are names of linear layers; empty for all of them."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DataRecipe:
    """Where episodes come from and how they are drawn.

    source: "synthetic" (a generated language), "sni" (a clone of natural-instructions at `root`; `split` is a list below
    `splits`), or "jsonl" (a file, or a folder of files, at `root`). An episode has `min_shots` to `shots` demonstrations
    (exactly `shots` if `min_shots` is null) and `queries` queries that share them.
    """

    source: Literal["synthetic", "sni", "jsonl"] = "synthetic"
    root: str | None = None
    split: str = "train"
    splits: str = "splits/default"
    instances_per_task: int = 100
    shots: int = 16
    min_shots: int | None = None
    queries: int = 4
    synthetic: SyntheticLanguage = field(default_factory=SyntheticLanguage)


@dataclass(frozen=True)
class FullAttentionRecipe:
    """For method full_attention: whether answers of demonstrations are targets too."""

    supervise_demonstrations: bool = False


@dataclass(frozen=True)
class Recipe:
    """One training run. `training` is transformers' TrainingArguments, verbatim.

    method "hypernetwork" freezes the base and trains gists and LoRA; "full_attention" trains all weights of the base with
    demonstrations in plain sight: the multi-task baseline, or the base of a toy.
    """

    method: Literal["hypernetwork", "full_attention"] = "hypernetwork"
    output: str | None = None
    seed: int = 0
    model: ModelRecipe = field(default_factory=ModelRecipe)
    gist: GistRecipe = field(default_factory=GistRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    format: TextFormat = field(default_factory=TextFormat)
    limits: Limits = field(default_factory=Limits)
    full_attention: FullAttentionRecipe = field(default_factory=FullAttentionRecipe)
    training: dict[str, Any] = field(default_factory=dict)


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file with `dotted.key=value` overrides.

    Raises UserError with one line for every problem: the file (or "command line"), the key, what is wrong, and the nearest
    known name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe file")
    try:
        written = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not OmegaConf.is_dict(written):
        raise UserError(f"{path}: a recipe is a mapping of keys, this is {type(OmegaConf.to_container(written)).__name__}")
    problems: list[str] = []
    merged = _merge(OmegaConf.structured(Recipe), written, str(path), problems)
    for override in overrides:
        if "=" not in override or override.startswith("="):
            problems.append(f"command line: {override!r} is not of the form dotted.key=value")
            continue
        merged = _merge(merged, OmegaConf.from_dotlist([override]), "command line", problems)
    recipe = OmegaConf.to_object(merged)
    problems += [f"{path}: {problem}" for problem in _impossible(recipe)]
    if problems:
        raise UserError("\n".join(problems))
    return recipe


def save_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def differences(old: str, new: str) -> list[str]:
    """Keys in which two resolved recipes differ."""

    def leaves(value, key=""):
        if isinstance(value, dict) and value:
            return {k: v for name, part in value.items() for k, v in leaves(part, f"{key}.{name}" if key else name).items()}
        return {key: value}

    a, b = (leaves(OmegaConf.to_container(OmegaConf.create(text))) for text in (old, new))
    return [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def _merge(config, addition, where: str, problems: list[str]):
    """Merge leaf by leaf, so that each problem is found, not only the first."""
    for key, value in _leaves(OmegaConf.to_container(addition), Recipe, ""):
        nearest = _nearest(key)
        if nearest is not None:
            problems.append(f"{where}: {key}: unknown key{nearest}")
            continue
        try:
            one = value
            for name in reversed(key.split(".")):
                one = {name: one}
            config = OmegaConf.merge(config, one)
        except OmegaConfBaseException as error:
            problems.append(f"{where}: {key}: {str(error).splitlines()[0]}")
    return config


def _leaves(value: Any, schema: Any, key: str):
    """Dotted keys and values, down to where the schema stops having named fields."""
    if dataclasses.is_dataclass(schema) and isinstance(value, dict):
        types = typing.get_type_hints(schema)
        for name, part in value.items():
            yield from _leaves(part, types.get(name), f"{key}.{name}" if key else str(name))
    elif key in ("training", "model.architecture") and isinstance(value, dict):
        for name, part in value.items():
            yield f"{key}.{name}", part
    else:
        yield key, value


def _nearest(key: str) -> str | None:
    """None for a known key; for an unknown one a hint, which may be empty."""
    names, schema, known = key.split("."), Recipe, ""
    for i, name in enumerate(names):
        if not dataclasses.is_dataclass(schema):
            if known not in ("training", "model.architecture"):
                return f"; {known} has no keys below it"
            if known == "training" and i == 1:
                return _hint("training", name, _training_fields())
            return None
        types = typing.get_type_hints(schema)
        if name not in types:
            return _hint(known, name, list(types))
        schema, known = types[name], f"{known}.{name}" if known else name
    return None


def _hint(parent: str, name: str, choices: list[str]) -> str | None:
    if name in choices:
        return None
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return (
        f"; did you mean {parent + '.' if parent else ''}{close[0]}?" if close else f"; choose from {', '.join(choices[:40])}"
    )


def _training_fields() -> list[str]:
    from transformers import TrainingArguments

    return [f.name for f in dataclasses.fields(TrainingArguments)]


def _impossible(recipe: Recipe) -> list[str]:
    """Everything about the values of a recipe that cannot work, a sentence each."""
    found = []

    def check(holds: bool, problem: str):
        if not holds:
            found.append(problem)

    model, data, limits, training = recipe.model, recipe.data, recipe.limits, recipe.training
    check(bool(recipe.output), "output: give the folder for this run")
    folder = Path(model.name_or_path or "")
    if model.name_or_path and folder.is_dir():
        has_config = (folder / "config.json").is_file()
        check(has_config, f"model.name_or_path: {folder} is not a model folder, it has no config.json; give one that has")
    if not model.name_or_path:
        check(bool(model.architecture), "model: give name_or_path, or an architecture to initialise at random")
        known = not model.architecture or "model_type" in model.architecture
        check(known, "model.architecture.model_type: give the kind of model, such as llama")
        enough = model.tokenizer == "words" or model.vocab_size >= 300
        check(enough, "model.vocab_size: at least 300, the bytes and some merges")
        fits = model.tokenizer == "bytes" or data.source == "synthetic"
        check(fits, "model.tokenizer: words knows the synthetic language only; choose bytes")
    check(recipe.gist.tokens >= 1, f"gist.tokens: at least 1, not {recipe.gist.tokens}")
    check(recipe.lora.rank >= 1, f"lora.rank: at least 1, not {recipe.lora.rank}")
    check(0 <= recipe.lora.dropout < 1, f"lora.dropout: a share below 1, not {recipe.lora.dropout}")
    fewest = data.shots if data.min_shots is None else data.min_shots
    check(0 <= fewest <= data.shots, f"data.min_shots: between 0 and data.shots={data.shots}, not {fewest}")
    check(data.queries >= 1, f"data.queries: at least 1, not {data.queries}")
    check(data.instances_per_task >= 1, f"data.instances_per_task: at least 1, not {data.instances_per_task}")
    check(limits.context_tokens >= 1, f"limits.context_tokens: at least 1, not {limits.context_tokens}")
    check(
        limits.query_tokens >= 2,
        f"limits.query_tokens: at least 2 (a token of input, one of answer), not {limits.query_tokens}",
    )
    if data.source == "synthetic":
        found += [f"data.synthetic: {problem}" for problem in data.synthetic.problems()]
    else:
        check(bool(data.root), f"data.root: give the folder or file of source {data.source}")
        if data.root and not Path(data.root).exists():
            found.append(f"data.root: {data.root} does not exist; set it to where your copy of the data is")
    found += recipe.format.problems()
    check("output_dir" not in training, "training.output_dir: is set by output; remove it")
    if data.source == "synthetic":
        check(training.get("max_steps", -1) > 0, "training.max_steps: the synthetic language is endless, so say how many steps")
    positions = _positions(model)
    needed = limits.context_tokens + limits.query_tokens + (recipe.gist.tokens if recipe.method == "hypernetwork" else 0)
    if positions is not None and needed > positions:
        found.append(f"limits: context_tokens, query_tokens and gists need {needed} positions, but the model has {positions}")
    return found


def _positions(model: ModelRecipe) -> int | None:
    """The model's longest sequence, where it can be known without loading anything."""
    if not model.name_or_path:
        return model.architecture.get("max_position_embeddings")
    config = Path(model.name_or_path) / "config.json"
    if not config.is_file():
        return None
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings")
    except ValueError:
        return None
