"""Bodies of requests to the OpenAI endpoints, rewritten for the engine: the query behind its placeholders, with its ticket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hyperllama.errors import UserError
from hyperllama.serving.catalog import Card

ROWS_VARIABLE = "hyperllama_rows"  # of the chat template

# Keys that are the server's own, whatever model is asked for: what fills an engine's cache, and with what it is read.
OURS = ("kv_transfer_params", "ec_transfer_params", "chat_template")

# Keys that make no sense behind a prefix, and why.
REFUSED = {
    "echo": "the rows of a prefix have no text to repeat",
    "prompt_logprobs": "the rows of a prefix have no log-probabilities",
    "use_beam_search": "beams would lose their prefix",
    "truncate_prompt_tokens": "it would cut the prefix",
    "prompt_embeds": "a prefix is followed by tokens",
    "suffix": "it is not supported",
    "cache_salt": "a prefix has a salt of its own",
}


def placeholder_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """A special token that stands for rows: its text, which stays itself when it is repeated, and its id. UserError if none."""
    ends = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token)
    for token in dict.fromkeys([*ends, *tokenizer.all_special_tokens]):
        if token:
            place = tokenizer.convert_tokens_to_ids(token)
            if tokenizer(token * 3, add_special_tokens=False)["input_ids"] == [place] * 3:
                return token, place
    raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no special token that can stand for a prefix's rows")


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template with placeholders in front, as many as its variable says; None if it has no template.

    Behind a prefix a conversation begins without the start token, whose place is before it.
    """
    own = tokenizer.chat_template
    if not isinstance(own, str):
        return None
    text, _ = placeholder_of(tokenizer)
    rows = f"{{%- if {ROWS_VARIABLE} is defined %}}{{{{- {text!r} * {ROWS_VARIABLE} -}}}}"
    return rows + "{%- set bos_token = '' %}{%- endif -%}" + own


def refuse_ours(body: dict[str, Any]) -> None:
    """UserError if a client sets what only the server may set."""
    for key in OURS:
        if body.get(key) is not None:
            raise UserError(f"{key}: set by the server alone; leave it out")


def wrapped(body: dict[str, Any], card: Card, *, chat: bool, base: str, secret: str, placeholder: int) -> dict[str, Any]:
    """The body for the engine's own model `base`, which reads the card's prefix. UserError names a key that cannot be served.

    A completion's prompt is an input, which is written in the prefix's text format; with `raw` it is text that follows the
    prefix as it is, and nothing else is set. Token ids follow the prefix as they are.
    """
    for key, why in REFUSED.items():
        if body.get(key) not in (None, False):
            raise UserError(f"{key}: not with a prefix, since {why}; leave it out")
    body = {**body, "model": base, "cache_salt": card.ticket.salt(secret), "kv_transfer_params": card.ticket.params()}
    raw, form = body.pop("raw", False), card.encoder.format
    if chat:
        body["chat_template_kwargs"] = {**(body.get("chat_template_kwargs") or {}), ROWS_VARIABLE: card.ticket.rows}
    else:
        body["prompt"] = _behind([placeholder] * card.ticket.rows, body.get("prompt"), card, raw)
        if form.separator and not raw:
            body["stop"] = _stops(body.get("stop"), form.separator)
    if not raw and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = form.answer_tokens
    return body


def _behind(rows: list[int], prompt: Any, card: Card, raw: bool) -> list[int] | list[list[int]]:
    """One prompt or several, as token ids behind the rows."""
    encoder = card.encoder

    def ids(one: str | Sequence[int]) -> list[int]:
        if isinstance(one, str):
            return encoder.tokenizer(one, add_special_tokens=False)["input_ids"] if raw else encoder.prompt(one)
        return list(one)

    several = isinstance(prompt, list) and all(isinstance(one, str | list) for one in prompt)
    given = prompt if several else [prompt]
    if not given or not all(isinstance(one, str) or _is_ids(one) for one in given):
        raise UserError("prompt: text or token ids, or a list of these")
    found = [ids(one) for one in given]
    if not all(found):
        raise UserError("prompt: empty after tokenisation; give an input")
    return [rows + one for one in found] if several else rows + found[0]


def _is_ids(one: Any) -> bool:
    return isinstance(one, list) and all(type(token) is int and token >= 0 for token in one)


def _stops(given: Any, separator: str) -> list[str]:
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list):
        raise UserError("stop: text, or a list of texts")
    return list(dict.fromkeys([*stops, separator]))
