"""The multi-task full-attention baseline (Phang 2024, section 4): every weight trained, demonstrations in plain sight."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hyperllama.backbone import packed_arguments
from hyperllama.data.packing import GistBatch
from hyperllama.objectives import TokenLoss, answer_cross_entropy


class FullAttention(nn.Module):
    """A causal LM with all its weights trainable, on packed batches of segments without gists."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, backend: str = "auto"):
        super().__init__()
        self.base, self.tokenizer, self.backend = base.requires_grad_(True), tokenizer, backend

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """Called by transformers' Trainer when `gradient_checkpointing` is set."""
        self.base.gradient_checkpointing_enable(**kwargs)

    def forward(self, batch: GistBatch) -> TokenLoss:
        """Summed cross entropy of the batch's targets and their count."""
        logits = self.base(
            input_ids=batch.ids,
            use_cache=False,
            logits_to_keep=batch.target_rows,
            **packed_arguments(self.base, batch.layout, self.backend),
        ).logits
        return answer_cross_entropy(logits[0], batch.targets)

    def save_pretrained(self, folder: str | Path, notes: dict | None = None) -> None:
        """Write the model and its tokenizer as transformers do, so that `model.name_or_path` of a recipe can be this folder."""
        self.base.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load_weights(self, folder: str | Path) -> None:
        """Read weights that `save_pretrained` wrote."""
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=self.base.dtype)
        with torch.no_grad():
            self.base.load_state_dict(saved.state_dict())
