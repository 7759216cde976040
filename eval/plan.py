"""A plan of what training a recipe costs: memory by part and by setting of DeepSpeed, FLOPs, hours.

It is made from the base's config and the model's own code, without weights or a GPU (`eval.tracing`). It assumes that
communication takes no time and that the data loader keeps up; `utilisation` stands for both.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from eval.memory import Parameters
from eval.sizing import (
    FREE,
    Hardware,
    Row,
    Steps,
    bare_model,
    base_config,
    batches_of,
    check_precision,
    checkpointing,
    largest_episode,
    memory,
    trains_all,
    whole,
)
from hyperllama.base.outline import outline
from hyperllama.data.packing import GistBatch
from hyperllama.data.text import EncodedEpisode
from hyperllama.errors import UserError
from hyperllama.objectives.packed_model import PackedModel
from hyperllama.recipe.schema import Recipe

TWO_STATES = ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused")


def plan(
    recipe: Recipe,
    hardware: Hardware,
    encoded: Sequence[EncodedEpisode] = (),
    *,
    vocabulary: int | None = None,
    examples: int | None = None,
) -> list[str]:
    """The plan of a training run, as lines of text.

    `encoded` are episodes as training draws them; without any, tokens are bounded by the recipe's limits. `vocabulary` is the
    size of a tokenizer that is trained for the run, `examples` that of the data, which says how long epochs are.
    UserError for values that no run would take, and bases whose costs are not known.
    """
    check_precision(recipe)
    config = base_config(recipe, vocabulary)
    size, model = whole(recipe, "per_device_train_batch_size", 8), bare_model(recipe, config)
    counts, whole_base = Parameters.of(model), sum(p.numel() for p in outline(config).parameters())
    episodes = [episode for episode in encoded if episode.queries] or [largest_episode(recipe)]
    batches = list(batches_of(recipe, episodes, size))
    steps = Steps(recipe, config)
    rows = list(memory(steps, batches, hardware))
    largest = max(batches, key=lambda batch: batch.tokens)
    context = largest.layout.compress_rows if recipe.method == "hypernetwork" else 0
    drawn = any(episode.queries for episode in encoded)
    origin = f"the largest of {len(batches)} drawn from the data" if drawn else _bound(recipe)
    lines = [
        f"plan: {hardware.nodes} x {hardware.gpus} {hardware.gpu.name}, each {_gb(hardware.gpu.memory)} GB "
        f"({hardware.gpu.memory / 2**30:.1f} GiB) and {hardware.gpu.peak / 1e12:,.0f} TFLOP/s dense in bf16",
        "",
        f"base            {recipe.model.name_or_path or 'initialised at random'}: {config.model_type}, "
        f"{config.num_hidden_layers} layers, {whole_base:,} parameters",
        f"parameters      {counts.frozen:,} frozen, {counts.trained:,} trained: {_parts(model)}",
        f"numbers         {_numbers(recipe)}",
        f"one batch       {size} episodes a GPU, {largest.tokens:,} tokens ({context:,} of contexts with gists), "
        f"{len(largest.targets):,} targets:",
        f"                {origin}",
        "",
        *_table(rows, hardware),
        "",
        *_choice(recipe, config, episodes, rows, hardware),
        *_notes(recipe, hardware, whole_base),
        "",
        *_time(steps, batches, hardware, examples),
    ]
    return lines


def _parts(model: PackedModel) -> str:
    """What the trained parameters are parts of, by the names that the model has for them."""
    counted: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = "lora" if ".lora_" in name else name.split(".")[0]
        counted[part] += parameter.numel() if parameter.requires_grad else 0
    return ", ".join(f"{count:,} of {part}" for part, count in counted.items() if count)


def _numbers(recipe: Recipe) -> str:
    model, training = recipe.model, recipe.training
    kept = f"base in {model.dtype}" + (", its decoder's linear layers in 4 bits (nf4)" if model.quantize else "")
    half = "bf16" if training.get("bf16") else "fp16" if training.get("fp16") else None
    computed = f"; autocast to {half}, with DeepSpeed all weights cast to it" if half else ""
    saved = ", activations run again (checkpointing)" if checkpointing(training) else ", no checkpointing of activations"
    return kept + computed + saved


def _bound(recipe: Recipe) -> str:
    texts = any(part.source == "text" for part in recipe.data.parts)
    return (
        f"an upper bound, from limits and data.queries{', and data.text' if texts else ''}, "
        f"with answers of {recipe.format.answer_tokens} tokens (format.answer_tokens)"
    )


def _table(rows: Sequence[Row], hardware: Hardware) -> list[str]:
    cells = [("", "weights", "gradients", "optimiser", "buffers", "activations", "beside", "peak", "", "host")]
    for row in rows:
        states, step = row.states, row.step
        parts = (states.weights, states.gradients, states.optimiser, states.buffers, step.kept, step.peak - step.kept)
        fits = "fits" if row.total <= hardware.usable else "no"
        host = _gb(states.host) if states.host else "-"
        cells.append((str(row.zero), *map(_gb, (*parts, row.total)), fits, host))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        f"memory of one GPU in GB (10^9 bytes); {FREE:.0%} are to stay free, so {_gb(hardware.usable)} GB may be filled.",
        "Activations are kept from forward to backward; beside them stands what is there for a moment only, at the worst one.",
        "Host is the memory of a node that offloading takes.",
        "",
        *(
            "  " + "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in cells
        ),
    ]


def _choice(
    recipe: Recipe,
    config: Any,
    episodes: Sequence[EncodedEpisode],
    rows: Sequence[Row],
    hardware: Hardware,
) -> list[str]:
    """The first setting that fits, or what would make one fit."""
    best = _first(rows, hardware)
    lines = []
    if best is not None:
        override = f"deepspeed={best.zero.name or 'null'}"
        lines.append(
            f"The cheapest setting that fits is {best.zero}: {_gb(best.total)} of {_gb(hardware.usable)} GB; type {override}"
        )
    else:
        least = min(rows, key=lambda row: row.total)
        lines.append(
            f"Nothing fits: the smallest, {least.zero}, needs {_gb(least.total)} GB, {_gb(least.total - hardware.usable)} GB "
            f"more than the {_gb(hardware.usable)} GB of one GPU that may be filled"
        )
        changes = _changes(recipe)
        tried = [[change] for change in changes] + ([list(changes)] if len(changes) > 1 else [])
        for names in tried:
            changed = recipe
            for name in names:
                changed = changes[name](changed)
            batches = list(batches_of(changed, episodes, whole(changed, "per_device_train_batch_size", 8)))
            after = []  # until one fits: tracing takes its time
            for row in memory(Steps(changed, config), batches, hardware):
                after.append(row)
                if row.total <= hardware.usable:
                    what = f"fits, with deepspeed={row.zero.name or 'null'}"
                    break
            else:
                smallest = min(after, key=lambda row: row.total)
                what = f"{smallest.zero}: {_gb(smallest.total)} GB, no"
            lines.append(f"  with {' '.join(names)}: {what}")
    own = recipe.deepspeed
    if own is not None:
        row = next((row for row in rows if row.zero.name == own), None)
        if row is None:
            lines.append(f"The recipe's own setting, deepspeed={own}, is none of those above and not counted")
        elif best is None or row.zero != best.zero:
            fits = "fits too" if row.total <= hardware.usable else "does not fit"
            lines.append(f"The recipe's own setting, deepspeed={own}, {fits}")
    return lines


def _first(rows: Sequence[Row], hardware: Hardware) -> Row | None:
    return next((row for row in rows if row.total <= hardware.usable), None)


def _changes(recipe: Recipe) -> dict[str, Any]:
    """What takes less memory than the recipe as it is: what to type, and the recipe with it."""

    def training(**settings):
        return lambda one: dataclasses.replace(one, training={**one.training, **settings})

    def model(**settings):
        return lambda one: dataclasses.replace(one, model=dataclasses.replace(one.model, **settings))

    found = {}
    if not checkpointing(recipe.training):
        found["training.gradient_checkpointing=true"] = training(gradient_checkpointing=True)
    if whole(recipe, "per_device_train_batch_size", 8) > 1:
        found["training.per_device_train_batch_size=1"] = training(per_device_train_batch_size=1)
    if not recipe.training.get("bf16") and not recipe.training.get("fp16"):
        found["training.bf16=true"] = training(bf16=True)
    if not trains_all(recipe):
        if recipe.model.dtype == "float32":
            found["model.dtype=bfloat16"] = model(dtype="bfloat16")
        if not recipe.model.quantize and recipe.method == "hypernetwork":
            found["model.quantize=nf4"] = model(quantize="nf4")
    return found


def _notes(recipe: Recipe, hardware: Hardware, parameters: int) -> list[str]:
    training, lines = recipe.training, []
    optimiser = str(training.get("optim", "adamw_torch_fused"))
    if optimiser not in TWO_STATES:
        lines.append(f"training.optim={optimiser} is counted as AdamW: two states for each trained parameter")
    if recipe.model.quantize:
        lines.append("ZeRO-3 is left out: a process loads all of a base in 4 bits before it is cut")
    if not training.get("bf16") and not training.get("fp16") and recipe.model.dtype == "float32":
        lines.append("float32 is far slower than bf16 on a GPU: set training.bf16=true, or expect many times the hours below")
    bytes_read = parameters * (2 if recipe.model.dtype == "bfloat16" else 4) * hardware.gpus
    lines.append(
        f"While it loads, without ZeRO-3, each process may hold the whole base: {_gb(bytes_read)} GB of host memory a node"
    )
    return lines


def _time(steps: Steps, batches: Sequence[GistBatch], hardware: Hardware, examples: int | None) -> list[str]:
    """Tokens, FLOPs and hours. FLOPs of all that is computed, checkpointing's second forward pass included.

    They are those of the batch whose size is nearest to the mean, by its tokens.
    """
    mean = sum(batch.tokens for batch in batches) / len(batches)
    typical = min(batches, key=lambda batch: abs(batch.tokens - mean))
    recipe = steps.recipe
    step = steps.of(typical, deepspeed=trains_all(recipe))  # whichever has been traced: products are the same
    accumulation = whole(recipe, "gradient_accumulation_steps", 1)
    # Ranks draw batches of their own; the mean of those that were packed stands for all of them.
    tokens = mean * accumulation * hardware.world
    parts = {name: getattr(step, name) * tokens / typical.tokens for name in ("forward", "backward", "again", "total")}
    seconds = parts["total"] / hardware.world / (hardware.gpu.peak * hardware.utilisation)
    shown = ", ".join(f"{label} {_flops(parts[name])}" for name, label in (("forward", "forward"), ("backward", "backward")))
    again = f", forward again {_flops(parts['again'])}" if parts["again"] else ""
    size = whole(recipe, "per_device_train_batch_size", 8) * accumulation
    lines = [
        f"one step        {size * hardware.world:,} episodes ({size} a GPU), {tokens:,.0f} tokens, "
        f"{_flops(parts['total'])} FLOPs ({shown}{again})"
    ]
    count, why = recipe.training.get("max_steps", -1), "training.max_steps"
    if not isinstance(count, int) or isinstance(count, bool):
        raise UserError(f"training.max_steps: a whole number, not {count!r}")
    if count <= 0 and examples:
        epochs = recipe.training.get("num_train_epochs", 3)
        count = math.ceil(epochs * max(1, examples // recipe.data.queries) / (size * hardware.world))
        why = f"{epochs:g} epochs of {examples:,} examples"
    if count <= 0:
        count, why = 1000, "an example: how many there are is not known without training.max_steps"
    hours = count * seconds / 3600
    lines += [
        f"steps           {count:,} ({why}), {count * tokens:,.0f} tokens, {_flops(count * parts['total'])} FLOPs",
        f"time            {_hours(hours)}, {hours * hardware.world:,.2f} GPU-hours, at {hardware.utilisation:.0%} of the peak "
        f"({_seconds(seconds)} a step); communication is not counted",
    ]
    return lines


def _gb(count: float) -> str:
    return f"{count / 1e9:,.2f}"


def _flops(count: float) -> str:
    exponent = max(0, int(math.log10(count)) // 3 * 3) if count else 0
    return f"{count / 10**exponent:.3g}e{exponent}"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.1f} seconds"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.2f} ms"
