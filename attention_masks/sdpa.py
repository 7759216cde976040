"""The segment rendering on PyTorch's own attention: one call per run of segments of one shape, no masked work.

For a segment, queries are its rows; keys are the gist rows that it reads followed by its own rows; causal, aligned
bottom-right. This is the fast path on a CPU.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention_masks.layout import GistLayout
from attention_masks.rotary import rotate


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, layout: GistLayout, *, scale: float, inv_freq: Tensor | None) -> Tensor:
    """Attention segment by segment. Shapes as in `gist_attention`.

    Rows are cut with `split`, whose backward is one concatenation; a slice per segment would instead sum as many
    gradients of full size as there are segments.
    """
    k_read, v_read = _read(k, v, layout, inv_freq)
    if layout.reordered:
        q, k, v = (x.index_select(2, layout.order) for x in (q, k, v))
    rows = [run.count * run.tokens for run in layout.runs]
    read_rows = [run.count * run.reads for run in layout.runs]
    outputs = []
    for run, q_run, k_run, v_run, k_gists, v_gists in zip(
        layout.runs,
        q.split(rows, 2),
        k.split(rows, 2),
        v.split(rows, 2),
        k_read.split(read_rows, 2),
        v_read.split(read_rows, 2),
    ):
        q_run, k_run, v_run = (_fold(x, run.count, run.tokens) for x in (q_run, k_run, v_run))
        mask = None
        if run.reads:
            k_run = torch.cat([_fold(k_gists, run.count, run.reads), k_run], dim=2)
            v_run = torch.cat([_fold(v_gists, run.count, run.reads), v_run], dim=2)
            if run.tokens > 1:
                mask = torch.ones(run.tokens, run.reads + run.tokens, dtype=torch.bool, device=q.device).tril(run.reads)
        output = scaled_dot_product_attention(
            q_run,
            k_run,
            v_run,
            attn_mask=mask,
            is_causal=not run.reads and run.tokens > 1,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (count * tokens, H, D)
    output = torch.cat(outputs)[None].transpose(1, 2)
    return output.index_select(2, layout.inverse) if layout.reordered else output


def _read(k: Tensor, v: Tensor, layout: GistLayout, inv_freq: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values (1, N, R, D) of every gist row that is read, once per reader, moved to where its reader sees it."""
    if not len(layout.read_rows):  # gathering nothing would still cost a gradient of full size
        return k.new_empty(*k.shape[:2], 0, k.shape[3]), v.new_empty(*v.shape[:2], 0, v.shape[3])
    k_read, v_read = k.index_select(2, layout.read_rows), v.index_select(2, layout.read_rows)
    return (rotate(k_read, layout.read_shifts, inv_freq) if layout.shifted and inv_freq is not None else k_read), v_read


def _fold(x: Tensor, count: int, tokens: int) -> Tensor:
    """(1, heads, count * tokens, D) -> (count, heads, tokens, D), a view."""
    return x.squeeze(0).unflatten(1, (count, tokens)).transpose(0, 1)
