"""Draw the matrix: a layout as text, for doctests, logs and `hyperllama`'s reports.

Few-shot compression (Phang 2024) and instruction gisting (Mu et al. 2023): a query reads the gists of a context.

>>> from attention_masks import Segment
>>> print(draw(GistLayout([Segment(4, gists=2), Segment(2, reads=(0,))])))
S0   0 | # . . . . .
S0   1 | # # . . . .
S0 g 2 | # # # . . .
S0 g 3 | # # # # . .
S1   4 | . . G G # .
S1   5 | . . G G # #

Many queries share one context, which is encoded once. Each of them continues at the same position.

>>> print(draw(GistLayout([Segment(3, gists=1), Segment(2, reads=(0,)), Segment(2, reads=(0,))])))
S0   0 | # . . . . . .
S0   1 | # # . . . . .
S0 g 2 | # # # . . . .
S1   3 | . . G # . . .
S1   4 | . . G # # . .
S2   3 | . . G . . # .
S2   4 | . . G . . # #

Recurrent chunks (AutoCompressors, Chevalier et al. 2023): a chunk reads the chunks before it, the query reads all.

>>> print(draw(GistLayout([Segment(2, gists=1), Segment(2, gists=1, reads=(0,)), Segment(1, reads=(0, 1))])))
S0   0 | # . . . .
S0 g 1 | # # . . .
S1   2 | . G # . .
S1 g 3 | . G # # .
S2   3 | . G . G #

Parallel examples: every example is compressed alone, the query reads all.

>>> print(draw(GistLayout([Segment(2, gists=1), Segment(3, gists=1), Segment(1, reads=(0, 1))])))
S0   0 | # . . . . .
S0 g 1 | # # . . . .
S1   0 | . . # . . .
S1   1 | . . # # . .
S1 g 2 | . . # # # .
S2   3 | . G . . G #

Full attention, the baseline: one segment, no gists.

>>> print(draw(GistLayout([Segment(3)])))
S0   0 | # . .
S0   1 | # # .
S0   2 | # # #

A packed batch is the disjoint union of graphs, compress segments first: no padding anywhere.

>>> print(draw(GistLayout([Segment(2, gists=1), Segment(3, gists=1), Segment(1, reads=(0,)), Segment(1, reads=(1,))])))
S0   0 | # . . . . . .
S0 g 1 | # # . . . . .
S1   0 | . . # . . . .
S1   1 | . . # # . . .
S1 g 2 | . . # # # . .
S2   2 | . G . . . # .
S3   3 | . . . . G . #
"""

from attention_masks.dense import dense_mask
from attention_masks.layout import GistLayout


def draw(layout: GistLayout) -> str:
    """A layout as text: a line per query row, a column per key row.

    A line starts with its segment, `g` for a gist row, and its rotary position. `#` is a visible row of the same segment,
    `G` a visible gist of a segment that is read, `.` what cannot be seen.
    """
    owner = [i for i, segment in enumerate(layout.segments) for _ in range(segment.tokens)]
    gists = set(layout.gist_rows.tolist())
    positions = layout.positions.tolist()
    name_width = len(f"S{len(layout.segments) - 1}")
    position_width = len(str(max(positions)))
    lines = []
    for row, visible in enumerate(dense_mask(layout).tolist()):
        marks = ("." if not seen else "#" if owner[key] == owner[row] else "G" for key, seen in enumerate(visible))
        label = f"{f'S{owner[row]}':<{name_width}} {'g' if row in gists else ' '} {positions[row]:>{position_width}}"
        lines.append(f"{label} | {' '.join(marks)}")
    return "\n".join(lines)
