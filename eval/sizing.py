"""Sizes of a training run from its recipe: its model without numbers, batches, and memory under each setting of DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from eval.flops import ModelCost
from eval.memory import SETTINGS, Parameters, States, Zero, model_states
from eval.tracing import Trace, trace_deep
from hyperllama.base.loading import find_config, random_config
from hyperllama.base.outline import outline
from hyperllama.commands.train import packed_model, packing_of
from hyperllama.data.packing import GistBatch, pack_full, pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.errors import UserError
from hyperllama.hypernetworks.registry import kind_of
from hyperllama.objectives.packed_model import PackedModel
from hyperllama.recipe.schema import Recipe, has_sink

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
    """Memory of one GPU under one setting: model states, and a step that is traced."""

    zero: Zero
    states: States
    step: Trace

    @property
    def total(self) -> int:
        """The peak, in bytes."""
        return self.states.total + self.step.peak


def base_config(recipe: Recipe, vocabulary: int | None = None) -> Any:
    """The transformers config of a recipe's base: of a random one, with `vocabulary` tokens or the recipe's.

    UserError for a family whose costs have not been checked. Models of experts look at numbers, and a traced step has none.
    """
    model = recipe.model
    if model.name_or_path:
        config = find_config(model.name_or_path, model.revision)
    else:
        config = random_config(model.architecture, vocab_size=vocabulary or model.vocab_size)
    ModelCost.of(config)
    return config


def bare_model(recipe: Recipe, config: Any, layers: int | None = None, *, deepspeed: bool = False) -> PackedModel:
    """What a run trains, without numbers, on the meta device, with a base of `layers` layers or all of them.

    DeepSpeed casts all weights to 16 bits where a recipe computes in them; without it transformers' Trainer does so in
    products only (autocast).
    """
    model, fresh = recipe.model, replace(recipe, start_from=None)
    base = outline(config, layers=layers, dtype=model.dtype, quantize=model.quantize)
    with torch.device("meta"):
        made = packed_model(fresh, base)
    if recipe.method == "hypernetwork" and has_sink(recipe):
        made.sink = 0  # any token: a tokenizer would say which
    if checkpointing(recipe.training):
        named = hasattr(PreTrainedModel, "activation_checkpointing_enable")  # not in older versions of transformers
        getattr(made, f"{'activation' if named else 'gradient'}_checkpointing_enable")()
    return made.to(torch.bfloat16) if deepspeed and halves(recipe.training) else made


class Steps:
    """Traced steps of a recipe, with a base of a config; each is traced once."""

    def __init__(self, recipe: Recipe, config: Any):
        self.recipe, self.config = recipe, config
        self._found: dict[tuple[int, bool], tuple[GistBatch, Trace]] = {}

    def of(self, batch: GistBatch, *, deepspeed: bool = False) -> Trace:
        """The step on a batch; with DeepSpeed there is no autocast, see `bare_model`."""
        cast = deepspeed and halves(self.recipe.training)
        if (key := (id(batch), cast)) not in self._found:
            make = partial(bare_model, self.recipe, self.config, deepspeed=cast)
            autocast = halves(self.recipe.training) and not cast
            step = trace_deep(make, self.config.num_hidden_layers, batch, autocast=autocast)
            self._found[key] = batch, step  # with the batch, whose id no other then gets
        return self._found[key][1]


def trains_all(recipe: Recipe) -> bool:
    """Whether all weights of a model are trained, in its own dtype."""
    return not recipe.full_attention.lora if recipe.method == "full_attention" else kind_of(recipe).trains_weights


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


def memory(steps: Steps, batches: Sequence[GistBatch], hardware: Hardware) -> Iterator[Row]:
    """Memory of a GPU under every setting, for the worst of `batches`: those with most tokens and most targets.

    A step is traced when its setting is asked for.
    """
    recipe = steps.recipe
    check_precision(recipe)
    worst = {id(one): one for one in (max(batches, key=lambda b: b.tokens), max(batches, key=lambda b: len(b.targets)))}
    counts = {cast: Parameters.of(bare_model(recipe, steps.config, deepspeed=cast)) for cast in (False, True)}
    for zero in SETTINGS:
        if zero.stage == 3 and recipe.model.quantize:
            continue
        if not zero.stage and trains_all(recipe) and recipe.model.dtype != "float32":
            continue  # a recipe that is refused: nothing would keep float32 weights
        states = model_states(counts[zero.stage > 0], zero, gpus=hardware.gpus, nodes=hardware.nodes)
        traces = (steps.of(batch, deepspeed=zero.stage > 0) for batch in worst.values())
        yield Row(zero, states, max(traces, key=lambda step: step.peak))


def check_precision(recipe: Recipe) -> None:
    """UserError for numbers that no run would take."""
    training = recipe.training
    if recipe.model.quantize and trains_all(recipe):
        what = "method full_attention" if recipe.method == "full_attention" else f"gist.kind={recipe.gist.kind}"
        raise UserError(f"model.quantize: {what} trains the base's weights, which 4 bits cannot be; remove it")
    if training.get("bf16") and training.get("fp16"):
        raise UserError("training.bf16, training.fp16: products are computed in one of them; remove the other")


def halves(training: dict[str, Any]) -> bool:
    """Whether products are computed in 16 bits."""
    return bool(training.get("bf16")) or bool(training.get("fp16"))


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
