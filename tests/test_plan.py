"""`hyperllama check --gpus`: the plan of a training run, from a config alone."""

import json
import re

import pytest
from conftest import VOCABULARY, tiny_architecture, tiny_base
from data_files import lines, write
from typer.testing import CliRunner

from eval.check import check
from eval.flops import ModelCost
from eval.memory import SETTINGS, Parameters
from eval.plan import plan
from eval.sizing import Hardware, bare_model, base_config, largest_episode
from hyperllama import cli
from hyperllama.base import loading as base_loading
from hyperllama.base.outline import NF4_BYTES
from hyperllama.commands.train import packing_of
from hyperllama.data.packing import pack_gist
from hyperllama.errors import UserError
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.hypernetworks.settings import LoraSettings
from hyperllama.recipe.loading import load_recipe
from hyperllama.recipe.schema import GistRecipe, ModelRecipe, Recipe

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
# Fewer operations, which take their time to trace.
FEW = ["data.queries=1", "training.per_device_train_batch_size=1", "lora.targets=[k_proj]"]
LLAMA_7B |= {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}


@pytest.mark.parametrize("targets", [[], ["q_proj", "down_proj"]])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_parameters_are_those_of_the_model_that_is_built(kind, targets):
    architecture = tiny_architecture(kind, num_hidden_layers=3)
    model = ModelRecipe(architecture=architecture, vocab_size=VOCABULARY)
    lora = LoraSettings(rank=4, targets=targets)
    recipe = Recipe(output="out", model=model, gist=GistRecipe(kind="lora"), lora=lora)
    counts = Parameters.of(bare_model(recipe, base_config(recipe)))
    real = GistHypernetwork(tiny_base(kind, num_hidden_layers=3), gists=16, rank=4, targets=targets or "all-linear")
    assert counts.trained == sum(p.numel() for p in real.trainable().values())
    assert counts.frozen == sum(p.numel() for p in real.base.parameters())
    full = Parameters.of(bare_model(Recipe(method="full_attention", output="out", model=model), base_config(recipe)))
    assert (full.trained, full.frozen) == (counts.frozen, 0)


def test_a_known_model_by_hand():
    """Llama 2 7B: 6.738 billion parameters, and LoRA of rank 8 on all linear layers but four of the last layer's."""
    model = ModelRecipe(architecture=LLAMA_7B, vocab_size=32000)
    recipe = Recipe(output="out", model=model, gist=GistRecipe(kind="lora"), lora=LoraSettings(rank=8))
    counts = Parameters.of(bare_model(recipe, base_config(recipe)))
    assert counts.frozen == 6_738_415_616 and counts.largest == 4 * 32000 * 4096
    row = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert counts.trained == 16 * 4096 + 8 * (31 * row + 2 * (4096 + 4096))


@pytest.fixture
def recipe(tmp_path, saved_base):
    rows = [{"input": f"{i} " + "x" * (i % 60), "output": str(i)} for i in range(60)]
    write(tmp_path / "data" / "one.jsonl", lines(rows))
    return write(
        tmp_path / "r.yaml",
        f"""
output: {tmp_path}/run
model: {{name_or_path: {saved_base}}}
gist: {{tokens: 4, kind: lora}}
data: {{source: jsonl, root: {tmp_path}/data, shots: 5, queries: 2}}
limits: {{context_tokens: 300, query_tokens: 75, too_long_query: skip}}
training: {{max_steps: 7, per_device_train_batch_size: 2, gradient_accumulation_steps: 3}}
""",
    )


def shipped(tmp_path, monkeypatch, name="owner/model", **changes):
    """The config of a hub model, as it is shipped; the tests have no hub to ask."""
    folder = tmp_path / "shipped"
    write(folder / name.replace("/", "--") / "config.json", {**LLAMA_7B, **changes})
    monkeypatch.setattr(base_loading, "SHIPPED_CONFIGS", folder)
    return f"model.name_or_path={name}"


def figures(text: str) -> dict[str, list[float]]:
    """The table of a report: weights, gradients, optimiser, buffers, activations, what is beside them, peak."""
    found = re.findall(r"^  (no ZeRO|ZeRO-\d(?: offload)?)((?: +[\d,.]+)+) ", text, re.M)
    return {name: [float(cell.replace(",", "")) for cell in cells.split()][:7] for name, cells in found}


