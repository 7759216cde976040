"""Running a context through a decoder once, and keeping the keys and values of some of its rows as a `Prefix`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attention_masks import GistLayout, Segment, rotate
from hyperllama.backbone import inverse_frequencies, packed_arguments
from hyperllama.chunks import CHUNK_ROWS, chunked_mlps
from hyperllama.prefix import Prefix


def gist_rows(
    model: PreTrainedModel, layout: GistLayout, *, backend: str = "auto", chunk_rows: int | None = CHUNK_ROWS, **inputs
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (N, S, D) of the rows `layout.gist_rows` at each layer, as the decoder leaves them.

    `inputs` go to the decoder: input_ids (1, T) or inputs_embeds (1, T, hidden), and perhaps `gist_lora`. Without gradients and
    beyond `chunk_rows` rows a layer's MLP runs in chunks of as many, so that its inner states do not grow with the context.
    """
    cache = _GistRows(layout.gist_rows)
    arguments = packed_arguments(model, layout, backend)
    long = chunk_rows is not None and layout.tokens > chunk_rows and not torch.is_grad_enabled()
    with chunked_mlps(model, chunk_rows, inputs.get("gist_lora")) if long else nullcontext():
        model.get_decoder()(past_key_values=cache, use_cache=True, **inputs, **arguments)
    if not cache.states:
        raise ValueError("gradient checkpointing keeps no keys and values: they are needed when a context is compressed apart")
    return cache.states


@torch.no_grad()
def prefixes_of(
    states: Sequence[tuple[Tensor, Tensor]], layout: GistLayout, readers: Sequence[Sequence[int]], inv_freq: Tensor
) -> list[Prefix]:
    """A prefix for each reader: the gists of the segments that it reads, one after the other at positions 0, 1, 2, ...

    `states` as from `gist_rows`.
    """
    column = {row: i for i, row in enumerate(layout.gist_rows.tolist())}
    prefixes = []
    for reads in readers:
        rows = [row for segment in reads for row in layout.gists_of(segment)]
        columns = torch.tensor([column[row] for row in rows], dtype=torch.long, device=layout.device)
        to_front = torch.arange(len(rows), device=layout.device) - layout.positions[rows]
        keys = [rotate(k[:, columns], to_front, inv_freq) for k, _ in states]
        prefixes.append(Prefix(keys, [v[:, columns] for _, v in states]))
    return prefixes


def encode_whole(
    model: PreTrainedModel, contexts: Sequence[Sequence[int]], *, backend: str = "auto", chunk_rows: int = CHUNK_ROWS
) -> list[Prefix]:
    """Prefixes that keep every token of their contexts: full attention, encoded once. Contexts may have any lengths.

    `chunk_rows` as in `gist_rows`.
    """
    layout = GistLayout([Segment(len(context), gists=len(context)) for context in contexts]).to(model.device)
    ids = torch.tensor([[token for context in contexts for token in context]], device=model.device)
    readers = [(i,) for i in range(len(contexts))]
    with torch.no_grad():
        states = gist_rows(model, layout, backend=backend, chunk_rows=chunk_rows, input_ids=ids)
    return prefixes_of(states, layout, readers, inverse_frequencies(model))


def last_rows(prefix: Prefix, rows: int, inv_freq: Tensor) -> Prefix:
    """The first row of a prefix and its last `rows` - 1, moved to positions 0, 1, ...; the whole prefix if it has no more.

    Without the first row, where attention goes that has nowhere else to go, a decoder reads hardly better than without any
    (Xiao et al. 2023, arXiv 2309.17453).
    """
    if prefix.gists <= rows:
        return prefix
    device = prefix.keys[0].device
    kept = torch.tensor([0, *range(prefix.gists - rows + 1, prefix.gists)], device=device)
    shifts = torch.arange(rows, device=device) - kept
    keys = [rotate(k[:, kept], shifts, inv_freq) for k in prefix.keys]
    return Prefix(keys, [v[:, kept] for v in prefix.values])


def first_rows(prefix: Prefix, rows: int) -> Prefix:
    """The first `rows` rows of a prefix, which stand where they should already; the whole prefix if it has no more."""
    if prefix.gists <= rows:
        return prefix
    return Prefix([k[:, :rows] for k in prefix.keys], [v[:, :rows] for v in prefix.values])


def mean_pooled(prefix: Prefix, rows: int, inv_freq: Tensor) -> Prefix:
    """`rows` means of neighbouring rows, of nearly equal number; the whole prefix if it has no more.

    Keys are averaged without their positions, and the means stand at 0, 1, ...: averaging rotated keys would cancel the fast
    frequencies.
    """
    if prefix.gists <= rows:
        return prefix
    device = prefix.keys[0].device
    back = -torch.arange(prefix.gists, device=device)
    group = (torch.arange(prefix.gists, device=device) * rows) // prefix.gists
    weights = torch.nn.functional.one_hot(group, rows).T.float()  # (rows, G)
    weights = weights / weights.sum(1, keepdim=True)
    places = torch.arange(rows, device=device)
    keys, values = [], []
    for k, v in zip(prefix.keys, prefix.values):
        keys.append(rotate((weights @ rotate(k.float(), back, inv_freq)), places, inv_freq).to(k.dtype))
        values.append((weights @ v.float()).to(v.dtype))
    return Prefix(keys, values)


class _GistRows(DynamicCache):
    """A cache that keeps gist rows only, (N, S, D) a layer, so that memory does not grow with the context."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = rows
        self.states: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = (x[0].index_select(1, self.rows) for x in (key_states, value_states))
        self.states.append((keys.to(values.dtype), values))
        return key_states, value_states
