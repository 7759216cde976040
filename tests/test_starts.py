"""The study of starts: its figures from curves that are known, and a small study from the command line's function."""

import gzip
import json
from collections import defaultdict
from pathlib import Path

import pytest
from data_files import WORDS, lines, write

from eval.leads import leads
from eval.starts import keep, read_kept, study, summarise
from hyperllama.errors import UserError
from hyperllama.recipe.schema import StudyRecipe


def curve(metric, **tasks):
    """Lines of a run: each task's values at steps 0, 2, 4, ..."""
    return [{"step": 2 * i, "task": name, metric: v} for name, values in tasks.items() for i, v in enumerate(values)]


def level(metric, **tasks):
    return {name: {metric: value} for name, value in tasks.items()}


class TestSummary:
    def test_figures_of_known_curves(self):
        recipe = StudyRecipe(starts=["good", "slow"], sizes=[4, 8], seeds=[0, 1], resamples=200)
        runs, full = {}, {}
        for seed in (0, 1):
            full[4, seed] = level("test_accuracy", a=0.5, b=0.7)
            full[8, seed] = level("test_accuracy", a=1.0, b=0.8)
            runs["good", 4, seed] = curve("test_accuracy", a=[0.4, 0.5, 0.5], b=[0.4, 0.68, 0.6])
            runs["slow", 4, seed] = curve("test_accuracy", a=[0.0, 0.2, 0.5], b=[0.0, 0.2, 0.5])
            runs["good", 8, seed] = curve("test_accuracy", a=[0.9, 0.9, 1.0], b=[0.7, 0.88, 0.8])
            runs["slow", 8, seed] = curve("test_accuracy", a=[0.0, 0.4, 0.8], b=[0.0, 0.4, 0.8])
        found = summarise(runs, full, recipe)
        four, eight = found["sizes"]["4"], found["sizes"]["8"]
        good, slow = four["starts"]["good"], four["starts"]["slow"]
        assert found["metric"] == "test_accuracy" and four["tasks"] == 4
        assert four["full_attention"]["mean"] == pytest.approx(0.6)
        assert (good["start"]["mean"], good["end"]["mean"]) == pytest.approx((0.4, 0.55))
        assert good["area"]["mean"] == pytest.approx((0.4 + 0.59 + 0.55) / 3)
        # At step 2 the mean, 0.59, is a point below full attention: within a point. In every resample too, as a or b alone.
        assert good["steps_to_full_attention"]["mean"] == 2 and slow["steps_to_full_attention"]["mean"] is None
        assert slow["end_minus_first"]["mean"] == pytest.approx(-0.05) and good["end_minus_first"]["mean"] == 0
        assert eight["starts"]["good"]["steps_to_full_attention"]["mean"] == 2
        assert slow["steps_to_full_attention"] == {"mean": None, "low": 4, "high": None}, "reached where only a is drawn"
        assert found["examples_to_target"] == {"target": pytest.approx(0.9), "examples": {"good": 8, "slow": None}}

    def test_of_losses_less_is_better(self):
        recipe = StudyRecipe(starts=["good", "slow"], sizes=[4], seeds=[0], resamples=200)
        runs = {
            ("good", 4, 0): curve("test_loss", a=[1.0, 0.5, 0.6]),
            ("slow", 4, 0): curve("test_loss", a=[3.0, 2.0, 0.505]),
        }
        starts = summarise(runs, {(4, 0): level("test_loss", a=0.5)}, recipe)["sizes"]["4"]["starts"]
        assert [start["steps_to_full_attention"]["mean"] for start in starts.values()] == [2, 4]
        assert starts["slow"]["end_minus_first"]["mean"] == pytest.approx(-0.095)

    def test_tasks_are_paired_by_name(self):
        recipe = StudyRecipe(starts=["one"], sizes=[4], seeds=[0], resamples=200)
        runs = {("one", 4, 0): curve("test_loss", a=[2.0, 2.0], b=[1.0, 1.0])}
        found = [
            summarise(runs, {(4, 0): level("test_loss", **levels)}, recipe)["sizes"]["4"]["starts"]["one"]
            for levels in ({"a": 2.0, "b": 1.0}, {"b": 1.0, "a": 2.0})
        ]
        assert [start["steps_to_full_attention"] for start in found] == [{"mean": 0, "low": 0, "high": 0}] * 2

    def test_a_run_that_stopped_early_keeps_its_last_value(self):
        recipe = StudyRecipe(starts=["long", "short"], sizes=[4], seeds=[0], resamples=200)
        runs = {("long", 4, 0): curve("test_loss", a=[3, 2, 1]), ("short", 4, 0): curve("test_loss", a=[3, 1])}
        runs["short", 4, 0] += curve("test_loss", b=[3, 1])
        runs["long", 4, 0] += curve("test_loss", b=[3, 3, 3])
        starts = summarise(runs, {(4, 0): level("test_loss", a=1, b=1)}, recipe)["sizes"]["4"]["starts"]
        assert starts["short"]["end"]["mean"] == 1 and starts["long"]["end"]["mean"] == 2

    def test_without_test_examples_there_is_nothing_to_say(self):
        recipe = StudyRecipe(starts=["one"], sizes=[4], seeds=[0], resamples=200)
        runs = {("one", 4, 0): [{"step": 0, "task": "a", "validation_loss": 1.0}]}
        with pytest.raises(UserError, match="raise data.queries"):
            summarise(runs, {(4, 0): {"a": {}}}, recipe)


