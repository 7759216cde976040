"""Layouts as a PNG picture. Needs matplotlib, imported on call."""

from collections.abc import Mapping
from pathlib import Path

from attention_masks.dense import dense_mask
from attention_masks.layout import GistLayout

NOTHING, OWN, READ, UNREAD_GIST = range(4)
COLOURS = ("#f3f4f6", "#4c78a8", "#f58518", "#9ecae9")


def picture(layouts: Mapping[str, GistLayout], path: str | Path) -> None:
    """Draw each titled layout as a panel: rows are queries, columns keys; orange is a gist seen by its reader."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(3, len(layouts))
    lines = -(-len(layouts) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.9 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (title, layout) in zip(axes, layouts.items()):
        axis.imshow(_cells(layout), cmap=ListedColormap(COLOURS), vmin=0, vmax=len(COLOURS) - 1)
        edges = [start - 0.5 for start in layout.row_starts[1:]]
        axis.hlines(edges, -0.5, layout.tokens - 0.5, colors="white", linewidth=2)
        axis.vlines(edges, -0.5, layout.tokens - 0.5, colors="white", linewidth=2)
        middles = [start + (segment.tokens - 1) / 2 for start, segment in zip(layout.row_starts, layout.segments)]
        names = [f"S{i}" for i in range(len(middles))]
        axis.set_xticks(middles, names)
        axis.set_yticks(middles, names)
        axis.tick_params(length=0)
        axis.set(title=title, xlabel="key", ylabel="query")
        axis.spines[:].set_visible(False)
    for axis in axes[len(layouts) :]:
        axis.set_axis_off()
    names = {OWN: "own row", UNREAD_GIST: "own gist row", READ: "gist of a segment that is read", NOTHING: "not visible"}
    patches = [Patch(color=COLOURS[kind], label=name) for kind, name in names.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=110)


def _cells(layout: GistLayout):
    cells = dense_mask(layout).long()
    gists = layout.gist_rows
    for segment, row in zip(layout.segments, layout.row_starts):
        own = slice(row, row + segment.tokens)
        seen = cells[own][:, gists]
        inside = (gists >= row) & (gists < row + segment.tokens)
        cells[own.start : own.stop, gists] = seen * (inside.long() * UNREAD_GIST + (~inside).long() * READ)
    return cells.cpu().numpy()
