"""The parameter generator: learned queries look at an encoded instruction, and MLPs turn what they find into modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from hyperllama.hint.settings import HintSettings


class Generator(nn.Module):
    """Encoded instructions in, prefix rows and adapters of every layer out (Ivison et al. 2023).

    There is a query for each prefix row and each column of an adapter, to which the embedding of a layer is added: L * (P + b)
    of them. One cross-attention over the encoded tokens, then a two-layer MLP for each kind of parameter, shared by all layers.
    What comes out is scaled by 1 / sqrt(hidden). The last layer of the MLP for `adapter_up` starts at zero: at first
    adapters change nothing.
    """

    def __init__(self, hidden: int, layers: int, kv_heads: int, head_dim: int, prefix_rows: int, settings: HintSettings):
        super().__init__()
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.prefix_rows, self.size, self.heads = prefix_rows, settings.adapter_size, settings.heads
        self.scale = hidden**-0.5
        inner = hidden if hidden % settings.heads == 0 else settings.heads * -(-hidden // settings.heads)
        self.queries = nn.Parameter(torch.randn(prefix_rows + self.size, hidden))
        self.places = nn.Parameter(torch.randn(layers, hidden))
        self.read = nn.LayerNorm(hidden)
        self.ask, self.key, self.value = (nn.Linear(hidden, inner, bias=False) for _ in range(3))
        self.found, self.settle = nn.Linear(inner, hidden, bias=False), nn.LayerNorm(hidden)
        widths = {"prefix_keys": kv_heads * head_dim, "prefix_values": kv_heads * head_dim} if prefix_rows else {}
        widths |= {"adapter_down": hidden, "adapter_up": hidden} if self.size else {}
        self.mlps = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(hidden, settings.mlp_size), nn.GELU(), nn.Linear(settings.mlp_size, width))
                for name, width in widths.items()
            }
        )
        if self.size:
            nn.init.zeros_(self.mlps["adapter_up"][2].weight)
            nn.init.zeros_(self.mlps["adapter_up"][2].bias)

    def forward(self, encoded: Sequence[Tensor]) -> dict[str, Tensor]:
        """Encoded instructions (t_i, hidden), n of them -> their parameters by kind; kinds that have no size are left out.

        prefix_keys, prefix_values (L, n, N, P, D), keys without positions; adapter_down (L, n, hidden, b), adapter_up (L, n, b,
        hidden). What stands beside an instruction in the batch has no part in its modules: padding is masked.
        """
        n, lengths = len(encoded), torch.tensor([len(one) for one in encoded], device=self.queries.device)
        states = self.read(pad_sequence([one.to(self.queries.dtype) for one in encoded], batch_first=True))  # (n, t, hidden)
        real = torch.arange(states.shape[1], device=states.device)[None] < lengths[:, None]
        queries = (self.queries[None] + self.places[:, None]).flatten(0, 1)  # (L * (P + b), hidden)
        ask = self._heads(self.ask(queries)[None]).expand(n, -1, -1, -1)
        seen = scaled_dot_product_attention(
            ask, self._heads(self.key(states)), self._heads(self.value(states)), attn_mask=real[:, None, None]
        )
        found = self.settle(queries + self.found(seen.transpose(1, 2).flatten(2)))
        found = found.unflatten(1, (self.layers, -1)).transpose(0, 1)  # (L, n, P + b, hidden)
        rows, columns = found.split([self.prefix_rows, self.size], 2)
        made = {name: self.scale * mlp(rows if "prefix" in name else columns) for name, mlp in self.mlps.items()}
        for name in {"prefix_keys", "prefix_values"} & set(made):
            made[name] = made[name].unflatten(-1, (self.kv_heads, self.head_dim)).transpose(2, 3)
        if self.size:
            made["adapter_down"] = made["adapter_down"].transpose(2, 3)
        return made

    def _heads(self, x: Tensor) -> Tensor:
        """(n, rows, width) -> (n, heads, rows, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
