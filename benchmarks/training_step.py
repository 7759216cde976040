"""One training step, packed, against three ways in which others compute it.

    python -m benchmarks.training_step [--json FILE]

A ragged batch: 4 contexts of 200 to 1,024 tokens, 4 queries each of 20 to 80 tokens; a Llama of 6 layers and hidden size 512,
16 gists, LoRA of rank 16; forward and backward under bf16 autocast. Tokens are real tokens: padding does not count. "of
products" is the share of the rate of large matrix products that the packed step's FLOPs, whoever computes them, come to.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from random import Random

import torch
from transformers import set_seed

from benchmarks.measure import machine, matmul_rate, median_ratio, paired, parser, peak_bytes, write_json
from benchmarks.peers import row_per_episode, row_per_query, two_pass
from eval.flops import ModelCost
from hyperllama.base.loading import random_base
from hyperllama.data.packing import pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.hypernetworks.gist_lora import GistHypernetwork

CONTEXTS, QUERIES, ANSWER, GISTS, VOCABULARY = (200, 420, 700, 1024), 4, 8, 16, 32_000
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
PEERS = {"row_per_query": row_per_query, "row_per_episode": row_per_episode, "two_pass": two_pass}


def ragged_episodes(seed: int = 0) -> list[EncodedEpisode]:
    """Random tokens in the benchmark's lengths; a query of n tokens ends in an answer of 8."""
    rng = Random(seed)

    def tokens(n):
        return tuple(rng.randrange(VOCABULARY) for _ in range(n))

    return [
        EncodedEpisode(tokens(n), tuple((tokens(rng.randint(20, 80) - ANSWER), tokens(ANSWER)) for _ in range(QUERIES)))
        for n in CONTEXTS
    ]


def benchmark_hypernetwork() -> GistHypernetwork:
    """The benchmark's model, with a LoRA that does something."""
    set_seed(0)
    hypernetwork = GistHypernetwork(random_base(ARCHITECTURE, vocab_size=VOCABULARY), gists=GISTS, rank=16)
    with torch.no_grad():
        for matrix in hypernetwork.lora.B.values():
            matrix.weight.normal_(std=0.02)
    return hypernetwork.train()


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--float32", action="store_true", help="no autocast: for processors without bf16 instructions")
    options = arguments.parse_args()
    hypernetwork, episodes = benchmark_hypernetwork(), ragged_episodes()
    device = hypernetwork.gists.device
    losses = {"packed": lambda: hypernetwork(pack_gist(episodes, GISTS).to(device))}
    losses |= {name: partial(peer, hypernetwork, episodes) for name, peer in PEERS.items()}

    def step(loss):
        hypernetwork.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=not options.float32):
            result = loss()
        result.mean.backward()

    with torch.no_grad():  # in float32: the same loss, not one that rounds alike
        values = {name: loss().mean.item() for name, loss in losses.items()}
    steps = {name: partial(step, loss) for name, loss in losses.items()}
    memory = {name: peak_bytes(run) for name, run in steps.items()}
    seconds = paired(steps, options.rounds, warmup=0)  # taking the memory was the warm-up
    batch = pack_gist(episodes, GISTS)
    tokens, rank = batch.tokens, hypernetwork.lora.rank
    flops = ModelCost.of(hypernetwork.base.config).train(batch.layout, len(batch.targets), rank=rank).total
    rate = matmul_rate(device, torch.float32 if options.float32 else torch.bfloat16)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    figures = {
        "tokens": tokens,
        "seconds": medians,
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "peak_bytes": memory,
        "flops": flops,
        "matmul_rate": rate,
        "share_of_matmul_rate": {name: flops / median / rate for name, median in medians.items()},
        "ratios": {name: median_ratio(seconds[name], seconds["packed"]) for name in PEERS},
        "losses": values,
        "rounds": options.rounds,
        "autocast": None if options.float32 else "bfloat16",
    }
    print(f"{tokens:,} real tokens a step; median of {options.rounds} paired rounds; {machine()}")
    print(f"{flops / 1e9:.0f} GFLOP, of which {rate / 1e9:,.0f} a second are reached in large products")
    print(f"{'':16} {'tokens/s':>9} {'of products':>12} {'peak MiB':>9} {'packed is':>10} {'loss (fp32)':>12}")
    for name in losses:
        ratio = f"{figures['ratios'][name]:.2f}x" if name in PEERS else ""
        speed, peak = figures["tokens_per_second"][name], memory[name] / 2**20
        share = figures["share_of_matmul_rate"][name]
        print(f"{name:16} {speed:9,.0f} {share:12.0%} {peak:9,.0f} {ratio:>10} {values[name]:12.7f}")
    write_json(options.json, figures)


def draw(runs: dict[str, dict], path: Path) -> None:
    """Tokens per second and peak memory of each way, from the figures of runs by the name of their precision."""
    from matplotlib.figure import Figure

    labels = {
        "packed": "packed: one row, one pass (ours)",
        "two_pass": "two padded passes",
        "row_per_episode": "a padded row per episode,\ndense mask",
        "row_per_query": "a padded row per query,\ndense mask",
    }
    names = list(reversed(labels))
    figure = Figure(figsize=(9, 2 + 1.2 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), 2, sharey=True, squeeze=False)
    for (precision, figures), (speed, memory) in zip(runs.items(), axes):
        for axis, values, unit in (
            (speed, figures["tokens_per_second"], 1),
            (memory, figures["peak_bytes"], 2**20),
        ):
            found = [values[name] / unit for name in names]
            axis.barh([labels[n] for n in names], found, color=["#2a7f62" if n == "packed" else "#c8703a" for n in names])
            for i, value in enumerate(found):
                axis.text(value + max(found) * 0.015, i, f"{value:,.0f}", va="center", fontsize=8)
            axis.set_xlim(0, max(found) * 1.15)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        speed.set_title(f"{precision}: tokens per second (higher is better)", fontsize=9)
        memory.set_title("peak memory of a step, MiB (lower is better)", fontsize=9)
    threads = next(iter(runs.values()))["machine"]["threads"]
    where = next(iter(runs.values()))["machine"]["gpu"] or f"a CPU ({threads} threads)"
    figure.suptitle(f"One training step, forward and backward, of the same batch and weights, on {where}", fontsize=10)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
