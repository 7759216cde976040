"""Where a prefix comes from and what may read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime

from hyperllama.base.identity import BaseIdentity
from hyperllama.errors import UserError
from hyperllama.files import canonical_json, sha256

FORMAT_VERSION = 3


@dataclass(frozen=True)
class Manifest:
    """Where a prefix comes from and what may read it: the header of its file.

    `base` is the only model that may read it. `rotary` holds the model's rotary settings and, as inv_freq, the inverse
    frequencies with which keys are moved. `text_format` holds the templates with which its queries are written (see
    `hyperllama.data.text.TextFormat`). `context_tokens` counts the tokens that the gists stand for, `context_sha256` is a
    hash of them. `sink` is the token whose row, computed by the base alone, stands first, or None.
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
    text_format: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    created: str | None = None
    made_with: dict = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return canonical_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        values = json.loads(text)
        if values["format_version"] > FORMAT_VERSION:
            raise UserError(f"format version {values['format_version']} is newer than this HyperLlama reads; upgrade it")
        if values["format_version"] < FORMAT_VERSION:
            raise UserError(
                f"format version {values['format_version']} is older than this HyperLlama reads; compress the examples again, "
                "with a hypernetwork that was trained again"
            )
        known = {f.name for f in fields(cls)}
        return cls(**{**{k: v for k, v in values.items() if k in known}, "base": BaseIdentity(**values["base"])})


def _both(first: Manifest, second: Manifest) -> Manifest:
    """Where a concatenation comes from. What was measured about its parts says nothing about it."""
    texts = [m.instruction for m in (first, second) if m.instruction]
    counts = {
        name: sum(getattr(m, name) or 0 for m in (first, second)) for name in ("examples", "dropped_examples", "context_tokens")
    }
    return replace(
        first,
        **counts,
        task=f"{first.task} + {second.task}",
        instruction="\n".join(texts) or None,
        context_sha256=sha256(first.context_sha256 or "", second.context_sha256 or ""),
        hypernetwork=first.hypernetwork if first.hypernetwork == second.hypernetwork else None,
        hypernetwork_sha256=first.hypernetwork_sha256 if first.hypernetwork_sha256 == second.hypernetwork_sha256 else None,
        metrics={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
