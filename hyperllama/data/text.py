"""The few-shot text format and its limits: from an `Episode` of text to token ids, without silent cuts."""

from __future__ import annotations

import copy
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

from hyperllama.data.episode import Episode, Example
from hyperllama.data.tokens import Piece, TextTokens, places_until, template
from hyperllama.errors import UserError

if TYPE_CHECKING:  # recipes are read without torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextFormat:
    """How an episode is written.

    A context is `instruction` (if there is one), then for each demonstration `query`, `answer` and `separator`. A query is
    `query`; the model is to answer with `answer`. A context is tokenised as one text, and a query as that text would go on.
    `start_token`: whether the tokenizer's start token stands before it; null does what the tokenizer itself does.

    An answer ends where demonstrations show that it ends: at the `separator`, in training targets, losses and generation. A
    model that was trained to end answers with its end token may be asked for that instead (`end_token`); generation stops at
    either, and after `answer_tokens` tokens at the latest. Without separator and end token, only the latter ends an answer.
    """

    instruction: str = "{instruction}\n\n"
    query: str = "Input: {input}\nOutput:"
    answer: str = " {output}"
    separator: str = "\n\n"
    start_token: bool | None = None
    end_token: bool = False
    answer_tokens: int = 64

    def problems(self) -> list[str]:
        """What is wrong with the templates, a sentence each."""
        found = []
        for name in ("instruction", "query", "answer"):
            wanted = {"instruction": "instruction", "query": "input", "answer": "output"}[name]
            try:
                used = {part[1] for part in string.Formatter().parse(getattr(self, name)) if part[1] is not None}
            except ValueError as error:
                found.append(f"format.{name}: not a template ({error})")
                continue
            if used != {wanted}:
                found.append(f"format.{name}: must use {{{wanted}}} and no other field, not {getattr(self, name)!r}")
        return found or self._joined()

    def _joined(self) -> list[str]:
        """Which fields run into each other, so that the end of one and the beginning of the next would be one word."""
        (head, tail), (before, after) = around_field(self.query), around_field(self.answer)
        found = []
        if not tail and not before:
            found.append("format.answer: runs into the input before it; let it begin with a space or a line break")
        if not after and not self.separator and not head:
            found.append("format.query: runs into the answer before it; let it begin with a space, or give a separator")
        return found


@dataclass(frozen=True)
class Limits:
    """Upper bounds in tokens. `context_tokens` covers instruction and demonstrations, `query_tokens` a query with its answer.

    Demonstrations that do not fit are left out whole, and counted. A query that does not fit, or all queries of an instruction
    that does not, are an error, or are skipped and counted. Windows of plain text have sizes of their own.
    """

    context_tokens: int = 1024
    query_tokens: int = 384
    too_long_query: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class EncodedEpisode:
    """Token ids of an episode. `answers` are the spans of the demonstrations' answers, with their separators, in `context`.

    `index` is the episode's number in its stream.
    """

    context: tuple[int, ...]
    queries: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    answers: tuple[tuple[int, int], ...] = ()
    task: str = ""
    demonstrations: int = 0
    dropped_demonstrations: int = 0
    skipped_queries: int = 0
    index: int = -1


def around_field(text: str) -> tuple[str, str]:
    """What a template has before its field, and after it."""
    parts = list(string.Formatter().parse(text))
    at = next(i for i, part in enumerate(parts) if part[1] is not None)
    return "".join(part[0] for part in parts[: at + 1]), "".join(part[0] for part in parts[at + 1 :])


def filled(text: str, value: str) -> list[Piece]:
    """A template with its field filled in, as pieces."""
    pieces = []
    for before, name, _, _ in string.Formatter().parse(text):
        pieces += [template(before)] if before else []
        pieces += [Piece(value)] if name is not None and value else []
    return pieces


class ContextIds(list):
    """Token ids of a context; its demonstrations, `examples`, of those given the `shown`, end at the places `ends` in it."""

    ends: tuple[int, ...] = ()
    shown: tuple[int, ...] = ()
    examples: tuple[Example, ...] = ()