@pytest.fixture
def recipe(tmp_path, saved_base):
    for name, answer in (("upper", str.upper), ("same", str)):
        rows = [{"input": w, "output": answer(w), "choices": [answer(w), "no"]} for w in WORDS.split()[:24]]
        write(tmp_path / "data" / f"{name}.jsonl", lines(rows))
    tune = write(
        tmp_path / "tune.yaml",
        f"""
method: tune
output: unused
model: {saved_base}
start: {{gists: 3}}
data: {{source: jsonl, root: {tmp_path}/data, shots: 12, queries: 6}}
validation: 0.0
measure_every: 2
training: {{max_steps: 4, use_cpu: true, disable_tqdm: true, learning_rate: 0.05, save_steps: 4}}
""",
    )
    return write(
        tmp_path / "study.yaml",
        f"""
method: study
output: {tmp_path}/study
tune: {tune}
starts: [random, "vocabulary:start.gists=2"]
sizes: [4, 8]
seeds: [0, 1]
""",
    )


def test_a_study_goes_on_where_it_stopped(recipe, tmp_path):
    folder = tmp_path / "study"
    report = study(recipe)
    runs = sorted(path.parent for path in folder.glob("*/result.json"))
    assert len(runs) == 8 and (folder / "starts.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report.md").read_text() == report
    assert "## 4 shots, 4 tasks" in report and "| vocabulary:start.gists=2 |" in report
    summary = json.loads((folder / "summary.json").read_text())
    times = {run: (run / "result.json").stat().st_mtime_ns for run in runs}
    gone = runs[3]
    curves = (gone / "curves.jsonl").read_text()
    for path in (gone / "result.json", gone / "curves.jsonl", *gone.glob("checkpoints/*/trainer_state.json")):
        path.unlink()
    assert study(recipe) == report and json.loads((folder / "summary.json").read_text()) == summary
    assert (gone / "curves.jsonl").read_text() == curves
    assert all((run / "result.json").stat().st_mtime_ns == then for run, then in times.items() if run != gone)


def test_a_wrong_start_is_told_of_before_the_first_run(recipe, tmp_path):
    with pytest.raises(UserError, match="start.kind: Invalid value 'hyper'"):
        study(recipe, ["starts=[random,hyper]"])
    assert not (tmp_path / "study").exists()


