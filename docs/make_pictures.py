"""The pictures of README and docs: reading graphs, benchmarks, and what runs of toy and tuning study left in runs/.

python -m docs.make_pictures
"""

import json
import shutil
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from attention_masks import GistLayout, Segment, picture
from benchmarks.attention import draw as draw_attention
from benchmarks.training_step import draw as draw_step
from eval.toy import draw_results

ASSETS = Path(__file__).parent / "assets"
GRAPHS = {
    "few-shot compression:\nqueries read one context's gists": GistLayout(
        [Segment(8, gists=2), Segment(4, reads=(0,)), Segment(3, reads=(0,))]
    ),
    "recurrent chunks": GistLayout([Segment(5, gists=2), Segment(5, gists=2, reads=(0,)), Segment(5, reads=(0, 1))]),
    "parallel examples": GistLayout([Segment(5, gists=2), Segment(5, gists=2), Segment(5, reads=(0, 1))]),
}
DRAWN = {
    "runs/toy/evaluation/quality.png": "evaluation.png",
    "runs/toy/evaluation/cost.png": "cost.png",
    "runs/tuning/study/starts.png": "starts.png",
}

ATTENTION, SERVING = (Path(f"benchmarks/results/{name}.json") for name in ("attention", "serving"))
STEPS = {name: Path(f"benchmarks/results/training_step{end}.json") for name, end in (("bf16", ""), ("float32", "_float32"))}
# The flow: what is frozen, what is trained or made by what is trained, and text.
FROZEN, TRAINED, TEXT, INK = "#4c78a8", "#f58518", "#f3f4f6", "#333333"
COLOURS = {"prefix": "#2a7f62", "floor + head": "#bbbbbb", "floor": "#bbbbbb"}  # everything else stands for the examples


def _box(axis, corner: tuple[float, float], size: tuple[float, float], colour: str, text: str = "", below: str = "") -> None:
    """A rounded box with text in its middle and a name below it, in the units of the axis."""
    (x, y), (width, height) = corner, size
    light = colour in (TEXT, "white")
    edge = "#d0d4da" if light else "none"
    axis.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.12", facecolor=colour, edgecolor=edge))
    words = {"ha": "center", "fontsize": 9, "linespacing": 1.4}
    axis.text(x + width / 2, y + height / 2, text, va="center", color=INK if light else "white", **words)
    axis.text(x + width / 2, 0.3, below, va="baseline", color=INK, weight="bold", **words)


def draw_flow(path: str | Path) -> None:
    """The idea in one picture: examples, hypernetwork, prefix file, and the frozen base that reads it before every query."""
    figure = Figure(figsize=(9.8, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.05, 13.05), ylim=(-0.05, 3.45), aspect="equal")
    axis.set_axis_off()
    for x, width, title in ((0, 7.2, "once for a task"), (7.4, 5.6, "for every query")):
        ground = {"facecolor": "#fafbfc", "edgecolor": "#e1e4e8"}
        axis.add_patch(FancyBboxPatch((x, 0), width, 3.4, "round,pad=0,rounding_size=0.15", **ground))
        axis.text(x + width / 2, 3.1, title, ha="center", va="center", fontsize=9, color="#777777", style="italic")
    shown = "cat \u2192 cats\ndog \u2192 dogs\nchild \u2192 children\n\u2026"
    _box(axis, (0.2, 0.75), (1.8, 2.0), TEXT, shown, "examples")
    _box(axis, (2.55, 0.75), (2.05, 2.0), "white", below="hypernetwork")
    _box(axis, (2.7, 1.75), (1.75, 0.85), FROZEN, "the base,\nfrozen")
    _box(axis, (2.7, 0.9), (1.75, 0.7), TRAINED, "a small part,\ntrained")
    _box(axis, (5.15, 0.75), (1.8, 2.0), "white", "\n\n\n\nkeys and values\nat every layer", "prefix file")
    _box(axis, (8.45, 1.4), (0.95, 0.7), TEXT, "wolf")
    axis.text(8.6, 0.3, "prefix + query", ha="center", va="baseline", fontsize=9, color=INK, weight="bold")
    _box(axis, (9.85, 1.05), (1.45, 1.4), FROZEN, "the same\nbase,\nfrozen", "base")
    _box(axis, (11.85, 1.4), (0.95, 0.7), TEXT, "wolves", "answer")
    cells = [(5.33 + 0.21 * column, 2.4 - 0.21 * row) for row in range(4) for column in range(7)]
    cells += [(7.8 + 0.21 * column, 1.87 - 0.21 * row) for row in range(3) for column in range(3)]
    for i, cell in enumerate(cells):
        axis.add_patch(Rectangle(cell, 0.17, 0.17, color=TRAINED, alpha=0.5 + 0.05 * (7 * i * i % 11)))
    for start, end in ((2.0, 2.55), (4.6, 5.15), (6.95, 7.72), (9.4, 9.85), (11.3, 11.85)):
        head = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11}
        axis.annotate("", (end, 1.75), (start, 1.75), arrowprops=head)
    figure.savefig(path, dpi=150)


