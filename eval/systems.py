"""Systems side by side on the same queries: one file with the results of each example, and the tables that it makes.

The file, `examples.jsonl.gz`, is what a table is made from again, and what a reader can recompute it from. Its first line says
what was evaluated and what each method costs; each other line is a query with the scores and answers of all systems. Inputs and
references are those of the data: a line has the first digits of its input's SHA-256.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.intervals import Bootstrap, Interval
from eval.methods import METHODS
from eval.metrics import METRICS, headline
from hyperllama.errors import UserError
from hyperllama.files import sha256, write_zipped_lines, zipped_lines

EXAMPLES = "examples.jsonl.gz"
BASE = "the base"
NOTHING, FULL = (BASE, "no_context"), (BASE, "full_context")
HEADROOM = 0.1  # a task has headroom if its whole context scores so much more than no context
RESAMPLES = 2000
COSTS = ("context_tokens", "state_rows", "state_bytes", "encode_flops", "query_flops")

System = tuple[str, str]  # a row of the table ("the base" for what is not trained), and a method


class Examples:
    """The results of systems on the queries of one table, gathered and written to a file."""

    def __init__(self, question: str, path: Path):
        """Goes on with the file at `path`, if there is one."""
        self.head: dict[str, Any] = {"question": question, "metrics": {}, "costs": {}, "made_from": {}}
        self.queries: dict[tuple, dict[str, Any]] = {}
        self.path = path
        if path.is_file():
            self.head, *queries = zipped_lines(path)
            self.head["question"] = question
            self.queries = {(q["evaluation"], q["seed"], *q["place"]): q for q in queries}

    def has(self, row: str, seed: int, evaluation: str, changes: Sequence[str]) -> bool:
        """Whether the results of a row are there, made with these overrides."""
        return self.head["made_from"].get(f"{row}/{seed}/{evaluation}") == list(changes)

    def add(
        self,
        row: str,
        seed: int,
        evaluation: str,
        changes: Sequence[str],
        summary: dict[str, Any],
        lines: Iterable[dict],
    ) -> None:
        """The result lines of an evaluation of one row, its summary, and the overrides that made it; written at once."""
        self.head["made_from"][f"{row}/{seed}/{evaluation}"] = list(changes)
        self.head["metrics"][evaluation] = {"kind": summary["kind"], "metric": summary["metric"]}
        costs = self.head["costs"].setdefault(evaluation, {})
        for name, entry in summary["methods"].items():
            costs[f"{row}/{name}"] = {key: entry[key] for key in COSTS if key in entry}
        for line in lines:
            place, digest = [line["episode"], line["query"]], sha256(line["input"])[:12]
            about = {"evaluation": evaluation, "seed": seed, "place": place, "task": line["task"], "category": line["category"]}
            new = {**about, "input": digest, "scores": {}, "answers": {}}
            query = self.queries.setdefault((evaluation, seed, *place), new)
            if query["input"] != digest:
                raise UserError(f"{self.path}: has results of other queries than {row} was asked; remove it, and run it again")
            system = f"{row}/{line['method']}"
            query["scores"][system] = {name: round(value / line["weight"], 4) for name, value in line["metrics"].items()}
            query["answers"][system] = line.get("answer", "")

        whole = [self.head, *(self.queries[place] for place in sorted(self.queries))]
        write_zipped_lines(self.path, whole)


@dataclasses.dataclass(frozen=True)
class Results:
    """One evaluation's queries as sums per task: what tables and verdicts are made of."""

    head: dict[str, Any]
    evaluation: str
    queries: list[dict[str, Any]]

    @staticmethod
    def read(path: Path) -> list[Results]:
        """The evaluations in a file, in its order."""
        head, *queries = zipped_lines(path)
        names = head["metrics"]
        return [Results(head, name, [query for query in queries if query["evaluation"] == name]) for name in names]

    @cached_property
    def metric(self) -> str:
        """The headline metric."""
        about = self.head["metrics"][self.evaluation]
        return headline(about["kind"], wanted=about["metric"])

    @cached_property
    def systems(self) -> list[System]:
        """Everything that was evaluated on these queries, in the order of rows and methods."""
        there = set.intersection(*(set(query["scores"]) for query in self.queries))
        return [tuple(name.rsplit("/", 1)) for name in self.queries[0]["scores"] if name in there]

    @cached_property
    def rows(self) -> list[str]:
        """What was trained."""
        return [row for row in dict.fromkeys(row for row, _ in self.systems) if row != BASE]

    @cached_property
    def by_task(self) -> dict[str, list[dict]]:
        """The queries of each task."""
        found = defaultdict(list)
        for query in self.queries:
            found[query["task"]].append(query)
        return dict(found)

    def score(self, system: System, task: str, metric: str | None = None) -> float:
        """A system's sum over the queries of a task."""
        return sum(query["scores"]["/".join(system)][metric or self.metric] for query in self.by_task[task])

    def mean(self, system: System, tasks: Sequence[str], metric: str | None = None) -> float:
        """A system's mean over the queries of some tasks."""
        return sum(self.score(system, task, metric) for task in tasks) / sum(len(self.by_task[task]) for task in tasks)

    @cached_property
    def with_headroom(self) -> list[str]:
        """Tasks whose context helps the base."""
        return [t for t in self.by_task if self.mean(FULL, [t]) - self.mean(NOTHING, [t]) > HEADROOM]

    @cached_property
    def without_headroom(self) -> list[str]:
        """The others."""
        return [task for task in self.by_task if task not in set(self.with_headroom)]

    def figures(self, tasks: Sequence[str]) -> Figures:
        """Means, differences and shares over some tasks."""
        return Figures(self, tuple(tasks))


