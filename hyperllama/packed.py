"""What every trainable model over packed batches has in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hyperllama.backbone import packed_arguments
from hyperllama.data.packing import GistBatch
from hyperllama.objectives import TokenLoss, answer_cross_entropy, chunked_cross_entropy, head_chunks

# Models whose logits are what their head returns and nothing else: no scale, no soft cap. Others are asked for their logits.
PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3")


class PackedModel(nn.Module):
    """A decoder that answers packed batches. Subclasses add `forward`, `save_pretrained` and `load_weights`."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, backend: str):
        super().__init__()
        self.base, self.tokenizer, self.backend = base, tokenizer, backend

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
        chunks = head_chunks(len(batch.targets), self.config.vocab_size)
        if chunks == 1 or self.config.model_type not in PLAIN_HEADS:
            logits = self.base(**inputs, logits_to_keep=batch.target_rows).logits
            return answer_cross_entropy(logits[0], batch.targets)
        hidden = self.base.get_decoder()(**inputs).last_hidden_state[0].index_select(0, batch.target_rows)
        return chunked_cross_entropy(self.base.get_output_embeddings(), hidden, batch.targets, chunks)

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """Called by the Trainer when `gradient_checkpointing` is set; older versions of transformers call the name below."""
        self.base.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """As `activation_checkpointing_enable`, by its older name."""
        self.base.gradient_checkpointing_enable(*args, **kwargs)
