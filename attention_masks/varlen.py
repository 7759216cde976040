"""The variable-length rendering: fused kernels on a CUDA GPU, without padding and without masked work.

A kernel takes packed queries (T_q, H, D), keys and values (T_k, N, D), where each segment's queries and keys begin and end,
and the longest of each: it is causal within a segment, aligned bottom-right. There are two calls. The first is for segments
that read nothing, which we pack first: they use their keys where they stand. The second is for the others, whose gists are
gathered before their own rows.
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention_masks.layout import GistLayout
from attention_masks.reading import read_gists


class Kernel(Protocol):
    """Causal attention of segments, bottom-right: ends are int32 (n + 1,) with a leading 0, maxima are of the host."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, scale: float
    ) -> Tensor: ...


def torch_kernel(q, k, v, ends_q, ends_k, max_q, max_k, scale) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, whose signature depends on torch's version."""
    from torch.nn.attention.varlen import varlen_attn

    # From torch 2.12 on grouped heads have to be announced; 2.11 hands them to the same kernel, and knows no such argument.
    known = "enable_gqa" in inspect.signature(varlen_attn).parameters
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if known else {}
    return varlen_attn(q, k, v, ends_q, ends_k, max_q, max_k, scale=scale, window_size=(-1, 0), **grouped)


def flash_kernel(q, k, v, ends_q, ends_k, max_q, max_k, scale) -> Tensor:
    """`flash_attn.flash_attn_varlen_func` of the flash-attn package (Dao 2023, arXiv 2307.08691)."""
    from flash_attn import flash_attn_varlen_func

    same = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_func(q, k, v, ends_q, ends_k, max_q, max_k, softmax_scale=scale, causal=True, deterministic=same)


class _Call(NamedTuple):
    ends_q: Tensor
    ends_k: Tensor
    max_q: int
    max_k: int


def _calls(layout: GistLayout) -> tuple[_Call, _Call]:
    """The arguments of both calls: no layer has to ask the device for a length."""
    tokens = [segment.tokens for segment in layout.segments]
    first = layout.first_reader
    plain, rows, keys = (x.to(torch.int32) for x in (layout.plain_ends, layout.row_ends, layout.key_ends))
    longest = max(tokens[:first], default=0)
    seen = max((tokens[i] + layout.width(i) for i in range(first, len(tokens))), default=0)
    return _Call(plain, plain, longest, longest), _Call(rows, keys, max(tokens[first:], default=0), seen)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: GistLayout,
    *,
    scale: float,
    inv_freq: Tensor | None,
    unread: int = 0,
    kernel: Kernel,
) -> Tensor:
    """Attention in two calls of `kernel` at most. Shapes and `unread` as in `gist_attention`."""
    plain, readers = layout.once(_calls)
    rows = [layout.plain_rows, layout.tokens - layout.plain_rows]
    (q_plain, q_readers), (k_plain, k_readers), (v_plain, v_readers) = (x.split(rows, 2) for x in (q, k, v))
    outputs = []
    if rows[0]:
        skipped = unread >= rows[0]
        plain_qkv = [_packed(x) for x in (q_plain, k_plain, v_plain)]
        outputs.append(torch.zeros_like(plain_qkv[0]) if skipped else kernel(*plain_qkv, *plain, scale))
    if rows[1]:
        read = read_gists(k, v, layout, inv_freq, copies=True)
        seen = [torch.cat(pair, 2).index_select(2, layout.seen) for pair in zip(read, (k_readers, v_readers))]
        outputs.append(kernel(_packed(q_readers), *map(_packed, seen), *readers, scale))
    return torch.cat(outputs).transpose(0, 1)[None]


def _packed(x: Tensor) -> Tensor:
    """(1, heads, rows, D) -> (rows, heads, D), the last dimension contiguous, as kernels want it."""
    x = x[0].transpose(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


torch_varlen_attention = partial(varlen_attention, kernel=torch_kernel)
flash_attention = partial(varlen_attention, kernel=flash_kernel)


@torch.no_grad()
def why_not_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why flash-attn's kernel cannot run here, or None."""
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (pip install 'hyperllama[flash]')"
    return _why_not(flash_kernel, device, dtype, head_dim)


def why_not_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why PyTorch's variable-length kernel cannot run here, or None."""
    return _why_not(torch_kernel, device, dtype, head_dim)


def _why_not(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"it takes heads of at most 256 in multiples of 8, not of {head_dim}"
    return alignment_fault(kernel, device, dtype, head_dim)


def alignment_fault(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run a kernel on two small segments and compare with PyTorch's own attention; what is wrong, or None."""
    numbers = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(rows, heads, head_dim, generator=numbers, device=device).to(dtype)
        for rows, heads in ((5, 4), (9, 2), (9, 2))
    )
    queries, keys = (2, 3), (6, 3)
    ends_q, ends_k = (torch.tensor([0, n, n + m], dtype=torch.int32, device=device) for n, m in (queries, keys))
    try:
        found = kernel(q, k, v, ends_q, ends_k, max(queries), max(keys), head_dim**-0.5)
    except Exception as error:  # a kernel may raise anything on a machine for which it was not built
        return f"it fails on this GPU ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
    for q_i, k_i, v_i, o_i in zip(q.split(queries), k.split(keys), v.split(keys), found.split(queries), strict=True):
        mask = torch.ones(len(q_i), len(k_i), dtype=torch.bool, device=device).tril(len(k_i) - len(q_i))
        shapes = (x.transpose(0, 1)[None].float() for x in (q_i, k_i, v_i))
        expected = scaled_dot_product_attention(*shapes, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        if not torch.allclose(o_i.float(), expected, atol=0.05):
            return "on this machine its causal mask is not aligned bottom-right"
    return None
