"""Self-study: a prefix is tuned to say what the model says with the whole context, on passages that the model makes up itself.

So no examples are needed, and a document can be studied too. The objective is that of cartridges (Eyuboglu et al. 2025, arXiv
2506.06266): the divergence from the model's own distribution behind the context (context distillation, Askell et al. 2021,
arXiv 2112.00861). Theirs start from the context's first tokens; here a hypernetwork's prefix is the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from hyperllama.data.grouping import in_groups
from hyperllama.data.packing import GistBatch, pack_taught
from hyperllama.data.passages import Passages
from hyperllama.data.text import ContextIds, EncodedEpisode, Encoder
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.inference.reader import Reader
from hyperllama.inference.scoring import Question
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.rows import first_rows
from hyperllama.tuning.prefix_tuner import PrefixTuner


def made_up(
    reader: Reader,
    encoder: Encoder,
    contexts: Sequence[ContextIds],
    settings: Passages,
    *,
    seed: int = 0,
    batch_tokens: int = 32768,
) -> list[list[Question]]:
    """Passages that the model makes up behind each context, different ones, as questions.

    Behind demonstrations they are queries with their answers, up to the separator; behind anything else whatever follows.
    """
    head, whole = encoder.query_head(), reader.encode(contexts)
    found: list[list[Question]] = [[] for _ in contexts]
    devices = [reader.model.device] if reader.model.device.type == "cuda" else []
    for of_examples in (True, False):
        asked = [i for i, c in enumerate(contexts) if bool(head and getattr(c, "examples", ())) == of_examples]
        # What stands first in a passage is read: the words that every query begins with, or a token that the model said.
        prompts = [head if of_examples else [contexts[i][-1]] for i in asked]
        behind = [whole[i] if of_examples else first_rows(whole[i], whole[i].rows - 1) for i in asked]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            sampled = reader.generate(
                [prompt for prompt in prompts for _ in range(settings.count)],
                [prefix for prefix in behind for _ in range(settings.count)],
                batch_size=256,
                batch_tokens=batch_tokens,
                stop=encoder.format.separator if of_examples else "",
                do_sample=True,
                temperature=settings.temperature,
                max_new_tokens=settings.tokens,
            )
        for place, tokens in enumerate(sampled):
            prompt, said = (head, tokens) if of_examples else (tokens[:1], tokens[1:])
            question = Question(tuple(prompt), (tuple(said),))
            own = found[asked[place // settings.count]]
            if said and question not in own:
                own.append(question)
    return found


@dataclass(frozen=True)
class SelfStudy:
    """Makes prefixes as `maker` does, and tunes them for at most `steps` steps; used in place of it.

    The model makes up `passages` behind each context. A quarter of them is held back, and decides which step is kept; a prefix
    that has gone `patience` of `looks` looks without getting better is no longer tuned. A step sees `per_step` passages of each
    context. A pass has at most `batch_tokens` tokens.
    """

    maker: Hypernetwork
    reader: Reader
    encoder: Encoder
    steps: int
    learning_rate: float = 1e-2
    passages: Passages = field(default_factory=Passages)
    per_step: int = 8
    looks: int = 4
    patience: int = 2
    seed: int = 0
    batch_tokens: int = 8192

    @property
    def settings(self) -> dict:
        """What a manifest says was asked for, and by which a store knows a prefix."""
        names = ("steps", "learning_rate", "per_step", "looks", "patience", "seed")
        return {"on": "context", "passages": asdict(self.passages)} | {name: getattr(self, name) for name in names}

    def compress(
        self, contexts: Sequence[ContextIds], manifests: Sequence[Manifest] | None = None, *, gists: int | None = None
    ) -> list[Prefix]:
        """As the maker's.

        A manifest's `metrics` say how far a token's distribution is from that behind the whole context before and after, in
        nats, over held-back passages, and `refined_steps`: after how many steps the prefix was kept. `tuned_on` counts the
        tokens that went through the model for it, and the targets among them.
        """
        manifests = manifests or [Manifest(base=self.reader.identity) for _ in contexts]
        made = self.maker.compress(contexts, manifests, gists=gists)
        students = [_Student(f"{i}", tuple(c), prefix) for i, (c, prefix) in enumerate(zip(contexts, made, strict=True))]
        # Like lengths together, as packing has them.
        ordered = sorted(students, key=lambda student: len(student.context))
        for group in in_groups(ordered, self._tokens, (self.batch_tokens, self.batch_tokens)):
            self._teach(group, {student.name: contexts[int(student.name)] for student in group})
        return [self._signed(student) for student in students]

    def _tokens(self, student: _Student) -> tuple[int, int]:
        """Of a step, and of the teacher's pass."""
        passages = self.passages
        return self.per_step * passages.tokens, len(student.context) + passages.count * passages.tokens

    def _teach(self, group: Sequence[_Student], contexts: dict[str, ContextIds]) -> None:
        own = [contexts[student.name] for student in group]
        made = made_up(self.reader, self.encoder, own, self.passages, seed=self.seed, batch_tokens=4 * self.batch_tokens)
        for student, passages in zip(group, made, strict=True):
            student.passages = passages
        group = [student for student in group if len(student.passages) > 1]
        by_rows: dict[int, list[_Student]] = {}
        for student in group:
            by_rows.setdefault(student.start.rows, []).append(student)
        for own in by_rows.values():
            self._tune(own)

    def _tune(self, group: Sequence[_Student]) -> None:
        tuner = PrefixTuner(self.reader.model, {s.name: s.start for s in group}, tokenizer=self.reader.tokenizer)
        held_back = {s.name: max(1, len(s.passages) // 4) for s in group}
        exam = {s.name: self._lesson(tuner, [s], [s.passages[: held_back[s.name]]]) for s in group}
        studied = [s.passages[held_back[s.name] :] for s in group]
        lessons = [
            self._lesson(tuner, group, [_cycled(own, i, self.per_step) for own in studied])
            for i in range(0, max(map(len, studied)), self.per_step)
        ]
        optimizer = torch.optim.AdamW(tuner.trainable().values(), lr=self.learning_rate, weight_decay=0.0)
        looks = {round(self.steps * (i + 1) / self.looks) for i in range(self.looks)} - {0}
        self._look(group, tuner, exam, 0)
        for step in range(1, self.steps + 1):
            if not any(student.going(self.patience) for student in group):
                break
            batch, taught = lessons[step % len(lessons)]
            with torch.enable_grad():
                tuner(batch, taught).mean.backward()
            optimizer.step()
            optimizer.zero_grad()
            for student in group:
                student.targets += batch.answers // len(group)
                student.tokens += batch.tokens // len(group)
            if step in looks:
                self._look(group, tuner, exam, step)

    def _lesson(
        self, tuner: PrefixTuner, students: Sequence[_Student], passages: Sequence[Sequence[Question]]
    ) -> tuple[GistBatch, Tensor]:
        """Passages behind prefixes, packed, and what the model makes of them behind the whole contexts: its hidden states."""
        said = [tuple((question.prompt, question.continuations[0]) for question in own) for own in passages]
        named = [EncodedEpisode(s.context, own, task=s.name) for s, own in zip(students, said, strict=True)]
        batch = pack_taught(named, tuner.rows).to(self.reader.model.device)
        return replace(batch, teacher=None), tuner.taught(batch.teacher)

    @torch.no_grad()
    def _look(
        self, group: Sequence[_Student], tuner: PrefixTuner, exam: dict[str, tuple[GistBatch, Tensor]], step: int
    ) -> None:
        now = tuner.prefixes()
        for student in group:
            student.note(step, tuner(*exam[student.name]).mean.item(), now[student.name])

    def _signed(self, student: _Student) -> Prefix:
        manifest = student.start.manifest
        before, after = (student.costs.get(step) for step in (0, student.best_step))
        metrics = {"refined_steps": student.best_step, "held_back": len(student.passages) // 4}
        if before is not None:
            metrics |= {"divergence_unrefined": before, "divergence_refined": after}
        metrics["tuned_on"] = [student.tokens, student.targets]
        kept = student.best or student.start
        elastic = manifest.elastic and not student.best_step
        manifest = replace(manifest, refined=self.settings, elastic=elastic, metrics={**manifest.metrics, **metrics})
        return Prefix(kept.keys, kept.values, manifest)


@dataclass
class _Student:
    """One context: its prefix at the start, the passages, and how far it is from the teacher at each look."""

    name: str
    context: tuple[int, ...]
    start: Prefix
    passages: list[Question] = field(default_factory=list)
    costs: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    best: Prefix | None = None
    tokens: int = 0
    targets: int = 0

    def note(self, step: int, cost: float, prefix: Prefix) -> None:
        """What held-back passages cost after `step` steps, and the prefix then."""
        self.costs[step] = cost
        if step == 0 or cost < self.costs[self.best_step]:
            self.best_step, self.best = step, prefix if step else None

    def going(self, patience: int) -> bool:
        """Whether the last look at which it got better is less than `patience` looks ago."""
        return list(self.costs)[::-1].index(self.best_step) < patience


def _cycled(passages: Sequence[Question], first: int, count: int) -> list[Question]:
    """`count` passages from place `first` on, from the beginning again where they end; each once at most."""
    return [passages[(first + i) % len(passages)] for i in range(min(count, len(passages)))]