def test_the_kept_curves_make_the_same_summary(tmp_path):
    recipe = StudyRecipe(starts=["good", "slow:training.learning_rate=0.1"], sizes=[4, 8], seeds=[0, 1])
    runs, full = {}, {}
    for size, seed in ((4, 0), (4, 1), (8, 0), (8, 1)):
        full[size, seed] = level("test_accuracy", a=0.5, b=0.75 + 0.01 * seed)
        runs["good", size, seed] = curve("test_accuracy", a=[0.4, 0.5, 0.5], b=[0.25, 0.75, 0.5])
        runs["slow:training.learning_rate=0.1", size, seed] = curve("test_accuracy", a=[0.0, 0.25, 0.5], b=[0.0, 0.25])
    keep(tmp_path / "k.jsonl.gz", runs, full)
    *again, made = read_kept(tmp_path / "k.jsonl.gz")
    assert (made.starts, made.sizes, made.seeds) == (recipe.starts, recipe.sizes, recipe.seeds)
    assert summarise(*again, made) == summarise(runs, full, recipe)


def test_leads_of_known_curves(tmp_path):
    """Each task's first step at full attention's level, against whichever other start is there first."""
    tasks = {  # full attention, the first start, two others, over steps 0, 2, 4, 8
        "at_once": (0.5, [0.5, 0.5, 0.5, 0.5], [0.0, 0.5, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]),
        "quarter": (0.5, [0.0, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.25]),
        "half": (0.5, [0.0, 0.5, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.5]),
        "both_at_once": (0.5, [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.5]),
        "only_ours": (0.5, [0.0, 0.0, 0.0, 0.495], [0.0, 0.0, 0.0, 0.48], [0.0, 0.0, 0.0, 0.25]),
        "nobody": (0.9, [0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.25]),
        "beyond_the_base": (0.05, [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.5]),
    }
    steps = (0, 2, 4, 8)
    runs = {
        (start, 4, seed): [
            {"step": step, "task": task, "test_accuracy": value}
            for task, values in tasks.items()
            for step, value in zip(steps, values[1 + i], strict=True)
        ]
        for i, start in enumerate(("ours", "good", "slow"))
        for seed in (0, 1)
    }
    full = {(4, seed): level("test_accuracy", **{task: values[0] for task, values in tasks.items()}) for seed in (0, 1)}
    keep(tmp_path / "k.jsonl.gz", runs, full)
    (lead,) = leads(tmp_path / "k.jsonl.gz").values()
    assert "beyond_the_base" not in lead.steps and len(lead.steps) == 6
    assert sorted(lead.in_a_quarter) == ["at_once", "only_ours", "quarter"]
    assert sorted(lead.no_later) == ["at_once", "both_at_once", "half", "only_ours", "quarter"]
    assert lead.next_start == "good" and lead.end.mean == pytest.approx((0.495 - 0.48) / 6)


def test_kept_leads_computed_again_without_the_code_of_studies():
    path = Path(__file__).parents[1] / "benchmarks/results/papers/starts.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file][1:]
    assert {line["start"].partition(":")[0] for line in lines} >= {"hypernetwork", "attended", "demonstrations", "random"}
    for size, lead in leads(path).items():
        curves, full = defaultdict(list), defaultdict(list)
        for line in (line for line in lines if line["size"] == size):
            curves[line["start"] == "hypernetwork", line["start"], line["task"]].append(line["values"])
            full[line["task"]].append(line["full_attention"])
        level = {task: sum(values) / len(values) for task, values in full.items()}
        first = {}
        for (ours, start, task), runs in curves.items():
            means = [sum(at) / len(runs) for at in zip(*runs, strict=True)]
            reached = [3 * i for i, value in enumerate(means) if value >= level[task] - 0.01 - 1e-9]
            first[ours, start, task] = min(reached, default=float("inf"))
        soonest = {task: min(step for (ours, _, t), step in first.items() if t == task and not ours) for task in level}
        own = {task: first[True, "hypernetwork", task] for task in level}
        counted = {task for task in level if level[task] >= 0.1}
        quarter = {t for t in counted if own[t] < float("inf") and own[t] < soonest[t] and 4 * own[t] <= soonest[t]}
        assert quarter == set(lead.in_a_quarter) and counted == set(lead.steps)
