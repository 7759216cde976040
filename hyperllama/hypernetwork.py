"""The gist hypernetwork: a frozen decoder that, with LoRA and gist tokens, turns a context into a `Prefix`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_masks import GistLayout, Segment
from hyperllama import __version__
from hyperllama.backbone import BaseIdentity, identify, rotary_settings
from hyperllama.chunks import CHUNK_ROWS
from hyperllama.data.packing import GistBatch
from hyperllama.distributed import gathered
from hyperllama.encoding import encode_gists
from hyperllama.errors import UserError
from hyperllama.files import canonical_json, read_json, sha256, write_atomically
from hyperllama.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RowLora
from hyperllama.objectives import TokenLoss
from hyperllama.packed import PackedModel
from hyperllama.prefix import Manifest, Prefix

CONFIG, GISTS, CARD = "hypernetwork.json", "gists.safetensors", "README.md"


class GistHypernetwork(PackedModel):
    """A context and G gist tokens in, the keys and values of the gist rows at every layer out (Phang 2024, section 3).

    Trainable are the gist embeddings (G, hidden) and LoRA on the base's linear layers for the rows of the compress region.
    The base is frozen, and its weights alone compute the rows that read. `base` comes from `hyperllama.backbone`.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        gists: int = 16,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
        backend: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__(base, tokenizer, backend)
        if gists < 1:
            raise UserError(f"gist.tokens: a hypernetwork needs at least one gist token, not {gists}")
        self.lora = RowLora(base, rank=rank, alpha=alpha, dropout=dropout, targets=targets)
        words = base.get_input_embeddings().weight
        # New tokens start as likely words: drawn with the mean and spread of the embeddings that the model knows.
        with gathered([words]):
            mean, spread = words.detach().float().mean(0), words.detach().float().std(0)
        self.gists = nn.Parameter(mean + spread * torch.randn(gists, len(mean), device=mean.device))

        self._hashed: tuple[tuple[str, ...], Tensor, str] | None = None  # names and bits of the weights that had this hash

    @property
    def num_gists(self) -> int:
        return self.gists.shape[0]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @cached_property
    def identity(self) -> BaseIdentity:
        """The base's fingerprints; it is frozen, so they are taken once."""
        return identify(self.base, self.tokenizer)

    def forward(self, batch: GistBatch) -> TokenLoss:
        """One pass over a packed batch: compress, read and answer. Returns the summed loss and its count of target tokens."""
        return self.answer_loss(batch, inputs_embeds=self._embed(batch.ids, batch.layout), gist_lora=self.lora)

    def _embed(self, ids: Tensor, layout: GistLayout) -> Tensor:
        """Token embeddings (1, T, hidden), with gist embeddings in the gist rows."""
        embeds = self.base.get_input_embeddings()(ids)
        if not len(layout.gist_rows):
            return embeds
        return embeds.index_copy(1, layout.gist_rows, self.gists.to(embeds.dtype)[layout.gist_slots][None])

    @torch.no_grad()
    def compress(
        self,
        contexts: Sequence[Sequence[int] | Tensor],
        manifests: Sequence[Manifest] | None = None,
        *,
        chunk_rows: int = CHUNK_ROWS,
    ) -> list[Prefix]:
        """Turn contexts into prefixes: one task or many, of any lengths, in one packed pass.

        `contexts` are token ids, without gists. `manifests` say where each comes from; base, rotary settings, hypernetwork
        and a hash of the context are filled in here. `chunk_rows`: see `encode_gists`. Raises UserError for a context
        longer than the model.
        """
        if not len(contexts) or not all(len(context) for context in contexts):
            raise UserError("there is nothing to compress: every context needs at least one token")
        contexts = [torch.as_tensor(context, dtype=torch.long).cpu() for context in contexts]
        layout = GistLayout([Segment(len(c) + self.num_gists, gists=self.num_gists) for c in contexts])
        gaps = torch.zeros(self.num_gists, dtype=torch.long)
        ids = torch.cat([part for context in contexts for part in (context, gaps)])[None]
        manifests = manifests or [Manifest(base=self.identity) for _ in contexts]
        prefixes = self.encode(ids, layout, [(i,) for i in range(len(contexts))], chunk_rows=chunk_rows)
        fingerprint = self.fingerprint()  # of all trained weights: once, not once a prefix
        for prefix, context, manifest in zip(prefixes, contexts, manifests, strict=True):
            prefix.manifest = self._sign(manifest, context.tolist(), fingerprint)
        return prefixes

    @torch.no_grad()
    def encode(
        self, ids: Tensor, layout: GistLayout, readers: Sequence[Sequence[int]], *, chunk_rows: int = CHUNK_ROWS
    ) -> list[Prefix]:
        """Run the compress region of any reading graph; a prefix for each reader.

        ids (1, T), anything in gist rows; `layout` has gists in every segment; a reader is the list of segments that it
        reads, in order, and its prefix holds their gists one after the other at positions 0, 1, 2, ...
        """
        layout = layout.to(self.gists.device)
        embeds = self._embed(ids.to(self.gists.device), layout)
        inputs = {"inputs_embeds": embeds, "gist_lora": self.lora}
        return encode_gists(self.base, layout, readers, backend=self.backend, chunk_rows=chunk_rows, **inputs)

    def _sign(self, manifest: Manifest, context: list[int], fingerprint: str) -> Manifest:
        return dataclasses.replace(
            manifest,
            base=self.identity,
            rotary=rotary_settings(self.base),
            hypernetwork_sha256=fingerprint,
            context_tokens=len(context),
            context_sha256=context_sha256(context),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            made_with={"hyperllama": __version__, "torch": torch.__version__},
        )

    def fingerprint(self) -> str:
        """SHA-256 of the trained weights.

        It is taken anew when a bit of them has changed since the last call. Of a hypernetwork for 7 billion weights it takes as
        long as compressing some contexts on a GPU; comparing with a copy that stays there takes a thousandth of that.
        """
        names, weights = zip(*sorted(self.trainable().items()))
        bits = parameters_to_vector([p.detach().float() for p in weights]).view(torch.int32)  # so that NaN equals itself
        if self._hashed is None or self._hashed[0] != names or not _equal(self._hashed[1], bits):
            parts = [(name, p.detach().float().cpu().numpy().tobytes()) for name, p in zip(names, weights)]
            self._hashed = names, bits, sha256(*(part for pair in parts for part in pair))
        return self._hashed[2]

    def save_pretrained(self, folder: str | Path, notes: dict | None = None) -> None:
        """Write the trained weights and what is needed to use them: a PEFT adapter, gists, a manifest and a model card.

        `notes` are kept in hypernetwork.json: the text format, limits and data that it was trained with.
        """
        folder = Path(folder)
        self.lora.save(folder, self.identity.name)
        write_atomically(folder / GISTS, safetensors.torch.save({"gists": self.gists.detach().cpu().contiguous()}))
        config = {
            "format_version": 1,
            "gists": self.num_gists,
            "rank": self.lora.rank,
            "alpha": self.lora.alpha,
            "dropout": self.lora.dropout.p,
            "targets": self.lora.targets,
            "base": self.identity.as_dict(),
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
    ) -> GistHypernetwork:
        """Read a folder that `save_pretrained` wrote onto the base that it was trained for; UserError for any other."""
        config = read_config(folder)
        made_for = BaseIdentity(**config["base"])
        settings = {key: config[key] for key in ("gists", "rank", "alpha", "dropout", "targets")}
        hypernetwork = cls(base, **settings, backend=backend, tokenizer=tokenizer)
        here = hypernetwork.identity
        if (made_for.weights, made_for.config) != (here.weights, here.config):
            hypernetwork.lora.remove()
            raise UserError(
                f"{folder} was trained for {made_for.name} ({made_for.weights[:8]}), not for {here.name} ({here.weights[:8]})"
            )
        hypernetwork.load_weights(folder)
        return hypernetwork.eval()

    def load_weights(self, folder: str | Path) -> None:
        """Read trained weights from a folder that `save_pretrained` wrote."""
        self.lora.load(folder)
        with torch.no_grad():
            self.gists.copy_(safetensors.torch.load_file(Path(folder) / GISTS)["gists"])


