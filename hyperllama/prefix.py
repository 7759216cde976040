"""The soft prefix: keys and values of a task's gists at every layer, and the file that carries them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import DynamicCache

from hyperllama.backbone import BaseIdentity
from hyperllama.errors import UserError
from hyperllama.files import canonical_json, sha256, write_atomically

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Where a prefix comes from and what may read it: the header of its file.

    `base` is the only model that may read it. `text_format` holds the templates with which its queries are written (see
    `hyperllama.data.text.TextFormat`). `context_tokens` counts the tokens that the gists stand for, `context_sha256` is a
    hash of them. `metrics` is free for what was measured about it.
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
        known = {f.name for f in fields(cls)}
        return cls(**{**{k: v for k, v in values.items() if k in known}, "base": BaseIdentity(**values["base"])})


class Prefix:
    """Keys and values of G gists: for each of L layers a pair of tensors (N, G, D), N key-value heads of D dimensions.

    Keys are canonical: rotated so that the gists stand at positions 0 .. G-1, and a reader starts at G. So a prefix needs
    no memory of how long its context was, and prefixes of different contexts go into one batch.

    Raises ValueError if shapes disagree.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], manifest: Manifest | None = None):
        self.keys, self.values, self.manifest = tuple(keys), tuple(values), manifest
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                f"a prefix needs as many keys as values, one pair a layer, not {len(self.keys)} and {len(self.values)}"
            )
        shape, dtype = self.keys[0].shape, self.keys[0].dtype
        if len(shape) != 3 or any(t.shape != shape or t.dtype != dtype for t in (*self.keys, *self.values)):
            shapes = sorted({str(tuple(t.shape)) for t in (*self.keys, *self.values)})
            raise ValueError(f"a prefix needs keys and values of one shape (kv_heads, gists, head_dim) and dtype, not {shapes}")

    @property
    def layers(self) -> int:
        return len(self.keys)

    @property
    def kv_heads(self) -> int:
        return self.keys[0].shape[0]

    @property
    def gists(self) -> int:
        return self.keys[0].shape[1]

    @property
    def head_dim(self) -> int:
        return self.keys[0].shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def __repr__(self) -> str:
        made = f", task={self.manifest.task!r}, base={self.manifest.base.name!r}" if self.manifest else ""
        return f"Prefix(gists={self.gists}, layers={self.layers}, kv_heads={self.kv_heads}, head_dim={self.head_dim}{made})"

    def __eq__(self, other) -> bool:
        if not isinstance(other, Prefix):
            return NotImplemented
        same_form = (self.layers, self.dtype, self.manifest) == (other.layers, other.dtype, other.manifest)
        pairs = zip((*self.keys, *self.values), (*other.keys, *other.values))
        return same_form and all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)

    __hash__ = None  # tensors can change

    def to(self, device=None, dtype=None) -> Prefix:
        """The same prefix on another device or in another dtype."""
        move = [tuple(t.to(device=device, dtype=dtype) for t in side) for side in (self.keys, self.values)]
        return Prefix(*move, self.manifest)

    def to_cache(self, device=None, dtype=None) -> DynamicCache:
        """A fresh cache of one row for `model.generate(past_key_values=...)` or a forward pass.

        The attention mask must cover the prefix: ones (1, G + prompt tokens).
        """
        return Prefix.stack([self], device=device, dtype=dtype)[0]

    @staticmethod
    def stack(prefixes: Sequence[Prefix], device=None, dtype=None) -> tuple[DynamicCache, Tensor]:
        """Prefixes of different tasks as one batch: a fresh cache of B rows, and which of its columns are gists (B, G).

        Prefixes with fewer gists are padded on the left; the mask, bool, is False there and goes in front of the prompt's
        attention mask. Raises ValueError if the prefixes are not of one model's form.
        """
        forms = {(p.layers, p.kv_heads, p.head_dim) for p in prefixes}
        if len(forms) != 1:
            raise ValueError(f"only prefixes of one base model stack, not (layers, kv_heads, head_dim) of {sorted(forms)}")
        longest = max(p.gists for p in prefixes)
        first = prefixes[0].keys[0]
        place = {"device": device or first.device, "dtype": dtype or first.dtype}
        pairs = []
        for layer in range(prefixes[0].layers):
            pair = []
            for side in ("keys", "values"):
                batch = torch.zeros(len(prefixes), first.shape[0], longest, first.shape[2], **place)
                for row, prefix in zip(batch, prefixes):
                    row[:, longest - prefix.gists :] = getattr(prefix, side)[layer]
                pair.append(batch)
            pairs.append(tuple(pair))
        gists = torch.tensor([p.gists for p in prefixes], device=place["device"])
        mask = torch.arange(longest, device=place["device"])[None] >= longest - gists[:, None]
        return DynamicCache(pairs), mask

    def check(self, identity: BaseIdentity, where: str = "this prefix") -> None:
        """UserError, naming both, unless the manifest's base is the model `identity`. A prefix without manifest passes."""
        if self.manifest is None:
            return
        made_for = self.manifest.base
        if (made_for.weights, made_for.config) != (identity.weights, identity.config):
            raise UserError(
                f"{where} was made for {made_for.name} ({made_for.weights[:8]}), "
                f"not for {identity.name} ({identity.weights[:8]}); read it with its own base, or compress the examples again"
            )
        if made_for.tokenizer and identity.tokenizer and made_for.tokenizer != identity.tokenizer:
            raise UserError(
                f"{where} was made with another tokenizer than that of {identity.name}; use the tokenizer of {made_for.name}"
            )

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file: keys and values (L, N, G, D), the manifest and a checksum in its header.

        Atomic: a crash or a full disk (OSError) leaves the file that stood there whole.
        """
        tensors = {"keys": torch.stack(self.keys).cpu().contiguous(), "values": torch.stack(self.values).cpu().contiguous()}
        manifest = self.manifest.to_json() if self.manifest else ""
        metadata = {"hyperllama": manifest, "sha256": _checksum(manifest, tensors)}
        write_atomically(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path, identity: BaseIdentity | None = None) -> Prefix:
        """Read a file that `save` wrote, onto the CPU; with `identity`, refuse it unless it was made for that base.

        Raises UserError if the file is missing, damaged in any bit, not a prefix, or made for another base.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such prefix file; make one with hyperllama compress")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: not a whole prefix file ({error}); copy it again, or compress the examples again"
            ) from error
        if "hyperllama" not in metadata or set(tensors) != {"keys", "values"}:
            raise UserError(f"{path}: a safetensors file, but not a prefix; make one with hyperllama compress")
        if metadata.get("sha256") != _checksum(metadata["hyperllama"], tensors):
            raise UserError(f"{path}: damaged, its checksum does not match; copy it again, or compress the examples again")
        try:
            manifest = Manifest.from_json(metadata["hyperllama"]) if metadata["hyperllama"] else None
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        prefix = cls(tensors["keys"].unbind(), tensors["values"].unbind(), manifest)
        if identity is not None:
            prefix.check(identity, str(path))
        return prefix


def _checksum(manifest: str, tensors: dict[str, Tensor]) -> str:
    parts = [manifest]
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        parts += [f"{name}{tensor.dtype}{tuple(tensor.shape)}", tensor.flatten().view(torch.uint8).numpy().tobytes()]
    return sha256(*parts)
