"""`hyperllama study` of a question: hypernetworks that differ in some keys of their recipes, over seeds, in one table.

Leaves in `output`: the evaluations of each row and seed, results.json, table.md; and in the folder `trained` beside it a run
for each row and seed, named by what it was trained with. So it goes on where it stopped, and tables share the runs that they
have in common. A table of systems, which has methods of the base itself beside the rows, leaves the results of every example in
examples.jsonl.gz (see `eval.systems`) instead of results.json. What is in that file is neither trained nor evaluated again.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.methods import METHODS
from eval.metrics import METRICS
from eval.run import evaluate, result_lines
from eval.summary import OURS
from eval.systems import BASE, EXAMPLES, Examples, Results
from eval.systems import markdown as systems_markdown
from hyperllama.commands.train import RESULT, train
from hyperllama.files import read_json, sha256, write_atomically
from hyperllama.hypernetworks.registry import kind_of
from hyperllama.recipe.loading import load_recipe
from hyperllama.recipe.schema import EvaluationRecipe, Recipe, TableRecipe
from hyperllama.runs import owned

RESULTS, TABLE = "results.json", "table.md"
# What is kept of a method's cost, beside its quality: means per task, FLOPs per query.
COSTS = ("context_tokens", "state_bytes", "encode_flops", "query_flops", "reread_flops")


def table(recipe_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Run what is left of a table and write it; returns it as markdown."""
    recipe = load_recipe(recipe_path, overrides, schema=TableRecipe)
    planned = [(row, seed, *_run(recipe, row, seed)) for seed in recipe.seeds for row in recipe.rows]
    trained = {}
    for row, _, _, changes in planned:
        if changes is not None:  # a wrong row is told of now, not hours later
            trained[row] = load_recipe(recipe.train, changes, schema=Recipe)
    evaluations = recipe.evaluations or {"": []}
    for more in evaluations.values():
        load_recipe(
            recipe.evaluate, [*more, "hypernetwork=null"], schema=EvaluationRecipe
        )  # that is a row's, and not there yet
    with owned(recipe.output):
        if recipe.base_methods:
            return _systems(recipe, planned, evaluations, trained)
        return _table(recipe, planned, evaluations)


def _systems(
    recipe: TableRecipe, planned: Sequence[tuple], evaluations: dict[str, list[str]], trained: dict[str, Recipe]
) -> str:
    """A table of systems: what the base does by itself, and then each row as soon as it is trained."""
    examples = Examples(recipe.question, Path(recipe.output) / EXAMPLES)
    own = [(BASE, seed, None, None) for seed in recipe.seeds]
    for row, seed, run, changes in [*own, *planned]:
        if row == BASE:
            of_row = ["hypernetwork=null", f"methods=[{','.join(recipe.base_methods)}]"]
        else:
            of_row = _of_row(recipe, run, trained.get(row))
        left = {n: [*more, *of_row] for n, more in evaluations.items() if not examples.has(row, seed, n, [*more, *of_row])}
        if left and changes is not None:
            train(recipe.train, changes)
        for name, differs in left.items():
            place = Path(recipe.output) / "evaluations" / _slug(f"{row} {seed} {name}")
            summary = evaluate(recipe.evaluate, [*differs, f"output={place}", f"seed={seed}"])
            examples.add(row, seed, name, differs, summary, result_lines(place))
    found = Results.read(examples.path)
    text = "\n".join(f"{results.evaluation or recipe.question}\n\n{systems_markdown(results)}" for results in found)
    write_atomically(Path(recipe.output) / TABLE, text)
    return text


def _of_row(recipe: TableRecipe, run: Path, trained: Recipe | None) -> list[str]:
    """What a row changes about the evaluation: which model it is, and the methods that it has."""
    if trained is not None and trained.method == "full_attention":
        return ["hypernetwork=null", f"multi_task={run}", "methods=[multi_task]"]
    methods = load_recipe(recipe.evaluate, ["hypernetwork=null"], schema=EvaluationRecipe).methods
    if trained is not None and kind_of(trained).makes_modules:  # there is no refining these
        methods = [name for name in methods if "refine" not in METHODS[name].needs]
    return [f"hypernetwork={run}", "model=null", f"methods=[{','.join(methods)}]"]


