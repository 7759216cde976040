"""`hyperllama study`: from where should prefix tuning start? Every start, number of examples and seed, on the same tasks.

Leaves in `output`: a tuning run for each combination (so it goes on where it stopped), tasks.jsonl.gz (the curve of every
task, from which the rest can be made again), summary.json, report.md, starts.png.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.intervals import Bootstrap
from hyperllama.commands.tune import full_attention, tune
from hyperllama.errors import UserError
from hyperllama.files import read_json, whole_json_lines, write_atomically, write_zipped_lines, zipped_lines
from hyperllama.recipe.loading import load_recipe
from hyperllama.recipe.schema import StudyRecipe, TuneRecipe
from hyperllama.runs import owned
from hyperllama.tuning.curves import CURVES

COLOURS = ("#f58518", "#4c78a8", "#72b7b2", "#b279a2", "#9d755d", "#54a24b", "#bab0ac")
FULL, TASKS, TOLERANCE = "full_attention.json", "tasks.jsonl.gz", 0.01
METRICS = {  # what a study reports: the first that all of its tasks have
    "test_accuracy": "accuracy on unseen inputs",
    "test_exact": "the share of unseen inputs whose whole answer is the likeliest, token by token",
    "test_loss": "loss on unseen inputs, nats per target token, lower is better",
}

Runs = dict[tuple[str, int, int], list[dict]]  # of a start, a size and a seed: lines with step, task and figures
Levels = dict[tuple[int, int], dict[str, dict]]  # of a size and a seed: figures of full attention for each task


def study(recipe_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Run what is left of a study and write its report; returns the report."""
    recipe = load_recipe(recipe_path, overrides, schema=StudyRecipe)
    folder = Path(recipe.output)
    planned = {
        (start, size, seed): _changes(folder, start, size, seed)
        for seed in recipe.seeds
        for size in recipe.sizes
        for start in recipe.starts
    }
    for changes in planned.values():
        load_recipe(recipe.tune, changes, schema=TuneRecipe)  # a wrong start is told of now, not hours later
    with owned(folder):
        return _study(recipe, planned)


def _study(recipe: StudyRecipe, planned: dict[tuple[str, int, int], list[str]]) -> str:
    folder = Path(recipe.output)
    runs: Runs = {}
    full: Levels = {}
    for (start, size, seed), changes in planned.items():
        tune(recipe.tune, changes)
        place = _place(folder, start, size, seed)
        runs[start, size, seed] = whole_json_lines(place / CURVES)
        if (size, seed) not in full:
            path = place / FULL
            if not path.is_file():
                write_atomically(path, json.dumps(full_attention(recipe.tune, changes)))
            full[size, seed] = read_json(path, "the level of full attention")
    keep(folder / TASKS, runs, full)
    summary = summarise(runs, full, recipe)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    report = "\n".join(_markdown(summary)) + "\n"
    write_atomically(folder / "report.md", report)
    draw(summary, folder / "starts.png")
    return report


def _place(folder: Path, start: str, size: int, seed: int) -> Path:
    return folder / f"{start.replace(':', '-').replace(',', '-')}_{size}_{seed}"


def _changes(folder: Path, start: str, size: int, seed: int) -> list[str]:
    """What a combination changes about the tuning recipe."""
    kind, _, more = start.partition(":")
    changes = [f"start.kind={kind}", f"data.shots={size}", f"seed={seed}", f"output={_place(folder, start, size, seed)}"]
    return changes + [change for change in more.split(",") if change]


def metric_of(runs: Runs, full: Levels) -> str:
    """The figure that all lines have; UserError if there is none."""
    measured = [line for lines in runs.values() for line in lines] + [t for tasks in full.values() for t in tasks.values()]
    for metric in METRICS:
        if all(metric in line for line in measured):
            return metric
    raise UserError("a study needs test examples in every task; raise data.queries in the tuning recipe")


