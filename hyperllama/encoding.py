"""Running a context through a decoder once, and keeping the keys and values of some of its rows as a `Prefix`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attention_masks import GistLayout, Segment, rotate
from hyperllama.backbone import cache_argument, inverse_frequencies, packed_arguments
from hyperllama.chunks import CHUNK_ROWS, chunked_mlps
from hyperllama.prefix import Prefix

States = list[tuple[Tensor, Tensor]]  # of each layer: keys and values (N, S, D)


def gist_rows(
    model: PreTrainedModel,
    layout: GistLayout,
    *,
    backend: str = "auto",
    given: States | None = None,
    chunk_rows: int | None = CHUNK_ROWS,
    **inputs,
) -> States:
    """Keys and values (N, S, D) of the rows `layout.gist_rows` at each layer, as the decoder leaves them.

    `given` are those (N, R, D) of the first R rows, all of them gist rows, which are read instead of what is computed there.
    `inputs` go to the decoder: input_ids (1, T) or inputs_embeds (1, T, hidden), and perhaps `gist_lora`. Without gradients and
    beyond `chunk_rows` rows a layer's MLP runs in chunks of as many, so that its inner states do not grow with the context.
    """
    cache, decoder = _GistRows(layout.gist_rows), model.get_decoder()
    arguments = packed_arguments(model, layout, backend, given)
    long = chunk_rows is not None and layout.tokens > chunk_rows and not torch.is_grad_enabled()
    with chunked_mlps(model, chunk_rows, inputs.get("gist_lora")) if long else nullcontext():
        decoder(**cache_argument(decoder, cache), use_cache=True, **inputs, **arguments)
    if not cache.states:
        raise ValueError("gradient checkpointing keeps no keys and values: they are needed when a context is compressed apart")
    if given is None:
        return cache.states
    pairs = zip(given, cache.states, strict=True)
    return [tuple(torch.cat([a.to(b.dtype), b[:, a.shape[1] :]], 1) for a, b in zip(*pair)) for pair in pairs]


def sink_states(model: PreTrainedModel, token: int, *, gradient: bool = False) -> States:
    """Keys and values (N, 1, D) of one token alone at position 0, at each layer: what attention of every row may rest on.

    With `gradient`, and where gradients are taken, for a model that is being trained.
    """
    ids, layers = torch.tensor([[token]], device=model.device), list(model.get_decoder().layers)
    training = [layer.training for layer in layers]
    for layer in layers:
        # Gradient checkpointing would keep no keys and values. Not `eval`, at which 4-bit weights are packed for good.
        layer.training = False
    try:
        taken = torch.set_grad_enabled(gradient and torch.is_grad_enabled())
        with taken, torch.autocast(model.device.type, enabled=False):
            return gist_rows(model, GistLayout([Segment(1, gists=1)]).to(model.device), input_ids=ids)
    finally:
        for layer, was in zip(layers, training):
            layer.training = was


def behind_sink(prefix: Prefix, sink: States, inv_freq: Tensor) -> Prefix:
    """A prefix with one row more, the sink: before all others, but behind those that only answers see.

    So it is the first that every row sees. `sink` has its keys and values (N, 1, D) at position 0, see `sink_states`.
    """
    at = prefix.late
    places = torch.tensor([at], device=inv_freq.device)
    ones = torch.ones(prefix.gists - at, dtype=torch.long, device=inv_freq.device)
    keys, values = [], []
    for k, v, (sink_k, sink_v) in zip(prefix.keys, prefix.values, sink, strict=True):
        sink_k = rotate(sink_k, places, inv_freq)
        keys.append(torch.cat([k[:, :at], sink_k.to(k.dtype), rotate(k[:, at:], ones, inv_freq)], 1))
        values.append(torch.cat([v[:, :at], sink_v.to(v.dtype), v[:, at:]], 1))
    return Prefix(keys, values, prefix.manifest, prefix.adapters, prefix.late)


@torch.no_grad()
def prefixes_of(states: States, layout: GistLayout, readers: Sequence[Sequence[int]], inv_freq: Tensor) -> list[Prefix]:
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
    """The first row as it is, where attention rests, and `rows` - 1 means of neighbours; the whole prefix if it has no more.

    A mean is of nearly as many rows as the others. Keys are averaged without their positions, and the means stand at 1, 2, ...:
    averaging rotated keys would cancel the fast frequencies.
    """
    if prefix.gists <= rows:
        return prefix
    device = prefix.keys[0].device
    back = -torch.arange(prefix.gists, device=device)
    group = torch.arange(prefix.gists - 1, device=device) * (rows - 1) // (prefix.gists - 1) + 1
    group = torch.cat([group.new_zeros(1), group]) if rows > 1 else group.new_zeros(prefix.gists)
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
