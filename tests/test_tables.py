"""Tables of a study: small ones from recipes to markdown, which go on where they stopped."""

import gzip
import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from data_files import write

from eval.systems import FULL, Results
from eval.systems import markdown as systems_markdown
from eval.tables import markdown, table
from hyperllama.commands.train import train
from hyperllama.errors import UserError
from hyperllama.recipe.loading import load_any_recipe
from hyperllama.recipe.schema import StudyRecipe

LANGUAGE = "{source: synthetic, shots: 4, queries: 2, synthetic: {categories: 10, task_categories: 4, symbols: 8}}"
FORMAT = """
format: {query: " {input}", answer: " {output}", separator: "", end_token: false, answer_tokens: 1}
limits: {context_tokens: 32, query_tokens: 8}
"""
SIZES = "{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"


@pytest.fixture
def recipe(tmp_path):
    """A table of two trained rows and one that was trained before."""
    base = write(
        tmp_path / "base.yaml",
        f"method: full_attention\noutput: {tmp_path}/base\nmodel: {{architecture: {SIZES}, tokenizer: words}}\n"
        f"data: {LANGUAGE}\n{FORMAT}\ntraining: {{max_steps: 1, use_cpu: true}}\n",
    )
    train(base)
    hyper = write(
        tmp_path / "hyper.yaml",
        f"output: {tmp_path}/hyper\nmodel: {{name_or_path: {tmp_path}/base}}\ngist: {{tokens: 4, kind: lora, elastic: true}}\n"
        f"data: {LANGUAGE}\n{FORMAT}\ntraining: {{max_steps: 2, use_cpu: true}}\n",
    )
    train(hyper)
    write(
        tmp_path / "evaluate.yaml",
        f"method: evaluate\noutput: {tmp_path}/evaluation\ndata: {LANGUAGE}\nepisodes: 3\nmetric: choices\n"
        "methods: [no_context, full_context, prefix, swapped_prefix]\nleaks: warn\nresamples: 100\n",
    )
    return write(
        tmp_path / "table.yaml",
        f"""
method: table
output: {tmp_path}/table
question: Which?
train: {tmp_path}/hyper.yaml
evaluate: {tmp_path}/evaluate.yaml
rows:
  plain: []
  taught: [objectives.distillation=1.0]
  there already: ["run={tmp_path}/hyper"]
evaluations:
  all gists: []
  two gists: [gists=2]
seeds: [0, 1]
""",
    )


def test_a_table_goes_on_where_it_stopped(recipe, tmp_path):
    text = table(recipe, ["seeds=[0]"])
    again = table(recipe)
    assert text.startswith("accuracy, 6 queries, 1 seed\n") and again.startswith("accuracy, 6 queries, 2 seeds;")
    results = json.loads((tmp_path / "table" / "results.json").read_text())
    assert len(results["cells"]) == 3 * 2 * 2 and (tmp_path / "table" / "table.md").read_text() == again
    assert {cell["steps"] for cell in results["cells"]} == {2}
    lines = again.splitlines()
    assert lines[2:4] == ["|  | all gists | two gists |", "|---|---|---|"]
    rows = ("plain", "taught", "there already")
    called = [line.split("|")[1].strip() for line in lines[4:]]
    assert [f"{row}: the prefix" for row in rows] == [name for name in called if name.endswith(": the prefix")]
    assert called.count("no context") == 1 and all(line.count("%") == 2 for line in lines[4:] if "the prefix" in line)
    # Both seeds of a row that was there already are the same run on other episodes; the file says which budget each had.
    assert {(c["evaluation"], c["budget"]) for c in results["cells"]} == {("all gists", 4 + 1), ("two gists", 2 + 1)}
    before = {path: path.stat().st_mtime for path in (tmp_path / "trained").rglob("*.safetensors")}
    assert table(recipe) == again and len(before) > 3
    # Another table with a row in common shares its run.
    other = table(recipe, [f"output={tmp_path}/other", "rows={the same: []}", "seeds=[1]"])
    assert "| the same: the prefix |" in other and len(list((tmp_path / "trained").iterdir())) == 4
    assert {path: path.stat().st_mtime for path in before} == before, "nothing was trained again"


def test_cells_are_means_over_seeds_with_the_lowest_and_the_highest():
    def cell(row, seed, prefix, share):
        means = {"prefix": {"mean": prefix}, "no_context": {"mean": 2.5}}
        return {
            "row": row,
            "seed": seed,
            "evaluation": "",
            "metric": "loss",
            "queries": 9,
            "methods": means,
            "share_of_gain": share,
        }

    cells = [cell("a", 0, 1.0, 0.5), cell("a", 1, 2.0, 0.7), cell("b", 0, 3.0, None)]
    text = markdown({"rows": {"a": [], "b": [], "not run": []}, "evaluations": {"": []}, "cells": cells})
    assert text.splitlines()[2:] == [
        "|  | share of the context's gain | the prefix | no context |",
        "|---|---|---|---|",
        "| a | 60.0 % [50.0, 70.0] | 1.500 [1.000, 2.000] | 2.500 [2.500, 2.500] |",
        "| b |  | 3.000 | 2.500 |",
    ]


