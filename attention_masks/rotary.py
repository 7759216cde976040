"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.2) as far as gists need it: moving a key."""

import torch
from torch import Tensor


def rotate(keys: Tensor, shifts: Tensor, inv_freq: Tensor) -> Tensor:
    """Move keys that already carry their position by `shifts` positions.

    keys (..., R, D) with the halves of D paired, as transformers' `rotate_half` pairs them; shifts (R,), whole numbers;
    inv_freq (D_rotary / 2,), the model's inverse frequencies. Dimensions beyond D_rotary are left alone. A scale that the
    model multiplies into its keys (yarn's attention scaling) stays as it is, since only the angle changes. Computed in
    float32 and returned in the dtype of `keys`: bf16 sines would be off by more than a gist can bear, and float64 would not
    undo a rotation of the model's, whose angles are rounded to float32. Shifts are exact there up to 2^24.
    """
    angles = shifts.float()[:, None] * inv_freq.float()  # (R, D_rotary / 2)
    cos, sin = angles.cos(), angles.sin()
    half = inv_freq.numel()
    first, second, rest = keys.float().split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(keys.dtype)
