"""How many tokens one CPU core feeds: S-NI episodes drawn, tokenised and packed.

    python -m benchmarks.data [--root FOLDER] [--json FILE]

Episodes are those of recipes/sni-small.yaml: up to 8 demonstrations, 4 queries, contexts of up to 1,024 tokens, 16 gists,
batches of 8. "cold" is the first pass over the tasks, whose examples are tokenised; "cached" is every pass after it.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch

from benchmarks.measure import machine, parser, write_json
from hyperllama.data.packing import pack_gist
from hyperllama.data.sni import read_sni
from hyperllama.data.stream import Collator, EpisodeStream
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer

BATCH, BATCHES, GISTS = 8, 100, 16


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--root", default="../shared/data/sni", help="a clone of natural-instructions")
    arguments = options.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    torch.set_num_threads(1)
    source = read_sni(arguments.root, split="train", splits="splits/default", instances=100)
    tokenizer = train_tokenizer(source.texts(), kind="bytes", vocab_size=8192)
    encoder = Encoder(tokenizer, TextFormat(), Limits(1024, 384, "skip"))
    count = BATCH * BATCHES
    settings = {"length": count * (arguments.rounds + 20), "shots": 8, "min_shots": 1, "queries": 4}
    stream, collate = EpisodeStream(source, encoder, seed=0, **settings), Collator(pack_gist, GISTS)

    def rate(first: int) -> float:
        start, tokens = time.perf_counter(), 0
        for i in range(first, first + count, BATCH):
            tokens += collate([stream[j] for j in range(i, i + BATCH)])["batch"].tokens
        return tokens / (time.perf_counter() - start)

    cold = rate(0)
    for task in source.tasks:  # every piece of text once, as the first epochs do
        for example in (*task.demonstrations, *task.examples):
            encoder.prompt(example.input)
            for reference in example.references:
                encoder.answer(reference)
    rates = [rate(count * (i + 1)) for i in range(arguments.rounds)]
    cached = statistics.median(rates)
    print(f"{len(source.tasks)} tasks, {len(source):,} examples, batches of {BATCH} episodes, one core\n")
    print(f"  cold     {cold:10,.0f} tokens/s")
    print(f"  cached   {cached:10,.0f} tokens/s   (median of {arguments.rounds}, {min(rates):,.0f} to {max(rates):,.0f})")
    figures = {"tokens_per_second": {"cold": cold, "cached": cached, "rounds": rates}, "root": Path(arguments.root).name}
    write_json(arguments.json, figures)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
