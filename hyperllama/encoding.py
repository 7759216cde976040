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


@torch.no_grad()
def encode_gists(
    model: PreTrainedModel,
    layout: GistLayout,
    readers: Sequence[Sequence[int]],
    *,
    backend: str = "auto",
    chunk_rows: int = CHUNK_ROWS,
    **inputs,
) -> list[Prefix]:
    """A prefix for each reader: the gists of the segments that it reads, one after the other at positions 0, 1, 2, ...

    `inputs` go to the decoder: input_ids (1, T) or inputs_embeds (1, T, hidden), and perhaps `gist_lora`. Beyond
    `chunk_rows` rows a layer's MLP runs in chunks of as many, so that its inner states do not grow with the context.
    """
    layout = layout.to(model.device)
    cache = _GistRows(layout.gist_rows)
    arguments = packed_arguments(model, layout, backend)
    long = layout.tokens > chunk_rows
    with chunked_mlps(model, chunk_rows, inputs.get("gist_lora")) if long else nullcontext():
        model.get_decoder()(past_key_values=cache, use_cache=True, **inputs, **arguments)
    column = {row: i for i, row in enumerate(layout.gist_rows.tolist())}
    prefixes = []
    for reads in readers:
        rows = [row for segment in reads for row in layout.gists_of(segment)]
        columns = torch.tensor([column[row] for row in rows], device=model.device)
        to_front = torch.arange(len(rows), device=model.device) - layout.positions[rows]
        keys = [rotate(k[:, columns], to_front, inverse_frequencies(model)) for k, _ in cache.states]
        prefixes.append(Prefix(keys, [v[:, columns] for _, v in cache.states]))
    return prefixes


def encode_whole(
    model: PreTrainedModel, contexts: Sequence[Sequence[int]], *, backend: str = "auto", chunk_rows: int = CHUNK_ROWS
) -> list[Prefix]:
    """Prefixes that keep every token of their contexts: full attention, encoded once. Contexts may have any lengths.

    `chunk_rows` as in `encode_gists`.
    """
    layout = GistLayout([Segment(len(context), gists=len(context)) for context in contexts])
    ids = torch.tensor([[token for context in contexts for token in context]], device=model.device)
    readers = [(i,) for i in range(len(contexts))]
    return encode_gists(model, layout, readers, backend=backend, chunk_rows=chunk_rows, input_ids=ids)


def last_rows(prefix: Prefix, rows: int, inv_freq: Tensor) -> Prefix:
    """The last `rows` rows of a prefix, moved to positions 0, 1, ...; the whole prefix if it has no more."""
    left_out = prefix.gists - rows
    if left_out <= 0:
        return prefix
    shifts = torch.full((rows,), -left_out, device=prefix.keys[0].device)
    keys = [rotate(k[:, left_out:], shifts, inv_freq) for k in prefix.keys]
    return Prefix(keys, [v[:, left_out:] for v in prefix.values])


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
        self.states.append((key_states[0, :, self.rows].to(value_states.dtype), value_states[0, :, self.rows]))
        return key_states, value_states
