"""Every backend against the dense oracle, and the oracle against softmax written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import MANY, layouts

from attention_masks import GistLayout, Segment, gist_attention, rotate

INV_FREQ = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)


def random_qkv(layout, seed=0, heads=4, kv_heads=2, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, h, layout.tokens, dim, generator=generator, dtype=torch.float32).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def with_gradients(layout, qkv, **settings):
    output = gist_attention(*qkv, layout, **settings)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output).sin()
    return [output, *torch.autograd.grad((output * weights).sum(), qkv)]


@pytest.mark.parametrize("inv_freq", [None, INV_FREQ], ids=["as_it_is", "moved"])
@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("backend", ["sdpa", "auto"])
def test_backend_equals_dense(backend, name, inv_freq):
    qkv = random_qkv(MANY[name])
    found = with_gradients(MANY[name], qkv, backend=backend, inv_freq=inv_freq)
    expected = with_gradients(MANY[name], qkv, backend="dense", inv_freq=inv_freq)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@settings(max_examples=150, deadline=None)
@given(layouts(), st.integers(0, 2**16), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.booleans())
def test_sdpa_equals_dense_on_random_graphs(layout, seed, heads, moved):
    qkv = random_qkv(layout, seed, *heads)
    inv_freq = INV_FREQ if moved else None
    found = with_gradients(layout, qkv, backend="sdpa", inv_freq=inv_freq)
    expected = with_gradients(layout, qkv, backend="dense", inv_freq=inv_freq)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-4)


def test_dense_is_softmax_over_visible_keys():
    layout = MANY["shared"]
    q, k, v = random_qkv(layout, heads=2, kv_heads=1)
    output = gist_attention(q, k, v, layout, backend="dense", scale=0.3)
    row, head = 8, 1  # the third row of the first query: it sees gists 3..5 and rows 6..8
    keys = [3, 4, 5, 6, 7, 8]
    scores = torch.stack([0.3 * q[0, head, row] @ k[0, 0, key] for key in keys])
    expected = (scores.softmax(0)[:, None] * v[0, 0, keys]).sum(0)
    torch.testing.assert_close(output[0, head, row], expected)


def test_moving_a_key_is_computing_it_elsewhere():
    key = torch.randn(3, 5, 8)
    there = rotate(key, torch.tensor([4, 9, 2, 0, 7]), INV_FREQ)
    torch.testing.assert_close(rotate(there, -torch.tensor([4, 9, 2, 0, 7]), INV_FREQ), key, atol=1e-5, rtol=1e-5)
    angle = 9 * INV_FREQ
    first = key[:, 1, :4] * angle.cos() - key[:, 1, 4:] * angle.sin()
    torch.testing.assert_close(there[:, 1, :4], first, atol=1e-5, rtol=1e-5)
    assert torch.equal(rotate(key, torch.arange(5), INV_FREQ[:2])[..., 4:], key[..., 4:]), "dimensions without rotary stay"


def test_gist_gradients_sum_over_all_readers():
    layout = GistLayout([Segment(2, gists=1)] + [Segment(2, reads=(0,))] * 3)
    alone = GistLayout([Segment(2, gists=1), Segment(2, reads=(0,))])
    q, k, v = random_qkv(layout)
    total = torch.autograd.grad(gist_attention(q, k, v, layout)[:, :, 2:].sum(), v)[0][:, :, 1]
    parts = []
    for i in range(3):
        rows = [0, 1, 2 + 2 * i, 3 + 2 * i]
        part = [x[:, :, rows].detach().requires_grad_() for x in (q, k, v)]
        parts.append(torch.autograd.grad(gist_attention(*part, alone)[:, :, 2:].sum(), part[2])[0][:, :, 1])
    torch.testing.assert_close(total, sum(parts), atol=1e-5, rtol=1e-5)


def test_queries_and_keys_take_the_dtype_of_values():
    layout = MANY["few_shot"]
    q, k, v = random_qkv(layout)
    assert gist_attention(q, k, v.bfloat16(), layout).dtype == torch.bfloat16


def test_shapes_and_names_are_checked():
    layout = MANY["few_shot"]
    q, k, v = random_qkv(layout)
    with pytest.raises(ValueError, match=r"q must be \(1, heads, 11, head_dim\) for this layout, not \(1, 4, 10, 8\)"):
        gist_attention(q[:, :, :-1], k, v, layout)
    with pytest.raises(ValueError, match="kv_heads a divisor of 3"):
        gist_attention(q[:, :3], k, v, layout)
    with pytest.raises(
        ValueError, match="unknown attention backend 'fast': choose auto or one of dense, flash, flex, sdpa, varlen"
    ):
        gist_attention(q, k, v, layout, backend="fast")
