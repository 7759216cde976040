"""How fast many tasks become prefixes in a store: packed passes against one task after the other.

    python -m benchmarks.compress [--large] [--tasks N] [--json FILE]

200 ragged tasks: short ones of 20 to 60 tokens, long ones of 20 to 600; 16 gists; float32 on a Llama of 2 layers and hidden
size 64, or with `--large` on that of the other benchmarks, of 6 layers and hidden size 512, which takes some minutes a round.
"store" is all of it, from text to files and an index: tokenised, compressed, signed, written, synced. "compress" is without
files. "one at a time" is the same code with a task a pass.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from random import Random

from transformers import set_seed

from benchmarks.measure import machine, median_ratio, paired, parser, write_json
from benchmarks.training_step import GISTS, VOCABULARY, benchmark_hypernetwork
from hyperllama.base.loading import random_base
from hyperllama.data.episode import Example, Task
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.inference.many import compress_into, passes, shown_of
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.store import PrefixStore

LENGTHS = {"short": (20, 60), "long": (20, 600)}
PASSES = {"one at a time": 1, "passes of 2,048": 2048, "passes of 16,384": 16384}
WORDS = [f"w{i}" for i in range(1000)]
SHOT = 10  # words of a demonstration


def ragged_tasks(tasks: int, low: int, high: int) -> list[Task]:
    """Tasks of random words, whose contexts have about `low` to `high` tokens."""
    rng = Random(0)

    def example() -> Example:
        return Example(" ".join(rng.choices(WORDS, k=SHOT - 1)), rng.choice(WORDS))

    return [Task(f"task{i}", "", (), tuple(example() for _ in range(rng.randint(low, high) // SHOT))) for i in range(tasks)]


def small_hypernetwork() -> GistHypernetwork:
    """A model that costs little, as a GPU makes a larger one do: what is left is the work around it."""
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    architecture = {"model_type": "llama", **sizes, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    return GistHypernetwork(random_base(architecture, vocab_size=VOCABULARY), gists=GISTS, rank=16)


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--tasks", type=int, default=200)
    options.add_argument("--large", action="store_true", help="the model of the other benchmarks")
    arguments = options.parse_args()
    hypernetwork = (benchmark_hypernetwork() if arguments.large else small_hypernetwork()).eval()
    tokenizer = train_tokenizer(WORDS, kind="words", vocab_size=0)
    text_format = TextFormat(query=" {input}", answer=" {output}", separator="")
    scratch = tempfile.TemporaryDirectory()

    def store(tasks: list[Task], batch_tokens: int) -> None:
        encoder, settings = Encoder(tokenizer, text_format, Limits()), {"run": "a run", "progress": lambda line: None}
        folder = Path(tempfile.mkdtemp(dir=scratch.name))  # a new one each time, removed in the end: removing takes time
        compress_into(PrefixStore(folder), hypernetwork, encoder, tasks, batch_tokens=batch_tokens, **settings)

    def compress(tasks: list[Task], batch_tokens: int) -> list[Prefix]:
        encoder = Encoder(tokenizer, text_format, Limits())
        encoded = [shown_of(task).encode(encoder, hypernetwork.identity, "a run") for task in tasks]
        return [p for b in passes(encoded, GISTS, batch_tokens) for p in hypernetwork.compress(*zip(*b))]

    figures: dict = {"tasks": arguments.tasks, "model": "large" if arguments.large else "small"}
    for name, (low, high) in LENGTHS.items():
        tasks = ragged_tasks(arguments.tasks, low, high)
        worst = largest_difference(compress(tasks, 1), compress(tasks, max(PASSES.values())))
        print(f"{name}: {arguments.tasks} tasks of {low} to {high} tokens; packed prefixes differ by at most {worst:.1e}")
        figures[name] = {"largest_difference": worst}
        for what in (store, compress):
            seconds = paired({label: partial(what, tasks, tokens) for label, tokens in PASSES.items()}, arguments.rounds)
            ratios = {label: median_ratio(seconds["one at a time"], times) for label, times in seconds.items()}
            figures[name][what.__name__] = {"seconds": seconds, "ratios": ratios}
            for label, times in seconds.items():
                speed = arguments.tasks / statistics.median(times)
                print(f"  {what.__name__:8}  {label:18} {speed:8.1f} tasks/s   {ratios[label]:5.2f} x one at a time")
    scratch.cleanup()
    write_json(arguments.json, figures)
    print(f"\n{machine()}")


def largest_difference(one: list[Prefix], other: list[Prefix]) -> float:
    """Between the keys and values of the prefixes of the same tasks."""
    others = {prefix.manifest.task: prefix for prefix in other}
    pairs = [(p, others[p.manifest.task]) for p in one]
    return max((x - y).abs().max().item() for a, b in pairs for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values)))


if __name__ == "__main__":
    main()
