"""Checkpoints that are never half written, and from which another number of processes can go on.

A checkpoint is written into `checkpoints/.writing`, synced and renamed into its place; then older ones are removed. It has the
Trainer's files, with trainable weights only: the frozen base is left out, under DeepSpeed too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from hyperllama.base.distributed import barrier
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import write_atomically

CHECKPOINTS, WRITING = "checkpoints", ".writing"
SHAPE = "step.json"  # how many episodes a step has, and over how many processes
UNIVERSAL = "universal"


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of a run's folder of checkpoints, None if there is none.

    A checkpoint has its name only once all of it is on the disk. One that was copied without its last files is passed over:
    the Trainer's state and the shape of a step are asked for.
    """
    whole = []
    for path in Path(folder).glob("checkpoint-*"):
        with suppress(OSError, ValueError, KeyError):
            read_shape(path)
            whole.append((json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"], str(path)))
    return max(whole)[1] if whole else None


def read_shape(checkpoint: str | Path) -> dict[str, int]:
    """The shape of a step in which a checkpoint was written: `processes`, `batch` (episodes of each) and `accumulation`."""
    return json.loads((Path(checkpoint) / SHAPE).read_text(encoding="utf-8"))


def settings_to_go_on(settings: dict, checkpoint: str | Path | None, processes: int) -> dict:
    """A recipe's `training` for going on from a checkpoint: with another number of processes, as many episodes a step.

    Fewer processes accumulate more steps each. UserError if the numbers do not divide.
    """
    if checkpoint is None or (shape := read_shape(checkpoint))["processes"] == processes:
        return settings
    batch = settings.get("per_device_train_batch_size", shape["batch"])
    episodes = shape["processes"] * shape["batch"] * shape["accumulation"]
    accumulation, left = divmod(episodes, processes * batch)
    if left or not accumulation:
        raise UserError(
            f"{checkpoint}: a step had {episodes} episodes on {shape['processes']} processes; {processes} processes of "
            f"training.per_device_train_batch_size={batch} cannot have as many; choose numbers that divide {episodes}"
        )
    return {**settings, "gradient_accumulation_steps": accumulation}


class Staging:
    """Where a Trainer's checkpoint is written until it is whole: `with` it, `args.output_dir` is the staging folder."""

    def __init__(self, args: TrainingArguments, step: int):
        self.args, self.place = args, Path(args.output_dir)
        self.staged, self.name = self.place / WRITING, f"checkpoint-{step}"

    def __enter__(self) -> None:
        # One process clears what a crash has left, before any other writes.
        with self.args.main_process_first():
            if self.args.should_save:
                shutil.rmtree(self.staged, ignore_errors=True)
                (self.staged / self.name).mkdir(parents=True)
        self.args.output_dir = str(self.staged)

    def __exit__(self, kind, error, trace) -> None:
        self.args.output_dir = str(self.place)
        if kind is not None:
            return
        barrier()  # all have written
        if self.args.should_save:
            shape = {
                "processes": self.args.world_size,
                "batch": self.args.per_device_train_batch_size,
                "accumulation": self.args.gradient_accumulation_steps,
            }
            write_atomically(self.staged / self.name / SHAPE, json.dumps(shape) + "\n")
            _sync(self.staged)
            shutil.rmtree(self.place / self.name, ignore_errors=True)
            (self.staged / self.name).rename(self.place / self.name)
            self.staged.rmdir()
            rotate_checkpoints(output_dir=str(self.place), save_total_limit=self.args.save_total_limit, use_mtime=False)
        barrier()  # and see it in its place


def make_universal(checkpoint: str | Path, args: TrainingArguments) -> None:
    """Convert a DeepSpeed checkpoint of another number of processes to DeepSpeed's universal format, beside it.

    DeepSpeed's own tool does it, on the first process; see https://www.deepspeed.ai/tutorials/universal-checkpointing/.
    """
    checkpoint = Path(checkpoint)
    with args.main_process_first():
        if args.should_save and not (checkpoint / "latest_universal").is_file():
            tag, folder = (checkpoint / "latest").read_text().strip(), checkpoint / UNIVERSAL
            shutil.rmtree(folder, ignore_errors=True)
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            command += ["--input_folder", str(checkpoint / tag), "--output_folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(
                    f"{checkpoint}: DeepSpeed cannot convert it for another number of processes "
                    f"({in_one_line(done.stderr.splitlines()[-1:])}); go on with {read_shape(checkpoint)['processes']}"
                )
            write_atomically(checkpoint / "latest_universal", UNIVERSAL)


def _sync(folder: Path) -> None:
    """Everything in a folder onto the disk, so that its new name is never there before its files are."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
