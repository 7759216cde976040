"""The few-shot text format and its limits: from an `Episode` of text to token ids, without silent cuts."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

from hyperllama.data.episode import Episode, Example
from hyperllama.errors import UserError

if TYPE_CHECKING:  # recipes are read without torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextFormat:
    """How an episode is written.

    A context is `instruction` (if there is one), then for each demonstration `query`, `answer` and `separator`. A query is
    `query`; the model is to answer with `answer`. Each piece is tokenised by itself, so a demonstration and a query have the
    same tokens. The context starts with the tokenizer's start token, if it has one.

    An answer ends where demonstrations show that it ends: at the `separator`, in training targets, losses and generation. A
    model that was trained to end answers with its end token may be asked for that instead (`end_token`); generation stops at
    either, and after `answer_tokens` tokens at the latest. Without separator and end token, only the latter ends an answer.
    """

    instruction: str = "{instruction}\n\n"
    query: str = "Input: {input}\nOutput:"
    answer: str = " {output}"
    separator: str = "\n\n"
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


class ContextIds(list):
    """Token ids of a context; its demonstrations, of those given the `shown`, end at the places `ends` in it."""

    ends: tuple[int, ...] = ()
    shown: tuple[int, ...] = ()


class Encoder:
    """Turns text into token ids under one format and its limits."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat, limits: Limits):
        self.tokenizer, self.format, self.limits = tokenizer, text_format, limits
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        # Examples are drawn again and again: most pieces of text have been tokenised before.
        self._known: dict[str, list[int]] = {}
        if text_format.end_token and tokenizer.eos_token_id is None:
            raise UserError(
                "format.end_token: the tokenizer has no end token; set it to false, so that answers end at the separator, or "
                "give the tokenizer an eos_token"
            )
        self.end = [tokenizer.eos_token_id] if text_format.end_token else self._ids(text_format.separator)

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) >= 100_000:
                self._known.clear()
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return list(self._known[text])

    def first_token(self) -> int:
        """The token at position 0 of what a model reads: the start token, or else the first one of the query template.

        UserError if the tokenizer has no start token and the template begins with the input, which is never the same.
        """
        ahead = next(string.Formatter().parse(self.format.query))[0]
        first = [*self.start, *self._ids(ahead)][:1]
        if not first:
            raise UserError(
                "gist.sink: the tokenizer has no start token, and format.query begins with the input, so no token is always "
                "first; let format.query begin with text, or set gist.sink to false"
            )
        return first[0]

    def prompt(self, text: str) -> list[int]:
        """Token ids of a query, as they follow a prefix."""
        return self._ids(self.format.query.format(input=text))

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer with its end: the separator, or the end token if the format says so."""
        return self._ids(self.format.answer.format(output=text)) + self.end

    def answer_of(self, tokens: Sequence[int]) -> str:
        """The answer in what a model has generated: its text up to the separator, without white space around it."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return (text.split(self.format.separator)[0] if self.format.separator else text).strip()

    def context(self, instruction: str, demonstrations: Sequence[Example]) -> tuple[ContextIds, list[tuple[int, int]]]:
        """Token ids of an instruction and as many whole demonstrations as fit, in order, and the spans of their answers.

        A demonstration that does not fit is left out whole. UserError if the instruction alone is too long.
        """
        ids = ContextIds(self.start)
        if instruction:
            ids += self._ids(self.format.instruction.format(instruction=instruction))
        if len(ids) > self.limits.context_tokens:
            raise UserError(
                f"an instruction takes {len(ids)} tokens, more than limits.context_tokens={self.limits.context_tokens}: "
                f"raise it, set limits.too_long_query to skip, or shorten {instruction[:60]!r}"
            )
        spans, shown, separator = [], [], self._ids(self.format.separator)
        for i, example in enumerate(demonstrations):
            prompt = self.prompt(example.input)
            answer = self._ids(self.format.answer.format(output=example.output)) + separator
            if len(ids) + len(prompt) + len(answer) <= self.limits.context_tokens:
                spans.append((len(ids) + len(prompt), len(ids) + len(prompt) + len(answer)))
                ids += prompt + answer
                shown.append(i)
        ids.ends, ids.shown = tuple(end for _, end in spans), tuple(shown)
        return ids, spans

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
        ids = self.tokenizer(window.text, add_special_tokens=False)["input_ids"]  # too many to be worth keeping
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
