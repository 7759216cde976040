"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the rows of the compress region only, in PEFT's file format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig, TaskType
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hyperllama.base.decoder import layers_of, part, require
from hyperllama.base.distributed import sharded
from hyperllama.base.tensor_files import load_parameters
from hyperllama.errors import UserError
from hyperllama.files import write_atomically
from hyperllama.hypernetworks.last_layer import LastLayerSkip

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class RowLora(nn.Module):
    """Low-rank updates of a frozen decoder's linear layers for one slice of rows.

    The decoder is not touched: forward hooks add `scaling * B(A(x))` to the first `gist_layout.compress_rows` rows of each
    linear layer's output, and only in a call that names this object with `gist_lora=`. Every other row, and every other
    call, is computed by the decoder alone, bit for bit. PEFT's own layers cannot do this: they pick adapters per sample.

    `targets` is "all-linear" (every linear layer inside the decoder layers) or names such as ["q_proj", "v_proj"]. In the last
    layer only keys and values matter for these rows, so it has no update elsewhere, and nothing else is computed for them
    (`LastLayerSkip`).
    A starts as PEFT's default (Kaiming uniform), B at zero. Parameters are float32 whatever the decoder's dtype.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
    ):
        super().__init__()
        require(base, ["attention"], "LoRA on a context's rows")
        self.rank, self.alpha = rank, alpha
        self.rows = self.left_out = 0
        self.queries_kept = False
        layers = layers_of(base)
        prefix = next(name for name, module in base.named_modules() if module is layers)
        # A model's own kind of linear layer, such as a router's, may return more than a product.
        found = {name: module for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
        linears = {f"{prefix}.{n}": m for n, m in found.items() if not type(m).__module__.startswith("transformers.models")}
        available = sorted({name.rsplit(".", 1)[-1] for name in linears})
        self.targets = available if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
        unknown = sorted(set(self.targets) - set(available))
        if unknown or not self.targets:
            raise UserError(
                f"lora.targets: the model has no linear layers {unknown}; choose all-linear or from {', '.join(available)}"
            )
        self.skip = LastLayerSkip(base, lora=self)
        skipped = {linear for module in self.skip.modules for linear in module.modules()}
        chosen = [name for name in linears if name.rsplit(".", 1)[-1] in self.targets]
        self.names = [name for name in chosen if linears[name] not in skipped]
        # Kernels in 4 bits take no product without rows.
        self.fewest = int(not all(linear.weight.is_floating_point() for linear in linears.values()))
        self.dropout = nn.Dropout(dropout)
        self.A, self.B = nn.ModuleDict(), nn.ModuleDict()
        for name in self.names:
            linear, key = linears[name], _key(name)
            place = {"device": linear.weight.device, "dtype": torch.float32, "bias": False}
            self.A[key] = nn.Linear(linear.in_features, rank, **place)
            self.B[key] = nn.Linear(rank, linear.out_features, **place)
            nn.init.kaiming_uniform_(self.A[key].weight, a=5**0.5)
            nn.init.zeros_(self.B[key].weight)
        self._hooks: list[RemovableHandle] = [
            linears[name].register_forward_hook(self._update(_key(name))) for name in self.names
        ]
        for layer in layers:
            # Attention runs first in a layer and is given the call's arguments, also when gradient checkpointing runs the
            # layer again: so it decides for the layer, and no state outlives a call to mislead another.
            attention = part(layer, "attention")
            self._hooks.append(attention.register_forward_pre_hook(self._choose_rows, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off the decoder."""
        self.skip.remove()
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def from_row(self, start: int) -> Iterator[None]:
        """A context in which a layer's modules are given its rows from `start` on, not all of them."""
        rows = self.rows
        self.rows = max(rows - start, 0)
        try:
            yield
        finally:
            self.rows = rows

    def _choose_rows(self, attention, args, kwargs):
        layout = kwargs.get("gist_layout")
        self.rows = layout.compress_rows if kwargs.get("gist_lora") is self else 0
        kept = kwargs.get("gist_kept")
        self.queries_kept = kept is not None and kept.queries_of is not None
        self.left_out = min(self.rows, layout.tokens - self.fewest) if self.rows and self.skip.modules else 0
        return (args, {**kwargs, "gist_unread": self.left_out}) if attention is self.skip.attention else None

    def _update(self, key: str):
        scaling = self.alpha / self.rank

        def add(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not self.rows:
                return
            if output.ndim == 2:  # as routers of experts take rows
                output, args = output[None], (args[0][None],)
            x = args[0][:, : self.rows]
            if torch.is_grad_enabled() or sharded():
                if not torch.is_autocast_enabled(x.device.type):
                    x = x.to(self.A[key].weight.dtype)
                x = self.dropout(x)
                # Scaled where it is narrow: `alpha` of an addition would scale whole gradients.
                output[:, : self.rows].add_(self.B[key](self.A[key](x) * scaling).to(output.dtype))
            else:
                # In the base's dtype, as autocast would, and the second product goes into the output without a copy.
                a, b = (side[key].weight.to(output.dtype) for side in (self.A, self.B))
                low = linear(self.dropout(x).to(output.dtype), a)
                own = output[0, : self.rows]
                torch.addmm(own, low[0], b.T, alpha=scaling, out=own)

        return add

    def save(self, folder: str | Path, base_name: str) -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors; stock PEFT then loads them onto every row."""
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout.p,
            target_modules=self.names,
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=base_name,
            inference_mode=True,
        ).to_dict()
        config["target_modules"] = sorted(config["target_modules"])
        tensors = {}
        for name in self.names:
            tensors[f"base_model.model.{name}.lora_A.weight"] = self.A[_key(name)].weight.detach().cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = self.B[_key(name)].weight.detach().cpu().contiguous()
        write_atomically(Path(folder) / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
        write_atomically(Path(folder) / ADAPTER_WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))

    def load(self, folder: str | Path) -> None:
        """Read weights that `save` wrote; UserError if they belong to other layers or another rank."""
        own = {}
        for name in self.names:
            own[f"base_model.model.{name}.lora_A.weight"] = self.A[_key(name)].weight
            own[f"base_model.model.{name}.lora_B.weight"] = self.B[_key(name)].weight
        load_parameters(Path(folder) / ADAPTER_WEIGHTS, own, "a whole safetensors file of LoRA")


def _key(name: str) -> str:
    # nn.ModuleDict takes no dots.
    return name.replace(".", "-")
