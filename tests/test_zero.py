"""Several processes and ZeRO: the losses of one process that accumulates, also when their number changes on the way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from data_files import WORDS, lines, write
from launch import torchrun, zero_settings

from hyperllama.commands import train as commands_train
from hyperllama.errors import UserError
from hyperllama.files import whole_json_lines
from hyperllama.training.checkpoints import newest_checkpoint, read_shape, settings_to_go_on

STEPS = 20


@pytest.fixture
def recipe(tmp_path, saved_base):
    """Ragged episodes: one to five short or long demonstrations, three queries of which some do not fit."""
    for name, answer in (("upper", str.upper), ("twice", lambda w: f"{w} {w} {w}"), ("first", lambda w: w[0])):
        rows = [{"input": w, "output": answer(w)} for w in WORDS.split()[:24]]
        write(tmp_path / "data" / f"{name}.jsonl", lines(rows))
    return write(
        tmp_path / "train.yaml",
        f"""
output: {tmp_path}/one
model: {{name_or_path: {saved_base}}}
gist: {{tokens: 2, kind: lora}}
lora: {{rank: 2}}
data: {{source: jsonl, root: {tmp_path}/data, shots: 5, min_shots: 1, queries: 3}}
limits: {{context_tokens: 60, query_tokens: 21, too_long_query: skip}}
training: {{use_cpu: true, disable_tqdm: true, max_steps: {STEPS}, per_device_train_batch_size: 2, learning_rate: 1.0e-2,
            logging_steps: 1, save_steps: 8}}
