"""A training run at its real size, for a few steps: tokens/s, utilisation and peak memory beside what `check` predicts.

    python -m benchmarks.training_run [--recipe FILE] [--steps 20] [--tiny] [--json FILE] [KEY=VALUE ...]

The base has the recipe's shape and random weights, the episodes random tokens in ragged lengths up to the recipe's limits; all
else is the run's own code. One process. FLOPs are by formula: *model* FLOPs are those of one forward and backward pass, *all*
are also what is computed again. They are held against the rate that the device reaches in large products, measured here (the
target on an H200 is 45 % of it, in model FLOPs), and on a GPU against its dense bf16 peak (`utilisation`, of all). Then comes
the peak memory of a step on once, twice and four times as many episodes: `memory_growth` is 1 where it is linear in tokens.
`--tiny` shrinks the base to what a CPU trains in seconds: it shows that the benchmark runs, and nothing else.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from random import Random

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from benchmarks.measure import machine, matmul_rate, parser, peak_bytes, write_json
from eval.flops import ModelCost
from eval.sizing import GPUS, Hardware, Steps, base_config, checkpointing, memory, whole
from hyperllama.base.loading import default_device, random_base
from hyperllama.data.packing import GistBatch, pack_gist
from hyperllama.data.stream import Collator
from hyperllama.data.text import EncodedEpisode
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.recipe.loading import load_recipe
from hyperllama.recipe.schema import Recipe
from hyperllama.training.trainer import GistTrainer, training_arguments

WARMUP = 3  # steps that do not count: allocators and kernels settle
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}
TINY |= {"num_key_value_heads": 2, "head_dim": 16}


class RandomEpisodes(Dataset):
    """Episodes of random tokens: contexts from an eighth of the limit to all of it, queries likewise, answers of 8 tokens."""

    def __init__(self, recipe: Recipe, vocabulary: int, length: int):
        self.recipe, self.vocabulary, self.length = recipe, vocabulary, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> EncodedEpisode:
        rng, limits = Random(index), self.recipe.limits

        def tokens(most: int) -> tuple[int, ...]:
            return tuple(rng.choices(range(self.vocabulary), k=rng.randint(max(1, most // 8), most)))

        queries = tuple((tokens(limits.query_tokens - 8), tokens(8)) for _ in range(self.recipe.data.queries))
        return EncodedEpisode(tokens(limits.context_tokens), queries, index=index)


class Clock(TrainerCallback):
    """The time after each optimiser step, with nothing left to wait for on the device."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--recipe", default="recipes/train/llama-2-7b-sni.yaml")
    options.add_argument("--steps", type=int, default=20, help="optimiser steps")
    options.add_argument("--gpu", default="h200", choices=list(GPUS), help="whose peak utilisation is counted against")
    options.add_argument("--tiny", action="store_true", help="a tiny base, for a CPU")
    options.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted keys of the recipe")
    chosen = options.parse_args()
    changes = ["deepspeed=null", f"training.max_steps={chosen.steps}"]
    recipe = load_recipe(chosen.recipe, [*changes, *chosen.overrides], data=False)
    config = base_config(recipe).to_dict()
    if chosen.tiny:
        config |= {**TINY, **{key: None for key in ("pad_token_id", "bos_token_id", "eos_token_id")}}
    vocabulary = config.pop("vocab_size")
    set_seed(recipe.seed)
    with torch.device(default_device()):
        base = random_base(config, vocab_size=vocabulary, dtype=recipe.model.dtype)
    model = GistHypernetwork(base, gists=recipe.gist.tokens, rank=recipe.lora.rank, alpha=recipe.lora.alpha)
    figures = run(recipe, model, vocabulary, chosen.steps, chosen.gpu)
    figures |= memory_by_tokens(recipe, model, vocabulary)
    for name, value in figures.items():
        print(f"{name:24} {value:,.4g}" if isinstance(value, float) else f"{name:24} {value}")
    print(f"\n{machine()}")
    write_json(chosen.json, {"recipe": chosen.recipe, "tiny": chosen.tiny, "overrides": chosen.overrides, **figures})


