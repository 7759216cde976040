"""How cost grows: with a context's tokens, with a prefix's rows, and with a store's tasks.

    python -m benchmarks.growth [--contexts 256 ... 32768] [--rows 4 ... 256] [--tasks 1 ... 10000] [--kind lora] [--json FILE]

"contexts": one context is compressed, float32, on a Llama of 2 layers and hidden size 256 with room for it; seconds of
attention and of all else, by the profiler, and memory at the peak. "rows": 8 queries of 32 tokens are read behind a prefix of
so many rows, and its file is written. "tasks": `benchmarks.stores` on prefixes of one layer, and every file read whole.
Exponents are slopes of the logarithms over the upper half of the sizes, by least squares: 1 is linear. What is worse than
linear is named, attention aside; up to 1.2 is taken for the noise of a slope.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import set_seed

from benchmarks import stores
from benchmarks.bases import KINDS
from benchmarks.measure import machine, paired, parser, peak_bytes, write_json
from benchmarks.parts import part_of
from hyperllama.base.loading import random_base
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.inference.scoring import Question, continuation_scores
from hyperllama.prefixes.store import PrefixStore

CONTEXTS, ROWS, TASKS = tuple(2**n for n in range(8, 16)), tuple(2**n for n in range(2, 9)), (1, 10, 100, 1000, 3000, 10_000)
VOCABULARY, QUERIES, QUERY = 1000, 8, 32
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
LINEAR = 1.2
ATTENTION = "compress: attention, seconds"  # grows with the square of a context


def maker(positions: int, gists: int, kind: str) -> Hypernetwork:
    """A hypernetwork that makes so many rows, on a model of so many positions."""
    set_seed(0)
    architecture = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "max_position_embeddings": positions}
    return KINDS[kind](random_base(architecture, vocab_size=VOCABULARY), gists=gists, rank=16).eval()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """So many token ids."""
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def compressing(sizes: Sequence[int], rounds: int, kind: str) -> dict[str, dict[int, float]]:
    """Seconds of attention and of the rest, and bytes at the peak, for contexts of so many tokens."""
    hypernetwork, found = maker(max(sizes) + 64, 16, kind), {}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    for size in sizes:
        context = tokens(size)

        def run(context=context):
            hypernetwork.compress([context])

        run()  # what is made once is not counted
        found.setdefault("compress: peak bytes", {})[size] = peak_bytes(run)
        with profile(activities=activities, record_shapes=True) as seen:
            for _ in range(rounds):
                run()
        on_gpu = torch.cuda.is_available()
        spent = {True: 0.0, False: 0.0}
        for event in seen.events():
            micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[part_of(event, VOCABULARY) == "attention"] += micros / 1e6 / rounds
        found.setdefault(ATTENTION, {})[size] = spent[True]
        found.setdefault("compress: all else, seconds", {})[size] = spent[False]
    return found


def reading(sizes: Sequence[int], rounds: int, kind: str) -> dict[str, dict[int, float]]:
    """Seconds of the likelihoods of answers to queries behind a prefix of so many rows, and the bytes of its file."""
    found: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            hypernetwork = maker(2048, size, kind)
            (prefix,) = hypernetwork.compress([tokens(512)])
            asked = [tuple(tokens(QUERY, seed).tolist()) for seed in range(QUERIES)]
            questions = [Question(ids[:-4], (ids[-4:],), prefix) for ids in asked]

            def read(model=hypernetwork.base, questions=questions):
                continuation_scores(model, questions)

            found.setdefault("read: seconds", {})[size] = middle(paired({"read": read}, rounds)["read"])
            path = Path(folder) / f"{size}.safetensors"
            prefix.save(path)
            found.setdefault("read: bytes of the file", {})[size] = path.stat().st_size
    return found


def storing(sizes: Sequence[int], rounds: int) -> dict[str, dict[int, float]]:
    """Seconds of what is done with a store of so many tasks, see `benchmarks.stores`."""
    found: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for before, size in zip((0, *sizes), sizes):
            stores.fill(Path(folder), before, size)
            seconds = stores.measure(Path(folder), size, rounds, verb=False)
            seconds["check"] = stores.median(lambda: PrefixStore(folder, create=False).check(), rounds)
            for name, one in seconds.items():
                found.setdefault(f"store: {name}, seconds", {})[size] = one
    return found


def exponent(found: dict[int, float]) -> float:
    """The slope of the logarithm over that of the size, by least squares over the upper half of sizes; 0 for one size.

    >>> round(exponent({1: 100.0, 2: 100.0, 4: 16.0, 8: 64.0}), 3)
    2.0
    """
    points = [(math.log(size), math.log(max(value, 1e-9))) for size, value in sorted(found.items())]
    points = points[min(len(points) // 2, max(0, len(points) - 2)) :]
    x, y = (sum(side) / len(points) for side in zip(*points))
    spread = sum((a - x) ** 2 for a, _ in points)
    return sum((a - x) * (b - y) for a, b in points) / spread if spread else 0.0


def middle(seconds: Sequence[float]) -> float:
    """The median, or the upper one of two in the middle."""
    return sorted(seconds)[len(seconds) // 2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables with exponents, write the figures."""
    options = parser(__doc__, rounds=3)
    for name, sizes in (("contexts", CONTEXTS), ("rows", ROWS), ("tasks", TASKS)):
        options.add_argument(f"--{name}", type=int, nargs="*", default=sizes)
    options.add_argument("--kind", choices=KINDS, default="lora")
    chosen = options.parse_args(arguments)
    figures: dict = {"kind": chosen.kind, "rounds": chosen.rounds, "exponents": {}}
    for title, sizes, run in (
        ("contexts", chosen.contexts, lambda sizes: compressing(sizes, chosen.rounds, chosen.kind)),
        ("rows", chosen.rows, lambda sizes: reading(sizes, chosen.rounds, chosen.kind)),
        ("tasks", chosen.tasks, lambda sizes: storing(sizes, chosen.rounds)),
    ):
        figures[title] = run(sorted(sizes)) if sizes else {}
        figures["exponents"] |= {name: exponent(found) for name, found in figures[title].items()}
        report(title, figures[title])
    worse = [name for name, slope in figures["exponents"].items() if slope > LINEAR and name != ATTENTION]
    print(f"\nworse than linear: {', '.join(worse) or 'nothing but attention'}\n{machine()}")
    write_json(chosen.json, figures)


def report(title: str, figures: dict[str, dict[int, float]]) -> None:
    """Print a table: a column for each size, and the exponent."""
    if not figures:
        return
    sizes = list(next(iter(figures.values())))
    print(f"\n{title:48}" + "".join(f"{size:>10,}" for size in sizes) + "  exponent")
    for name, found in figures.items():
        told = [f"{value / 2**20:.1f} MiB" if "bytes" in name else f"{value:.4f}" for value in found.values()]
        print(f"{name:48}" + "".join(f"{value:>10}" for value in told) + f"{exponent(found):10.2f}")


if __name__ == "__main__":
    main()