def test_a_single_row_has_a_line_for_each_evaluation():
    def cell(evaluation, **means):
        methods = {name: {"mean": mean} for name, mean in means.items()}
        shared = {"row": "a", "seed": 0, "metric": "accuracy", "queries": 9, "share_of_gain": None}
        return {**shared, "evaluation": evaluation, "methods": methods}

    cells = [cell("short", prefix=0.5), cell("long", prefix=0.25, no_context=0.1)]
    text = markdown({"rows": {"a": []}, "evaluations": {"short": [], "long": []}, "cells": cells})
    assert text.splitlines() == [
        "accuracy, 9 queries, 1 seed",
        "",
        "|  | the prefix | no context |",
        "|---|---|---|",
        "| short | 50.0 % |  |",
        "| long | 25.0 % | 10.0 % |",
    ]


def test_rows_and_evaluations_cross_and_what_rows_share_is_said_once():
    def cell(row, evaluation, share, **means):
        methods = {name: {"mean": mean} for name, mean in means.items()}
        shared = {"seed": 0, "metric": "accuracy", "queries": 9, "share_of_gain": share}
        return {**shared, "row": row, "evaluation": evaluation, "methods": methods}

    cells = [
        cell("a", "short", 0.5, prefix=0.5, no_context=0.0, full_context=1.0),
        cell("a", "long", 0.25, prefix=0.25, no_context=0.0, full_context=1.0),
        cell("b", "short", 1.0, prefix=0.9, no_context=0.0, full_context=0.9),
    ]
    text = markdown({"rows": {"a": [], "b": []}, "evaluations": {"short": [], "long": []}, "cells": cells})
    assert text.splitlines()[2:] == [
        "|  | short | long |",
        "|---|---|---|",
        "| a: share of the context's gain | 50.0 % | 25.0 % |",
        "| a: the prefix | 50.0 % | 25.0 % |",
        "| a: no context | 0.0 % | 0.0 % |",
        "| a: all demonstrations, full attention | 100.0 % | 100.0 % |",
        "| b: share of the context's gain | 100.0 % |  |",
        "| b: the prefix | 90.0 % |  |",
        "| b: no context | 0.0 % |  |",
        "| b: all demonstrations, full attention | 90.0 % |  |",
    ]
    cells.append(cell("b", "long", 0.5, prefix=0.5, no_context=0.0, full_context=1.0))
    text = markdown({"rows": {"a": [], "b": []}, "evaluations": {"short": [], "long": []}, "cells": cells})
    assert text.splitlines()[-1] == "| no context | 0.0 % | 0.0 % |"


def test_a_wrong_row_is_told_of_before_anything_is_trained(recipe, tmp_path):
    with pytest.raises(UserError, match="objectives.distilation: unknown key"):
        table(recipe, ["rows.wrong=[objectives.distilation=1]"])
    assert not (tmp_path / "table").exists()
    with pytest.raises(UserError, match="train: nowhere.yaml is not a recipe file"):
        load_any_recipe(recipe, ["train=nowhere.yaml"])
    assert not isinstance(load_any_recipe(recipe), StudyRecipe)


@pytest.fixture
def systems(recipe, tmp_path):
    """A table of the base as it is, a multi-task model, a hypernetwork and one of modules."""
    text = (tmp_path / "evaluate.yaml").read_text().replace("no_context, full_context, ", "")
    write(tmp_path / "evaluate.yaml", f"{text}model: {tmp_path}/base\nbudget: 5\n")
    return write(
        tmp_path / "systems.yaml",
        f"""
method: table
output: {tmp_path}/systems
question: Which system?
train: {tmp_path}/hyper.yaml
evaluate: {tmp_path}/evaluate.yaml
base_methods: [no_context, full_context, attended_tokens]
rows:
  multi-task: [method=full_attention]
  gists: []
  modules: [gist.kind=hint, gist.elastic=false]
seeds: [0]
""",
    )


def test_a_table_of_systems_goes_on_from_its_file_alone(systems, tmp_path):
    text = systems.read_text()
    fewer = [line for line in text.splitlines() if not line.startswith(("  multi-task:", "  modules:"))]
    table(write(tmp_path / "fewer.yaml", "\n".join(fewer)))
    path = tmp_path / "systems" / "examples.jsonl.gz"
    (results,) = Results.read(path)
    assert results.rows == ["gists"] and len(results.queries) == 6
    before = path.stat().st_mtime_ns
    whole = table(systems)
    assert path.stat().st_mtime_ns > before
    (results,) = Results.read(path)
    systems_there = {"the base": 3, "multi-task": 1, "gists": 2, "modules": 2}
    assert Counter(row for row, _ in results.systems) == systems_there
    before = path.read_bytes()
    for folder in ("systems/evaluations", "trained"):
        shutil.rmtree(tmp_path / folder)
    assert table(systems) == whole and path.read_bytes() == before and not (tmp_path / "trained").exists()


