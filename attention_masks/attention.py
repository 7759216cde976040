"""`gist_attention`: one signature for every kernel that can compute a reading graph."""

from collections.abc import Callable

from torch import Tensor

from attention_masks.dense import dense_attention
from attention_masks.layout import GistLayout
from attention_masks.sdpa import sdpa_attention

# The one door for kernels: a backend is a function (q, k, v, layout, *, scale, inv_freq) -> output under a name of its own.
BACKENDS: dict[str, Callable[..., Tensor]] = {"dense": dense_attention, "sdpa": sdpa_attention}


def gist_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: GistLayout,
    *,
    backend: str = "auto",
    scale: float | None = None,
    inv_freq: Tensor | None = None,
) -> Tensor:
    """Attention of a packed row under the gist mask of `layout`.

    q (1, H, T, D); k and v (1, N, T, D) with H a multiple of N (grouped-query heads); returns (1, H, T, D) in the dtype
    of `v`. `scale` multiplies the scores, 1 / sqrt(D) unless given. `inv_freq` (D_rotary / 2,) are the rotary inverse
    frequencies with which `k` was rotated: with them, keys that a reader sees at another distance than where they stand
    are moved (`layout.read_shifts`); without, every key is used as it is. `backend` is a name in `BACKENDS`, or "auto".

    The matrix that everyone gets wrong: a reader of 2 gists with 3 rows of its own is causal from the bottom right.

        gist gist own own own
         1    1    1   0   0
         1    1    1   1   0
         1    1    1   1   1

    Raises ValueError for shapes that do not fit the layout or each other, or an unknown backend.
    """
    if q.dim() != 4 or q.shape[0] != 1 or q.shape[2] != layout.tokens:
        raise ValueError(f"q must be (1, heads, {layout.tokens}, head_dim) for this layout, not {tuple(q.shape)}")
    if k.shape != v.shape or k.dim() != 4 or k.shape[0] != 1 or k.shape[2:] != q.shape[2:] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k and v must be (1, kv_heads, {layout.tokens}, {q.shape[3]}) with kv_heads a divisor of {q.shape[1]}, "
            f"not {tuple(k.shape)} and {tuple(v.shape)}"
        )
    name = "sdpa" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}: choose auto or one of {', '.join(sorted(BACKENDS))}")
    # Under autocast rotary leaves queries and keys in float32 while values are bf16; kernels want one dtype.
    q, k = q.to(v.dtype), k.to(v.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[name](q, k, v, layout, scale=scale, inv_freq=inv_freq)
