"""What one start of prefix tuning is ahead of the others, task by task: from the curves that `eval.starts` keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.intervals import Bootstrap, Interval
from eval.starts import TOLERANCE, metric_of, read_kept

LEARNABLE = 0.1  # tasks at which full attention is at least so good count


@dataclass(frozen=True)
class Leads:
    """The first start of a study against the best of the others, at one number of examples; means over seeds for each task.

    `steps` and `next_steps`: the first step within a hundredth of full attention, None for never. `end`: the first start's last
    accuracy minus that of `next_start`, the other that ends best over all tasks.
    """

    steps: dict[str, int | None]
    next_steps: dict[str, int | None]
    next_start: str
    end: Interval

    @property
    def in_a_quarter(self) -> list[str]:
        """Tasks that the first start does in at most a quarter of the steps of whichever other does them first."""
        found = []
        for task, own in self.steps.items():
            other = self.next_steps[task]
            if own is not None and (other is None or (4 * own <= other and own < other)):
                found.append(task)
        return found

    @property
    def no_later(self) -> list[str]:
        """Tasks that no other start does sooner."""
        other = {task: float("inf") if step is None else step for task, step in self.next_steps.items()}
        return [task for task, own in self.steps.items() if own is not None and own <= other[task]]


def leads(path: Path) -> dict[int, Leads]:
    """For each number of examples in a file of kept curves of accuracies."""
    runs, full, recipe = read_kept(path)
    metric, found = metric_of(runs, full), {}
    for size in recipe.sizes:
        seeds = [seed for seed in recipe.seeds if (size, seed) in full]
        names = sorted(set.intersection(*(set(full[size, seed]) for seed in seeds)))
        level = {t: np.mean([full[size, seed][t][metric] for seed in seeds]) for t in names}
        tasks = [t for t in names if level[t] >= LEARNABLE]
        curves = {start: _curves([runs[start, size, seed] for seed in seeds], tasks, metric) for start in recipe.starts}
        first = {start: {t: _reached(curves[start][t], level[t]) for t in tasks} for start in recipe.starts}
        own, *others = recipe.starts
        soonest = {}
        for task in tasks:
            steps = [first[start][task] for start in others if first[start][task] is not None]
            soonest[task] = min(steps, default=None)
        ends = {start: np.array([list(curves[start][t].values())[-1] for t in tasks]) for start in recipe.starts}
        best = max(others, key=lambda start: ends[start].mean())
        end = Bootstrap(np.ones(len(tasks)), resamples=recipe.resamples).difference(ends[own], ends[best])
        found[size] = Leads(first[own], soonest, best.partition(":")[0], end)
    return found


def _curves(runs: list[list[dict]], tasks: list[str], metric: str) -> dict[str, dict[int, float]]:
    """For each task its accuracy by step, the mean over runs."""
    found: dict[str, dict[int, list[float]]] = {task: {} for task in tasks}
    for lines in runs:
        for line in lines:
            if line["task"] in found:
                found[line["task"]].setdefault(line["step"], []).append(line[metric])
    return {task: {step: float(np.mean(values)) for step, values in sorted(at.items())} for task, at in found.items()}


def _reached(curve: dict[int, float], level: float) -> int | None:
    return next((step for step, value in curve.items() if value >= level - TOLERANCE - 1e-9), None)
