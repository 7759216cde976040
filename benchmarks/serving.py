"""Serving one task: reading its prefix against stock transformers with the task's examples cached, and written out.

    python -m benchmarks.serving [--dtype float32] [--json FILE]

A batch of 32 queries of 32 tokens about a task of 1,024 tokens, each answered with 16 new tokens, greedily and without an end;
a Llama of 6 layers and hidden size 512, 16 gists, bf16. All ways run `generate` of transformers on the same model:

prefix         our `Reader.generate`, a prefix a row
cached prompt  the examples' keys and values, computed once, copied and repeated to all rows, as transformers documents it
whole prompt   the examples and the query in every row, nothing reused
floor          as "cached prompt", of a text that has only as many tokens as there are gists: no reader can be faster

"+ head" is with the same output head as our reader's: stock `generate` multiplies the last rows of the prompts one after the
other, see `hyperllama.inference.reader.one_product_head`.

A state is what has to be kept of the task: keys and values at every layer. "compress" turns the examples into the prefix,
"prefill" computes the cache of the examples with the plain model. Sizes are options, for a larger model on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import torch
from torch import Tensor
from transformers import DynamicCache, set_seed

from benchmarks.measure import machine, median_ratio, paired, parser, peak_bytes, write_json
from benchmarks.training_step import GISTS, VOCABULARY
from hyperllama.base.decoder import cache_argument
from hyperllama.base.loading import random_base
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.inference.reader import Reader, one_product_head
from hyperllama.prefixes.prefix import Prefix

HEAD_DIM = 64
SIZES = {"context": 1024, "gists": GISTS, "rows": 32, "query": 32, "new": 16, "layers": 6, "hidden": 512}
CHECKED_ROWS = 4  # answered in every way, and alone, before anything is timed


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=3)
    for name, size in SIZES.items():
        options.add_argument(f"--{name}", type=int, default=size)
    options.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options.add_argument("--float32", dest="dtype", action="store_const", const="float32", help="short for --dtype float32")
    sizes = options.parse_args(arguments)
    rng, hypernetwork = Random(0), serving_hypernetwork(sizes)
    context, *queries = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (sizes.context, *[sizes.query] * sizes.rows)]
    check(Serving(hypernetwork, context, queries[:CHECKED_ROWS], sizes.new))  # in float32: the same, not what rounds alike
    hypernetwork.base.to(getattr(torch, sizes.dtype))
    serving = Serving(hypernetwork, context, queries, sizes.new)

    ways = serving.ways()
    memory = {name: peak_bytes(way) for name, way in ways.items()}
    seconds = paired(ways, sizes.rounds, warmup=0)  # taking the memory was the warm-up
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    states = {"prefix": serving.prefix.nbytes, **{name: nbytes(cache) for name, cache in serving.caches.items()}}
    states |= {f"{name} + head": states[name] for name in serving.caches}
    making = {"compress": serving.compress, "prefill": partial(serving.prefill, context)}
    making_memory = {name: peak_bytes(step) for name, step in making.items()}
    making_seconds = paired(making, 2 * sizes.rounds)
    figures = {
        "sizes": {name: getattr(sizes, name) for name in SIZES},
        "dtype": sizes.dtype,
        "seconds": seconds,
        "tokens_per_second": {name: sizes.rows * sizes.new / median for name, median in medians.items()},
        "times_prefix": {name: median_ratio(times, seconds["prefix"]) for name, times in seconds.items()},
        "prefix_to_floor": median_ratio(seconds["prefix"], seconds["floor + head"]),
        "state_bytes_a_task": states,
        "state_bytes_a_batch": {name: sizes.rows * state for name, state in states.items()},
        "peak_bytes": memory,
        "making_seconds": making_seconds,
        "making_peak_bytes": making_memory,
        "compress_to_prefill": median_ratio(making_seconds["compress"], making_seconds["prefill"]),
        "rounds": sizes.rounds,
    }
    show(figures)
    write_json(sizes.json, figures)


class Serving:
    """One task and a batch of queries about it, ready to be answered in each way."""

    def __init__(self, hypernetwork: GistHypernetwork, context: list[int], queries: list[list[int]], new: int):
        self.hypernetwork, self.context, self.queries, self.new = hypernetwork, context, queries, new
        self.model = hypernetwork.base
        self.reader = Reader(self.model, hypernetwork.tokenizer)
        self.prefix = self.compress()
        short = context[: hypernetwork.num_gists]
        self.caches = {"cached prompt": self.prefill(context), "floor": self.prefill(short)}
        self.prompts = {"cached prompt": context, "floor": short}

    def ways(self) -> dict[str, Callable[[], list[list[int]]]]:
        """Each way of answering the batch: a function that returns the new tokens of each row."""
        return {
            "prefix": self.from_prefix,
            "cached prompt": partial(self.from_cache, "cached prompt"),
            "whole prompt": self.from_whole_prompts,
            "floor": partial(self.from_cache, "floor"),
            "cached prompt + head": partial(self.with_head, "cached prompt"),
            "floor + head": partial(self.with_head, "floor"),
        }

    def with_head(self, name: str) -> list[list[int]]:
        """`from_cache` with the output head of our reader."""
        with one_product_head(self.model):
            return self.from_cache(name)

    def compress(self) -> Prefix:
        """The prefix of the context."""
        return self.hypernetwork.compress([self.context])[0]

    @torch.no_grad()
    def prefill(self, tokens: list[int]) -> DynamicCache:
        """The cache of a text, by the plain model."""
        cache = DynamicCache()
        self.model(input_ids=self._ids([tokens]), **cache_argument(self.model, cache), use_cache=True, logits_to_keep=1)
        return cache

    def from_prefix(self) -> list[list[int]]:
        """Our reader, with its stacking and batching."""
        prefixes, rows = [self.prefix] * len(self.queries), len(self.queries)
        settings = {"max_new_tokens": self.new, "eos_token_id": None, "batch_size": rows}
        return self.reader.generate(self.queries, prefixes, **settings)

    def from_cache(self, name: str) -> list[list[int]]:
        """Stock: a copy of the cache for every row. `generate` wants the tokens behind the cache too, and does not run them."""
        cache = copy.deepcopy(self.caches[name])
        cache.batch_repeat_interleave(len(self.queries))
        return self.stock([[*self.prompts[name], *query] for query in self.queries], **cache_argument(self.model, cache))

    def from_whole_prompts(self) -> list[list[int]]:
        """Stock: the context in every row."""
        return self.stock([[*self.context, *query] for query in self.queries])

    def stock(self, rows: list[list[int]], **cache: DynamicCache) -> list[list[int]]:
        """The new tokens of stock `generate` for rows of one length."""
        ids = self._ids(rows)
        settings = {"max_new_tokens": self.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **cache)
        return output[:, ids.shape[1] :].tolist()

    def alone(self, row: int) -> list[int]:
        """One query behind the prefix, by stock `generate` and nothing else of ours."""
        ids = self._ids([self.queries[row]])
        mask = torch.ones(1, self.prefix.rows + ids.shape[1], dtype=torch.long, device=ids.device)
        settings = {"max_new_tokens": self.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        settings |= cache_argument(self.model, self.prefix.to_cache())
        return self.model.generate(ids, attention_mask=mask, **settings)[0, ids.shape[1] :].tolist()

    def _ids(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.model.device)


def serving_hypernetwork(sizes: argparse.Namespace) -> GistHypernetwork:
    """At the default sizes the model of the other benchmarks, with a LoRA that does something."""
    set_seed(0)
    heads = max(sizes.hidden // HEAD_DIM, 1)
    architecture = {
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": 3 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "max_position_embeddings": max(2048, sizes.context + sizes.gists + sizes.query + sizes.new),
    }
    tokenizer = train_tokenizer(["a few words"], kind="words", vocab_size=0)
    base = random_base(architecture, vocab_size=VOCABULARY)
    hypernetwork = GistHypernetwork(base, gists=sizes.gists, rank=16, tokenizer=tokenizer)
    with torch.no_grad():
        for matrix in hypernetwork.lora.B.values():
            matrix.weight.normal_(std=0.02)
    return hypernetwork.eval()


def check(serving: Serving) -> None:
    """Speed counts only between ways that answer alike: RuntimeError if a cache, or a batch of prefixes, changes a token."""
    if serving.from_cache("cached prompt") != serving.from_whole_prompts():
        raise RuntimeError("behind the cached prompt stock generate says something else than behind the whole prompt")
    together = serving.from_prefix()
    for row, answer in enumerate(together):
        if answer != serving.alone(row):
            raise RuntimeError(f"row {row} of a batch of prefixes is not that of the prefix alone")


def nbytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values in a cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def show(figures: dict) -> None:
    """Print the figures as a table."""
    sizes = figures["sizes"]
    print(
        f"{sizes['rows']} queries of {sizes['query']} tokens, {sizes['new']} new ones each, about a task of "
        f"{sizes['context']:,} tokens; {figures['dtype']}; medians of {figures['rounds']} paired rounds; {machine()}\n"
    )
    print(f"{'':20} {'s a batch':>10} {'tokens/s':>10} {'x prefix':>9} {'KiB a task':>11} {'KiB a batch':>12} {'peak MiB':>9}")
    for name, speed in figures["tokens_per_second"].items():
        tasks, batches = (figures[key].get(name) for key in ("state_bytes_a_task", "state_bytes_a_batch"))
        kept = f"{tasks / 2**10:11,.0f} {batches / 2**10:12,.0f}" if tasks else f"{'-':>11} {'-':>12}"
        seconds, ratio = statistics.median(figures["seconds"][name]), figures["times_prefix"][name]
        print(f"{name:20} {seconds:10.3f} {speed:10,.0f} {ratio:9.2f} {kept} {figures['peak_bytes'][name] / 2**20:9,.0f}")
    print(f"\nthe prefix takes {figures['prefix_to_floor']:.3f} x the floor with the same head")
    for name, times in figures["making_seconds"].items():
        print(f"{name:20} {statistics.median(times):10.3f} s   peak {figures['making_peak_bytes'][name] / 2**20:,.0f} MiB")
    print(f"compress takes {figures['compress_to_prefill']:.3f} x prefill")


if __name__ == "__main__":
    main()
