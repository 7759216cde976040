"""Recipes for published bases: their configs are the published ones, and each trains two steps on a tiny model of its kind."""

import json
import math
import re
import subprocess
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from data_files import lines, write
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hyperllama.base.checks import check_config
from hyperllama.base.loading import random_base
from hyperllama.commands import train as commands_train
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.hypernetworks import loading as hypernetworks_loading
from hyperllama.recipe.loading import load_recipe, save_recipe
from hyperllama.recipe.sources import make_source

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "recipes" / "models"
RECIPES = sorted((ROOT / "recipes" / "train").glob("*.yaml"))
# Published numbers of parameters: what the files of weights on the hub add up to, a tied head counted once.
PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen3-0.6B-Base": 596_049_920,
    "Qwen/Qwen3-4B-Base": 4_022_468_096,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
}
NAMES = [path.stem for path in RECIPES]


def written(path):
    """What a recipe says, with what it extends."""
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    return merged(written(path.parent / own.pop("extends")), own) if "extends" in own else own


def merged(below, above):
    both = below.keys() & above.keys()
    nested = {key: merged(below[key], above[key]) for key in both if isinstance(below[key], dict)}
    return {**below, **above, **nested}


def config_of(base):
    return MODELS / base.replace("/", "--")


def test_every_base_has_a_config_and_a_mixture():
    on_mixture = {written(path)["model"]["name_or_path"] for path in RECIPES if path.stem.endswith("-mixture")}
    assert on_mixture == set(PARAMETERS)
    assert {path.name.replace("--", "/") for path in MODELS.iterdir()} == set(PARAMETERS)
    assert {written(path)["model"]["name_or_path"] for path in RECIPES} <= set(PARAMETERS)