def test_the_report_with_data(recipe):
    text = check(recipe, hardware=Hardware.of(gpus=2, nodes=2), episodes=20)
    assert "tasks           1: one" in text and "drawn from the data" in text
    assert "one step        24 episodes (6 a GPU)" in text and "steps           7 (training.max_steps)" in text
    assert "type deepspeed=null" in text and set(figures(text)) == {str(setting) for setting in SETTINGS}
    epochs = check(recipe, ["training.max_steps=-1"], hardware=Hardware.of(gpus=1), episodes=20)
    assert "steps           15 (3 epochs of 60 examples)" in epochs


def test_the_report_without_data_or_tokenizer(recipe, tmp_path, monkeypatch):
    base = shipped(tmp_path, monkeypatch)
    text = check(recipe, [base, "data.root=/nowhere", "model.dtype=bfloat16"], hardware=Hardware.of(gpus=1, gpu="4090"))
    assert "figures of the data are left out: data.root: /nowhere is neither" in text
    assert "6,738,415,616 frozen" in text and "an upper bound, from limits and data.queries" in text
    # 304 rows of each context and a sink, twice two queries of 74 rows, one of whose 75 tokens is predicted and not read.
    assert "906 tokens (610 of contexts with gists), 256 targets" in text
    table = figures(text)
    assert table["no ZeRO"][0] == pytest.approx((6_738_415_616 * 2 + 4 * 39.6e6) / 1e9, abs=0.01)
    for cells in table.values():
        assert sum(cells[:6]) == pytest.approx(cells[6], abs=0.05)
    no_tokenizer = check(recipe, [base], hardware=Hardware.of(gpus=1))
    assert "left out: owner/model: has no tokenizer" in no_tokenizer
    with pytest.raises(UserError, match="data.root: /nowhere does not exist"):
        check(recipe, ["data.root=/nowhere"])


def test_the_cheapest_setting_that_fits(recipe, tmp_path, monkeypatch):
    base = [shipped(tmp_path, monkeypatch), "data.root=/nowhere", "model.dtype=bfloat16", "training.bf16=true", *FEW]
    full = [*base, "method=full_attention", "training.gradient_checkpointing=true", "deepspeed=zero2"]

    def choice(overrides, **hardware):
        text = check(recipe, overrides, hardware=Hardware.of(**hardware))
        return re.search("type deepspeed=(.*)", text)[1], figures(text), text

    assert choice(base, gpus=8, gpu="h100")[0] == "null"
    name, table, _ = choice(full, gpus=8, gpu="h200")
    assert name == "zero1" and "no ZeRO" not in table, "all weights in bf16 need float32 ones beside them"
    large = [*full, shipped(tmp_path, monkeypatch, num_hidden_layers=64)]
    name, table, _ = choice(large, gpus=8, nodes=2, gpu="a100-40")
    assert name == "zero3" and table["ZeRO-3"][6] <= 36 < min(table[key][6] for key in ("ZeRO-1", "ZeRO-2"))
    assert choice(full, gpus=1, gpu="h100")[0] == "zero2-offload"
    text = choice([*base, "deepspeed=zero3"], gpus=8)[2]
    assert "The recipe's own setting, deepspeed=zero3, fits too" in text
    own = write(tmp_path / "own.json", {})
    assert "is none of those above" in choice([*base, f"deepspeed={own}"], gpus=8)[2]


def test_nothing_fits(recipe, tmp_path, monkeypatch):
    base = [shipped(tmp_path, monkeypatch, num_hidden_layers=80), "data.root=/nowhere", "limits.context_tokens=3000"]
    base += [*FEW, "training.per_device_train_batch_size=2", "limits.context_tokens=4000"]
    text = check(recipe, base, hardware=Hardware.of(gpus=1, gpu="4090"))
    short = re.search(r"Nothing fits: the smallest, ZeRO-3 offload, needs ([\d.]+) GB, ([\d.]+) GB more than the 21.60", text)
    assert float(short[1]) - float(short[2]) == pytest.approx(21.6, abs=0.02)
    for change in ("gradient_checkpointing=true", "per_device_train_batch_size=1", "bf16=true"):
        assert f"with training.{change}: " in text
    assert "with model.quantize=nf4: " in text
    assert re.search("with .*checkpointing=true .*batch_size=1 .*nf4: fits, with deepspeed=null", text)


def test_four_bits_and_other_optimisers(recipe, tmp_path, monkeypatch):
    base = [shipped(tmp_path, monkeypatch), "data.root=/nowhere", "model.dtype=bfloat16"]
    text = check(recipe, [*base, "model.quantize=nf4", "training.optim=adafactor"], hardware=Hardware.of(gpus=1))
    assert "ZeRO-3" not in figures(text) and "ZeRO-3 is left out" in text
    assert "training.optim=adafactor is counted as AdamW" in text
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    weights = linear * NF4_BYTES + (6_738_415_616 - linear) * 2 + 4 * 39.6e6
    assert figures(text)["no ZeRO"][0] == pytest.approx(weights / 1e9, abs=0.01)


