"""The segment rendering on PyTorch's own attention: one call for segments of one shape, no masked work.

For a segment, queries are its rows; keys are the gist rows that it reads followed by its own rows; causal, aligned
bottom-right. This is the fast path on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention_masks.layout import GistLayout, Run
from attention_masks.reading import read_gists


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GistLayout, *, scale: float, inv_freq: Tensor | None, unread: int = 0
) -> Tensor:
    """Attention segment by segment. Shapes and `unread` as in `gist_attention`.

    Rows are cut with `split`, whose backward is one concatenation; a slice per segment would instead sum as many
    gradients of full size as there are segments.
    """
    runs = layout.runs
    rows, reads = [run.count * run.tokens for run in runs], [run.count * run.reads for run in runs]
    own = [x.split(rows, 2) for x in (q, k, v)]
    read = [x.split(reads, 2) for x in read_gists(k, v, layout, inv_freq)]
    outputs = {}
    for members in _by_shape(layout, unread):
        run = runs[members[0]]
        q_run, k_run, v_run = (_fold([x[i] for i in members], run.tokens) for x in own)
        if run.reads:
            k_run, v_run = (
                torch.cat([_fold([x[i] for i in members], run.reads), x_run], 2) for x, x_run in zip(read, (k_run, v_run))
            )
        causal = not run.reads and len(run.parts) == 1
        mask = None if causal or run.tokens == 1 else _mask(run, q.device)
        settings = {"attn_mask": mask, "is_causal": causal and run.tokens > 1, "scale": scale}
        output = grouped_attention(q_run, k_run, v_run, **settings)
        for i, part in zip(members, output.transpose(1, 2).split([runs[i].count for i in members])):
            outputs[i] = part.flatten(0, 1)  # (count * tokens, H, D)
    pieces = [outputs[i] if i in outputs else q.new_zeros(n, q.shape[1], q.shape[3]) for i, n in enumerate(rows)]
    return torch.cat(pieces)[None].transpose(1, 2)


# Measured on a CPU with bf16 instructions: the kernel's backward pass in 16 bits takes 2 to 4 times as long as in float32 for
# up to so many rows, and as long for more. Its forward pass takes as long in both.
SHORT_ROWS = 256


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, **settings) -> Tensor:
    """PyTorch's attention of query heads that share keys and values: q (B, H, T, D), k and v (B, N, S, D).

    On a GPU no fused kernel takes shared heads together with a mask, or in more than 16 bits, and the one that is left holds
    all scores in memory. So there keys and values are repeated for every query head. On a CPU few rows of 16 bits whose
    gradients will be wanted are computed in float32.
    """
    if _faster_wide(q, k, v):
        with torch.autocast(q.device.type, enabled=False):
            return grouped_attention(q.float(), k.float(), v.float(), attn_mask=attn_mask, **settings).to(v.dtype)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and (attn_mask is not None or q.element_size() > 2) and _on_gpu(q):
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=q.shape[1] != k.shape[1], **settings)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _faster_wide(q: Tensor, k: Tensor, v: Tensor) -> bool:
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return wanted and q.device.type == "cpu" and v.dtype.itemsize == 2 and k.shape[2] <= SHORT_ROWS


def _by_shape(layout: GistLayout, unread: int) -> list[list[int]]:
    """Runs of one shape together, wherever they stand, without those whose rows are all among the first `unread`."""
    found: dict[tuple, list[int]] = {}
    for i, (run, end) in enumerate(zip(layout.runs, layout.run_ends)):
        if end > unread:
            found.setdefault((run.parts, run.reads), []).append(i)
    return list(found.values())


def _fold(pieces: list[Tensor], tokens: int) -> Tensor:
    """Pieces (1, heads, count * tokens, D) -> (all counts, heads, tokens, D); of one piece a view."""
    folded = [x.squeeze(0).unflatten(1, (-1, tokens)).transpose(0, 1) for x in pieces]
    return folded[0] if len(folded) == 1 else torch.cat(folded)


def _mask(run: Run, device: torch.device) -> Tensor:
    """(tokens, reads + tokens): every row sees what is read, and itself and what is before it in its part."""
    parts = [torch.ones(n, n, dtype=torch.bool, device=device).tril() for n in run.parts]
    return torch.nn.functional.pad(torch.block_diag(*parts), (run.reads, 0), value=True)
