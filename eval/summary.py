"""From result lines to figures: means with intervals, paired differences, costs, and what they say in a sentence each."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.flops import amortised
from eval.intervals import Bootstrap, Interval
from eval.methods import METHODS
from eval.metrics import METRICS, headline
from eval.mistakes import telling

QUERIES_PER_TASK = (1, 10, 100)
OURS = ("prefix", "stored_prefix")
FULL = "full_context"


def summarise(lines: Sequence[dict], methods: Sequence[str], facts: dict, *, resamples: int, seed: int) -> dict[str, Any]:
    """The summary of an evaluation. `lines` hold the same queries for every method; `facts` say what was evaluated."""
    kind = facts["kind"]
    episodes = sorted({line["episode"] for line in lines})
    place = {episode: i for i, episode in enumerate(episodes)}
    by_method: dict[str, list[dict]] = defaultdict(list)
    for line in lines:
        by_method[line["method"]].append(line)
    names = [name for name in methods if by_method[name]]
    metrics = list(by_method[names[0]][0]["metrics"])
    head = headline(kind, wanted=facts.get("metric", "auto"))

    def sums(name: str, metric: str) -> np.ndarray:
        totals = np.zeros(len(episodes))
        for line in by_method[name]:
            totals[place[line["episode"]]] += line["metrics"][metric]
        return totals

    weights = np.zeros(len(episodes))
    for line in by_method[names[0]]:
        weights[place[line["episode"]]] += line["weight"]
    bootstrap = Bootstrap(weights, resamples=resamples, seed=seed)
    table = {name: {metric: sums(name, metric) for metric in metrics} for name in names}
    ours = next((name for name in OURS if name in names), None)
    found: dict[str, Any] = {**facts, "headline": head, "queries": len(by_method[names[0]]), "ours": ours}
    found["queries_left_out"] = max(0, facts["queries_offered"] - found["queries"])
    chances = [line["chance"] for line in by_method[names[0]] if "chance" in line]
    found["chance"] = float(np.mean(chances)) if chances else None
    found["methods"] = {}
    for name in names:
        entry = {"label": METHODS[name].label, "role": METHODS[name].role, "what": METHODS[name].what}
        entry["metrics"] = {metric: _figures(bootstrap.mean(table[name][metric])) for metric in metrics}
        if ours and name != ours:
            differences = {m: bootstrap.difference(table[ours][m], table[name][m]) for m in metrics}
            entry["ours_minus_this"] = {m: _figures(interval) for m, interval in differences.items()}
        found["methods"][name] = entry | _costs(by_method[name])
    if ours and {"no_context", "full_context"} <= set(names):
        share = bootstrap.recovered(*(table[name][head] for name in (ours, "no_context", "full_context")))
        found["share_of_gain"] = share and _figures(share)
    found["categories"] = _categories(by_method, names, kind, facts.get("metric", "auto"))
    found["verdicts"] = verdicts(found)
    sign = 1 if METRICS[head].higher_is_better else -1
    others = [name for name in names if name != FULL]
    best = max(others, key=lambda name: sign * found["methods"][name]["metrics"][head]["mean"], default=None)
    found["mistakes"] = None
    if FULL in names and best is not None:  # without a prefix, the best of what there is
        other = ours or best
        found["mistakes"] = {"full": FULL, "other": other, **telling(by_method[FULL], by_method[other], kind)}
    return found


def _figures(interval: Interval) -> dict[str, float]:
    return dataclasses.asdict(interval)


def _costs(lines: Sequence[dict]) -> dict[str, Any]:
    """Mean costs of a method: size and cost of a state per task, and FLOPs per query, with the state shared over queries."""
    if "state_bytes" not in lines[0]:
        return {}
    states = list({line["episode"]: line for line in lines}.values())
    keys = ("context_tokens", "state_rows", "state_bytes", "demonstrations")
    found: dict[str, Any] = {key: float(np.mean([line[key] for line in states])) for key in keys}
    if "query_flops" in lines[0]:
        encode = float(np.mean([line["encode_flops"] for line in states]))
        query, reread = (float(np.mean([line[key] for line in lines])) for key in ("query_flops", "reread_flops"))
        found |= {"encode_flops": encode, "query_flops": query, "reread_flops": reread}
        found["flops_per_query"] = {str(n): amortised(encode, query, n) for n in QUERIES_PER_TASK}
    return found


def _categories(by_method: dict[str, list[dict]], names: Sequence[str], kind: str, wanted: str) -> dict[str, dict]:
    """For each category its headline metric, its queries, and every method's mean."""
    found: dict[str, dict] = {}
    for category in sorted({line["category"] for line in by_method[names[0]] if line["category"]}):
        metric, means = headline(kind, category, wanted=wanted), {}
        for name in names:
            there = [line for line in by_method[name] if line["category"] == category]
            means[name] = sum(line["metrics"][metric] for line in there) / sum(line["weight"] for line in there)
        found[category] = {"metric": metric, "queries": len(there), "methods": means}
    return found if len(found) <= 60 else {}


