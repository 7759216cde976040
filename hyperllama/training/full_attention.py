"""The multi-task full-attention baseline (Phang 2024, section 4): demonstrations in plain sight."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyperllama.base.copies import train_all
from hyperllama.base.loading import load_weights_into
from hyperllama.base.tensor_files import load_parameters
from hyperllama.data.packing import GistBatch
from hyperllama.files import write_atomically
from hyperllama.hypernetworks.row_lora import ADAPTER_WEIGHTS
from hyperllama.objectives.losses import TokenLoss
from hyperllama.objectives.packed_model import PackedModel

ADAPTER = "adapter"


class FullAttention(PackedModel):
    """A causal LM on packed batches of segments without gists: all of its weights are trained, or PEFT's LoRA on every row.

    With LoRA the base stays frozen in whatever dtype it has, and the adapter is float32.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        backend: str = "auto",
        lora: LoraConfig | None = None,
    ):
        super().__init__(base.requires_grad_(False), tokenizer, backend)
        if lora is None:
            train_all(base, "full_attention")
        self.lora = lora
        if lora is not None:
            inject_adapter_in_model(lora, base)
            for weight in base.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.float()

    def forward(self, batch: GistBatch) -> TokenLoss:
        """Summed cross entropy of the batch's targets and their count."""
        return self.answer_loss(batch, input_ids=batch.ids)

    def save_pretrained(self, folder: str | Path, notes: dict | None = None) -> None:
        """Write the model and its tokenizer as transformers do, so that `model.name_or_path` of a recipe can be this folder.

        LoRA is merged into that model, and in the folder `adapter` in PEFT's two files: beside the model transformers would
        add it once more.
        """
        folder = Path(folder)
        (self.base if self.lora is None else merged(self.base)).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.lora is not None:
            adapter = {name: weight.cpu().contiguous() for name, weight in self._adapter().items()}
            (folder / ADAPTER).mkdir(exist_ok=True)
            write_atomically(folder / ADAPTER / ADAPTER_WEIGHTS, save(adapter, {"format": "pt"}))
            self.lora.save_pretrained(str(folder / ADAPTER))

    def load_weights(self, folder: str | Path) -> None:
        """Read weights that `save_pretrained` wrote."""
        if self.lora is None:
            load_weights_into(self.base, folder)
        else:
            load_parameters(Path(folder) / ADAPTER / ADAPTER_WEIGHTS, self._adapter(), "a whole safetensors file of LoRA")

    def _adapter(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, by stock PEFT's names: it wraps a model where they are put into one here."""
        return {f"base_model.model.{name}": weight for name, weight in get_peft_model_state_dict(self.base).items()}


def lora_config(base_name: str | None, *, rank: int, alpha: float, dropout: float, targets: list[str]) -> LoraConfig:
    """PEFT's settings for LoRA on every row: of the linear layers `targets`; where it is empty, of all but the output head."""
    chosen = list(targets) or "all-linear"
    settings = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": chosen}
    return LoraConfig(**settings, task_type=TaskType.CAUSAL_LM, base_model_name_or_path=base_name)


@torch.no_grad()
def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with PEFT layers, their updates added to its weights and the layers plain again."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            plain.set_submodule(name, module.get_base_layer())
    return plain