def context_sha256(context: Sequence[int]) -> str:
    """The hash by which a manifest knows the token ids of its context."""
    return sha256(canonical_json(list(context)))


def read_config(folder: str | Path) -> dict:
    """The manifest of a saved hypernetwork; UserError if the folder is not one."""
    folder = Path(folder)
    missing = [name for name in (CONFIG, GISTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: not a hypernetwork, it has no {', '.join(missing)}; give the folder of a finished training run"
        )
    return read_json(folder / CONFIG, "a hypernetwork's manifest")


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)


def _card(config: dict, parameters: int) -> str:
    base = config["base"]
    return f"""---
base_model: {base["name"]}
library_name: hyperllama
tags: [gisting, hypernetwork, soft-prefix, lora]
---

# A gist hypernetwork for {base["name"]}

It reads the examples of a task and {config["gists"]} gist tokens, and turns them into a soft prefix: the keys and values of
the gists at every layer. The same base model, frozen, reads the prefix instead of the examples.

| | |
|---|---|
| base model | `{base["name"]}`, weights {base["weights"][:16]} |
| gist tokens | {config["gists"]} |
| LoRA | rank {config["rank"]}, alpha {config["alpha"]}, on {", ".join(config["targets"])}; on the rows of the context only |
| trained parameters | {parameters:,} |
| data | {config["notes"].get("data", "not recorded")} |

```
hyperllama compress THIS_FOLDER examples.jsonl --output task.safetensors
hyperllama generate task.safetensors --input "a new input"
```

The adapter is in PEFT's format (`adapter_model.safetensors`), the gist embeddings are in `gists.safetensors`.
"""