class Figures:
    """Intervals over some tasks of an evaluation, all from the same resamples of tasks."""

    def __init__(self, results: Results, tasks: Sequence[str]):
        self.results, self.tasks = results, tasks
        self._bootstrap = Bootstrap([len(results.by_task[t]) for t in tasks], resamples=RESAMPLES, seed=0)

    def _sums(self, system: System) -> np.ndarray:
        return np.array([self.results.score(system, task) for task in self.tasks])

    def mean(self, system: System) -> Interval:
        """The headline metric."""
        return self._bootstrap.mean(self._sums(system))

    def difference(self, one: System, other: System) -> Interval:
        """One system minus another."""
        return self._bootstrap.difference(self._sums(one), self._sums(other))

    def share(self, system: System, of: System = FULL) -> Interval | None:
        """The share of what `of` gains over no context; None where that gain is not clear."""
        return self._bootstrap.recovered(self._sums(system), self._sums(NOTHING), self._sums(of))


def markdown(results: Results) -> str:
    """The tables of an evaluation: tasks with headroom, what was not trained and what was; then the other tasks."""
    label = METRICS[results.metric].label
    tasks, others = results.with_headroom, results.without_headroom
    queries = sum(len(results.by_task[task]) for task in tasks)
    lines = [f"**{len(tasks)} tasks with headroom**, {queries:,} queries, {label} in %:", ""]
    if tasks:
        lines += [*_untrained(results, results.figures(tasks)), "", *_trained(results, results.figures(tasks)), ""]
    if others:
        queries = sum(len(results.by_task[task]) for task in others)
        lines += [f"**{len(others)} tasks whose context helps the base by at most {100 * HEADROOM:.0f} points**, "]
        lines[-1] += f"{queries:,} queries:"
        lines += ["", *_means(results, others), ""]
    return "\n".join(lines)


def _untrained(results: Results, figures: Figures) -> Iterable[str]:
    yield f"| the base as it is | rows | {METRICS[results.metric].label} | share of the context's gain |"
    yield "|---|---|---|---|"
    for system in results.systems:
        if system[0] == BASE:
            yield f"| {METHODS[system[1]].label} | {_rows(results, system)} | {percent(figures.mean(system))} | " + (
                f"{percent(figures.share(system))} |"
            )


def _trained(results: Results, figures: Figures) -> Iterable[str]:
    heads = ("share of the gain", "minus full attention", "refined", "another task's")
    yield f"| trained | rows | {METRICS[results.metric].label} | {' | '.join(heads)} |"
    yield "|---" * 7 + "|"
    for row in results.rows:
        own = next(system for system in results.systems if system[0] == row and METHODS[system[1]].role in ("ours", "context"))
        more = [(row, name) if (row, name) in results.systems else None for name in ("refined_prefix", "swapped_prefix")]
        cells = [figures.mean(own), figures.share(own), figures.difference(own, FULL), *(s and figures.mean(s) for s in more)]
        yield f"| {row} | {_rows(results, own)} | {' | '.join(map(percent, cells))} |"


def _means(results: Results, tasks: Sequence[str]) -> Iterable[str]:
    yield f"| | {METRICS[results.metric].label} |"
    yield "|---|---|"
    for row, method in results.systems:
        name = METHODS[method].label
        yield f"| {name if row == BASE else f'{row}: {name}'} | {100 * results.mean((row, method), tasks):.1f} |"


def _rows(results: Results, system: System) -> str:
    rows = results.head["costs"][results.evaluation]["/".join(system)].get("state_rows")
    return "" if rows is None else f"{rows:,.0f}"


def percent(interval: Interval | None) -> str:
    """An interval of shares in per cent; nothing for None."""
    return "" if interval is None else f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
