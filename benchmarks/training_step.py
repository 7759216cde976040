"""One training step, packed, against ways in which others compute it; and where its time goes.

    python -m benchmarks.training_step [--base FOLDER | --shape NAME] [--layers N] [--ways ...] [--json FILE]

A ragged batch: 4 contexts of 200 to 1,024 tokens, 4 queries each of 20 to 80 tokens; 16 gists, LoRA of rank 16; forward and
backward under bf16 autocast, frozen weights in bf16. The model is a Llama of 6 layers and hidden size 512, or `--base`, any
folder of a model, or `--shape`, the dimensions of a published one with random weights and few layers. Ways of
`benchmarks.peers` compute the same loss of the same weights, and those of stock PEFT (`benchmarks.stock_step`, which says what
each is) learn from the same text in full attention, without a hypernetwork. Ways that compute the same thing have to give the
same loss in float32 first.

Tokens are the real ones of contexts and queries, each counted once: neither padding, nor gists, nor a context that a way reads
again for every query. All ways see the same of them, so tokens a second compare as seconds do. "of products" is the share of
the rate of matrix products that the packed step's FLOPs, whoever computes them, come to: of large square ones, and of those of
this model's own shapes. A way that does not fit into memory is left out, and named.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.bases import GISTS, KINDS, RANK, SHAPES, VOCABULARY, benchmark_base, benchmark_hypernetwork, hypernetwork_on
from benchmarks.measure import machine, matmul_rate, median_ratio, paired, parser, peak_bytes, refuse_lack_of_memory, write_json
from benchmarks.parts import Spent, by_part, data_seconds, own_product_rate, report
from benchmarks.peers import row_per_episode, row_per_query, two_pass
from benchmarks.stock_step import ALIKE, STOCK, Way, stock_ways
from hyperllama.base.loading import load_tokenizer
from hyperllama.data.packing import pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError
from hyperllama.hypernetworks.base import Hypernetwork

__all__ = ["GISTS", "VOCABULARY", "benchmark_hypernetwork", "ragged_episodes"]
CONTEXTS, QUERIES, ANSWER = (200, 420, 700, 1024), 4, 8
PEERS = {"row_per_query": row_per_query, "row_per_episode": row_per_episode, "two_pass": two_pass}


def ragged_episodes(seed: int = 0, contexts: Sequence[int] = CONTEXTS, vocabulary: int = VOCABULARY) -> list[EncodedEpisode]:
    """Random tokens in the benchmark's lengths; a query of n tokens ends in an answer of 8."""
    rng = Random(seed)

    def tokens(n):
        return tuple(rng.randrange(vocabulary) for _ in range(n))

    return [
        EncodedEpisode(tokens(n), tuple((tokens(rng.randint(20, 80) - ANSWER), tokens(ANSWER)) for _ in range(QUERIES)))
        for n in contexts
    ]


def names_of(kind: str, asked: Sequence[str] | None) -> list[str]:
    """The ways that are asked for and packed, or all that there are for a kind; UserError for one that there is not."""
    there = ["packed", *(PEERS if kind == "lora" else ()), *STOCK]
    if unknown := sorted(set(asked or ()) - set(there)):
        raise UserError(f"--ways: no way {', '.join(unknown)} of kind {kind}; choose from {', '.join(there)}")
    return [name for name in there if asked is None or name in ("packed", *asked)]


def all_ways(names: Sequence[str], hypernetwork: Hypernetwork, episodes: Sequence[EncodedEpisode], options) -> dict[str, Way]:
    """Ways by name, those of stock PEFT on models of their own."""
    device = hypernetwork.base.device
    found = {"packed": Way([lambda: hypernetwork(pack_gist(episodes, GISTS).to(device))], hypernetwork)}
    found |= {name: Way([partial(peer, hypernetwork, episodes)], hypernetwork) for name, peer in PEERS.items()}
    if set(names) & set(STOCK):
        found |= stock_ways(partial(benchmark_base, options.base, options.shape, options.layers), episodes, RANK, GISTS)
    return {name: found[name] for name in names}


def step(way: Way, half: bool) -> None:
    """Forward and backward of every piece; gradients add up."""
    way.model.zero_grad(set_to_none=True)
    for piece in way.pieces:
        with torch.autocast(next(way.model.parameters()).device.type, torch.bfloat16, enabled=half):
            loss = piece()
        loss.sum.backward()


