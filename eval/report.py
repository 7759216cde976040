"""An evaluation for people: what it says first, then the table, then the pictures. A stranger should understand it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from eval.metrics import METRICS
from eval.summary import QUERIES_PER_TASK, difference, quantity
from hyperllama.files import write_atomically

COLOURS = {"ours": "#f58518", "context": "#4c78a8", "budget": "#72b7b2", "control": "#bab0ac", "copy": "#d4cbc7"}
ROLES = {
    "ours": "prefix",
    "context": "plain context",
    "budget": "same memory, untrained",
    "control": "control",
    "copy": "copying",
}


def write_report(summary: dict[str, Any], folder: Path) -> None:
    """report.md with quality.png and, where FLOPs are known, cost.png."""
    draw_quality(summary, folder / "quality.png")
    costs = any("query_flops" in method for method in summary["methods"].values())
    if costs:
        draw_costs(summary, folder / "cost.png")
    write_atomically(folder / "report.md", "\n".join(_markdown(summary, costs)) + "\n")


def _markdown(summary: dict[str, Any], costs: bool):
    head, left_out = summary["headline"], summary["queries_left_out"]
    subject = summary["hypernetwork"] or (summary["base"] or {}).get("name") or "no model"
    yield f"# {subject} on {summary['data']}\n"
    yield (
        f"{summary['queries']:,} queries in {summary['episodes']:,} episodes of {summary['tasks']:,} tasks, "
        f"up to {summary['shots']} demonstrations, {METRICS[head].label}; 95 % intervals by bootstrap over episodes."
        + (f" Chance is {quantity(summary['chance'], head)}." if summary["chance"] else "")
        + (f" {left_out:,} queries are left out: too long, or windows of too little text." if left_out else "")
    )
    yield f"\nShared with the training data: {summary['shared_with_training']}.\n"
    if summary["verdicts"]:
        yield "## What it says\n"
        for verdict in summary["verdicts"]:
            answer = f" {verdict['answer'].capitalize()}." if verdict["answer"] else ""
            yield f"- **{verdict['question']}**{answer} {verdict['sentence']}"
        yield ""
    yield "## Quality\n\n![Quality of each method with its interval](quality.png)\n"
    metrics = list(next(iter(summary["methods"].values()))["metrics"])
    difference_column = f" | the prefix is better or worse by ({METRICS[head].label})" if summary["ours"] else ""
    yield f"| method | | {' | '.join(METRICS[m].label for m in metrics)}{difference_column} |"
    yield "|---" * (2 + len(metrics) + bool(summary["ours"])) + "|"
    for name, method in summary["methods"].items():
        cells = [_with_interval(method["metrics"][m], m) for m in metrics]
        if summary["ours"]:
            cells.append(difference(method["ours_minus_this"][head], head) if "ours_minus_this" in method else "")
        bold = "**" if name == summary["ours"] else ""
        yield f"| {bold}{method['label']}{bold} | {ROLES[method['role']]} | {' | '.join(cells)} |"
    yield from _mistake_table(summary)
    if costs:
        yield from _cost_table(summary)
    yield "\n## The methods\n"
    for method in summary["methods"].values():
        yield f"- **{method['label']}**: {method['what']}"
    if summary["categories"]:
        yield from _category_table(summary)
    yield f"\n{', '.join(f'{name} {version}' for name, version in summary['versions'].items())}"


def _mistake_table(summary: dict[str, Any]):
    yield "\n## Telling mistakes\n"
    found = summary["mistakes"]
    if found is None:
        yield "Left out: it holds full attention against another method, and one of the two was not evaluated."
        return
    full, other = (summary["methods"][found[side]]["label"] for side in ("full", "other"))
    if not found["rows"]:
        yield f"There are no {found['what'].partition(';')[0]}: _{full}_ against _{other}_."
        return
    yield f"At most ten {found['what']}. Every task comes once before one comes twice."
    yield f"Full attention is _{full}_, the other method _{other}_. Texts are cut short; they are whole in examples/.\n"
    yield f"| task | input | reference | {full} | {other} |"
    yield "|---" * 5 + "|"
    for row in found["rows"]:
        first, *more = row["references"]
        reference = _cell(first) + (f" (or {len(more)} more)" if more else "")
        answers = (_cell(x) if isinstance(x, str) else f"{x:.3f} nats a token" for x in (row["full"], row["other"]))
        yield f"| {_cell(row['task'])} | {_cell(row['input'])} | {reference} | {' | '.join(answers)} |"


def _cell(text: str, most: int = 60) -> str:
    """Text of the data as a cell of a table: short, on one line, and with nothing in it that Markdown or HTML would read."""
    text = "⏎".join(re.split("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", text))
    text = text if len(text) <= most else text[: most - 1] + "…"
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", text).strip() or "_nothing_"


def _cost_table(summary: dict[str, Any]):
    yield "\n## Cost\n\n![Quality against FLOPs](cost.png)\n"
    yield (
        "A context is encoded once per task and its keys and values are kept, unless a row says otherwise. FLOPs are those of "
        "one query with its share of the encoding, for n queries per task, by formula; one multiply-add is 2. A cached full "
        "prompt has the same FLOPs as any other method that encodes once, up to the attention over its rows: what a prefix "
        "saves beside it is memory.\n"
    )
    yield f"| method | rows kept | bytes per task | {' | '.join(f'n = {n}' for n in QUERIES_PER_TASK)} |"
    yield "|---|---|---" + "|---" * len(QUERIES_PER_TASK) + "|"
    for name, method in summary["methods"].items():
        if "query_flops" not in method:
            continue
        flops = [method["flops_per_query"][str(n)] for n in QUERIES_PER_TASK]
        if name == "full_context":
            again = [_si(method["reread_flops"])] * len(flops)
            yield f"| {method['label']}, read again with every query | 0 | 0 | {' | '.join(again)} |"
            yield _cost_row(f"{method['label']}, cached", method, flops)
        else:
            yield _cost_row(method["label"], method, flops)


def _cost_row(label: str, method: dict[str, Any], flops: list[float]) -> str:
    cells = [f"{method['state_rows']:.0f}", f"{method['state_bytes']:,.0f}", *map(_si, flops)]
    return f"| {label} | {' | '.join(cells)} |"


def _category_table(summary: dict[str, Any]):
    names = list(summary["methods"])
    yield "\n## By category\n\nEach with its own headline metric.\n"
    yield f"| category | queries | metric | {' | '.join(summary['methods'][n]['label'] for n in names)} |"
    yield "|---|---|---" + "|---" * len(names) + "|"
    for category, entry in summary["categories"].items():
        cells = [quantity(entry["methods"][n], entry["metric"]) for n in names]
        yield f"| {category} | {entry['queries']:,} | {METRICS[entry['metric']].label} | {' | '.join(cells)} |"


def _with_interval(figures: dict[str, float], metric: str) -> str:
    scale, digits = (100, 1) if METRICS[metric].share else (1, 3)
    low, high = (f"{scale * figures[key]:.{digits}f}" for key in ("low", "high"))
    return f"{quantity(figures['mean'], metric)} [{low}, {high}]"


def _si(value: float) -> str:
    """1234567 -> 1.23 M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f}"


