"""Refining: prefixes are tuned for a few steps on the examples that they were made of, and held-back examples decide.

From a generated prefix a few steps of prefix tuning go far (Phang 2024, arXiv 2402.16817, section 4.3), but with few examples
they can also do harm. So the same is done to prefixes of a part of the examples, in the same packed passes, and answers to the
rest say whether, and after how many steps, to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import torch

from hyperllama.data.grouping import in_groups
from hyperllama.data.packing import pack_gist
from hyperllama.data.text import ContextIds, EncodedEpisode, Encoder
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.inference.reader import Reader
from hyperllama.inference.scoring import Question
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix
from hyperllama.tuning.curves import TuningStream, TuningTask
from hyperllama.tuning.prefix_tuner import PrefixTuner

# From so many examples on one part of them is held back; of fewer, each is held back in turn, in at most so many parts.
ONE_PART_FROM, PARTS = 12, 4


@dataclass(frozen=True)
class Refiner:
    """Makes prefixes as `maker` does, and refines them for at most `steps` steps; used in place of it.

    A step sees at most `examples` examples of each task. Held-back answers are looked at `looks` times, evenly spaced; a prefix
    that has gone `patience` looks without getting better is no longer tuned. A pass has at most `batch_tokens` tokens. `tell`
    is called with the number of each step when it is done.
    """

    maker: Hypernetwork
    reader: Reader
    encoder: Encoder
    steps: int
    learning_rate: float = 1e-2
    examples: int = 16
    looks: int = 4
    patience: int = 2
    seed: int = 0
    batch_tokens: int = 8192
    tell: Callable[[int], object] | None = None

    @property
    def settings(self) -> dict:
        """What a manifest says was asked for, and by which a store knows a refined prefix."""
        names = ("steps", "learning_rate", "examples", "looks", "patience", "seed")
        return {name: getattr(self, name) for name in names}

    def compress(
        self, contexts: Sequence[ContextIds], manifests: Sequence[Manifest] | None = None, *, gists: int | None = None
    ) -> list[Prefix]:
        """As the maker's; `contexts` are those of an `Encoder`, which know their examples.

        A manifest's `metrics` say how many examples were held back, what a token of their answers costs before and after, in
        nats, and `refined_steps`: after how many steps the prefix was kept, 0 where refining did not help or nothing could
        be held back. `tuned_on` counts the tokens that went through the model for it, and the targets among them.
        """
        manifests = manifests or [Manifest(base=self.reader.identity) for _ in contexts]
        pairs = enumerate(zip(contexts, manifests, strict=True))
        trials = [self._trial(i, context, manifest.instruction or "") for i, (context, manifest) in pairs]
        parts = [part for trial in trials for part in trial.parts]
        made = self.maker.compress(contexts, manifests, gists=gists)
        cut = self.maker.compress([part.context for part in parts], gists=gists) if parts else []
        for part, prefix in zip(parts, cut, strict=True):
            part.start = prefix
        for trial, prefix in zip(trials, made, strict=True):
            trial.start = trial.best = prefix
        # Trials that are tuned together: as many as a pass has room for.
        tried = [trial for trial in trials if trial.parts]
        for group in in_groups(tried, lambda trial: (self._tokens(trial),), (self.batch_tokens,)):
            self._tune(group)
        return [self._signed(trial) for trial in trials]

    def _trial(self, place: int, context: ContextIds, instruction: str) -> _Trial:
        """What is tuned for one task: all of its examples, and parts of them."""
        examples = tuple(getattr(context, "examples", ()))
        asked = tuple(Question.of(self.encoder, example) for example in examples)
        trial = _Trial(f"{place}", asked)
        for held_back in held_back_parts(len(examples), seed=f"{self.seed}/{len(context)}"):
            shown = [i for i in range(len(examples)) if i not in held_back]
            rest, _ = self.encoder.context(instruction, [examples[i] for i in shown])
            own, others = (tuple(asked[i] for i in places) for places in (shown, held_back))
            trial.parts.append(_Part(f"{place}/{len(trial.parts)}", own, others, rest))
        return trial

    def _tokens(self, trial: _Trial) -> int:
        """Of a step, at most: as many of the longest examples as are drawn, for the task and for each of its parts."""
        sizes = sorted(len(question.prompt) + len(question.continuations[0]) for question in trial.questions)
        return len(trial.all) * sum(sizes[-self.examples :])

    def _drawn(self, group: Sequence[_Trial]) -> int:
        """How many examples a step sees of each task: fewer of one task whose examples alone are too long for a pass."""
        tokens = sum(map(self._tokens, group))
        return self.examples if tokens <= self.batch_tokens else max(1, self.examples * self.batch_tokens // tokens)

    def _tune(self, group: Sequence[_Trial]) -> None:
        """Tune the prefixes of a group, and those of parts of their examples beside them, and note what is best."""
        tuners = self._tuners(group)
        looks, examples = {round(self.steps * (i + 1) / self.looks) for i in range(self.looks)} - {0}, self._drawn(group)
        optimizer = torch.optim.AdamW(
            [p for t in tuners for p in t.trainable().values()], lr=self.learning_rate, weight_decay=0.0
        )
        self._look(group, tuners, 0)
        for step in range(1, self.steps + 1):
            going = {one.name: one for trial in group if trial.going(self.patience) for one in trial.all}
            if not going:
                break
            for tuner in tuners:
                tasks = [TuningTask(name, going[name].questions) for name in tuner.names if name in going]
                if not tasks:
                    continue
                places = range((step - 1) * len(tasks), step * len(tasks))
                stream = TuningStream(tasks, examples=examples, seed=self.seed, length=places.stop)
                drawn = [stream[i] for i in places]
                for episode in drawn:
                    going[episode.task].count(episode)
                with torch.enable_grad():
                    tuner(pack_gist(drawn, tuner.rows).to(self.reader.model.device)).mean.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in looks:
                self._look(group, tuners, step)
            if self.tell:
                self.tell(step)

    def _tuners(self, group: Sequence[_Trial]) -> list[PrefixTuner]:
        """One for each number of rows that the prefixes of a group have."""
        by_rows: dict[int, dict[str, Prefix]] = {}
        for one in (one for trial in group for one in trial.all):
            by_rows.setdefault(one.start.rows, {})[one.name] = one.start
        model, tokenizer = self.reader.model, self.reader.tokenizer
        return [PrefixTuner(model, starts, tokenizer=tokenizer) for starts in by_rows.values()]

    @torch.no_grad()
    def _look(self, group: Sequence[_Trial], tuners: Sequence[PrefixTuner], step: int) -> None:
        """Note what held-back answers cost after `step` steps."""
        now = {name: prefix for tuner in tuners for name, prefix in tuner.prefixes().items()}
        asked = [
            (trial, replace(question, prefix=now[part.name]))
            for trial in group
            for part in trial.parts
            for question in part.held_back
        ]
        scores = self.reader.score([question for _, question in asked], batch_tokens=self.batch_tokens)
        costs: dict[str, list[float]] = {trial.name: [] for trial in group}
        for (trial, question), (score,) in zip(asked, scores, strict=True):
            costs[trial.name].append(-score / len(question.continuations[0]))
        for trial in group:
            trial.note(step, costs[trial.name], now[trial.name])

    def _signed(self, trial: _Trial) -> Prefix:
        """The better of the two prefixes of a trial, with a manifest that says which."""
        manifest = trial.start.manifest
        metrics = {"refined_steps": 0, "held_back": 0}
        kept = trial.start
        if trial.parts:
            before, after = trial.costs[0], trial.costs[trial.best_step]
            helped = clearly_less(after, before)
            kept = trial.best if helped else trial.start
            metrics = {"refined_steps": trial.best_step if helped else 0, "held_back": len(before)}
            metrics |= {"loss_unrefined": _mean(before), "loss_refined": _mean(after if helped else before)}
        metrics["tuned_on"] = [sum(one.tokens for one in trial.all), sum(one.targets for one in trial.all)]
        elastic = manifest.elastic and not metrics["refined_steps"]
        manifest = replace(manifest, refined=self.settings, elastic=elastic, metrics={**manifest.metrics, **metrics})
        return Prefix(kept.keys, kept.values, manifest)


@dataclass
class _Part:
    """A prefix that is tuned on `questions`, of whose examples `context` is made; `held_back` is what it is asked then."""

    name: str
    questions: tuple[Question, ...]
    held_back: tuple[Question, ...] = ()
    context: ContextIds | None = None
    start: Prefix | None = None
    tokens: int = 0
    targets: int = 0

    def count(self, episode: EncodedEpisode) -> None:
        """Count what is tuned on."""
        self.tokens += sum(len(prompt) + len(answer) - 1 for prompt, answer in episode.queries)
        self.targets += sum(len(answer) for _, answer in episode.queries)


@dataclass
class _Trial(_Part):
    """A task: the prefix of all its examples, its `parts`, and for each look what an answer's token costs behind them."""

    parts: list[_Part] = field(default_factory=list)
    costs: dict[int, list[float]] = field(default_factory=dict)
    best_step: int = 0
    best: Prefix | None = None

    @property
    def all(self) -> tuple[_Part, ...]:
        return (self, *self.parts)

    def note(self, step: int, costs: list[float], prefix: Prefix) -> None:
        """What held-back answers cost after `step` steps, and the prefix of all examples then."""
        self.costs[step] = costs
        if step == 0 or _mean(costs) < _mean(self.costs[self.best_step]):
            self.best_step, self.best = step, prefix

    def going(self, patience: int) -> bool:
        """Whether the last look at which it got better is less than `patience` looks ago."""
        return list(self.costs)[::-1].index(self.best_step) < patience


def held_back_parts(examples: int, *, seed: str) -> list[frozenset[int]]:
    """Which of so many examples are held back, in each part.

    Of many a quarter, once; of fewer each example in turn, in at most four parts; of one nothing.

    >>> [sorted(part) for part in held_back_parts(3, seed="")]
    [[2], [1], [0]]
    >>> [len(part) for part in held_back_parts(6, seed="")], [len(part) for part in held_back_parts(16, seed="")]
    ([2, 2, 1, 1], [4])
    """
    order = Random(f"held back/{seed}").sample(range(examples), examples)
    if examples < 2:
        return []
    if examples >= ONE_PART_FROM:
        return [frozenset(order[: examples // 4])]
    return [frozenset(order[i :: min(PARTS, examples)]) for i in range(min(PARTS, examples))]


def clearly_less(after: Sequence[float], before: Sequence[float]) -> bool:
    """Whether pairs fall by more than the standard error of their differences (after Breiman et al. 1984, section 3.4.3)."""
    falls = [b - a for a, b in zip(after, before, strict=True)]
    mean = _mean(falls)
    spread = math.sqrt(sum((fall - mean) ** 2 for fall in falls) / max(1, len(falls) - 1))
    return mean > spread / math.sqrt(len(falls))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
