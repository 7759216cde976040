"""The parameter generator: learned queries look at an encoded instruction, and MLPs turn what they find into modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from hyperllama.hypernetworks.hint.settings import HintSettings


class Generator(nn.Module):
    """Encoded instructions in, prefix rows and adapters of every layer out (Ivison et al. 2023).

    `pairs` has the size b and the width `out` of each kind of adapters (see `Adapters`). There is a query
    for each prefix row and each column of a pair, to which the embedding of a layer is added: L * (P + sum of b) of them.
    One cross-attention over the encoded tokens, then a two-layer MLP for each kind of parameter, shared by all layers. What
    comes out is scaled by 1 / sqrt(hidden). The last layer of the MLP for an `up` starts at zero: at first adapters change
    nothing.
    """

    def __init__(
        self,
        hidden: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        prefix_rows: int,
        pairs: Mapping[str, tuple[int, int]],
        settings: HintSettings,
    ):
        super().__init__()
        self.layers, self.kv_heads, self.head_dim, self.heads = layers, kv_heads, head_dim, settings.heads
        self.sizes = {"prefix": prefix_rows, **{name: size for name, (size, _) in pairs.items()}}
        self.scale = hidden**-0.5
        inner = hidden if hidden % settings.heads == 0 else settings.heads * -(-hidden // settings.heads)
        self.queries = nn.Parameter(torch.randn(sum(self.sizes.values()), hidden))
        self.places = nn.Parameter(torch.randn(layers, hidden))
        self.read = nn.LayerNorm(hidden)
        self.ask, self.key, self.value = (nn.Linear(hidden, inner, bias=False) for _ in range(3))
        self.found, self.settle = nn.Linear(inner, hidden, bias=False), nn.LayerNorm(hidden)
        widths = {"prefix_keys": kv_heads * head_dim, "prefix_values": kv_heads * head_dim} if prefix_rows else {}
        for name, (_, out) in pairs.items():
            widths |= {f"{name}_down": hidden, f"{name}_up": out}
        self.mlps = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(hidden, settings.mlp_size), nn.GELU(), nn.Linear(settings.mlp_size, width))
                for name, width in widths.items()
            }
        )
        for name in pairs:
            nn.init.zeros_(self.mlps[f"{name}_up"][2].weight)
            nn.init.zeros_(self.mlps[f"{name}_up"][2].bias)

    def forward(self, encoded: Sequence[Tensor]) -> dict[str, Tensor]:
        """Encoded instructions (t_i, hidden), n of them -> their parameters by kind; kinds that have no size are left out.

        prefix_keys, prefix_values (L, n, N, P, D), keys without positions; of each kind of adapters, such as adapter,
        adapter_down (L, n, hidden, b) and adapter_up (L, n, b, out). What stands beside an instruction in the batch has no part
        in its modules: padding is masked.
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
        found = dict(zip(self.sizes, found.split(list(self.sizes.values()), 2), strict=True))
        made = {name: self.scale * mlp(found[name.rpartition("_")[0]]) for name, mlp in self.mlps.items()}
        for name in made:
            if name.startswith("prefix_"):
                made[name] = made[name].unflatten(-1, (self.kv_heads, self.head_dim)).transpose(2, 3)
            elif name.endswith("_down"):
                made[name] = made[name].transpose(2, 3)
        return made

    def _heads(self, x: Tensor) -> Tensor:
        """(n, rows, width) -> (n, heads, rows, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
