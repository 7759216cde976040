"""The multi-task full-attention baseline (Phang 2024, section 4): every weight trained, demonstrations in plain sight."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyperllama.base.loading import load_weights_into
from hyperllama.data.packing import GistBatch
from hyperllama.objectives.losses import TokenLoss
from hyperllama.objectives.packed_model import PackedModel


class FullAttention(PackedModel):
    """A causal LM with all its weights trainable, on packed batches of segments without gists."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, backend: str = "auto"):
        super().__init__(base.requires_grad_(True), tokenizer, backend)

    def forward(self, batch: GistBatch) -> TokenLoss:
        """Summed cross entropy of the batch's targets and their count."""
        return self.answer_loss(batch, input_ids=batch.ids)

    def save_pretrained(self, folder: str | Path, notes: dict | None = None) -> None:
        """Write the model and its tokenizer as transformers do, so that `model.name_or_path` of a recipe can be this folder."""
        self.base.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load_weights(self, folder: str | Path) -> None:
        """Read weights that `save_pretrained` wrote."""
        load_weights_into(self.base, folder)
