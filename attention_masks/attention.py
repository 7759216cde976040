"""`gist_attention`: one signature for every kernel that can compute a reading graph, and the choice between them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from attention_masks.dense import dense_attention
from attention_masks.flex import block_flex_attention, why_not_flex
from attention_masks.layout import GistLayout
from attention_masks.sdpa import sdpa_attention
from attention_masks.varlen import flash_attention, torch_varlen_attention, why_not_flash, why_not_varlen

log = logging.getLogger(__name__)


def _runs_anywhere(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A kernel: `attention` is (q, k, v, layout, *, scale, inv_freq, unread) -> output, as `gist_attention` has them.

    `why_not` is (device, dtype, head dimension) -> why it cannot run there, in a few words, or None.
    """

    attention: Callable[..., Tensor]
    why_not: Callable[[torch.device, torch.dtype, int], str | None] = _runs_anywhere


# A new kernel is a file of its own and a line in this table.
BACKENDS: dict[str, Backend] = {
    "dense": Backend(dense_attention),
    "sdpa": Backend(sdpa_attention),
    "flash": Backend(flash_attention, why_not_flash),
    "varlen": Backend(torch_varlen_attention, why_not_varlen),
    "flex": Backend(block_flex_attention, why_not_flex),
}
# What "auto" tries, in this order. FlexAttention is not among them: it compiles for half a minute first.
PREFERRED = ("flash", "varlen", "sdpa")


def gist_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: GistLayout,
    *,
    backend: str = "auto",
    scale: float | None = None,
    inv_freq: Tensor | None = None,
    unread: int = 0,
) -> Tensor:
    """Attention of a packed row under the gist mask of `layout`.

    q (1, H, T, D); k and v (1, N, T, D) with H a multiple of N (grouped-query heads); returns (1, H, T, D) in the dtype
    of `v`. `scale` multiplies the scores, 1 / sqrt(D) unless given. `inv_freq` (D_rotary / 2,) are the rotary inverse
    frequencies with which `k` was rotated. With them, a key that a reader sees at another distance is moved there
    (`layout.read_shifts`); without, every key is used as it is. `backend` is a name in `BACKENDS`, or "auto":
    the fused kernel that runs here (see `choose`). Nobody reads the output of the first `unread` rows, which may be zeros.

    The causal mask is aligned at the bottom right, which is easy to get wrong: here a reader of 2 gists with 3 rows of its own.

        gist gist own own own
         1    1    1   0   0
         1    1    1   1   0
         1    1    1   1   1

    Raises ValueError for shapes that do not fit the layout or each other, an unknown backend, or one that cannot run here.
    """
    if q.dim() != 4 or q.shape[0] != 1 or q.shape[2] != layout.tokens:
        raise ValueError(f"q must be (1, heads, {layout.tokens}, head_dim) for this layout, not {tuple(q.shape)}")
    if k.shape != v.shape or k.dim() != 4 or k.shape[0] != 1 or k.shape[2:] != q.shape[2:] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k and v must be (1, kv_heads, {layout.tokens}, {q.shape[3]}) with kv_heads a divisor of {q.shape[1]}, "
            f"not {tuple(k.shape)} and {tuple(v.shape)}"
        )
    # Under autocast rotary leaves queries and keys in float32 while values are bf16; kernels want one dtype.
    q, k = q.to(v.dtype), k.to(v.dtype)
    if backend == "auto":
        backend = choose(v.device, v.dtype, v.shape[3])
    elif reason := why_not(backend, v.device, v.dtype, v.shape[3]):
        raise ValueError(f"attention backend {backend!r} cannot run here: {reason}; choose auto, or sdpa, which runs anywhere")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[backend].attention(q, k, v, layout, scale=scale, inv_freq=inv_freq, unread=unread)


@cache
def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that "auto" stands for: the first of `PREFERRED` that runs on this device; logs it, with why, once."""
    reasons = {name: why_not(name, device, dtype, head_dim) for name in PREFERRED}
    chosen = next(name for name, reason in reasons.items() if reason is None)
    before = [f"not {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    log.info("gist attention on %s in %s: %s", device, str(dtype).removeprefix("torch."), "; ".join([chosen, *before]))
    return chosen


@cache
def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot run on a device in a dtype, in a few words; None if it can.

    A fused kernel is tried on a few rows, once: versions differ in how they align a causal mask, and a kernel that was built
    for another GPU fails only when it runs. Raises ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}: choose auto or one of {', '.join(sorted(BACKENDS))}")
    return BACKENDS[backend].why_not(device, dtype, head_dim)