def _table(recipe: TableRecipe, planned: Sequence[tuple], evaluations: dict[str, list[str]]) -> str:
    cells = []
    for row, seed, run, changes in planned:
        if changes is not None:
            train(recipe.train, changes)
        for name, more in evaluations.items():
            place = Path(recipe.output) / "evaluations" / _slug(f"{row} {seed} {name}")
            summary = evaluate(recipe.evaluate, [*more, f"hypernetwork={run}", f"output={place}", f"seed={seed}"])
            cells.append({"row": row, "seed": seed, "evaluation": name, **_kept(summary, run)})
        # Written as it grows: what there is can be looked at, and an interruption loses nothing.
        results = {"question": recipe.question, "rows": recipe.rows, "evaluations": evaluations, "cells": cells}
        write_atomically(Path(recipe.output) / RESULTS, json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    write_atomically(Path(recipe.output) / TABLE, text)
    return text


def _run(recipe: TableRecipe, row: str, seed: int) -> tuple[Path, list[str] | None]:
    """Where a row's run is, and the overrides to train it with; None if it is there already."""
    changes = recipe.rows[row]
    if len(changes) == 1 and changes[0].startswith("run="):
        return Path(changes[0].removeprefix("run=")), None
    name = _slug(" ".join([Path(recipe.train).stem, *sorted(changes), f"seed={seed}"]))
    run = Path(recipe.output).parent / "trained" / (name if len(name) < 200 else sha256(name))
    return run, [*changes, f"seed={seed}", f"output={run}"]


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-")


def _kept(summary: dict[str, Any], run: Path) -> dict[str, Any]:
    """What a table needs of an evaluation's summary: the headline metric and the cost of each method, and what the run cost."""
    head = summary["headline"]
    methods = {
        name: entry["metrics"][head] | {cost: entry[cost] for cost in COSTS if cost in entry}
        for name, entry in summary["methods"].items()
    }
    result = read_json(run / RESULT, "a run's result") if (run / RESULT).is_file() else {}
    kept = {"metric": head, "queries": summary["queries"], "budget": summary["budget"], "methods": methods}
    kept["share_of_gain"] = (summary.get("share_of_gain") or {}).get("mean")
    kept["context_tokens"] = summary["methods"].get("prefix", {}).get("context_tokens")
    return kept | {"steps": result.get("steps"), "minutes": result.get("train_runtime", 0) / 60}


def markdown(results: dict[str, Any]) -> str:
    """The tables of a question; a cell is the mean over seeds, and their lowest and highest.

    Of one evaluation, or of a single row, there is a table with a column for each method. Of several of both there is a table
    with a column for each evaluation: each row's own methods, and below them, once, what all rows have in common.
    """
    cells = results["cells"]
    if not cells:
        return ""
    metric = METRICS[cells[0]["metric"]]
    methods = [method for method in METHODS if any(method in cell["methods"] for cell in cells)]
    methods.sort(key=lambda method: method not in OURS)  # ours first
    seeds = sorted({cell["seed"] for cell in cells})
    spread = f"{len(seeds)} seeds; in brackets the lowest and highest" if len(seeds) > 1 else "1 seed"
    said = f"{metric.label}, {cells[0]['queries']:,} queries, {spread}"
    heads, lines = _lines(results, methods, metric.share)
    if len(results["evaluations"]) == 1:
        said = "".join(f"{name}: " for name in results["evaluations"] if name) + said
    table = [f"| {' | '.join(['', *heads])} |", "|---" * (len(heads) + 1) + "|"]
    return "\n".join([said, "", *table, *(f"| {' | '.join([label, *shown])} |" for label, shown in lines), ""])


def _lines(results: dict[str, Any], methods: Sequence[str], share: bool) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """A table's heads, and its lines: what a line is called, and its cells."""
    rows, evaluations, cells = list(results["rows"]), list(results["evaluations"]), results["cells"]
    shares = any(cell["share_of_gain"] is not None for cell in cells)
    quantities = [*([None] if shares else []), *methods]  # None: the share of the context's gain

    def value(row: str, name: str, method: str | None) -> str:
        own = [cell for cell in cells if cell["row"] == row and cell["evaluation"] == name]
        if method is None:
            return _entry([cell["share_of_gain"] for cell in own if cell["share_of_gain"] is not None], share=True)
        return _entry([cell["methods"][method]["mean"] for cell in own if method in cell["methods"]], share)

    def label(method: str | None) -> str:
        return METHODS[method].label if method else "share of the context's gain"

    if len(rows) > 1 and len(evaluations) > 1:
        by_row = {(row, m): [value(row, name, m) for name in evaluations] for row in rows for m in quantities}
        common = [m for m in methods if m not in OURS and len({tuple(by_row[row, m]) for row in rows}) == 1]
        lines = [(f"{row}: {label(m)}", by_row[row, m]) for row in rows for m in quantities if m not in common]
        return evaluations, lines + [(label(m), by_row[rows[0], m]) for m in common]
    places = [(rows[0], name, name) for name in evaluations] if len(evaluations) > 1 else [(r, evaluations[0], r) for r in rows]
    done = [place for place in places if any(cell["row"] == place[0] and cell["evaluation"] == place[1] for cell in cells)]
    return [label(m) for m in quantities], [(called, [value(row, name, m) for m in quantities]) for row, name, called in done]


def _entry(values: Sequence[float], share: bool) -> str:
    if not values:
        return ""
    mean, low, high = (f"{100 * x:.1f}" if share else f"{x:.3f}" for x in (statistics.mean(values), min(values), max(values)))
    return f"{mean}{' %' if share else ''}" + (f" [{low}, {high}]" if len(values) > 1 else "")
