"""Stand-ins for fused kernels: their exact signatures and semantics in plain Python: packing is tested without a GPU."""

import torch


def attend(q, k, v, ends_q, ends_k, max_q, max_k, scale, bottom_right=True):
    """Causal attention of each segment, in float32, row by row; a row that sees nothing gives zeros.

    q (T_q, H, D), k and v (T_k, N, D); ends int32 (n + 1,). Checks what the real kernels rely on.
    """
    for ends, rows, longest in ((ends_q, len(q), max_q), (ends_k, len(k), max_k)):
        assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == rows and ends.is_contiguous()
        assert type(longest) is int and longest == ends.diff().max(), "kernels size their grids by it"
    assert len(ends_q) == len(ends_k) and k.shape == v.shape and q.dtype == k.dtype == v.dtype
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "kernels read heads as they lie"
    groups, rows = q.shape[1] // k.shape[1], []
    for a, b, c, d in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), ends_k[:-1].tolist(), ends_k[1:].tolist()):
        for i in range(b - a):
            seen = (d - c) - (b - a) + i + 1 if bottom_right else i + 1
            if seen <= 0:
                rows.append(torch.zeros_like(q[0]))
                continue
            keys, values = (x[c : c + seen].float().repeat_interleave(groups, 1) for x in (k, v))
            weights = (torch.einsum("hd,khd->hk", q[a + i].float(), keys) * scale).softmax(-1)
            rows.append(torch.einsum("hk,khd->hd", weights, values).to(q.dtype))
    return torch.stack(rows)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn 2.8."""
    assert causal and dropout_p == 0 and softmax_scale is not None and window_size == (-1, -1) and block_table is None
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)


def varlen_attn_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """torch 2.11: grouped heads need no word."""
    assert window_size == (-1, 0) and scale is not None, "causal"
    return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


def varlen_attn_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """torch 2.12 and 2.13: grouped heads have to be announced."""
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    assert window_size == (-1, 0) and scale is not None, "causal"
    return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)