def keep(path: Path, runs: Runs, full: Levels) -> None:
    """Write a line for each task of each run: its steps, its values, and the level of full attention."""
    metric = metric_of(runs, full)
    kept = [{"metric": metric}]
    for (start, size, seed), lines in runs.items():
        for task, figures in full[size, seed].items():
            at = {line["step"]: round(line[metric], 5) for line in lines if line["task"] == task}
            about = {"start": start, "size": size, "seed": seed, "task": task, "full_attention": round(figures[metric], 5)}
            kept.append({**about, "steps": list(at), "values": list(at.values())})
    write_zipped_lines(path, kept)


def read_kept(path: Path) -> tuple[Runs, Levels, StudyRecipe]:
    """What `summarise` needs, from a file that `keep` wrote."""
    head, *kept = zipped_lines(path)
    runs, full = defaultdict(list), defaultdict(dict)
    for line in kept:
        start, size, seed, task = (line[key] for key in ("start", "size", "seed", "task"))
        at = zip(line["steps"], line["values"], strict=True)
        runs[start, size, seed] += [{"step": step, "task": task, head["metric"]: value} for step, value in at]
        full[size, seed][task] = {head["metric"]: line["full_attention"]}
    starts, sizes, seeds = (list(dict.fromkeys(line[key] for line in kept)) for key in ("start", "size", "seed"))
    return dict(runs), dict(full), StudyRecipe(starts=starts, sizes=sizes, seeds=seeds)


def summarise(runs: Runs, full: Levels, recipe: StudyRecipe) -> dict[str, Any]:
    """Curves and figures for each number of examples and start, with intervals over all tasks of all seeds.

    For each: quality at the start and the end, the mean over the curve (area), and the first step at which the mean over tasks
    comes within one point (a hundredth, for a loss too) of full attention over the same examples; null if it never does. The
    interval of that step is the bootstrap's too, each resample with its own means.
    """
    metric = metric_of(runs, full)
    sign = -1 if metric == "test_loss" else 1
    found: dict[str, Any] = {"metric": metric, "sizes": {}}
    for size in recipe.sizes:
        levels = [task[metric] for seed in recipe.seeds for task in full[size, seed].values()]
        bootstrap = Bootstrap(np.ones(len(levels)), resamples=recipe.resamples)
        entry: dict[str, Any] = {"full_attention": vars(bootstrap.mean(levels)), "tasks": len(levels), "starts": {}}
        ends = {}
        for start in recipe.starts:
            steps, curves = _curves([(runs[start, size, seed], list(full[size, seed])) for seed in recipe.seeds], metric)
            # Row 0 is the tasks as they are, the others are resamples.
            counts = np.vstack([np.ones(len(levels)), bootstrap.counts])
            reached = sign * (counts @ (curves - np.asarray(levels)[:, None])) / len(levels) >= -TOLERANCE - 1e-9
            ends[start] = curves[:, -1]
            entry["starts"][start] = {
                "steps": steps,
                "curve": [vars(bootstrap.mean(column)) for column in curves.T],
                "start": vars(bootstrap.mean(curves[:, 0])),
                "end": vars(bootstrap.mean(curves[:, -1])),
                "area": vars(bootstrap.mean(curves.mean(1))),
                "steps_to_full_attention": _first(steps, reached),
            }
        for start in recipe.starts:
            first = recipe.starts[0]
            entry["starts"][start]["end_minus_first"] = vars(bootstrap.difference(ends[start], ends[first]))
        found["sizes"][str(size)] = entry
    found["examples_to_target"] = _examples(found, sign)
    return found


def _first(steps: Sequence[int], reached: np.ndarray) -> dict[str, int | None]:
    """The first step of each row of `reached` (1 + resamples, steps): that of row 0, and an interval; None for never."""
    first = np.where(reached.any(1), np.asarray(steps)[reached.argmax(1)], np.inf)
    low, high = np.percentile(first[1:], [2.5, 97.5], method="nearest")
    named = {"mean": first[0], "low": low, "high": high}
    return {name: int(step) if np.isfinite(step) else None for name, step in named.items()}


