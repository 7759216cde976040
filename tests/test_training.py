"""Training: the loss in tokens, resuming, several processes, what a run's folder holds. Equivalence e of the design."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_architecture, tiny_base, trained_hypernetwork
from launch import torchrun
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.commands import compress as commands_compress
from hyperllama.commands import generate as commands_generate
from hyperllama.commands import train as commands_train
from hyperllama.data.packing import pack_gist
from hyperllama.data.stream import Collator
from hyperllama.data.text import EncodedEpisode
from hyperllama.errors import UserError
from hyperllama.files import whole_json_lines
from hyperllama.hypernetworks import loading as hypernetworks_loading
from hyperllama.hypernetworks.row_lora import ADAPTER_WEIGHTS
from hyperllama.recipe.loading import load_recipe
from hyperllama.training.checkpoints import newest_checkpoint
from hyperllama.training.full_attention import ADAPTER, FullAttention, lora_config
from hyperllama.training.trainer import GistTrainer, training_arguments

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(tmp_path, saved_base):
    """A recipe that trains a hypernetwork on a folder of JSON lines in a second."""
    data = tmp_path / "data"
    data.mkdir()
    for name, answer in (("upper", str.upper), ("reverse", lambda w: w[::-1])):
        lines = [json.dumps({"input": w, "output": answer(w)}) for w in ("one", "two", "three", "four", "five", "six")]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
output: {tmp_path}/run
model: {{name_or_path: {saved_base}}}
gist: {{tokens: 2, kind: lora}}
lora: {{rank: 2, dropout: 0.1}}
data: {{source: jsonl, root: {data}, shots: 3, queries: 2}}
limits: {{context_tokens: 120, query_tokens: 60}}
training:
  use_cpu: true
  disable_tqdm: true
  max_steps: 6
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 1.0e-2
  logging_steps: 1
  save_steps: 2
""")
    return path


def losses(run):
    return [
        (line["step"], line["loss"], line["grad_norm"])
        for line in whole_json_lines(Path(run) / "metrics.jsonl")
        if "loss" in line
    ]


def hyperllama(*arguments, **settings):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "hyperllama", *map(str, arguments)], capture_output=True, text=True, env=environment, **settings
    )


