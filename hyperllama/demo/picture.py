"""A picture of what each row of a prefix looks at: rows over the tokens of their context, in strips like lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from hyperllama.files import write_atomically

STRIP = 49  # tokens
MOST_STRIPS = 12
WIDTH, ROW, LABELS = 12.0, 0.105, 0.75  # inches


def draw_looks(words: Sequence[str], looks: Tensor, path: str | Path) -> str:
    """Draw looks (G, T), whose rows sum to one, over the text of T tokens, into a PNG file; returns what the picture shows.

    Of more tokens than `MOST_STRIPS` strips have room for, the last ones are drawn.
    """
    rows, tokens = looks.shape
    first = max(0, tokens - STRIP * MOST_STRIPS)
    starts = range(first, tokens, STRIP)
    height = max(8, rows) * ROW
    figure = Figure(figsize=(WIDTH, len(starts) * (height + LABELS) + 0.2), layout="constrained", dpi=110)
    axes = figure.subplots(len(starts), squeeze=False)[:, 0]
    # Most weights are small beside those of rows that keep one token whole.
    norm = PowerNorm(0.5, 0, max(float(looks.max()), 1e-6))
    for axis, start in zip(axes, starts):
        part = looks[:, start : start + STRIP]
        image = axis.imshow(part.numpy(), cmap="Greens", norm=norm, aspect="auto", interpolation="nearest")
        # What looks like mathematics to matplotlib is text here.
        labels = [_shown(word) for word in words[start : start + STRIP]]
        axis.set_xticks(range(part.shape[1]), labels, rotation=90, fontsize=9.5, parse_math=False)
        axis.set_yticks([0, rows - 1] if rows > 1 else [0], ["1", str(rows)] if rows > 1 else ["1"], fontsize=9.5)
        axis.set(xlim=(-0.5, min(STRIP, tokens) - 0.5))
        axis.set_ylabel("row", fontsize=9.5)
        axis.tick_params(length=0, colors="#333333")
        axis.spines[:].set_color("#d0d4da")
    bar = figure.colorbar(image, ax=axes, fraction=0.012, pad=0.01, aspect=40 * len(starts) ** 0.5)
    bar.ax.tick_params(labelsize=8.5, length=2)
    bar.outline.set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
    cut = f" The first {first:,} of {tokens:,} tokens are not drawn." if first else ""
    return f"Darker is more: how much each of {rows} rows takes of each token, a mean over layers and key-value heads.{cut}"


def _shown(word: str) -> str:
    """A token as a label: what is white space can be seen."""
    text = word.replace("\n", "↵").replace("\t", "⇥").strip(" ") or "␣"
    return text if len(text) <= 12 else text[:11] + "…"