@pytest.mark.parametrize("base", PARAMETERS)
def test_a_config_gives_the_published_number_of_parameters(base):
    config = AutoConfig.from_pretrained(config_of(base))
    check_config(config, base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[base]


def test_pooling_differs_from_the_mixture_in_its_kind_only():
    """Which won where both were trained (docs/results.md): pooling that reads contexts with LoRA."""
    recipes = [path for path in RECIPES if path.stem.endswith("-pooling")]
    assert len(recipes) == 6
    for path in recipes:
        changed = {"gist": {"tokens": 16, "kind": "pooling"}, "pooling": {"lora": True}, "output": f"runs/{path.stem}"}
        assert written(path) == {**written(path.with_name(path.name.replace("-pooling", "-mixture"))), **changed}
    path = ROOT / "recipes" / "train" / "qwen3-8b-pooling.yaml"
    resolved = OmegaConf.to_container(OmegaConf.create(save_recipe(load_recipe(path, data=False))))
    for key, value in written(path).items():
        if key != "data":  # whose mixture is filled up
            assert value == (resolved[key] if not isinstance(value, dict) else {one: resolved[key][one] for one in value})


def test_mixtures_differ_in_their_base_only():
    """So that bases can be compared, and the multi-task baseline with the hypernetwork."""
    same = [written(path) for path in RECIPES if "mixture" in path.stem or "multi-task" in path.stem]
    for recipe in same:
        for key in ("seed", "data", "format", "limits"):
            assert recipe[key] == same[0][key], (recipe["output"], key)
        if recipe["method"] == "hypernetwork":
            assert (recipe["gist"], recipe["lora"]) == ({"tokens": 16, "kind": "lora"}, {"rank": 8, "alpha": 16})


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_hardware_and_global_batch_are_what_is_said(path):
    recipe, text = written(path), path.read_text(encoding="utf-8")
    head = re.search(
        r"# Written for (\d+) x (\d+) GB: (\d+) episodes on a GPU, (\d+) times, are a global batch of (\d+)\.", text
    )
    gpus, memory, each, times, batch = map(int, head.groups())
    training = recipe["training"]
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (each, times)
    assert gpus * each * times == batch
    assert (gpus > 1) == bool(recipe.get("deepspeed")), "one GPU has nothing to share out"
    assert recipe["output"] == f"runs/{path.stem}"
    (row,) = [line for line in (ROOT / "docs/train.md").read_text(encoding="utf-8").splitlines() if f"`{path.stem}`" in line]
    assert f"{gpus} x {memory} GB" in row and recipe.get("deepspeed", "one process") in row


def tiny(published):
    """A published config, shrunk: the same kind of model, rotary embedding, tying, and numbers of heads to each other."""
    heads, kv_heads = published["num_attention_heads"], published["num_key_value_heads"]
    width = published.get("head_dim", published["hidden_size"] // heads) * heads
    few = 2 * heads // kv_heads
    hidden = 16 * few * published["hidden_size"] // width
    small = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": few,
        "num_key_value_heads": 2,
        **({"head_dim": 16} if "head_dim" in published else {}),
    }
    left_out = ("architectures", "torch_dtype", "vocab_size", "bos_token_id", "eos_token_id")  # the tokenizer's, and none
    return {key: value for key, value in {**published, **small}.items() if key not in left_out}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder for each base: a tiny random model like it, and a byte-level tokenizer."""
    tokenizer = train_tokenizer(["a few words to learn from, and their answers"], kind="bytes", vocab_size=300)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    folder = tmp_path_factory.mktemp("bases")
    for base in PARAMETERS:
        set_seed(0)
        published = json.loads((config_of(base) / "config.json").read_text(encoding="utf-8"))
        random_base(tiny(published), vocab_size=len(tokenizer), **special).save_pretrained(folder / base)
        tokenizer.save_pretrained(folder / base)
    return folder


@pytest.mark.parametrize("base", PARAMETERS)
def test_a_tiny_base_is_of_the_same_kind(bases, base):
    small, published = (AutoConfig.from_pretrained(folder) for folder in (bases / base, config_of(base)))
    for key in (
        "model_type",
        "tie_word_embeddings",
        "rope_parameters",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
    ):
        assert getattr(small, key) == getattr(published, key), key
    assert proportions(small) == proportions(published)


def proportions(config):
    """Query heads to key-value heads, and the width of the attention to that of the model."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    return heads / config.num_key_value_heads, heads * head_dim / hidden


SETS = ("sst2", "cola", "qnli", "qqp", "mrpc", "labeled_final", "rotten_tomatoes", "ag_news", "sentiment", "irony", "offensive")
TASKS = {"p3": {"ag_news_which", "glue_mrpc_same"}, "sni": {"t1", "t2"}, "symbols": set(SETS)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder to run in: S-NI is where recipes look for it, copies of what they fetch from the hub are beside it."""
    data = tmp_path_factory.mktemp("place") / "shared" / "data"
    for config in TASKS["p3"]:
        rows = [{"inputs_pretokenized": f"{config} {i}?", "targets_pretokenized": "ab"[i % 2]} for i in range(12)]
        write(data / "p3" / config / "train.jsonl", lines(rows))
    write(data / "sni" / "splits" / "default" / "train_tasks.txt", "\n".join(sorted(TASKS["sni"])))
    for name in TASKS["sni"]:
        shown = [{"input": f"{name} s{i}", "output": str(i), "explanation": ""} for i in range(2)]
        asked = [{"id": str(i), "input": f"{name} q{i}", "output": [str(i)]} for i in range(12)]
        write(data / "sni" / "tasks" / f"{name}.json", {
            "Definition": [f"Do {name}."], "Positive Examples": shown, "Instances": asked,
        })  # fmt: skip
    for name in SETS:
        rows = [{"text": f"{name} {i}", "label": ("no", "yes", "so")[i % 3], "label_id": i % 3} for i in range(30)]
        write(data / "symbols" / name / "train.jsonl", lines(rows))
    here = data.parent.parent / "here"
    here.mkdir()
    return here


def local(part):
    """A source of a recipe with its hub names replaced by folders of the same layout."""
    part = {key: value if key != "mixture" else [local(one) for one in value] for key, value in part.items()}
    if part.pop("hub", None):
        part["root"] = f"../shared/data/{part['source']}"
    if "symbols" in part:
        # As a set of the hub is named: by its configuration, or by its repository.
        names = [re.split("[:/]", name)[-1] for name in part["symbols"]["sets"]]
        part["symbols"] = {**part["symbols"], "sets": names}
    return part


CPU = ["deepspeed=null", "model.quantize=null", "training.max_steps=2", "training.per_device_train_batch_size=2"]
CPU += [f"training.{key}" for key in ("gradient_accumulation_steps=2", "logging_steps=1", "use_cpu=true", "disable_tqdm=true")]


def from_zero(trained):
    """What starts at zero of a hypernetwork, so that it shows whether a step has been taken."""
    if trained.kind == "hint":
        return [trained.generator.mlps["adapter_up"][2].weight, *trained.fusion.B]
    own = [trained.maps] if trained.kind == "pooling" else []
    assert len(trained.lora.B) == 7 + 2  # all projections of the first layer, keys and values of the last
    return [*own, *(matrix.weight for matrix in trained.lora.B.values())]


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_takes_two_steps(path, bases, place, tmp_path, monkeypatch):
    """All of a recipe's own settings but places, batch, number of steps, and what needs a GPU."""
    monkeypatch.chdir(place)
    recipe = written(path)
    base = bases / recipe["model"]["name_or_path"]
    changed = write(tmp_path / path.name, yaml.safe_dump({**recipe, "data": local(recipe["data"])}))
    overrides = [*CPU, f"model.name_or_path={base}"]
    if recipe["method"] == "full_attention":  # without DeepSpeed nothing keeps float32 weights beside bf16 ones
        overrides.append("model.dtype=float32")
    result = commands_train.train(changed, overrides)
    run = place / recipe["output"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert result.global_step == len(losses) == 2 and all(0 < loss < math.inf for loss in losses)
    assert all(line["targets"] > 0 and not line["skipped_queries"] for line in logged if "loss" in line)
    if recipe["method"] == "hypernetwork":
        trained, _ = hypernetworks_loading.load_hypernetwork(run, dtype="bfloat16")
        assert trained.kind == recipe["gist"]["kind"] and trained.num_gists == 16 and trained.base.dtype == torch.bfloat16
        moved = [matrix.abs().max() > 0 for matrix in from_zero(trained)]
        assert all(moved) and moved
    else:
        before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").state_dict() for folder in (base, run))
        assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    data = load_recipe(changed, overrides).data
    source, drawn = make_source(data), Random(0)
    tasks = {source.draw(drawn, 2, 1, i).task for i in range(200)}
    assert tasks == set().union(*(TASKS[part.source] for part in data.parts))


def test_slurm_starts_torchrun_on_every_node(tmp_path):
    """The script with stand-ins for Slurm's commands: what torchrun is told, and where the nodes meet."""
    stand_ins = {
        "scontrol": '[ "$*" = "show hostnames gpu[7-8]" ] && printf "gpu7\\ngpu8\\n"',
        "srun": 'echo "cpus $SRUN_CPUS_PER_TASK"; exec "$@"',
        "torchrun": 'printf "%s\\n" "$@"',
    }
    for name, body in stand_ins.items():
        write(tmp_path / "bin" / name, f"#!/bin/bash\n{body}\n").chmod(0o755)
    write(tmp_path / ".venv" / "bin" / "activate", "")
    slurm = {"JOB_NODELIST": "gpu[7-8]", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "4", "JOB_ID": "612345", "CPUS_PER_TASK": "9"}
    environment = {f"SLURM_{key}": value for key, value in slurm.items()} | {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    command = ["bash", str(ROOT / "recipes" / "slurm.sh"), "a recipe.yaml", "training.max_steps=2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    cpus, *told = done.stdout.splitlines()
    assert cpus == "cpus 9"
    meeting = ["--rdzv_id", "612345", "--rdzv_backend", "c10d", "--rdzv_endpoint", "gpu7:22345"]
    started = ["-m", "hyperllama", "train", "a recipe.yaml", "training.max_steps=2"]
    assert told == ["--nnodes", "2", "--nproc_per_node", "4", *meeting, *started]
