"""What modules an instruction becomes, and how large their generator is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hyperllama.hypernetworks.settings import KindSettings, taught_by_what_changes


@dataclass(frozen=True)
class HintSettings(KindSettings):
    """Which modules HINT generates beside the prefix rows, which are `gist.tokens`, and with what (Ivison et al. 2023).

    `adapter_size`, b, is the bottleneck of the adapters beside MLPs, `lora_rank` that of LoRA beside the projections of queries
    and values (Hu et al. 2021, arXiv 2106.09685); 0 for none. `fusion` keeps the encoded instruction as rows to be read,
    projected by each layer's own key and value projections with LoRA of rank `fusion_rank` (0 for none). What a layer projects
    is, by `fusion_of`, "layers": the states that it read itself, so that the rows begin as those of a cached prompt; or
    "final": the encoder's last states, as in the paper, which a decoder that is not trained for it cannot read.
    `heads` and `mlp_size` are those of the generator. regime: "frozen" trains the generator alone; "paper" trains the model
    with it, as the original does, so that the modules belong to the trained model.
    """

    kind = "hint"
    home = "hyperllama.hypernetworks.hint.hypernetwork:HintHypernetwork"
    summary = "modules of an encoded instruction: prefix rows, adapters and rows of its encoding"
    makes_modules = True
    fewest_rows = 0

    adapter_size: int = 16
    lora_rank: int = 0
    fusion: bool = True
    fusion_rank: int = 16
    fusion_of: Literal["layers", "final"] = "final"
    heads: int = 4
    mlp_size: int = 256
    regime: Literal["frozen", "paper"] = "frozen"

    def sizes(self) -> dict[str, int]:
        """b of each kind of adapters that is generated, by the names of `hyperllama.base.adapters`."""
        sizes = {"adapter": self.adapter_size, "q_proj": self.lora_rank, "v_proj": self.lora_rank}
        return {name: size for name, size in sizes.items() if size}

    @property
    def trains_base(self) -> bool:
        return self.regime == "paper"

    @property
    def keeps_context(self) -> bool:
        return self.fusion

    def has_sink(self, rows: int) -> bool:
        return bool(rows or self.fusion)

    def arguments(self, recipe: Any) -> dict[str, Any]:
        return {"hint": self}

    def state_bytes(self, cost: Any, context: int, rows: int) -> dict[str, int]:
        parts = super().state_bytes(cost, context, rows)
        parts |= {f"{context} fused rows": cost.state_bytes(context)} if self.fusion else {}
        for kind, size in self.sizes().items():
            name = "adapters" if kind == "adapter" else f"LoRA beside {kind}"
            parts[f"{name} of {size}"] = cost.module_bytes(0, {kind: size})
        return parts

    def problems(self, recipe: Any) -> list[str]:
        gist, wrong = recipe.gist, [f"hint: {problem}" for problem in self.size_problems(recipe.gist.tokens)]
        if gist.chunking.graph != "single":
            wrong.append("gist.chunking.graph: hint reads an instruction as a whole; choose single")
        if gist.elastic:
            wrong.append("gist.elastic: the modules of hint have one size; set it to false")
        return wrong + (taught_by_what_changes(recipe, "the regime paper") if self.trains_base else [])

    def size_problems(self, prefix_rows: int) -> list[str]:
        """What is wrong with the sizes, a sentence each."""
        found = []
        for name, least in (("adapter_size", 0), ("lora_rank", 0), ("fusion_rank", 0), ("heads", 1), ("mlp_size", 1)):
            if getattr(self, name) < least:
                found.append(f"{name} must be at least {least}")
        if prefix_rows == 0 and not self.sizes() and not self.fusion:
            found.append("nothing is generated: give gist.tokens, adapter_size, lora_rank or fusion")
        return found
