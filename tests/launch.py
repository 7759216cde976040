"""Starting hyperllama, or a script of tests, in one process or several, as torchrun does.

To import torch, transformers and DeepSpeed takes most of a short run, so a server imports them once and forks what is started
here: each process begins as a new one would that has just imported them. It is a process of its own, not that of pytest.
"""

import ctypes
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from data_files import write

from hyperllama import noise

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
# Without it torch 2.13 starts a job again on the addresses of the processes that have died.
ENVIRONMENT |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
IMPORTED = ["launch", "torch.distributed.run", "hyperllama.commands.train", "hyperllama.commands.tune", "deepspeed"]
IMPORTED += ["eval.run", "matplotlib.figure", "matplotlib.backends.backend_agg"]
NEW_NETWORK = 0x40000000  # CLONE_NEWNET of Linux


@cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)  # of which it passes over what is not installed
    with mock.patch.dict(os.environ, {**noise.SETTINGS, **ENVIRONMENT}):
        forkserver.ensure_running()
    return context


def _become(program, environment, out, err, host):
    """Be `python PROGRAM`, with an environment, files for what it prints, and the network of a namespace."""
    os.environ.clear()
    os.environ.update(environment)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if host is not None:
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = os.open(f"/var/run/netns/{host}", os.O_RDONLY)
        if libc.setns(descriptor, NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter the network of {host}")
        os.close(descriptor)
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


def start(*program, out=os.devnull, err=os.devnull, host=None, **environment):
    """Start `python PROGRAM` with one thread; the process, with `is_alive`, `kill`, `join` and `exitcode`."""
    environment = {**os.environ, **ENVIRONMENT, **environment}
    process = _server().Process(target=_become, args=([*map(str, program)], environment, str(out), str(err), host))
    process.start()
    return process


def run(*program, **environment):
    """Run `python PROGRAM` to its end: its exit code and what it printed."""
    with TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        process = start(*program, out=out, err=err, **environment)
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(program, 300, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(program, process.exitcode, out.read_text(), err.read_text())


def hyperllama(*command, **environment):
    """Run `hyperllama COMMAND` in one process with one thread, as torchrun's have: sums are then rounded alike."""
    done = run("-m", "hyperllama", *command, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def launcher(*options, command, forks=True):
    """A program for Python: torchrun's, of `hyperllama COMMAND`, or of a script if the command begins with its path."""
    script = command[0] if str(command[0]).endswith(".py") else ROOT / "hyperllama" / "__main__.py"
    arguments = command[1:] if script == command[0] else command
    how = ("--run-path", "--start-method", "fork") if forks else ()  # else it starts Python again for each process
    return ["-m", "torch.distributed.run", *options, *how, str(script), *map(str, arguments)]


def torchrun(*command, processes=2, options=(), check=True, forks=True, **environment):
    """Run `hyperllama COMMAND`, or a script if the command begins with its path, and return what it printed.

    Without `forks` every process is a new one, which imports all anew and ends as Python ends.
    """
    program = launcher("--standalone", "--nproc_per_node", str(processes), *options, command=command, forks=forks)
    done = run(*program, **environment)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def zero_settings(folder, stage, **more):
    """A settings file of DeepSpeed under which small parameters too are cut into parts."""
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **more}
    return write(folder / f"zero{stage}.json", json.dumps({**dict.fromkeys(automatic, "auto"), "zero_optimization": zero}))
