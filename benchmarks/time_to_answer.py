"""From 16 examples of an unseen task to its first answer and to good ones: seconds, and exact answers to 16 other inputs.

    python -m benchmarks.time_to_answer pretrained/smollm2-135m [--tasks plural capital ...] [--seeds 0 1 2] [--json FILE]

One task at a time, on one machine, every method with the same 16 examples. Tuned are: the hypernetwork's prefix; as many rows
that need no hypernetwork (the demonstrations' first rows, the most attended ones, means of neighbours, random numbers), behind
the first token's row; and what stock PEFT and the Trainer make of the examples, prefix tuning and LoRA, for as many seconds as
the longest of these takes, and for ten times as many. Nothing is held back: accuracy is measured at fixed steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from benchmarks.measure import write_json
from hyperllama.base.loading import load_base
from hyperllama.data.episode import Episode
from hyperllama.data.json_lines import read_json_lines_tasks
from hyperllama.data.packing import pack_gist
from hyperllama.data.text import Encoder
from hyperllama.files import append, whole_json_lines
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.loading import load_hypernetwork, untrained
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.prefix import Prefix
from hyperllama.tuning.curves import TuningStream, TuningTask
from hyperllama.tuning.prefix_tuner import PrefixTuner
from hyperllama.tuning.starts import demonstrations_start, random_start

STEPS = (0, 5, 10, 20)
LEARNING_RATE = 1e-2
# The best of 3e-4, 1e-3, 3e-3 and 1e-2 for LoRA, and of 1e-3, 3e-3, 1e-2 and 3e-2 for prefixes, after 30 s on each of three
# training tasks. For LoRA the first two are alike (90 and 88 % of 48 queries), and the larger one is quicker.
PEFT_RATES = {"peft prefix tuning": 1e-2, "peft lora": 1e-3}
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
        yield line("no context", 0, 0.0, lambda texts: self.answers(texts))
        yield line("prompt, read every time", 0, 0.0, lambda texts: self.answers(texts, before=context))
        budget = 0.0
        for method, make in self.starts(context, seed).items():
            for steps, seconds, prefix in self.tuned(episode, make):
                yield line(method, steps, seconds, lambda texts, prefix=prefix: self.answers(texts, prefix))
            budget = max(budget, seconds)
        for method in PEFT_RATES:
            model, trained = self.peft(method, seed), 0.0
            for times in (1, 10):
                steps, seconds = train_peft(model, self.encoder, episode, PEFT_RATES[method], times * budget - trained)
                trained += seconds
                yield line(f"{method}, {times} x", steps, trained, lambda texts, model=model: self.peft_answers(model, texts))

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
        task = TuningTask("task", tuple(episode.demonstrations))
        tuner = PrefixTuner(self.reader.model, {"task": prefix}, tokenizer=self.encoder.tokenizer)
        optimizer = torch.optim.AdamW(tuner.trainable().values(), lr=LEARNING_RATE, weight_decay=0.0)
        stream = TuningStream([task], self.encoder, examples=16, seed=0, length=max(STEPS))
        for step in range(max(STEPS) + 1):
            if step in STEPS:
                seconds += time.perf_counter() - start
                yield step, seconds, tuner.prefixes()["task"]
                start = time.perf_counter()
            if step < max(STEPS):
                optimizer.zero_grad()
                tuner(pack_gist([stream[step]], tuner.rows)).mean.backward()
                optimizer.step()

    def peft(self, method: str, seed: int) -> nn.Module:
        """The base with a new adapter of stock PEFT, as transformers loads it."""
        set_seed(seed)
        base = load_base(self.reader.identity.name, dtype="bfloat16")
        base.set_attn_implementation("sdpa")
        if method == "peft prefix tuning":
            settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.rows)
        else:
            settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        return get_peft_model(base, settings)

    @torch.no_grad()
    def peft_answers(self, model: nn.Module, inputs: Sequence[str]) -> list[str]:
        """Greedy answers of an adapted model, one by one: PEFT's generate and padding on the left do not agree on positions."""
        model.eval()
        ends, answers = {self.encoder.tokenizer.eos_token_id}, []
        for text in inputs:
            ids = list(self.encoder.prompt(text))
            for _ in range(12):
                token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
                ids.append(token)
                said = ids[len(self.encoder.prompt(text)) :]
                if token in ends or self.encoder.format.separator in self.encoder.tokenizer.decode(said):
                    break
            answers.append(self.encoder.answer_of(said))
        return answers


class Examples(Dataset):
    """Each example as a padded row of prompt and answer, with the loss on the answer."""

    def __init__(self, encoder: Encoder, episode: Episode):
        self.rows = []
        for example in episode.demonstrations:
            prompt, answer = encoder.prompt(example.input), encoder.answer(example.output)
            self.rows.append(([*prompt, *answer], [*[-100] * len(prompt), *answer]))
        self.width = max(len(ids) for ids, _ in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        ids, labels = self.rows[i]
        more = self.width - len(ids)
        mask = [1] * len(ids) + [0] * more
        padded = {"input_ids": ids + [0] * more, "attention_mask": mask, "labels": labels + [-100] * more}
        return {name: torch.tensor(values) for name, values in padded.items()}


class Deadline(TrainerCallback):
    """Stops training after so many seconds."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Look at the clock."""
        control.should_training_stop = time.perf_counter() - self.start >= self.seconds


def train_peft(model: nn.Module, encoder: Encoder, episode: Episode, rate: float, seconds: float) -> tuple[int, float]:
    """Train an adapter with the stock Trainer for so many seconds; returns its steps and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=16, learning_rate=rate, lr_scheduler_type="constant", max_steps=10_000,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Examples(encoder, episode), callbacks=[Deadline(seconds)])
        model.train()
        start = time.perf_counter()
        trainer.train()
        return trainer.state.global_step, time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run")
    options.add_argument("--root", default="recipes/words/test")
    options.add_argument("--tasks", nargs="*", help="names of tasks; all unless given")
    options.add_argument("--seeds", nargs="*", type=int, default=[0])
    options.add_argument("--json", type=Path, help="write the figures here, and each task's beside it as it is done")
    arguments = options.parse_args()
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


if __name__ == "__main__":
    main()
