"""What goes wrong while training: processes die, also while they save; losses are not finite; ranks run out of data."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from data_files import WORDS, lines, write
from launch import hyperllama, run, start, torchrun

from hyperllama.commands import train as commands_train
from hyperllama.errors import UserError
from hyperllama.files import whole_json_lines
from hyperllama.training.checkpoints import newest_checkpoint

SCRIPT = Path(__file__).parent / "dying.py"


@pytest.fixture
def recipe(tmp_path, saved_base):
    rows = [{"input": w, "output": w.upper()} for w in WORDS.split()[:23]]
    write(tmp_path / "data" / "upper.jsonl", lines(rows))
    return write(
        tmp_path / "train.yaml",
        f"""
output: {tmp_path}/run
model: {{name_or_path: {saved_base}}}
gist: {{tokens: 2, kind: lora}}
lora: {{rank: 2}}
data: {{source: jsonl, root: {tmp_path}/data, shots: 4, min_shots: 1, queries: 2}}
limits: {{context_tokens: 90, query_tokens: 30}}
training: {{use_cpu: true, disable_tqdm: true, max_steps: 12, per_device_train_batch_size: 2, learning_rate: 1.0e-2,
            logging_steps: 1, save_steps: 3, save_total_limit: 1}}
""",
    )


def end_of(run):
    """What must not depend on what happened on the way: every logged loss, and the weights."""
    logged = [(x["step"], x["loss"], x["grad_norm"]) for x in whole_json_lines(run / "metrics.jsonl") if "loss" in x]
    return logged, (run / "adapter_model.safetensors").read_bytes(), (run / "gists.safetensors").read_bytes()


@pytest.fixture
def undisturbed(recipe, tmp_path):
    hyperllama("train", recipe, f"output={tmp_path}/undisturbed")
    return end_of(tmp_path / "undisturbed")


def dying(place, recipe, *arguments):
    """Train in a process that kills itself at a place in the code; -9 is its exit code, 0 if it never came there."""
    return run(SCRIPT, place, recipe, *arguments)


@pytest.mark.slow
def test_killed_while_saving_it_goes_on_to_the_same_end(recipe, tmp_path, undisturbed):
    """One run is killed at one place after the other: before, while and after a checkpoint gets its name."""
    folder, reached = tmp_path / "run", []
    for place in ("save_pretrained:2", "torch.save:3", "write_shape:1", "sync:1", "rename:1", "renamed:1", "step:5"):
        done = dying(place, recipe)
        assert done.returncode == -signal.SIGKILL, (place, done.stderr[-2000:])
        newest = newest_checkpoint(folder / "checkpoints")
        reached.append(0 if newest is None else int(newest.rsplit("-", 1)[1]))
        assert newest is None or {"trainer_state.json", "optimizer.pt", "step.json"} <= {p.name for p in Path(newest).iterdir()}
    assert reached == sorted(reached) and reached[0] > 0 and reached[-1] >= 6
    hyperllama("train", recipe)
    assert end_of(folder) == undisturbed
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-12"]


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_end(recipe, tmp_path):
    """As often as HYPERLLAMA_KILLS says; each process is killed at a random moment after it has begun to train."""
    kills, rng = int(os.environ.get("HYPERLLAMA_KILLS", 2)), random.Random(0)
    # A moment is at most 0.15 s after a new checkpoint, of steps that take 0.02 s each, or more where a disk is slow.
    folder, changes = tmp_path / "run", [f"training.max_steps={25 + 25 * kills}", "training.save_steps=1"]
    hyperllama("train", recipe, f"output={tmp_path}/long", changes[0], "training.save_steps=1000")
    for kill in range(kills):
        before, deadline = newest_checkpoint(folder / "checkpoints"), time.time() + 120
        process = start("-m", "hyperllama", "train", recipe, *changes)
        while newest_checkpoint(folder / "checkpoints") == before and process.is_alive() and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        assert process.is_alive(), f"ended before kill {kill}"
        process.kill()
        process.join()
    hyperllama("train", recipe, *changes)
    assert end_of(folder) == end_of(tmp_path / "long")


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_and_a_restart_carries_on(recipe, tmp_path):
    torchrun("train", recipe, f"output={tmp_path}/undisturbed")
    begun = time.time()
    done = torchrun(SCRIPT, "rank1:5", recipe, check=False, forks=False)  # of forks it reports one, maybe the other
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr and time.time() - begun < 60
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").endswith("checkpoint-3")
    shutil.rmtree(tmp_path / "run")
    done = torchrun(SCRIPT, "rank1:5", recipe, options=("--max-restarts", "3"))
    assert "going on from" in done.stderr
    assert end_of(tmp_path / "run") == end_of(tmp_path / "undisturbed")


def test_a_loss_that_is_not_finite_stops_and_names_its_episodes(recipe, tmp_path):
    with pytest.raises(UserError, match=r"the loss of step \d+ was (nan|inf).*it goes on from the newest checkpoint"):
        commands_train.train(recipe, ["training.learning_rate=1.0e30", "training.logging_steps=100"])
    run = tmp_path / "run"
    found = json.loads((run / "not_finite.json").read_text())
    first = 2 * (found["step"] - 1)
    assert found["episodes"] in ([first, first + 1], [first + 1, first]) and found["loss"] in ("nan", "inf")
    assert newest_checkpoint(run / "checkpoints") is None, "what it spoils is not saved"


@pytest.mark.slow
def test_a_rank_without_data_does_not_hang_the_others(recipe, tmp_path):
    """23 examples, two a query: eleven episodes an epoch, which two ranks of two cannot share evenly."""
    torchrun("train", recipe, "training.max_steps=-1", "training.num_train_epochs=2", processes=2, forks=False)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 6, "three steps an epoch"
