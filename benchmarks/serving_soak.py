"""A load test of `hyperllama serve` on this machine: good and bad requests together, for minutes.

    python -m benchmarks.serving_soak STORE [--seconds 300] [--json FILE]      in the environment of make serve-env

Good clients ask the word tasks of STORE and compare each answer, streamed or not, with what the server said to the same
question before the load; bad ones send unknown names, prompts that are too long, broken JSON, keys that are refused, and leave
in the middle of a stream. Told at the end: requests, wrong answers, statuses that were not expected, and the server's memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import httpx
import psutil

from benchmarks.measure import parser, write_json
from benchmarks.serving_vllm import serving
from hyperllama.prefixes.store import PrefixStore

GOOD, BAD = 6, 2
WORDS = Path(__file__).parent.parent / "recipes/words/test"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("store", type=Path)
    options.add_argument("--seconds", type=float, default=300)
    options.add_argument("--base", default="models/smollm2-135m")
    chosen = options.parse_args(arguments)
    # In float32, so that an answer does not depend on what else is in its batch.
    with serving(chosen.store, chosen.base, "--max-model-len", "1024", kv_gib=1, dtype="float32") as address:
        figures = asyncio.run(Soak(address, questions_of(chosen.store)).run(chosen.seconds))
    print(json.dumps(figures, indent=2))
    write_json(chosen.json, figures)
    if figures["wrong"] or figures["unexpected"]:
        raise SystemExit("the server was wrong")


def questions_of(store: Path) -> list[tuple[str, str]]:
    """Names of prefixes and inputs that they have not seen, two each."""
    found = []
    for task in sorted({entry.task for entry in PrefixStore(store, create=False)}):
        lines = (WORDS / f"{task}.jsonl").read_text().splitlines()[20:22] if (WORDS / f"{task}.jsonl").is_file() else []
        found += [(task, json.loads(line)["input"]) for line in lines]
    return found


class Soak:
    """One load test of the server at `address`."""

    def __init__(self, address: str, questions: Sequence[tuple[str, str]]):
        self.address, self.questions, self.rng = address, list(questions), Random(0)
        self.statuses, self.unexpected, self.wrong = Counter(), Counter(), []

    async def run(self, seconds: float) -> dict:
        """Everything for so long; what was counted."""
        async with self.connected():
            self.known = [await self.answer(*question) for question in self.questions]
            end = time.monotonic() + seconds
            workers = [self.good] * GOOD + [self.bad] * BAD
            memory = asyncio.create_task(self.watch(end))
            await asyncio.gather(*(self.until(end, worker) for worker in workers))
            again = [await self.answer(*question) for question in self.questions]
            up = (await self.client.get(self.address.removesuffix("/v1") + "/health")).status_code == 200
        late = [now != before for now, before in zip(again, self.known)]
        figures = {"seconds": seconds, "statuses": dict(sorted(self.statuses.items())), "wrong": len(self.wrong) + sum(late)}
        return {**figures, "unexpected": dict(self.unexpected), "server_mib": await memory, "up": up}

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """A context with a client."""
        headers = {"authorization": f"Bearer {os.environ.get('VLLM_API_KEY', 'none')}"}
        async with httpx.AsyncClient(base_url=self.address, headers=headers, timeout=120) as self.client:
            yield

    async def one_good(self) -> None:
        """One question of a good client, by itself."""
        async with self.connected():
            await self.good()

    async def until(self, end: float, worker) -> None:
        """A client that asks one thing after the other."""
        while time.monotonic() < end:
            await worker()

    async def answer(self, task: str, text: str) -> str:
        reply = await self.client.post("/completions", json={"model": task, "prompt": text, "temperature": 0})
        reply.raise_for_status()
        return reply.json()["choices"][0]["text"]

    async def good(self) -> None:
        place = self.rng.randrange(len(self.questions))
        task, text = self.questions[place]
        body = {"model": task, "prompt": text, "temperature": 0, "stream": self.rng.random() < 0.5}
        said = ""
        async with self.client.stream("POST", "/completions", json=body) as reply:
            self.count("good", reply.status_code, 200)
            if not body["stream"]:
                said = json.loads(await reply.aread())["choices"][0]["text"]
            else:
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        said += json.loads(line[6:])["choices"][0]["text"]
        if said != self.known[place]:
            self.wrong.append((task, text, said))

    async def bad(self) -> None:
        task = self.rng.choice(self.questions)[0]
        kind = self.rng.choice(["unknown", "huge", "broken", "refused", "left"])
        if kind == "left":
            body = {"model": task, "prompt": "x", "stream": True, "max_tokens": 500, "ignore_eos": True, "raw": True}
            async with self.client.stream("POST", "/completions", json=body) as reply:
                self.count(kind, reply.status_code, 200)
                async for _ in reply.aiter_lines():
                    break
            return
        bodies = {
            "unknown": {"model": f"nobody{self.rng.random()}", "prompt": "x"},
            "huge": {"model": task, "prompt": "word " * self.rng.choice([2_000, 200_000])},
            "refused": {"model": task, "prompt": "x", "echo": True},
        }
        content = b'{"model": "x", ' if kind == "broken" else json.dumps(bodies[kind]).encode()
        reply = await self.client.post("/completions", content=content, headers={"content-type": "application/json"})
        self.count(kind, reply.status_code, 404 if kind == "unknown" else 400)

    def count(self, kind: str, status: int, wanted: int) -> None:
        self.statuses[f"{kind} {status}"] += 1
        if status != wanted:
            self.unexpected[f"{kind} {status}"] += 1

    async def watch(self, end: float) -> list[int]:
        """Memory of the server's processes in MiB, ten times."""
        pause = (end - time.monotonic()) / 10
        sizes = []
        for _ in range(10):
            await asyncio.sleep(pause)
            below = psutil.Process().children(recursive=True)
            sizes.append(sum(process.memory_info().rss for process in below) // 2**20)
        return sizes


if __name__ == "__main__":
    main()
