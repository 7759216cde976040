"""What stays: no verb writes over what it reads, results are of what they say, and one process writes at a time."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from conftest import trained_hypernetwork
from data_files import lines, write
from launch import ENVIRONMENT

import hyperllama.commands.generate as commands_generate
from eval.run import evaluate
from hyperllama import cli, runs
from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.commands.generate import Answering, Asked, Session, facts_of
from hyperllama.commands.train import train
from hyperllama.commands.tune import tune
from hyperllama.data.text import Limits, TextFormat
from hyperllama.errors import UserError
from hyperllama.files import append, check_output, read_json, read_json_lines, read_text, whole_json_lines, write_atomically
from hyperllama.inference.sampling import contradictions, sampling
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.store import PrefixStore
from hyperllama.recipe.loading import load_recipe
from hyperllama.recipe.schema import EvaluationRecipe

LIMITS = {"context_tokens": 200, "query_tokens": 99}
PAIRS = [{"input": w, "output": w.upper()} for w in ("one", "two", "three", "four", "five", "six")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, saved_base):
    folder = tmp_path_factory.mktemp("run")
    made = trained_hypernetwork(load_base(str(saved_base)), tokenizer=load_tokenizer(str(saved_base)))
    made.save_pretrained(folder, {"format": vars(TextFormat(answer_tokens=4)), "limits": vars(Limits(context_tokens=300))})
    return folder


@pytest.fixture
def call(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["hyperllama", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


@pytest.fixture
def prefix(run, tmp_path, call):
    examples = write(tmp_path / "examples.jsonl", lines(PAIRS))
    assert call("compress", run, examples, "-o", tmp_path / "p.safetensors")[0] == 0
    return tmp_path / "p.safetensors"


def refused(result, *said):
    code, out, err = result
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and all(str(part) in err for part in said), result


class TestOutputs:
    def test_no_verb_writes_over_what_it_reads(self, call, run, prefix, tmp_path):
        examples, before = tmp_path / "examples.jsonl", (tmp_path / "examples.jsonl").read_bytes()
        (tmp_path / "link.jsonl").symlink_to(examples)
        os.link(examples, tmp_path / "hard.jsonl")
        own = prefix.read_bytes()
        for output in (examples, tmp_path / "link.jsonl", tmp_path / "hard.jsonl"):
            for more in ([], ["--overwrite"]):
                refused(call("generate", prefix, "--inputs", examples, "-o", output, *more), output, "is read, so it cannot")
                refused(call("compress", run, examples, "-o", output, *more), output, "is read, so it cannot be written too")
        refused(call("compose", prefix, prefix, "-o", prefix, "--overwrite"), "is read, so it cannot be written too")
        refused(call("generate", prefix, "--input", "x", "-o", prefix, "--overwrite"), "is read, so it cannot be written too")
        assert examples.read_bytes() == before and prefix.read_bytes() == own

    def test_what_is_not_ours_asks_for_overwrite(self, call, run, prefix, tmp_path):
        examples, notes = tmp_path / "examples.jsonl", write(tmp_path / "notes.txt", "mine")
        verbs = [("compress", run, examples), ("generate", prefix, "--input", "x"), ("compose", prefix, prefix)]
        for verb in verbs:
            refused(call(*verb, "-o", notes), notes, "is there already", "--overwrite to replace it")
        assert notes.read_text() == "mine"
        for verb in verbs:
            assert call(*verb, "-o", notes, "--overwrite")[0] == 0 and notes.read_bytes() != b"mine"
            notes.write_text("mine")
        assert call("compress", run, examples, "-o", prefix)[0] == 0, "a prefix is ours, and may be made anew"
        folder = tmp_path / "adapter"
        write(folder / "README.md", "mine")
        refused(call("export", prefix, folder), folder, "holds README.md, which is not ours")
        assert call("export", prefix, folder, "--overwrite")[0] == 0 and call("export", prefix, folder)[0] == 0

    def test_a_folder_with_other_files_is_no_place_for_a_run(self, tmp_path, saved_base):
        data = tmp_path / "data"
        write(data / "t.jsonl", lines(PAIRS))
        recipe = write(tmp_path / "e.yaml", f"method: evaluate\noutput: {data}\ndata: {{source: jsonl, root: {data}}}\n")
        for verb, more in ((evaluate, []), (train, ["method=hypernetwork"]), (tune, ["method=tune"])):
            path = recipe
            if more:
                keys = {"output": str(data), "data": {"source": "jsonl", "root": str(data), "shots": 2, "queries": 1}}
                keys |= {"training": {"max_steps": 1, "use_cpu": True}, "method": more[0].partition("=")[2]}
                keys |= {"model": str(saved_base)} if verb is tune else {"model": {"name_or_path": str(saved_base)}}
                keys |= {"start": {"kind": "random"}} if verb is tune else {"limits": LIMITS}
                path = write(tmp_path / f"{verb.__name__}.yaml", yaml.safe_dump(keys))
            with pytest.raises(UserError, match="holds files that no run has written, such as t.jsonl"):
                verb(path)
        assert [path.name for path in data.iterdir() if not path.name.startswith(".")] == ["t.jsonl"]

    def test_a_recipe_may_lie_where_its_run_goes_and_stays_as_it_is(self, recipes, tmp_path):
        for verb, run in VERBS.items():
            text = f"# mine\n{recipes[verb].read_text()}"
            own = write(tmp_path / verb / "recipe.yaml", text)
            run(own)
            assert own.read_text() == text and (own.parent / "made_from.json").is_file()

    @pytest.mark.parametrize("name", ["x" * 300, "file/below", ".", "/dev/null", "/proc/nothing/here"])
    def test_a_place_that_cannot_be_written_is_refused_before_anything_loads(
        self, call, run, prefix, name, tmp_path, monkeypatch
    ):
        write(tmp_path / "file", "")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(commands_generate, "Session", None)
        monkeypatch.setattr("hyperllama.commands.compress.load_maker", None)
        for verb in (("generate", prefix, "--input", "x"), ("compose", prefix, prefix)):
            refused(call(*verb, "-o", name), name)
        if name != ".":  # a folder, where a prefix has its place
            refused(call("compress", run, tmp_path / "examples.jsonl", "-o", name), name)

    def test_a_place_of_another_kind_is_refused(self, call, run, prefix, tmp_path, saved_base):
        examples = tmp_path / "examples.jsonl"
        refused(call("compress", run, examples, "-o", ""), "--output: is empty")
        refused(call("compress", run, examples, "-o", saved_base), saved_base, "holds a model")
        refused(call("list", run), run, "a folder without prefixes or an index of some")
        one = write(tmp_path / "one.jsonl", lines([PAIRS[0], PAIRS[0]]))
        refused(call("compress", run, one, "-o", tmp_path / "x", "--report"), one, "has 1 different inputs, but a report holds")

    def test_a_full_disk_is_named(self, tmp_path):
        code = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
            "from hyperllama.files import write_atomically, append\n"
            "for write in (write_atomically, append):\n"
            "    try: write(sys.argv[1], 'x' * 99)\n"
            "    except OSError as error: print(error)\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "out.txt")]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
        assert done.stdout.splitlines() == [f"[Errno 27] File too large: '{tmp_path}/out.txt'"] * 2, done.stderr

    def test_a_link_is_followed_and_a_device_is_not_replaced(self, tmp_path):
        target = write(tmp_path / "target", "old")
        (tmp_path / "link").symlink_to(target)
        write_atomically(tmp_path / "link", "new")
        assert (tmp_path / "link").is_symlink() and target.read_text() == "new"
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="pipe"):
            write_atomically(tmp_path / "pipe", "x")
        write_atomically(tmp_path / ("n" * 250), "a name as long as names may be")

    def test_a_path_that_is_free_is_free(self, tmp_path):
        check_output(tmp_path / "a" / "b" / "c", reads=[tmp_path / "a"])
        assert not list(tmp_path.iterdir())


class TestAnswers:
    def test_other_fields_are_carried_through(self, call, prefix, tmp_path):
        rows = [{"id": 7, "input": "one", "output": ["ONE", "One"], "source": {"page": 3}}, {"input": "two", "tag": None}]
        inputs = write(tmp_path / "in.jsonl", "\ufeff" + lines(rows))
        assert call("generate", prefix, "--inputs", inputs, "-o", tmp_path / "out.jsonl")[0] == 0
        one, two = whole_json_lines(tmp_path / "out.jsonl")
        assert one.pop("output") and two.pop("output") is not None
        assert one == {"input": "one", "references": ["ONE", "One"], "id": 7, "source": {"page": 3}}
        assert two == {"input": "two", "tag": None}
        code, out, _ = call("generate", prefix, "--inputs", inputs)
        assert code == 0 and [json.loads(line)["input"] for line in out.splitlines()] == ["one", "two"]

    def test_one_input_too_long_is_named_before_any_is_answered(self, call, prefix, tmp_path, monkeypatch):
        rows = [*({"input": f"{i}"} for i in range(40)), {"input": "x " * 600}, {"input": "y " * 600}]
        inputs = write(tmp_path / "in.jsonl", lines(rows))
        monkeypatch.setattr(Session, "answer", None)
        said = (f"{inputs}, line 41", "positions, but the model has 512; shorten", "(1 more inputs cannot be answered)")
        refused(call("generate", prefix, "--inputs", inputs, "-o", tmp_path / "out.jsonl"), *said)
        assert not list(tmp_path.glob("out*"))

    def test_a_rerun_goes_on(self, prefix, tmp_path, monkeypatch, capsys):
        session, settings = Session(prefix), {"batch_size": 1, "do_sample": True, "temperature": 1.5, "top_p": 1.0}
        asked = [Asked(f"line {i}", f"word {i % 7}", {"n": i}) for i in range(20)]
        whole = tmp_path / "whole.jsonl"
        answering = Answering(session, asked, seed=3, **settings)
        facts = facts_of(answering, prefix)
        assert answering.write(whole, facts) == 0
        answer, calls = Session.answer, []

        def dying(self, inputs, **more):
            calls.append(len(inputs))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return answer(self, inputs, **more)

        monkeypatch.setattr(Session, "answer", dying)
        out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
        with pytest.raises(KeyboardInterrupt):
            Answering(session, asked, seed=3, **settings).write(out, facts)
        assert not out.exists() and len(whole_json_lines(partial)) == 1 + 16
        with partial.open("a") as file:
            file.write('{"input": "half a li')
        assert Answering(session, asked, seed=3, **settings).write(out, facts) == 16
        assert out.read_text() == whole.read_text() and calls == [8, 8, 4, 4] and not partial.exists()
        write_atomically(partial, json.dumps({"made_from": {**facts, "seed": 4}}) + "\n" + out.read_text())
        assert Answering(session, asked, seed=3, **settings).write(out, facts) == 0
        assert "begins anew" in capsys.readouterr().err and out.read_text() == whole.read_text()

    @pytest.mark.parametrize("change", ["inputs", "prefix", "settings", "seed"])
    def test_answers_are_known_by_all_that_they_depend_on(self, prefix, tmp_path, change):
        session, asked = Session(prefix), [Asked("line 1", "word")]
        facts = facts_of(Answering(session, asked), prefix)
        if change == "inputs":
            other = facts_of(Answering(session, [Asked("line 1", "word", {"id": 1})]), prefix)
        elif change == "prefix":
            loaded = Prefix.load(prefix)
            loaded.values[0][0, 0, 0] += 1
            loaded.save(tmp_path / "other.safetensors")
            other = facts_of(Answering(session, asked), tmp_path / "other.safetensors")
        else:
            other = facts_of(Answering(session, asked, **({"seed": 1} if change == "seed" else {"max_new_tokens": 2})), prefix)
        assert json.loads(json.dumps(facts)) == facts != other

    def test_temperature_0_is_greedy_and_contradictions_are_refused(self, call, prefix, tmp_path):
        greedy = call("generate", prefix, "--input", "one")
        assert call("generate", prefix, "--input", "one", "--temperature", 0) == greedy
        refused(call("generate", prefix, "--input", "one", "--temperature", 0, "--top-p", 0.95), "--top-p: is for sampling")
        refused(call("chat", prefix, "--temperature", 0, "--top-p", 0.95), "--top-p: is for sampling")
        assert sampling(None, 0.9) == {"do_sample": True, "temperature": 1.0, "top_p": 0.9} and sampling(None, None) == {}
        assert not list(contradictions(sampling(0.7, None)))
        recipe = write(
            tmp_path / "e.yaml", f"method: evaluate\noutput: {tmp_path}/e\ndata: {{source: jsonl, root: {tmp_path}}}\n"
        )
        for setting, said in (
            ("temperature=0.7", "generation.temperature: is for sampling, but answers are greedy"),
            ("max_new_token=7", "generation.max_new_token: transformers' generate has no such setting"),
            ("num_return_sequences=2", "generation.num_return_sequences: there is one answer a prompt"),
            ("max_new_tokens=0", "generation.max_new_tokens: at least 1, not 0"),
        ):
            with pytest.raises(UserError, match=said):
                load_recipe(recipe, [f"generation.{setting}"], schema=EvaluationRecipe)
        load_recipe(recipe, ["generation.do_sample=true", "generation.temperature=0.7"], schema=EvaluationRecipe)


class TestText:
    def test_what_can_be_read_is_read(self, tmp_path):
        path = tmp_path / "x.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"input": "a"}\r\n{"input": "\\ud83d\\ude00"}\r\n')
        assert [value["input"] for _, value in read_json_lines(path, "x")] == ["a", "😀"]
        path.write_bytes(b"\xef\xbb\xbf{}")
        assert read_json(path, "x") == {}
        recipe = tmp_path / "r.yaml"
        recipe.write_bytes(b"\xef\xbb\xbfmethod: evaluate\noutput: x\n")
        with pytest.raises(UserError, match="run it with hyperllama evaluate"):
            load_recipe(recipe)

    @pytest.mark.parametrize(
        "content, said",
        [
            (b'{"input": "a"}\n{"input": "\\ud83d"}', r"x.jsonl, line 2: has \\ud83d, half of a character"),
            (b'{"input": "a"}\n{"input": "\xff"}', r"x.jsonl: not text in UTF-8 \(byte 0xff in line 2\); .* save it as UTF-8"),
            ('{"input": "a"}'.encode("utf-16"), "x.jsonl: text in UTF-16; .* save it as UTF-8"),
            (b'{"input": ' + b"9" * 5000 + b"}", "x.jsonl, line 1: cannot be read as JSON"),
            (b"[" * 100_000, "x.jsonl, line 1: cannot be read as JSON"),
        ],
    )
    def test_what_cannot_is_named_with_its_line(self, tmp_path, content, said):
        path = tmp_path / "x.jsonl"
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as caught:
            list(read_json_lines(path, "texts"))
        assert len(str(caught.value)) < 300

    def test_half_a_character_is_told_of_wherever_it_comes_from(self, prefix):
        with pytest.raises(UserError, match=r"has \\ud83d, half of a character, which no tokenizer can read"):
            Session(prefix).answer(["a \ud83d b"])

    def test_half_a_character_at_the_end_is_a_line_that_a_crash_cut_short(self, tmp_path):
        path = tmp_path / "x.jsonl"
        path.write_bytes('{"a": 1}\n{"b": "ä"}'.encode()[:-3])
        assert whole_json_lines(path) == [{"a": 1}]

    def test_a_folder_is_no_text(self, tmp_path):
        with pytest.raises(UserError, match="a folder, but plain text is a file"):
            read_text(tmp_path, "plain text")
        append(tmp_path / "x", "a")
        append(tmp_path / "x", "b", sync=True)
        assert read_text(tmp_path / "x", "text") == "ab"


@pytest.fixture
def recipes(tmp_path, saved_base, run):
    """A recipe for each verb that goes on, on the same data, and what of it stands in a file."""
    write(tmp_path / "data" / "upper.jsonl", lines(PAIRS))
    data = {"source": "jsonl", "root": f"{tmp_path}/data", "shots": 2, "queries": 2}
    training = {"use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 1}
    kinds = {
        "train": {"model": {"name_or_path": str(saved_base)}, "gist": {"tokens": 2}, "training": training, "limits": LIMITS},
        "tune": {
            "method": "tune",
            "model": str(saved_base),
            "start": {"kind": "random", "gists": 2},
            "training": {"max_steps": 1},
        },
        "evaluate": {"method": "evaluate", "hypernetwork": str(run), "methods": ["no_context", "prefix"], "leaks": "warn"},
    }
    kinds["tune"]["training"] = {"use_cpu": True, "max_steps": 1}
    return {
        name: write(tmp_path / f"{name}.yaml", yaml.safe_dump({**keys, "data": data, "output": f"{tmp_path}/{name}"}))
        for name, keys in kinds.items()
    }


VERBS = {"train": train, "tune": tune, "evaluate": evaluate}


class TestFingerprints:
    @pytest.mark.parametrize("verb", VERBS)
    def test_results_of_other_data_are_not_used_again(self, recipes, tmp_path, verb):
        VERBS[verb](recipes[verb])
        VERBS[verb](recipes[verb])  # the same: finished, or nothing left to do
        path = tmp_path / "data" / "upper.jsonl"
        path.write_text(
            path.read_text().replace("SIX", "six!").replace("TWO", "two!").replace("FIVE", "five!").replace("ONE", "!")
        )
        for _ in range(2):
            with pytest.raises(
                UserError, match=f"{verb}: what is there was made from another data; set output to a new folder"
            ):
                VERBS[verb](recipes[verb])
        (tmp_path / verb / "made_from.json").unlink()
        if verb != "evaluate":  # its results say themselves what was asked
            VERBS[verb](recipes[verb])

    def test_results_of_other_models_are_not_used_again(self, recipes, tmp_path, run, saved_base):
        import shutil

        base, copy = tmp_path / "base", tmp_path / "copy"
        shutil.copytree(saved_base, base)
        shutil.copytree(run, copy)
        changes = [f"hypernetwork={copy}", f"model={base}"]
        evaluate(recipes["evaluate"], changes)
        content = (copy / "gists.safetensors").read_bytes()
        (copy / "gists.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match="was made from another hypernetwork;"):
            evaluate(recipes["evaluate"], changes)
        (copy / "gists.safetensors").write_bytes(content)
        train(recipes["train"], [f"model.name_or_path={base}"])
        config = (base / "config.json").read_text()
        (base / "config.json").write_text(config.replace("}", " }"))
        of_train = (recipes["train"], [f"model.name_or_path={base}"])
        for verb, arguments in ((evaluate, (recipes["evaluate"], changes)), (train, of_train)):
            with pytest.raises(UserError, match="was made from another base;"):
                verb(*arguments)

    def test_other_code_is_told_of_and_another_version_refused(self, tmp_path, capsys):
        runs.remember(tmp_path, {"data": "1", "base": None})
        runs.check_same(tmp_path, {"data": "1", "base": "now known"})
        assert capsys.readouterr().err == ""
        said = json.loads((tmp_path / "made_from.json").read_text())
        write(tmp_path / "made_from.json", {**said, "code": "0" * 64})
        runs.check_same(tmp_path, {"data": "1"})
        assert "was begun by other code of HyperLlama" in capsys.readouterr().err
        write(tmp_path / "made_from.json", {**said, "version": "0.0.1"})
        with pytest.raises(UserError, match="made from another version"):
            runs.check_same(tmp_path, {"data": "1"})

    def test_files_are_known_by_what_is_in_them(self, tmp_path, monkeypatch):
        folder = tmp_path / "model"
        write(folder / "config.json", "{}")
        write(folder / "model.safetensors", "abc")
        write(folder / "notes.txt", "not a part")
        first = runs.digest_of(folder)
        write(folder / "notes.txt", "changed")
        assert runs.digest_of(folder) == first
        write(folder / "model.safetensors", "abd")
        assert runs.digest_of(folder) != first and runs.digest_of(None) is None and runs.digest_of("owner/unknown") is None
        monkeypatch.setattr(runs, "WHOLE_BYTES", 10)
        monkeypatch.setattr(runs, "BLOCK_BYTES", 4)
        large = tmp_path / "large.bin"
        large.write_bytes(bytes(1000))
        before = runs.digest_of(large)
        for place in (0, 999):
            large.write_bytes(bytes(place) + b"x" + bytes(999 - place))
            assert runs.digest_of(large) != before
        large.write_bytes(bytes(1001))
        assert runs.digest_of(large) != before

    def test_what_made_a_prefix_is_all_that_decides(self, run):
        from hyperllama.hypernetworks.loading import load_hypernetwork

        found = {load_hypernetwork(run, dtype=dtype)[0].fingerprint() for dtype in ("float32", "bfloat16")}
        assert len(found) == 2, "a store does not take the one for the other"

    def test_a_query_too_long_can_be_skipped_from_where_it_stopped_training(self, recipes, tmp_path):
        rows = [*PAIRS, {"input": "x" * 300, "output": "y"}]
        write(tmp_path / "data" / "upper.jsonl", lines(rows))
        changes = ["limits.query_tokens=60", "training.max_steps=12", "data.queries=3", "training.save_steps=1"]
        with pytest.raises(UserError, match="set limits.too_long_query to skip"):
            train(recipes["train"], changes)
        assert train(recipes["train"], [*changes, "limits.too_long_query=skip"]).global_step == 12


HOLDER = (
    "import sys, time; from hyperllama.runs import owned\nwith owned(sys.argv[1]): print('held', flush=True); time.sleep(60)"
)


class TestLocks:
    def test_one_process_writes_and_a_lock_dies_with_it(self, tmp_path):
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match="run: another process is writing there; wait until it is done"),
            runs.owned(tmp_path / "run"),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with runs.owned(tmp_path / "run"), pytest.raises(UserError, match="another process"), runs.owned(tmp_path / "run"):
            pass
        assert not list((tmp_path / "run").iterdir())

    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_that_owns_a_folder_locks_it(self, recipes, tmp_path, verb):
        place = tmp_path / verb
        held = runs.owned(place / "rank0", folder=False) if verb == "evaluate" else runs.owned(place)
        with held, pytest.raises(UserError, match="another process is writing there"):
            VERBS[verb](recipes[verb])
        VERBS[verb](recipes[verb])

    def test_of_two_that_train_into_one_run_one_does(self, recipes, tmp_path):
        command = [sys.executable, "-m", "hyperllama", "train", str(recipes["train"]), "training.max_steps=40"]
        command += ["training.logging_steps=1"]
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": {**os.environ, **ENVIRONMENT}}
        both = [subprocess.Popen(command, **settings) for _ in range(2)]
        said = [process.communicate(timeout=300)[1] for process in both]
        codes = [process.returncode for process in both]
        steps = [line["step"] for line in whole_json_lines(tmp_path / "train" / "metrics.jsonl") if "loss" in line]
        assert steps == list(range(1, 41)), said
        assert (codes in ([0, 2], [2, 0]) and "another process is writing there" in said[codes.index(2)]) or codes == [0, 0]

    def test_answers_are_written_by_one(self, prefix, tmp_path):
        answering = Answering(Session(prefix), [Asked("line 1", "word")])
        with runs.owned(tmp_path / "out.jsonl", folder=False), pytest.raises(UserError, match="another process"):
            answering.write(tmp_path / "out.jsonl", {})
        answering.write(tmp_path / "out.jsonl", {})
        assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out.jsonl"]

    def test_a_store_is_not_repaired_while_a_process_adds_to_it(self, tmp_path):
        store = PrefixStore(tmp_path / "store")
        with store.writing(), store.writing(), pytest.raises(UserError, match="another process is writing there"):
            store.repair()
        with runs.owned(store.folder / "index" / "repair", folder=False):
            busy = pytest.raises(UserError, match="repair: another process is writing there")
            with busy, store.writing():
                pass
        write(store.folder / "index" / ".writing-7-dead.lock", "")  # of a process that was killed
        assert store.repair() == [] and [path.name for path in (store.folder / "index").iterdir()] == ["rank0.jsonl"]


def test_an_error_stays_short_whatever_a_file_says():
    message = str(UserError(f"file.json: kind is {'x' * 5000!r}, not {'y' * 900}; correct it"))
    assert len(message) < 1300 and message.startswith("file.json: kind is 'xxx") and message.endswith("; correct it")
    assert "y" * 900 in message, "a long path is shown whole"
