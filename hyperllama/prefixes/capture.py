"""Running a context through a decoder once, and keeping the keys and values of some of its rows as a `Prefix`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_masks import GistLayout, Segment, rotate
from attention_masks.registration import Kept
from hyperllama.base.decoder import inverse_frequencies, packed_arguments
from hyperllama.base.mlp_blocks import BLOCK_ROWS, mlps_in_blocks
from hyperllama.prefixes.prefix import Prefix

States = list[tuple[Tensor, Tensor]]  # of each layer: keys and values (N, S, D)


def gist_rows(
    model: PreTrainedModel,
    layout: GistLayout,
    *,
    backend: str = "auto",
    given: States | None = None,
    block_rows: int | None = BLOCK_ROWS,
    kept: Kept | None = None,
    **inputs,
) -> States:
    """Keys and values (N, S, D) of the rows `layout.gist_rows` at each layer, as the decoder leaves them.

    `given` are those (N, R, D) of the first R rows, all of them gist rows, which are read instead of what is computed there.
    `kept` is what collects them, if queries are wanted too. `inputs` go to the decoder: input_ids (1, T) or inputs_embeds
    (1, T, hidden), and perhaps `gist_lora`. Without gradients and beyond `block_rows` rows a layer's MLP runs in chunks of as
    many, so that its inner states do not grow with the context. With gradients they are right under gradient checkpointing too.
    """
    kept, decoder = kept or Kept(layout.gist_rows), model.get_decoder()
    arguments = packed_arguments(model, layout, backend, given)
    long = block_rows is not None and layout.tokens > block_rows and not torch.is_grad_enabled()
    with mlps_in_blocks(model, block_rows, inputs.get("gist_lora")) if long else nullcontext():
        decoder(use_cache=False, gist_kept=kept, **inputs, **arguments)
    states = list(kept.states.values())
    if given is None:
        return states
    pairs = zip(given, states, strict=True)
    return [tuple(torch.cat([a.to(b.dtype), b[:, a.shape[1] :]], 1) for a, b in zip(*pair)) for pair in pairs]


def sink_states(model: PreTrainedModel, token: int, *, gradient: bool = False) -> States:
    """Keys and values (N, 1, D) of one token alone at position 0, at each layer: what attention of every row may rest on.

    With `gradient`, and where gradients are taken, for a model that is being trained.
    """
    ids = torch.tensor([[token]], device=model.device)
    taken = torch.set_grad_enabled(gradient and torch.is_grad_enabled())
    with taken, torch.autocast(model.device.type, enabled=False):
        return gist_rows(model, GistLayout([Segment(1, gists=1)]).to(model.device), input_ids=ids)


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
    model: PreTrainedModel, contexts: Sequence[Sequence[int]], *, backend: str = "auto", block_rows: int = BLOCK_ROWS
) -> list[Prefix]:
    """Prefixes that keep every token of their contexts: full attention, encoded once. Contexts may have any lengths.

    `block_rows` as in `gist_rows`.
    """
    layout = GistLayout([Segment(len(context), gists=len(context)) for context in contexts]).to(model.device)
    ids = torch.tensor([[token for context in contexts for token in context]], device=model.device)
    readers = [(i,) for i in range(len(contexts))]
    with torch.no_grad():
        states = gist_rows(model, layout, backend=backend, block_rows=block_rows, input_ids=ids)
    return prefixes_of(states, layout, readers, inverse_frequencies(model))
