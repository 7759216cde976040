"""How others compute the same training step, on stock transformers with the same weights: what the packed step is held against.

Every function takes a hypernetwork and encoded episodes and returns the loss that `GistHypernetwork.forward` returns for
them. All of them get the output head on target rows only, which their originals do not do, so ratios are about packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache

from hyperllama.base.decoder import cache_argument
from hyperllama.data.text import EncodedEpisode
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.objectives.losses import TokenLoss, answer_cross_entropy


def row_per_query(hypernetwork: GistHypernetwork, episodes: Sequence[EncodedEpisode]) -> TokenLoss:
    """One padded row per query, with its context repeated, under a dense 4-D mask: the code of gisting (Mu et al. 2023)."""
    return _padded(hypernetwork, [(episode.context, [query]) for episode in episodes for query in episode.queries])


def row_per_episode(hypernetwork: GistHypernetwork, episodes: Sequence[EncodedEpisode]) -> TokenLoss:
    """One padded row per episode, with all its queries one after the other, under a dense 4-D mask."""
    return _padded(hypernetwork, [(episode.context, episode.queries) for episode in episodes])


def two_pass(hypernetwork: GistHypernetwork, episodes: Sequence[EncodedEpisode]) -> TokenLoss:
    """Two padded passes: compress a batch of contexts, then read a batch of queries behind their gists' keys and values."""
    base, gists, device = hypernetwork.base, hypernetwork.num_gists, hypernetwork.gists.device
    rows = [(*episode.context, *[0] * gists) for episode in episodes]
    ids, mask = _pad_right(rows, device)
    ends = torch.tensor([len(row) for row in rows], device=device)
    gist_columns = ends[:, None] - gists + torch.arange(gists, device=device)  # (B, G)
    embeds = base.get_input_embeddings()(ids)
    is_gist = torch.zeros_like(mask).scatter(1, gist_columns, True)
    embeds = embeds.masked_scatter(is_gist[..., None], hypernetwork.gists.to(embeds.dtype).repeat(len(rows), 1))
    with _stock(hypernetwork, torch.ones_like(mask)):
        cache, decoder = DynamicCache(), base.get_decoder()
        decoder(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=True, **cache_argument(decoder, cache))
    owner = torch.tensor([i for i, episode in enumerate(episodes) for _ in episode.queries], device=device)
    prefix = []
    for keys, values, *_ in cache:
        pick = gist_columns[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        prefix.append((keys.gather(2, pick)[owner], values.gather(2, pick)[owner]))
    queries = [query for episode in episodes for query in episode.queries]
    ids, mask = _pad_right([(*prompt, *answer[:-1]) for prompt, answer in queries], device)
    sees_gists = torch.ones(len(queries), gists, dtype=torch.long, device=device)
    with _stock(hypernetwork, None):
        hidden = decoder(
            input_ids=ids,
            attention_mask=torch.cat([sees_gists, mask.long()], 1),
            position_ids=ends[owner][:, None] + torch.arange(ids.shape[1], device=device),
            **cache_argument(decoder, DynamicCache(prefix)),
            use_cache=True,
        ).last_hidden_state
    places = [(i, len(p) - 1 + j) for i, (p, a) in enumerate(queries) for j in range(len(a))]
    return _answer_loss(hypernetwork, hidden, places, [token for _, answer in queries for token in answer])


def _padded(hypernetwork: GistHypernetwork, rows) -> TokenLoss:
    """Rows of a context, its gists and any of its queries, padded to the longest, under a dense mask."""
    base, gists, device = hypernetwork.base, hypernetwork.num_gists, hypernetwork.gists.device
    pieces, places, targets = [], [], []
    for i, (context, queries) in enumerate(rows):
        piece = [*context, *[0] * gists]
        for prompt, answer in queries:
            places += [(i, len(piece) + len(prompt) - 1 + j) for j in range(len(answer))]
            targets += answer
            piece += [*prompt, *answer[:-1]]
        pieces.append(piece)
    ids, real = _pad_right(pieces, device)
    embeds = base.get_input_embeddings()(ids)
    sees = torch.eye(ids.shape[1], dtype=torch.bool, device=device).repeat(len(rows), 1, 1)  # padding sees itself only
    positions = torch.zeros_like(ids)
    compressing = torch.zeros_like(real)
    is_gist = torch.zeros_like(real)
    for i, (context, queries) in enumerate(rows):
        end = len(context) + gists
        compressing[i, :end] = True
        is_gist[i, len(context) : end] = True
        positions[i, :end] = torch.arange(end, device=device)
        sees[i, :end, :end] = torch.ones(end, end, dtype=torch.bool, device=device).tril()
        start = end
        for prompt, answer in queries:
            own = slice(start, start + len(prompt) + len(answer) - 1)
            size = own.stop - own.start
            positions[i, own] = end + torch.arange(size, device=device)
            sees[i, own, len(context) : end] = True
            sees[i, own, own] = torch.ones(size, size, dtype=torch.bool, device=device).tril()
            start = own.stop
    embeds = embeds.masked_scatter(is_gist[..., None], hypernetwork.gists.to(embeds.dtype).repeat(len(rows), 1))
    with _stock(hypernetwork, compressing):
        hidden = base.get_decoder()(
            inputs_embeds=embeds, attention_mask=sees[:, None], position_ids=positions, use_cache=False
        ).last_hidden_state
    return _answer_loss(hypernetwork, hidden, places, targets)


def _answer_loss(hypernetwork, hidden: Tensor, places, targets) -> TokenLoss:
    rows, columns = torch.tensor(places, device=hidden.device).unbind(1)
    logits = hypernetwork.base.get_output_embeddings()(hidden[rows, columns])
    return answer_cross_entropy(logits, torch.tensor(targets, device=hidden.device))


def _pad_right(rows, device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    real = torch.arange(longest, device=device)[None] < torch.tensor([len(row) for row in rows], device=device)[:, None]
    return ids, real


@contextmanager
def _stock(hypernetwork: GistHypernetwork, compressing: Tensor | None):
    """The base on stock attention, with the hypernetwork's LoRA on the rows where `compressing` (B, T) is True."""
    base, lora = hypernetwork.base, hypernetwork.lora
    linears = dict(base.named_modules())
    every_row = compressing is not None and bool(compressing.all())

    def add(name):
        a, b = lora.A[name.replace(".", "-")], lora.B[name.replace(".", "-")]

        def hook(linear, args, output):
            update = b(a(args[0].to(a.weight.dtype))) * (lora.alpha / lora.rank)
            return output + (update if every_row else update * compressing[..., None]).to(output.dtype)

        return hook

    hooks = [] if compressing is None else [linears[name].register_forward_hook(add(name)) for name in lora.names]
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation("gist")
        for hook in hooks:
            hook.remove()
