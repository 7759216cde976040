"""Fused kernels without a GPU: the same packing code on stand-ins with the kernels' signatures, against the dense oracle."""

import inspect
import logging
import sys
import types

import kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import MANY, layouts
from test_attention import INV_FREQ, random_qkv, with_gradients
from torch.nn.attention.flex_attention import flex_attention

from attention_masks import BACKENDS, GistLayout, Segment, choose, dense_mask, gist_attention, why_not
from attention_masks import attention as attention_module
from attention_masks.flex import BLOCK, block_mask, visible_pairs
from attention_masks.varlen import alignment_fault, flash_kernel, torch_kernel

CPU = torch.device("cpu")
STAND_INS = {
    "flash": kernels.flash_attn_varlen_func,
    "varlen 2.11": kernels.varlen_attn_2_11,
    "varlen 2.13": kernels.varlen_attn_2_13,
}


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a stand-in where the kernel is imported from, and lets its backend run; returns the backend's name."""

    def put(name):
        if name == "flash":
            module = types.ModuleType("flash_attn")
            module.flash_attn_varlen_func = STAND_INS[name]
            monkeypatch.setitem(sys.modules, "flash_attn", module)
        else:
            monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", STAND_INS[name])
        monkeypatch.setattr(attention_module, "why_not", lambda *_: None)
        return name.split()[0]

    return put


def agree(layout, backend, qkv, inv_freq=None, tolerance=5e-6):
    found = with_gradients(layout, qkv, backend=backend, inv_freq=inv_freq)
    expected = with_gradients(layout, qkv, backend="dense", inv_freq=inv_freq)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("inv_freq", [None, INV_FREQ], ids=["as_it_is", "moved"])
@pytest.mark.parametrize("layout", MANY)
@pytest.mark.parametrize("name", STAND_INS)
def test_packing_for_a_kernel_equals_dense(stand_in, name, layout, inv_freq):
    agree(MANY[layout], stand_in(name), random_qkv(MANY[layout]), inv_freq)


@pytest.mark.parametrize("name", ["flash", "varlen 2.13"])
def test_random_graphs(stand_in, name):
    backend = stand_in(name)

    @settings(max_examples=100, deadline=None)
    @given(layouts(), st.integers(0, 2**16), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.booleans())
    def check(layout, seed, heads, moved):
        agree(layout, backend, random_qkv(layout, seed, *heads), INV_FREQ if moved else None)

    check()


def test_keys_of_contexts_are_used_where_they_stand(stand_in, monkeypatch):
    calls = []

    def watch(q, k, *rest, **settings):
        calls.append((q, k))
        return kernels.flash_attn_varlen_func(q, k, *rest, **settings)

    monkeypatch.setitem(STAND_INS, "flash", watch)
    layout = MANY["batch"]
    q, k, v = random_qkv(layout)
    gist_attention(q, k, v, layout, backend=stand_in("flash"))
    (_, contexts), (_, readers) = calls
    assert contexts.data_ptr() == k.data_ptr() and len(contexts) == layout.plain_rows, "no copy"
    assert len(readers) == sum(s.tokens + 2 for s in layout.segments if s.reads)


@pytest.mark.parametrize("name", ["flash", "varlen 2.13", "sdpa"])
def test_rows_that_nobody_reads_are_left_out(stand_in, name):
    backend = stand_in(name) if name in STAND_INS else name
    layout = MANY["batch"]
    qkv = random_qkv(layout)
    rest = gist_attention(*qkv, layout, backend=backend, unread=layout.compress_rows)
    assert not rest[:, :, : layout.compress_rows].any()
    whole = gist_attention(*qkv, layout, backend="dense")
    torch.testing.assert_close(rest[:, :, layout.compress_rows :], whole[:, :, layout.compress_rows :], atol=2e-6, rtol=1e-5)
    almost = gist_attention(*qkv, layout, backend=backend, unread=layout.compress_rows - 1)
    last = slice(layout.compress_rows - 1, None)
    torch.testing.assert_close(almost[:, :, last], whole[:, :, last], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["flash", "sdpa"])
