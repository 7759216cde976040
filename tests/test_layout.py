"""Layouts: validation, positions, indices."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from layouts import MANY, layouts

from attention_masks import GistLayout, Segment, dense_mask, draw, picture
from attention_masks.layout import Run


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tokens": 0}, "at least one token, not 0"),
        ({"tokens": 2, "gists": 3}, "2 tokens cannot have 3 gists"),
        ({"tokens": 2, "gists": -1}, "cannot have -1 gists"),
        ({"tokens": 2.5}, "tokens must be whole numbers, not 2.5"),
        ({"tokens": True}, "tokens must be whole numbers, not True"),
        ({"tokens": 2, "reads": (0, 0)}, "reads each segment once"),
        ({"tokens": 2, "reads": ("a",)}, "reads must be whole numbers, not 'a'"),
    ],
)
def test_segment_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Segment(**arguments)


@pytest.mark.parametrize(
    "segments, message",
    [
        ([], "at least one segment"),
        ([Segment(2, reads=(0,))], "segment 0 reads segment 0, but a segment reads only earlier"),
        ([Segment(2, reads=(1,)), Segment(2, gists=1)], "segment 0 reads segment 1"),
        ([Segment(2, gists=1), Segment(2, reads=(-1,))], "segment 1 reads segment -1"),
        ([Segment(2), Segment(2, reads=(0,))], "reads segment 0, which has no gists"),
    ],
)
def test_layout_refuses(segments, message):
    with pytest.raises(ValueError, match=message):
        GistLayout(segments)


def test_layouts_are_values():
    a, b = (GistLayout([Segment(3, gists=1), Segment(2, reads=(0,))]) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != GistLayout([Segment(3, gists=1)])
    with pytest.raises(AttributeError):
        a.segments = ()


def test_compress_region_must_come_first():
    layout = GistLayout([Segment(3), Segment(3, gists=1)])
    with pytest.raises(ValueError, match="must stand before"):
        _ = layout.compress_rows
    assert GistLayout([Segment(3, gists=1), Segment(2, gists=1), Segment(4, reads=(0,))]).compress_rows == 5
    assert GistLayout([Segment(3)]).compress_rows == 0


@pytest.mark.parametrize("name", ["few_shot", "shared", "parallel", "full", "batch"])
def test_nothing_is_rotated_where_offsets_suffice(name):
    assert not MANY[name].shifted


def test_recurrent_readers_see_gists_at_two_distances():
    assert MANY["recurrent"].shifted


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_every_reader_sees_its_gists_right_before_itself(layout):
    for i, segment in enumerate(layout.segments):
        total = sum(layout.segments[j].gists for j in segment.reads)
        seen = []
        for j, shift in zip(segment.reads, layout.shifts[i]):
            seen += [layout.positions[row].item() + shift for row in layout.gists_of(j)]
        assert seen == list(range(layout.starts[i] - total, layout.starts[i]))
    assert layout.positions.min() == 0
    assert layout.last_position == layout.positions.max()


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_runs_cover_every_row_once(layout):
    parts = [n for run in layout.runs for _ in range(run.count) for n in run.parts]
    assert parts == [segment.tokens for segment in layout.segments]
    assert sum(run.count * run.reads for run in layout.runs) == len(layout.read_gists)
    assert len(layout.gist_rows) == sum(segment.gists for segment in layout.segments)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_a_kernel_is_told_what_every_segment_sees(layout):
    read = layout.gist_rows[layout.read_gists[layout.copies]].tolist()
    columns = read + list(range(layout.plain_rows, layout.tokens))
    seen = [columns[i] for i in layout.seen.tolist()]
    ends = layout.key_ends.tolist()
    for i, segment in enumerate(layout.segments[layout.first_reader :], layout.first_reader):
        own = range(layout.row_starts[i], layout.row_starts[i] + segment.tokens)
        gists = [row for j in segment.reads for row in layout.gists_of(j)]
        first, last = ends[i - layout.first_reader], ends[i - layout.first_reader + 1]
        assert seen[first:last] == [*gists, *own]
        assert layout.row_ends[i - layout.first_reader] == own.start - layout.plain_rows
    plain = [s.tokens for s in layout.segments[: layout.first_reader]]
    assert layout.plain_ends.diff().tolist() == plain and sum(plain) == layout.plain_rows


def test_indices_survive_pickling_and_moving_as_one_buffer():
    layout = MANY["batch"]
    copy = pickle.loads(pickle.dumps(layout))
    assert copy == layout and torch.equal(copy.seen, layout.seen)
    moved = layout.to("meta")
    assert moved.device.type == "meta" and moved.positions.device.type == "meta" and layout.device.type == "cpu"
    assert layout.to("cpu") is layout
    storages = {view.untyped_storage().data_ptr() for view in (layout.positions, layout.read_gists, layout.seen)}
    assert len(storages) == 1


def test_neighbours_of_one_shape_become_one_run():
    layout = GistLayout([Segment(4, gists=1)] * 6 + [Segment(n, reads=(n % 6,)) for n in (40, 40, 30, 40)])
    assert layout.runs == (Run(6, (4,), 0), Run(2, (40,), 1), Run(1, (30,), 1), Run(1, (40,), 1))


def test_short_readers_of_the_same_gists_share_a_call():
    short = [Segment(n, reads=(0,)) for n in (3, 5, 3, 5, 62, 3)]
    layout = GistLayout([Segment(4, gists=2), Segment(4, gists=2), *short, Segment(3, reads=(1,)), Segment(2, reads=(1, 0))])
    assert layout.runs == (
        Run(2, (4,), 0),
        Run(1, (3, 5, 3, 5), 2),
        Run(1, (62,), 2),
        Run(2, (3,), 2),
        Run(1, (2,), 4),
    )
    assert len(layout.read_gists) == 2 * 4 + 4 and len(layout.copies) == 2 * 7 + 4


def test_dense_mask_against_its_definition():
    layout = MANY["recurrent"]
    owner = [i for i, s in enumerate(layout.segments) for _ in range(s.tokens)]
    gists = set(layout.gist_rows.tolist())
    mask = dense_mask(layout)
    for row in range(layout.tokens):
        for key in range(layout.tokens):
            own = owner[row] == owner[key] and key <= row
            read = key in gists and owner[key] in layout.segments[owner[row]].reads
            assert mask[row, key].item() == (own or read), (row, key)


def test_drawing_has_a_line_a_row_and_names_gists():
    lines = draw(MANY["batch"]).splitlines()
    assert len(lines) == MANY["batch"].tokens
    assert sum(" g " in line for line in lines) == len(MANY["batch"].gist_rows)


def test_picture_is_a_png(tmp_path):
    picture(MANY, tmp_path / "masks.png")
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
