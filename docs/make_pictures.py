"""The pictures of README and docs: reading graphs, benchmarks, and what runs of quickstart and tuning study left in runs/.

python -m docs.make_pictures
"""

import json
import shutil
from pathlib import Path

from matplotlib.figure import Figure

from attention_masks import GistLayout, Segment, picture
from benchmarks.attention import draw as draw_attention
from benchmarks.training_step import draw as draw_step
from eval.quickstart import draw_results

ASSETS = Path(__file__).parent / "assets"
GRAPHS = {
    "few-shot compression:\nqueries read one context's gists": GistLayout(
        [Segment(8, gists=2), Segment(4, reads=(0,)), Segment(3, reads=(0,))]
    ),
    "recurrent chunks": GistLayout([Segment(5, gists=2), Segment(5, gists=2, reads=(0,)), Segment(5, reads=(0, 1))]),
    "parallel examples": GistLayout([Segment(5, gists=2), Segment(5, gists=2), Segment(5, reads=(0, 1))]),
}
DRAWN = {
    "runs/quickstart/evaluation/quality.png": "evaluation.png",
    "runs/quickstart/evaluation/cost.png": "cost.png",
    "runs/tuning/study/starts.png": "starts.png",
}

ATTENTION, SERVING = (Path(f"benchmarks/results/{name}.json") for name in ("attention", "serving"))
STEPS = {name: Path(f"benchmarks/results/training_step{end}.json") for name, end in (("bf16", ""), ("float32", "_float32"))}
COLOURS = {"prefix": "#2a7f62", "floor + head": "#bbbbbb", "floor": "#bbbbbb"}  # everything else stands for the examples


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
    picture(GRAPHS, ASSETS / "masks.png")
    results = Path("runs/quickstart/results.json")
    if results.is_file():
        draw_results(json.loads(results.read_text()), ASSETS / "quickstart.png")
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