def test_a_run_leaves_all_that_describes_it(recipe, tmp_path):
    result = commands_train.train(recipe)
    run = tmp_path / "run"
    assert result.global_step == 6 and [step for step, *_ in losses(run)] == [1, 2, 3, 4, 5, 6]
    names = {path.name for path in run.iterdir()}
    assert names >= {"recipe.yaml", "versions.json", "metrics.jsonl", "loss.png", "result.json", "adapter_model.safetensors",
                     "adapter_config.json", "gists.safetensors", "hypernetwork.json", "README.md", "checkpoints"}  # fmt: skip
    first = whole_json_lines(run / "metrics.jsonl")[0]
    assert first["targets"] > 0 and first["demonstrations"] == 4 * 3 and first["dropped_demonstrations"] == 0
    assert json.loads((run / "versions.json").read_text())["torch"] == torch.__version__
    saved = {path.name for path in (run / "checkpoints" / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= saved
    assert not any(name.startswith("model") for name in saved), "the frozen base is not in a checkpoint"
    assert commands_train.train(recipe) is None, "a finished run is left alone"


def test_e_resuming_is_never_having_stopped(recipe, tmp_path):
    commands_train.train(recipe)
    whole = losses(tmp_path / "run")
    stopped = recipe.with_name("stopped.yaml")
    stopped.write_text(recipe.read_text().replace(f"{tmp_path}/run", f"{tmp_path}/stopped"))
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    original = GistTrainer.__init__

    def with_stop(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Stop())

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GistTrainer, "__init__", with_stop)
        commands_train.train(stopped)
    assert newest_checkpoint(tmp_path / "stopped" / "checkpoints").endswith("checkpoint-4")
    commands_train.train(stopped)
    assert losses(tmp_path / "stopped") == whole, "dropout, optimiser, schedule and data go on where they were"
    weights = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("run", "stopped")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_kill_9_and_train_again(recipe, tmp_path):
    commands_train.train(recipe)
    killed = recipe.with_name("killed.yaml")
    killed.write_text(recipe.read_text().replace(f"{tmp_path}/run", f"{tmp_path}/killed"))
    command = [sys.executable, "-m", "hyperllama", "train", str(killed)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    deadline = time.time() + 120
    while newest_checkpoint(tmp_path / "killed" / "checkpoints") is None and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "killed before it was done"
    again = hyperllama("train", killed)
    assert again.returncode == 0 and "going on from" in again.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "run")


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    for step, content in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content:
            (folder / "trainer_state.json").write_text(content)
        (folder / "step.json").write_text('{"processes": 1, "batch": 1, "accumulation": 1}')
    (tmp_path / "checkpoint-16").mkdir()
    (tmp_path / "checkpoint-16" / "trainer_state.json").write_text('{"global_step": 16}')  # copied without its last file
    assert newest_checkpoint(tmp_path).endswith("checkpoint-10")
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_another_recipe_does_not_go_on_in_the_same_folder(recipe, tmp_path):
    commands_train.train(recipe, ["training.max_steps=2"])
    with pytest.raises(UserError, match=r"holds a run of another recipe \(it differs in gist.tokens, training.max_steps\)"):
        commands_train.train(recipe, ["gist.tokens=3"])


def test_workers_and_bf16_and_tensorboard(recipe, tmp_path):
    """Data from two worker processes is the same data; a run in bf16 trains; TensorBoard gets its file."""
    commands_train.train(recipe)
    runs = {"workers": ["training.dataloader_num_workers=2"], "bf16": ["training.bf16=true", "training.report_to=tensorboard"]}
    for name, overrides in runs.items():
        commands_train.train(recipe, [f"output={tmp_path}/{name}", *overrides])
    assert losses(tmp_path / "workers") == losses(tmp_path / "run")
    expected = [loss for _, loss, _ in losses(tmp_path / "run")]
    assert [loss for _, loss, _ in losses(tmp_path / "bf16")] == pytest.approx(expected, rel=0.05)
    assert list((tmp_path / "bf16").rglob("events.out.tfevents*"))


def test_one_worker_gives_the_losses_of_none(recipe, tmp_path, monkeypatch):
    """Pinned as on a GPU too: a CPU cannot, so memory is copied where it would be pinned."""
    commands_train.train(recipe)
    expected = losses(tmp_path / "run")
    commands_train.train(recipe, [f"output={tmp_path}/one", "training.dataloader_num_workers=1"])
    assert losses(tmp_path / "one") == expected
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    collate = Collator.__call__
    monkeypatch.setattr(Collator, "__call__", lambda *args: {**(found := collate(*args)), "batch": found["batch"].pin_memory()})
    commands_train.train(recipe, [f"output={tmp_path}/pinned", "training.accelerator_config={non_blocking: true}"])
    assert losses(tmp_path / "pinned") == expected
    assert len(pinned) == 6 * 2 * 4, "ids, target rows, targets, and a layout as one buffer"


def test_what_the_limits_leave_out_is_counted_and_said(recipe, tmp_path, capsys):
    commands_train.train(recipe, ["limits.context_tokens=60"])
    lines = whole_json_lines(tmp_path / "run" / "metrics.jsonl")
    dropped = sum(line.get("dropped_demonstrations", 0) for line in lines)
    assert dropped > 0 and dropped + sum(line.get("demonstrations", 0) for line in lines) == 6 * 4 * 3
    assert f"{dropped} demonstrations did not fit into limits.context_tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["dropped_demonstrations"] == dropped


def episodes(seed):
    """Batches whose counts of target tokens differ much."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return tuple(torch.randint(3, 90, (n,), generator=generator).tolist())

    return [EncodedEpisode(tokens(6), ((tokens(2), tokens(n)),)) for n in (1, 9, 2, 5)]


class Listed(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def gradient_step(tmp_path, batch, accumulation):
    """What the Trainer logs of one step over the same four episodes, split differently."""
    settings = {
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 1e9,
    }
    settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    run = tmp_path / f"{batch}x{accumulation}"
    run.mkdir(parents=True)
    model = trained_hypernetwork(tiny_base())
    GistTrainer(model, training_arguments(settings, run=run, seed=0), Listed(episodes(0)), Collator(pack_gist, 3), run).train()
    return losses(run)


def test_target_tokens_weigh_the_same_however_steps_are_accumulated(tmp_path):
    (together,), (in_two,), (in_four,) = (gradient_step(tmp_path, b, a) for b, a in ((4, 1), (2, 2), (1, 4)))
    assert together == pytest.approx(in_two, rel=1e-4) and together == pytest.approx(in_four, rel=1e-4)
    model = trained_hypernetwork(tiny_base())
    assert together[1] == pytest.approx(model(pack_gist(episodes(0), 3)).mean.item(), rel=1e-4)


@pytest.mark.slow
def test_target_tokens_weigh_the_same_on_every_rank(tmp_path):
    """Two processes with batches of different counts take the same step as one process with all."""
    torchrun(ROOT / "tests" / "one_step.py", tmp_path)
    one = gradient_step(tmp_path, 4, 1)
    step, loss, norm = json.loads((tmp_path / "0" / "step.json").read_text())[0]
    assert (step, loss, norm) == (1, pytest.approx(one[0][1], rel=1e-4), pytest.approx(one[0][2], rel=1e-4))
    assert json.loads((tmp_path / "1" / "step.json").read_text()) == [], "only the first process logs"


@pytest.mark.slow
def test_a_random_base_is_trained_with_full_attention_then_a_hypernetwork_on_it(tmp_path):
    architecture = {k: v for k, v in tiny_architecture("llama").items() if v is not None}
    base = tmp_path / "base.yaml"
    base.write_text(f"""
method: full_attention
output: {tmp_path}/base
model: {{architecture: {json.dumps(architecture)}, tokenizer: words}}
data: {{source: synthetic, shots: 4, queries: 1, synthetic: {{repeats: 0.3, lists: 0.3, warmup_episodes: 8}}}}
format: {{query: " {{input}}", answer: " {{output}}", separator: "", end_token: false, answer_tokens: 1}}
limits: {{context_tokens: 64, query_tokens: 64}}
full_attention: {{supervise_demonstrations: true}}
training: {{use_cpu: true, disable_tqdm: true, max_steps: 3, per_device_train_batch_size: 4, logging_steps: 1, save_steps: 2}}
""")
    assert commands_train.train(base).global_step == 3
    hypernetwork = tmp_path / "hyper.yaml"
    hypernetwork.write_text(
        base.read_text()
        .replace("full_attention\n", "hypernetwork\n", 1)
        .replace(f"output: {tmp_path}/base", f"output: {tmp_path}/hyper")
        .replace(f"architecture: {json.dumps(architecture)}, tokenizer: words", f"name_or_path: {tmp_path}/base")
    )
    assert commands_train.train(hypernetwork).global_step == 3
    example = tmp_path / "e.jsonl"
    source_word = hypernetworks_loading.load_hypernetwork(tmp_path / "hyper")[1].tokenizer.convert_ids_to_tokens(5)
    example.write_text(json.dumps({"input": source_word, "output": "<1>"}))
    ((path, prefix),) = commands_compress.compress(tmp_path / "hyper", [example], tmp_path / "e.safetensors")
    assert path.is_file() and prefix.manifest.examples == 1
    assert len(commands_generate.generate(path, [source_word, source_word])) == 2


def test_lora_with_full_attention_is_stock_peft(tmp_path, saved_base):
    """The adapter alone is trained, in PEFT's files, and the model beside it is what stock PEFT makes of base and adapter."""
    data = tmp_path / "data" / "a.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps({"input": f"word {i}", "output": str(i)}) + "\n" for i in range(9)))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"""
method: full_attention
full_attention: {{lora: true}}
lora: {{rank: 4, alpha: 8}}
output: {tmp_path}/run
model: {{name_or_path: {saved_base}, dtype: bfloat16}}
data: {{source: jsonl, root: {tmp_path}/data, shots: 4, queries: 2}}
limits: {{context_tokens: 200, query_tokens: 60}}
training: {{use_cpu: true, disable_tqdm: true, bf16: true, learning_rate: 0.01, max_steps: 4, logging_steps: 1, save_steps: 2,
  per_device_train_batch_size: 2}}
""")
    assert commands_train.train(recipe).global_step == 4
    run = tmp_path / "run"
    plain = AutoModelForCausalLM.from_pretrained(saved_base, dtype=torch.bfloat16)
    stock = PeftModel.from_pretrained(plain, run / ADAPTER)
    updates = {name: p for name, p in stock.named_parameters() if "lora_B" in name}
    assert updates and all(p.abs().max() > 0 for p in updates.values()) and not any("lm_head" in name for name in updates)
    ours, theirs = load_base(str(run)).state_dict(), stock.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    # What a checkpoint holds is read again, bit for bit.
    base, tokenizer = load_base(str(saved_base), dtype="bfloat16"), load_tokenizer(str(saved_base))
    model = FullAttention(base, tokenizer, lora=LoraConfig.from_pretrained(run / ADAPTER))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.load_weights(run)
    model.save_pretrained(tmp_path / "again")
    for name in (f"{ADAPTER}/{ADAPTER_WEIGHTS}", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes()
    other = FullAttention(load_base(str(saved_base)), tokenizer, lora=lora_config(None, rank=2, alpha=8, dropout=0, targets=[]))
    with pytest.raises(UserError, match="lora_A.weight is .*other settings"):
        other.load_weights(run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["method=hypernetwork"], "full_attention.lora: belongs to method full_attention"),
        (["model.quantize=nf4"], "full_attention.lora: .*remove model.quantize"),
        (["deepspeed=zero3"], "full_attention.lora: .*zero2 or zero1"),
    ],
)
def test_lora_with_full_attention_is_refused_where_it_cannot_be_merged(recipe, changes, said):
    with pytest.raises(UserError, match=said):
        load_recipe(recipe, ["method=full_attention", "full_attention.lora=true", *changes])