def test_figures_of_systems_are_those_of_the_result_lines(systems, tmp_path):
    """Computed again from the evaluation's own lines, without the code of tables."""
    table(systems)
    (results,) = Results.read(tmp_path / "systems" / "examples.jsonl.gz")
    figures = results.figures(list(results.by_task))
    for row, method in results.systems:
        folder = tmp_path / "systems" / "evaluations" / f"{row.replace(' ', '-')}-0"
        lines = [json.loads(line) for path in folder.glob("examples/*.jsonl") for line in path.read_text().splitlines()]
        own = [line["metrics"]["accuracy"] for line in lines if line["method"] == method]
        assert len(own) == 6 and figures.mean((row, method)).mean == pytest.approx(sum(own) / 6)


def test_tasks_without_headroom_are_in_a_table_of_their_own():
    def query(task, place, nothing, full, ours):
        scores = {"the base/no_context": nothing, "the base/full_context": full, "gists/prefix": ours}
        scores = {system: {"accuracy": value} for system, value in scores.items()}
        return {"task": task, "place": [0, place], "evaluation": "", "scores": scores}

    head = {"metrics": {"": {"kind": "choices", "metric": "auto"}}, "costs": {"": defaultdict(dict)}}
    learns = [query("learns", i, 0, 1, i % 2) for i in range(4)]
    also = [query("also learns", i, 0, 1, 1) for i in range(4)]
    results = Results(head, "", [*learns, *also, *(query("flat", i, 1, 1, 0) for i in range(2))])
    assert results.with_headroom == ["learns", "also learns"] and results.without_headroom == ["flat"]
    figures = results.figures(results.with_headroom)
    share, difference = figures.share(("gists", "prefix")), figures.difference(("gists", "prefix"), FULL)
    assert (share.mean, share.low, share.high) == (0.75, 0.5, 1.0) and difference.mean == -0.25
    text = systems_markdown(results)
    assert "**2 tasks with headroom**, 8 queries, accuracy" in text and "**1 tasks whose context helps" in text
    assert "| gists |  | 75.0 [50.0, 100.0] | 75.0 [50.0, 100.0] | -25.0 [-50.0, 0.0] |  |  |" in text
    assert "| gists: the prefix | 0.0 |" in text


KEPT = [("sni", "rouge_l", 55), ("hint", "rouge_l", 28), ("p3", "accuracy", 9), ("symbols", "accuracy", 2)]


@pytest.mark.parametrize(("name", "metric", "with_headroom"), KEPT)
def test_kept_results_computed_again_without_the_code_of_tables(name, metric, with_headroom):
    path = Path(__file__).parents[1] / f"benchmarks/results/papers/{name}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        queries = [json.loads(line) for line in file][1:]
    results = Results.read(path)[0]
    queries = [query for query in queries if query["evaluation"] == results.evaluation]

    def mean(system, tasks):
        own = [query["scores"][system][metric] for query in queries if query["task"] in tasks]
        return sum(own) / len(own)

    none, full = "the base/no_context", "the base/full_context"
    tasks = {query["task"] for query in queries}
    tasks = {task for task in tasks if mean(full, {task}) - mean(none, {task}) > 0.1}
    assert tasks == set(results.with_headroom) and len(tasks) == with_headroom
    figures = results.figures(results.with_headroom)
    for row in results.rows:
        method = "prefix" if (row, "prefix") in results.systems else "multi_task"
        ours = f"{row}/{method}"
        share = (mean(ours, tasks) - mean(none, tasks)) / (mean(full, tasks) - mean(none, tasks))
        assert figures.mean((row, method)).mean == pytest.approx(mean(ours, tasks))
        assert figures.share((row, method)).mean == pytest.approx(share)


def test_kept_losses_of_texts_computed_again_without_the_code_of_tables():
    path = Path(__file__).parents[1] / "benchmarks/results/papers/text.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        _, *queries = [json.loads(line) for line in file]
    assert not any(any(query["answers"].values()) for query in queries), "none of the texts themselves"
    for results in Results.read(path):
        own = [query["scores"] for query in queries if query["evaluation"] == results.evaluation]
        figures = results.figures(list(results.by_task))
        loss = {system: sum(scores[system]["loss"] for scores in own) / len(own) for system in own[0]}
        gain = loss["the base/no_context"] - loss["the base/full_context"]
        assert len(own) >= 6 and 2 < loss["the base/full_context"] < loss["the base/no_context"] < 6, "nats a token"
        for system in results.systems:
            name = "/".join(system)
            assert figures.mean(system).mean == pytest.approx(loss[name])
            assert figures.share(system).mean == pytest.approx((loss["the base/no_context"] - loss[name]) / gain, abs=1e-9)