def run(recipe: Recipe, model: GistHypernetwork, vocabulary: int, steps: int, gpu: str) -> dict:
    """Train some steps and return the figures."""
    settings = {**recipe.training, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    if not torch.cuda.is_available():
        settings["use_cpu"] = True
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(settings, run=folder, seed=recipe.seed)
        size = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        episodes = RandomEpisodes(recipe, vocabulary, steps * size)
        trainer = GistTrainer(model, arguments, episodes, Collator(pack_gist, model.num_gists), folder)
        clock = Clock()
        trainer.add_callback(clock)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    cost, batch = ModelCost.of(model.base.config), arguments.per_device_train_batch_size
    batches = [
        pack_gist([episodes[i] for i in range(first, first + batch)], model.num_gists)
        for first in range(WARMUP * size, steps * size, batch)
    ]
    kept = {"checkpointing": checkpointing(recipe.training), "rank": model.lora.rank, "targets": "all-linear"}
    costs = [cost.train(b.layout, len(b.targets), **kept) for b in batches]
    flops, of_model = sum(c.total for c in costs), sum(c.forward + c.backward for c in costs)
    seconds = clock.times[-1] - clock.times[WARMUP - 1]
    each = [later - earlier for earlier, later in zip(clock.times[WARMUP - 1 :], clock.times[WARMUP:])]
    hardware = Hardware.of(gpus=1, gpu=gpu)
    rate = matmul_rate(default_device(), _dtype(recipe))
    found = {
        "parameters": sum(p.numel() for p in model.base.parameters()),
        "steps": steps - WARMUP,
        "median_step_seconds": statistics.median(each),
        "tokens_per_second": sum(b.tokens for b in batches) / seconds,
        "flops_per_step": flops / (steps - WARMUP),
        "matmul_rate": rate,
        "share_of_matmul_rate": of_model / seconds / rate,
        "share_of_matmul_rate_all": flops / seconds / rate,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    if torch.cuda.is_available():
        predicted = next(memory(Steps(recipe, model.base.config), batches, hardware)).total
        found |= {
            "utilisation": flops / seconds / hardware.gpu.peak,
            "peak_memory": torch.cuda.max_memory_allocated(),
            "predicted_peak_memory": predicted,
        }
    return found


def memory_by_tokens(recipe: Recipe, model: GistHypernetwork, vocabulary: int) -> dict:
    """Peaks of a forward and backward pass, above what is held, on batches of 1, 2 and 4 times the recipe's episodes.

    `memory_growth` is what a token adds from the second batch to the third, over what it adds from the first to the second.
    """
    size = whole(recipe, "per_device_train_batch_size", 8)
    episodes, device = RandomEpisodes(recipe, vocabulary, 4 * size), default_device()
    tokens, peaks = [], []
    for times in (1, 2, 4):
        batch = pack_gist([episodes[i] for i in range(times * size)], model.num_gists).to(device)
        step = partial(_pass, model, batch, half=_dtype(recipe) == torch.bfloat16)
        step()  # what is made once is not a step's
        tokens.append(batch.tokens)
        peaks.append(peak_bytes(step))
    (a, b, c), (first, second, third) = tokens, peaks
    growth = (third - second) / (c - b) / ((second - first) / (b - a))
    return {"memory_tokens": tokens, "memory_peaks": peaks, "memory_growth": growth}


def _pass(model: GistHypernetwork, batch: GistBatch, half: bool) -> None:
    with torch.autocast(batch.ids.device.type, dtype=torch.bfloat16, enabled=half):
        loss = model(batch)
    loss.mean.backward()
    model.zero_grad()


def _dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.training.get("bf16") else torch.float32


if __name__ == "__main__":
    main()
