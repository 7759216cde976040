"""Results for people: a picture with its caption's facts in it."""

from __future__ import annotations

from pathlib import Path

LABELS = {
    "no_context": "no context",
    "swapped_prefix": "another task's prefix\n(control)",
    "prefix": "the prefix",
    "full_context": "all demonstrations,\nfull attention",
}
COLOURS = {"no_context": "#bab0ac", "swapped_prefix": "#bab0ac", "prefix": "#f58518", "full_context": "#4c78a8"}


def bars(results: dict[str, float], path: str | Path, *, title: str, chance: float) -> None:
    """Accuracy under each condition as horizontal bars, with chance as a dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axis = figure.subplots()
    names = [name for name in reversed(LABELS) if name in results]
    drawn = axis.barh([LABELS[n] for n in names], [100 * results[n] for n in names], color=[COLOURS[n] for n in names])
    axis.bar_label(drawn, [f"{100 * results[n]:.1f} %" for n in names], padding=4)
    axis.axvline(100 * chance, color="#444444", linestyle="--", linewidth=1)
    axis.text(100 * chance + 1, len(names) - 0.52, f"chance {100 * chance:.1f} %", fontsize=8, color="#444444", va="bottom")
    axis.set(xlim=(0, 115), xticks=range(0, 101, 20), xlabel="new words answered with the right symbol (%)")
    axis.set_title(title, fontsize=10, pad=14)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