def round_frozen(model: nn.Module) -> None:
    """Frozen weights to bf16, as recipes for pretrained bases have them: else autocast would round them anew in every step."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


@torch.no_grad()
def loss_of(way: Way) -> float:
    """The loss a token in float32: the same loss, not one that rounds alike."""
    losses = [piece() for piece in way.pieces]
    return sum(loss.sum.item() for loss in losses) / sum(int(loss.count) for loss in losses)


def check(losses: dict[str, float]) -> None:
    """RuntimeError unless ways that compute the same thing have the same loss."""
    for same in (("packed", *PEERS), ALIKE):
        found = {name: losses[name] for name in same if name in losses}
        if found and max(found.values()) - min(found.values()) > 1e-4 * abs(min(found.values())):
            raise RuntimeError(f"ways that should compute the same loss do not: {found}")


def fitting(ways: dict[str, Way], run) -> dict:
    """What `run` returns of each way that fits into memory. The others are named, and taken out of `ways`."""
    found = {}
    for name, way in list(ways.items()):
        try:
            found[name] = run(way)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "memory" not in str(error):
                raise
            print(f"{name}: left out, it does not fit into memory")
            del ways[name]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write the figures."""
    options = asked().parse_args(arguments)
    half, names = not options.float32, names_of(options.kind, options.ways)
    base = benchmark_base(options.base, options.shape, options.layers)
    hypernetwork = hypernetwork_on(base, options.kind)
    episodes = ragged_episodes(contexts=options.contexts, vocabulary=base.get_output_embeddings().weight.shape[0])
    refuse_lack_of_memory()
    ways = all_ways(names, hypernetwork, episodes, options)
    losses = fitting(ways, loss_of)
    check(losses)
    if half:
        for way in ways.values():
            round_frozen(way.model)
    memory = fitting(ways, lambda way: peak_bytes(partial(step, way, half)))
    # Taking the memory was the warm-up.
    seconds = paired({name: partial(step, way, half) for name, way in ways.items()}, options.rounds, warmup=0)
    spent = parts_of(hypernetwork, episodes, options, half)
    figures = {
        "base": options.base or options.shape or "own",
        "layers": base.config.num_hidden_layers,
        "kind": options.kind,
        "autocast": "bfloat16" if half else None,
        "rounds": options.rounds,
        "losses": losses,
        "peak_bytes": {name: memory[name] for name in ways},
        "parts": {name: {"seconds": part.seconds, "flops": part.flops} for name, part in spent.items()},
    }
    figures |= speeds(seconds, episodes, base, sum(part.flops for part in spent.values()), half)
    tell(figures)
    report(spent, figures["own_product_rate"])
    write_json(options.json, figures)


def speeds(
    seconds: dict[str, list[float]], episodes: Sequence[EncodedEpisode], base: PreTrainedModel, flops: int, half: bool
) -> dict:
    """Tokens a second, shares of the rates of products, and ratios, of the seconds of each way in each round."""
    tokens = sum(len(e.context) + sum(len(prompt) + len(answer) for prompt, answer in e.queries) for e in episodes)
    rows, dtype = pack_gist(episodes, GISTS).tokens, torch.bfloat16 if half else torch.float32
    square, own = matmul_rate(base.device, dtype), own_product_rate(base, rows, dtype)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "tokens": tokens,
        "packed_rows": rows,
        "seconds": medians,
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "flops": flops,
        "matmul_rate": square,
        "own_product_rate": own,
        "share_of_matmul_rate": {name: flops / median / square for name, median in medians.items()},
        "share_of_own_product_rate": {name: flops / median / own for name, median in medians.items()},
        "ratios": {name: median_ratio(times, seconds["packed"]) for name, times in seconds.items() if name != "packed"},
    }


def asked():
    """The options."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--float32", action="store_true", help="no autocast: for processors without bf16 instructions")
    which = options.add_mutually_exclusive_group()
    which.add_argument("--base", help="a folder of a model")
    which.add_argument("--shape", choices=SHAPES, help="a published model's dimensions, with random weights")
    options.add_argument("--layers", type=int, help="the first so many layers of the model")
    options.add_argument("--kind", choices=KINDS, default="lora", help="of hypernetwork; peers are written for lora alone")
    options.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS, help="tokens of each episode's context")
    options.add_argument("--ways", nargs="*", help="which ways beside packed")
    return options


def parts_of(hypernetwork: Hypernetwork, episodes: Sequence[EncodedEpisode], options, half: bool) -> dict[str, Spent]:
    """What each part of a whole packed step takes, AdamW's step and the drawing of data included."""
    way = Way([lambda: hypernetwork(pack_gist(episodes, GISTS).to(hypernetwork.base.device))], hypernetwork)
    optimiser = torch.optim.AdamW(hypernetwork.trainable().values(), lr=0.0)

    def whole() -> None:
        step(way, half)
        optimiser.step()

    spent = by_part(whole, hypernetwork.base.get_output_embeddings().weight.shape[0], max(1, options.rounds // 2))
    texts = ["some words of a byte-level tokenizer, which knows few of them"]
    tokenizer = load_tokenizer(options.base) if options.base else train_tokenizer(texts, kind="bytes", vocab_size=300)
    spent["data"].seconds = data_seconds(tokenizer) * pack_gist(episodes, GISTS).tokens
    return spent


def tell(figures: dict) -> None:
    """Print the ways side by side."""
    square, own, flops = figures["matmul_rate"], figures["own_product_rate"], figures["flops"]
    print(f"{figures['base']}, {figures['layers']} layers, kind {figures['kind']}; {figures['tokens']:,} real tokens a step")
    print(f"median of {figures['rounds']} paired rounds; {machine()}")
    print(f"packed {flops / 1e9:.0f} GFLOP; products reach {square / 1e9:,.0f} GFLOP/s large, {own / 1e9:,.0f} at own shapes")
    print(
        f"{'':22} {'tokens/s':>9} {'of products: large':>19} {'own':>5} {'peak MiB':>9} {'packed is':>10} {'loss (fp32)':>12}"
    )
    for name, speed in figures["tokens_per_second"].items():
        ratio = f"{figures['ratios'][name]:.2f}x" if name in figures["ratios"] else ""
        shares = [figures[share][name] for share in ("share_of_matmul_rate", "share_of_own_product_rate")]
        peak, loss = figures["peak_bytes"][name] / 2**20, figures["losses"][name]
        print(f"{name:22} {speed:9,.1f} {shares[0]:19.0%} {shares[1]:5.0%} {peak:9,.0f} {ratio:>10} {loss:12.7f}")


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
