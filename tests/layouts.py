"""Reading graphs for tests: one of each kind that the field has, and random ones."""

from hypothesis import strategies as st

from attention_masks import GistLayout, Segment

MANY = {
    "few_shot": GistLayout([Segment(7, gists=2), Segment(4, reads=(0,))]),
    "shared": GistLayout([Segment(6, gists=3), Segment(4, reads=(0,)), Segment(2, reads=(0,)), Segment(4, reads=(0,))]),
    "recurrent": GistLayout(
        [Segment(5, gists=2), Segment(6, gists=2, reads=(0,)), Segment(4, gists=1, reads=(0, 1)), Segment(3, reads=(0, 1, 2))]
    ),
    "parallel": GistLayout([Segment(5, gists=2), Segment(3, gists=1), Segment(6, gists=2), Segment(4, reads=(0, 1, 2))]),
    "full": GistLayout([Segment(9)]),
    "batch": GistLayout(
        [Segment(7, gists=2), Segment(4, gists=2), Segment(7, gists=2)]
        + [Segment(n, reads=(c,)) for n, c in ((3, 0), (5, 0), (3, 1), (3, 2), (1, 2))]
    ),
}


@st.composite
def layouts(draw, max_segments: int = 7, max_tokens: int = 6):
    """Random reading graphs: any segment reads any earlier ones that have gists, in any order."""
    segments: list[Segment] = []
    for _ in range(draw(st.integers(1, max_segments))):
        tokens = draw(st.integers(1, max_tokens))
        gists = draw(st.integers(0, tokens))
        readable = [i for i, segment in enumerate(segments) if segment.gists]
        reads = draw(st.lists(st.sampled_from(readable), unique=True, max_size=4)) if readable else []
        segments.append(Segment(tokens, gists=gists, reads=tuple(reads)))
    return GistLayout(segments)
