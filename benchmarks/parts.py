"""Where a training step's time goes, by part, and what is left to win of each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerBase

from benchmarks.bases import GISTS
from benchmarks.measure import paired
from hyperllama.base.decoder import layers_of
from hyperllama.data.json_lines import read_json_lines_tasks
from hyperllama.data.packing import pack_gist
from hyperllama.data.stream import Collator, EpisodeStream
from hyperllama.data.text import Encoder, Limits, TextFormat

PARTS = ("attention", "linear products", "head and loss", "optimiser", "data", "rest")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
OF_LOSS = ("log_softmax", "logsoftmax", "nll_loss", "nllloss", "cross_entropy", "kl_div")
TASKS = Path(__file__).parents[1] / "recipes" / "words" / "train"


@dataclass
class Spent:
    """Seconds of a part, its FLOPs, and its costliest operations by name."""

    seconds: float = 0.0
    flops: int = 0
    operations: dict[str, float] | None = None


def by_part(step: Callable[[], None], vocabulary: int, rounds: int) -> dict[str, Spent]:
    """Means over `rounds` profiled steps of what each of `PARTS` but data takes; FLOPs of products and of attention.

    A part's time is that of the operations that the profiler finds in it, on the GPU where there is one. Whatever touches
    logits, which are as wide as the `vocabulary`, belongs to the head.
    """
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    step()
    with profile(activities=kinds, record_shapes=True, with_flops=True, acc_events=True) as found:
        for _ in range(rounds):
            step()
    spent = {part: Spent(operations=defaultdict(float)) for part in PARTS}
    for event in found.events():
        micros = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        part = spent[part_of(event, vocabulary)]
        part.seconds += micros / 1e6 / rounds
        part.operations[event.name] += micros / 1e6 / rounds
        part.flops += flops_of(event) // rounds
    return spent


def part_of(event, vocabulary: int) -> str:
    """Which of `PARTS` an event of the profiler belongs to: by its name and shapes, and by those of what called it."""
    names = [one.name.lower() for one in _chain(event)]
    if any(name.startswith("optimizer.") for name in names):
        return "optimiser"
    if any("scaled_dot_product" in name or "scaleddotproduct" in name or "flash_attention" in name for name in names):
        return "attention"
    wide = any(vocabulary in shape for one in _chain(event) for shape in one.input_shapes or () if isinstance(shape, list))
    if not any("embedding" in name for name in names) and (wide or any(w in name for w in OF_LOSS for name in names)):
        return "head and loss"
    return "linear products" if any(name in PRODUCTS for name in names) else "rest"


def _chain(event) -> Iterator:
    while event is not None:
        yield event
        event = event.cpu_parent


def flops_of(event) -> int:
    """FLOPs of a product, as torch counts them, or of attention: 4 a pair, dimension and head, and 8 for its gradients."""
    if event.name in PRODUCTS:
        return event.flops or 0
    if not event.name.startswith("aten::_scaled_dot_product"):
        return 0
    backward = event.name.endswith("_backward")
    shapes = [shape for shape in event.input_shapes if len(shape) == 4][backward:]  # the first is the output's gradient
    (batch, heads, rows, width), (_, _, keys, _) = shapes[:2]
    return (8 if backward else 4) * batch * heads * rows * keys * width


def own_product_rate(model, rows: int, dtype: torch.dtype, rounds: int = 5) -> float:
    """FLOP/s of a layer's linear products at their own shapes, `rows` rows: forward, and the gradient of what goes in.

    All of them one after the other, so that each counts as much as it takes in a step.
    """
    linears = [module for module in layers_of(model)[0].modules() if type(module) is torch.nn.Linear]
    place, flops, runs = {"device": model.device, "dtype": dtype}, 0, []
    for linear in linears:
        weight = torch.randn(linear.out_features, linear.in_features, **place)
        inside, outside = torch.randn(rows, linear.in_features, **place), torch.randn(rows, linear.out_features, **place)
        runs += [(inside, weight.T), (outside, weight)]
        flops += 4 * rows * weight.numel()

    def multiply():
        for a, b in runs:
            a @ b

    seconds = sorted(paired({"products": multiply}, rounds)["products"])[rounds // 2]
    return flops / seconds


def data_seconds(tokenizer: PreTrainedTokenizerBase, batches: int = 20) -> float:
    """Seconds a token to draw episodes of the word tasks in `recipes`, tokenise and pack them; no piece of text is new."""
    source = read_json_lines_tasks(str(TASKS), instances=100)
    encoder, settings = Encoder(tokenizer, TextFormat(), Limits(1024, 384, "skip")), {"shots": 16, "min_shots": 1, "queries": 4}
    stream, collate = EpisodeStream(source, encoder, seed=0, length=8 * batches, **settings), Collator(pack_gist, GISTS)

    def tokens(numbers: Iterable[int]) -> int:
        return sum(collate([stream[j] for j in range(i, i + 4)])["batch"].tokens for i in numbers)

    tokens(range(0, 4 * batches, 4))  # what is tokenised once is kept
    start = time.perf_counter()
    drawn = tokens(range(4 * batches, 8 * batches, 4))
    return (time.perf_counter() - start) / drawn


def report(spent: dict[str, Spent], rate: float) -> None:
    """Print a table: seconds, share, FLOPs, their rate, and the seconds above those that the FLOPs take at `rate` FLOP/s."""
    total = sum(part.seconds for part in spent.values())
    print(f"\na whole step by part; left to win: what it takes beyond its FLOPs at {rate / 1e9:,.0f} GFLOP/s")
    print(f"{'':16} {'seconds':>8} {'share':>6} {'GFLOP':>8} {'GFLOP/s':>8} {'left to win, s':>15}   costliest operations")
    for name, part in spent.items():
        speed = f"{part.flops / part.seconds / 1e9:,.0f}" if part.flops else ""
        costly = sorted((part.operations or {}).items(), key=lambda item: -item[1])[:3]
        told = ", ".join(f"{operation.removeprefix('aten::')} {seconds:.3f}" for operation, seconds in costly)
        print(
            f"{name:16} {part.seconds:8.3f} {part.seconds / total:6.1%} {part.flops / 1e9:8,.0f} {speed:>8} "
            f"{part.seconds - part.flops / rate:15.3f}   {told}"
        )
    flops = sum(part.flops for part in spent.values())
    print(f"{'all':16} {total:8.3f} {1:6.0%} {flops / 1e9:8,.0f} {flops / total / 1e9:8,.0f} {total - flops / rate:15.3f}")
