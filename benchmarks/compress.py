"""How fast many tasks become prefixes in a store: packed passes against one task after the other, and against a plain prefill.

    python -m benchmarks.compress [--large | --base FOLDER] [--tasks N] [--json FILE]

200 ragged tasks: short ones of 20 to 60 tokens, long ones of 20 to 600; 16 gists; float32 on a Llama of 2 layers and hidden
size 64, or with `--large` on that of the other benchmarks, of 6 layers and hidden size 512, or on the first `--layers` of any
model's folder, which take some minutes a round. "store" is all of it, from text to files and an index: tokenised, compressed,
signed, written, synced. "compress" is without files. "one at a time" is the same code with a task a pass. "prefill" is what the
base alone takes for the same contexts, as stock transformers calls it: a row a context, no padding, its keys and values in a
cache, one row of logits, no gradients. Its tokens are contexts' tokens, and so are those of the others: gists do not count.
"by part" says where a packed pass and a prefill spend their time, by the profiler.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

import torch
from transformers import PreTrainedModel, set_seed

from benchmarks.bases import GISTS, VOCABULARY, benchmark_base, hypernetwork_on
from benchmarks.measure import machine, median_ratio, paired, parser, write_json
from benchmarks.parts import Spent, by_part
from hyperllama.base.loading import random_base
from hyperllama.data.episode import Example, Task
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer
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


def small_base() -> PreTrainedModel:
    """A model that costs little, as a GPU makes a larger one do: what is left is the work around it."""
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    architecture = {"model_type": "llama", **sizes, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    return random_base(architecture, vocab_size=VOCABULARY)


class Compressing:
    """The ways to deal with tasks of one length, each a function of tasks and of the most tokens of a pass."""

    def __init__(self, make_base: Callable[[], PreTrainedModel], scratch: Path):
        self.hypernetwork, self.scratch = hypernetwork_on(make_base()).eval(), scratch
        self.stock = make_base().eval()
        self.stock.set_attn_implementation("sdpa")
        self.tokenizer = train_tokenizer(WORDS, kind="words", vocab_size=0)

    def encoder(self) -> Encoder:
        """One that has not seen any text yet."""
        return Encoder(self.tokenizer, TextFormat(query=" {input}", answer=" {output}", separator=""), Limits())

    def store(self, tasks: list[Task], batch_tokens: int) -> None:
        """From text to files."""
        settings = {"run": "a run", "progress": lambda line: None}
        folder = Path(tempfile.mkdtemp(dir=self.scratch))  # a new one each time, removed in the end: removing takes time
        compress_into(PrefixStore(folder), self.hypernetwork, self.encoder(), tasks, batch_tokens=batch_tokens, **settings)

    def compress(self, tasks: list[Task], batch_tokens: int) -> list[Prefix]:
        """From text to prefixes."""
        encoder, identity = self.encoder(), self.hypernetwork.identity
        encoded = [shown_of(task).encode(encoder, identity, "a run") for task in tasks]
        return [p for b in passes(encoded, GISTS, batch_tokens) for p in self.hypernetwork.compress(*zip(*b))]

    @torch.no_grad()
    def prefill(self, tasks: list[Task], batch_tokens: int = 1) -> None:
        """From text to caches of the base alone."""
        encoder, device = self.encoder(), self.stock.device
        for task in tasks:
            context, _ = shown_of(task).encode(encoder, self.hypernetwork.identity, "a run")
            self.stock(torch.tensor([list(context)], device=device), use_cache=True, logits_to_keep=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write the figures."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--tasks", type=int, default=200)
    options.add_argument("--large", action="store_true", help="the model of the other benchmarks")
    options.add_argument("--base", help="a folder of a model")
    options.add_argument("--layers", type=int, help="the first so many layers of it")
    chosen = options.parse_args(arguments)
    large = chosen.large or chosen.base is not None
    figures: dict = {"tasks": chosen.tasks, "model": chosen.base or ("large" if large else "small"), "layers": chosen.layers}
    with tempfile.TemporaryDirectory() as scratch:
        base = partial(benchmark_base, chosen.base, None, chosen.layers) if large else small_base
        ways = Compressing(base, Path(scratch))
        for name, (low, high) in LENGTHS.items():
            figures[name] = measure(ways, name, ragged_tasks(chosen.tasks, low, high), chosen.rounds)
    write_json(chosen.json, figures)
    print(f"\n{machine()}")


def measure(ways: Compressing, name: str, tasks: list[Task], rounds: int) -> dict:
    """Figures for tasks of one length, printed too."""
    most, prefill = max(PASSES.values()), {"prefill": partial(ways.prefill, tasks)}
    worst = largest_difference(ways.compress(tasks, 1), ways.compress(tasks, most))
    encoder, identity = ways.encoder(), ways.hypernetwork.identity
    tokens = sum(len(shown_of(task).encode(encoder, identity, "a run")[0]) for task in tasks)
    print(f"\n{name}: {len(tasks)} tasks of {tokens:,} tokens; packed prefixes differ by at most {worst:.1e}")
    figures: dict = {"largest_difference": worst, "tokens": tokens}
    for what in (ways.store, ways.compress):
        steps = {label: partial(what, tasks, size) for label, size in PASSES.items()}
        seconds = paired(steps | prefill, rounds)
        ratios = {label: median_ratio(seconds["one at a time"], times) for label, times in seconds.items()}
        shares = {label: median_ratio(seconds["prefill"], times) for label, times in seconds.items()}
        figures[what.__name__] = {"seconds": seconds, "ratios": ratios, "shares_of_prefill": shares}
        for label, times in seconds.items():
            speed, rate = len(tasks) / statistics.median(times), tokens / statistics.median(times)
            told = f"{speed:8.1f} tasks/s {rate:9,.0f} tokens/s {ratios[label]:6.2f} x one at a time"
            print(f"  {what.__name__:8}  {label:18} {told} {shares[label]:5.0%} of prefill")
    parts = {"passes": lambda: ways.compress(tasks, most), **prefill}
    figures["parts"] = {label: by_name(by_part(run, VOCABULARY, 1)) for label, run in parts.items()}
    for label, spent in figures["parts"].items():
        print(f"  by part   {label:18} " + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in spent.items()))
    return figures


def by_name(spent: dict[str, Spent]) -> dict[str, float]:
    """Seconds of the parts that take some."""
    return {name: part.seconds for name, part in spent.items() if part.seconds}


def largest_difference(one: list[Prefix], other: list[Prefix]) -> float:
    """Between the keys and values of the prefixes of the same tasks."""
    others = {prefix.manifest.task: prefix for prefix in other}
    pairs = [(p, others[p.manifest.task]) for p in one]
    return max((x - y).abs().max().item() for a, b in pairs for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values)))


if __name__ == "__main__":
    main()
