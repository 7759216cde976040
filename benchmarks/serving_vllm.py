"""Prefixes against whole prompts in vLLM's own server: requests a second, time to the first token, bytes of state.

    python -m benchmarks.serving_vllm [--json FILE]      in the environment of make serve-env

`hyperllama serve` with SmolLM2-135M in bf16; clients stream 16 new tokens for queries of 32 tokens, each asking again as soon
as it has its answer. What stands before a query:

prefix   17 rows of a prefix file
warm     the context as tokens, which vLLM's automatic prefix caching has kept
cold     a context that is new to vLLM

Rounds are paired: in each, every way answers the same number of queries, one way after the other; figures are medians over
rounds. "many tasks" asks for 200 tasks in random order while the engine has blocks for 20 of their contexts.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory, TemporaryFile

import openai
import torch

from benchmarks.measure import machine, parser, write_json
from hyperllama.base.fingerprints import identify
from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.store import PrefixStore

ROWS, QUERY, NEW, BLOCK = 17, 32, 16, 32
CONTEXTS, CLIENTS = (256, 1024, 4096), (1, 8, 32)
TASKS, HELD, MANY_CONTEXT, MANY_CLIENTS = 200, 20, 1024, 8


@dataclass(frozen=True)
class Asked:
    """A request: the model's name and its prompt, as token ids."""

    model: str
    prompt: list[int]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--base", default="models/smollm2-135m")
    options.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS)
    options.add_argument("--clients", type=int, nargs="*", default=CLIENTS)
    options.add_argument("--tasks", type=int, default=TASKS, help="of many tasks; 0 leaves that out")
    chosen = options.parse_args(arguments)
    with TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        row_bytes = make_store(store, chosen.base, max(1, chosen.tasks))
        figures = {"machine": machine(), "sizes": {"rows": ROWS, "query": QUERY, "new": NEW}, "settings": {}, "many_tasks": {}}
        figures["state_bytes"] = {"prefix": ROWS * row_bytes, **{str(n): n * row_bytes for n in chosen.contexts}}
        largest = max([*chosen.contexts, MANY_CONTEXT])
        with serving(store, chosen.base, "--max-model-len", str(largest + 512), kv_gib=4) as address:
            for context in chosen.contexts:
                for clients in chosen.clients:
                    found = one_setting(address, context, clients, chosen.rounds)
                    figures["settings"][f"{context} tokens, {clients} clients"] = found
                    print(told(context, clients, found), flush=True)
        if chosen.tasks:
            blocks = str(HELD * -(-(MANY_CONTEXT + QUERY + NEW) // BLOCK))
            limits = ["--num-gpu-blocks-override", blocks, "--max-model-len", str(MANY_CONTEXT + 256)]
            with serving(store, chosen.base, *limits, kv_gib=1) as address:
                figures["many_tasks"] = many_tasks(address, chosen.tasks, chosen.rounds)
                print(f"{chosen.tasks} tasks, memory for {HELD} contexts: {json.dumps(figures['many_tasks'])}", flush=True)
    write_json(chosen.json, figures)


def make_store(folder: Path, base: str, tasks: int) -> int:
    """A store of prefixes of the base's sizes, with random numbers, since only time counts; returns the bytes of a row."""
    model, tokenizer = load_base(base, dtype="bfloat16"), load_tokenizer(base)
    manifest, config = Manifest(base=identify(model, tokenizer)), model.config
    shape = (config.num_key_value_heads, ROWS, config.head_dim)
    store = PrefixStore(folder)
    made = torch.Generator().manual_seed(0)
    for i in range(tasks):
        sides = [[torch.randn(shape, generator=made).bfloat16() for _ in range(config.num_hidden_layers)] for _ in "kv"]
        store.add(Prefix(*sides, replace(manifest, task=f"task{i}")))
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


@contextmanager
def serving(store: Path, base: str, *more: str, kv_gib: int, dtype: str = "bfloat16") -> Iterator[str]:
    """`hyperllama serve` as a process of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "hyperllama", "serve", str(store), "--base", base, "--port", str(port), "--"]
    words += ["--dtype", dtype, "--enforce-eager", "--block-size", str(BLOCK), *more]
    with TemporaryFile() as log:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": str(kv_gib)}
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError("hyperllama serve has ended; run it by hand to see why")
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(1)
        yield f"{address}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def one_setting(address: str, context: int, clients: int, rounds: int) -> dict:
    """Medians over paired rounds of each way, and how many times more requests a second the prefix has."""
    rng, count = Random(context * clients), max(4, clients)
    kept = words(rng, context)
    base = served_base(address)
    ways: dict[str, Callable[[], list[Asked]]] = {
        "prefix": lambda: [Asked("task0", words(rng, QUERY)) for _ in range(count)],
        "warm": lambda: [Asked(base, kept + words(rng, QUERY)) for _ in range(count)],
        "cold": lambda: [Asked(base, words(rng, context + QUERY)) for _ in range(count)],
    }
    for name in ("prefix", "warm"):
        asyncio.run(load(address, ways[name](), clients))
    return paired(address, ways, clients, rounds)


def many_tasks(address: str, tasks: int, rounds: int) -> dict:
    """As `one_setting`, for more tasks than the engine has memory for; each is asked for once a round, in a new order."""
    rng = Random(0)
    contexts = [words(rng, MANY_CONTEXT) for _ in range(tasks)]
    base = served_base(address)

    def order() -> list[int]:
        return rng.sample(range(tasks), tasks)

    ways = {
        "prefix": lambda: [Asked(f"task{i}", words(rng, QUERY)) for i in order()],
        "whole": lambda: [Asked(base, contexts[i] + words(rng, QUERY)) for i in order()],
    }
    asyncio.run(load(address, ways["prefix"](), MANY_CLIENTS))  # each file is read before its first use
    return paired(address, ways, MANY_CLIENTS, rounds)


def paired(address: str, ways: dict[str, Callable[[], list[Asked]]], clients: int, rounds: int) -> dict:
    """Requests a second and seconds to the first token, medians over rounds, and ratios within rounds to the prefix's."""
    rates, firsts = {name: [] for name in ways}, {name: [] for name in ways}
    for _ in range(rounds):
        for name, questions in ways.items():
            rate, first = asyncio.run(load(address, questions(), clients))
            rates[name].append(rate)
            firsts[name].append(first)
    median = statistics.median
    found = {name: {"requests_per_s": median(rates[name]), "first_token_s": median(firsts[name])} for name in ways}
    for name in ways:
        found[name]["prefix_is_times_faster"] = median(a / b for a, b in zip(rates["prefix"], rates[name]))
        found[name]["prefix_first_token_is_times_sooner"] = median(b / a for a, b in zip(firsts["prefix"], firsts[name]))
    return found


async def load(address: str, questions: Sequence[Asked], clients: int) -> tuple[float, float]:
    """Requests a second, and the median of seconds to the first token, of so many clients who ask one after the other."""
    waiting, firsts = list(questions), []
    client = openai.AsyncOpenAI(base_url=address, api_key=os.environ.get("VLLM_API_KEY", "none"), max_retries=0, timeout=600)

    async def one() -> None:
        while waiting:
            asked = waiting.pop()
            start = time.perf_counter()
            settings = {"max_tokens": NEW, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True, "raw": True}}
            if not asked.model.startswith("task"):
                settings["extra_body"].pop("raw")
            parts = await client.completions.create(model=asked.model, prompt=asked.prompt, **settings)
            first = None
            async for _ in parts:
                first = first or time.perf_counter() - start
            firsts.append(first)

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    seconds = time.perf_counter() - start
    await client.close()
    return len(questions) / seconds, statistics.median(firsts)


def served_base(address: str) -> str:
    """The name of the base as a model: the first that the server lists."""
    return openai.OpenAI(base_url=address, api_key="none").models.list().data[0].id


def words(rng: Random, count: int) -> list[int]:
    """Random token ids."""
    return [rng.randrange(1000, 40000) for _ in range(count)]


def told(context: int, clients: int, found: dict) -> str:
    rows = [f"{context} tokens, {clients} clients:"]
    for name, figures in found.items():
        rows.append(f"  {name:8}{figures['requests_per_s']:8.2f} requests/s, first token {figures['first_token_s']:7.3f} s")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
