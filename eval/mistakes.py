"""The mistakes of an evaluation that tell most: queries that full attention answers right, and another method wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

MOST = 10


def telling(full: Sequence[dict], other: Sequence[dict], kind: str) -> dict[str, Any]:
    """At most ten `rows`: queries that `full` answers right and `other` wrong (both are result lines). `what` describes them.

    The largest loss comes first. It is counted in ROUGE-L for text, in nats by which the chosen answer is likelier than the
    right one for choices, and in nats a token for losses, where nothing is right or wrong. Text for which no query is right in
    `full` and wrong in `other`, word for word, is compared by ROUGE-L alone. Every task comes once before one comes twice. A
    row has the lines' texts whole, and for losses nats a token in place of answers.
    """
    there = {(line["episode"], line["query"]): line for line in other}
    pairs = [(line, there[line["episode"], line["query"]]) for line in full]
    what = "queries that full attention answers right and the other method wrong"
    if kind == "choices":
        what += "; first those where the wrong choice is likelier than the right one by most"
        lost = [(_margin(theirs), line, theirs) for line, theirs in pairs if _falls(line, theirs, "accuracy") > 0]
    elif kind == "text" and (wrong := [pair for pair in pairs if _falls(*pair, "exact_match") > 0]):
        what += ", by exact match; first those that lose most of ROUGE-L"
        lost = [(_falls(*pair, "rouge_l"), *pair) for pair in wrong]
    else:
        unit = "ROUGE-L" if kind == "text" else "nats a token"
        what = f"queries that full attention answers better than the other method; first those that lose most {unit}"
        compared = ((_falls(*pair, "rouge_l") if kind == "text" else -_falls(*pair, "loss"), *pair) for pair in pairs)
        lost = [one for one in compared if one[0] > 0]
    lost.sort(key=lambda one: (-one[0], one[1]["episode"], one[1]["query"]))
    turns: Counter[str] = Counter()
    rounds = []
    for _, line, theirs in lost:
        rounds.append((turns[line["task"]], _row(line, theirs)))
        turns[line["task"]] += 1
    rounds.sort(key=lambda one: one[0])  # stable: within a round the largest loss stays first
    return {"what": what, "rows": [row for _, row in rounds[:MOST]]}


def _falls(line: dict, theirs: dict, metric: str) -> float:
    """By how much a metric is lower in the other line; a loss, which is a sum over tokens, by token."""
    return line["metrics"][metric] / line["weight"] - theirs["metrics"][metric] / theirs["weight"]


def _margin(line: dict) -> float:
    """Nats by which the chosen answer is likelier than the right one."""
    return max(line["scores"]) - line["scores"][line["choices"].index(line["references"][0])]


def _row(line: dict, theirs: dict) -> dict[str, Any]:
    full, other = (one["answer"] if "answer" in one else one["metrics"]["loss"] / one["weight"] for one in (line, theirs))
    place = {key: line[key] for key in ("episode", "query", "task", "input", "references")}
    return {**place, "full": full, "other": other}