def test_gradients_of_many_readers_are_summed_in_float32(stand_in, name):
    backend = stand_in(name) if name in STAND_INS else name
    readers = 400
    layout = GistLayout(
        [Segment(1, gists=1), *[Segment(40, reads=(0,))] * readers]
        if name == "sdpa"
        else [Segment(1, gists=1), *[Segment(1, reads=(0,))] * readers]
    )
    q, k, v = (torch.zeros(1, 1, layout.tokens, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    # All scores are equal: a row that sees n keys gives each 1 / n of its gradient.
    output = gist_attention(q, k, v, layout, backend=backend)
    gradient = torch.autograd.grad(output[:, :, 1:].float().sum(), v)[0][0, 0, 0, 0].item()
    rows = layout.segments[1].tokens
    expected = readers * sum(1 / (2 + i) for i in range(rows))
    assert gradient == pytest.approx(expected, rel=0.01), "added up in bf16, it would stop growing at 256 times a term"


@pytest.mark.parametrize("name", STAND_INS)
def test_a_kernel_is_tried_before_it_is_used(stand_in, name, monkeypatch):
    backend = stand_in(name)
    kernel = flash_kernel if backend == "flash" else torch_kernel
    assert alignment_fault(kernel, CPU, torch.float32, 8) is None

    def top_left(q, k, v, ends_q, ends_k, max_q, max_k, scale):
        return kernels.attend(q, k, v, ends_q, ends_k, max_q, max_k, scale, bottom_right=False)

    assert alignment_fault(top_left, CPU, torch.float32, 8) == "on this machine its causal mask is not aligned bottom-right"

    def broken(*_):
        raise RuntimeError("no kernel image is available\nfor execution")

    fault = alignment_fault(broken, CPU, torch.float32, 8)
    assert fault == "it fails on this GPU (RuntimeError: no kernel image is available)"


def test_the_stand_ins_take_what_the_installed_kernel_takes():
    from torch.nn.attention.varlen import varlen_attn

    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(varlen_attn) in (names(kernels.varlen_attn_2_11), names(kernels.varlen_attn_2_13))


def test_a_row_that_sees_nothing_gives_zeros():
    q, k = torch.ones(3, 1, 4), torch.ones(1, 1, 4)
    ends_q, ends_k = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    assert kernels.attend(q, k, k, ends_q, ends_k, 3, 1, 1.0)[:, 0, 0].tolist() == [0, 0, 1]


@pytest.fixture
def forget():
    """`choose` and `why_not` answer a question once."""
    yield
    choose.cache_clear()
    why_not.cache_clear()


def test_auto_says_once_what_it_chose_and_why(caplog, forget):
    choose.cache_clear()
    why_not.cache_clear()
    layout = MANY["few_shot"]
    with caplog.at_level(logging.INFO, logger="attention_masks"):
        for _ in range(3):
            gist_attention(*random_qkv(layout), layout)
    (line,) = caplog.messages
    assert line.startswith("gist attention on cpu in float32: sdpa; not flash: ") and line.endswith(
        "varlen: it needs a CUDA GPU"
    )


@pytest.mark.parametrize(
    "backend, dtype, head_dim, reason",
    [
        ("varlen", torch.float32, 64, "it computes in 16 bits, not in float32"),
        ("varlen", torch.bfloat16, 512, "heads of at most 256 in multiples of 8, not of 512"),
        ("varlen", torch.bfloat16, 20, "in multiples of 8, not of 20"),
        ("flash", torch.bfloat16, 64, "not installed"),
    ],
)
def test_why_a_kernel_is_not_used(backend, dtype, head_dim, reason, forget, monkeypatch):
    if backend == "flash":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert reason in why_not(backend, torch.device("cuda"), dtype, head_dim)


def test_a_kernel_that_cannot_run_here_is_refused_by_name():
    layout = MANY["few_shot"]
    q, k, v = random_qkv(layout)
    with pytest.raises(
        ValueError, match="attention backend 'varlen' cannot run here: it needs a CUDA GPU; choose auto, or sdpa"
    ):
        gist_attention(q, k, v, layout, backend="varlen")
    with pytest.raises(ValueError, match="'flex' cannot run here: FlexAttention has no backward pass"):
        gist_attention(q, k, v, layout, backend="flex")


LARGE = {
    "long": GistLayout([Segment(300, gists=5), Segment(129, reads=(0,)), Segment(260)]),
    "whole blocks": GistLayout([Segment(512, gists=256), Segment(256, reads=(0,))]),
    "many": GistLayout(
        [Segment(70 + i, gists=16) for i in range(6)] + [Segment(20 + i, reads=(i % 6, 5 - i % 6)) for i in range(9)]
    ),
}


@pytest.mark.parametrize("name", [*MANY, *LARGE])
def test_blocks_hold_as_many_visible_pairs_as_counted(name):
    layout = {**MANY, **LARGE}[name]
    mask, copies = block_mask(layout), len(layout.copies)
    rows, keys = torch.arange(layout.tokens)[:, None], torch.arange(layout.tokens + copies)[None]
    sees = mask.mask_mod(0, 0, rows, keys)
    pad = (0, -len(keys[0]) % BLOCK, 0, -len(rows) % BLOCK)
    blocks = torch.nn.functional.pad(sees, pad).unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK).sum((2, 3))
    assert torch.equal(blocks, visible_pairs(layout))
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks > 0)
    if name == "whole blocks":
        assert mask.full_kv_num_blocks.sum() > 0
    # Folded onto the rows that the copies are copies of, it is the dense mask.
    folded = sees[:, : layout.tokens].clone()
    for column, gist in enumerate(layout.read_gists[layout.copies].tolist()):
        folded[:, layout.gist_rows[gist]] |= sees[:, layout.tokens + column]
    assert torch.equal(folded, dense_mask(layout))


