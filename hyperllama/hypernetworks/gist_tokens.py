"""Hypernetworks that read a context and learned gist tokens after it."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attention_masks import GistLayout
from hyperllama.base.tensor_files import load_parameters
from hyperllama.files import write_atomically
from hyperllama.hypernetworks.base import Hypernetwork, likely_words
from hyperllama.hypernetworks.config import GISTS


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
        own = {"gists": self.gists, **({} if self.marker is None else {"marker": self.marker})}
        load_parameters(Path(folder) / GISTS, own, "a whole safetensors file of gist embeddings", optional=["marker"])
