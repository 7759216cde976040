"""The real fused kernels on a GPU against the dense oracle in float32, beside the error of PyTorch's own attention."""

import pytest
import torch
from layouts import MANY
from test_attention import INV_FREQ

from attention_masks import GistLayout, Segment, choose, dense_mask, gist_attention, why_not
from attention_masks.flex import block_mask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GRAPHS = MANY | {
    "long": GistLayout([Segment(700, gists=16), Segment(300, gists=16)] + [Segment(30 + i, reads=(i % 2,)) for i in range(6)]),
    "recurrent and long": GistLayout(
        [Segment(200, gists=16), Segment(200, gists=16, reads=(0,)), Segment(150, gists=16, reads=(0, 1))]
        + [Segment(n, reads=(0, 1, 2)) for n in (64, 3, 2, 1)]
    ),
    "many readers": GistLayout([Segment(100, gists=16)] + [Segment(1 + i % 3, reads=(0,)) for i in range(500)]),
}


def states(layout, dtype, heads=8, kv_heads=2, dim=64):
    numbers = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, layout.tokens, n, dim) for n in (heads, kv_heads, kv_heads)]
    made = [torch.randn(shape, generator=numbers, device="cuda").to(dtype).transpose(1, 2) for shape in shapes]
    return [x.requires_grad_() for x in made]


def results(way, qkv):
    """Output and gradients, in float32."""
    output = way(*qkv)
    weights = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output).sin().to(output.dtype)
    return [x.float() for x in (output.detach(), *torch.autograd.grad((output * weights).sum(), qkv))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("backend", ["flash", "varlen", "flex", "sdpa"])
def test_errors_are_at_most_twice_those_of_pytorchs_attention(backend, name, dtype):
    if reason := why_not(backend, torch.device("cuda"), dtype, 64):
        pytest.skip(reason)
    layout = GRAPHS[name].to("cuda")
    qkv = states(layout, dtype)
    moved = 1 / 10000 ** (torch.arange(0, 64, 2, device="cuda") / 64) if layout.shifted else None
    wide = [x.detach().float().requires_grad_() for x in qkv]
    exact = results(lambda *x: gist_attention(*x, layout, backend="dense", inv_freq=moved), wide)
    found = results(lambda *x: gist_attention(*x, layout, backend=backend, inv_freq=moved), qkv)
    if layout.shifted:  # PyTorch's attention sees no moved keys: the oracle in this dtype stands in for it
        own = results(lambda *x: gist_attention(*x, layout, backend="dense", inv_freq=moved), qkv)
    else:
        mask = dense_mask(layout)

        def masked(q, k, v):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        own = results(masked, qkv)
    for what, a, b, c in zip(("output", "dq", "dk", "dv"), found, own, exact, strict=True):
        error, allowed = (a - c).abs().max().item(), 2 * (b - c).abs().max().item() + 1e-5
        assert error <= allowed, f"{what}: {error:.2e}, PyTorch's own {allowed / 2:.2e}"


@pytest.mark.parametrize("kernel", ["flash", "varlen"])
def test_kernels_align_causal_masks_bottom_right(kernel):
    reason = why_not(kernel, torch.device("cuda"), torch.bfloat16, 64)
    if kernel == "flash" and reason and "not installed" in reason:
        pytest.skip(reason)
    assert reason is None


def test_auto_takes_a_fused_kernel_in_16_bits_and_not_in_32():
    assert choose(torch.device("cuda"), torch.bfloat16, 128) in ("flash", "varlen")
    assert choose(torch.device("cuda"), torch.float32, 128) == "sdpa"


def test_flex_compiles_once_for_changing_shapes():
    torch.compiler.reset()
    for first in (600, 700):  # two shapes, until lengths are symbols
        layout = GistLayout([Segment(first, gists=16), Segment(50, reads=(0,))]).to("cuda")
        gist_attention(*states(layout, torch.bfloat16), layout, backend="flex").sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for first in (801, 333, 1500):
            layout = GistLayout([Segment(first, gists=16)] + [Segment(37, reads=(0,))] * 3).to("cuda")
            gist_attention(*states(layout, torch.bfloat16), layout, backend="flex").sum().backward()


@pytest.mark.parametrize("backend", ["flash", "varlen", "sdpa"])
def test_a_layer_does_not_wait_for_the_device(backend):
    if reason := why_not(backend, torch.device("cuda"), torch.bfloat16, 64):
        pytest.skip(reason)
    layout = GRAPHS["recurrent and long"].pin_memory().to("cuda", non_blocking=True)
    qkv = states(layout, torch.bfloat16)
    inv_freq = INV_FREQ.cuda()

    def step():
        return torch.autograd.grad(gist_attention(*qkv, layout, backend=backend, inv_freq=inv_freq).sum(), qkv)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_blocks_of_a_mask_are_built_on_the_host_and_moved():
    layout = GRAPHS["long"].to("cuda")
    mask = layout.once(block_mask)
    assert mask.kv_indices.device.type == "cuda" and layout.once(block_mask) is mask
