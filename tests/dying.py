"""Trains a recipe and kills its own process, as a power cut would, when it comes to a place for the n-th time.

python tests/dying.py PLACE:N RECIPE [KEY=VALUE ...]
"""

import os
import signal
import sys
from collections import Counter

import torch

from hyperllama.base.distributed import close
from hyperllama.commands import train as commands_train
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.training import checkpoints as training_checkpoints
from hyperllama.training.trainer import GistTrainer

times = Counter()


def come_to(here):
    place, _, number = sys.argv[1].partition(":")
    times[here] += 1
    # A job that the launcher has started again does not die again.
    if here == place and times[here] == int(number) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def dies(owner, name, here, after=False):
    """Replace a function by one that comes to a place before it, or after it."""
    original = getattr(owner, name)

    def with_death(*args, **kwargs):
        if not after:
            come_to(here)
        result = original(*args, **kwargs)
        if after:
            come_to(here)
        return result

    setattr(owner, name, with_death)


if __name__ == "__main__":
    dies(GistHypernetwork, "save_pretrained", "save_pretrained", after=True)
    dies(torch, "save", "torch.save", after=True)
    dies(training_checkpoints, "write_atomically", "write_shape", after=True)
    dies(training_checkpoints, "_sync", "sync", after=True)
    dies(training_checkpoints, "_sync", "rename")
    dies(training_checkpoints, "rotate_checkpoints", "renamed")
    dies(GistTrainer, "training_step", "step")
    if os.environ.get("RANK") == "1":
        dies(GistTrainer, "training_step", "rank1")
    commands_train.train(sys.argv[2], sys.argv[3:])
    close()
