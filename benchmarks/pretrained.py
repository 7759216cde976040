"""The hypernetwork that ships, on unseen word tasks: three draws of demonstrations, 16 and 8 rows, 16 and 4 demonstrations.

    python -m benchmarks.pretrained [--run FOLDER] [--only NAME ...] [--json benchmarks/results/pretrained.json]

Each evaluation is one of `recipes/pretrained/evaluate.yaml` with the overrides below, and goes on where it stopped. Intervals
are bootstrapped over tasks, since draws of one task are alike. A task has headroom if all demonstrations answer a tenth more of
its queries than none. "Share" is that of what full attention gains over no context.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.measure import write_json
from eval.intervals import Bootstrap
from eval.methods import METHODS
from eval.run import evaluate, result_lines

RECIPE = "recipes/pretrained/evaluate.yaml"
SEEDS = (0, 1, 2)
UNTRAINED = ("fewer_demonstrations", "last_tokens", "attended_tokens", "mean_pool")
WHOLE = ("no_context", "full_context")
# What is evaluated: overrides, and methods. A result's name is METHOD, or METHOD after STEPS where there are steps.
EVALUATIONS: dict[str, tuple[list[str], Sequence[str]]] = {
    "16 rows": ([], (*WHOLE, *UNTRAINED, "swapped_prefix", "shuffled_prefix", "prefix", "refined_prefix")),
    "16 rows, 5 steps": (["refine=5"], ("refined_prefix",)),
    "16 rows, 5 steps, untrained start": (["refine=5"], ("refined_attended",)),
    "16 rows, 10 steps": (["refine=10"], ("refined_attended",)),
    "16 rows, 20 steps": ([], ("refined_attended",)),
    "8 rows": (["gists=8"], ("attended_tokens", "prefix")),
    "32 rows": (["gists=32"], ("prefix",)),
    "symbols, 16 rows": (
        ["data.source=symbols", "data.root=recipes/words/labelled", "data.split=test", "data.shots=4", "episodes=6"],
        (*WHOLE, "swapped_prefix", "prefix", "refined_prefix"),
    ),
    "4 demonstrations, 16 rows": (["data.shots=4"], (*WHOLE, "prefix", "refined_prefix")),
}
# Which method is held against which, both by the evaluation that they are from.
COMPARED = (
    (("16 rows", "refined_prefix"), ("16 rows", "full_context")),
    (("16 rows, 5 steps", "refined_prefix"), ("16 rows, 5 steps, untrained start", "refined_attended")),
    (("16 rows, 5 steps", "refined_prefix"), ("16 rows, 10 steps", "refined_attended")),
    (("16 rows", "refined_prefix"), ("16 rows, 20 steps", "refined_attended")),
    (("4 demonstrations, 16 rows", "refined_prefix"), ("4 demonstrations, 16 rows", "prefix")),
    (("4 demonstrations, 16 rows", "refined_prefix"), ("4 demonstrations, 16 rows", "full_context")),
)


def results(run: str | None, name: str, output: Path) -> dict[str, dict[str, list[float]]]:
    """Of each method of an evaluation, for each task whether each query of all draws was answered exactly."""
    overrides, methods = EVALUATIONS[name]
    found: dict[str, dict[str, list[float]]] = {method: defaultdict(list) for method in methods}
    for seed in SEEDS:
        folder = output / name.replace(", ", "-").replace(" ", "_") / str(seed)
        own = [*overrides, f"seed={seed}", f"output={folder}", f"methods=[{','.join(methods)}]"]
        evaluate(RECIPE, own + ([f"hypernetwork={run}"] if run else []))
        for line in result_lines(folder):
            if line["method"] in found:
                found[line["method"]][line["task"]].append(line["metrics"]["exact_match"])
    return found


def _bootstrap(each: dict[str, list[float]], tasks: Sequence[str]) -> Bootstrap:
    """Over tasks, each as heavy as its queries."""
    return Bootstrap([len(each[task]) for task in tasks], resamples=2000, seed=0)


def _sums(each: dict[str, list[float]], tasks: Sequence[str]) -> np.ndarray:
    return np.array([sum(each[task]) for task in tasks])


def figures(found: dict[str, dict[str, list[float]]], whole: dict[str, dict[str, list[float]]], tasks: Sequence[str]) -> dict:
    """Mean, difference from full attention and share of its gain, with intervals, of each method over some tasks."""
    bootstrap = _bootstrap(whole["full_context"], tasks)
    nothing, full = (_sums(whole[method], tasks) for method in WHOLE)
    rows = {}
    for method, each in found.items():
        own = _sums(each, tasks)
        rows[method] = {"label": METHODS[method].label, **dataclasses.asdict(bootstrap.mean(own))}
        rows[method]["minus_full"] = dataclasses.asdict(bootstrap.difference(own, full))
        share = bootstrap.recovered(own, nothing, full)
        rows[method]["share"] = share and dataclasses.asdict(share)
    return rows


def compared(found: dict[str, dict[str, dict[str, list[float]]]], with_headroom: Sequence[str]) -> list[dict]:
    """The differences of `COMPARED` whose evaluations are there, over all tasks and over those with headroom."""
    differences = []
    for one, other in COMPARED:
        if one[0] not in found or other[0] not in found:
            continue
        a, b = (found[evaluation][method] for evaluation, method in (one, other))
        for tasks in (list(a), with_headroom):
            difference = _bootstrap(a, tasks).difference(_sums(a, tasks), _sums(b, tasks))
            differences.append({"one": one, "other": other, "tasks": len(tasks), **dataclasses.asdict(difference)})
    return differences


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", help="another folder of a hypernetwork than the one that ships")
    options.add_argument("--only", nargs="*", default=list(EVALUATIONS), choices=list(EVALUATIONS))
    options.add_argument("--output", type=Path, default=Path("runs/pretrained/evaluation"))
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    found = {name: results(arguments.run, name, arguments.output) for name in arguments.only}
    made: dict[str, dict] = {}
    for name, methods in found.items():
        whole = methods if WHOLE[0] in methods else found["16 rows"]
        gain = {task: np.mean(whole["full_context"][task]) - np.mean(each) for task, each in whole["no_context"].items()}
        tasks = [task for task, more in gain.items() if more > 0.1]
        made[name] = {"tasks": tasks, "without_headroom": sorted(set(gain) - set(tasks)), **figures(methods, whole, tasks)}
        made[name]["by_task"] = {m: {task: float(np.mean(x)) for task, x in each.items()} for m, each in methods.items()}
        print(f"\n{name}: {len(tasks)} tasks with headroom, {len(SEEDS)} draws\n")
        for row in (made[name][method] for method in methods):
            share = row["share"] or {"mean": float("nan")}
            mean, low, high = (100 * row[key] for key in ("mean", "low", "high"))
            print(f"  {row['label']:45} {mean:5.1f} [{low:.1f}, {high:.1f}]  share {100 * share['mean']:5.1f} %", flush=True)
    differences = compared(found, made["16 rows"]["tasks"]) if "16 rows" in made else []
    for x in differences:
        mean, low, high = (100 * x[key] for key in ("mean", "low", "high"))
        print(f"{', '.join(x['one'])} minus {', '.join(x['other'])}, {x['tasks']} tasks: {mean:.1f} [{low:.1f}, {high:.1f}]")
    write_json(arguments.json, {"seeds": list(SEEDS), "evaluations": made, "compared": differences})


if __name__ == "__main__":
    main()
