"""Checks of a recipe's values, as far as they can be made without loading data or weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hyperllama.data.registry import SOURCES
from hyperllama.errors import UserError
from hyperllama.files import read_json
from hyperllama.hypernetworks.config import read_config
from hyperllama.hypernetworks.registry import KINDS, kind_of
from hyperllama.inference.sampling import contradictions, unknown
from hyperllama.training.deepspeed import DEEPSPEED, deepspeed_file, zero_stage


def recipe_problems(recipe: Any, *, data: bool = True) -> list[str]:
    """All problems of a recipe of any kind, each as "key: what is wrong; what to do".

    Without `data`, the files that the recipe names need not be there.
    """
    check = _Checks()
    check(bool(recipe.output), "output: give the folder for this run")
    if recipe.method == "study":
        check(bool(recipe.tune) and Path(recipe.tune).is_file(), f"tune: {recipe.tune} is not a recipe file; give one to vary")
        check(bool(recipe.starts and recipe.sizes and recipe.seeds), "starts, sizes, seeds: at least one of each")
        return list(check)
    if recipe.method == "table":
        for key in ("train", "evaluate") if recipe.rows else ("evaluate",):
            file = getattr(recipe, key)
            check(bool(file) and Path(file).is_file(), f"{key}: {file} is not a recipe file; give one to vary")
        check(bool(recipe.rows or recipe.base_methods), "rows: at least one, or base_methods")
        check(bool(recipe.seeds), "seeds: at least one")
        return list(check)
    _data(recipe.data, check, there=data)
    {"evaluate": _evaluation, "tune": _tuning}.get(recipe.method, _training)(recipe, check)
    return list(check)


class _Checks(list):
    def __call__(self, holds: bool, problem: str) -> None:
        if not holds:
            self.append(problem)

    def known(self, key: str, name: str, names: Iterable[str]) -> bool:
        """Whether a value is one of the names that there are; else that is a problem."""
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        self(name in names, f"{key}: {name} is not one of {', '.join(names)}{hint}")
        return name in names


def _data(data: Any, check: _Checks, *, there: bool) -> None:
    check(data.queries >= 1, f"data.queries: at least 1, not {data.queries}")
    _shots(data, "data", check)
    for i, part in enumerate(data.parts):
        key = f"data.mixture[{i}]" if data.mixture else "data"
        _source(part, key, check, there=there)
        if data.mixture and (part.shots, part.min_shots) != (None, None):
            check(part.shots is not None, f"{key}.shots: give it beside min_shots")
            _shots(part, key, check)


def _shots(data: Any, key: str, check: _Checks) -> None:
    if data.shots is not None:
        fewest = data.fewest_shots
        check(0 <= fewest <= data.shots, f"{key}.min_shots: between 0 and {key}.shots={data.shots}, not {fewest}")


def _source(part: Any, key: str, check: _Checks, *, there: bool) -> None:
    if not check.known(f"{key}.source", part.source, SOURCES):
        return
    source = SOURCES[part.source]
    check(part.instances_per_task >= 1, f"{key}.instances_per_task: at least 1, not {part.instances_per_task}")
    check(part.weight > 0, f"{key}.weight: above 0, not {part.weight}")
    if source.settings is not None:
        check.extend(f"{key}.{part.source}: {problem}" for problem in getattr(part, part.source).problems())
    if source.made_up:
        return
    if part.hub:
        check(source.from_hub, f"{key}.hub: source {part.source} reads local files; give {key}.root instead")
        check(not part.root, f"{key}: give root or hub, not both")
    else:
        check(bool(part.root), f"{key}.root: give the folder or file of source {part.source}")
        exists = not there or not part.root or Path(part.root).expanduser().exists()
        check(exists, f"{key}.root: {part.root} does not exist; set it to where your copy of the data is")


def _kernels(training: dict, check: _Checks) -> None:
    # The Trainer would warn and go on without: it patches transformers' own classes, and what is trained wraps one.
    liger = "training.use_liger_kernel: is applied to transformers' models only, not to what packs one; remove it"
    check(not training.get("use_liger_kernel"), liger)


def _deepspeed(recipe: Any, check: _Checks) -> None:
    if recipe.deepspeed:
        known = ", ".join(sorted(path.stem for path in DEEPSPEED.glob("*.json")))
        there = deepspeed_file(recipe.deepspeed).is_file()
        check(there, f"deepspeed: {recipe.deepspeed} is neither a file nor one of {known}")
        check("deepspeed" not in recipe.training, "training.deepspeed: is set by deepspeed; remove one of them")


def _format(recipe: Any, check: _Checks) -> None:
    if recipe.format is not None:
        check.extend(recipe.format.problems())
    limits = recipe.limits
    if limits is not None:
        check(limits.context_tokens >= 1, f"limits.context_tokens: at least 1, not {limits.context_tokens}")
        check(
            limits.query_tokens >= 2,
            f"limits.query_tokens: at least 2 (a token of input, one of answer), not {limits.query_tokens}",
        )


def _training(recipe: Any, check: _Checks) -> None:
    model, data, limits, training = recipe.model, recipe.data, recipe.limits, recipe.training
    endless = any(SOURCES[part.source].made_up for part in data.parts if part.source in SOURCES)
    folder = Path(model.name_or_path or "")
    if model.name_or_path and folder.is_dir():
        has_config = (folder / "config.json").is_file()
        check(has_config, f"model.name_or_path: {folder} is not a model folder, it has no config.json; give one that has")
    if folder.suffix.lower() == ".gguf":
        check(folder.expanduser().is_file(), f"model.name_or_path: {folder} is not there; give the path of a GGUF file")
        check(not model.quantize, "model.quantize: weights of a GGUF file are read as they are; set it to null")
    if not model.name_or_path:
        check(bool(model.architecture), "model: give name_or_path, or an architecture to initialise at random")
        known = not model.architecture or "model_type" in model.architecture
        check(known, "model.architecture.model_type: give the kind of model, such as llama")
        enough = model.tokenizer == "words" or model.vocab_size >= 300
        check(enough, "model.vocab_size: at least 300, the bytes and some merges")
        fits = model.tokenizer == "bytes" or all(part.source == "synthetic" for part in data.parts)
        check(fits, "model.tokenizer: words knows the synthetic language only; choose bytes")
    _hypernetwork(recipe, check)
    _trained(recipe, check)
    _format(recipe, check)
    _deepspeed(recipe, check)
    _kernels(recipe.training, check)
    check("output_dir" not in training, "training.output_dir: is set by output; remove it")
    if endless:
        check(training.get("max_steps", -1) > 0, "training.max_steps: the synthetic language is endless, so say how many steps")
    positions = _positions(model)
    cut = recipe.gist.chunking.graph != "single"  # positions begin anew with each chunk
    gists = recipe.gist.tokens + 1 if recipe.method == "hypernetwork" else 0  # and the sink
    needed = limits.context_tokens + limits.query_tokens + gists
    if positions is not None and needed > positions and not cut:
        check(False, f"limits: context_tokens, query_tokens and gists need {needed} positions, but the model has {positions}")
    for part in data.parts:
        window = part.text.most_tokens + gists + 1
        if part.source == "text" and positions is not None and window > positions and not cut:
            check(False, f"data.text: context, continuation and gists need {window} positions, but the model has {positions}")


def _trained(recipe: Any, check: _Checks) -> None:
    """What is trained must be what its weights can be trained in."""
    model, full, lora = recipe.model, recipe.method == "full_attention", recipe.full_attention.lora
    kind = kind_of(recipe) if recipe.gist.kind in KINDS else None
    base = not lora if full else bool(kind and kind.trains_base)
    changed = base or bool(not full and kind and kind.trains_weights)
    check(
        not (changed and model.dtype != "float32" and not recipe.deepspeed),
        f"model.dtype: {model.dtype} weights lose small updates when all of them are trained; set it to float32 with "
        "training.bf16=true, or deepspeed, which keeps float32 weights beside them",
    )
    all_of_base = "model.quantize: all weights of the base are trained, which 4 bits cannot be; set it to null"
    check(not (model.quantize and base), all_of_base)
    if lora:
        check(full, "full_attention.lora: belongs to method full_attention; for a hypernetwork it is gist.kind=lora")
        whole = "full_attention.lora: is merged into the model that is written, so"
        check(not model.quantize, f"{whole} that cannot be in 4 bits; remove model.quantize")
        check(zero_stage(recipe.deepspeed) < 3, f"{whole} every process needs all of it; set deepspeed to zero2 or zero1")


def _hypernetwork(recipe: Any, check: _Checks) -> None:
    gist, start = recipe.gist, recipe.start_from
    check(gist.chunking.chunk_tokens >= 1, f"gist.chunking.chunk_tokens: at least 1, not {gist.chunking.chunk_tokens}")
    check.extend(f"objectives: {problem}" for problem in recipe.objectives.problems())
    for kind in KINDS:
        check.extend(getattr(recipe, kind).values() if hasattr(recipe, kind) else [])
    _backend(gist.backend, check)
    if not check.known("gist.kind", gist.kind, KINDS):
        return
    settings = kind_of(recipe)
    check(gist.tokens >= settings.fewest_rows, f"gist.tokens: at least {settings.fewest_rows}, not {gist.tokens}")
    check.extend(settings.problems(recipe))
    found = not start or (Path(start) / "hypernetwork.json").is_file()
    check(found, f"start_from: {start} is not the folder of a trained hypernetwork; train it first")
    if start and found:
        try:
            kind = read_config(start)["kind"]
        except UserError as error:
            check.append(f"start_from: {error}")
            return
        check(kind == gist.kind, f"start_from: {start} is of kind {kind}, not {gist.kind}; set gist.kind={kind}, or start anew")


def _backend(backend: str, check: _Checks) -> None:
    if backend != "auto":
        from attention_masks import BACKENDS  # loads torch, which a recipe that leaves the choice to us does without

        check.known("gist.backend", backend, ["auto", *BACKENDS])


def _evaluation(recipe: Any, check: _Checks) -> None:
    check(recipe.episodes >= 1, f"episodes: at least 1, not {recipe.episodes}")
    check(recipe.gists is None or recipe.gists >= 1, f"gists: at least 1, or null for all, not {recipe.gists}")
    check(recipe.refine >= 0, f"refine: steps, 0 or more, not {recipe.refine}")
    check(recipe.batch_tokens >= 1, f"batch_tokens: at least 1, not {recipe.batch_tokens}")
    check(recipe.resamples >= 100, f"resamples: at least 100 for an interval, not {recipe.resamples}")
    check.extend(f"generation.{problem}" for problem in contradictions(recipe.generation))
    if recipe.generation and (names := unknown(recipe.generation)):
        check.append(f"generation.{names[0]}: transformers' generate has no such setting; remove it")
    for key in ("hypernetwork", "prefixes"):
        folder = getattr(recipe, key)
        check(not folder or Path(folder).is_dir(), f"{key}: {folder} is not a folder; train or compress first")
    _format(recipe, check)


def _tuning(recipe: Any, check: _Checks) -> None:
    start, training = recipe.start, recipe.training
    check(start.gists >= 1, f"start.gists: at least 1, not {start.gists}")
    check(start.hidden is None or start.hidden >= 1, f"start.hidden: at least 1, or null, not {start.hidden}")
    if start.kind == "hypernetwork":
        check(bool(start.hypernetwork), "start.hypernetwork: give the folder of a run, or choose another start.kind")
    if start.kind == "prefix":
        check(bool(start.prefix), "start.prefix: give a prefix file or a folder of them, or choose another start.kind")
    check(bool(recipe.model or start.hypernetwork), "model: give the base model, or start.hypernetwork whose base is meant")
    for key, place in (("start.hypernetwork", start.hypernetwork), ("start.prefix", start.prefix)):
        check(not place or Path(place).exists(), f"{key}: {place} does not exist; train or compress first")
    check(0 <= recipe.validation < 1, f"validation: a share below 1, not {recipe.validation}")
    for key in ("episodes", "measure_every", "examples_per_task"):
        check(getattr(recipe, key) >= 1, f"{key}: at least 1, not {getattr(recipe, key)}")
    check(recipe.patience is None or recipe.patience >= 1, f"patience: at least 1, or null, not {recipe.patience}")
    check(recipe.tasks_per_step >= 0, f"tasks_per_step: at least 1, or 0 for all, not {recipe.tasks_per_step}")
    check(recipe.data.shots >= 1, "data.shots: at least 1, the examples that a task is tuned on")
    check.extend(f"passages.{problem}" for problem in recipe.passages.problems())
    check("output_dir" not in training, "training.output_dir: is set by output; remove it")
    check("per_device_train_batch_size" not in training, "training.per_device_train_batch_size: is set by tasks_per_step")
    check(training.get("max_steps", -1) > 0, "training.max_steps: say how many steps at most")
    _format(recipe, check)
    _deepspeed(recipe, check)
    _kernels(recipe.training, check)


def _positions(model: Any) -> int | None:
    """The model's longest sequence, where it can be known without loading anything."""
    if not model.name_or_path:
        return model.architecture.get("max_position_embeddings")
    config = Path(model.name_or_path) / "config.json"
    if not config.is_file():
        return None
    try:
        return read_json(config, "a model's config").get("max_position_embeddings")
    except (UserError, AttributeError):
        return None