""",
    )


def losses(run):
    return [line["loss"] for line in whole_json_lines(Path(run) / "metrics.jsonl") if "loss" in line]


def weights(run):
    from safetensors.torch import load_file

    return {f"{path.name} {name}": x for path in Path(run).glob("*.safetensors") for name, x in load_file(path).items()}


def same_weights(a, b, tolerance):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and a and all(torch.allclose(a[name], b[name], atol=tolerance) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_train_what_one_process_trains(recipe, tmp_path, stage):
    if stage:
        pytest.importorskip("deepspeed")
    settings = [f"deepspeed={zero_settings(tmp_path, stage)}"] if stage else []
    # HINT's generator has norms and biases, of which the optimiser makes a second group, without decay.
    own = ["gist.kind=hint", "hint.mlp_size=8", "training.weight_decay=0.1"] if stage == 3 else []
    settings += own
    commands_train.train(recipe, [*own, "training.gradient_accumulation_steps=2"])
    one = losses(tmp_path / "one")
    assert len(one) == STEPS and one[-1] < 0.8 * one[0]
    run = tmp_path / "ranks"
    torchrun("train", recipe, f"output={run}", *settings, forks=stage != 2)
    assert losses(run) == pytest.approx(one, abs=1e-5)
    assert same_weights(run, tmp_path / "one", 1e-4)
    checkpoint = Path(newest_checkpoint(run / "checkpoints"))
    assert read_shape(checkpoint) == {"processes": 2, "batch": 2, "accumulation": 1}
    if stage:
        states = [torch.load(path, weights_only=False) for path in checkpoint.glob("global_step*/*model_states.pt")]
        names = [name for state in states for name in (*state["module"], *(state.get("frozen_param_shapes") or ()))]
        assert names and not any(name.startswith("base.") for name in names), "the frozen base is not saved"
    if stage in (1, 2):
        return  # what follows takes a minute; stage 3 has the most to get wrong
    # As a crash after step 16 leaves it; then two processes, and one, go on to the same end.
    for path in (run / "result.json", *run.glob("*.safetensors")):
        path.unlink()
    shutil.rmtree(checkpoint)
    assert newest_checkpoint(run / "checkpoints").endswith("checkpoint-16")
    alone = shutil.copytree(run, tmp_path / "alone")
    (alone / "recipe.yaml").write_text((alone / "recipe.yaml").read_text().replace(f"{run}\n", f"{alone}\n"))
    done = torchrun("train", recipe, f"output={run}", *settings)
    assert done.stderr.count("going on from") == 1 and "processes wrote" not in done.stderr
    assert losses(run) == pytest.approx(one, abs=1e-5) and same_weights(run, tmp_path / "one", 1e-4)
    done = torchrun("train", recipe, f"output={alone}", *settings, processes=1)
    assert "checkpoint-16, which 2 processes wrote, on 1" in done.stderr
    assert losses(alone) == pytest.approx(one, abs=1e-5) and same_weights(alone, tmp_path / "one", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("full, checkpointing, stage", [(False, True, 3), (True, False, 3), (True, True, 0)])
def test_the_loss_in_chunks_is_that_at_once(recipe, tmp_path, full, checkpointing, stage):
    """Ranks have different numbers of chunks, and every chunk trains the head. Under ZeRO-3 nothing is kept gathered."""
    if stage:
        pytest.importorskip("deepspeed")
    changes = ["training.max_steps=6", "training.learning_rate=1.0e-3", f"training.gradient_checkpointing={checkpointing}"]
    if full:
        recipe.write_text("method: full_attention\n" + recipe.read_text().replace("gist:", "#").replace("lora:", "#"))
    commands_train.train(recipe, [*changes, "training.gradient_accumulation_steps=2"])
    keep = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    settings = [f"deepspeed={zero_settings(tmp_path, 3, **keep)}"] if stage else []
    torchrun(Path(__file__).parent / "in_chunks.py", recipe, f"output={tmp_path}/chunks", *settings, *changes)
    counts = [json.loads((tmp_path / "chunks" / f"chunks-{rank}.json").read_text()) for rank in range(2)]
    assert counts[0] != counts[1] and min(max(counts[0]), max(counts[1])) > 2, "ranks differ in their number of chunks"
    assert losses(tmp_path / "chunks") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_one_process_is_followed_by_two(recipe, tmp_path):
    commands_train.train(recipe, ["training.gradient_accumulation_steps=2"])
    one, run = losses(tmp_path / "one"), tmp_path / "one"
    shutil.rmtree(newest_checkpoint(run / "checkpoints"))
    (run / "result.json").unlink()
    done = torchrun("train", recipe, "training.gradient_accumulation_steps=2")
    assert "which 1 processes wrote, on 2" in done.stderr and losses(run) == pytest.approx(one, abs=1e-5)


@pytest.mark.slow
def test_a_random_base_is_made_once_and_every_layer_is_gathered_twice(recipe, tmp_path):
    """Under ZeRO-3 the packed step gathers a layer once forward and once backward, contexts and queries together."""
    pytest.importorskip("deepspeed")
    architecture = "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 4}"
    changes = ["model.name_or_path=null", f"model.architecture={architecture}", "model.vocab_size=300"]
    script = Path(__file__).parent / "count_gathers.py"
    # As with a model that does not fit: nothing stays gathered from the forward to the backward pass.
    keep = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    settings = zero_settings(tmp_path, 3, **keep)
    torchrun(script, recipe, f"output={tmp_path}/run", *changes, "training.max_steps=4", f"deepspeed={settings}")
    counts = json.loads((tmp_path / "run" / "gathers.json").read_text())
    layers = {name: times for name, times in counts.items() if ".layers." in name and name.startswith("base.")}
    assert len(layers) == 3 * 9, "seven matrices and two norms a layer"
    assert set(layers.values()) == {2}, layers


def test_a_step_keeps_its_episodes_on_another_number_of_processes(tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    write(checkpoint / "step.json", json.dumps({"processes": 4, "batch": 2, "accumulation": 3}))
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1.0}
    assert settings_to_go_on(given, None, 2) == given and settings_to_go_on(given, checkpoint, 4) == given
    assert settings_to_go_on(given, checkpoint, 2) == {**given, "gradient_accumulation_steps": 6}
    assert settings_to_go_on(given, checkpoint, 12) == {**given, "gradient_accumulation_steps": 1}
    for processes in (5, 24):
        with pytest.raises(UserError, match=f"24 episodes on 4 processes; {processes} processes of .* cannot have as many"):
            settings_to_go_on(given, checkpoint, processes)
