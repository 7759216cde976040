"""Gists with LoRA on a frozen base (Phang 2024, arXiv 2402.16817)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from attention_masks import GistLayout
from hyperllama.base.mlp_blocks import BLOCK_ROWS
from hyperllama.data.packing import GistBatch
from hyperllama.hypernetworks.gist_tokens import WithGistTokens
from hyperllama.hypernetworks.row_lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RowLora
from hyperllama.objectives.losses import TokenLoss
from hyperllama.prefixes.capture import States, gist_rows


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
        self, ids: Tensor, layout: GistLayout, *, given: States | None = None, block_rows: int | None = BLOCK_ROWS
    ) -> States:
        inputs = {"inputs_embeds": self.embed(ids, layout), "gist_lora": self.lora}
        return gist_rows(self.base, layout, backend=self.backend, given=given, block_rows=block_rows, **inputs)

    def compress_flops(self, cost: Any, tokens: int) -> int:
        return cost.compress_packed(GistLayout(self.cut(range(tokens))[1]), self.lora.rank, self.lora.targets)

    def save_weights(self, folder: Path) -> list[str]:
        self.lora.save(folder, self.identity.name)
        return [*super().save_weights(folder), ADAPTER_CONFIG, ADAPTER_WEIGHTS]

    def load_weights(self, folder: str | Path) -> None:
        self.lora.load(folder)
        super().load_weights(folder)

    def remove(self) -> None:
        """Take the hooks off the base."""
        self.lora.remove()
