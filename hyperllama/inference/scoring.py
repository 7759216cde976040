"""The likelihood of continuations behind prefixes, in packed passes that share what can be shared.

A prefix stands in the packed row once, as rows of which there is nothing but keys and values; its adapters, if it has any, act
on the rows that read it. A prompt with several continuations is a segment that they all read, so that it is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_masks import GistLayout, Segment, rotate
from hyperllama.base.adapters import Stack, adapted
from hyperllama.base.decoder import inverse_frequencies, packed_arguments
from hyperllama.data.episode import Example
from hyperllama.data.text import Encoder
from hyperllama.errors import UserError
from hyperllama.prefixes.prefix import Prefix

# Bounds for one pass: rows of attention keys that are gathered, as a multiple of its tokens, and entries of its logits.
GATHERED_PER_TOKEN, LOGITS = 32, 2**28


@dataclass(frozen=True)
class Question:
    """A prompt (token ids, at least one) and the continuations whose likelihood is asked for, each of at least one token."""

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    prefix: Prefix | None = None

    @classmethod
    def of(cls, encoder: Encoder, example: Example, prefix: Prefix | None = None, choices: Sequence[str] = ()) -> Question:
        """An example behind a prefix, its own answer first among the choices."""
        answers = [example.output, *(choice for choice in choices if choice != example.output)]
        return cls(tuple(encoder.prompt(example.input)), tuple(tuple(encoder.answer(a)) for a in answers), prefix)


@dataclass(frozen=True)
class Scored:
    """A continuation's log-probability in nats, summed over its tokens, and whether each of them is the likeliest."""

    likelihood: float
    greedy: bool


@torch.no_grad()
def continuation_scores(
    model: PreTrainedModel, questions: Sequence[Question], *, batch_tokens: int = 8192, backend: str = "auto"
) -> list[list[Scored]]:
    """Scores of each continuation of each question; a pass has at most `batch_tokens` tokens."""
    scores: list[list[Scored]] = []
    for batch in _batches(questions, batch_tokens, model.config.vocab_size):
        likelihoods, rows = _likelihoods(model, batch, backend)
        continuations = [c for question in batch for c in question.continuations]
        tokens = torch.tensor([token for c in continuations for token in c], device=model.device)
        lengths = list(map(len, continuations))
        picked = likelihoods[rows, tokens].cpu().split(lengths)
        likeliest = (likelihoods.argmax(-1)[rows] == tokens).cpu().split(lengths)
        found = iter([Scored(p.sum().item(), bool(all_of.all())) for p, all_of in zip(picked, likeliest)])
        scores += [[next(found) for _ in question.continuations] for question in batch]
    return scores


@torch.no_grad()
def answer_distributions(
    model: PreTrainedModel, questions: Sequence[Question], *, batch_tokens: int = 8192, backend: str = "auto"
) -> Iterator[Tensor]:
    """For each question the log-probabilities (tokens, V) of all tokens at every token of its first continuation."""
    questions = [replace(question, continuations=question.continuations[:1]) for question in questions]
    for batch in _batches(questions, batch_tokens, model.config.vocab_size):
        likelihoods, rows = _likelihoods(model, batch, backend)
        yield from likelihoods[rows].split([len(question.continuations[0]) for question in batch])


def _batches(questions: Sequence[Question], batch_tokens: int, vocabulary: int):
    batch: list[Question] = []
    tokens = gathered = targets = 0
    seen: set[int] = set()
    for question in questions:
        if not question.prompt or not question.continuations or not all(question.continuations):
            raise UserError("a question needs a prompt and continuations of at least one token each; none may be empty")
        gists = question.prefix.rows if question.prefix else 0
        new = len(question.prompt) + sum(len(c) - 1 for c in question.continuations)
        own = new + (0 if id(question.prefix) in seen else gists)
        reads = gists * len(question.continuations) + len(question.prompt) * len(question.continuations)
        heads = sum(map(len, question.continuations))
        full = tokens + own > batch_tokens or gathered + reads > GATHERED_PER_TOKEN * batch_tokens
        if batch and (full or (targets + heads) * vocabulary > LOGITS):
            yield batch
            batch, tokens, gathered, targets, seen, own = [], 0, 0, 0, set(), new + gists
        batch.append(question)
        seen.add(id(question.prefix))
        tokens, gathered, targets = tokens + own, gathered + reads, targets + heads
    if batch:
        yield batch


