"""What every trainable model over packed batches has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hyperllama.base.checks import check_vocabulary
from hyperllama.base.decoder import has_plain_head, packed_arguments
from hyperllama.base.distributed import gather_with
from hyperllama.data.packing import GistBatch
from hyperllama.objectives.losses import HeadCrossEntropy, TokenLoss, counted
from hyperllama.objectives.mix import ANSWERS, Mix, summed


class PackedModel(nn.Module):
    """A decoder that answers packed batches. Subclasses add `forward`, `save_pretrained` and `load_weights`."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, backend: str):
        super().__init__()
        check_vocabulary(base, tokenizer)
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
        apart: bool = False,
        **inputs,
    ) -> TokenLoss:
        """The loss of a batch's targets, with the output head on target rows only. `inputs` go to the decoder.

        Where there are many targets and words, logits are computed in chunks (`hyperllama.objectives.losses.LOGITS`).
        `states`: keys and values of each layer for the first rows, see `attention_masks.registration.layout_arguments`; with
        `apart` there is nothing else of these rows, and `inputs` begin behind them.
        `teacher` (answers, hidden size): the teacher's hidden states at the answers' targets, if an objective of `mix` has one.
        The count is that of the answers: the other objectives join as means of their own.
        """
        inputs |= {"use_cache": False, **packed_arguments(self.base, batch.layout, self.backend, states, apart)}
        predicting = batch.target_rows - (states[0][0].shape[1] if apart and states else 0)
        n = len(batch.targets) if batch.answers is None else batch.answers
        answers, again = mix.weighing("answers"), mix.weighing("context")
        weight = None if self.head_loss is None else self.base.get_output_embeddings().weight
        if weight is None:
            outputs = self.base(**inputs, logits_to_keep=predicting).logits[0]
        else:
            outputs = self.base.get_decoder()(**inputs).last_hidden_state[0].index_select(0, predicting)

        def loss(rows: slice, weights: Mapping[str, float], teacher: Tensor | None = None) -> Tensor:
            if weight is None:
                return summed(weights, outputs[rows], batch.targets[rows])
            return self.head_loss(outputs[rows], batch.targets[rows], weight=weight, weights=weights, teacher=teacher)

        total = loss(slice(n), answers, teacher)
        if again:  # on every rank, or ZeRO-3 would wait for one that gathers less often
            total = total + loss(slice(n, None), again) * (n / max(1, len(batch.targets) - n))
        return counted(total, batch.targets[:n])

    @torch.no_grad()
    def taught(self, batch: GistBatch, states: Sequence[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Hidden states (n, hidden size) of the base alone at a batch's targets.

        `states`: keys and values of each layer for the first rows, if they have been computed already.
        """
        first = states[0][0].shape[1] if states else 0
        hidden = self.base.get_decoder()(
            input_ids=batch.ids[:, first:],
            use_cache=False,
            **packed_arguments(self.base, batch.layout, self.backend, states, apart=True),
        ).last_hidden_state
        return hidden[0].index_select(0, batch.target_rows - first)

    @property
    def decoders(self) -> list[PreTrainedModel]:
        """The models whose layers a training step runs."""
        return [self.base]

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """Called by the Trainer when `gradient_checkpointing` is set; older versions of transformers call the name below."""
        for model in self.decoders:
            model.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """As `activation_checkpointing_enable`, by its older name."""
        for model in self.decoders:
            model.gradient_checkpointing_enable(*args, **kwargs)
