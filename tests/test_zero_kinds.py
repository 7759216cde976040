"""Every kind of hypernetwork with gradient checkpointing, over a base that ZeRO keeps in parts or in 4 bits, or both."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_architecture
from data_files import WORDS, lines, write
from launch import run, torchrun, zero_settings
from safetensors.torch import load_file
from transformers import set_seed

from hyperllama.base.loading import random_base
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.files import whole_json_lines

SCRIPT = Path(__file__).parent / "several_runs.py"
CASES = {
    "pooling": ["gist.kind=pooling"],
    "pooling with LoRA": ["gist.kind=pooling", "pooling.lora=true"],
    "full": ["gist.kind=full"],
    "hint": ["gist.kind=hint"],
    "hint trained whole": ["gist.kind=hint", "hint.regime=paper"],
}
NF4 = {f"{kind} in 4 bits": [*CASES[kind], "model.quantize=nf4"] for kind in ("pooling", "pooling with LoRA", "full", "hint")}

AGAIN = {f"{kind}, begun before": CASES[kind] for kind in ("full", "hint trained whole")}


@pytest.fixture(scope="module")
def cases():
    """What can be tried here."""
    pytest.importorskip("deepspeed")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return CASES
    return CASES | NF4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Ragged episodes, plain gradient descent: weights differ by as much as gradients do."""
    folder = tmp_path_factory.mktemp("kinds")
    tokenizer = train_tokenizer(["a few words to learn from, and their answers"], kind="bytes", vocab_size=300)
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # blocks of 64 weights divide them
    # Attention that is not so sharp that two tokens are attended to alike: a choice between them would be of rounding.
    architecture = tiny_architecture("llama", **sizes, initializer_range=0.1)
    model = random_base(architecture, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, answer in (("upper", str.upper), ("twice", lambda w: f"{w} {w} {w}"), ("first", lambda w: w[0])):
        write(folder / "data" / f"{name}.jsonl", lines([{"input": w, "output": answer(w)} for w in WORDS.split()[:24]]))
    return write(
        folder / "train.yaml",
        f"""
output: {folder}/none
model: {{name_or_path: {folder}/base}}
gist: {{tokens: 2}}
lora: {{rank: 2}}
hint: {{adapter_size: 4, lora_rank: 2, fusion_rank: 2, mlp_size: 8}}
data: {{source: jsonl, root: {folder}/data, shots: 5, min_shots: 1, queries: 3}}
limits: {{context_tokens: 60, query_tokens: 21, too_long_query: skip}}
training: {{use_cpu: true, disable_tqdm: true, max_steps: 2, per_device_train_batch_size: 2, learning_rate: 0.1, optim: sgd,
            lr_scheduler_type: constant, logging_steps: 1, save_strategy: "no"}}
""",
    )


def runs_of(recipe, cases, how, settings):
    """A file of what `several_runs.py` is to train: cases, and those that begin with the weights of another."""
    place = recipe.parent
    runs = [[*own, *settings, f"output={place}/{how}/{name}"] for name, own in cases.items()]
    for name, own in zip(cases, runs, strict=True):
        if name in AGAIN:
            own.append(f"start_from={place}/one/{name.partition(',')[0]}")
    return write(place / f"runs-{how}.json", json.dumps(runs))


@pytest.fixture(scope="module")
def one(recipe, cases):
    """The folder of what one process trains, without checkpointing."""
    runs = runs_of(recipe, cases | AGAIN, "one", ["training.gradient_accumulation_steps=2"])
    done = run(SCRIPT, recipe, runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "one"


def losses(folder):
    return [line["loss"] for line in whole_json_lines(folder / "metrics.jsonl") if "loss" in line]


def weights(folder):
    return {f"{path.name} {name}": x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_kind_trains_what_one_process_trains(recipe, one, cases, stage):
    # As with a model that does not fit: under ZeRO-3 nothing stays gathered from one module to another.
    keep = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    settings = zero_settings(recipe.parent, stage, **keep)
    cases = cases | AGAIN if stage == 3 else cases  # only there are a model's weights in parts when others are read into them
    changes = [f"deepspeed={settings}", "training.gradient_checkpointing=true"]
    torchrun(SCRIPT, recipe, runs_of(recipe, cases, f"zero{stage}", changes))
    for name in cases:
        found, wanted = recipe.parent / f"zero{stage}" / name, one / name
        assert len(losses(wanted)) == 2 and losses(found) == pytest.approx(losses(wanted), abs=1e-5), name
        ours, theirs = weights(found), weights(wanted)
        assert ours.keys() == theirs.keys() and theirs, name
        for key, weight in theirs.items():
            torch.testing.assert_close(ours[key], weight, atol=1e-5, rtol=1e-5, msg=f"{name}: {key}")
