"""The store: names that are safe, and an index that cannot lie."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hyperllama.base.identity import BaseIdentity
from hyperllama.errors import UserError
from hyperllama.prefixes import store as store_module
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.store import PrefixStore

ROOT = Path(__file__).parent.parent
IDENTITY = BaseIdentity(name="a-base", weights="1" * 64, config="2" * 64, tokenizer="3" * 64)
OTHER = BaseIdentity(name="b-base", weights="4" * 64, config="2" * 64, tokenizer="3" * 64)


def prefix_of(task, context="c" * 64, base=IDENTITY, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 1, 2, 4, generator=generator) for _ in "kv")
    hashes = {"context_sha256": context, "hypernetwork_sha256": "d" * 64}
    return Prefix(keys.unbind(), values.unbind(), Manifest(**{"base": base, "task": task, **hashes, **fields}))


@pytest.fixture
def store(tmp_path):
    return PrefixStore(tmp_path / "store")


class TestStore:
    def test_what_is_added_is_found_listed_and_loaded(self, store):
        a, b, c = prefix_of("a"), prefix_of("b", seed=1, metrics={"loss": 0.5}), prefix_of("a", base=OTHER)
        assert not store.has("a", IDENTITY, "c" * 64, "d" * 64) and len(store) == 0
        paths = [store.add(p) for p in (b, a, c)]
        assert all(path.parent == store.folder and path.is_file() for path in paths)
        assert store.has("a", IDENTITY, "c" * 64, "d" * 64) and not store.has("a", IDENTITY, "e" * 64, "d" * 64)
        assert not store.has("a", IDENTITY, "c" * 64, None) and not store.has("c", IDENTITY, "c" * 64, "d" * 64)
        again = PrefixStore(store.folder, create=False)
        assert [entry.task for entry in again] == ["a", "a", "b"] and len(again) == 3 and again.check() == []
        (entry,) = again.find(task="b")
        assert (entry.file, entry.base, entry.rows, entry.metrics) == (paths[0].name, IDENTITY, 2, {"loss": 0.5})
        assert entry.bytes == paths[0].stat().st_size and entry.context_sha256 == "c" * 64
        assert again.load(entry) == again.load("b") == b and again.load("a", IDENTITY) == a and again.load("a", OTHER) == c
        assert {e.file for e in again.find(base=IDENTITY)} == {paths[0].name, paths[1].name}
        assert [e.file for e in again.find(base="b-base")] == [paths[2].name] and again.find(task="b", base=OTHER) == []
        assert len(again.find(base=BaseIdentity("moved", IDENTITY.weights, IDENTITY.config))) == 2

    def test_the_same_prefix_is_replaced_and_the_newest_line_counts(self, store):
        first = store.add(prefix_of("a", metrics={"x": 1}), rank=1)
        assert store.add(prefix_of("a", metrics={"x": float("nan"), "y": (1, 2)})) == first
        assert len(store) == 1 and store.check() == [] and store.load("a").manifest.metrics["y"] == [1, 2]

    def test_of_a_journal_that_has_grown_only_the_rest_is_read(self, store, monkeypatch):
        store.add(prefix_of("a"))
        reader, starts, lines = PrefixStore(store.folder, create=False), [], store_module._lines
        monkeypatch.setattr(store_module, "_lines", lambda path, start: starts.append(start) or lines(path, start))
        assert len(reader) == 1 and starts == [0]
        store.add(prefix_of("b"))
        store.add(prefix_of("a", metrics={"x": 2}), rank=1)
        assert [e.task for e in reader] == ["a", "b"] and starts[1] > 0 and starts[2] == 0
        assert reader.find(task="a")[0].metrics == {"x": 2}
        # A line that is half there when it is read, and whole later.
        third = prefix_of("c")
        third.save(store.path_of(third.manifest))
        line = "\n" + store_module._line(store_module._entry(store.path_of(third.manifest), third))
        journal = store.folder / "index" / "rank0.jsonl"
        for half in (line[:40], line[40:]):
            with journal.open("a") as file:
                file.write(half)
            found = len(reader)
        assert found == 3 and reader.check() == []
        store.repair()
        starts.clear()
        assert len(reader) == 3 and starts == [0] and len(PrefixStore(store.folder)) == 3

    def test_what_cannot_be_loaded_is_said(self, store):
        store.add(prefix_of("a"))
        store.add(prefix_of("a", context="e" * 64))
        with pytest.raises(UserError, match=f"no prefix of a task 'b'; hyperllama list {store.folder} shows"):
            store.load("b")
        with pytest.raises(UserError, match=r"2 prefixes of task 'a' \(a-.*, a-.*\); load one of them by its entry"):
            store.load("a")
        with pytest.raises(UserError, match="was made for a-base .* not for b-base"):
            store.load(next(iter(store)), OTHER)
        for manifest in (None, Manifest(base=IDENTITY)):
            with pytest.raises(UserError, match="the manifest of this one names none"):
                store.add(Prefix([torch.zeros(1, 1, 2)], [torch.zeros(1, 1, 2)], manifest))

    def test_folders_that_do_not_serve(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="file: a file, but a store of prefixes is a folder"):
            PrefixStore(tmp_path / "file")
        with pytest.raises(UserError, match="none: no such store of prefixes; make one with hyperllama compress"):
            PrefixStore(tmp_path / "none", create=False)
        for folder in (tmp_path / "file" / "inside", "/proc/store"):
            with pytest.raises(UserError, match=r"cannot be written \(.*\); give another folder") as caught:
                PrefixStore(folder)
            assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    def test_an_index_that_disagrees_is_noticed_and_repaired(self, store):
        gone, other, unknown, torn, moved = (store.add(prefix_of(t)) for t in ("gone", "other", "unknown", "torn", "moved"))
        files = {entry.task: entry for entry in store}
        gone.unlink()
        prefix_of("other", metrics={"loss": 0.125}).save(other)
        moved.rename(moved.with_name("mine.safetensors"))
        torn.write_bytes(torn.read_bytes()[:-3])
        (store.folder / "notes.safetensors").write_text("x")
        prefix_of(None).save(store.folder / "nameless.safetensors")
        journal = store.folder / "index" / "rank0.jsonl"
        journal.write_text("".join(line for line in journal.read_text().splitlines(True) if unknown.name not in line))
        how = f"run hyperllama list {store.folder} --repair"
        for task, message in (
            ("gone", "in the index, but not there"),
            ("other", r"says another thing of it \(bytes, metrics\)"),
        ):
            with pytest.raises(UserError, match=f"{message}; {how}"):
                store.load(files[task])
        with pytest.raises(UserError, match="not a whole prefix file"):
            store.load("torn")
        found = store.check()
        assert len(found) == 8 and all("\n" not in sentence for sentence in found)
        for path, message in [
            (gone, f"in the index, but not there; copy it back, or to forget it {how}"),
            (moved, f"in the index, but not there; copy it back, or to forget it {how}"),
            (other, f"the index says another thing of it (bytes, metrics); {how}"),
            (unknown, f"not in the index; {how}"),
            (store.folder / "mine.safetensors", f"not in the index; {how}"),
        ]:
            assert f"{path}: {message}" in found
        quick = store.compare()  # all but what a flipped bit or a false name is
        assert set(found) - set(quick) == {s for s in found if s.startswith((f"{torn}:", f"{other}:", f"{store.folder}/n"))}
        assert len(quick) == len(found) and any(f"{torn}: " in s and "bytes, not" in s for s in quick)
        left = store.repair()
        assert len(left) == 3 and store.check() == left and torn.exists() and moved.exists()
        assert all(any(name in s for s in left) for name in (torn.name, "notes.safetensors", "nameless.safetensors"))
        assert {e.task for e in store} == {"other", "unknown", "moved"} and store.load("other").manifest.metrics == {
            "loss": 0.125
        }
        assert all(store.load(entry).manifest.task == entry.task for entry in store)

    def test_one_that_cannot_be_written_does_not_take_others_along(self, store):
        prefixes = [prefix_of(task) for task in "abc"]
        store.path_of(prefixes[1].manifest).mkdir()
        with pytest.raises(OSError):
            store.add_all(prefixes)
        assert [entry.task for entry in store] == ["a", "c"] and store.compare() == []
        with pytest.raises(UserError, match="names none"):
            store.add_all([prefix_of("d"), prefix_of(None)])
        assert len(store) == 2

    def test_a_second_copy_is_left_alone(self, store):
        path = store.add(prefix_of("a"))
        shutil.copy(path, store.folder / "copy.safetensors")
        (sentence,) = store.repair()
        copy = store.folder / "copy.safetensors"
        assert sentence == f"{copy}: a second file of {path.name}; remove one of them, the damaged one if one is"
        assert len(store) == 1 and copy.exists() and len(store.check()) == 1

    def test_repair_makes_one_journal_of_many(self, store):
        for rank in range(4):
            store.add(prefix_of(f"t{rank}"), rank=rank)
        assert store.repair() == [] and len(store) == 4
        assert [path.name for path in (store.folder / "index").iterdir()] == ["rank0.jsonl"]

    def test_a_prefix_that_a_crash_left_without_a_line_gets_one(self, store):
        prefix = prefix_of("a")
        prefix.save(store.path_of(prefix.manifest))
        assert len(store) == 0 and store.has("a", IDENTITY, "c" * 64, "d" * 64)
        assert store.remember(prefix.manifest) and store.remember(prefix.manifest) and store.check() == []
        assert len((store.folder / "index" / "rank0.jsonl").read_text().split()) > 0 and len(store) == 1
        assert not store.remember(prefix_of("b").manifest)


@given(st.text(min_size=1), st.text(min_size=1))
def test_file_names_are_safe_and_unique(a, b):
    with tempfile.TemporaryDirectory() as folder:
        store = PrefixStore(folder)
        first, second = (store.path_of(prefix_of(task).manifest) for task in (a, b))
        for path in (first, second):
            assert path.parent == Path(folder) and path.name.isascii() and len(path.name) <= 120
            assert not path.name.startswith(".") and not set(path.name) & set('/\\:*?"<>| \0')
        assert (first.name.lower() == second.name.lower()) == (a == b)


@pytest.mark.parametrize(
    "task, start",
    [
        ("task190_snli", "task190_snli-"),
        ("super_glue/rte", "super_glue_rte-"),
        ("../../etc/passwd", "etc_passwd-"),
        (".hidden", "hidden-"),
        ("Übersetzung", "Ubersetzung-"),
        ("翻译", "task-"),
        ("x" * 300, "x" * 80 + "-"),
    ],
)
def test_file_names_are_readable(store, task, start):
    path = store.add(prefix_of(task))
    assert path.name.startswith(start) and store.load(task).manifest.task == task
    with_other_case = store.add(prefix_of(task + "/"))
    assert with_other_case != path and len(store) == 2 and store.check() == []


def damage(store, kind, place, files):
    """What crashes, people and disks do to a store."""
    journals = sorted((store.folder / "index").glob("rank*.jsonl"))
    path = (journals if kind.endswith("index") else files)[place % max(1, len(journals if kind.endswith("index") else files))]
    content = bytearray(path.read_bytes()) if path.exists() else b""
    if kind.startswith("cut"):
        path.write_bytes(content[: place % (len(content) + 1)])
    elif kind.startswith("flip") and content:
        content[place % len(content)] ^= 1 << place % 8
        path.write_bytes(content)
    elif kind.startswith("remove"):
        path.unlink(missing_ok=True)
    elif kind == "rename file" and path.exists():
        path.rename(path.with_name(f"renamed{place % 3}.safetensors"))
    elif kind == "copy file" and path.exists():
        shutil.copy(path, path.with_name(f"copy{place % 3}.safetensors"))
    elif kind == "add":
        store.add(prefix_of(f"later{place % 3}"), rank=place % 2)


KINDS = ["cut index", "flip index", "remove index", "cut file", "flip file", "remove file", "rename file", "copy file", "add"]


@settings(max_examples=60, deadline=None)
@given(
    tasks=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4, unique=True),
    damages=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 10**6)), max_size=5),
)
def test_whatever_happens_the_index_does_not_lie_and_repair_finds_all_that_is_whole(tasks, damages):
    with tempfile.TemporaryDirectory() as folder:
        store = PrefixStore(folder)
        files = [store.add(prefix_of(task, seed=i), rank=i % 2) for i, task in enumerate(tasks)]
        for kind, place in damages:
            if kind.endswith("index") and not list((store.folder / "index").iterdir()):
                continue
            damage(store, kind, place, files)
        for entry in store:
            try:
                manifest = store.load(entry).manifest
            except UserError as error:
                assert folder in str(error)
            else:
                assert (entry.task, entry.base, entry.context_sha256) == (manifest.task, manifest.base, manifest.context_sha256)
        whole = set()
        for path in store.folder.glob("*.safetensors"):
            try:
                home = store.path_of(manifest := Prefix.load(path).manifest)
            except UserError:
                continue
            if home == path or not home.exists():  # else its place is taken, and people are asked
                whole.add(manifest.task)
        left = store.repair()
        assert {entry.task for entry in store} == whole and len(store.check()) == len(left)
        assert all(store.load(entry).manifest.task == entry.task for entry in store)
        assert PrefixStore(folder).repair() == left, "repairing again changes nothing"


@settings(max_examples=40, deadline=None)
@example(place=621)
@given(place=st.integers(0, 10**6))
def test_a_line_cut_short_swallows_no_other(place):
    with tempfile.TemporaryDirectory() as folder:
        store = PrefixStore(folder)
        for task in ("a", "b"):
            store.add(prefix_of(task))
        journal = store.folder / "index" / "rank0.jsonl"
        content = journal.read_bytes()
        journal.write_bytes(content[: place % len(content)])
        # A line that lacks only its end counts as soon as another stands behind it.
        whole = set("ab"[: journal.read_bytes().count(b'"created": null}')])
        assert {entry.task for entry in store} <= whole
        store.add(prefix_of("c"))
        assert {entry.task for entry in store} == whole | {"c"}
