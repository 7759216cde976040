"""A hypernetwork that compresses in one pass and reads in another: a tuned copy of the base makes prefixes for it."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_masks import GistLayout
from hyperllama.base.copies import copy_to_train
from hyperllama.base.decoder import behind_last_keys
from hyperllama.base.mlp_blocks import BLOCK_ROWS
from hyperllama.base.tensor_files import load_parameters
from hyperllama.files import write_atomically
from hyperllama.hypernetworks.gist_tokens import WithGistTokens
from hyperllama.prefixes.capture import States, gist_rows

COMPRESSOR = "compressor.safetensors"


class FullHypernetwork(WithGistTokens):
    """A copy of the base reads the context and the gist tokens, all of its weights trained; the base reads the prefix."""

    kind = "full"

    def __init__(self, base: PreTrainedModel, **settings):
        super().__init__(base, **settings)
        self.gists, self.compressor = self.new_gists(), copy_to_train(base)
        self.compressor.get_decoder().requires_grad_(True)
        # What is behind the last keys and values is never read: gists by their own embeddings, words by those of the copy.
        for unused in behind_last_keys(self.compressor):
            unused.requires_grad_(False)

    @property
    def decoders(self) -> list[PreTrainedModel]:
        return [self.base, self.compressor]

    def gist_states(
        self, ids: Tensor, layout: GistLayout, *, given: States | None = None, block_rows: int | None = BLOCK_ROWS
    ) -> States:
        settings = {"backend": self.backend, "given": given, "block_rows": block_rows}
        return gist_rows(self.compressor, layout, inputs_embeds=self.embed(ids, layout, self.compressor), **settings)

    def save_weights(self, folder: Path) -> list[str]:
        weights = {name: x.detach().cpu().contiguous() for name, x in self.compressor.get_decoder().state_dict().items()}
        write_atomically(folder / COMPRESSOR, safetensors.torch.save(weights))
        return [*super().save_weights(folder), COMPRESSOR]

    def load_weights(self, folder: str | Path) -> None:
        own = self.compressor.get_decoder().state_dict(keep_vars=True)
        load_parameters(Path(folder) / COMPRESSOR, own, "a whole safetensors file of a copy of the base")
        super().load_weights(folder)