@dataclass
class _Row:
    """A packed row as it grows: token ids and segments. Begin with `add_prefixes`."""

    ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    prefixes: list[Prefix] = field(default_factory=list)
    _places: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def add_prefixes(self, prefixes: Sequence[Prefix | None]) -> None:
        """Append the distinct ones among them that have rows."""
        for prefix in {id(p): p for p in prefixes if p is not None and p.rows}.values():
            self._places[id(prefix)] = (self.add([0] * prefix.rows, gists=prefix.rows)[0],)
            self.prefixes.append(prefix)

    def add(self, ids: Sequence[int], gists: int = 0, reads: tuple[int, ...] = ()) -> tuple[int, int]:
        """Append a segment; returns its index and its first row."""
        first = len(self.ids)
        self.ids += ids
        self.segments.append(Segment(len(ids), gists=gists, reads=reads))
        return len(self.segments) - 1, first

    def reads(self, prefix: Prefix | None) -> tuple[int, ...]:
        """The segments that are read behind a prefix."""
        return self._places.get(id(prefix), ())


def _likelihoods(model: PreTrainedModel, questions: Sequence[Question], backend: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities (rows, V) of a packed pass, and which of these rows predicts each token of each continuation."""
    row = _Row()
    row.add_prefixes([question.prefix for question in questions])
    # For each continuation, the rows that predict its tokens; choices share the row that predicts their first.
    predicting: list[list[int]] = []
    # The rows that each task's adapters act on.
    adapters = {id(q.prefix): q.prefix.adapters for q in questions if q.prefix is not None and q.prefix.adapters is not None}
    acted_on: dict[int, list[int]] = {key: [] for key in adapters}
    for question in questions:
        asked_from = len(row.ids)
        reads, asked = row.reads(question.prefix), question.prompt
        if len(question.continuations) == 1:
            (only,) = question.continuations
            _, first = row.add([*asked, *only[:-1]], reads=reads)
            start = first + len(asked) - 1
            predicting.append(list(range(start, start + len(only))))
            acted_on.get(id(question.prefix), []).extend(range(asked_from, len(row.ids)))
            continue
        prompt, first = row.add(asked, gists=len(asked), reads=reads)
        for continuation in question.continuations:
            predicting.append([first + len(asked) - 1])
            if len(continuation) > 1:
                _, start = row.add(continuation[:-1], reads=(*reads, prompt))
                predicting[-1] += range(start, start + len(continuation) - 1)
        acted_on.get(id(question.prefix), []).extend(range(asked_from, len(row.ids)))
    head_rows = sorted({r for rows in predicting for r in rows})
    place = {r: i for i, r in enumerate(head_rows)}
    device = model.device
    layout = GistLayout(row.segments).to(device)
    first = sum(prefix.rows for prefix in row.prefixes)  # of these rows there is nothing but keys and values
    acting = [[r - first for r in rows] for rows in acted_on.values()]
    with adapted(model, Stack.of(list(adapters.values()), model), acting):
        logits = model(
            input_ids=torch.tensor([row.ids[first:]], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(head_rows, device=device) - first,
            **packed_arguments(model, layout, backend, prefix_states(model, layout, row.prefixes), apart=True),
        ).logits[0]
    rows = torch.tensor([place[r] for rows in predicting for r in rows], device=device)
    return logits.float().log_softmax(-1), rows


def prefix_states(model: PreTrainedModel, layout: GistLayout, prefixes: Sequence[Prefix]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (N, R, D) a layer of prefixes that are the first segments of a packed row, where `layout` has them."""
    if not prefixes:
        return []
    gists = torch.cat([torch.arange(prefix.rows) for prefix in prefixes]).to(model.device)
    shifts = layout.positions[: len(gists)] - gists
    states = []
    for layer in range(prefixes[0].layers):
        keys = torch.cat([prefix.keys[layer].to(model.device) for prefix in prefixes], dim=1)
        values = torch.cat([prefix.values[layer].to(model.device) for prefix in prefixes], dim=1)
        states.append((rotate(keys, shifts, inverse_frequencies(model)) if shifts.any() else keys, values))
    return states
