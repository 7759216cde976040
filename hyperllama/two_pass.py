"""Hypernetworks that compress in one pass and read in another: a tuned copy of the base, and pooling of its keys and values."""

from __future__ import annotations

import copy
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attention_masks import GistLayout, Segment, rotate
from hyperllama.backbone import head_dim, inverse_frequencies, kv_heads
from hyperllama.chunks import CHUNK_ROWS
from hyperllama.compressor import Hypernetwork, States
from hyperllama.encoding import gist_rows
from hyperllama.errors import UserError
from hyperllama.files import write_atomically
from hyperllama.hypernetwork import WithGistTokens

COMPRESSOR, POOLING = "compressor.safetensors", "pooling.safetensors"


class FullHypernetwork(WithGistTokens):
    """A copy of the base reads the context and the gist tokens, all of its weights trained; the base reads the prefix."""

    kind = "full"

    def __init__(self, base: PreTrainedModel, **settings):
        super().__init__(base, **settings)
        self.gists, self.compressor = self.new_gists(), copy.deepcopy(base)
        self.compressor.get_decoder().requires_grad_(True)
        # What is behind the last keys and values is never read: gists by their own embeddings, words by those of the copy.
        decoder = self.compressor.get_decoder()
        for unused in (decoder.norm, decoder.layers[-1].mlp, decoder.layers[-1].post_attention_layernorm):
            unused.requires_grad_(False)
        for name in ("q_proj", "o_proj"):
            getattr(decoder.layers[-1].self_attn, name).requires_grad_(False)

    def gist_states(self, ids: Tensor, layout: GistLayout, *, chunk_rows: int | None = CHUNK_ROWS) -> States:
        embeds = self.embed(ids, layout, self.compressor)
        return gist_rows(self.compressor, layout, backend=self.backend, chunk_rows=chunk_rows, inputs_embeds=embeds)

    def save_weights(self, folder: Path) -> list[str]:
        weights = {name: x.detach().cpu().contiguous() for name, x in self.compressor.get_decoder().state_dict().items()}
        write_atomically(folder / COMPRESSOR, safetensors.torch.save(weights))
        return [*super().save_weights(folder), COMPRESSOR]

    def load_weights(self, folder: str | Path) -> None:
        self.compressor.get_decoder().load_state_dict(safetensors.torch.load_file(Path(folder) / COMPRESSOR))
        super().load_weights(folder)


class PoolingHypernetwork(Hypernetwork):
    """Each layer's keys and values of the context, from the base alone, pooled by a small cross-attention of their own.

    A row of the prefix is a weighted mean over the context, for each key-value head by itself: weights are a softmax of how
    well a learned query meets the keys without their positions, and of how near a token stands to the row's share of the
    context. To the mean a linear map of it is added. Queries and maps start at zero: as mean pooling with soft edges.
    """

    kind = "pooling"

    def __init__(self, base: PreTrainedModel, **settings):
        super().__init__(base, **settings)
        if self.reading.graph == "recurrent":
            raise UserError("gist.graph: pooling reads chunks one by one, so they cannot read each other; choose parallel")
        layers, heads, width = base.config.num_hidden_layers, kv_heads(base.config), head_dim(base.config)
        gists = self.num_gists
        place = {"device": base.device, "dtype": torch.float32}
        self.queries = nn.Parameter(torch.zeros(layers, heads, gists, width, **place))
        # Of each row and head: how sharply it looks at its own share of the context; 1 covers about that share.
        self.log_sharpness = nn.Parameter(torch.zeros(layers, heads, gists, **place))
        self.maps = nn.Parameter(torch.zeros(2, layers, heads, width, width, **place))

    def gist_states(self, ids: Tensor, layout: GistLayout, *, chunk_rows: int | None = CHUNK_ROWS) -> States:
        """The rows that stand for gists in `layout` are not computed: only the tokens before them are read."""
        counts = [segment.gists for segment in layout.segments]
        tokens = [segment.tokens - segment.gists for segment in layout.segments]
        if min(tokens) < 1:
            raise UserError("pooling needs at least one token of context for each prefix")
        whole = GistLayout([Segment(n, gists=n) for n in tokens]).to(ids.device)
        own = [piece[:, :n] for piece, n in zip(ids.split([s.tokens for s in layout.segments], 1), tokens, strict=True)]
        with torch.no_grad():
            read = gist_rows(self.base, whole, backend=self.backend, chunk_rows=chunk_rows, input_ids=torch.cat(own, 1))
        inv_freq, places = inverse_frequencies(self.base), layout.positions[layout.gist_rows]
        states = []
        for layer, (keys, values) in enumerate(read):
            keys = rotate(keys.float(), -whole.positions, inv_freq)
            pooled = [
                self._pool(layer, k, v, gists)
                for k, v, gists in zip(keys.split(tokens, 1), values.float().split(tokens, 1), counts, strict=True)
            ]
            keys, new_values = (torch.cat(side, 1) for side in zip(*pooled, strict=True))
            states.append((rotate(keys, places, inv_freq).to(values.dtype), new_values.to(values.dtype)))
        return states

    def _pool(self, layer: int, keys: Tensor, values: Tensor, gists: int) -> tuple[Tensor, Tensor]:
        """keys without positions and values (N, T, D) -> (N, gists, D) each."""
        rows, width = keys.shape[1], keys.shape[2]
        tokens = (torch.arange(rows, device=keys.device) + 0.5) * (gists / rows)
        centres = torch.arange(gists, device=keys.device) + 0.5
        away = (tokens[None] - centres[:, None]).square() * 2  # (gists, T), in shares of the context
        scores = self.queries[layer, :, :gists] @ keys.transpose(1, 2) * width**-0.5
        weights = (scores - away * self.log_sharpness[layer, :, :gists, None].exp()).softmax(-1)
        pooled = [weights @ x for x in (keys, values)]
        return tuple(x + x @ self.maps[side, layer] for side, x in enumerate(pooled))

    def save_weights(self, folder: Path) -> list[str]:
        kept = {name: x.detach().cpu().contiguous() for name, x in self.trainable().items()}
        write_atomically(folder / POOLING, safetensors.torch.save(kept))
        return [POOLING]

    def load_weights(self, folder: str | Path) -> None:
        saved = safetensors.torch.load_file(Path(folder) / POOLING)
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                if name in saved:
                    parameter.copy_(saved[name])
