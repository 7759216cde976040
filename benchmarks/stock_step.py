"""What a user would write with stock parts: PEFT's LoRA or prefix tuning on transformers, as Trainer and TRL hand batches over.

There is no hypernetwork in it. A context stands in the prompt of each of its queries, and what is trained reads it in full
attention; the loss is that of the answers. So it is the same text and the same targets, but another thing that is learned.

"peft packed": one row without padding, from transformers' DataCollatorWithFlattening; TRL's SFTTrainer makes the same row with
    `padding_free` or `packing`. No attention mask is given, so transformers sees in the position ids where a row begins, and
    makes a block mask of T x T for the kernel "sdpa". (flash-attn, which needs no such mask, does not run on a CPU.)
"peft packed, targets": the same with logits of target rows only, which neither library does by itself.
"peft one by one": a pass and a backward pass for every row, gradients accumulated. No padding and no mask, whatever the kernel.
"peft an episode": packed, but a row per episode, its queries behind each other as turns of a conversation. A query then
    sees the queries and answers before it: cheaper, and not what a query is answered from later.
"peft prefix tuning": padded rows. Packed ones cannot be had: transformers looks for rows in position ids only where no keys
    and values stand before them, and a prefix does. Rows would see each other, without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, PreTrainedModel, set_seed

from hyperllama.data.text import EncodedEpisode
from hyperllama.objectives.losses import TokenLoss, answer_cross_entropy

IGNORED = -100  # the label of a token that is no target
ALIKE = ("peft packed", "peft packed, targets", "peft one by one")  # these compute the same thing
STOCK = (*ALIKE, "peft an episode", "peft prefix tuning")


@dataclass(frozen=True)
class Way:
    """A way to compute a training step: the losses of its pieces, whose gradients add up, and the model that they are of."""

    pieces: Sequence[Callable[[], TokenLoss]]
    model: nn.Module


def rows_of(episodes: Sequence[EncodedEpisode], *, per_episode: bool = False) -> list[dict[str, list[int]]]:
    """Token ids and labels of a row per query, its context in front, or of a row per episode with all its queries."""
    rows = []
    for episode in episodes:
        for queries in [episode.queries] if per_episode else [[query] for query in episode.queries]:
            row = {"input_ids": list(episode.context), "labels": [IGNORED] * len(episode.context)}
            for prompt, answer in queries:
                row["input_ids"] += [*prompt, *answer]
                row["labels"] += [*[IGNORED] * len(prompt), *answer]
            rows.append(row)
    return rows


def stock_ways(
    make_base: Callable[[], PreTrainedModel], episodes: Sequence[EncodedEpisode], rank: int, rows: int
) -> dict[str, Way]:
    """The ways of stock PEFT by name: LoRA of `rank`, and a prefix of `rows` rows. Each adapter is on a base of its own."""
    lora = adapted(make_base(), LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    prefix = adapted(make_base(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows))
    each, whole = rows_of(episodes), rows_of(episodes, per_episode=True)
    pack = DataCollatorWithFlattening(return_tensors="pt")
    found = {
        "peft packed": Way([partial(loss_of, lora, pack(each))], lora),
        "peft packed, targets": Way([partial(loss_of_targets, lora, pack(each))], lora),
        "peft one by one": Way([partial(loss_of, lora, pack([row])) for row in each], lora),
        "peft an episode": Way([partial(loss_of, lora, pack(whole))], lora),
        "peft prefix tuning": Way([partial(loss_of, prefix, padded(each))], prefix),
    }
    return found


def adapted(base: PreTrainedModel, settings) -> PeftModel:
    """The base under stock attention with an adapter of PEFT that does something."""
    set_seed(0)
    base.set_attn_implementation("sdpa")
    model = get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.train()


def loss_of(model: PeftModel, batch: dict[str, Tensor]) -> TokenLoss:
    """The loss as the model itself computes it, with the logits of every row."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    count = (batch["labels"] != IGNORED).sum()
    return TokenLoss(model(**batch, use_cache=False).loss * count, count)


def loss_of_targets(model: PeftModel, batch: dict[str, Tensor]) -> TokenLoss:
    """The same with the logits of target rows only; the batch has one row."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")[0]
    places = (labels != IGNORED).nonzero()[:, 0]
    return answer_cross_entropy(model(**batch, use_cache=False, logits_to_keep=places - 1).logits[0], labels[places])


def padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows padded on the right to the longest."""
    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask, "labels": labels}