@settings(max_examples=30, deadline=None)
@given(layouts(), st.integers(0, 2**16), st.booleans())
def test_flex_equals_dense_on_random_graphs(layout, seed, moved):
    q, k, v = (x.detach() for x in random_qkv(layout, seed))
    arguments = {"scale": 0.3, "inv_freq": INV_FREQ if moved else None}
    found = BACKENDS["flex"].attention(q, k, v, layout, **arguments)
    torch.testing.assert_close(found, BACKENDS["dense"].attention(q, k, v, layout, **arguments), atol=5e-6, rtol=1e-4)


def test_what_a_kernel_needs_is_built_once_a_batch():
    layout = MANY["batch"]
    assert layout.once(block_mask) is layout.once(block_mask)
    assert GistLayout(layout.segments).once(block_mask) is not layout.once(block_mask)
    assert layout.to("meta").once(lambda x: x.device.type) == "meta"


def test_one_compilation_of_flex_serves_changing_shapes():
    """Without its kernels, which a CPU's compiler cannot make for changing shapes: what is asked is whether guards hold."""
    attention = torch.compile(flex_attention, dynamic=True, backend="eager")

    def run(layout):
        q, k = torch.randn(1, 4, layout.tokens, 16), torch.randn(1, 2, layout.tokens + len(layout.copies), 16)
        with torch.no_grad():
            attention(q, k, k, block_mask=layout.once(block_mask), enable_gqa=True)

    for rows in (600, 700, 350):
        run(GistLayout([Segment(rows, gists=16), Segment(50, reads=(0,))]))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (801, 333, 1500):
            run(GistLayout([Segment(rows, gists=16), *[Segment(37, reads=(0,))] * 3]))
