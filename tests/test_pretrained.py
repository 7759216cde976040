"""The hypernetwork that ships: its folder is whole and honest, it is found by name, and it works."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.time_to_answer import rows, table
from docs.make_pretrained import evaluation, main
from hyperllama import compress
from hyperllama.commands.generate import Session
from hyperllama.commands.inspect import inspect
from hyperllama.data.leaks import find_leaks
from hyperllama.errors import UserError
from hyperllama.hypernetworks.config import CARD, SHIPPED, read_config
from hyperllama.hypernetworks.hub import fetch
from hyperllama.recipe.loading import differences, load_recipe, save_recipe
from hyperllama.recipe.schema import EvaluationRecipe, TuneRecipe
from hyperllama.recipe.sources import make_source

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / SHIPPED["smollm2"]
RECIPE = ROOT / "recipes" / "pretrained" / "smollm2-135m.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "pretrained.json"


def test_it_is_found_by_name_and_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = fetch(Path("smollm2"))
    config = read_config(folder)
    assert folder == FOLDER and config["elastic"] and config["gists"] == 32
    weights = [load_file(folder / name) for name in config["files"] if name.endswith(".safetensors")]
    assert weights and {x.dtype for tensors in weights for x in tensors.values()} == {torch.bfloat16}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6


def test_recipes_name_it_too():
    asked = load_recipe(ROOT / "recipes" / "pretrained" / "evaluate.yaml", ["hypernetwork=smollm2"], schema=EvaluationRecipe)
    tuned = load_recipe(ROOT / "recipes" / "toy" / "tune.yaml", ["start.hypernetwork=smollm2"], schema=TuneRecipe)
    assert asked.hypernetwork == tuned.start.hypernetwork == str(FOLDER)
    assert inspect("smollm2")["finished"]


def test_without_its_base_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("examples.jsonl").write_text('{"input": "cat", "output": "cats"}\n')
    with pytest.raises(UserError, match="hyperllama fetch smollm2"):
        compress("smollm2", ["examples.jsonl"], "out.safetensors")


def test_the_card_tells_data_use_and_the_measured_figures():
    card = (FOLDER / CARD).read_text()
    assert card.index("## Data") < card.index("## Evaluation")
    assert card.endswith(evaluation(json.loads(RESULTS.read_text())))


def test_it_was_trained_by_the_recipe_that_is_there():
    trained, recipe = (FOLDER / "recipe.yaml").read_text(), load_recipe(RECIPE, data=False)
    assert not differences(trained, save_recipe(recipe))
    assert json.loads((FOLDER / "result.json").read_text())["steps"] == recipe.training["max_steps"]


def test_nothing_that_it_is_evaluated_on_was_in_its_training(real_data, monkeypatch):
    folder = str(real_data.resolve())
    monkeypatch.chdir(ROOT)
    data, asked = load_recipe(RECIPE, data=False).data, ROOT / "recipes" / "pretrained" / "evaluate.yaml"
    parts = [dataclasses.replace(part, root=part.root.replace("../shared/data", folder)) for part in data.mixture]
    trained = make_source(dataclasses.replace(data, mixture=parts))
    assert not find_leaks(trained.provenance(), make_source(load_recipe(asked, schema=EvaluationRecipe).data).provenance())


def test_its_folder_is_made_of_a_run(tmp_path):
    main(FOLDER, tmp_path / "made", RESULTS)
    again = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir() if file.name != CARD}
    assert again == {file.name: file.read_bytes() for file in FOLDER.iterdir() if file.name != CARD}


@pytest.mark.real
def test_it_compresses_and_refines(smollm2, tmp_path):
    examples = ROOT / "recipes" / "words" / "test" / "plural.jsonl"
    ((_, prefix),) = compress(
        "smollm2", [examples], tmp_path / "plural.safetensors", shots=16, gists=16, refine=4, base_path=str(smollm2)
    )
    assert prefix.rows == 16 and prefix.manifest.refined["steps"] == 4
    answers = Session(tmp_path / "plural.safetensors", base_path=str(smollm2)).answer(["wolf", "story", "tiger", "lamp"])
    assert sum(map(str.__eq__, answers, ["wolves", "stories", "tigers", "lamps"])) >= 3


def test_the_page_has_the_times_that_were_measured():
    lines = json.loads((ROOT / "benchmarks" / "results" / "time_to_answer.json").read_text())["lines"]
    assert table(lines) in (ROOT / "docs" / "performance.md").read_text()
    tasks = {(line["task"], line["seed"]) for line in lines}
    assert len(tasks) * len(rows(lines)) == len(lines), "every task went through every method"
