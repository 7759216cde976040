"""How a store's cost grows with its prefixes: list, open, check, add one, and find one for a server.

    python -m benchmarks.stores [--sizes 1000 10000 100000] [--json FILE]

Prefixes of one layer and two rows, since only their number counts; files are written and indexed in one go, as a store that has
grown over months would look. The exponent is the slope of log seconds over log prefixes between the two largest sizes.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import parser, write_json
from hyperllama.base.identity import BaseIdentity
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.store import PrefixStore
from hyperllama.serving.catalog import Catalog

SIZES = (1_000, 10_000, 100_000)
IDENTITY = BaseIdentity(name="a-base", weights="1" * 64, config="2" * 64, tokenizer="3" * 64)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    chosen = options.parse_args(arguments)
    seconds: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        made = 0
        for size in chosen.sizes:
            fill(Path(folder), made, size)
            made = size
            for name, found in measure(Path(folder), size, chosen.rounds).items():
                seconds.setdefault(name, {})[str(size)] = found
            print(
                f"{size:,} prefixes: " + ", ".join(f"{name} {seconds[name][str(size)]:.3f} s" for name in seconds), flush=True
            )
    exponents = {name: exponent(found) for name, found in seconds.items()}
    print("exponents: " + ", ".join(f"{name} {value:.2f}" for name, value in exponents.items()))
    write_json(chosen.json, {"seconds": seconds, "exponents": exponents})


def fill(folder: Path, first: int, end: int) -> None:
    """Add prefixes of tasks `first` .. `end` - 1."""
    store = PrefixStore(folder)
    for start in range(first, end, 1000):
        store.add_all([prefix(i) for i in range(start, min(end, start + 1000))])


def prefix(i: int) -> Prefix:
    """A small prefix of task i."""
    sides = [[torch.full((1, 2, 4), float(i))] for _ in "kv"]
    return Prefix(*sides, Manifest(base=IDENTITY, task=f"task{i}", context_sha256=f"{i:064d}", hypernetwork_sha256="d" * 64))


def measure(folder: Path, size: int, rounds: int, *, verb: bool = True) -> dict[str, float]:
    """Seconds of each use, the median of rounds; each begins with a store that has not been read. `verb`: the verb too."""
    words = [sys.executable, "-m", "hyperllama", "list", str(folder)]
    tokenizer = train_tokenizer(["a few words"], kind="bytes", vocab_size=300)
    catalog = Catalog(PrefixStore(folder), IDENTITY, tokenizer)
    catalog.find("task1")
    known = PrefixStore(folder)
    len(known)
    turn = iter(range(10**9))
    uses: dict[str, Callable[[], object]] = {
        "hyperllama list": lambda: subprocess.run(words, check=True, capture_output=True),
        "open and list": lambda: list(PrefixStore(folder, create=False)),
        "compare": lambda: PrefixStore(folder, create=False).compare(),
        "add one": lambda: known.add(replace_task(prefix(0), f"new{size}-{next(turn)}")),
        "a server's lookup": lambda: catalog.find(f"task{size // 2}"),
        "a server's lookup after one was added": lambda: (known.add(replace_task(prefix(0), "again")), catalog.find("task1")),
    }
    if not verb:
        del uses["hyperllama list"]
    return {name: median(use, rounds) for name, use in uses.items()}


def replace_task(one: Prefix, task: str) -> Prefix:
    return Prefix(one.keys, one.values, replace(one.manifest, task=task))


def median(use: Callable[[], object], rounds: int) -> float:
    """The median of seconds."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        use()
        found.append(time.perf_counter() - start)
    return sorted(found)[rounds // 2]


def exponent(found: dict[str, float]) -> float:
    """The slope of log seconds over log prefixes between the two largest sizes; 0 where there is one only."""
    (small, fast), (large, slow) = ([(int(n), s) for n, s in found.items()] * 2)[-2:]
    return 0.0 if small == large else math.log(slow / fast) / math.log(large / small)


if __name__ == "__main__":
    main()