class Encoder:
    """Turns text into token ids under one format and its limits.

    The tokens of a context, a prompt and an answer, one after the other, are those of their text as a whole: each is tokenised
    between what always stands before it and after it, the end of a demonstration and the beginning of a query. So they are the
    same in training, evaluation, generation and exports, and a prompt's do not depend on its answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat, limits: Limits):
        self.tokenizer, self.format, self.limits = tokenizer, text_format, limits
        self._text = TextTokens(tokenizer)
        self.start = self._start_tokens()
        if text_format.end_token and tokenizer.eos_token_id is None:
            raise UserError(
                "format.end_token: the tokenizer has no end token; set it to false, so that answers end at the separator, or "
                "give the tokenizer an eos_token"
            )
        self._head, self._tail = ([template(text)] if text else [] for text in around_field(text_format.query))
        self._separator = [template(text_format.separator)] if text_format.separator else []
        # Examples are drawn again and again: most prompts and answers have been tokenised before.
        self._known: dict[tuple[str, str], list[int]] = {}

    def within(self, limits: Limits) -> Encoder:
        """The same under other limits."""
        other = copy.copy(self)
        other.limits = limits
        return other

    def _start_tokens(self) -> list[int]:
        wanted, bos = self.format.start_token, self.tokenizer.bos_token_id
        if wanted is None:
            return list(self._text.start)
        if wanted and bos is None:
            raise UserError("format.start_token: the tokenizer has no start token; set it to false, or to null")
        return [bos] if wanted else []

    def _remembered(self, kind: str, text: str, tokenise: Callable[[], list[int]]) -> list[int]:
        if (kind, text) not in self._known:
            if len(self._known) >= 100_000:
                self._known.clear()
            self._known[kind, text] = tokenise()
        return list(self._known[kind, text])

    def first_token(self) -> int:
        """The token at position 0 of what a model reads: the start token, or else the first one of the query template.

        UserError if the tokenizer has no start token and the template begins with the input, which is never the same.
        """
        first = [*self.start, *self._text.encode(self._head)[0]][:1]
        if not first:
            raise UserError(
                "gist.sink: the tokenizer has no start token, and format.query begins with the input, so no token is always "
                "first; let format.query begin with text, or set gist.sink to false"
            )
        return first[0]

    def query_head(self) -> list[int]:
        """Token ids with which every query begins behind a context; none where the template begins with the input."""
        return self.behind_context(self._head) if self._head else []

    def without_start(self, ids: Sequence[int]) -> list[int]:
        """Token ids of what another template wrote, such as a chat template, without the start token that it begins with.

        A prefix stands before them, and a start token has its place before that.
        """
        own = list(self._text.start)
        return list(ids[len(own) :]) if own and list(ids[: len(own)]) == own else list(ids)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a query, as they follow a prefix: as the text of a context goes on."""
        return self._remembered("prompt", text, lambda: self.behind_context(self._query(text)))

    def behind_context(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids of text as they follow a context."""
        return self._text.between(self._separator, pieces)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer with its end: the separator as demonstrations show it, or by `end_token` the end token."""
        return self._remembered("answer", text, lambda: self._answer_tokens(text))

    def _answer_tokens(self, text: str) -> list[int]:
        pieces = filled(self.format.answer, text)
        if self.format.end_token:
            return [*self._text.between(self._tail, pieces), self.tokenizer.eos_token_id]
        return self._text.between(self._tail, [*pieces, *self._separator], self._head)

    def answer_of(self, tokens: Sequence[int]) -> str:
        """The answer in what a model has generated: its text up to the separator, without white space around it."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return (text.split(self.format.separator)[0] if self.format.separator else text).strip()

    def _query(self, text: str) -> list[Piece]:
        return filled(self.format.query, text)

    def context(self, instruction: str, demonstrations: Sequence[Example]) -> tuple[ContextIds, list[tuple[int, int]]]:
        """Token ids of an instruction and as many whole demonstrations as fit, in order, and the spans of their answers.

        A demonstration that does not fit is left out whole. UserError if the instruction alone is too long.
        """
        shown = list(range(len(demonstrations)))
        ids, spans = self._context(instruction, demonstrations)
        if len(ids) > self.limits.context_tokens:
            shown = self._those_that_fit(instruction, demonstrations)
            ids, spans = self._context(instruction, [demonstrations[i] for i in shown])
            while len(ids) > self.limits.context_tokens:  # what fits by itself may be a token longer in its place
                shown = shown[:-1]
                ids, spans = self._context(instruction, [demonstrations[i] for i in shown])
        ids.ends, ids.shown = tuple(end for _, end in spans), tuple(shown)
        ids.examples = tuple(demonstrations[i] for i in shown)
        return ids, spans

    def _context(self, instruction: str, demonstrations: Sequence[Example]) -> tuple[ContextIds, list[tuple[int, int]]]:
        """All of a context as one text, however long: its ids, and the spans of answers with their separators."""
        pieces = filled(self.format.instruction, instruction) if instruction else []
        places = []  # characters at which answers begin and end
        written = sum(len(piece.text) for piece in pieces)
        for example in demonstrations:
            own = [self._query(example.input), [*filled(self.format.answer, example.output), *self._separator]]
            for part in own:
                written += sum(len(piece.text) for piece in part)
                places.append(written)
                pieces += part
        ids, spans = self._text.encode([*pieces, *self._head])
        end = places_until(spans, written)
        if end < len(spans) and spans[end][0] < written:  # a token would lie on both sides of the end
            ids, spans = self._text.encode(pieces)
            end = len(ids)
        rows = [len(self.start) + places_until(spans[:end], place) for place in places]
        return ContextIds([*self.start, *ids[:end]]), list(zip(rows[::2], rows[1::2], strict=True))

    def _those_that_fit(self, instruction: str, demonstrations: Sequence[Example]) -> list[int]:
        """The places of demonstrations that fit one after the other, by their tokens between others."""
        room = self.limits.context_tokens - len(self._context(instruction, ())[0])
        if room < 0:
            raise UserError(
                f"an instruction takes {self.limits.context_tokens - room} tokens, more than "
                f"limits.context_tokens={self.limits.context_tokens}: raise it, set limits.too_long_query to skip, or shorten "
                f"{instruction[:60]!r}"
            )
        shown = []
        for i, example in enumerate(demonstrations):
            tokens = len(self.prompt(example.input)) + len(self._shown_answer(example.output))
            if tokens <= room:
                shown.append(i)
                room -= tokens
        return shown

    def _shown_answer(self, text: str) -> list[int]:
        """Token ids of an answer in a demonstration, separator and all."""
        pieces = [*filled(self.format.answer, text), *self._separator]
        return self._remembered("shown", text, lambda: self._text.between(self._tail, pieces, self._head))

    def encode(self, episode: Episode) -> EncodedEpisode:
        """Token ids of an episode, with what was left out counted. UserError for a query too long, unless they are skipped.

        A window of plain text that turns out too short has no queries, and counts as skipped.
        """
        if episode.window is not None:
            return self._window(episode)
        try:
            context, answers = self.context(episode.instruction, episode.demonstrations)
        except UserError as error:
            if self.limits.too_long_query == "error":
                raise UserError(f"task {episode.task or '?'}: {error}") from None
            return EncodedEpisode((), (), task=episode.task, skipped_queries=len(episode.queries))
        queries, skipped = [], 0
        for example in episode.queries:
            prompt, answer = self.prompt(example.input), self.answer(example.output)
            if len(prompt) + len(answer) > self.limits.query_tokens:
                if self.limits.too_long_query == "error":
                    raise UserError(
                        f"task {episode.task or '?'}: a query takes {len(prompt) + len(answer)} tokens, more than "
                        f"limits.query_tokens={self.limits.query_tokens}: raise it, or set limits.too_long_query to skip"
                    )
                skipped += 1
            elif prompt and answer:
                queries.append((tuple(prompt), tuple(answer)))
            else:
                raise UserError(
                    f"task {episode.task or '?'}: a query or its answer is empty after tokenisation: {example.input[:60]!r}"
                )
        return EncodedEpisode(
            context=tuple(context),
            queries=tuple(queries),
            answers=tuple(answers),
            task=episode.task,
            demonstrations=len(answers),
            dropped_demonstrations=len(episode.demonstrations) - len(answers),
            skipped_queries=skipped,
        )

    def _window(self, episode: Episode) -> EncodedEpisode:
        """Plain text, without templates; a window that turns out too short has no queries, and counts as skipped."""
        window = episode.window
        ids, _ = self._text.encode([Piece(window.text)])
        if window.period:
            ids = ids[: window.period] * -(-window.tokens // window.period)
        ends = accumulate((window.context_tokens, window.prompt_tokens, window.continuation_tokens, window.after_tokens))
        before, prompt, continuation, after = (tuple(ids[a:b]) for a, b in pairwise((0, *ends)))
        whole = len(ids) >= window.tokens
        queries = ((prompt, continuation),) if whole else ()
        # What goes round in a circle has no start. Behind a start token, windows to be copied were learned by distance alone
        # (docs/log.md).
        context = (*(() if window.period else self.start), *before, *after)
        return EncodedEpisode(context, queries, task=episode.task, skipped_queries=0 if whole else 1)
