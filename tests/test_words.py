"""The word tasks: enough of them, long enough, and none that an evaluation shares with training."""

import json
from pathlib import Path

import pytest

from benchmarks.headroom import SHOTS, table
from hyperllama.data.json_lines import read_json_lines_tasks
from hyperllama.data.leaks import find_leaks
from hyperllama.recipe.loading import load_recipe
from hyperllama.recipe.schema import DataRecipe, SourceRecipe
from hyperllama.recipe.sources import make_source

ROOT = Path(__file__).parent.parent
WORDS = ROOT / "recipes" / "words"
RESULTS = ROOT / "benchmarks" / "results" / "words_headroom.json"


def source(split, labelled=False):
    settings = {"source": "symbols", "root": str(WORDS / "labelled"), "split": split} if labelled else {"source": "jsonl"}
    return make_source(DataRecipe(**{"root": str(WORDS / split), "instances_per_task": 1000, **settings}))


@pytest.mark.parametrize("split", ["train", "test"])
def test_tasks_have_forty_different_inputs_or_more(split):
    tasks = read_json_lines_tasks(str(WORDS / split), instances=1000).tasks
    assert len(tasks) >= {"train": 60, "test": 16}[split]
    assert not [task.name for task in tasks if len(task.examples) < 40]
    assert not [task.name for task in tasks if task.repetition != (0, 0)]
    assert not [(task.name, e) for task in tasks for e in task.examples if not e.input.strip() or not e.output.strip()]
    labelled = source(split, labelled=True)
    assert labelled.repetition() == {name: (0, 0) for name in labelled.repetition()} and len(labelled) >= 40 * len(
        labelled.sets
    )


def test_nothing_of_the_evaluation_is_in_training():
    """Inputs and names of tasks; inputs of fewer than five letters too, numbers aside, which the leak check does not count."""
    training, evaluation = ([source(split), source(split, labelled=True)] for split in ("train", "test"))
    for seen in training:
        for asked in evaluation:
            assert not find_leaks(seen.provenance(), asked.provenance())
    seen, asked = (
        {text.strip().lower() for one in side for text in one.provenance().inputs} for side in (training, evaluation)
    )
    assert not {text for text in seen & asked if not text.isdigit()}


@pytest.mark.parametrize("name", ["quickstart/hypernetwork", "words/hypernetwork"])
def test_recipes_train_on_training_tasks_alone(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert recipe.data.root == "recipes/words/train" and isinstance(recipe.data, SourceRecipe)


def test_the_page_has_every_task_and_what_the_base_does():
    page, found = (ROOT / "docs" / "words.md").read_text(), json.loads(RESULTS.read_text())["tasks"]
    for folder, tasks in found.items():
        names = {path.stem for path in (ROOT / folder).glob("*.jsonl")}
        assert set(tasks) == names and all(f"`{name}`" in page for name in names)
        assert table({task: {shots: each[str(shots)] for shots in SHOTS} for task, each in tasks.items()}) in page