def draw_quality(summary: dict[str, Any], path: str | Path, title: str | None = None) -> None:
    """The headline metric of each method as a bar with its interval, chance as a dashed line."""
    from matplotlib.figure import Figure

    metric, methods = METRICS[summary["headline"]], summary["methods"]
    scale = 100 if metric.share else 1
    names = list(reversed(methods))
    means = [scale * methods[n]["metrics"][summary["headline"]]["mean"] for n in names]
    low, high = ([scale * methods[n]["metrics"][summary["headline"]][side] for n in names] for side in ("low", "high"))
    figure = Figure(figsize=(8, 1.2 + 0.34 * len(names)), layout="constrained")
    axis = figure.subplots()
    errors = [[max(0, m - at) for m, at in zip(means, low)], [max(0, at - m) for m, at in zip(means, high)]]
    axis.barh(
        [methods[n]["label"] for n in names],
        means,
        xerr=errors,
        color=[COLOURS[methods[n]["role"]] for n in names],
        error_kw={"ecolor": "#444444", "elinewidth": 1, "capsize": 2},
    )
    # The whole scale from nothing to everything for a share: a cut axis would make small differences look large.
    top = 100 if metric.share and max(high) > 50 else max(high) or 1
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line of chance
    for i, (mean, upper) in enumerate(zip(means, high)):
        axis.text(
            max(mean, upper) + top * 0.015,
            i,
            f"{mean:.1f}" if metric.share else f"{mean:.3f}",
            va="center",
            fontsize=8,
            bbox=box,
        )
    if summary.get("chance"):
        axis.axvline(scale * summary["chance"], color="#444444", linestyle="--", linewidth=1)
        axis.text(scale * summary["chance"] + top * 0.01, len(names) - 0.45, "chance", fontsize=8, color="#444444", va="bottom")
    better = "" if metric.higher_is_better else ", lower is better"
    axis.set(xlim=(0, top * 1.12), xlabel=f"{metric.label}{' (%)' if metric.share else ''}{better}")
    axis.set_title(title or f"{summary['queries']:,} queries of {summary['tasks']:,} tasks", fontsize=10, pad=14)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def draw_costs(summary: dict[str, Any], path: str | Path) -> None:
    """Quality against FLOPs of a query, with its share of encoding at 1, 10 and 100 queries per task: a panel each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    metric, scale = METRICS[summary["headline"]], 100 if METRICS[summary["headline"]].share else 1
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, len(QUERIES_PER_TASK), sharex=True, sharey=True)
    shown = {name: m for name, m in summary["methods"].items() if "query_flops" in m and m["role"] != "control"}
    handles = {}
    panels[0].set_xscale("log")
    panels[0].xaxis.set_minor_formatter(NullFormatter())
    for panel, n in zip(panels, QUERIES_PER_TASK):
        for name, method in shown.items():
            quality = scale * method["metrics"][summary["headline"]]["mean"]
            label = f"{method['label']}{', cached' if name == 'full_context' else ''} ({_si(method['state_bytes'])}B)"
            points = [(method["flops_per_query"][str(n)], label, "o")]
            if name == "full_context":
                points.append((method["reread_flops"], f"{method['label']}, read again (0 B)", "X"))
            for flops, label, marker in points:
                edge = "#444444" if name == summary["ours"] else "white"
                (handles[label],) = panel.plot(
                    flops, quality, marker, color=_tone(name, method["role"]), markersize=10, markeredgecolor=edge, linestyle=""
                )
        panel.set(xlabel="FLOPs per query", title=f"{n} quer{'y' if n == 1 else 'ies'} per task")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"{metric.label}{' (%)' if metric.share else ', lower is better'}")
    figure.suptitle(
        "quality against FLOPs of one query with its share of encoding; in brackets what is kept per task", fontsize=9
    )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _tone(name: str, role: str) -> str:
    """A colour for each method of a role, so that points can be told apart."""
    tones = {"no_context": "#9ecae9", "instruction_only": "#88bde6", "multi_task": "#2f4b7c", "last_tokens": "#439894"}
    return {**tones, "mean_pool": "#b6d8d5"}.get(name, COLOURS[role])
