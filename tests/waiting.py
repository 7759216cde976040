"""Training some steps and looking at what lies between their ends: does anything there wait for the device?"""

import torch
from conftest import tiny_base, trained_hypernetwork
from transformers import TrainerCallback

from hyperllama.data.packing import pack_full, pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.training.full_attention import FullAttention
from hyperllama.training.trainer import GistTrainer, training_arguments
from hyperllama.tuning.prefix_tuner import PrefixTuner
from hyperllama.tuning.starts import random_start

EPISODES = [
    EncodedEpisode((5, 6, 7, 8, 9, 10, 11), (((12, 13), (14, 15)), ((16,), (17,)))),
    EncodedEpisode((20, 21, 22), (((23, 24, 25), (26, 27, 28)),)),
]
KINDS = ("hypernetwork", "full attention", "tuner", "tuner with an MLP")


def model_and_batch(kind, device="cpu"):
    """A model of each kind that is trained, and a packed batch for it."""
    base = tiny_base("qwen3").to(device)
    if kind == "hypernetwork":
        return trained_hypernetwork(base), pack_gist(EPISODES, 3)
    if kind == "full attention":
        return FullAttention(base, None), pack_full(EPISODES)
    starts = {name: random_start(base, [list(range(5, 25))], 3) for name in ("one", "two")}
    asked = [EncodedEpisode((), e.queries, task=name) for e, name in zip(EPISODES, ("two", "one"))]
    return PrefixTuner(base, starts, hidden=8 if "MLP" in kind else None), pack_gist(asked, 3)


class Watched(TrainerCallback):
    """Enters a context at the end of the first step, by when everything is warm, and leaves it at the end of the third."""

    def __init__(self, context):
        self.context, self.steps = context, 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.context.__enter__()
        if state.global_step == 3:
            self.context.__exit__(None, None, None)
            self.steps = 2


def train_watched(model, batch, context, run, **settings):
    """Train four steps of one batch that is packed already, with `context` around the second and the third."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 1, "save_strategy": "no", "disable_tqdm": True, **settings}
    arguments = training_arguments({"logging_steps": 100, **settings}, run=run, seed=0)
    steps = 4 * arguments.gradient_accumulation_steps
    trainer = GistTrainer(model, arguments, torch.arange(steps), lambda _: {"labels": batch.targets, "batch": batch}, run)
    watched = Watched(context)
    trainer.add_callback(watched)
    trainer.train()
    assert watched.steps == 2
