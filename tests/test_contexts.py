"""Many tasks into a store: each compressed once, whatever happens in between."""

import json
import os
import signal
import time
import weakref
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import trained_hypernetwork
from launch import start

from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.commands.compress import compress
from hyperllama.data.episode import Example, Task
from hyperllama.data.text import Limits, TextFormat
from hyperllama.errors import UserError
from hyperllama.hypernetworks.loading import load_hypernetwork
from hyperllama.inference import many as inference_many
from hyperllama.inference.many import compress_into, context_sha256, shown_of, task_files
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.store import PrefixStore


@pytest.fixture
def store(tmp_path):
    return PrefixStore(tmp_path / "store")


@pytest.fixture(scope="module")
def run(tmp_path_factory, saved_base):
    """The folder of a hypernetwork, as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    hypernetwork = trained_hypernetwork(load_base(str(saved_base)), tokenizer=load_tokenizer(str(saved_base)))
    notes = {"format": vars(TextFormat()), "limits": vars(Limits(context_tokens=300)), "data": "none"}
    hypernetwork.save_pretrained(folder, notes)
    return folder


@pytest.fixture(scope="module")
def loaded(run):
    return load_hypernetwork(run)


def ragged_tasks(count, seed=0):
    rng = Random(seed)

    def text():
        return "".join(rng.choices("abcdefgh ", k=rng.randint(1, 12)))

    def task(i):
        examples = tuple(Example(text(), text()) for _ in range(rng.randint(1, 7)))
        return Task(f"task {i}", text() if i % 3 else "", examples if i % 2 else (), examples)

    return [task(i) for i in range(count)]


def write_files(folder, tasks):
    folder.mkdir()
    for task in tasks:
        lines = [json.dumps({"input": e.input, "output": e.output}) + "\n" for e in task.examples]
        (folder / f"{task.name.replace(' ', '')}.jsonl").write_text("".join(lines))
    return folder


class Counted:
    """A hypernetwork that remembers what it compressed, pass by pass."""

    def __init__(self, hypernetwork):
        self.hypernetwork, self.passes, self.made = hypernetwork, [], []

    def __getattr__(self, name):
        return getattr(self.hypernetwork, name)

    def compress(self, found, manifests):
        self.passes.append([(len(context), manifest.task) for context, manifest in zip(found, manifests, strict=True)])
        prefixes = self.hypernetwork.compress(found, manifests)
        self.made += map(weakref.ref, prefixes)
        return prefixes

    def held(self):
        """How many prefixes are still in memory."""
        return sum(reference() is not None for reference in self.made)


class TestCompressInto:
    def into(self, store, loaded, tasks, **settings):
        hypernetwork, encoder = loaded
        counted = Counted(hypernetwork)
        settings = {"run": "a run", "batch_tokens": 400, "progress": lambda line: None, **settings}
        return compress_into(store, counted, encoder, tasks, **settings), counted.passes

    def test_each_is_what_it_is_alone(self, store, loaded, run):
        tasks = ragged_tasks(20)
        summary, passes = self.into(store, loaded, iter(tasks), run=run)
        assert (summary.made, summary.there, summary.failed) == (20, 0, []) and len(store) == 20 and store.check() == []
        hypernetwork, encoder = loaded
        for task in tasks:
            context, manifest = shown_of(task).encode(encoder, hypernetwork.identity, run)
            (alone,) = hypernetwork.compress([context], [manifest])
            together = store.load(task.name, hypernetwork.identity)
            pairs = zip((*alone.keys, *alone.values), (*together.keys, *together.values))
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
            same = {**vars(alone.manifest), "created": None}
            assert same == {**vars(together.manifest), "created": None}
            assert together.manifest.context_sha256 == context_sha256(context)

    def test_manifests_are_those_of_single_files(self, store, loaded, run, tmp_path):
        folder = write_files(tmp_path / "tasks", ragged_tasks(3))
        sni = {"Definition": ["Copy."], "Positive Examples": [{"input": f"a{n}", "output": "a" * n} for n in (1, 2, 400)]}
        (folder / "task7.json").write_text(json.dumps({**sni, "Instances": [{"input": "b", "output": ["b"]}]}))
        options = {"shots": 3, "instruction": "Do."}
        summary, _ = self.into(store, loaded, task_files([folder]), run=run, **options)
        alone = compress(run, task_files([folder]), tmp_path / "alone", **options)
        assert summary.made == len(alone) == 4
        for _, prefix in alone:
            found = store.load(prefix.manifest.task).manifest
            assert {**vars(found), "created": None} == {**vars(prefix.manifest), "created": None}
        task7 = store.load("task7").manifest
        assert (task7.examples, task7.dropped_examples, task7.instruction, task7.hypernetwork) == (2, 1, "Do.", str(run))

    def test_passes_are_full_of_like_lengths_and_written_as_they_come(self, store, loaded, monkeypatch):
        monkeypatch.setattr(inference_many, "WINDOW", 3)
        monkeypatch.setattr(inference_many, "PASS_TASKS", 5)
        monkeypatch.setattr(inference_many, "PROGRESS_SECONDS", 0)
        held, lines = [], []

        def progress(line):
            lines.append(line)
            held.append(counted.held())

        counted = Counted(loaded[0])
        settings = {"batch_tokens": 700, "progress": progress}
        summary, passes = self.into(store, (counted, loaded[1]), ragged_tasks(60), **settings)
        gists = loaded[0].num_gists
        assert all(sum(n + gists for n, _ in batch) <= 700 and len(batch) <= 5 for batch in passes)
        assert all([n for n, _ in batch] == sorted((n for n, _ in batch), reverse=True) for batch in passes)
        assert 60 / 5 <= len(passes) <= 30 and sum(map(len, passes)) == len(store) == summary.made == 60
        assert len(counted.made) == 60 and max(held) <= 5, "prefixes of one pass at most"
        assert any("of 60 tasks" in line and "tasks/s" in line for line in lines) and str(store.folder) in lines[0]
        assert "60 made" in lines[-1] and summary.tokens == sum(n for batch in passes for n, _ in batch)

    def test_one_that_is_larger_than_a_pass_is_a_pass_of_its_own(self, store, loaded):
        _, passes = self.into(store, loaded, ragged_tasks(6), batch_tokens=1)
        assert [len(batch) for batch in passes] == [1] * 6

    def test_passes_on_a_cpu_are_small_unless_told(self, store, loaded):
        summary, passes = self.into(store, loaded, ragged_tasks(120), batch_tokens=None)
        sizes = [sum(n + loaded[0].num_gists for n, _ in batch) for batch in passes]
        assert summary.made == 120 and len(passes) > 1 and 1024 < max(sizes) <= 2048
        assert inference_many.pass_tokens(torch.device("cuda")) == 16384

    def test_what_is_there_is_not_compressed_again(self, store, loaded):
        tasks = ragged_tasks(12)
        self.into(store, loaded, tasks[:7])
        times = {path: path.stat().st_mtime_ns for path in store.folder.glob("*.safetensors")}
        damaged, forgotten, *_ = times
        damaged.write_bytes(damaged.read_bytes()[:-1])
        journal = store.folder / "index" / "rank0.jsonl"
        journal.write_text("".join(line for line in journal.read_text().splitlines(True) if forgotten.name not in line))
        summary, passes = self.into(store, loaded, [*tasks, *tasks[:3], tasks[-1]])
        assert (summary.made, summary.there) == (6, 10) and sum(map(len, passes)) == 6
        assert store.check() == [] and len(store) == 12
        assert all(path.stat().st_mtime_ns == then for path, then in times.items() if path != damaged)
        summary, passes = self.into(store, loaded, tasks, shots=1)
        assert summary.made and summary.there, "fewer shots are another context, unless there is one example only"

    def test_another_hypernetwork_is_another_prefix(self, store, loaded, saved_base):
        hypernetwork, encoder = loaded
        other = trained_hypernetwork(load_base(str(saved_base)), seed=7)
        self.into(store, loaded, ragged_tasks(2))
        summary, _ = self.into(store, (other, encoder), ragged_tasks(2))
        assert summary.made == 2 and len(store) == 4
        hashes = {store.load(entry).manifest.hypernetwork_sha256 for entry in store.find(task="task 0")}
        assert hashes == {hypernetwork.fingerprint(), other.fingerprint()}

    def test_tasks_of_one_name_do_not_overwrite_each_other(self, store, loaded, tmp_path):
        tasks = ragged_tasks(4)
        folders = [write_files(tmp_path / name, [Task("x", "", (), t.examples)]) for name, t in zip("abcd", tasks)]
        summary, _ = self.into(store, loaded, task_files(folders))
        assert summary.made == 4 == len(store.find(task="x"))

    def test_bad_files_are_told_of_and_stop_nobody(self, store, loaded, tmp_path):
        hypernetwork, encoder = loaded
        folder = write_files(tmp_path / "tasks", ragged_tasks(3))
        (folder / "broken.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": ')
        (folder / "empty.jsonl").write_text("")
        (folder / "long.jsonl").write_text(json.dumps({"input": "x" * 400, "output": "y"}))
        (folder / "number.json").write_text("7")
        odd = {"Instances": [{"input": "a", "output": ["b"]}], "Definition": "x", "Categories": 3}
        (folder / "odd.json").write_text(json.dumps(odd))
        os.mkfifo(folder / "pipe.json")
        files = [*task_files([folder]), folder / "none.jsonl", Task("nothing", "", (), ())]
        summary, _ = self.into(store, loaded, files)
        assert summary.made == len(store) == 3 and summary.done == len(files)
        found = dict(sentence.split(": ", 1) for sentence in summary.failed)
        assert {Path(where.split(",")[0]).name for where in found} == {
            *("broken.jsonl", "empty.jsonl", "long.jsonl", "number.json", "odd.json", "none.jsonl", "nothing")
        }
        assert "none of its 1 demonstrations fits" in found[f"{folder}/long.jsonl"]
        assert "Categories must be a text or a list of texts, not '3'" in found[f"{folder}/odd.json"]
        assert found["nothing"] == "nothing to compress, neither demonstrations nor an instruction"
        assert all("\n" not in sentence for sentence in summary.failed) and "7 failed" in str(summary)

    def test_a_context_longer_than_the_model_stops_nobody(self, store, loaded):
        hypernetwork, encoder = loaded
        roomy = type(encoder)(encoder.tokenizer, encoder.format, Limits(context_tokens=2000))
        tasks = [*ragged_tasks(3), Task("long", "", (), (Example("x" * 600, "y"),))]
        # With a start token, two line ends and three gists: 512 positions, and one more.
        tasks += [Task("fits", "z" * 506, (), ()), Task("over", "z" * 507, (), ())]
        summary, _ = self.into(store, (hypernetwork, roomy), tasks, batch_tokens=4000)
        assert summary.made == 4 and store.load("fits").manifest.context_tokens == 509
        long, over = summary.failed
        assert long.startswith("long: takes 6") and "3 gists, but the model has 512 positions" in long
        assert over.startswith("over: takes 510 tokens and 3 gists")

    def test_settings_and_folders_that_make_no_sense(self, store, loaded, tmp_path):
        for wrong in ({"rank": 2, "ranks": 2}, {"rank": -1}, {"batch_tokens": 0}):
            with pytest.raises(UserError, match="count ranks from 0, and tokens from 1"):
                self.into(store, loaded, [], **wrong)
        with pytest.raises(UserError, match="a folder without .json or .jsonl files"):
            task_files([tmp_path])
        assert self.into(store, loaded, [])[0].done == 0

    def test_ranks_share_the_tasks_out(self, store, loaded):
        tasks = ragged_tasks(11)
        done = [self.into(store, loaded, tasks, rank=rank, ranks=3)[0].made for rank in range(3)]
        assert done == [4, 4, 3] and len(store) == 11 and store.check() == []
        assert [p.name for p in sorted((store.folder / "index").iterdir())] == [f"rank{r}.jsonl" for r in range(3)]
        assert self.into(store, loaded, tasks)[0].there == 11, "another number of ranks goes on from there"


WORKER = """
import json, sys, time
from hyperllama.hypernetworks.loading import load_hypernetwork
from hyperllama.inference.many import compress_into, task_files
from hyperllama.prefixes.store import PrefixStore