def test_time_by_hand(recipe, tmp_path, monkeypatch):
    overrides = [shipped(tmp_path, monkeypatch), "data.root=/nowhere", "training.max_steps=1000"]
    here = load_recipe(recipe, overrides, data=False)
    config = base_config(here)
    batch = pack_gist([largest_episode(here)] * 2, packing_of(here))
    step = ModelCost.of(config).train(batch.layout, len(batch.targets), rank=16).total * 3  # accumulated
    hours = 1000 * step / (312e12 * 0.5) / 3600
    text = "\n".join(plan(here, Hardware.of(gpus=4, nodes=2, gpu="a100-80", utilisation=0.5)))
    assert f"{hours * 8:,.2f} GPU-hours, at 50% of the peak" in text
    assert f"one step        48 episodes (6 a GPU), {batch.tokens * 3 * 8:,} tokens" in text


def test_text_windows_have_limits_of_their_own():
    recipe = Recipe(output="out")
    part = recipe.data.text
    windows = type(recipe)(output="out", data=type(recipe.data)(source="text", root="x"))
    episode = largest_episode(windows)
    assert len(episode.context) == part.context_tokens + 1
    assert [len(p) + len(a) for p, a in episode.queries] == [part.continuation_tokens]


def test_the_command_line(recipe, tmp_path, monkeypatch):
    base = shipped(tmp_path, monkeypatch)
    arguments = ["check", str(recipe), base, *FEW, "data.root=/nowhere", "--gpus", "8", "--nodes", "2", "--gpu", "h200"]
    shown = CliRunner().invoke(cli.app, [*arguments, "--utilisation", "0.3"])
    assert shown.exit_code == 0 and "plan: 2 x 8 H200, each 141.00 GB (131.3 GiB)" in shown.output
    assert "at 30% of the peak" in shown.output
    for options, said in (
        (["--gpus", "8", "--gpu", "t4"], "--gpu: no GPU t4 is known; choose from h200, h100, a100-80, a100-40, 4090"),
        (["--gpus", "0"], "--gpus: at least 1, not 0"),
        (["--gpus", "1", "--nodes", "0"], "--nodes: at least 1, not 0"),
        (["--gpus", "1", "--utilisation", "40"], "--utilisation: a share of the GPU's peak"),
        (["--gpu", "h100"], "--gpu is for a plan: give --gpus too"),
    ):
        wrong = CliRunner().invoke(cli.app, ["check", str(recipe), *options])
        assert isinstance(wrong.exception, UserError) and said in str(wrong.exception)


def test_bad_input_is_one_sentence(recipe, tmp_path, monkeypatch):
    base, one = shipped(tmp_path, monkeypatch), Hardware.of(gpus=1)
    for overrides, said in (
        (["training.per_device_train_batch_size=0"], "training.per_device_train_batch_size: a whole number, at least 1, not 0"),
        (["training.gradient_accumulation_steps=x"], "training.gradient_accumulation_steps: a whole number"),
        (["training.max_steps=many"], "training.max_steps: a whole number, not 'many'"),
        (["training.bf16=true", "training.fp16=true"], "products are computed in one of them"),
        (["method=full_attention", "model.quantize=nf4"], "which 4 bits cannot be"),
        (["lora.targets=[nope]"], "no linear layers"),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            check(recipe, [base, "data.root=/nowhere", *overrides], hardware=one)
        assert "\n" not in str(caught.value)
    evaluation = write(tmp_path / "e.yaml", f"method: evaluate\noutput: x\ndata: {{source: jsonl, root: {tmp_path}/data}}\n")
    with pytest.raises(UserError, match="plans a training run, but its method is evaluate"):
        check(evaluation, hardware=one)
    folder = tmp_path / "gpt2"
    write(folder / "config.json", json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="gpt2"):
        check(recipe, [f"model.name_or_path={folder}"], hardware=one)


def test_a_shipped_config_is_for_hub_names_only(tmp_path, monkeypatch):
    shipped(tmp_path, monkeypatch, name="owner/model", hidden_size=64, num_attention_heads=4)
    assert base_loading.find_config("owner/model").hidden_size == 64
    write(tmp_path / "owner" / "model" / "config.json", {**LLAMA_7B, "hidden_size": 32, "num_attention_heads": 4})
    monkeypatch.chdir(tmp_path)
    assert base_loading.find_config("owner/model").hidden_size == 32
    with pytest.raises(UserError, match="no such model folder"):
        base_loading.find_config("./owner/other")
