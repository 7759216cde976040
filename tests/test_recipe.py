"""Recipes: every one in the repository is whole, and a wrong one is told about at once and in full."""

import json
import re
from pathlib import Path

import pytest
from data_files import write as write_file
from omegaconf import OmegaConf

from attention_masks import BACKENDS
from eval.methods import METHODS
from hyperllama.data.registry import SOURCES
from hyperllama.errors import UserError
from hyperllama.hypernetworks.registry import KINDS
from hyperllama.recipe.loading import _read, differences, load_any_recipe, load_recipe, save_recipe
from hyperllama.recipe.schema import EvaluationRecipe
from hyperllama.training.trainer import training_arguments

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

GOOD = """
output: out
model: {architecture: {model_type: llama, hidden_size: 32, max_position_embeddings: 64}, tokenizer: words}
limits: {context_tokens: 32, query_tokens: 8}
gist: {tokens: 4, kind: lora}
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


def places(value):
    """Every folder that a recipe expects to find."""
    if isinstance(value, list):
        return [place for part in value for place in places(part)]
    if not isinstance(value, dict):
        return []
    own = [
        value[key]
        for key in ("root", "hypernetwork", "prefixes", "prefix", "tune", "train", "evaluate")
        if isinstance(value.get(key), str)
    ]
    return own + [place for part in value.values() for place in places(part)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_is_whole(path, tmp_path, monkeypatch):
    # What a recipe expects to find is made here, so that the check does not depend on the machine.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in places(OmegaConf.to_container(_read(path))):
        if place.endswith(".yaml"):
            write_file(Path(place), (ROOT / place).read_text() if (ROOT / place).is_file() else "")
        else:
            Path(place).mkdir(parents=True, exist_ok=True)
    recipe = load_any_recipe(path)
    assert recipe.output.startswith("runs/")
    if recipe.method == "evaluate":
        assert set(recipe.methods) <= set(METHODS)
    elif recipe.method == "study":
        assert (ROOT / recipe.tune).is_file()
    elif recipe.method == "table":
        for changes in recipe.rows.values():
            own = [change.removeprefix("gist.kind=") for change in changes if change.startswith("gist.kind=")]
            (kind,) = own or [OmegaConf.load(ROOT / recipe.train).gist.kind]
            for start in (change.removeprefix("start_from=") for change in changes if change.startswith("start_from=")):
                write_file(Path(start) / "hypernetwork.json", json.dumps({**POOLING, "kind": kind}))
            load_recipe(recipe.train, changes, data=False)
        for changes in recipe.evaluations.values():
            load_recipe(recipe.evaluate, [*changes, "hypernetwork=null"], schema=EvaluationRecipe, data=False)
    else:
        training_arguments({**recipe.training, "use_cpu": True}, run=tmp_path / "run", seed=recipe.seed)


POOLING = {"kind": "pooling", "files": [], "gists": 4, "elastic": False, "dtype": "float32"}
POOLING |= {"base": {"name": "b", "weights": "w", "config": "c"}, "format_version": 4}


def test_a_start_of_another_kind_is_told_before_anything_loads(tmp_path):
    write_file(tmp_path / "old" / "hypernetwork.json", json.dumps(POOLING))
    found = problems(tmp_path, GOOD, [f"start_from={tmp_path}/old"])
    assert f"start_from: {tmp_path}/old is of kind pooling, not lora; set gist.kind=pooling, or start anew" in found[0]


def test_a_recipe_of_another_verb_is_told_its_own(tmp_path):
    assert "its method is evaluate; run it with hyperllama evaluate" in problems(tmp_path, "method: evaluate")[0]
    with pytest.raises(UserError, match="its method is hypernetwork; run it with hyperllama train"):
        load_recipe(write(tmp_path, GOOD), schema=EvaluationRecipe)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("format: {quary: x}", "format.quary: unknown key; did you mean format.query?"),
        ("data: {mixture: [{source: synthetic, shots: 2, min_shots: 3}]}", "data.mixture[0].min_shots: between 0 and"),
        ("data: {mixture: [{source: synthetic, min_shots: 3}]}", "data.mixture[0].shots: give it beside min_shots"),
        ("data: {mixture: [{source: sni, splot: x}]}", "data.mixture[0].splot: unknown key; did you mean split?"),
        ("data: {mixture: [{source: sni, root: nowhere}]}", "data.mixture[0].root: nowhere does not exist"),
        ("data: {mixture: [{source: text, root: ., text: {continuation_tokens: 1}}]}", "data.mixture[0].text: continuation"),
        ("data: {source: symbols, root: ., symbols: {kinds: [emoji]}}", "data.symbols: kinds: choose from integers"),
        ("data: {source: jsonl, hub: x}", "data.hub: source jsonl reads local files; give data.root instead"),
        ("data: {source: sni, hub: x, root: .}", "data: give root or hub, not both"),
        ("data: {source: templates, root: .}", "data.templates: templates: give P3's templates"),
        ("resamples: 3", "resamples: at least 100 for an interval, not 3"),
        ("hypernetwork: nowhere", "hypernetwork: nowhere is not a folder; train or compress first"),
        ("metric: f1", "metric: Invalid value 'f1'"),
    ],
)
def test_problems_of_an_evaluation(tmp_path, text, expected):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, f"method: evaluate\noutput: out\n{text}\n"), schema=EvaluationRecipe)
    (line,) = str(caught.value).splitlines()
    assert expected in line


def test_a_good_recipe_with_overrides(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["gist.tokens=8", "training.learning_rate=2e-3", "lora.targets=[q_proj]"])
    assert (recipe.gist.tokens, recipe.training["learning_rate"], recipe.lora.targets) == (8, 2e-3, ["q_proj"])
    again = load_recipe(write(tmp_path, save_recipe(recipe)))
    assert again == recipe and differences(save_recipe(recipe), save_recipe(again)) == []
    assert differences(save_recipe(recipe), GOOD)
    older = save_recipe(recipe).replace("  task_weights: equal\n", "")  # written before there was that key
    assert older != save_recipe(recipe) and differences(older, save_recipe(recipe)) == []
    other = load_recipe(write(tmp_path, GOOD), ["gist.tokens=8", "data.task_weights=size"])
    assert "data.task_weights" in differences(older, save_recipe(other))


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
            "{file}: limits: context_tokens, query_tokens and gists need 103 positions, but the model has 64",
        ),
        ("format: {query: x}", "{file}: format.query: must use {input} and no other field, not 'x'"),
        ("training: {max_steps: -1}", "{file}: training.max_steps: the synthetic language is endless, so say how many steps"),
        ("training: {output_dir: x}", "{file}: training.output_dir: is set by output; remove it"),
        (
            "training: {use_liger_kernel: true}",
            "{file}: training.use_liger_kernel: is applied to transformers' models only, not to what packs one; remove it",
        ),
        (
            "deepspeed: zero4",
            "{file}: deepspeed: zero4 is neither a file nor one of zero1, zero2, zero2-offload, zero3, zero3-offload",
        ),
        ("{deepspeed: zero1, training: {deepspeed: x}}", "{file}: training.deepspeed: is set by deepspeed; remove one of them"),
        ("model: {vocab_size: 9, tokenizer: bytes}", "{file}: model.vocab_size: at least 300, the bytes and some merges"),
        ("data: {source: jsonl}", "{file}: model.tokenizer: words knows the synthetic language only; choose bytes"),
        (
            "model: {name_or_path: .}",
            "{file}: model.name_or_path: . is not a model folder, it has no config.json; give one that has",
        ),
        ("gist: {kind: hint, tokens: -1}", "{file}: gist.tokens: at least 0, not -1"),
        (
            "{gist: {kind: hint, tokens: 0}, hint: {adapter_size: 0, fusion: false}}",
            "{file}: hint: nothing is generated: give gist.tokens, adapter_size, lora_rank or fusion",
        ),
        ("gist: {kind: hint, elastic: true}", "{file}: gist.elastic: the modules of hint have one size; set it to false"),
        (
            "gist: {kind: hint, chunking: {graph: parallel}}",
            "{file}: gist.chunking.graph: hint reads an instruction as a whole; choose single",
        ),
        (
            "{gist: {kind: hint}, hint: {regime: paper}, objectives: {distillation: 1}}",
            "{file}: objectives.distillation: the regime paper changes the model that would teach; set it to 0",
        ),
        ("data: {min_shots: 30}", "{file}: data.min_shots: between 0 and data.shots=16, not 30"),
        (
            "data: {synthetic: {split: dev}}",
            "{file}: data.synthetic.split: Invalid value 'dev', expected one of ['train', 'test']",
        ),
    ],
)
def test_each_problem_is_named(tmp_path, change, expected):
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


def test_names_that_are_not_registered_are_told_with_those_that_are(tmp_path):
    changes = ["gist.backend=sdpaa", "gist.kind=poolng", "data.source=snii"]
    with pytest.raises(UserError) as told:
        load_recipe(write(tmp_path, "output: out\n"), changes, data=False)
    for key, names, near in (
        ("gist.backend: sdpaa", ["auto", *BACKENDS], "sdpa"),
        ("gist.kind: poolng", KINDS, "pooling"),
        ("data.source: snii", SOURCES, "sni"),
    ):
        assert f"{key} is not one of {', '.join(names)}; did you mean {near}?" in str(told.value)


def test_a_recipe_extends_another(tmp_path):
    first = "output: one\ngist: {tokens: 4, kind: lora}\ntraining: {max_steps: 3, seed: 1}\n"
    write_file(tmp_path / "below" / "first.yaml", first)
    second = write_file(
        tmp_path / "second.yaml", "extends: below/first.yaml\ngist: {kind: pooling}\ntraining: {max_steps: 5}\n"
    )
    own = "output: three\nmodel: {architecture: {model_type: llama}}\n"
    third = write_file(tmp_path / "third.yaml", f"extends: second.yaml\n{own}")
    found = load_recipe(third, ["gist.tokens=8"])
    assert (found.output, found.gist.kind, found.gist.tokens) == ("three", "pooling", 8)
    assert found.training == {"max_steps": 5, "seed": 1}
    for text, said in (
        ("extends: gone.yaml", f"{second}: extends {tmp_path}/gone.yaml, but there is no such recipe file"),
        ("extends: third.yaml", "this recipe extends itself"),
        ("extends: [third.yaml]", "the path of a recipe, from this one's folder, not"),
    ):
        write_file(second, text)
        with pytest.raises(UserError, match=re.escape(said)):
            load_recipe(third)
