"""Recipes: every one in the repository is whole, and a wrong one is told about at once and in full."""

from pathlib import Path

import pytest

from hyperllama.errors import UserError
from hyperllama.recipe import differences, load_recipe, save_recipe
from hyperllama.training import training_arguments

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

GOOD = """
output: out
model: {architecture: {model_type: llama, hidden_size: 32, max_position_embeddings: 64}, tokenizer: words}
limits: {context_tokens: 32, query_tokens: 8}
gist: {tokens: 4}
training: {max_steps: 3}
"""


def write(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    return tmp_path / "r.yaml"


def problems(tmp_path, text, overrides=()):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    return str(caught.value).splitlines()


def test_there_are_recipes():
    assert len(RECIPES) >= 4, RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_is_whole(path, tmp_path, monkeypatch):
    # What a recipe expects to find is made here, so that the check does not depend on the machine.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    recipe = load_recipe(path, ["data.root=data"])
    assert recipe.output.startswith("runs/")
    training_arguments({**recipe.training, "use_cpu": True}, run=tmp_path / "run", seed=recipe.seed)


def test_a_good_recipe_with_overrides(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["gist.tokens=8", "training.learning_rate=2e-3", "lora.targets=[q_proj]"])
    assert (recipe.gist.tokens, recipe.training["learning_rate"], recipe.lora.targets) == (8, 2e-3, ["q_proj"])
    again = load_recipe(write(tmp_path, save_recipe(recipe)))
    assert again == recipe and differences(save_recipe(recipe), save_recipe(again)) == []
    assert differences(save_recipe(recipe), GOOD)


@pytest.mark.parametrize(
    "change, expected",
    [
        ("gist: {token: 4}", "{file}: gist.token: unknown key; did you mean gist.tokens?"),
        ("outputs: x", "{file}: outputs: unknown key; did you mean output?"),
        ("training: {max_step: 3}", "{file}: training.max_step: unknown key; did you mean training.max_steps?"),
        ("gist: {tokens: many}", "{file}: gist.tokens: Value 'many' of type 'str' could not be converted to Integer"),
        ("method: prompt", "{file}: method: Invalid value 'prompt', expected one of ['hypernetwork', 'full_attention']"),
        ("data: {source: sni}", "{file}: data.root: give the folder or file of source sni"),
        (
            "data: {source: sni, root: nowhere}",
            "{file}: data.root: nowhere does not exist; set it to where your copy of the data is",
        ),
        (
            "limits: {context_tokens: 90}",
            "{file}: limits: context_tokens, query_tokens and gists need 102 positions, but the model has 64",
        ),
        ("format: {query: x}", "{file}: format.query: must use {input} and no other field, not 'x'"),
        ("training: {max_steps: -1}", "{file}: training.max_steps: the synthetic language is endless, so say how many steps"),
        ("training: {output_dir: x}", "{file}: training.output_dir: is set by output; remove it"),
        ("model: {vocab_size: 9, tokenizer: bytes}", "{file}: model.vocab_size: at least 300, the bytes and some merges"),
        ("data: {source: jsonl}", "{file}: model.tokenizer: words knows the synthetic language only; choose bytes"),
        (
            "model: {name_or_path: .}",
            "{file}: model.name_or_path: . is not a model folder, it has no config.json; give one that has",
        ),
        ("data: {min_shots: 30}", "{file}: data.min_shots: between 0 and data.shots=16, not 30"),
        (
            "data: {synthetic: {split: dev}}",
            "{file}: data.synthetic.split: Invalid value 'dev', expected one of ['train', 'test']",
        ),
    ],
)
def test_each_problem_is_named(tmp_path, change, expected):
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.create(GOOD), OmegaConf.create(change)))
    assert expected.replace("{file}", str(tmp_path / "r.yaml")) in problems(tmp_path, text)


def test_all_problems_come_at_once(tmp_path):
    text = GOOD + "speed: fast\nlora: {rank: 0, ranks: 2, alpha: big}\n"
    found = problems(tmp_path, text, ["gist.tokenz=3", "nonsense", "data.shots=few"])
    assert len(found) == 7
    assert [line.split(":")[0] == "command line" for line in found].count(True) == 3


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "missing.yaml")
    assert "not YAML" in problems(tmp_path, "a: [1")[0]
    assert "a recipe is a mapping of keys, this is list" in problems(tmp_path, "- a")[0]


def test_training_arguments_that_transformers_refuses(tmp_path):
    with pytest.raises(UserError, match="training: .*lr_scheduler|training: .*valid"):
        training_arguments({"use_cpu": True, "lr_scheduler_type": "zigzag"}, run=tmp_path, seed=0)
