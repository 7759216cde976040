"""Tuning the prefixes of several tasks in one run: the examples of each step, learning curves, and when to stop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hyperllama.data.episode import Example
from hyperllama.data.text import EncodedEpisode, Encoder
from hyperllama.files import append, whole_json_lines, write_atomically
from hyperllama.inference.reader import Reader
from hyperllama.inference.scoring import Question
from hyperllama.prefixes.prefix import Prefix
from hyperllama.tuning.prefix_tuner import PrefixTuner

CURVES, CURVES_PLOT = "curves.jsonl", "curves.png"


@dataclass(frozen=True)
class TuningTask:
    """What one task is tuned with: questions to train on, to stop by, and to report on, the right answer of each first.

    `context`, token ids, is what a teacher reads before the questions, if there is one.
    """

    name: str
    train: tuple[Question, ...]
    validation: tuple[Question, ...] = ()
    test: tuple[Question, ...] = ()
    context: tuple[int, ...] = ()


def questions_of(encoder: Encoder, examples: Sequence[Example]) -> tuple[Question, ...]:
    """Examples as questions, with their choices."""
    return tuple(Question.of(encoder, example, choices=example.choices) for example in examples)


class TuningStream(Dataset):
    """Item i is some training questions of task i modulo the number of tasks; a function of the seed and i alone."""

    def __init__(self, tasks: Sequence[TuningTask], *, examples: int, seed: int, length: int):
        self.tasks, self.examples, self.seed, self.length = list(tasks), examples, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> EncodedEpisode:
        task = self.tasks[index % len(self.tasks)]
        drawn = Random(f"{self.seed}/{index}").sample(task.train, min(self.examples, len(task.train)))
        queries = tuple((question.prompt, question.continuations[0]) for question in drawn)
        return EncodedEpisode(task.context, queries, task=task.name, index=index)


class Curves(TrainerCallback):
    """Measures every task at steps 0, `every`, 2 * `every`, ...; keeps the best prefix of each, and stops when none improves.

    A line of curves.jsonl is one task at one step: validation and test loss in nats per target token, the share of answers that
    greedy decoding writes, and accuracy where examples have choices. Best is by validation loss; without validation examples
    the last prefix is kept and nothing stops early. `patience` counts measurements without improvement of a task.
    """

    def __init__(
        self, tuner: PrefixTuner, reader: Reader, tasks: Sequence[TuningTask], run: Path, *, every: int, patience: int | None,
        batch_tokens: int = 8192,
    ):  # fmt: skip
        self.tuner, self.reader, self.tasks = tuner, reader, list(tasks)
        self.path, self.every, self.patience, self.batch_tokens = run / CURVES, every, patience, batch_tokens
        self.best: dict[str, tuple[float, int, Prefix]] = {}
        self.writes = True  # the first process; all measure, so that all stop at the same step

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop the lines after the step that is resumed from, and find the best measurement of each task in the rest."""
        self.writes, resumed = state.is_world_process_zero, state.global_step > 0
        kept = [line for line in whole_json_lines(self.path) if line["step"] <= state.global_step] if resumed else []
        if self.writes:
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if not resumed:
            self.measure(0)
        # The best prefixes lie beside the checkpoints, so that a resumed run has them.
        for path in self._best_folder.glob("*.safetensors") if resumed else ():
            prefix = Prefix.load(path)
            name = self.tasks[int(path.stem)].name
            losses = [(line["validation_loss"], line["step"]) for line in kept if line["task"] == name]
            self.best[name] = (*min(losses), prefix)

    def on_step_end(self, args, state, control, **kwargs):
        """Measure, and stop when every task has gone `patience` measurements without improvement."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(state.global_step)
            if self.patience is not None and self.best:
                waited = [(state.global_step - step) / self.every for _, step, _ in self.best.values()]
                control.should_training_stop = min(waited) >= self.patience

    @property
    def _best_folder(self) -> Path:
        return self.path.parent / "best"

    @torch.no_grad()
    def measure(self, step: int) -> list[dict]:
        """Measure all tasks in packed passes, append their lines, and keep what is better than before."""
        training, prefixes = self.tuner.training, self.tuner.prefixes()
        self.tuner.eval()
        ordered = [prefixes[task.name] for task in self.tasks]
        validation, test = (
            score_tasks(self.reader, ordered, asked, batch_tokens=self.batch_tokens)
            for asked in ([task.validation for task in self.tasks], [task.test for task in self.tasks])
        )
        self.tuner.train(training)
        lines = []
        for i, task in enumerate(self.tasks):
            line = {"step": step, "task": task.name}
            line |= {f"validation_{name}": value for name, value in validation[i].items()}
            line |= {f"test_{name}": value for name, value in test[i].items()}
            lines.append(line)
            loss = line.get("validation_loss")
            if loss is not None and (task.name not in self.best or loss < self.best[task.name][0]):
                self.best[task.name] = (loss, step, prefixes[task.name])
                if self.writes:
                    prefixes[task.name].save(self._best_folder / f"{i}.safetensors")
        if self.writes:
            append(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        return lines

    def results(self) -> dict[str, tuple[Prefix, dict]]:
        """For each task the prefix to keep and what is known about it."""
        last = self.tuner.prefixes()
        kept = {}
        for task in self.tasks:
            loss, step, prefix = self.best.get(task.name, (None, None, last[task.name]))
            facts = {} if loss is None else {"validation_loss": loss, "best_step": step}
            kept[task.name] = (prefix, facts | {"tuned_on": len(task.train)})
        return kept


def score_tasks(
    reader: Reader, prefixes: Sequence[Prefix], asked: Sequence[Sequence[Question]], *, batch_tokens: int = 8192
) -> list[dict[str, float]]:
    """For each prefix figures of its questions: loss in nats per target token; accuracy over choices where they have some.

    `exact` is the share of answers each token of which is the likeliest, so that greedy decoding writes them.
    """
    questions, owners = [], []
    for i, (prefix, own) in enumerate(zip(prefixes, asked, strict=True)):
        questions += [replace(question, prefix=prefix) for question in own]
        owners += [i] * len(own)
    found: list[dict[str, float]] = [{} for _ in prefixes]
    sums = [Counter() for _ in prefixes]
    for owner, question, answers in zip(owners, questions, reader.score_answers(questions, batch_tokens=batch_tokens)):
        likelihoods = [answer.likelihood for answer in answers]
        sums[owner]["loss"] -= likelihoods[0]
        sums[owner]["tokens"] += len(question.continuations[0])
        sums[owner]["asked"] += 1
        sums[owner]["exact"] += answers[0].greedy
        if len(answers) > 1:
            sums[owner]["right"] += max(likelihoods) == likelihoods[0]
            sums[owner]["ranked"] += 1
    for result, total in zip(found, sums):
        if total["asked"]:
            result |= {"loss": total["loss"] / total["tokens"], "exact": total["exact"] / total["asked"]}
        if total["ranked"]:
            result["accuracy"] = total["right"] / total["ranked"]
    return found


def plot_curves(lines: Sequence[dict], path: str | Path) -> None:
    """Test or validation loss (and accuracy, where there is one) over steps: a thin line a task, their mean in bold."""
    from matplotlib.figure import Figure

    names = [n for n in ("test_accuracy", "test_exact", "test_loss", "validation_loss") if any(n in line for line in lines)]
    if not names:
        return
    figure = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        tasks = dict.fromkeys(line["task"] for line in lines)
        steps = sorted({line["step"] for line in lines if name in line})
        for task in tasks:
            own = [(line["step"], line[name]) for line in lines if line["task"] == task and name in line]
            axis.plot(*zip(*own), color="#4c78a8", alpha=0.25, linewidth=1)
        at = [[line[name] for line in lines if line["step"] == step and name in line] for step in steps]
        axis.plot(steps, [sum(values) / len(values) for values in at], color="#f58518", linewidth=2)
        what = name.replace("_", " ") + (" (nats per target token)" if name.endswith("loss") else "")
        axis.set(xlabel="step", ylabel=what, ylim=(0, 1.02) if not name.endswith("loss") else (0, None))
        axis.set_title(f"{len(tasks)} tasks, their mean in bold", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
