"""How good is a prefix? Each demonstration in turn is held back and asked of a prefix that is made of the others."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hyperllama.data.episode import Example, merged
from hyperllama.data.packing import nested_gists
from hyperllama.data.text import Encoder
from hyperllama.errors import UserError
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.inference.reader import Reader
from hyperllama.inference.scoring import Question, answer_distributions

MOST_CHOICES = 20  # more different outputs than that are not a choice among labels


def leave_one_out(
    hypernetwork: Hypernetwork,
    reader: Reader,
    encoder: Encoder,
    instruction: str,
    demonstrations: Sequence[Example],
    *,
    most: int = 16,
    gists: int | None = None,
) -> dict[str, float]:
    """What a prefix of these demonstrations is worth, by the answers to at most `most` of them that it has not seen.

    The prefix has `gists` gists, all that the hypernetwork makes unless given.

    loss_prefix, loss_full_context and loss_no_context are nats per token of the answers, kl_prefix and kl_no_context nats per
    token by which the model's answers differ from those with the full context. Where outputs are few and recur, they are taken
    as choices, and accuracy_... are shares. UserError for fewer than two demonstrations: one is held back.
    """
    demonstrations = merged(demonstrations)[0]
    if len(demonstrations) < 2:
        raise UserError("a report holds one demonstration back and needs another to compress; give at least two examples")
    held_back = sorted(Random(0).sample(range(len(demonstrations)), min(most, len(demonstrations))))
    contexts = [encoder.context(instruction, [*demonstrations[:i], *demonstrations[i + 1 :]])[0] for i in held_back]
    outputs = list(dict.fromkeys(example.output for example in demonstrations))
    choices = outputs if 1 < len(outputs) <= min(MOST_CHOICES, len(demonstrations) // 2) else []
    (nothing,) = reader.encode([encoder.start]) if encoder.start else (None,)
    states = {
        "full_context": reader.encode(contexts),
        "prefix": hypernetwork.compress(contexts, gists=gists),
        "no_context": [nothing] * len(contexts),
    }
    shown = [demonstrations[i] for i in held_back]
    asked = {
        name: [Question.of(encoder, *pair, choices) for pair in zip(shown, prefixes, strict=True)]
        for name, prefixes in states.items()
    }
    tokens = sum(len(question.continuations[0]) for question in asked["prefix"])
    found = {"held_back": len(held_back)}
    full = list(answer_distributions(reader.model, asked["full_context"]))
    for name, questions in asked.items():
        scores = reader.score(questions)
        found[f"loss_{name}"] = -sum(likelihoods[0] for likelihoods in scores) / tokens
        if choices:
            found[f"accuracy_{name}"] = sum(max(s) == s[0] for s in scores) / len(scores)
        if name != "full_context":
            pairs = zip(full, answer_distributions(reader.model, questions), strict=True)
            found[f"kl_{name}"] = sum((p.exp() * (p - q)).sum().item() for p, q in pairs) / tokens
    return found


def fewest_gists(
    hypernetwork: Hypernetwork,
    reader: Reader,
    encoder: Encoder,
    instruction: str,
    demonstrations: Sequence[Example],
    *,
    budget: float,
) -> int:
    """The fewest gists with which held-back answers cost at most `budget` nats a token more than with all gists.

    Of 1, 2, 4, ... up to all; measured by `leave_one_out`, so UserError for fewer than two demonstrations.
    """
    *fewer, most = nested_gists(hypernetwork.num_gists)
    shown = (hypernetwork, reader, encoder, instruction, demonstrations)
    bound = leave_one_out(*shown, gists=most)["loss_prefix"] + budget
    return next((gists for gists in fewer if leave_one_out(*shown, gists=gists)["loss_prefix"] <= bound), most)


def verdict(quality: dict[str, float]) -> str | None:
    """A sentence if the prefix does not help, else None."""
    if quality["loss_prefix"] < quality["loss_no_context"]:
        return None
    return (
        f"this prefix does not help: {quality['loss_prefix']:.3f} nats per token on held-back examples, "
        f"{quality['loss_no_context']:.3f} without any context, {quality['loss_full_context']:.3f} with all examples in full"
    )
