"""Gisting: one model, all of its weights trained (Mu et al. 2023, arXiv 2304.08467)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_masks import GistLayout
from hyperllama.base.copies import train_all
from hyperllama.base.loading import load_weights_into
from hyperllama.base.mlp_blocks import BLOCK_ROWS
from hyperllama.data.packing import GistBatch
from hyperllama.errors import UserError
from hyperllama.files import write_atomically
from hyperllama.hypernetworks.gist_tokens import WithGistTokens
from hyperllama.objectives.losses import TokenLoss
from hyperllama.prefixes.capture import States, gist_rows


class GistingHypernetwork(WithGistTokens):
    """Gisting as it was first done (Mu et al. 2023): one model, all of its weights trained under the gist mask.

    The trained model also reads, so its prefixes belong to it and not to the base that it started from.
    """

    kind = "gisting"
    trains_base = True

    def __init__(self, base: PreTrainedModel, **settings):
        super().__init__(base, **settings)
        if self.mix.taught:
            raise UserError(f"objectives.{self.mix.taught[0]}: gisting changes the model that would teach; set it to 0")
        train_all(base, "gisting")
        self.gists = self.new_gists()

    def forward(self, batch: GistBatch) -> TokenLoss:
        """One pass over a packed batch: compress, read and answer."""
        return self.mixed_loss(batch, inputs_embeds=self.with_markers(self.embed(batch.ids, batch.layout), batch))

    def gist_states(
        self, ids: Tensor, layout: GistLayout, *, given: States | None = None, block_rows: int | None = BLOCK_ROWS
    ) -> States:
        settings = {"backend": self.backend, "given": given, "block_rows": block_rows}
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
