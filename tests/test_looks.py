"""What a prefix's rows look at: rows sum to one, and are what a plain loop over layers, heads and rows gives."""

import math

import pytest
import torch
from conftest import tiny_base
from test_kinds import GRAPHS, KINDS, context_of, made

from hyperllama.base.decoder import inverse_frequencies
from hyperllama.data.text import EncodedEpisode
from hyperllama.errors import UserError
from hyperllama.hypernetworks.loading import untrained
from hyperllama.inference.reader import Reader

POOLING = ("pooling", "pooling with LoRA", "pooling of attended tokens")
EPISODE = EncodedEpisode(tuple(range(5, 16)), (((12,), (14,)),), answers=((1, 4), (6, 8)))


@pytest.mark.parametrize("graph", ["single", "parallel"])
@pytest.mark.parametrize("kind", POOLING)
def test_rows_sum_to_one_and_stay_in_their_chunk(kind, graph):
    hypernetwork, context = made(kind, chunking=GRAPHS[graph]), context_of(EPISODE)
    looks = hypernetwork.looks_at(context)
    pieces, _ = hypernetwork.cut(context)
    assert looks.shape == (3 * len(pieces), len(context)) and len(pieces) == (1 if graph == "single" else 3)
    torch.testing.assert_close(looks.sum(1), torch.ones(len(looks)))
    assert (looks >= 0).all()
    first = 0
    for i, piece in enumerate(pieces):
        tokens = len(piece) - 3
        own = looks[3 * i : 3 * i + 3, first : first + tokens]
        torch.testing.assert_close(own.sum(1), torch.ones(3))
        first += tokens


def by_hand(hypernetwork, context, gists):
    """A loop over layers, heads, rows and tokens; keys are turned back to position 0 one by one."""
    (whole,) = Reader(hypernetwork.base, None).encode([context])
    inv_freq, half = inverse_frequencies(hypernetwork.base), whole.head_dim // 2
    found = torch.zeros(gists, len(context))
    for layer in range(whole.layers):
        for head in range(whole.kv_heads):
            for row in range(gists):
                scores = []
                for t in range(len(context)):
                    key, angle = whole.keys[layer][head, t], -t * inv_freq
                    a, b = key[:half], key[half:]
                    key = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])
                    place = (t + 0.5) * gists / len(context)
                    sharp = math.exp(hypernetwork.log_sharpness[layer, head, row])
                    met = (hypernetwork.queries[layer, head, row] @ key).item() / math.sqrt(whole.head_dim)
                    scores.append(met - 2 * sharp * (place - row - 0.5) ** 2)
                found[row] += torch.tensor(scores).softmax(0)
    return found / (whole.layers * whole.kv_heads)


@pytest.mark.parametrize("gists", [3, 2])
@torch.no_grad()
def test_looks_are_those_of_a_plain_loop(gists):
    hypernetwork, context = made("pooling", sharpness=0.7, elastic=True), list(range(5, 16))
    hypernetwork.queries.mul_(20)  # so that looking differs from head to head
    looks = hypernetwork.looks_at(context, gists=gists)
    torch.testing.assert_close(looks, by_hand(hypernetwork, context, gists), atol=1e-5, rtol=1e-4)
    hypernetwork.queries.zero_()
    assert (looks - hypernetwork.looks_at(context, gists=gists)).abs().max() > 0.01, "what is learned can be seen"


def test_of_a_base_alone_they_are_the_shares_of_heads_that_chose_a_token():
    base, context, rows = tiny_base(), list(range(3, 43)), 8
    looks = untrained(base, rows).looks_at(context)
    (prefix,), (whole,) = untrained(base, rows).compress([context]), Reader(base, None).encode([context])
    chosen = torch.zeros(rows, len(context))
    for layer in range(prefix.layers):
        for head in range(prefix.kv_heads):
            kept = torch.cdist(prefix.values[layer][head], whole.values[layer][head]).argmin(1)
            chosen[torch.arange(rows), kept] += 1 / (prefix.layers * prefix.kv_heads)
    torch.testing.assert_close(looks, chosen, atol=1e-4, rtol=1e-4)
    assert looks[0, 0] == 1 and (looks[1:-2].max(1).values < 1).any(), "heads choose for themselves"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pooling"])
def test_other_kinds_say_that_they_cannot(kind):
    with pytest.raises(UserError, match=f"cannot be shown: kind {kind} gathers"):
        made(kind).looks_at([5, 6, 7])


def test_only_as_many_rows_as_are_made():
    with pytest.raises(UserError, match="prefixes of 1 to 3 gists, not of 4"):
        made("pooling").looks_at([5, 6, 7], gists=4)
    with pytest.raises(UserError, match="all of its 3 gists only"):
        made("pooling").looks_at([5, 6, 7], gists=2)
