"""The picture of what an instruction's length costs, from the results of recipes/study/hint-lengths.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eval.flops import amortised

INPUTS = (10, 100)  # that share a task's instruction
PROMPT, CACHED, HINT, UNFUSED = "#4c78a8", "#72b7b2", "#f58518", "#b5531c"
QUALITY = {
    "full_context": ("instruction in the prompt, cached or not", PROMPT, "X-"),
    "prefix": ("HINT", HINT, "o-"),
    "shuffled_instruction": ("HINT of its shuffled words", "#8c8c8c", "^-"),
    "swapped_prefix": ("HINT of another task's", "#bab0ac", "v-"),
    "no_context": ("no instruction", "#444444", ".:"),
}


def draw_lengths(results: dict[str, Any], path: str | Path, without_fusion: dict[str, Any] | None = None) -> None:
    """What an input costs and how good its answer is, over lengths, and one against the other for the longest.

    `results` are a table's, of one row and seed: cells with "prefix" and the controls are of different lengths, those with
    "cut_context" of the longest instruction, cut to a budget. `without_fusion`, the same table of another HINT, adds a line.
    """
    methods = [cell["methods"] for cell in results["cells"]]
    whole = _by_length(methods)
    cut = sorted((m["cut_context"] for m in methods if "cut_context" in m), key=lambda entry: entry["context_tokens"])
    lengths = [m["prefix"]["context_tokens"] for m in whole]
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    cost, quality, both = figure.subplots(1, 3)
    _costs(cost, lengths, [m["full_context"] for m in whole], [m["prefix"] for m in whole])
    for name, (label, colour, form) in QUALITY.items():
        _points(quality, lengths, [m[name] for m in whole], color=colour, fmt=form, label=label)
    if without_fusion:
        unfused = [m["prefix"] for m in _by_length([cell["methods"] for cell in without_fusion["cells"]])]
        at = [entry["context_tokens"] for entry in unfused]
        cost.plot(at, [e["query_flops"] for e in unfused], "D-", color=UNFUSED, label="HINT without fusion, made already")
        _points(quality, at, unfused, color=UNFUSED, fmt="D-", label="HINT without fusion, trained longer")
    quality.set(title="Quality", xlabel="tokens of the instruction", ylabel="accuracy on unseen tasks (%)", ylim=(-3, 105))
    for axis in (cost, quality):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n:.0f}" for n in lengths])
    _quality_against_cost(both, [*cut, whole[-1]["full_context"]], whole[-1]["prefix"])
    for axis in (cost, quality, both):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    title = "The instruction of a task becomes a module, or stands in the prompt; 95 % intervals by bootstrap over tasks"
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _by_length(methods: list[dict]) -> list[dict]:
    return sorted((m for m in methods if "prefix" in m), key=lambda m: m["prefix"]["context_tokens"])


def _costs(axis, lengths: list[float], prompts: list[dict], modules: list[dict]) -> None:
    axis.plot(lengths, [entry["reread_flops"] for entry in prompts], "X-", color=PROMPT, label="instruction in every prompt")
    for n, line in zip(INPUTS, ("--", ":")):
        axis.plot(lengths, [_flops(e, n) for e in modules], f"o{line}", color=HINT, label=f"HINT, {n} inputs a task")
        axis.plot(lengths, [_flops(e, n) for e in prompts], f"s{line}", color=CACHED, label=f"cached prompt, {n} inputs a task")
    axis.plot(lengths, [e["query_flops"] for e in modules], "o-", color=HINT, label="HINT, its module made already")
    axis.plot(lengths, [e["query_flops"] for e in prompts], "s-", color=CACHED, label="cached prompt, in the cache already")
    axis.set(title="Cost of an input", xlabel="tokens of the instruction", ylabel="FLOPs per input", yscale="log")
    axis.set_ylim(top=100 * max(entry["reread_flops"] for entry in prompts))  # room for the legend


def _quality_against_cost(axis, read: list[dict], module: dict) -> None:
    """`read`: the prompt by how much of it is read with every input, the whole last."""
    whole, at = read[-1], [entry["reread_flops"] for entry in read]
    _points(axis, at, read, color=PROMPT, fmt="X-", label="the first so many tokens in every prompt")
    for x, entry in zip(at, read):
        _note(axis, x, entry, f"{entry['context_tokens']:.0f}", (-24 if entry is whole else 4, -11), PROMPT)
    for entry, label, colour, form, below in ((module, "HINT", HINT, "o", -14), (whole, "cached prompt", CACHED, "s", 8)):
        at = [_flops(entry, n) for n in (1, *INPUTS)]
        _points(axis, at, [entry] * len(at), color=colour, fmt=form, label=f"{label}; beside it: inputs a task")
        for x, n in zip(at, (1, *INPUTS)):
            _note(axis, x, entry, f"{n}", (-4, below), colour)
    title = f"Quality against cost, instructions of {whole['context_tokens']:.0f} tokens"
    axis.set(title=title, xlabel="FLOPs per input", ylabel="accuracy on unseen tasks (%)", xscale="log", ylim=(-3, 112))


def _flops(entry: dict[str, float], inputs: int) -> float:
    return amortised(entry["encode_flops"], entry["query_flops"], inputs)


def _points(axis, at: list[float], entries: list[dict[str, float]], **style) -> None:
    means, low, high = ([100 * entry[key] for entry in entries] for key in ("mean", "low", "high"))
    errors = [[max(0, m - x) for m, x in zip(means, low)], [max(0, x - m) for m, x in zip(means, high)]]
    axis.errorbar(at, means, yerr=errors, capsize=2, **style)


def _note(axis, x: float, entry: dict[str, float], text: str, offset: tuple[int, int], colour: str) -> None:
    axis.annotate(text, (x, 100 * entry["mean"]), offset, textcoords="offset points", fontsize=8, color=colour)
