"""Sizes of a training run from its recipe: parameters, batches, and memory under each setting of DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from eval.flops import ModelCost
from eval.memory import SETTINGS, Activations, Parameters, States, Zero, activations, model_states, precision
from hyperllama.base.loading import find_config, random_config
from hyperllama.commands.train import packing_of
from hyperllama.data.packing import GistBatch, pack_full, pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.errors import UserError
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.recipe.schema import Recipe

FREE = 0.1  # of a GPU's memory: for the CUDA context, NCCL's buffers and the allocator's fragments
BATCHES = 32  # as many batches are packed for the figures of a step


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: bytes of memory, where makers' GB are taken as 10^9 bytes, and dense bf16 FLOP/s.

    Drivers report a little more than that (85.0e9 bytes on an H100 of 80 GB), which is left as a reserve.
    """

    name: str
    memory: float
    peak: float


GPUS = {
    "h200": Gpu("H200", 141e9, 989e12),
    "h100": Gpu("H100", 80e9, 989e12),
    "a100-80": Gpu("A100 80 GB", 80e9, 312e12),
    "a100-40": Gpu("A100 40 GB", 40e9, 312e12),
    "4090": Gpu("RTX 4090", 24e9, 165e12),
}


@dataclass(frozen=True)
class Hardware:
    """`gpus` GPUs in each of `nodes` nodes; `utilisation` is the share of their peak that training reaches."""

    gpu: Gpu
    gpus: int
    nodes: int = 1
    utilisation: float = 0.4

    @classmethod
    def of(cls, *, gpus: int, nodes: int = 1, gpu: str = "h100", utilisation: float = 0.4) -> Hardware:
        """From the names of the command line; UserError for what there is not."""
        if gpu not in GPUS:
            raise UserError(f"--gpu: no GPU {gpu} is known; choose from {', '.join(GPUS)}")
        for name, count in (("gpus", gpus), ("nodes", nodes)):
            if count < 1:
                raise UserError(f"--{name}: at least 1, not {count}")
        if not 0 < utilisation <= 1:
            raise UserError(f"--utilisation: a share of the GPU's peak, above 0 and at most 1, not {utilisation}")
        return cls(GPUS[gpu], gpus, nodes, utilisation)

    @property
    def world(self) -> int:
        """GPUs in all nodes."""
        return self.gpus * self.nodes

    @property
    def usable(self) -> float:
        """Bytes of one GPU that a plan may fill."""
        return (1 - FREE) * self.gpu.memory


@dataclass(frozen=True)
class Row:
    """Memory of one GPU under one setting."""

    zero: Zero
    states: States
    activations: Activations

    @property
    def total(self) -> int:
        """The peak, in bytes."""
        return self.states.total + self.activations.peak


def base_config(recipe: Recipe, vocabulary: int | None = None) -> Any:
    """The transformers config of a recipe's base: of a random one, with `vocabulary` tokens or the recipe's."""
    model = recipe.model
    if model.name_or_path:
        return find_config(model.name_or_path, model.revision)
    return random_config(model.architecture, vocab_size=vocabulary or model.vocab_size)


def parameters(recipe: Recipe, config: Any) -> Parameters:
    """Counts of parameters, from the model that the run would build, built on the meta device."""
    cost = ModelCost.of(config)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        total = sum(p.numel() for p in base.parameters())
        largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in base.modules())
        added = 0
        if recipe.method == "hypernetwork":
            targets = recipe.lora.targets or "all-linear"
            model = GistHypernetwork(base, gists=recipe.gist.tokens, rank=recipe.lora.rank, targets=targets)
            added = sum(p.numel() for p in model.parameters()) - total
    linear = cost.per_row // 2
    return Parameters(linear, total - linear, added, largest, full=recipe.method == "full_attention")


def largest_episode(recipe: Recipe) -> EncodedEpisode:
    """An episode as long as the recipe's limits allow; its answers have format.answer_tokens tokens, if queries do."""
    data, limits = recipe.data, recipe.limits
    found = []
    for part in data.parts:
        if part.source == "text":
            text = part.text
            found.append(_episode(text.context_tokens + 1, 1, 1, text.continuation_tokens - 1))
        else:
            answer = min(recipe.format.answer_tokens, limits.query_tokens - 1)
            found.append(_episode(limits.context_tokens, data.queries, limits.query_tokens - answer, answer, data.shots))
    return max(found, key=lambda e: len(e.context) + sum(len(p) + len(a) for p, a in e.queries))


def memory(recipe: Recipe, cost: ModelCost, counts: Parameters, batches: Sequence[GistBatch], hardware: Hardware) -> list[Row]:
    """Memory of a GPU under every setting, for the worst of `batches`."""
    if recipe.full_attention.lora:
        raise UserError("full_attention.lora: its memory cannot be planned; plan all weights, which need more, with false")
    training, lora, rows = recipe.training, recipe.lora, []
    if training.get("bf16") and training.get("fp16"):
        raise UserError("training.bf16, training.fp16: products are computed in one of them; remove the other")
    half = bool(training.get("bf16")) or bool(training.get("fp16"))
    settings: dict[str, Any] = {"rank": None, "checkpointing": checkpointing(training)}
    if not counts.full:
        settings |= {"rank": lora.rank, "targets": lora.targets or "all-linear", "dropout": lora.dropout}
    for zero in SETTINGS:
        if zero.stage == 3 and recipe.model.quantize:
            continue
        if not zero.stage and counts.full and recipe.model.dtype != "float32":
            continue  # a recipe that is refused: nothing would keep float32 weights
        precise = precision(
            dtype=recipe.model.dtype,
            quantize=recipe.model.quantize,
            half=half,
            full=counts.full,
            deepspeed=zero.stage > 0,
        )
        found = (activations(cost, batch.layout, len(batch.targets), precise, **settings) for batch in batches)
        worst = max(found, key=lambda one: one.peak)
        states = model_states(counts, precise, zero, gpus=hardware.gpus, nodes=hardware.nodes)
        rows.append(Row(zero, states, worst))
    return rows


def _episode(context: int, queries: int, prompt: int, answer: int, shots: int = 0) -> EncodedEpisode:
    spans = tuple((1 + i * answer, 1 + (i + 1) * answer) for i in range(shots) if 1 + (i + 1) * answer <= context)
    return EncodedEpisode((0,) * context, (((0,) * prompt, (0,) * answer),) * queries, spans)


def batches_of(recipe: Recipe, episodes: Sequence[EncodedEpisode], size: int) -> Iterator[GistBatch]:
    """Batches as training packs them; where there are fewer episodes than one batch takes, they come again."""
    count = min(BATCHES, max(1, len(episodes) // size))
    for i in range(count):
        chosen = [episodes[j % len(episodes)] for j in range(i * size, (i + 1) * size)]
        if recipe.method == "full_attention":
            yield pack_full(chosen, recipe.full_attention.supervise_demonstrations)
        else:
            yield pack_gist(chosen, packing_of(recipe))


def whole(recipe: Recipe, name: str, default: int) -> int:
    """A whole number of `training`, at least 1. TrainingArguments would complain only after weights are loaded."""
    value = recipe.training.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"training.{name}: a whole number, at least 1, not {value!r}")
    return value


def checkpointing(training: dict[str, Any]) -> bool:
    """Whether activations are computed again, by either of the two names that transformers has for it."""
    return bool(training.get("gradient_checkpointing") or training.get("activation_checkpointing"))
