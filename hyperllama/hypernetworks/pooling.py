"""A hypernetwork that pools the keys and values that the base has of a context anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from attention_masks import GistLayout, Segment, rotate
from attention_masks.registration import Kept
from hyperllama.base.decoder import computes_again, head_dim, inverse_frequencies, kv_heads
from hyperllama.base.mlp_blocks import BLOCK_ROWS, gather_mlps_whole
from hyperllama.base.tensor_files import load_parameters
from hyperllama.data.packing import GistBatch
from hyperllama.errors import UserError
from hyperllama.files import write_atomically
from hyperllama.hypernetworks.attended import attention_received, most_attended
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.row_lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RowLora
from hyperllama.objectives.losses import TokenLoss
from hyperllama.prefixes.capture import States, gist_rows, prefixes_of
from hyperllama.prefixes.prefix import Prefix

POOLING = "pooling.safetensors"


class PoolingHypernetwork(Hypernetwork):
    """Each layer's keys and values of the context, pooled by a small cross-attention of their own.

    A row of the prefix is a weighted mean over the context, for each key-value head by itself: weights are a softmax of how
    well a learned query meets the keys without their positions, and of how near a token stands to the middle of the row's share
    of the context. To the mean a linear map of it is added. Queries and maps start at zero.

    With `recency` 0 shares are equal, and with `sharpness` 1 training starts from mean pooling with soft edges. With a recency
    r a share at distance d from the end of T tokens is as wide as d + r * T (r * T at least a token): the last tokens have most
    rows. The first row is then the first token's, where attention rests (Xiao et al. 2023, arXiv 2309.17453). A sharpness of
    some hundreds starts from the token in the middle of each share, as it is. With `attended` a, rows do not begin with shares
    but, for each key-value head, with the tokens that the last a * T of the context attend to most, see `attended`;
    nearness then counts in tokens. With a `rank` the context is read with LoRA of that rank (and `alpha`, `dropout`,
    `targets`, see `RowLora`), so that a token's row can gather what stands around it; without, nothing of the decoder is
    trained, and training needs no backward pass through the context.
    """

    kind = "pooling"
    nested = False  # with fewer rows each stands for a larger share of the context
    own_settings = ("recency", "sharpness", "attended", "rank", "alpha", "dropout", "targets")

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        recency: float = 0.0,
        sharpness: float = 1.0,
        attended: float = 0.0,
        rank: int = 0,
        alpha: float = 32.0,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
        **settings,
    ):
        super().__init__(base, **settings)
        if self.chunking.graph == "recurrent":
            raise UserError("gist.chunking.graph: pooling takes chunks one by one, so none can read another; choose parallel")
        if recency < 0 or sharpness <= 0:
            raise UserError(f"pooling: recency must not be negative and sharpness above 0, not {recency} and {sharpness}")
        if not 0 <= attended <= 1 or (attended and recency):
            raise UserError(f"pooling: attended is a share of the context, beside recency 0, not {attended} beside {recency}")
        layers, heads, width = base.config.num_hidden_layers, kv_heads(base.config), head_dim(base.config)
        gists, self.recency, self.sharpness, self.attended = self.num_gists, recency, sharpness, attended
        place = {"device": base.device, "dtype": torch.float32}
        self.queries = nn.Parameter(torch.zeros(layers, heads, gists, width, **place))
        # Of each row and head: how sharply it looks at its own share of the context.
        self.log_sharpness = nn.Parameter(torch.full((layers, heads, gists), math.log(sharpness), **place))
        self.maps = nn.Parameter(torch.zeros(2, layers, heads, width, width, **place))
        self.lora = RowLora(base, rank=rank, alpha=alpha, dropout=dropout, targets=targets) if rank else None
        if self.lora is None:
            gather_mlps_whole(base)

    def settings(self) -> dict:
        own = {"recency": self.recency, "sharpness": self.sharpness, "attended": self.attended, "rank": 0}
        if lora := self.lora:
            own |= {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout.p, "targets": lora.targets}
        return {**super().settings(), **own}

    def forward(self, batch: GistBatch) -> TokenLoss:
        """Compress, and read what comes out. A teacher reads the contexts' own rows, which pooling has computed anyway."""
        ids, layout, reading = batch.halves()
        whole, read, queries = self._read(ids, layout, BLOCK_ROWS)
        states = self._pooled(layout, whole, read, queries)
        alike = self.lora is None and self.mix.taught and _reads(batch.teacher, whole)
        teacher = self.taught(batch.teacher, read) if alike else self.teach(batch)
        return self.reading_loss(reading, layout, states, self.sink_rows(reading.layout.positions[: reading.sinks]), teacher)

    def gist_states(
        self, ids: Tensor, layout: GistLayout, *, given: States | None = None, block_rows: int | None = BLOCK_ROWS
    ) -> States:
        """The rows that stand for gists in `layout` are not computed: only the tokens before them are read."""
        return self._pooled(layout, *self._read(ids, layout, block_rows))

    @torch.no_grad()
    def compress_and_keep(self, contexts: Sequence[Sequence[int]]) -> list[tuple[Prefix, Prefix]]:
        """Of each context the prefix that `compress` makes, unsigned, and that of all its tokens, from one pass for both.

        Without LoRA, chunks and a sink only: the pass is then that of the base alone. ValueError with one of them.
        """
        if self.lora is not None or self.chunking.graph != "single" or self.sink is not None:
            raise ValueError("only pooling without LoRA, chunks and a sink reads contexts as the base alone does")
        pieces, segments = zip(*(self.cut(context) for context in contexts))
        layout = GistLayout([segment for own in segments for segment in own]).to(self.base.device)
        ids = torch.tensor([[token for own in pieces for piece in own for token in piece]], device=self.base.device)
        whole, read, queries = self._read(ids, layout, BLOCK_ROWS)
        readers, inv_freq = [(i,) for i in range(len(contexts))], inverse_frequencies(self.base)
        pooled = prefixes_of(self._pooled(layout, whole, read, queries), layout, readers, inv_freq)
        return list(zip(pooled, prefixes_of(read, whole, readers, inv_freq), strict=True))

    def _read(self, ids: Tensor, layout: GistLayout, block_rows: int | None) -> tuple[GistLayout, States, Sequence[Tensor]]:
        """The contexts of `layout`, without gists, as a layout; their keys and values; queries of the rows that choose."""
        tokens = [segment.tokens - segment.gists for segment in layout.segments]
        if min(tokens) < 1:
            raise UserError("pooling needs at least one token of context for each prefix")
        whole = GistLayout([Segment(n, gists=n) for n in tokens]).to(ids.device)
        own = [piece[:, :n] for piece, n in zip(ids.split([s.tokens for s in layout.segments], 1), tokens, strict=True)]
        choosing = [row for rows in self._choosing(whole) for row in rows]
        asked = torch.tensor(choosing, dtype=torch.long, device=ids.device) if self.attended else None
        kept = Kept(whole.gist_rows, asked)
        inputs = {"input_ids": torch.cat(own, 1)} | ({"gist_lora": self.lora} if self.lora else {})
        with nullcontext() if self.lora else torch.no_grad():
            states = gist_rows(self.base, whole, backend=self.backend, block_rows=block_rows, kept=kept, **inputs)
        return whole, states, list(kept.queries.values())

    def _choosing(self, whole: GistLayout) -> list[range]:
        """Of each context the rows at its end whose attention chooses."""
        tokens = [segment.tokens for segment in whole.segments]
        return [range(end - math.ceil(self.attended * n), end) for n, end in zip(tokens, accumulate(tokens))]

    def _pooled(self, layout: GistLayout, whole: GistLayout, read: States, queries: Sequence[Tensor]) -> States:
        """The gist rows of `layout`, from what `_read` gives."""
        # With gradient checkpointing no wider copy of a context's keys and values is kept for the backward pass.
        again = torch.is_grad_enabled() and computes_again(self.base)
        states = []
        for layer, (keys, values) in enumerate(read):
            pool = partial(self._pool_layer, layer, layout, whole, self._received(layer, whole, keys, queries))
            states.append(checkpoint(pool, keys, values, use_reentrant=False) if again else pool(keys, values))
        return states

    def _pool_layer(
        self, layer: int, layout: GistLayout, whole: GistLayout, received: Sequence[Tensor | None], keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A layer's keys and values (N, T, D) of all contexts -> those (N, S, D) of the gist rows of `layout`."""
        tokens, counts = [s.tokens for s in whole.segments], [s.gists for s in layout.segments]
        contexts = zip(self._unplaced(whole, keys), values.float().split(tokens, 1), counts, received, strict=True)
        pooled = [self._pool(layer, *context) for context in contexts]
        own_keys, own_values = (torch.cat(side, 1) for side in zip(*pooled, strict=True))
        places = layout.positions[layout.gist_rows]
        return rotate(own_keys, places, inverse_frequencies(self.base)).to(values.dtype), own_values.to(values.dtype)

    def _unplaced(self, whole: GistLayout, keys: Tensor) -> Sequence[Tensor]:
        """Of each context its keys without their positions, in float32."""
        bare = rotate(keys.float(), -whole.positions, inverse_frequencies(self.base))
        return bare.split([s.tokens for s in whole.segments], 1)

    def _received(self, layer: int, whole: GistLayout, keys: Tensor, queries: Sequence[Tensor]) -> list[Tensor | None]:
        """Of each context how much attention its tokens get from the rows that choose, (N, T), or None where none do."""
        if not self.attended:
            return [None] * len(whole.segments)
        asked = queries[layer].split([len(rows) for rows in self._choosing(whole)], 1)
        of_each = zip(asked, keys.split([s.tokens for s in whole.segments], 1), strict=True)
        return [attention_received(q, k) for q, k in of_each]

    def _pool(self, layer: int, keys: Tensor, values: Tensor, gists: int, received: Tensor | None) -> tuple[Tensor, Tensor]:
        """keys without positions and values (N, T, D), attention received (N, T) or None -> (N, gists, D) each."""
        weights = self._weights(layer, keys, gists, received)
        pooled = [weights @ x for x in (keys, values)]
        return tuple(x + x @ self.maps[side, layer].float() for side, x in enumerate(pooled))

    def _weights(self, layer: int, keys: Tensor, gists: int, received: Tensor | None) -> Tensor:
        """How much each row takes of each token, (N, gists, T); arguments as of `_pool`."""
        if received is not None and keys.shape[1] > gists:
            places = torch.arange(keys.shape[1], device=keys.device)
            centres = most_attended(received, gists)  # (N, gists)
        else:
            places = in_shares(keys.shape[1], gists, self.recency).to(keys.device)
            centres = torch.arange(gists, device=keys.device)[None] + 0.5
        away = (places - centres[..., None]).square() * 2  # (N or 1, gists, T)
        scores = self.queries[layer, :, :gists].float() @ keys.transpose(1, 2) * keys.shape[2] ** -0.5
        return (scores - away * self.log_sharpness[layer, :, :gists, None].float().exp()).softmax(-1)

    @torch.no_grad()
    def looks_at(self, context: Sequence[int] | Tensor, *, gists: int | None = None) -> Tensor:
        """As of every kind. A row of one chunk has nothing of the others; the linear map of what is pooled is left out."""
        pieces, segments = self.cut(context, self._allowed(gists))
        layout = GistLayout(segments).to(self.base.device)
        ids = torch.tensor([[token for piece in pieces for token in piece]], device=self.base.device)
        whole, read, queries = self._read(ids, layout, BLOCK_ROWS)
        layers = []
        for layer, (keys, _) in enumerate(read):
            received = self._received(layer, whole, keys, queries)
            contexts = zip(self._unplaced(whole, keys), [s.gists for s in segments], received, strict=True)
            layers.append(torch.block_diag(*(self._weights(layer, *context).mean(0) for context in contexts)))
        return torch.stack(layers).mean(0).cpu()

    def compress_flops(self, cost: Any, tokens: int) -> int:
        segments, lora = self.cut(range(tokens))[1], (self.lora.rank, self.lora.targets) if self.lora else ()
        return sum(cost.pool(s.tokens - s.gists, s.gists, *lora, attended=self.attended) for s in segments)

    def save_weights(self, folder: Path) -> list[str]:
        own = {name: x.detach().cpu().contiguous() for name, x in self._own().items()}
        write_atomically(folder / POOLING, safetensors.torch.save(own))
        if self.lora:
            self.lora.save(folder, self.identity.name)
        return [POOLING, *([ADAPTER_CONFIG, ADAPTER_WEIGHTS] if self.lora else [])]

    def load_weights(self, folder: str | Path) -> None:
        load_parameters(Path(folder) / POOLING, self._own(), "a whole safetensors file of pooling", optional=["marker"])
        if self.lora:
            self.lora.load(folder)

    def _own(self) -> dict[str, nn.Parameter]:
        """What is trained beside LoRA."""
        return {name: parameter for name, parameter in self.trainable().items() if not name.startswith("lora.")}

    def remove(self) -> None:
        """Take the hooks off the base."""
        if self.lora:
            self.lora.remove()


def _reads(teacher: GistBatch | None, whole: GistLayout) -> bool:
    """Whether a teacher reads the contexts of `whole` as they stand there, not cut into chunks."""
    return teacher is not None and teacher.layout.segments[: len(whole.segments)] == whole.segments


def in_shares(tokens: int, rows: int, recency: float) -> Tensor:
    """Where each of (tokens,) stands among the shares that `rows` rows have of them, 0 .. rows; see `PoolingHypernetwork`."""
    if not recency or tokens <= rows or rows < 2:
        return (torch.arange(tokens) + 0.5) * (rows / tokens)
    scale = max(recency * tokens, 1)
    from_end = (tokens - 1 - torch.arange(tokens - 1) - 0.5) / scale
    rest = (rows - 1) * (1 - torch.log1p(from_end) / math.log1p((tokens - 1) / scale))
    return torch.cat([torch.tensor([0.5]), 1 + rest])
