"""Metrics of one example, 0 to 1 unless said otherwise, as the official scripts compute them."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from hyperllama.errors import UserError

# The headline metric of S-NI's twelve test categories (natural-instructions, eval/automatic/evaluation.py).
EXACT_MATCH_CATEGORIES = (
    "Textual Entailment",
    "Cause Effect Classification",
    "Coreference Resolution",
    "Dialogue Act Recognition",
    "Answerability Classification",
    "Word Analogy",
)


@dataclass(frozen=True)
class Metric:
    """How a figure is read: its name for people, whether it is a share (shown in %), and which way is better."""

    label: str
    share: bool = True
    higher_is_better: bool = True


METRICS = {
    "rouge_l": Metric("ROUGE-L"),
    "exact_match": Metric("exact match"),
    "accuracy": Metric("accuracy"),
    "loss": Metric("loss (nats per token)", share=False, higher_is_better=False),
}
HEADLINE = {"text": "rouge_l", "choices": "accuracy", "loss": "loss"}


def score_text(answer: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-L and exact match of a generated answer, each the best over the references. UserError if there are none."""
    if not references:
        raise UserError(f"an example has no references to score {answer[:40]!r} against; every example needs one")
    return {
        "rouge_l": max(rouge_l(answer, reference) for reference in references),
        "exact_match": float(any(normalise(answer) == normalise(reference) for reference in references)),
    }


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F-measure (Lin 2004) with stemming, by the rouge-score library on the raw strings, as S-NI scores.

    >>> rouge_l("the cats sat", "The cat sat.")
    1.0
    """
    return _rouge().score(target=reference, prediction=answer)["rougeL"].fmeasure


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces: what S-NI's exact match compares.

    >>> normalise(" The  cat's  HAT. ")
    'the cats hat'
    """
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def score_choices(likelihoods: Sequence[float], right: int) -> dict[str, float]:
    """Whether the likeliest choice is the right one (rank classification, Brown et al. 2020, without length normalisation)."""
    return {"accuracy": float(max(range(len(likelihoods)), key=likelihoods.__getitem__) == right)}


def headline(kind: Literal["text", "choices", "loss"], category: str = "", *, wanted: str = "auto") -> str:
    """The metric that counts for a kind of evaluation, or for one S-NI category of it; `wanted` is the recipe's metric."""
    exact = wanted == "exact_match" or category in EXACT_MATCH_CATEGORIES
    return "exact_match" if kind == "text" and exact else HEADLINE[kind]


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