def draw_serving(figures: dict, path: str | Path) -> None:
    """What `benchmarks.serving` found: new tokens a second of each way, and what each keeps of a task."""
    sizes = figures["sizes"]
    labels = {
        "prefix": f"soft prefix of {sizes['gists']} gists (ours)",
        "floor + head": f"a text of {sizes['gists']} tokens, cached,\nour output head: the least work",
        "cached prompt + head": f"all {sizes['context']:,} tokens cached,\nour output head",
        "floor": f"a text of {sizes['gists']} tokens, cached,\nstock transformers",
        "cached prompt": f"all {sizes['context']:,} tokens cached,\nstock transformers",
        "whole prompt": f"all {sizes['context']:,} tokens in every prompt,\nstock transformers",
    }
    names, states = list(reversed(labels)), figures["state_bytes_a_task"]
    panels = {
        "New tokens per second (higher is better)": [figures["tokens_per_second"][name] for name in names],
        "Kept of the task, KiB (lower is better)": [states[name] / 2**10 if name in states else None for name in names],
    }
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for axis, (title, values) in zip(axes, panels.items()):
        axis.barh(
            [labels[name] for name in names],
            [value or 0 for value in values],
            color=[COLOURS.get(name, "#c8703a") for name in names],
        )
        top = max(value or 0 for value in values)
        for i, value in enumerate(values):
            axis.text((value or 0) + top * 0.015, i, "nothing" if value is None else f"{value:,.0f}", va="center", fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, top * 1.18)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    where = figures["machine"]["gpu"] or f"a CPU (threads: {figures['machine']['threads']})"
    figure.suptitle(
        f"{sizes['rows']} queries about one task of {sizes['context']:,} tokens, {sizes['new']} new tokens each: "
        f"a Llama of {sizes['layers']} layers, {figures['dtype']}, on {where}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    ASSETS.mkdir(exist_ok=True)
    draw_flow(ASSETS / "flow.png")
    picture(GRAPHS, ASSETS / "masks.png")
    results = Path("runs/toy/results.json")
    if results.is_file():
        draw_results(json.loads(results.read_text()), ASSETS / "toy.png")
    if ATTENTION.is_file():
        draw_attention(json.loads(ATTENTION.read_text()), ASSETS / "attention.png")
    steps = {name: file for name, file in STEPS.items() if file.is_file()}
    if steps:
        draw_step({name: json.loads(file.read_text()) for name, file in steps.items()}, ASSETS / "training_step.png")
    if SERVING.is_file():
        draw_serving(json.loads(SERVING.read_text()), ASSETS / "serving.png")
    for source, name in DRAWN.items():
        if Path(source).is_file():
            shutil.copy(source, ASSETS / name)
