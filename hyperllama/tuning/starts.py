"""Where a tuned prefix starts from: each way makes a `Prefix`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from attention_masks import rotate
from hyperllama.base.decoder import inverse_frequencies
from hyperllama.errors import UserError
from hyperllama.prefixes.capture import encode_whole, sink_states
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.rows import behind_sink, first_rows, mean_pooled


def random_start(
    model: PreTrainedModel, like: Sequence[Sequence[int]], rows: int, *, seed: int = 0, sink: int | None = None
) -> Prefix:
    """A random prefix with the mean and spread that each dimension of real keys and values has over the contexts `like`.

    Keys are drawn without positions and stand at 0, 1, ... then, as those of tokens do. With a `sink` the first of the `rows`
    is the row of that token alone.
    """
    gists = rows if sink is None else rows - 1
    generator = torch.Generator().manual_seed(seed)
    real = encode_whole(model, [context for context in like if len(context)])
    inv_freq, places = inverse_frequencies(model), torch.arange(gists, device=model.device)
    keys, values = [], []
    for layer in range(real[0].layers):
        upright = [rotate(p.keys[layer].float(), -torch.arange(p.rows, device=model.device), inv_freq) for p in real]
        for kept, rows in ((keys, torch.cat(upright, 1)), (values, torch.cat([p.values[layer].float() for p in real], 1))):
            noise = torch.randn(rows.shape[0], gists, rows.shape[2], generator=generator).to(rows.device)
            drawn = rows.mean(1, keepdim=True) + rows.std(1, keepdim=True, correction=0) * noise
            kept.append((rotate(drawn, places, inv_freq) if kept is keys else drawn).to(model.dtype))
    prefix = Prefix(keys, values)
    return prefix if sink is None else behind_sink(prefix, sink_states(model, sink), inv_freq)


def vocabulary_start(model: PreTrainedModel, words: Sequence[int], rows: int, *, sink: int | None = None) -> Prefix:
    """The activations of `rows` tokens, taken from `words` in turn (Li & Liang 2021, section 7.4: real words start best).

    With a `sink` that token is the first of them.
    """
    if not len(words):
        raise UserError("a vocabulary start needs at least one word")
    first = [] if sink is None else [sink]
    (prefix,) = encode_whole(model, [[*first, *(words[i % len(words)] for i in range(rows - len(first)))]])
    return prefix


def demonstrations_start(model: PreTrainedModel, context: Sequence[int], rows: int, *, pooled: bool = False) -> Prefix:
    """The demonstrations' own keys and values: their first `rows` rows, or the first and means of neighbours (`pooled`).

    A context with fewer tokens is repeated until it has as many.
    """
    if not len(context):
        raise UserError("a start from demonstrations needs some, but the context is empty")
    repeated = list(context) * -(-rows // len(context))
    (prefix,) = encode_whole(model, [repeated if len(context) < rows else context])
    return mean_pooled(prefix, rows, inverse_frequencies(model)) if pooled else first_rows(prefix, rows)
