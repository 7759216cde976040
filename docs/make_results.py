"""The page of the papers' claims: docs/results.md, from the results of every query and task. No figure is typed by hand.

python -m docs.make_results
"""

from __future__ import annotations

import shutil
from pathlib import Path

from eval.intervals import Interval
from eval.leads import leads
from eval.methods import METHODS
from eval.starts import draw, read_kept, summarise
from eval.systems import BASE, FULL, NOTHING, Figures, Results, markdown, percent

HERE = Path(__file__).parent
KEPT, WORDS, PAGE = HERE.parent / "benchmarks" / "results" / "papers", HERE / "results", HERE / "results.md"
SETS = {"sni": "Super-NaturalInstructions", "p3": "P3 prompts", "symbols": "Symbol tuning"}
MODULES, TEXTS, STARTS = KEPT / "hint.jsonl.gz", KEPT / "text.jsonl.gz", KEPT / "starts.jsonl.gz"
KEPT_SHARE = 0.8  # of the gain, at 8 to 1 or more: what "compress into" is taken to mean here


def page() -> str:
    """The page as it should be, from the kept results and the words in docs/results."""
    found = {name: Results.read(KEPT / f"{name}.jsonl.gz") for name in SETS if (KEPT / f"{name}.jsonl.gz").is_file()}
    parts = [_words("intro"), *_claims(found)]
    for name, evaluations in found.items():
        parts += [f"## {SETS[name]}", f"`hyperllama study recipes/papers/{name}-systems.yaml`", _words(name)]
        for results in evaluations:
            parts += [f"### With {results.evaluation}"] if results.evaluation else []
            parts.append(markdown(results).strip())
    if MODULES.is_file():
        parts += ["## Instructions become modules whose length costs nothing", _words("modules")]
        parts += ["`hyperllama study recipes/papers/hint-systems.yaml`", *_modules(Results.read(MODULES))]
    if TEXTS.is_file():
        parts += ["## Cartridges of text at once", "`hyperllama evaluate recipes/papers/text.yaml`", _words("text")]
        parts += [_texts(results) for results in Results.read(TEXTS)]
    if STARTS.is_file():
        parts += ["## Starts of prefix tuning", "`hyperllama study recipes/papers/starts.yaml`", _words("starts"), *_starts()]
    parts += ["## What is not here", _words("missing")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _words(name: str) -> str:
    path = WORDS / f"{name}.md"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _claims(found: dict[str, list[Results]]) -> list[str]:
    """The three claims that the tables of systems are about, a line for each table."""
    lines: dict[str, list[str]] = {"compress": [], "own": [], "below": []}
    for name, evaluations in found.items():
        for results in evaluations:
            where = SETS[name] + (f", {results.evaluation}" if results.evaluation else "")
            for claim, (said, figure) in verdicts(results).items():
                lines[claim].append(f"| {where} | {said} | {figure} |")
    heads = {
        "compress": "Few-shot examples compress into a soft prefix",
        "own": "A prefix says what its own task is",
        "below": "Such prefixes stay below full attention and below multi-task tuning",
    }
    parts = []
    for claim, title in heads.items():
        if lines[claim]:
            parts += [f"## {title}", _words(claim), "\n".join(["| | verdict | figures |", "|---|---|---|", *lines[claim]])]
    return parts


def verdicts(results: Results) -> dict[str, tuple[str, str]]:
    """Of each claim whether it holds on one evaluation, and the figures that say so; over tasks with headroom.

    Of many tasks some gain by chance alone, so there is something to tell only where the context helps over all of them.
    """
    figures, said = results.figures(results.with_headroom), {}
    gain = results.figures(list(results.by_task)).difference(FULL, NOTHING)
    if gain.low <= 0:
        figure = f"over all {len(results.by_task)} tasks the whole context gains {_points(gain)}"
        return dict.fromkeys(("compress", "own", "below"), ("cannot be told on this base", figure))
    ours = [system for system in results.systems if system[1] == "prefix"]
    if not ours:
        return {}
    best = max(ours, key=lambda system: figures.mean(system).mean)
    share = figures.share(best)
    others = (f"{row} {_points(figures.share((row, kind)))}" for row, kind in ours if (row, kind) != best)
    said["compress"] = (_kept(share), "; ".join([f"{best[0]} keeps {_points(share)} % of the gain", *others]))

    said["own"] = _own(figures, best[0])

    rows = {"full attention": FULL} | {
        row: (row, "multi_task") for row, kind in results.systems if kind == "multi_task" and row != BASE
    }
    below = {f"{one[0]} minus {name}": figures.difference(one, system) for one in ours for name, system in rows.items()}
    each = {one[0]: ", ".join(f"{name}: {_below(below[f'{one[0]} minus {name}'])}" for name in rows) for one in ours}
    told = "; ".join(f"**{name}** against {said}" for name, said in each.items()) if len(each) > 1 else each[best[0]]
    said["below"] = (told, "; ".join(f"{name} {_points(value)}" for name, value in below.items()))
    return said


def _kept(share: Interval | None) -> str:
    """Whether four fifths of the context's gain are kept."""
    if share is None:
        return "cannot be told: no gain to keep"
    if share.low >= KEPT_SHARE:
        return "holds"
    if share.high < KEPT_SHARE:
        return "does not"
    mean = "holds as a mean, the interval reaches below"
    return mean if share.mean >= KEPT_SHARE else "not as a mean, the interval reaches above"


def _own(figures: Figures, row: str) -> tuple[str, str]:
    """Whether a row's prefixes are their own tasks': what another task's is worth, over no context."""
    ours, other = (row, "prefix"), (row, "swapped_prefix")
    over, own = figures.difference(other, NOTHING), figures.difference(ours, other)
    told = "holds" if own.low > 0 and over.mean <= 0.25 * own.mean else "in part" if own.low > 0 else "does not"
    control = f"another task's {_points(figures.mean(other))}, no context {_points(figures.mean(NOTHING))}"
    return told, f"its own {_points(figures.mean(ours))}, {control}"


def _modules(evaluations: list[Results]) -> list[str]:
    """HINT's claims, a line for each hypernetwork and evaluation, and the tables."""
    lines = ["| | keeps the instruction's worth? | is its own task's? | FLOPs of an input |", "|---|---|---|---|"]
    tables = []
    for results in evaluations:
        figures = results.figures(results.with_headroom)
        costs = {name: cost.get("query_flops", 0) / 1e9 for name, cost in results.head["costs"][results.evaluation].items()}
        for row in results.rows:
            share, (told, own) = figures.share((row, "prefix")), _own(figures, row)
            flops = f"{costs[f'{row}/prefix']:.1f} G; behind the cached prompt {costs['/'.join(FULL)]:.1f} G"
            kept = f"{_kept(share)}: {_points(share)} % of the gain"
            lines.append(f"| {results.evaluation}: {row} | {kept} | {told}: {own} | {flops} |")
        tables += [f"### {results.evaluation.capitalize()}", markdown(results).strip()]
    return ["\n".join(lines), *tables]


def _texts(results: Results) -> str:
    """The table of one size: loss on what follows a text, and the share of what the whole text lowers it by."""
    figures = results.figures(list(results.by_task))
    lines = [f"**{results.evaluation}**, {len(results.by_task)} windows:", ""]
    lines += ["| | nats a token | share of the context's gain, % |", "|---|---|---|"]
    for system in results.systems:
        loss, name = figures.mean(system), "the whole text" if system == FULL else METHODS[system[1]].label
        share = "" if system in (NOTHING, FULL) else _points(figures.share(system))
        cells = f"{loss.mean:.3f} [{loss.low:.3f}, {loss.high:.3f}] | {share}"
        lines.append(f"| {name if system[0] == BASE else f'{system[0]}: {name}'} | {cells} |")
    return "\n".join(lines)


def _below(difference: Interval) -> str:
    return "below" if difference.high < 0 else "above" if difference.low > 0 else "alike within noise"


def _points(interval: Interval | None) -> str:
    return percent(interval) or "unclear"


def _starts() -> list[str]:
    """The table of starts, and for how many tasks the first is there in a quarter of the steps of the next best."""
    runs, full, recipe = read_kept(STARTS)
    summary = summarise(runs, full, recipe)
    lines = [
        "| examples | tasks | in a quarter of the next best's steps | no later than any | end, minus that of the best other |"
    ]
    lines.append("|---|---|---|---|---|")
    found = leads(STARTS)
    for size, lead in found.items():
        end = f"{_points(lead.end)} ({lead.next_start})"
        counts = f"{len(lead.in_a_quarter)} | {len(lead.no_later)}"
        lines.append(f"| {size} | {len(lead.steps)} | {counts} | {end} |")
    enough = [size for size, lead in found.items() if 3 * len(lead.in_a_quarter) >= 2 * len(lead.steps) and lead.end.high >= 0]
    told = "holds" if len(enough) == len(found) else f"holds for {enough} examples" if enough else "does not hold"
    claim = "the hypernetwork is there in a quarter of the next best's steps on two thirds of the tasks, and ends no lower"
    lines = [f"Asked: {claim}. Verdict: **{told}**.", "", *lines]
    parts = ["\n".join(lines), "![Accuracy over steps for each start](assets/starts_real.png)"]
    rows = ["| examples | start | at step 0 | mean over the curve | at the end | steps to within a point of full attention |"]
    rows.append("|---|---|---|---|---|---|")
    for size, entry in summary["sizes"].items():
        for name, start in entry["starts"].items():
            cells = [_points(Interval(**start[key])) for key in ("start", "area", "end")]
            step = start["steps_to_full_attention"]["mean"]
            rows.append(
                f"| {size} | {name.replace(':training.', ', ')} | {' | '.join(cells)} | {'never' if step is None else step} |"
            )
        rows.append(f"| {size} | full attention | | | {_points(Interval(**entry['full_attention']))} | |")
    return [*parts, "\n".join(rows)]


def take_over(runs: Path) -> None:
    """Copy the results of finished tables and studies from a folder of runs."""
    places = {f"{name}-systems/examples.jsonl.gz": KEPT / f"{name}.jsonl.gz" for name in SETS}
    others = {"starts/tasks.jsonl.gz": STARTS, "hint-systems/examples.jsonl.gz": MODULES}
    for place, kept in {**places, **others}.items():
        if (runs / place).is_file():
            shutil.copy(runs / place, kept)


if __name__ == "__main__":
    take_over(Path("runs/papers"))
    if STARTS.is_file():
        draw(summarise(*read_kept(STARTS)), HERE / "assets" / "starts_real.png")
    PAGE.write_text(page(), encoding="utf-8")