# A question, the method that answers it, and what a sentence says that this method reads.
COMPARISONS = (
    ("Does it help?", "no_context", "without any context"),
    ("Is it as good as full attention?", "full_context", "with everything in full attention"),
    ("Does it compress?", "", ""),
    ("Does it depend on its context?", "swapped_prefix", "with another task's prefix"),
    ("Does it read which output belongs to which input?", "shuffled_prefix", "with the prefix of shuffled labels"),
    (
        "Does it read which words of the instruction belong together?",
        "shuffled_instruction",
        "with the prefix of the instruction's words, shuffled",
    ),
    ("Is it better than fewer demonstrations in the same memory?", "fewer_demonstrations", "with {fitting}"),
    ("Is it better than mean pooling, which needs no training?", "mean_pool", "with mean-pooled keys and values"),
    ("Is it better than the last tokens?", "last_tokens", "with the last tokens' keys and values"),
    ("Is it better than a model trained for full attention?", "multi_task", "with the multi-task model"),
    ("What does it cost?", "", ""),
)


def verdicts(summary: dict[str, Any]) -> list[dict[str, str]]:
    """A sentence for each question that a reader has; "answer" is yes, no or unclear, by whether an interval excludes zero."""
    methods = summary["methods"]
    if summary["ours"] is None:
        return []
    fitting = methods.get("fewer_demonstrations", {}).get("demonstrations", 0.0)
    fits = f"as many as fit ({fitting:.1f} on average)" if fitting else "what fits into it"
    found = []
    for question, name, what in COMPARISONS:
        if question == "Does it compress?":
            found += _compression(methods[summary["ours"]])
        elif question == "What does it cost?":
            found += _price(methods[summary["ours"]], methods.get("full_context", {}))
        elif name in methods:
            found.append(_compared(summary, question, name, what.format(fitting=fits)))
            if name == "full_context":
                found[-1]["sentence"] += _gain(summary)
    return found


def _compared(summary: dict[str, Any], question: str, name: str, what: str) -> dict[str, str]:
    methods, head = summary["methods"], summary["headline"]
    interval = methods[name]["ours_minus_this"][head]
    sign = 1 if METRICS[head].higher_is_better else -1
    low, high = sorted((sign * interval["low"], sign * interval["high"]))
    answer = "yes" if low > 0 else "no" if high < 0 else "unclear"
    word = {"yes": "better than", "no": "worse than", "unclear": "not clearly different from"}[answer]
    mine, theirs = (quantity(methods[m]["metrics"][head]["mean"], head) for m in (summary["ours"], name))
    sentence = f"{mine} is {word} {theirs} {what} (difference {difference(interval, head)})."
    return {"question": question, "answer": answer, "sentence": sentence}


def _gain(summary: dict[str, Any]) -> str:
    """How much of what full attention gains by the context a prefix recovers."""
    if share := summary.get("share_of_gain"):
        return (
            f" It recovers {100 * share['mean']:.0f} % [{100 * share['low']:.0f}, {100 * share['high']:.0f}] "
            "of what the context gains in full attention."
        )
    if "no_context" in summary["methods"]:
        return " But full attention gains nothing clear over no context here: there is little to compress."
    return ""


def _compression(mine: dict[str, Any]) -> list[dict[str, str]]:
    if not (mine.get("context_tokens") and mine["state_rows"]):  # adapters alone have no rows
        return []
    ratio = mine["context_tokens"] / mine["state_rows"]
    sentence = f"{mine['context_tokens']:.0f} context tokens on average become {mine['state_rows']:.0f} rows: {ratio:.1f} to 1."
    return [{"question": "Does it compress?", "answer": "yes" if ratio > 1 else "no", "sentence": sentence}]


def _price(mine: dict[str, Any], full: dict[str, Any]) -> list[dict[str, str]]:
    if "query_flops" not in mine or "query_flops" not in full:
        return []
    n = str(QUERIES_PER_TASK[1])
    reread = mine["flops_per_query"][n] / full["reread_flops"]
    cached = mine["flops_per_query"][n] / full["flops_per_query"][n]
    memory = full["state_bytes"] / mine["state_bytes"] if mine["state_bytes"] else float("nan")
    sentence = (
        f"At {n} queries a task, a query costs {100 * reread:.0f} % of the FLOPs of reading the whole context with every "
        f"query, and {100 * cached:.0f} % of those of a cached full prompt, whose state takes {memory:.1f} times the memory."
    )
    return [{"question": "What does it cost?", "answer": "", "sentence": sentence}]


def quantity(value: float, metric: str) -> str:
    """A figure as people read it: a share in %, anything else as it is."""
    return f"{100 * value:.1f} %" if METRICS[metric].share else f"{value:.3f}"


def difference(interval: dict[str, float], metric: str) -> str:
    """A difference with its interval, in points for a share."""
    scale, digits = (100, 1) if METRICS[metric].share else (1, 3)
    mean, low, high = (f"{scale * interval[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
