"""Where a prefix comes from and what may read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from math import isfinite

from hyperllama.base.identity import BaseIdentity
from hyperllama.data.text import TextFormat
from hyperllama.errors import UserError
from hyperllama.files import canonical_json, from_fields, sha256

FORMAT_VERSION = 3


@dataclass(frozen=True)
class Manifest:
    """Where a prefix comes from and what may read it: the header of its file.

    `base` is the only model that may read it. `rotary` holds the model's rotary settings and, as inv_freq, the inverse
    frequencies with which keys are moved. `text_format` holds the templates with which its queries are written (see
    `hyperllama.data.text.TextFormat`). `context_tokens` counts the tokens that the gists stand for, `context_sha256` is a
    hash of them. `sink` is the token whose row, computed by the base alone, stands first, or None.
    `elastic` says that its first rows were trained to do without the others. `positions` is how many the base has, which no
    prefix may fill. `refined` is how a prefix was to be tuned on its own examples (see `hyperllama.tuning.refining`), or empty.
    `metrics` is free for what was measured about it.
    """

    base: BaseIdentity
    rotary: dict = field(default_factory=dict)
    hypernetwork: str | None = None
    hypernetwork_sha256: str | None = None
    task: str | None = None
    instruction: str | None = None
    examples: int | None = None
    dropped_examples: int | None = None
    context_tokens: int | None = None
    context_sha256: str | None = None
    sink: int | None = None
    elastic: bool = False
    positions: int | None = None
    text_format: dict = field(default_factory=dict)
    refined: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    created: str | None = None
    made_with: dict = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return canonical_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest of what `to_json` wrote; UserError for another version, or values that no manifest has."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"its manifest is not JSON ({error})") from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if not isinstance(version, int):
            raise UserError("its manifest has no format version")
        if version > FORMAT_VERSION:
            raise UserError(f"format version {version} is newer than this HyperLlama reads; upgrade it")
        if version < FORMAT_VERSION:
            raise UserError(
                f"format version {version} is older than this HyperLlama reads; compress the examples again, with a "
                "hypernetwork that was trained again"
            )
        made = from_fields(cls, values, "its manifest")
        frequencies = made.rotary.get("inv_freq", [])
        if not isinstance(frequencies, list) or not all(type(x) in (int, float) and isfinite(x) for x in frequencies):
            raise UserError("its manifest: rotary has an inv_freq that is no list of finite numbers")
        if made.text_format:
            text_format = from_fields(TextFormat, made.text_format, "its manifest: text_format")
            for problem in text_format.problems():
                raise UserError(f"its manifest: {problem}")
        return made

    def changed(self, **fields_) -> Manifest:
        """The manifest of rows that were made of these: what was measured about these says nothing about those."""
        return replace(self, **{"metrics": {}, "created": datetime.now(UTC).isoformat(timespec="seconds"), **fields_})


def context_sha256(context: Sequence[int]) -> str:
    """The hash by which a manifest knows the token ids of its context."""
    return sha256(canonical_json(list(context)))


def _both(first: Manifest, second: Manifest) -> Manifest:
    """Where a concatenation comes from; UserError if its parts are asked in different text formats."""
    formats = [m.text_format for m in (first, second) if m.text_format]
    keys = {key for one in formats for key in one} - {"answer_tokens"}
    for key in sorted(keys) if len(formats) == 2 else ():
        one, other = first.text_format.get(key), second.text_format.get(key)
        if one != other:
            raise UserError(
                f"prefixes of different text formats cannot be concatenated: format.{key} is {one!r} for {first.task} and "
                f"{other!r} for {second.task}; compress their examples with one hypernetwork"
            )
    texts = [m.instruction for m in (first, second) if m.instruction]
    counts = {
        name: sum(getattr(m, name) or 0 for m in (first, second)) for name in ("examples", "dropped_examples", "context_tokens")
    }
    return first.changed(
        **counts,
        elastic=False,
        text_format={**formats[0], "answer_tokens": max(one.get("answer_tokens", 0) for one in formats)} if formats else {},
        task=f"{first.task} + {second.task}",
        instruction="\n".join(texts) or None,
        context_sha256=sha256(first.context_sha256 or "", second.context_sha256 or ""),
        hypernetwork=first.hypernetwork if first.hypernetwork == second.hypernetwork else None,
        hypernetwork_sha256=first.hypernetwork_sha256 if first.hypernetwork_sha256 == second.hypernetwork_sha256 else None,
    )
