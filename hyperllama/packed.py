"""What every trainable model over packed batches has in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hyperllama.backbone import packed_arguments
from hyperllama.data.packing import GistBatch
from hyperllama.distributed import gather_with
from hyperllama.objectives import HeadCrossEntropy, TokenLoss, answer_cross_entropy, counted

# Models whose logits are what their head returns and nothing else: no scale, no soft cap.
PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3")


class PackedModel(nn.Module):
    """A decoder that answers packed batches. Subclasses add `forward`, `save_pretrained` and `load_weights`."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, backend: str):
        super().__init__()
        self.base, self.tokenizer, self.backend = base, tokenizer, backend
        self.head_loss = HeadCrossEntropy() if has_plain_head(base) else None
        if self.head_loss is not None:
            gather_with(self.head_loss, base.get_output_embeddings().weight)

    @property
    def config(self) -> PretrainedConfig:
        """The base's: its sizes are what DeepSpeed's "auto" settings follow."""
        return self.base.config

    def answer_loss(self, batch: GistBatch, states: Sequence[tuple[Tensor, Tensor]] | None = None, **inputs) -> TokenLoss:
        """Cross entropy of a batch's targets, with the output head on target rows only. `inputs` go to the decoder.

        Where there are many targets and words, logits are computed in chunks (`hyperllama.objectives.LOGITS`).
        `states`: keys and values of each layer for the first rows, see `attention_masks.registration.layout_arguments`.
        """
        inputs |= {"use_cache": False, **packed_arguments(self.base, batch.layout, self.backend, states)}
        if self.head_loss is None:
            logits = self.base(**inputs, logits_to_keep=batch.target_rows).logits
            return answer_cross_entropy(logits[0], batch.targets)
        hidden = self.base.get_decoder()(**inputs).last_hidden_state[0].index_select(0, batch.target_rows)
        summed = self.head_loss(hidden, batch.targets, weight=self.base.get_output_embeddings().weight)
        return counted(summed, batch.targets)

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """Called by the Trainer when `gradient_checkpointing` is set; older versions of transformers call the name below."""
        self.base.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """As `activation_checkpointing_enable`, by its older name."""
        self.base.gradient_checkpointing_enable(*args, **kwargs)


def has_plain_head(base: PreTrainedModel) -> bool:
    """Whether a model's logits are known to be a product with its head's weights; all others are asked for their logits."""
    head = base.get_output_embeddings()
    return base.config.model_type in PLAIN_HEADS and type(head) is nn.Linear and head.bias is None
