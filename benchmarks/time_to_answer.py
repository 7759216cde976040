"""From 16 examples of an unseen task to its first answer and to good ones: seconds, and exact answers to 16 other inputs.

    python -m benchmarks.time_to_answer pretrained/smollm2-135m [--tasks plural capital ...] [--seeds 0 1 2] [--json FILE]

One task at a time, on one machine, every method with the same 16 examples. Tuned are: the hypernetwork's prefix; as many rows
that need no hypernetwork (the demonstrations' first rows, the most attended ones, means of neighbours, random numbers), behind
the first token's row; and what stock PEFT and the Trainer make of the examples, prefix tuning and LoRA, for as many seconds as
the longest of these takes, and for ten times as many. Nothing is held back: accuracy is measured at fixed steps.

    python -m benchmarks.time_to_answer --table FILE     # the table and the picture of figures that are there
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.measure import write_json
from benchmarks.stock_peft import RATES, Adapted
from hyperllama.data.episode import Episode
from hyperllama.data.json_lines import read_json_lines_tasks
from hyperllama.data.packing import pack_gist
from hyperllama.files import append, whole_json_lines
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.config import SHIPPED
from hyperllama.hypernetworks.loading import load_hypernetwork, untrained
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.prefix import Prefix
from hyperllama.tuning.curves import TuningStream, TuningTask, questions_of
from hyperllama.tuning.prefix_tuner import PrefixTuner
from hyperllama.tuning.starts import demonstrations_start, random_start

STEPS = (0, 5, 10, 20)
LEARNING_RATE = 1e-2
PICTURE = Path(__file__).parent.parent / "docs" / "assets" / "time_to_answer.png"
LABELS = {
    "prompt": "prompt, read every time",
    "prefix": "the prefix",
    "most attended rows": "untrained: most attended rows",
    "first rows": "untrained: first rows",
    "pooled rows": "untrained: pooled rows",
    "random": "random rows",
    "peft prefix tuning": "PEFT prefix tuning",
    "peft prefix tuning, 1 x": "PEFT prefix tuning, as many seconds",
    "peft prefix tuning, 10 x": "PEFT prefix tuning, ten times as many",
    "peft lora": "PEFT LoRA",
    "peft lora, 1 x": "PEFT LoRA, as many seconds",
    "peft lora, 10 x": "PEFT LoRA, ten times as many",
}
Answer = Callable[[Sequence[str]], list[str]]


class Bench:
    """A base, a hypernetwork and an encoder, and one task at a time."""

    def __init__(self, run: str):
        self.hypernetwork, self.encoder = load_hypernetwork(run)
        self.reader = Reader(self.hypernetwork.base, self.encoder.tokenizer)
        self.rows = 16 + (self.hypernetwork.sink is not None)

    def answers(self, inputs: Sequence[str], prefix: Prefix | None = None, before: Sequence[int] = ()) -> list[str]:
        """Greedy answers behind a prefix, or behind `before` in every prompt."""
        prompts = [[*before, *self.encoder.prompt(text)] for text in inputs]
        settings = {"max_new_tokens": 12, "stop": self.encoder.format.separator}
        made = self.reader.generate(prompts, None if prefix is None else [prefix] * len(prompts), **settings)
        return [self.encoder.answer_of(tokens) for tokens in made]

    def measure(self, episode: Episode, seed: int) -> Iterator[dict]:
        """A line for each method and number of steps: seconds until then, until the first answer, and exact answers."""
        inputs = [query.input for query in episode.queries]
        right = [query.output.strip() for query in episode.queries]

        def line(method: str, steps: int, seconds: float, answer: Answer) -> dict:
            start = time.perf_counter()
            answer(inputs[:1])
            first = seconds + time.perf_counter() - start
            exact = sum(a == b for a, b in zip(answer(inputs), right, strict=True)) / len(right)
            facts = {"task": episode.task, "seed": seed, "method": method, "steps": steps}
            return facts | {"seconds": seconds, "first_answer": first, "exact": exact}

        context = self.encoder.context("", episode.demonstrations)[0]
        yield line("no context", 0, 0.0, self.answers)
        yield line("prompt, read every time", 0, 0.0, lambda texts: self.answers(texts, before=context))
        budget = 0.0
        for method, make in self.starts(context, seed).items():
            for steps, seconds, prefix in self.tuned(episode, make):
                yield line(method, steps, seconds, lambda texts, prefix=prefix: self.answers(texts, prefix))
            budget = max(budget, seconds)
        for method in RATES:
            for times in (1, 10):
                adapted = Adapted(method, self.reader.identity.name, self.encoder, rows=self.rows, seed=seed)
                steps, seconds = adapted.train(episode, times * budget)
                yield line(f"{method}, {times} x", steps, seconds, adapted.answers)

    def starts(self, context: Sequence[int], seed: int) -> dict[str, Callable[[], Prefix]]:
        """What makes the prefixes that are tuned, all of as many rows."""
        model, sink = self.reader.model, self.encoder.first_token()
        chooser = untrained(model, self.rows, self.encoder.tokenizer)
        gists = self.rows - (self.hypernetwork.sink is not None)
        return {
            "prefix": lambda: self.compress(self.hypernetwork, context, gists),
            "most attended rows": lambda: self.compress(chooser, context, self.rows),
            "first rows": lambda: demonstrations_start(model, context, self.rows),
            "pooled rows": lambda: demonstrations_start(model, context, self.rows, pooled=True),
            "random": lambda: random_start(model, [context], self.rows, seed=seed, sink=sink),
        }

    @staticmethod
    def compress(maker: Hypernetwork, context: Sequence[int], gists: int) -> Prefix:
        """The prefix that a hypernetwork makes of one context."""
        return maker.compress([context], gists=gists)[0]

    def tuned(self, episode: Episode, make: Callable[[], Prefix]) -> Iterator[tuple[int, float, Prefix]]:
        """Steps, seconds until then without those of measuring, and the prefix."""
        start, seconds = time.perf_counter(), 0.0
        prefix = make()
        task = TuningTask("task", questions_of(self.encoder, episode.demonstrations))
        tuner = PrefixTuner(self.reader.model, {"task": prefix}, tokenizer=self.encoder.tokenizer)
        optimizer = torch.optim.AdamW(tuner.trainable().values(), lr=LEARNING_RATE, weight_decay=0.0)
        stream = TuningStream([task], examples=16, seed=0, length=max(STEPS))
        for step in range(max(STEPS) + 1):
            if step in STEPS:
                seconds += time.perf_counter() - start
                yield step, seconds, tuner.prefixes()["task"]
                start = time.perf_counter()
            if step < max(STEPS):
                optimizer.zero_grad()
                tuner(pack_gist([stream[step]], tuner.rows)).mean.backward()
                optimizer.step()


def rows(lines: Sequence[dict]) -> list[dict]:
    """Of each method at each of its points, over tasks: mean share of exact answers, and median seconds and steps."""
    points: dict[tuple[str, int], list[dict]] = {}
    for line in lines:
        points.setdefault((line["method"], 0 if line["method"].startswith("peft") else line["steps"]), []).append(line)
    return [
        {
            "method": method,
            "steps": round(statistics.median(line["steps"] for line in each)),
            "seconds": statistics.median(line["seconds"] for line in each),
            "first_answer": statistics.median(line["first_answer"] for line in each),
            "exact": statistics.fmean(line["exact"] for line in each),
        }
        for (method, _), each in points.items()
    ]


def table(lines: Sequence[dict]) -> str:
    """The same as Markdown."""
    head = ["|from 16 examples|steps|seconds|seconds to the first answer|exact answers, %|", "|---|---|---|---|---|"]
    body = [
        f"|{LABELS.get(row['method'], row['method'])}|{row['steps'] or ''}|{row['seconds']:.1f}|{row['first_answer']:.1f}"
        f"|{100 * row['exact']:.0f}|"
        for row in rows(lines)
    ]
    return "\n".join([*head, *body])


def draw(lines: Sequence[dict], path: str | Path) -> None:
    """Exact answers over seconds: a line for each start, a point for each number of steps."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    curves: dict[str, list[dict]] = {}
    for row in rows(lines):
        curves.setdefault(row["method"].partition(",")[0], []).append(row)
    for method, points in curves.items():
        label, exact = LABELS.get(method, method), [100 * point["exact"] for point in points]
        if method in ("no context", "prompt"):
            axis.axhline(exact[0], color="#777777", linewidth=1, linestyle="--" if exact[0] else ":")
            # On the side where no curve is.
            x, side = (0.01, "left") if exact[0] else (0.99, "right")
            place = {"xycoords": ("axes fraction", "data"), "ha": side, "fontsize": 8}
            axis.annotate(f"{label}: {exact[0]:.0f} %", (x, exact[0] + 1), **place)
            continue
        style = {"linewidth": 2.6, "zorder": 3} if method == "prefix" else {"linewidth": 1.3}
        style |= {"linestyle": "--", "marker": "s"} if method.startswith("peft") else {"marker": "o"}
        axis.plot([point["seconds"] for point in points], exact, markersize=4, label=label, **style)
    axis.set(xscale="log", xlabel="seconds on one core", ylabel="exact answers, %", ylim=(-3, 103))
    axis.set_title("From 16 examples of an unseen task to good answers, SmolLM2-135M", fontsize=10)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", nargs="?", default=SHIPPED["smollm2"])
    options.add_argument("--table", type=Path, help="measure nothing, but print these figures and draw them")
    options.add_argument("--root", default="recipes/words/test")
    options.add_argument("--tasks", nargs="*", help="names of tasks; all unless given")
    options.add_argument("--seeds", nargs="*", type=int, default=[0])
    options.add_argument("--json", type=Path, help="write the figures here, and each task's beside it as it is done")
    arguments = options.parse_args()
    if arguments.table:
        lines = json.loads(arguments.table.read_text(encoding="utf-8"))["lines"]
        draw(lines, PICTURE)
        print(table(lines))
        return
    bench, lines = Bench(arguments.run), []
    log = Path(f"{arguments.json}l") if arguments.json else None
    done = whole_json_lines(log) if log and log.exists() else []
    for seed in arguments.seeds:
        source = read_json_lines_tasks(arguments.root, instances=1000)
        for episode in source.evaluation(shots=16, queries=16, episodes=1000, seed=seed):
            if arguments.tasks and episode.task not in arguments.tasks:
                continue
            before = [line for line in done if (line["task"], line["seed"]) == (episode.task, seed)]
            new = before or list(bench.measure(episode, seed))
            lines += new
            if log and not before:
                append(log, "".join(json.dumps(line) + "\n" for line in new))
            print(seed, episode.task, {f"{x['method']} {x['steps']}": x["exact"] for x in new}, flush=True)
    if arguments.json:
        write_json(arguments.json, {"run": arguments.run, "lines": lines})
    print(table(lines))


if __name__ == "__main__":
    main()
