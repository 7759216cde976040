"""The soft prefix: keys and values of a task's gists at every layer, perhaps adapters, and the file that carries them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attention_masks import rotate
from hyperllama.base.adapters import BESIDE, Adapters
from hyperllama.base.decoder import head_dim, kv_heads, layers_of, part
from hyperllama.base.identity import BaseIdentity
from hyperllama.base.tensor_files import read_tensors
from hyperllama.data.text import TextFormat
from hyperllama.errors import UserError
from hyperllama.files import sha256, write_atomically
from hyperllama.prefixes.manifest import Manifest, _both

SCALES = {"keys": "keys_scale", "values": "values_scale"}

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

MOST_LAYERS = 10_000  # of a decoder; a file that says more would be cut into as many tensors

ADAPTERS = tuple(f"{name}_{side}" for name in BESIDE for side in ("down", "up"))


class Prefix:
    """Keys and values of G gists: for each of L layers a pair of tensors (N, G, D), N key-value heads of D dimensions.

    Keys are canonical: rotated so that the gists stand at positions 0 .. G-1, and a reader starts at G. So a prefix needs
    no memory of how long its context was, and prefixes of different contexts go into one batch.

    A task module of HINT may have `adapters` too, for the rows that read it; then there may be no keys (G = 0). `Reader`
    applies them; what knows keys and values only (a cache, PEFT) refuses them.

    Raises ValueError if shapes disagree.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        manifest: Manifest | None = None,
        adapters: Adapters | None = None,
    ):
        self.keys, self.values, self.manifest, self.adapters = tuple(keys), tuple(values), manifest, adapters
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                f"a prefix needs as many keys as values, one pair a layer, not {len(self.keys)} and {len(self.values)}"
            )
        shape, dtype = self.keys[0].shape, self.keys[0].dtype
        if len(shape) != 3 or any(t.shape != shape or t.dtype != dtype for t in (*self.keys, *self.values)):
            shapes = sorted({str(tuple(t.shape)) for t in (*self.keys, *self.values)})
            raise ValueError(f"a prefix needs keys and values of one shape (kv_heads, rows, head_dim) and dtype, not {shapes}")
        if adapters is not None and adapters.layers != len(self.keys):
            raise ValueError(f"a prefix of {len(self.keys)} layers needs adapters of as many, not of {adapters.layers}")

    @property
    def layers(self) -> int:
        return len(self.keys)

    @property
    def kv_heads(self) -> int:
        return self.keys[0].shape[0]

    @property
    def rows(self) -> int:
        return self.keys[0].shape[1]

    @property
    def head_dim(self) -> int:
        return self.keys[0].shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and adapters."""
        return sum(t.nbytes for t in (*self.keys, *self.values)) + (self.adapters.nbytes if self.adapters else 0)

    def __repr__(self) -> str:
        made = f", adapters={self.adapters.sizes}" if self.adapters else ""
        made += f", task={self.manifest.task!r}, base={self.manifest.base.name!r}" if self.manifest else ""
        return f"Prefix(rows={self.rows}, layers={self.layers}, kv_heads={self.kv_heads}, head_dim={self.head_dim}{made})"

    def __eq__(self, other) -> bool:
        if not isinstance(other, Prefix):
            return NotImplemented
        forms = [(one.layers, one.dtype, one.manifest) for one in (self, other)]
        same_form = forms[0] == forms[1]
        pairs = zip((*self.keys, *self.values), (*other.keys, *other.values))
        same_rows = same_form and all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
        return same_rows and (other.adapters is None if self.adapters is None else self.adapters.equals(other.adapters))

    __hash__ = None  # tensors can change

    def refuse_modules(self, what: str) -> None:
        """UserError if there is more than keys and values; `what` begins the sentence."""
        if self.adapters is not None:
            raise UserError(
                f"{what} keys and values only, but this task module has adapters; read it with generate or evaluate"
            )

    def problem(self) -> str | None:
        """Why no model should read this, in a few words that follow "a prefix"; None if one may."""
        if not self.rows and self.adapters is None:
            return "without rows says nothing"
        if self.dtype not in FLOATS:
            return f"of {self.dtype} has no numbers that a model reads"
        tensors = (*self.keys, *self.values, *(self.adapters.tensors if self.adapters else ()))
        if not all(bool(t.isfinite().all()) for t in tensors):
            return "with numbers that are not finite would give nothing but such numbers"
        positions = self.manifest.positions if self.manifest else None
        if positions is not None and self.rows >= positions:
            return f"of {self.rows} rows leaves none of the {positions} positions of its base for a query"
        frequencies = self.manifest.rotary.get("inv_freq", ()) if self.manifest else ()
        if 2 * len(frequencies) > self.head_dim:
            return f"of {self.head_dim} dimensions a head has no {len(frequencies)} rotary frequencies"
        return None

    def truncate(self, gists: int) -> Prefix:
        """The first `gists` gists, behind the sink if there is one. What was measured with all of them leaves the manifest.

        Raises UserError beyond 1 .. G, or if the prefix has a manifest that does not say that an elastic hypernetwork made it:
        the first rows of others were never meant to do without the rest.
        """
        self.refuse_modules("truncating is for prefixes of")
        sinks = int(self.manifest is not None and self.manifest.sink is not None)
        most = self.rows - sinks
        if not 1 <= gists <= most:
            raise UserError(f"a prefix of {most} gists can be cut to 1 .. {most} of them, not {gists}")
        if gists == most:
            return self
        if self.manifest is not None and not self.manifest.elastic:
            raise UserError(
                f"the first {gists} of {most} gists were not trained to do without the others; compress the examples again "
                "with --gists, by a hypernetwork that was trained with gist.elastic=true"
            )
        kept = gists + sinks
        manifest = self.manifest and self.manifest.changed()
        return Prefix([k[:, :kept] for k in self.keys], [v[:, :kept] for v in self.values], manifest)

    @staticmethod
    def concat(first: Prefix, second: Prefix) -> Prefix:
        """One prefix of both: a reader sees `first`, then `second`, whose keys are moved behind it.

        A sink is the first row of all: that of the second is left out where the first has one. Raises UserError if they are of
        different bases or text formats, if the second does not say how its keys are moved, or if no model can read both.
        """
        manifest = second.manifest
        for one in (first, second):
            one.refuse_modules("concatenation is for prefixes of")
        if first.manifest is None or manifest is None or "inv_freq" not in manifest.rotary:
            raise UserError(
                "a prefix without its base's rotary frequencies cannot be concatenated; compress its examples again"
            )
        first.check(manifest.base, "the first prefix")
        inv_freq = torch.tensor(manifest.rotary["inv_freq"], device=second.keys[0].device)
        cut = int(first.manifest.sink is not None and manifest.sink is not None)
        shifts = torch.full((second.rows - cut,), first.rows - cut, device=inv_freq.device)
        moved = [rotate(k[:, cut:], shifts, inv_freq) for k in second.keys]
        keys = [torch.cat([a, b.to(a)], dim=1) for a, b in zip(first.keys, moved, strict=True)]
        values = [torch.cat([a, b[:, cut:].to(a)], dim=1) for a, b in zip(first.values, second.values, strict=True)]
        joined = Prefix(keys, values, _both(first.manifest, manifest))
        if problem := joined.problem():
            raise UserError(f"a prefix {problem}; put fewer together")
        return joined

    def to(self, device=None, dtype=None) -> Prefix:
        """The same prefix on another device or in another dtype."""
        move = [tuple(t.to(device=device, dtype=dtype) for t in side) for side in (self.keys, self.values)]
        return Prefix(*move, self.manifest, self.adapters and self.adapters.to(device, dtype))

    def to_cache(self, device=None, dtype=None) -> DynamicCache:
        """A fresh cache of one row for `model.generate(**cache_argument(model, cache), ...)` or a forward pass.

        The attention mask must cover the prefix: ones (1, G + prompt tokens). UserError for a task module with more.
        """
        self.refuse_modules("a cache holds")
        return Prefix.stack([self], device=device, dtype=dtype)[0]

    @staticmethod
    def stack(prefixes: Sequence[Prefix], device=None, dtype=None) -> tuple[DynamicCache, Tensor]:
        """Keys and values of different tasks as one batch: a fresh cache of B rows, and which of its columns are gists (B, G).

        Prefixes with fewer gists are padded on the left; the mask, bool, is False there and goes in front of the prompt's
        attention mask. Raises ValueError if the prefixes are not of one model's form.
        """
        forms = {(p.layers, p.kv_heads, p.head_dim) for p in prefixes}
        if len(forms) != 1:
            raise ValueError(f"only prefixes of one base model stack, not (layers, kv_heads, head_dim) of {sorted(forms)}")
        longest = max(p.rows for p in prefixes)
        first = prefixes[0].keys[0]
        place = {"device": device or first.device, "dtype": dtype or first.dtype}
        # A task's prefix is moved once, however many rows read it, and in one piece: a copy for every row, layer and side
        # would take longer than a step of the model on a GPU.
        distinct = {id(prefix): prefix for prefix in prefixes}
        layers, (heads, _, dim) = prefixes[0].layers, first.shape
        states = torch.zeros(2 * layers, len(distinct), heads, longest, dim, **place)
        for i, prefix in enumerate(distinct.values()):
            states[:, i, :, longest - prefix.rows :] = torch.stack((*prefix.keys, *prefix.values))
        column = {key: i for i, key in enumerate(distinct)}
        rows = torch.tensor([column[id(prefix)] for prefix in prefixes], device=states.device)
        pairs = [(states[i].index_select(0, rows), states[layers + i].index_select(0, rows)) for i in range(layers)]
        gists = torch.tensor([p.rows for p in prefixes], device=place["device"])
        mask = torch.arange(longest, device=place["device"])[None] >= longest - gists[:, None]
        return DynamicCache(pairs), mask

    def check(self, identity: BaseIdentity, where: str = "this prefix") -> None:
        """UserError, naming both, unless the manifest's base is the model `identity`. A prefix without manifest passes."""
        if self.manifest is None:
            return
        made_for = self.manifest.base
        made_for.refuse_other(identity, f"{where} was made for")
        if made_for.tokenizer and identity.tokenizer and made_for.tokenizer != identity.tokenizer:
            raise UserError(
                f"{where} was made with another tokenizer than that of {identity.name}; use the tokenizer of {made_for.name}"
            )

    def check_sizes(self, model: PreTrainedModel) -> None:
        """UserError unless keys, values and adapters have the sizes of a model's."""
        config = model.config
        wanted = (config.num_hidden_layers, kv_heads(config), head_dim(config))
        if (self.layers, self.kv_heads, self.head_dim) != wanted:
            raise UserError(f"{self} has other sizes than the model, {wanted} of layers, key-value heads and their dimensions")
        for name, (down, up) in self.adapters.pairs.items() if self.adapters else ():
            beside = part(layers_of(model)[0], BESIDE[name])
            inner, outer = (config.hidden_size,) * 2 if name == "adapter" else (beside.in_features, beside.out_features)
            if (down.shape[1], up.shape[2]) != (inner, outer):
                found = f"{down.shape[1]} to {up.shape[2]}"
                raise UserError(f"{self}: its {name} is from {found} dimensions, but the model's from {inner} to {outer}")

    def check_format(self, text_format: TextFormat, where: str = "this prefix") -> None:
        """UserError unless queries in `text_format` are those that this prefix was made for. One that says nothing passes."""
        for key, value in (self.manifest.text_format if self.manifest else {}).items():
            found = getattr(text_format, key, value)
            if found != value and key != "answer_tokens":
                raise UserError(f"{where} was made for queries with format.{key}={value!r}, not {found!r}; set it to that")

    def save(self, path: str | Path, *, quantize: Literal["int8"] | None = None) -> dict[str, float]:
        """Write one .safetensors file: keys and values (L, N, G, D), the manifest and a checksum in its header.

        `quantize="int8"` stores a quarter of the bytes of float32; `load` gives float32 back. Returns the relative error of
        keys and values (root mean square), which the manifest then holds in place of what was measured before; nothing is lost
        otherwise. UserError for a prefix that no model can read (`problem`), or with `quantize` a task module with more than
        keys and values. Atomic: a crash or a full disk (OSError) leaves the file that was there whole.
        """
        if quantize:
            self.refuse_modules("int8 is for files of")
        if problem := self.problem():
            raise UserError(f"{path}: a prefix {problem}; it is not written")
        sides = {"keys": torch.stack(self.keys).cpu(), "values": torch.stack(self.values).cpu()}
        tensors = {name: side.contiguous() for name, side in sides.items()}
        for name, pair in self.adapters.pairs.items() if self.adapters else ():
            tensors |= {f"{name}_{side}": x.cpu().contiguous() for side, x in zip(("down", "up"), pair)}
        lost: dict[str, float] = {}
        if quantize:
            tensors, lost = _quantized(tensors)
            if self.manifest is not None:
                metrics = {f"int8_error_{side}": error for side, error in lost.items()}
                self = Prefix(self.keys, self.values, self.manifest.changed(metrics=metrics))
        manifest = self.manifest.to_json() if self.manifest else ""
        metadata = {"hyperllama": manifest, "sha256": _checksum(manifest, tensors)}
        write_atomically(path, safetensors.torch.save(tensors, metadata))
        return lost

    @classmethod
    def load(cls, path: str | Path, identity: BaseIdentity | None = None) -> Prefix:
        """Read a file that `save` wrote, onto the CPU; with `identity`, refuse it unless it was made for that base.

        Raises UserError if the file is missing, damaged in any bit, not a prefix, made for another base, or nothing that a
        model can read (`problem`).
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such prefix file; make one with hyperllama compress")
        tensors, metadata = read_tensors(path, "a whole prefix file")
        more = set(tensors) - {"keys", "values"}
        known = {"keys", "values"} <= set(tensors) and (more <= {*ADAPTERS} or more == set(SCALES.values()))
        if "hyperllama" not in metadata or not known:
            raise UserError(f"{path}: a safetensors file, but not a prefix; make one with hyperllama compress")
        if metadata.get("sha256") != _checksum(metadata["hyperllama"], tensors):
            raise UserError(f"{path}: damaged, its checksum does not match; copy it again, or compress the examples again")
        try:
            manifest = Manifest.from_json(metadata["hyperllama"]) if metadata["hyperllama"] else None
            prefix = cls(*_parts(tensors, path), manifest, _adapters(tensors))
            if problem := prefix.problem():
                raise UserError(f"a prefix {problem}")
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        if identity is not None:
            prefix.check(identity, str(path))
        return prefix


def is_prefix(path: str | Path) -> bool:
    """Whether a file is a prefix, by its header."""
    return "hyperllama" in _header(path)


def stored_digest(path: str | Path) -> str | None:
    """The checksum of manifest and tensors that a prefix file's header has, by which equal prefixes are known; None without.

    `Prefix.load` compares it with what the file holds.
    """
    return _header(path).get("sha256")


def _header(path: str | Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _parts(tensors: dict[str, Tensor], path: Path) -> Iterator[tuple[Tensor, ...]]:
    """Keys and values by layer; ValueError for shapes that nothing of ours writes, before they are made larger."""
    shape = tensors["keys"].shape
    if len(shape) != 4 or not 1 <= shape[0] <= MOST_LAYERS or 0 in (shape[1], shape[3]):
        raise ValueError(f"keys of shape {tuple(shape)} are not (layers, heads, rows, dimensions)")
    for (side, scale), axis in zip(SCALES.items(), (2, 3)):
        if scale in tensors:
            wanted = [1 if i == axis else n for i, n in enumerate(tensors[side].shape)]
            if tensors[side].dtype != torch.int8 or list(tensors[scale].shape) != wanted:
                raise ValueError(f"{scale} of shape {tuple(tensors[scale].shape)} does not fit {side}")
            tensors[side] = tensors[side].float() * tensors[scale]
        yield tensors[side].unbind()


def _adapters(tensors: dict[str, Tensor]) -> Adapters | None:
    """What of a task module is no key or value; ValueError for a matrix without its other half."""
    names = [name for name in BESIDE if {f"{name}_down", f"{name}_up"} & set(tensors)]
    missing = [f"{name}_{side}" for name in names for side in ("down", "up") if f"{name}_{side}" not in tensors]
    if missing:
        raise ValueError(f"has no {missing[0]}")
    return Adapters({name: (tensors[f"{name}_down"], tensors[f"{name}_up"]) for name in names}) if names else None


def _quantized(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """8 bits and a scale: keys by channel, values by row, as their outliers lie (Liu et al. 2024, arXiv 2402.02750)."""
    found, lost = {}, {}
    for side, axis in (("keys", 2), ("values", 3)):
        full = tensors[side].float()
        scale = full.abs().amax(axis, keepdim=True).clamp(min=1e-12) / 127
        found[side], found[SCALES[side]] = (full / scale).round().to(torch.int8), scale
        error = found[side].float() * scale - full
        lost[side] = (error.pow(2).mean() / full.pow(2).mean().clamp(min=1e-24)).sqrt().item()
    return found, lost


def _checksum(manifest: str, tensors: dict[str, Tensor]) -> str:
    parts = [manifest]
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        parts += [f"{name}{tensor.dtype}{tuple(tensor.shape)}", tensor.flatten().view(torch.uint8).numpy().tobytes()]
    return sha256(*parts)
