"""Starting hyperllama, or a script of tests, in several processes, as torchrun does."""

import json
import os
import subprocess
import sys
from pathlib import Path

from data_files import write

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
# Without it torch 2.13 starts a job again on the addresses of the processes that have died.
ENVIRONMENT |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def hyperllama(*command):
    """Run `hyperllama COMMAND` in one process with one thread, as torchrun's have: sums are then rounded alike."""
    command = [sys.executable, "-m", "hyperllama", *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def torchrun(*command, processes=2, options=(), check=True, **environment):
    """Run `hyperllama COMMAND`, or a script if the command begins with its path, and return what it printed."""
    program = [str(command[0])] if str(command[0]).endswith(".py") else ["-m", "hyperllama", str(command[0])]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *options]
    done = subprocess.run(
        [*launcher, *program, *map(str, command[1:])],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, **environment},
        timeout=300,
    )
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def zero_settings(folder, stage, **more):
    """A settings file of DeepSpeed under which small parameters too are cut into parts."""
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **more}
    return write(folder / f"zero{stage}.json", json.dumps({**dict.fromkeys(automatic, "auto"), "zero_optimization": zero}))
