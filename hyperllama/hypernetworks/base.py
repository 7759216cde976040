"""What every hypernetwork has in common: a context in, the keys and values of gist rows at every layer out.

A kind of hypernetwork is one class with one method, `gist_states`, and what it keeps on disk. It trains, compresses, is tuned
from, exported and evaluated through what is here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_masks import GistLayout, Segment, rotate
from hyperllama import __version__
from hyperllama.base.decoder import embedding_scale, inverse_frequencies, rotary_settings
from hyperllama.base.distributed import gathered
from hyperllama.base.fingerprints import bit_sums, identify
from hyperllama.base.identity import BaseIdentity
from hyperllama.base.mlp_blocks import BLOCK_ROWS
from hyperllama.data.chunking import SINGLE, Chunking
from hyperllama.data.packing import PLACEHOLDER, SINK, GistBatch, chunk_segments, chunks_read
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import canonical_json, from_fields, write_atomically
from hyperllama.hypernetworks.config import CARD, CONFIG, FORMAT_VERSION, _card, read_config
from hyperllama.objectives.losses import TokenLoss
from hyperllama.objectives.mix import ANSWERS, Mix
from hyperllama.objectives.packed_model import PackedModel
from hyperllama.prefixes.capture import States, prefixes_of, sink_states
from hyperllama.prefixes.manifest import Manifest, context_sha256
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.rows import behind_sink


class Hypernetwork(PackedModel, ABC):
    """Turns contexts into prefixes for a frozen `base`, which comes from `hyperllama.base.loading`.

    `gists` is how many rows a context (or each chunk of it, see `Chunking`) becomes, at most if it is `elastic`: then it was
    trained for any number up to that. `sink` is the token whose row, computed by the base alone, stands before them in every
    prefix, since attention rests there (Xiao et al. 2023, arXiv 2309.17453); None for prefixes without it. `mix` is what it is
    trained for.
    Subclasses give `gist_states`, `save_weights`, `load_weights` and the names of their settings.
    """

    kind: ClassVar[str]
    own_settings: ClassVar[tuple[str, ...]] = ()  # beside those that all have
    fewest_gists: ClassVar[int] = 1
    nested: ClassVar[bool] = True  # whether gists see none of those after them, so that the first of an elastic one stand alone
    # Whether training changes the base too, so that prefixes belong to what it becomes; whether readers see a context's own
    # rows as well, before its gists.
    trains_base = False
    keeps_context = False

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        gists: int = 16,
        chunking: Chunking = SINGLE,
        elastic: bool = False,
        sink: int | None = None,
        mix: Mix = ANSWERS,
        backend: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__(base, tokenizer, backend)
        if gists < self.fewest_gists:
            raise UserError(f"gist.tokens: a hypernetwork needs at least one gist token, not {gists}")
        if gists >= base.config.max_position_embeddings:
            positions = base.config.max_position_embeddings
            raise UserError(f"gist.tokens: {gists} rows leave none of the base's {positions} positions for a query; take fewer")
        if sink is not None and not 0 <= sink < base.config.vocab_size:
            raise UserError(f"gist.sink: the base has no token {sink} of {base.config.vocab_size:,}")
        if mix.taught and self.head_loss is None:
            raise UserError(f"objectives.{mix.taught[0]}: the head of a {base.config.model_type} model is not a plain product")
        self.num_gists, self.chunking, self.elastic, self.mix = gists, chunking, elastic, mix
        self.sink, self._sink_states = sink, None
        self.folder: Path | None = None  # where a model that training has made is saved
        self._identity: BaseIdentity | None = None
        # What a context is said again after: trained with the rest, and of no use afterwards.
        self.marker = nn.Parameter(likely_words(base, 1)[0]) if mix.says_again else None
        self._hashed: tuple[tuple, str] | None = None  # sums of the bits of the weights that had this hash

    @abstractmethod
    def gist_states(
        self, ids: Tensor, layout: GistLayout, *, given: States | None = None, block_rows: int | None = None
    ) -> States:
        """Keys and values (N, S, D) of the rows `layout.gist_rows` at each layer, keys rotated to where these rows stand.

        ids (1, T), anything in gist rows; every segment has gists. `given` are keys and values of the first rows, sinks, which
        only a kind whose chunks read chunks is given. Without gradients a layer's MLP may run in chunks of `block_rows` rows.
        """

    @property
    def rows(self) -> int:
        """How many keys and values a prefix has at most, of one chunk."""
        return self.num_gists + (self.sink is not None)

    def sink_rows(self, places: Tensor) -> States | None:
        """The base's own row of its first token, alone, at each of the positions `places` (n,): (N, n, D) at every layer.

        None for no places. Computed once, unless training changes the base.
        """
        if not len(places):
            return None
        if self._sink_states is None or self.trains_base:
            self._sink_states = sink_states(self.base, self.sink, gradient=self.trains_base)
        inv_freq = inverse_frequencies(self.base)
        spread = [(k.expand(-1, len(places), -1), v.expand(-1, len(places), -1)) for k, v in self._sink_states]
        return [(rotate(k.to(places.device), places, inv_freq), v.to(places.device)) for k, v in spread]

    def settings(self) -> dict:
        """What the class is to be called with, beside a base, to load what was saved: `own_settings` and what all have."""
        own = {"gists": self.num_gists, "elastic": self.elastic, "sink": self.sink}
        return {**own, "chunking": dataclasses.asdict(self.chunking)}

    @abstractmethod
    def save_weights(self, folder: Path) -> list[str]:
        """Write the trained weights into a folder; returns the names of the files."""

    @abstractmethod
    def load_weights(self, folder: str | Path) -> None:
        """Read what `save_weights` wrote."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @property
    def identity(self) -> BaseIdentity:
        """The fingerprints of the model that reads: of the frozen base, taken once, or of the model as training has made it."""
        if self.trains_base:
            return identify(self.base, self.tokenizer, None if self.folder is None else str(self.folder))
        if self._identity is None:
            self._identity = identify(self.base, self.tokenizer)
        return self._identity

    def know_all_of_base(self) -> None:
        """Take a fingerprint of all of the base's weights too; under ZeRO-3 all ranks must call it."""
        if not self.trains_base:
            self._identity = identify(self.base, self.tokenizer, full=True)

    def check_base(self, trained_for: BaseIdentity, where: str) -> None:
        """UserError unless all weights of the base are those of `trained_for`, the identity that a run has recorded."""
        if trained_for.full is None or self.trains_base:
            raise UserError(f"{where}: its training recorded no fingerprint of all weights of a base; leave --check-base out")
        if self.base.dtype == torch.float16:
            raise UserError(f"{where}: weights that float16 has rounded cannot be compared; load the base in another --dtype")
        self.know_all_of_base()
        trained_for.refuse_other(self.identity, f"{where} was trained for")

    def forward(self, batch: GistBatch) -> TokenLoss:
        """Compress, and read what comes out: two passes, because they are not computed with the same weights."""
        ids, layout, reading = batch.halves()
        states = self.gist_states(ids, layout, given=self.given_rows(layout, reading.sinks))
        sinks = self.sink_rows(reading.layout.positions[: reading.sinks])
        return self.reading_loss(reading, layout, states, sinks, self.teach(batch))

    def given_rows(self, layout: GistLayout, sinks: int) -> States | None:
        """The keys and values of the `sinks` first rows of a compress region, if its chunks read them; else None."""
        return self.sink_rows(layout.positions[:sinks]) if chunks_read(layout.segments) else None

    def reading_loss(
        self,
        reading: GistBatch,
        layout: GistLayout,
        states: States,
        sinks: States | None,
        teacher: Tensor | None,
        **inputs,
    ) -> TokenLoss:
        """The loss of what reads `sinks`, and `states`, which were compressed under `layout`; see `GistBatch.halves`.

        `inputs` go to the decoder.
        """
        inv_freq, first = inverse_frequencies(self.base), reading.sinks
        inside = first if chunks_read(layout.segments) else 0  # sinks that chunks read are among the states
        rows = layout.gist_rows[inside:]
        shifts = reading.layout.positions[first : first + len(rows)] - layout.positions[rows]
        moved = [(rotate(keys[:, inside:], shifts, inv_freq), values[:, inside:]) for keys, values in states]
        if sinks is not None:
            pairs = zip(sinks, moved, strict=True)
            moved = [tuple(torch.cat([a.to(b.dtype), b], 1) for a, b in zip(*pair)) for pair in pairs]
        embeds = self.with_markers(self.base.get_input_embeddings()(reading.ids), reading)
        behind = embeds[:, moved[0][0].shape[1] :]
        return self.answer_loss(reading, moved, mix=self.mix, teacher=teacher, apart=True, inputs_embeds=behind, **inputs)

    def teach(self, batch: GistBatch) -> Tensor | None:
        """What the frozen model says with the whole context, where `mix` asks for it."""
        return self.taught(batch.teacher) if self.mix.taught and batch.teacher is not None else None

    def mixed_loss(self, batch: GistBatch, **inputs) -> TokenLoss:
        """The loss of a batch that is compressed and read in one pass, under `mix`."""
        sinks = self.sink_rows(batch.layout.positions[: batch.sinks])
        return self.answer_loss(batch, sinks, mix=self.mix, teacher=self.teach(batch), **inputs)

    def with_markers(self, embeds: Tensor, batch: GistBatch) -> Tensor:
        """embeds (1, T, hidden) with the marker in the rows from which contexts are said again."""
        if self.marker is None or batch.marker_rows is None:
            return embeds
        rows = self.marker.to(embeds.dtype).expand(1, len(batch.marker_rows), -1)
        return embeds.index_copy(1, batch.marker_rows, rows)

    @torch.no_grad()
    def compress(
        self,
        contexts: Sequence[Sequence[int] | Tensor],
        manifests: Sequence[Manifest] | None = None,
        *,
        gists: int | None = None,
        block_rows: int = BLOCK_ROWS,
    ) -> list[Prefix]:
        """Turn contexts into prefixes: one task or many, of any lengths, in one packed pass.

        `contexts` are token ids, without gists; those of an `Encoder` know where demonstrations end, for `chunking` in chunks.
        `manifests` say where each comes from; base, rotary settings, hypernetwork and a hash of the context are filled in here.
        `gists`: fewer than all of them, which an elastic hypernetwork has learned to make do with. `block_rows`: see
        `gist_rows`. Raises UserError for a context longer than the model, or more gists than there are.
        """
        if not len(contexts) or not all(len(context) for context in contexts):
            raise UserError("there is nothing to compress: every context needs at least one token")
        gists = self._allowed(gists)
        # Chunks that read each other read a sink too, and so it stands before them.
        sinks = len(contexts) if self.sink is not None and self.chunking.graph == "recurrent" else 0
        pieces, segments, readers = [(PLACEHOLDER,)] * sinks, [SINK] * sinks, []
        for i, context in enumerate(contexts):
            own, made = self.cut(context, gists, len(segments), i if sinks else None)
            readers.append(range(len(segments), len(segments) + len(made)))
            segments += made
            pieces += own
        ids = torch.tensor([[token for piece in pieces for token in piece]])
        manifests = manifests or [Manifest(base=self.identity) for _ in contexts]
        prefixes = self.encode(ids, GistLayout(segments), readers, sinks=sinks, block_rows=block_rows)
        if self.sink is not None:
            sink = self.sink_rows(torch.zeros(1, dtype=torch.long, device=self.base.device))
            prefixes = [behind_sink(p, sink, inverse_frequencies(self.base)) for p in prefixes]
        fingerprint = self.fingerprint()  # of all trained weights: once, not once a prefix
        for prefix, context, manifest in zip(prefixes, contexts, manifests, strict=True):
            prefix.manifest = self._sign(manifest, torch.as_tensor(context).tolist(), fingerprint)
        return prefixes

    def _allowed(self, gists: int | None) -> int:
        """How many gists are meant, all of them by None; UserError for a number that it does not make."""
        gists = self.num_gists if gists is None else gists
        if not min(self.fewest_gists, self.num_gists) <= gists <= self.num_gists:
            raise UserError(f"this hypernetwork makes prefixes of 1 to {self.num_gists} gists, not of {gists}")
        if gists < self.num_gists and not self.elastic:
            raise UserError(f"this hypernetwork was trained for all of its {self.num_gists} gists only, not for {gists}")
        return gists

    def looks_at(self, context: Sequence[int] | Tensor, *, gists: int | None = None) -> Tensor:
        """How much each gist of a context's prefix looks at each of its tokens: (G, T), on the CPU, rows sum to one.

        A mean over layers and key-value heads. UserError for a kind whose rows are no weighted means of a context's own.
        """
        raise UserError(
            f"what its rows look at cannot be shown: kind {self.kind} gathers a context through all layers; choose pooling"
        )

    def cut(
        self, context: Sequence[int] | Tensor, gists: int | None = None, first: int = 0, sink: int | None = None
    ) -> tuple[list[tuple[int, ...]], list[Segment]]:
        """A context as `chunking` cuts it, with room for gists: token ids of its segments, and the segments.

        The first of them will be segment `first` of its layout, where segment `sink` is their sink.
        """
        gists = self.num_gists if gists is None else gists
        chunks = self.chunking.chunks(torch.as_tensor(context).tolist(), getattr(context, "ends", ()))
        pieces = [(*chunk, *[PLACEHOLDER] * gists) for chunk in chunks]
        return pieces, chunk_segments(self.chunking, chunks, gists, first, whole=self.keeps_context, sink=sink)

    @torch.no_grad()
    def encode(
        self,
        ids: Tensor,
        layout: GistLayout,
        readers: Sequence[Sequence[int]],
        *,
        sinks: int = 0,
        block_rows: int = BLOCK_ROWS,
    ) -> list[Prefix]:
        """Run the compress region of any reading graph; a prefix for each reader.

        ids (1, T), anything in gist rows; `layout` has gists in every segment, the first `sinks` of which are sinks; a reader
        is the list of segments that it reads, in order, and its prefix holds their gists one after the other at positions 0,
        1, 2, ...
        """
        layout = layout.to(self.base.device)
        given = self.given_rows(layout, sinks)
        states = self.gist_states(ids.to(self.base.device), layout, given=given, block_rows=block_rows)
        return prefixes_of(states, layout, readers, inverse_frequencies(self.base))

    def _sign(self, manifest: Manifest, context: list[int], fingerprint: str) -> Manifest:
        return dataclasses.replace(
            manifest,
            base=self.identity,
            rotary=rotary_settings(self.base),
            hypernetwork_sha256=fingerprint,
            context_tokens=len(context),
            context_sha256=context_sha256(context),
            sink=self.sink,
            elastic=self.elastic and self.nested and self.chunking.graph == "single",
            positions=self.base.config.max_position_embeddings,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            made_with={"hyperllama": __version__, "torch": torch.__version__},
        )

    def fingerprint(self) -> str:
        """SHA-256 of all that decides what is made of a context: the trained weights, as float32 numbers, settings, and the
        precision of the base.

        It is taken anew when a bit of them has changed since the last call, which sums of their bits tell. One parameter at a
        time is copied.
        """
        weights = sorted(self.trainable().items())
        sums = tuple((name, *bit_sums(parameter)) for name, parameter in weights)
        if self._hashed is None or self._hashed[0] != sums:
            digest = hashlib.sha256(canonical_json([self.kind, self.settings(), str(self.base.dtype)]).encode())
            for name, parameter in weights:
                digest.update(name.encode())
                digest.update(parameter.detach().float().cpu().numpy().tobytes())
            self._hashed = sums, digest.hexdigest()
        return self._hashed[1]

    def compress_flops(self, cost: Any, tokens: int) -> int:
        """FLOPs of making a prefix of a context of so many tokens; `cost` is an `eval.flops.ModelCost` of the base."""
        return cost.packed(GistLayout(self.cut(range(tokens))[1]))

    def save_pretrained(self, folder: str | Path, notes: dict | None = None) -> None:
        """Write the trained weights and what is needed to use them: weights, a manifest and a model card.

        `notes` are kept in hypernetwork.json: the text format, limits and data that it was trained with.
        """
        folder = Path(folder)
        config = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "files": self.save_weights(folder),
            **self.settings(),
            "base": self.identity.as_dict(),
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "notes": notes or {},
            "made_with": {"hyperllama": __version__, "torch": torch.__version__},
        }
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        write_atomically(folder / CARD, _card(config, sum(p.numel() for p in self.trainable().values())))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backend: str = "auto",
        mix: Mix = ANSWERS,
    ) -> Self:
        """Read a folder that `save_pretrained` wrote onto the base that it was trained for; UserError for any other.

        `mix` is what it is trained for from here on. Folders of all kinds: `load_hypernetwork_onto`.
        """
        folder = Path(folder)
        config = read_config(folder)
        if config["kind"] != cls.kind:
            raise UserError(f"{folder}: a hypernetwork of kind {config['kind']}, not {cls.kind}")
        settings = {key: config[key] for key in ("gists", "elastic", "sink", *cls.own_settings) if key in config}
        chunking = from_fields(Chunking, config.get("chunking", {}), str(folder / CONFIG))
        made_for = from_fields(BaseIdentity, config["base"], str(folder / CONFIG))
        try:
            hypernetwork = cls(base, **settings, chunking=chunking, mix=mix, backend=backend, tokenizer=tokenizer)
        except UserError as error:
            raise UserError(f"{folder / CONFIG}: {error}") from error
        except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise UserError(f"{folder / CONFIG}: settings that no {cls.kind} has ({in_one_line(error)})") from error
        try:
            made_for.refuse_other(hypernetwork.identity, f"{folder} was trained for")
        except UserError:
            hypernetwork.remove()
            raise
        hypernetwork.load_weights(folder)
        return hypernetwork.eval()

    def remove(self) -> None:
        """Take what it put into the base out of it again."""


def likely_words(base: PreTrainedModel, count: int) -> Tensor:
    """Embeddings (count, hidden) drawn with the mean and spread of those that the model knows: new tokens start as words."""
    words = base.get_input_embeddings().weight
    with gathered([words]):
        mean, spread = words.detach().float().mean(0), words.detach().float().std(0)
    return (mean + spread * torch.randn(count, len(mean), device=mean.device)) * embedding_scale(base)