def _curves(runs: Sequence[tuple[list[dict], list[str]]], metric: str) -> tuple[list[int], np.ndarray]:
    """Steps, and a row of values for each task of each run, by name; a run that stopped early keeps its last value."""
    steps = sorted({line["step"] for lines, _ in runs for line in lines})
    rows = []
    for lines, names in runs:
        tasks = defaultdict(dict)
        for line in lines:
            tasks[line["task"]][line["step"]] = line[metric]
        for values in (tasks[name] for name in names):
            row, last = [], None
            for step in steps:
                last = values.get(step, last)
                row.append(last)
            rows.append(row)
    return steps, np.asarray(rows, dtype=float)


def _examples(found: dict, sign: int) -> dict[str, dict]:
    """The fewest examples with which each start ends at the level of full attention over the most examples."""
    sizes = sorted(map(int, found["sizes"]))
    target = found["sizes"][str(sizes[-1])]["full_attention"]["mean"]
    reached = {}
    for start in found["sizes"][str(sizes[0])]["starts"]:
        enough = [
            s for s in sizes if sign * found["sizes"][str(s)]["starts"][start]["end"]["mean"] >= sign * target - TOLERANCE
        ]
        reached[start] = enough[0] if enough else None
    return {"target": target, "examples": reached}


def _markdown(summary: dict):
    share = summary["metric"] != "test_loss"
    what = METRICS[summary["metric"]]
    yield "# From where should prefix tuning start?\n"
    yield (
        f"Quality is {what}; 95 % intervals by bootstrap over tasks. Every start sees the same tasks, examples and steps. "
        "Shots are `data.shots`: the examples of a task, or of each of its classes where the source says so.\n"
    )
    yield "![Quality over steps, a panel for each number of shots](starts.png)\n"
    for size, entry in summary["sizes"].items():
        yield f"## {size} shots, {entry['tasks']} tasks\n"
        yield f"Full attention over the same examples: {_figure(entry['full_attention'], share)}.\n"
        columns = ("at step 0", "mean over the curve", "at the end", "end, less that of the first start")
        yield f"| start | {' | '.join(columns)} | steps to within a point of full attention |"
        yield "|---|---|---|---|---|---|"
        for name, start in entry["starts"].items():
            steps = {key: "never" if step is None else step for key, step in start["steps_to_full_attention"].items()}
            cells = [_figure(start[key], share) for key in ("start", "area", "end", "end_minus_first")]
            yield f"| {name} | {' | '.join(cells)} | {steps['mean']} [{steps['low']}, {steps['high']}] |"
        yield ""
    target = summary["examples_to_target"]
    yield f"## Shots to within a point of full attention over the most shots ({_number(target['target'], share)})\n"
    yield "| start | fewest shots |\n|---|---|"
    for name, size in target["examples"].items():
        yield f"| {name} | {'more than these' if size is None else size} |"


def _figure(interval: dict, share: bool) -> str:
    low, high = (_number(interval[key], share) for key in ("low", "high"))
    return f"{_number(interval['mean'], share)} [{low}, {high}]"


def _number(value: float, share: bool) -> str:
    return f"{100 * value:.1f}" if share else f"{value:.3f}"


def draw(summary: dict, path: str | Path) -> None:
    """Quality over steps with intervals, a panel for each number of examples, full attention as a dashed line."""
    from matplotlib.figure import Figure

    share = summary["metric"] != "test_loss"
    scale = 100 if share else 1
    figure = Figure(figsize=(3.4 * len(summary["sizes"]) + 0.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(summary["sizes"]), sharey=True, squeeze=False)[0]
    handles = {}
    for panel, (size, entry) in zip(panels, summary["sizes"].items()):
        for colour, (name, start) in zip(COLOURS, entry["starts"].items()):
            mean, low, high = ([scale * at[key] for at in start["curve"]] for key in ("mean", "low", "high"))
            (handles[name],) = panel.plot(start["steps"], mean, color=colour, linewidth=2)
            panel.fill_between(start["steps"], low, high, color=colour, alpha=0.15, linewidth=0)
        handles["full attention over the examples"] = panel.axhline(
            scale * entry["full_attention"]["mean"], color="#444444", linestyle="--", linewidth=1
        )
        panel.set(xlabel="step", title=f"{size} shots")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="right answers to unseen inputs (%)" if share else "loss on unseen inputs (nats per token)")
    if share:
        panels[0].set_ylim(0, 102)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
