"""The frozen model that reads prefixes: stock `generate`, with one prefix a row, and likelihoods in packed passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from hyperllama.base.adapters import Stack, adapted
from hyperllama.base.checks import check_vocabulary
from hyperllama.base.decoder import cache_argument
from hyperllama.base.fingerprints import identify
from hyperllama.data.grouping import in_groups
from hyperllama.errors import UserError
from hyperllama.inference.sampling import contradictions
from hyperllama.inference.scoring import Question, Scored, continuation_scores
from hyperllama.prefixes.capture import encode_whole
from hyperllama.prefixes.prefix import Prefix

NEW_TOKENS = 64  # of an answer, unless settings say


class Reader:
    """A base model and its tokenizer, ready to read prompts behind prefixes that were made for it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.identity = identify(model, tokenizer)

    def encode(self, contexts: Sequence[Sequence[int]], *, batch_tokens: int = 8192) -> list[Prefix]:
        """Prefixes that keep every token of the contexts (token ids, at least one each): full attention, encoded once."""
        batches = in_groups(contexts, lambda context: (len(context),), (batch_tokens,))
        return [prefix for batch in batches for prefix in encode_whole(self.model, batch)]

    def score(self, questions: Sequence[Question], *, batch_tokens: int = 8192) -> list[list[float]]:
        """The log-probability in nats of each continuation of each question, summed over its tokens.

        Raises UserError for a prefix of another base, or an empty prompt or continuation.
        """
        found = self.score_answers(questions, batch_tokens=batch_tokens)
        return [[scored.likelihood for scored in continuations] for continuations in found]

    def score_answers(self, questions: Sequence[Question], *, batch_tokens: int = 8192) -> list[list[Scored]]:
        """As `score`, and whether greedy decoding would write each continuation."""
        self._check(question.prefix for question in questions)
        return continuation_scores(self.model, questions, batch_tokens=batch_tokens)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prefixes: Sequence[Prefix | None] | None = None,
        *,
        batch_size: int = 32,
        batch_tokens: int | None = None,
        stop: str = "",
        **settings,
    ) -> list[list[int]]:
        """Continue each prompt behind its own prefix; different tasks and lengths may share a batch.

        `prompts` are token ids; `prefixes` one for each, None for those that are read without, or for all. Greedy, whatever the
        checkpoint's generation config says: `settings` go to transformers' `generate` verbatim and nothing else does. A batch
        has at most `batch_size` rows, and with `batch_tokens` no more prefix rows and prompt tokens, padding included, unless
        one row has. A row ends at an end token, or with the text `stop`; its new tokens are returned, `stop` included. Raises
        UserError, before anything is generated, for a prefix of another base, settings that contradict each other, or a prompt
        that the model's positions cannot hold.
        """
        given = [None] * len(prompts) if prefixes is None else prefixes
        if len(given) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many prefixes, not {len(given)}")
        self._check(given)
        for problem in contradictions(settings):
            raise UserError(problem)
        for i, problem in self.too_long(prompts, given, settings.get("max_new_tokens", NEW_TOKENS)):
            raise UserError(f"prompt {i}: {problem}")
        # Neighbours in length share a batch, so that little of it is padding.
        gists = [0 if prefix is None else prefix.rows for prefix in given]
        continuations: list[list[int]] = [[]] * len(prompts)
        for bare in (True, False):  # a batch has a cache or has none
            order = [i for i, prefix in enumerate(given) if (prefix is None) == bare]
            order.sort(key=lambda i: (gists[i], len(prompts[i])))
            for rows in _batches(order, gists, list(map(len, prompts)), batch_size, batch_tokens):
                behind = None if bare else [given[i] for i in rows]
                batch = self._generate([prompts[i] for i in rows], behind, stop, settings)
                for i, continuation in zip(rows, batch, strict=True):
                    continuations[i] = continuation
        return continuations

    def _check(self, prefixes: Iterable[Prefix | None]) -> None:
        """UserError for a prefix of another base, or one that says it is of this base and has not its sizes."""
        for prefix in {id(one): one for one in prefixes if one is not None}.values():
            prefix.check(self.identity)
            prefix.check_sizes(self.model)

    def too_long(
        self, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None] | None, new_tokens: int
    ) -> Iterator[tuple[int, str]]:
        """The places of prompts that cannot be answered, with what is wrong: nothing to read, or more than the positions."""
        positions = self.model.config.max_position_embeddings
        for i, prompt in enumerate(prompts):
            rows = prefixes[i].rows if prefixes is not None and prefixes[i] is not None else 0
            if not len(prompt):
                yield i, "is empty after tokenisation; give an input, or a query template with text of its own"
            elif rows + len(prompt) + new_tokens > positions:
                taken = rows + len(prompt) + new_tokens
                said = f"prefix, prompt and {new_tokens} new tokens take {taken} positions, but the model has {positions}"
                yield i, f"{said}; shorten the input or lower --max-new-tokens"

    def _generate(self, prompts, prefixes, stop: str, settings) -> list[list[int]]:
        tokenizer, device = self.tokenizer, self.model.device
        rows = self.model.get_input_embeddings().num_embeddings  # a padding token may have been added without an embedding
        pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None and i < rows)
        ids, mask = _padded(prompts, pad, device)
        longest = ids.shape[1]
        cache, stack = {}, None
        if prefixes is not None:
            # Beam search repeats each prompt, but not a cache that it is given.
            rows = [prefix for prefix in prefixes for _ in range(settings.get("num_beams", 1))]
            stack = Stack.of([prefix.adapters for prefix in rows], self.model)
            states, gists = Prefix.stack(rows, device=device, dtype=self.model.dtype)
            cache = cache_argument(self.model, states)
            mask = torch.cat([gists[:: len(rows) // len(prefixes)].to(mask.dtype), mask], dim=1)
        settings = {"pad_token_id": pad, "eos_token_id": end_tokens(self.model, tokenizer), **settings}
        if stop:
            settings["stopping_criteria"] = [*settings.get("stopping_criteria", ()), StopsAt(stop, tokenizer, longest)]
        settings.setdefault("max_new_tokens", NEW_TOKENS)
        with one_product_head(self.model), adapted(self.model, stack), own_settings(self.model):
            output = self.model.generate(ids, attention_mask=mask, **cache, **settings)[:, longest:].tolist()
        ends = settings["eos_token_id"]  # one, several or none; what follows is padding
        answers = [_until(row, set(ends) if isinstance(ends, list) else {ends}) for row in output]
        return [_through(row, stop, tokenizer) for row in answers] if stop else answers


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """All tokens that end an answer: the tokenizer's and those of the checkpoint's generation config; None for none."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])]
    return sorted({int(end) for end in ends if end is not None}) or None


@contextmanager
def own_settings(model: PreTrainedModel) -> Iterator[None]:
    """A context in which `generate` takes no default from the checkpoint, such as sampling or a repetition penalty."""
    was = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = was


class StopsAt(StoppingCriteria):
    """A row is done when `stop` is in the text of its tokens from `start` on.

    transformers' own `stop_strings` looks at the prompt's end too, and cannot take tokenizers that know whole words only.
    """

    def __init__(self, stop: str, tokenizer: PreTrainedTokenizerBase, start: int):
        self.stop, self.tokenizer, self.start = stop, tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        texts = (self.tokenizer.decode(row) for row in input_ids[:, self.start :])
        return torch.tensor([self.stop in text for text in texts], device=input_ids.device)


def _padded(prompts: Sequence[Sequence[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, longest), padded on the left, and which of them are real, as ones and zeros."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)  # two transfers, not two a row


@contextmanager
def one_product_head(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the output head multiplies the last rows of a batch in one product.

    `generate` hands the head a view of one row of each sequence of the prompt. torch takes such a view sequence by sequence,
    and on a CPU in bf16 copies the head's whole weight for each of them first: for 32 rows longer than the rest of a batch.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _batches(order: list[int], gists: list[int], prompts: list[int], most_rows: int, most_tokens: int | None):
    """Cut `order` into batches of rows that are padded to their longest prefix and their longest prompt."""
    batch: list[int] = []
    for i in order:
        width = max(gists[j] for j in (*batch, i)) + max(prompts[j] for j in (*batch, i))
        if batch and (len(batch) == most_rows or (most_tokens is not None and (len(batch) + 1) * width > most_tokens)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _until(row: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first of `ends`."""
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def _through(row: list[int], stop: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The fewest first tokens whose text has `stop` in it; all of them if it has not. What follows in a batch is padding."""
    if stop not in tokenizer.decode(row):
        return row
    return next(row[:n] for n in range(1, len(row) + 1) if stop in tokenizer.decode(row[:n]))
