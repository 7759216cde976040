"""What every trainable model over packed batches has in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hyperllama.base.decoder import packed_arguments
from hyperllama.base.distributed import gather_with
from hyperllama.data.packing import GistBatch
from hyperllama.objectives.losses import HeadCrossEntropy, TokenLoss, answer_cross_entropy, counted
from hyperllama.objectives.mix import ANSWERS, Mix

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

    def answer_loss(
        self,
        batch: GistBatch,
        states: Sequence[tuple[Tensor, Tensor]] | None = None,
        *,
        mix: Mix = ANSWERS,
        teacher: Tensor | None = None,
        **inputs,
    ) -> TokenLoss:
        """The loss of a batch's targets, with the output head on target rows only. `inputs` go to the decoder.

        Where there are many targets and words, logits are computed in chunks (`hyperllama.objectives.losses.LOGITS`).
        `states`: keys and values of each layer for the first rows, see `attention_masks.registration.layout_arguments`.
        `teacher` (answers, hidden size): what the answers' targets are to be predicted like, if `mix` says so.
        The count is that of the answers: the other objectives join as means of their own.
        """
        inputs |= {"use_cache": False, **packed_arguments(self.base, batch.layout, self.backend, states)}
        answers = len(batch.targets) if batch.answers is None else batch.answers
        again = mix.reconstruction * answers / max(1, len(batch.targets) - answers)
        if self.head_loss is None:
            logits = self.base(**inputs, logits_to_keep=batch.target_rows).logits[0]
            summed = mix.answer * answer_cross_entropy(logits[:answers], batch.targets[:answers]).sum
            if again:
                summed = summed + again * answer_cross_entropy(logits[answers:], batch.targets[answers:]).sum
            return counted(summed, batch.targets[:answers])
        hidden = self.base.get_decoder()(**inputs).last_hidden_state[0].index_select(0, batch.target_rows)
        weight = self.base.get_output_embeddings().weight
        summed = self.head_loss(hidden[:answers], batch.targets[:answers], weight=weight, teacher=teacher, mix=mix)
        if again:
            summed = summed + again * self.head_loss(hidden[answers:], batch.targets[answers:], weight=weight)
        return counted(summed, batch.targets[:answers])

    @torch.no_grad()
    def taught(self, batch: GistBatch) -> Tensor:
        """Hidden states (n, hidden size) of the base alone at a batch's targets."""
        hidden = self.base.get_decoder()(
            input_ids=batch.ids, use_cache=False, **packed_arguments(self.base, batch.layout, self.backend)
        ).last_hidden_state
        return hidden[0].index_select(0, batch.target_rows)

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
