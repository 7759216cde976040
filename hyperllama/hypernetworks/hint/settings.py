"""What modules an instruction becomes, and how large their generator is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class HintSettings:
    """Which modules HINT generates beside the prefix rows, which are `gist.tokens`, and with what (Ivison et al. 2023).

    `adapter_size`, b, is the bottleneck of the adapters beside MLPs, `lora_rank` that of LoRA beside the projections of queries
    and values (Hu et al. 2021, arXiv 2106.09685); 0 for none. `fusion` keeps the encoded instruction as rows to be read,
    projected by each layer's own key and value projections with LoRA of rank `fusion_rank` (0 for none).
    `heads` and `mlp_size` are those of the generator. regime: "frozen" trains the generator alone; "paper" trains the model
    with it, as the original does, so that the modules belong to the trained model.
    """

    adapter_size: int = 16
    lora_rank: int = 0
    fusion: bool = True
    fusion_rank: int = 16
    heads: int = 4
    mlp_size: int = 256
    regime: Literal["frozen", "paper"] = "frozen"

    def sizes(self) -> dict[str, int]:
        """b of each kind of adapters that is generated, by the names of `hyperllama.base.adapters`."""
        sizes = {"adapter": self.adapter_size, "q_proj": self.lora_rank, "v_proj": self.lora_rank}
        return {name: size for name, size in sizes.items() if size}

    def problems(self, prefix_rows: int) -> list[str]:
        """What is wrong with the sizes, a sentence each."""
        found = []
        for name, least in (("adapter_size", 0), ("lora_rank", 0), ("fusion_rank", 0), ("heads", 1), ("mlp_size", 1)):
            if getattr(self, name) < least:
                found.append(f"{name} must be at least {least}")
        if prefix_rows == 0 and not self.sizes() and not self.fusion:
            found.append("nothing is generated: give gist.tokens, adapter_size, lora_rank or fusion")
        return found
