"""Prefixes in vLLM's Python interface, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hyperllama.errors import UserError
from hyperllama.prefixes.prefix import Prefix, stored_digest
from hyperllama.serving.ticket import Ticket
from hyperllama.serving.wrapping import placeholder_of


def asked(path: str | Path, prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], dict[str, Any]]:
    """A prompt for `LLM.generate` that reads a prefix file of the store, and the `extra_args` of its SamplingParams.

    `prompt`: token ids of the query, as `Session.prompt` makes them. UserError if the file is damaged or the query is empty.
    """
    if not prompt:
        raise UserError("an empty prompt; give a query")
    rows = Prefix.load(path).rows
    ticket = Ticket(Path(path).name, stored_digest(path), rows)
    ids = [placeholder_of(tokenizer)[1]] * rows + list(prompt)
    return {"prompt_token_ids": ids, "cache_salt": ticket.salt("")}, {"kv_transfer_params": ticket.params()}
