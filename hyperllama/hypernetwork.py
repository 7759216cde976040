"""Hypernetworks that are a decoder with gist tokens: LoRA on a frozen base, or all weights of one model (gisting)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_masks import GistLayout
from hyperllama.backbone import BaseIdentity, identify, load_weights_into
from hyperllama.chunks import CHUNK_ROWS
from hyperllama.compressor import GISTS, Hypernetwork, likely_words
from hyperllama.data.packing import GistBatch
from hyperllama.encoding import States, gist_rows
from hyperllama.errors import UserError
from hyperllama.files import write_atomically
from hyperllama.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RowLora
from hyperllama.objectives import TokenLoss


class WithGistTokens(Hypernetwork):
    """A decoder reads the context and learned embeddings `gists` (G, hidden) after it."""

    def new_gists(self) -> nn.Parameter:
        """Gist embeddings to start from: random words."""
        return nn.Parameter(likely_words(self.base, self.num_gists))

    def embed(self, ids: Tensor, layout: GistLayout, model: PreTrainedModel | None = None) -> Tensor:
        """Token embeddings (1, T, hidden) of the base, or of `model`, with gist embeddings in the gist rows."""
        embeds = (model or self.base).get_input_embeddings()(ids)
        if not len(layout.gist_rows):
            return embeds
        return embeds.index_copy(1, layout.gist_rows, self.gists.to(embeds.dtype)[layout.gist_slots][None])

    def save_weights(self, folder: Path) -> list[str]:
        own = {"gists": self.gists, "marker": self.marker}
        kept = {name: x.detach().cpu().contiguous() for name, x in own.items() if x is not None}
        write_atomically(folder / GISTS, safetensors.torch.save(kept))
        return [GISTS]

    def load_weights(self, folder: str | Path) -> None:
        saved = safetensors.torch.load_file(Path(folder) / GISTS)
        if saved["gists"].shape != self.gists.shape:
            raise UserError(f"{folder}: has {len(saved['gists'])} gists, not {len(self.gists)}; set gist.tokens to that")
        with torch.no_grad():
            self.gists.copy_(saved["gists"])
            if self.marker is not None and "marker" in saved:
                self.marker.copy_(saved["marker"])


class GistHypernetwork(WithGistTokens):
    """A context and G gist tokens in, the keys and values of the gist rows at every layer out (Phang 2024, section 3).

    Trainable are the gist embeddings (G, hidden) and LoRA on the base's linear layers for the rows of the compress region.
    The base is frozen, and its weights alone compute the rows that read: so one packed pass compresses and reads.
    """

    kind = "lora"
    own_settings = ("rank", "alpha", "dropout", "targets")

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        gists: int = 16,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
        **settings,
    ):
        super().__init__(base, gists=gists, **settings)
        self.lora = RowLora(base, rank=rank, alpha=alpha, dropout=dropout, targets=targets)
        self.gists = self.new_gists()

    def settings(self) -> dict:
        lora = self.lora
        own = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout.p, "targets": lora.targets}
        return {**super().settings(), **own}

    def forward(self, batch: GistBatch) -> TokenLoss:
        """One pass over a packed batch: compress, read and answer. Returns the summed loss and its count of answers' tokens."""
        embeds = self.with_markers(self.embed(batch.ids, batch.layout), batch)
        return self.mixed_loss(batch, inputs_embeds=embeds, gist_lora=self.lora)

    def gist_states(
        self, ids: Tensor, layout: GistLayout, *, given: States | None = None, chunk_rows: int | None = CHUNK_ROWS
    ) -> States:
        inputs = {"inputs_embeds": self.embed(ids, layout), "gist_lora": self.lora}
        return gist_rows(self.base, layout, backend=self.backend, given=given, chunk_rows=chunk_rows, **inputs)

    def save_weights(self, folder: Path) -> list[str]:
        self.lora.save(folder, self.identity.name)
        return [*super().save_weights(folder), ADAPTER_CONFIG, ADAPTER_WEIGHTS]

    def load_weights(self, folder: str | Path) -> None:
        self.lora.load(folder)
        super().load_weights(folder)

    def remove(self) -> None:
        """Take the hooks off the base."""
        self.lora.remove()


class GistingHypernetwork(WithGistTokens):
    """Gisting as it was first done (Mu et al. 2023): one model, all of its weights trained under the gist mask.

    The trained model also reads, so its prefixes belong to it and not to the base that it started from.
    """

    kind = "gisting"
    trains_base = True

    def __init__(self, base: PreTrainedModel, **settings):
        super().__init__(base, **settings)
        if self.mix.distillation:
            raise UserError("objectives.distillation: gisting changes the model that would teach; set it to 0")
        base.requires_grad_(True)
        self.gists, self.folder = self.new_gists(), None

    @property
    def identity(self) -> BaseIdentity:
        """The fingerprints of the model as it is now, which training changes."""
        return identify(self.base, self.tokenizer, None if self.folder is None else str(self.folder))

    def forward(self, batch: GistBatch) -> TokenLoss:
        """One pass over a packed batch: compress, read and answer."""
        return self.mixed_loss(batch, inputs_embeds=self.with_markers(self.embed(batch.ids, batch.layout), batch))

    def gist_states(
        self, ids: Tensor, layout: GistLayout, *, given: States | None = None, chunk_rows: int | None = CHUNK_ROWS
    ) -> States:
        settings = {"backend": self.backend, "given": given, "chunk_rows": chunk_rows}
        return gist_rows(self.base, layout, inputs_embeds=self.embed(ids, layout), **settings)

    def save_weights(self, folder: Path) -> list[str]:
        self.folder = folder
        return [*super().save_weights(folder), *save_model(self.base, self.tokenizer, folder)]

    def load_weights(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        load_weights_into(self.base, folder)
        super().load_weights(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Write a trained model and its tokenizer as transformers does, each file atomically; returns their names."""
    with tempfile.TemporaryDirectory() as empty:  # whatever names they give their files
        model.save_pretrained(empty)
        tokenizer.save_pretrained(empty)
        written = {path.name: path.read_bytes() for path in Path(empty).iterdir() if path.is_file()}
    for name, content in written.items():
        write_atomically(folder / name, content)
    return sorted(written)