run, folder, store, rank, ranks, pause = sys.argv[1:]
hypernetwork, encoder = load_hypernetwork(run)
compress, compressed = hypernetwork.compress, []

def counted(contexts, manifests):
    time.sleep(float(pause))
    compressed.extend(manifest.task for manifest in manifests)
    return compress(contexts, manifests)

hypernetwork.compress = counted
summary = compress_into(
    PrefixStore(store), hypernetwork, encoder, task_files([folder]), run=run, batch_tokens=600, rank=int(rank),
    ranks=int(ranks), progress=lambda line: print(line, file=sys.stderr),
)
print(json.dumps({"compressed": compressed, "there": summary.there, "failed": summary.failed}))
"""


def work(run, folder, store, rank=0, ranks=1, pause=0.0):
    """Start a worker; the process, and the file in which it prints."""
    # A script of its own: one that is written again while a worker begins to read it is empty to that worker.
    script, printed = (store.with_name(f"{store.name}-{rank}.{kind}") for kind in ("py", "txt"))
    script.write_text(WORKER)
    printed.unlink(missing_ok=True)
    program = (script, run, folder, store, rank, ranks, pause)
    return start(*program, out=printed, err=f"{printed}.err", TOKENIZERS_PARALLELISM="false"), printed


def finish(worker, printed):
    worker.join(300)
    assert worker.exitcode == 0, Path(f"{printed}.err").read_text()
    return json.loads(printed.read_text())


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ranks_make_what_one_makes(run, tmp_path):
    count = 300
    tasks = write_files(tmp_path / "tasks", ragged_tasks(count, seed=1))
    names = {path.stem for path in task_files([tasks])}

    def files(store):
        return {path.name: path for path in (tmp_path / store).glob("*.safetensors")}

    worker, _ = work(run, tasks, tmp_path / "one", pause=0.02)
    while len(files("one")) < count // 2 and worker.is_alive():
        time.sleep(0.005)
    worker.kill()
    worker.join()
    times = {path: path.stat().st_mtime_ns for path in files("one").values()}
    assert worker.exitcode == -signal.SIGKILL and count // 2 <= len(times) < count
    there = {Prefix.load(path).manifest.task for path in times}
    ranks = [work(run, tasks, tmp_path / "two", rank, 2) for rank in range(2)]  # at once, into one store
    resumed = finish(*work(run, tasks, tmp_path / "one"))
    assert resumed["there"] == len(there) and not resumed["failed"]
    assert sorted([*there, *resumed["compressed"]]) == sorted(names), "none is compressed twice, none is left out"
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    halves = [finish(*worker)["compressed"] for worker in ranks]
    assert list(map(len, halves)) == [150, 150] and set(halves[0]) | set(halves[1]) == names
    one, two = PrefixStore(tmp_path / "one"), PrefixStore(tmp_path / "two")
    assert one.check() == two.check() == [] and len(one) == len(two) == count
    for mine, its in zip(one, two, strict=True):
        assert mine.differences(its) == []
        a, b = one.load(mine), two.load(its)
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values)))
