"""The study's page: docs/study.md, from result files in docs/study and the words beside them. No figure is typed by hand.

python -m docs.make_study      takes over what runs/study holds, and writes the page
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eval.flops import amortised
from eval.tables import RESULTS, markdown

HERE = Path(__file__).parent
FOLDER, PAGE = HERE / "study", HERE / "study.md"
# The order of the page: what a reader asks first.
TABLES = (
    "text-gists",
    "text-objectives",
    "text-kinds",
    "text-recurrent",
    "hard-gists",
    "hard-elastic",
    "hard-objectives",
    "hard-kinds",
    "hard-graphs",
    "hint-lengths",
    "hint-ablations",
    "hint-demonstrations",
    "hint-sni",
    "hint-symbols",
)
INPUTS = (10, 100)  # that share a task's instruction, in the picture of its length


def page() -> str:
    """The page as it should be, from the files in docs/study: NAME.json are results, NAME.md what they say."""
    parts = [(FOLDER / "intro.md").read_text(encoding="utf-8").rstrip()]
    for name in TABLES:
        file, words = FOLDER / f"{name}.json", FOLDER / f"{name}.md"
        if not file.is_file():
            continue
        results = json.loads(file.read_text(encoding="utf-8"))
        parts += [f"## {results['question']}", f"`hyperllama study recipes/study/{name}.yaml`"]
        if words.is_file():
            parts.append(words.read_text(encoding="utf-8").rstrip())
        if (FOLDER / f"{name}.png").is_file():
            parts.append(f"![{results['question']}](study/{name}.png)")
        parts.append(markdown(results).rstrip())
        minutes = sum(cell["minutes"] for cell in {(c["row"], c["seed"]): c for c in results["cells"]}.values())
        parts.append(f"Training took {minutes:,.0f} minutes in all.")
    return "\n\n".join(parts) + "\n"


def take_over(runs: Path) -> None:
    """Copy the results of finished tables from a folder of runs."""
    for name in TABLES:
        if (runs / name / RESULTS).is_file():
            shutil.copy(runs / name / RESULTS, FOLDER / f"{name}.json")


def draw_lengths(results: dict[str, Any], path: str | Path) -> None:
    """The table over lengths of instructions: what an input costs, how good its answer is, and one against the other."""
    cells = sorted(results["cells"], key=lambda cell: cell["budget"])
    whole = sorted(
        (c["methods"] for c in cells if "prefix" in c["methods"]), key=lambda methods: methods["prefix"]["context_tokens"]
    )
    cut = [c["methods"]["cut_context"] for c in cells if "cut_context" in c["methods"]]
    lengths = [methods["prefix"]["context_tokens"] for methods in whole]
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    cost, quality, both = figure.subplots(1, 3)
    prompt, cached, hint = "#4c78a8", "#72b7b2", "#f58518"

    def flops(entry: dict[str, float], inputs: float) -> float:
        return amortised(entry["encode_flops"], entry["query_flops"], inputs)

    def points(axis, at: list[float], entries: list[dict[str, float]], **style) -> None:
        means, low, high = ([100 * entry[key] for entry in entries] for key in ("mean", "low", "high"))
        errors = [[max(0, m - x) for m, x in zip(means, low)], [max(0, x - m) for m, x in zip(means, high)]]
        axis.errorbar(at, means, yerr=errors, capsize=2, **style)

    prompts, modules = [m["full_context"] for m in whole], [m["prefix"] for m in whole]
    cost.plot(lengths, [m["reread_flops"] for m in prompts], "X-", color=prompt, label="instruction in every prompt")
    for n, line in zip(INPUTS, ("--", ":")):
        cost.plot(lengths, [flops(m, n) for m in modules], f"o{line}", color=hint, label=f"HINT, {n} inputs a task")
        cost.plot(lengths, [flops(m, n) for m in prompts], f"s{line}", color=cached, label=f"cached prompt, {n} inputs a task")
    cost.plot(lengths, [m["query_flops"] for m in modules], "o-", color=hint, label="HINT, its module made already")
    cost.plot(lengths, [m["query_flops"] for m in prompts], "s-", color=cached, label="cached prompt, in the cache already")
    cost.set(title="Cost of an input", xlabel="tokens of the instruction", ylabel="FLOPs per input", yscale="log")
    controls = {
        "full_context": ("instruction in the prompt, cached or not", prompt, "X-"),
        "prefix": ("HINT", hint, "o-"),
        "shuffled_instruction": ("HINT of its shuffled words", "#8c8c8c", "^-"),
        "swapped_prefix": ("HINT of another task's", "#bab0ac", "v-"),
        "no_context": ("no instruction", "#444444", ".:"),
    }
    for name, (label, colour, form) in controls.items():
        points(quality, lengths, [m[name] for m in whole], color=colour, fmt=form, label=label)
    quality.set(title="Quality", xlabel="tokens of the instruction", ylabel="accuracy on unseen tasks (%)", ylim=(-3, 105))
    for axis in (cost, quality):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n:.0f}" for n in lengths])
    longest = whole[-1]
    entries = [*cut, longest["full_context"]]
    points(
        both,
        [e["reread_flops"] for e in entries],
        entries,
        color=prompt,
        fmt="X-",
        label="the first so many tokens in every prompt",
    )
    for entry in entries:
        both.annotate(
            f"{entry['context_tokens']:.0f}", (entry["reread_flops"], 100 * entry["mean"]), (4, -11),
            textcoords="offset points", fontsize=8, color=prompt,
        )  # fmt: skip
    for entry, label, colour, marker, below in (
        (longest["prefix"], "HINT", hint, "o", -14),
        (longest["full_context"], "cached prompt", cached, "s", 8),
    ):
        at = [flops(entry, n) for n in (1, *INPUTS)]
        points(both, at, [entry] * len(at), color=colour, fmt=marker, label=f"{label}; beside it: inputs a task")
        for x, n in zip(at, (1, *INPUTS)):
            both.annotate(f"{n}", (x, 100 * entry["mean"]), (-4, below), textcoords="offset points", fontsize=8, color=colour)
    both.set(
        title=f"Quality against cost, instructions of {lengths[-1]:.0f} tokens", xlabel="FLOPs per input", xscale="log",
        ylabel="accuracy on unseen tasks (%)", ylim=(-3, 112),
    )  # fmt: skip
    figure.suptitle(
        "The instruction of a task becomes a module, or stands in the prompt; 95 % intervals by bootstrap over tasks"
    )
    for axis in (cost, quality, both):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    take_over(Path("runs/study"))
    lengths = FOLDER / "hint-lengths.json"
    if lengths.is_file():
        draw_lengths(json.loads(lengths.read_text(encoding="utf-8")), lengths.with_suffix(".png"))
    PAGE.write_text(page(), encoding="utf-8")
