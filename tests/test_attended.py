"""What pooling chooses tokens by: no kernel, and no choice, has all queries beside all keys of a long context in memory."""

from functools import partial

import pytest
import torch
from conftest import tiny_base
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention_masks import BACKENDS, GistLayout, Segment, attention, dense, flex
from attention_masks.attention import Backend
from attention_masks.varlen import varlen_attention
from hyperllama.hypernetworks import attended
from hyperllama.hypernetworks.pooling import PoolingHypernetwork

TOKENS, BLOCK = 1024, 2**16


class Largest(TorchDispatchMode):
    """The most entries of any tensor that an operation makes, and who made it."""

    entries, by = 0, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.entries:
                self.entries, self.by = tensor.numel(), (function, tuple(tensor.shape))
        return out


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that need a GPU compute nothing here: what is made around them counts."""

    def fused(q, k, v, ends_q, ends_k, max_q, max_k, scale):
        return q.clone()

    for name in ("flash", "varlen"):
        monkeypatch.setitem(BACKENDS, name, Backend(partial(varlen_attention, kernel=fused)))
    monkeypatch.setattr(flex, "flex_attention", lambda q, k, v, **settings: q.clone())
    monkeypatch.setattr(attention, "why_not", lambda *place: None)
    monkeypatch.setattr(dense, "SCORES", BLOCK)
    monkeypatch.setattr(attended, "SCORES", BLOCK)


def largest(backend, rank):
    """The largest tensor while a context is pooled in training with gradient checkpointing, and in its backward pass."""
    base = tiny_base(max_position_embeddings=2 * TOKENS)
    hypernetwork = PoolingHypernetwork(base, gists=8, attended=0.5, rank=rank, backend=backend).train()
    hypernetwork.activation_checkpointing_enable()
    ids, layout = torch.arange(TOKENS + 8)[None] % 90 + 3, GistLayout([Segment(TOKENS + 8, gists=8)])
    with Largest() as found:
        sum(side.sum() for states in hypernetwork.gist_states(ids, layout) for side in states).backward()
    return found


@pytest.mark.parametrize("rank", [0, 4], ids=["base alone", "LoRA"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_kernel_has_all_queries_beside_all_keys(kernels, backend, rank):
    found = largest(backend, rank)
    assert found.entries < TOKENS * TOKENS / 8, found.by


@pytest.mark.parametrize("module", [dense, attended])
def test_it_would_be_seen(kernels, module, monkeypatch):
    monkeypatch.setattr(module, "SCORES", 2**40)
    assert largest("dense", 0).entries >= TOKENS * TOKENS


def test_the_dense_mask_in_blocks_is_the_whole(monkeypatch):
    """Several readers of one gist at different distances, and blocks that end within segments."""
    layout = GistLayout(
        [Segment(9, gists=3), Segment(7, gists=2, reads=(0,)), Segment(11, reads=(0, 1)), Segment(6, reads=(1, 0))]
    )
    assert layout.shifted
    torch.manual_seed(0)
    inv_freq = 10.0 ** -torch.arange(4.0)
    q = torch.randn(1, 4, layout.tokens, 8, requires_grad=True)
    k, v = (torch.randn(1, 2, layout.tokens, 8, requires_grad=True) for _ in range(2))
    weight, results = torch.randn(q.shape), []
    for scores in (2**25, 600):
        monkeypatch.setattr(dense, "SCORES", scores)
        out = dense.dense_attention(q, k, v, layout, scale=0.4, inv_freq=inv_freq)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, whole)
