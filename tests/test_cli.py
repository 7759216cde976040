"""The command line as a user meets it: fast help, whole verbs, and errors in one line with exit code 2."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import trained_hypernetwork

from attention_masks import BACKENDS
from hyperllama import cli, noise
from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.cli.app import Verb
from hyperllama.commands import generate as commands_generate
from hyperllama.data.text import Limits, TextFormat
from hyperllama.prefixes.export import peft as prefixes_export_peft
from hyperllama.prefixes.export.peft import from_peft
from hyperllama.prefixes.prefix import Prefix

ROOT = Path(__file__).parent.parent
VERBS = ("check", "train", "compress", "list", "compose", "generate", "chat", "tune", "study")
VERBS += ("export", "push", "evaluate", "inspect", "env", "fetch", "demo")


def run(monkeypatch, capsys, *arguments):
    """Run a verb in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["hyperllama", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: run(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, saved_base):
    """The folder of a finished hypernetwork run on a saved base."""
    folder = tmp_path_factory.mktemp("run")
    hypernetwork = trained_hypernetwork(load_base(str(saved_base)), tokenizer=load_tokenizer(str(saved_base)))
    notes = {"format": vars(TextFormat()), "limits": vars(Limits(context_tokens=300)), "data": "none"}
    hypernetwork.save_pretrained(folder, notes)
    return folder


@pytest.fixture
def examples(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps({"input": w, "output": w.upper()}) + "\n" for w in ("one", "two", "three")))
    return path


@pytest.fixture
def task_file(tmp_path):
    task = {"Definition": ["Copy."], "Positive Examples": [{"input": x, "output": x} for x in "axy"]}
    path = tmp_path / "task7_copy.json"
    path.write_text(json.dumps({**task, "Instances": [{"input": "b", "output": ["b", "B"]}, {"input": "c", "output": ["c"]}]}))
    return path


def test_help_is_there_at_once():
    command = [sys.executable, "-c", "import sys; sys.argv = ['hyperllama', '--help']; from hyperllama.cli import main; main()"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and all(verb in done.stdout for verb in VERBS)
    assert min(seconds) < 0.5


def test_nothing_heavy_is_imported_before_a_verb_runs():
    code = (
        "import sys, hyperllama, hyperllama.cli, hyperllama.recipe.loading, hyperllama.prefixes.store\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_python_m_and_public_names():
    done = subprocess.run([sys.executable, "-m", "hyperllama", "inspect", "nothing"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("hyperllama: nothing: no such prefix file")
    import hyperllama

    assert all(getattr(hyperllama, name) for name in hyperllama.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = hyperllama.nonsense


def test_compress_generate_inspect(call, trained, examples, task_file, tmp_path):
    code, out, err = call(
        "compress", trained, examples, "--output", tmp_path / "one.safetensors", "--shots", 2, "--instruction", "Shout."
    )
    assert code == 0 and "2 examples" in out and "-> 3 rows" in out
    manifest = Prefix.load(tmp_path / "one.safetensors").manifest
    assert (manifest.task, manifest.examples, manifest.instruction) == ("examples", 2, "Shout.")
    assert manifest.hypernetwork == str(trained) and manifest.base.tokenizer

    code, out, err = call("compress", trained, examples, task_file, "-o", f"{tmp_path}/many")
    assert code == 0 and sorted(p.name for p in (tmp_path / "many").iterdir()) == [
        "examples.safetensors",
        "task7_copy.safetensors",
    ]
    assert Prefix.load(tmp_path / "many" / "task7_copy.safetensors").manifest.examples == 3

    code, out, err = call("generate", tmp_path / "one.safetensors", "--input", "four", "--max-new-tokens", 3)
    assert code == 0 and len(out.splitlines()) >= 1
    code, out, err = call(
        "generate", tmp_path / "one.safetensors", "--inputs", task_file, "-o", tmp_path / "a.jsonl", "--max-new-tokens", 3
    )
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [a["input"] for a in answers] == ["b", "c"] and answers[0]["references"] == ["b", "B"] and "2 answers" in err
    sampled = [
        call("generate", tmp_path / "one.safetensors", "--input", "x", "--temperature", 1.5, "--seed", s)[1] for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]

    code, out, err = call("inspect", tmp_path / "one.safetensors")
    assert code == 0 and "rows" in out and str(manifest.base.name) in out and "Shout." in out
    code, out, err = call("inspect", trained)
    assert code == 0 and "rank" in out and "context_tokens" in out


def one_line(result, *parts):
    code, out, err = result
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("hyperllama: "), result
    assert all(str(part) in err for part in parts), err


def test_bad_examples(call, trained, tmp_path):
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("")
    broken.write_text('{"input": "a", "output": "b"}\n{"input": ')
    output = tmp_path / "p.safetensors"
    one_line(call("compress", trained, empty, "-o", output), empty, "has no examples")
    one_line(call("compress", trained, broken, "-o", output), f"{broken}, line 2", "not JSON")
    one_line(call("compress", trained, tmp_path / "none.jsonl", "-o", output), "no such file")
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"Instances": []}))
    one_line(call("compress", trained, task, "-o", output), task, "nothing to compress, neither demonstrations nor an")
    assert not output.exists()


def test_bad_folders_and_outputs(call, trained, examples, tmp_path):
    one_line(call("compress", tmp_path, examples, "-o", "x"), tmp_path, "not a hypernetwork, it has no hypernetwork.json")
    one_line(
        call("compress", trained, examples, "-o", "x", "--base", tmp_path),
        tmp_path,
        "not a model folder, it has no config.json",
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "examples.jsonl").write_text(examples.read_text())
    one_line(
        call("compress", trained, examples, other / "examples.jsonl", "-o", tmp_path / "out"), "two files are named examples"
    )
    (other / "b.jsonl").write_text(examples.read_text())
    second = other / "b.jsonl"
    one_line(call("compress", trained, examples, second, "-o", examples), "a file, but several prefixes need a folder")
    one_line(call("compress", trained, examples, "-o", examples), "is read, so it cannot be written too; give another name")
    one_line(call("inspect", other), "neither a prefix file nor the folder of a run")


def test_examples_that_do_not_fit(call, trained, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"input": "x" * 400, "output": "y"}))
    one_line(call("compress", trained, path, "-o", tmp_path / "p"), "none of its 1 demonstrations fits into context_tokens=300")
    one_line(call("compress", trained, path, "-o", tmp_path / "p", "--instruction", "z" * 400), "an instruction takes")
    path.write_text(path.read_text() + "\n" + json.dumps({"input": "a", "output": "b"}))
    code, out, err = call("compress", trained, path, "-o", tmp_path / "p")
    assert code == 0 and "1 examples (1 more did not fit)" in out


def test_bad_prefixes(call, trained, examples, tmp_path):
    path = tmp_path / "p.safetensors"
    call("compress", trained, examples, "-o", path)
    one_line(call("generate", path), "give either --input TEXT, once or several times, or --inputs FILE")
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    one_line(call("generate", path, "--input", "x"), path, "not a whole prefix file")
    path.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    one_line(call("generate", path, "--input", "x"), path, "damaged, its checksum does not match")
    path.write_bytes(whole)
    one_line(call("generate", path, "--input", "x" * 600), "positions, but the model has 512")
    one_line(call("generate", path, "--inputs", tmp_path / "none.jsonl"), "no such file")


def test_a_prefix_for_another_base(call, trained, examples, saved_base, tmp_path):
    from conftest import tiny_architecture
    from transformers import set_seed

    from hyperllama.base.loading import random_base

    path = tmp_path / "p.safetensors"
    call("compress", trained, examples, "-o", path)
    set_seed(9)
    tokenizer = load_tokenizer(str(saved_base))
    random_base(tiny_architecture("llama"), vocab_size=len(tokenizer), pad_token_id=0).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    one_line(
        call("generate", path, "--input", "x", "--base", tmp_path / "other"), "was made for", saved_base, tmp_path / "other"
    )


def test_bad_recipes_are_told_before_anything_loads(call, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("output: x\nmodle: {}\ngist: {tokens: a}\n")
    code, out, err = call("train", recipe)
    assert code == 2 and len(err.splitlines()) == 4 and "did you mean model?" in err and "Integer" in err
    recipe.write_text(
        f"output: {tmp_path}/run\nmodel: {{name_or_path: {tmp_path}}}\ntraining: {{max_steps: 1, use_cpu: true}}\n"
    )
    one_line(call("train", recipe), "not a model folder")
    assert not (tmp_path / "run").exists(), "nothing is half written"


def test_errors_of_the_command_line_itself(call):
    one_line(call("trian"), "No such command 'trian'", "train")
    one_line(call("compress"), "Missing argument")
    one_line(call("generate", "x", "--input", "a", "--num-beams", "0"), "num-beams")
    with pytest.raises(Exception, match="no such prefix file"):
        call("--debug", "inspect", "x")


def test_every_input_that_is_given_is_answered_in_order(call, trained, examples, tmp_path):
    call("compress", trained, examples, "--output", tmp_path / "p.safetensors")
    few = ("--max-new-tokens", 3)
    alone = [call("generate", tmp_path / "p.safetensors", "--input", text, *few)[1] for text in ("four", "five")]
    both = ("generate", tmp_path / "p.safetensors", "--input", "four", "--input=five", *few)
    assert call(*both)[1] == "".join(alone) and call(*both, "--limit", 1)[1] == alone[0]
    code, _, err = call(*both, "--output", tmp_path / "a.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [a["input"] for a in answers] == ["four", "five"] and [a["output"] + "\n" for a in answers] == alone
    one_line(call(*both, "--inputs", examples), "give either --input TEXT, once or several times, or --inputs FILE")


@pytest.mark.parametrize(
    "arguments, what",
    [
        (("generate", "p", "--input", "a", "--seed", 1, "--seed=2"), "generate: --seed is given 2 times"),
        (("compress", "run", "a", "-o", "x", "--output", "y", "-oz"), "compress: --output is given 3 times"),
        (("check", "r.yaml", "--against", "a", "--against", "b"), "check: --against is given 2 times"),
        (("train", "r.yaml", "seed=1", "data.shots=2", "seed=2"), "train: seed is given 2 times"),
    ],
)
def test_what_is_meant_once_is_not_taken_twice(call, arguments, what):
    """Of two values the first would be dropped without a word."""
    one_line(call(*arguments), what, "only one value counts; leave the others out")


def test_every_verb_refuses_repetition():
    assert all(command.cls is Verb for command in cli.app.registered_commands)


@pytest.fixture(scope="module")
def elastic(trained, tmp_path_factory):
    run = tmp_path_factory.mktemp("elastic") / "run"
    shutil.copytree(trained, run)
    config = json.loads((run / "hypernetwork.json").read_text())
    (run / "hypernetwork.json").write_text(json.dumps({**config, "elastic": True}))
    return run


def test_compose(call, trained, elastic, examples, tmp_path):
    call("compress", trained, examples, "--output", tmp_path / "whole.safetensors")
    code, _, err = call("compose", tmp_path / "whole.safetensors", "--gists", 2, "--output", tmp_path / "b.safetensors")
    assert code == 2 and "whole.safetensors: the first 2 of 3 gists were not trained to do without the others" in err
    call("compress", elastic, examples, "--output", tmp_path / "a.safetensors")
    a = tmp_path / "a.safetensors"
    code, out, _ = call("compose", a, a, "--output", tmp_path / "b.safetensors")
    assert code == 0 and "6 rows" in out and Prefix.load(tmp_path / "b.safetensors").rows == 6
    code, out, _ = call("compose", a, a, "--gists", 2, "--int8", "--output", tmp_path / "c.safetensors")
    assert code == 0 and "4 rows" in out and "keys off by 0." in out
    code, out, err = call("compose", a, "--gists", 9, "--output", tmp_path / "d.safetensors")
    assert code == 2 and "can be cut to 1 .. 3 of them, not 9" in err and not (tmp_path / "d.safetensors").exists()


def test_evaluate_and_check(call, trained, examples, tmp_path):
    recipe = tmp_path / "e.yaml"
    recipe.write_text(f"""
method: evaluate
output: {tmp_path}/out
hypernetwork: {trained}
data: {{source: jsonl, root: {examples}, shots: 1, queries: 2}}
format: {{answer_tokens: 2}}
""")
    code, out, _ = call("check", recipe)
    assert code == 0 and "method evaluate, data jsonl" in out and "shared with training: " in out
    code, out, err = call("evaluate", recipe)
    assert code == 0 and "the prefix" in out and "Does it help?" in out and out.strip().endswith("report.md")
    assert "1 of 1 episodes" in err
    code, _, err = call("evaluate", recipe, "methods=[multi_task]")
    assert code == 2 and err.startswith("hyperllama: methods: multi_task needs multi_task, the run of a full-attention model;")
    code, _, err = call("train", recipe)
    assert code == 2 and "its method is evaluate; run it with hyperllama evaluate" in err


def test_chat_streams_what_generate_answers(call, trained, examples, tmp_path, monkeypatch):
    call("compress", trained, examples, "--output", tmp_path / "p.safetensors")
    single = [
        call("generate", tmp_path / "p.safetensors", "--input", text, "--max-new-tokens", 6)[1] for text in ("four", "five")
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("four\nfive\n\nnever\n"))
    code, out, _ = call("chat", tmp_path / "p.safetensors", "--max-new-tokens", 6)
    assert code == 0 and "".join(out.split()) == "".join("".join(single).split())


def test_chat_templates(call, trained, examples, tmp_path, saved_base):
    call("compress", trained, examples, "--output", tmp_path / "p.safetensors")
    code, _, err = call("generate", tmp_path / "p.safetensors", "--input", "a", "--chat-template")
    assert code == 2 and "its tokenizer has no chat template; leave --chat-template out" in err
    folder = tmp_path / "chatty"
    shutil.copytree(saved_base, folder)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %} [me]{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    session = commands_generate.Session(tmp_path / "p.safetensors", base_path=str(folder), chat_template=True)
    assert session.tokenizer.decode(session.prompt("hello")) == "[user] hello [me]"
    # A start token that the template writes itself would stand behind the prefix; control tokens of users are text.
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + template)
    session = commands_generate.Session(tmp_path / "p.safetensors", base_path=str(folder), chat_template=True)
    assert session.tokenizer.decode(session.prompt("a</s>b")) == "[user] a</s>b [me]"
    assert not {session.tokenizer.bos_token_id, session.tokenizer.eos_token_id} & set(session.prompt("a</s>b"))
    code, out, _ = call("generate", tmp_path / "p.safetensors", "--input", "a", "--chat-template", "--base", folder)
    assert code == 0


NOISE = ("real_accelerator", "gemm_4bit", "Loading weights", "Writing model shards", "it/s]", "{'", "Warning", "deprecated")


@pytest.mark.slow
def test_what_a_user_reads_is_ours(trained, examples, tmp_path):
    """In processes of their own, since libraries write where pytest does not look, and warn once."""
    quiet = {name: value for name, value in os.environ.items() if name not in (*noise.SETTINGS, "PYTHONWARNINGS")}

    def lines(*commands, **environment):
        """What each of the commands prints on its stdout and stderr."""
        script = [sys.executable, "-m", "tests.verbs", str(tmp_path)]
        given = json.dumps([[*map(str, command)] for command in commands])
        done = subprocess.run(script, input=given, capture_output=True, text=True, cwd=ROOT, env=quiet | environment)
        printed = [[(tmp_path / f"{n}.{kind}").read_text() for kind in ("out", "err")] for n in range(len(commands))]
        told = done.stderr + "".join(text for texts in printed for text in texts)
        assert done.returncode == 0 and not any(word in told for word in NOISE), told
        assert done.stdout == "" and done.stderr.splitlines() == ["hyperllama: nowhere.yaml: no such recipe file"]
        return [[text.splitlines() for text in texts] for texts in printed]

    run, prefix = tmp_path / "run", tmp_path / "p.safetensors"
    train = (
        "train",
        ROOT / "recipes/toy/base.yaml",
        f"output={run}",
        "training.max_steps=2",
        "training.logging_steps=1",
    )
    compress = ("compress", trained, examples, "--output", prefix)
    sampled = ("generate", prefix, "--input", "four", "--max-new-tokens", 3)
    beams = (*sampled, "--temperature", 2, "--num-beams", 2)
    (trains, compresses, *others) = lines(train, compress, sampled, beams, ("inspect", prefix))
    out, err = trains
    assert out[0].startswith("trained 2 steps; mean loss ") and len(out) == 1
    assert [line.partition(": loss ")[0] for line in err] == ["step 1 of 2", "step 2 of 2"]
    out, err = compresses
    assert len(out) == 1 and out[0].startswith(f"{prefix}: 3 examples") and not err
    assert len(others) == 3 and not any(err for _, err in others)
    # What a library would say of a name that we should no longer use, were it asked to.
    lines(sampled, compress, TRANSFORMERS_VERBOSITY="warning", PYTHONWARNINGS="always::FutureWarning")


def test_advice_is_hidden_and_errors_are_not(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    for name in noise.SETTINGS.keys() - {"TRANSFORMERS_VERBOSITY"}:
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)
    noise.quiet()
    noise.quiet()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info" and os.environ["TQDM_DISABLE"] == "1"
    logger = logging.getLogger("DeepSpeed")
    passes = [logger.filter(logger.makeRecord("x", level, "", 0, "", (), None)) for level in (logging.WARNING, logging.ERROR)]
    assert [bool(record) for record in passes] == [False, True]
    assert logging.getLogger("bitsandbytes.cextension").isEnabledFor(logging.ERROR)
    assert not logging.getLogger("bitsandbytes").isEnabledFor(logging.WARNING)


def test_export(call, trained, examples, tmp_path, monkeypatch):
    call("compress", trained, examples, "--output", tmp_path / "p.safetensors")
    code, out, _ = call("export", tmp_path / "p.safetensors", tmp_path / "adapter")
    assert code == 0 and "rows=3" in out and (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert from_peft(tmp_path / "adapter") == Prefix.load(tmp_path / "p.safetensors")
    sentence = "PEFT 0.21.2 loses a prefix in generate with transformers 5.24.0, though not in forward; generate with "
    for newest, said in (("5.24.0", True), ("5.23.0", False)):
        monkeypatch.setattr(prefixes_export_peft, "version", {"peft": "0.21.2", "transformers": newest}.__getitem__)
        assert call("export", tmp_path / "p.safetensors", tmp_path / "adapter")[2].startswith(sentence) == said


def test_what_deepspeeds_launcher_adds_is_understood(call, trained):
    assert call("inspect", trained, "--local_rank=0") == call("inspect", trained)


def test_a_store_by_the_command_line(call, trained, examples, task_file, tmp_path):
    store = tmp_path / "store"
    code, out, _ = call("compress", trained, examples, task_file, "--store", store)
    assert code == 0 and "2 made" in out
    code, out, _ = call("compress", trained, examples, task_file, "--store", store)
    assert code == 0 and "0 made" in out and "2 were there" in out
    code, out, err = call("list", store)
    assert code == 0 and "task7_copy" in out and "2 prefixes" in err
    one, two = sorted(store.glob("*.safetensors"))
    one.unlink()
    code, out, err = call("list", store)
    assert code == 2 and f"{one}: in the index, but not there" in err and "--repair" in err
    content = two.read_bytes()
    two.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out, err = call("list", store, "--check")
    assert code == 2 and f"{two}: damaged" in err and "in the index, but not there" in err
    two.write_bytes(content[:-1])
    code, out, err = call("list", store)
    assert code == 2 and "bytes, not" in err
    call("list", store, "--repair")
    two.unlink()
    code, out, _ = call("compress", trained, examples, task_file, "--store", store, "--batch-tokens", "64")
    assert code == 0 and "2 made" in out
    one.unlink()
    code, out, err = call("list", store, "--repair")
    assert code == 0 and "1 prefixes" in err
    assert call("list", store, "--check")[0] == 0
    code, _, err = call("compress", trained, examples)
    assert code == 2 and "give either --output or --store" in err


def test_an_elastic_hypernetwork_is_asked_for_fewer_gists(call, trained, elastic, examples, tmp_path):
    run, path = elastic, tmp_path / "p.safetensors"
    for asked, gists in ((["--gists", 2], 2), (["--budget", 100, "--report"], 1), ([], 3)):
        assert call("compress", run, examples, "--output", path, *asked)[0] == 0
        assert Prefix.load(path).rows == gists
    code, _, err = call("compress", trained, examples, "--output", path, "--gists", 2)
    assert code == 2 and "was trained for all of its 3 gists only" in err
    assert call("compress", run, examples, "--output", path, "--gists", 9)[2].endswith("prefixes of 1 to 3 gists, not of 9\n")
    assert "either --gists or --budget" in call("compress", run, examples, "--output", path, "--gists", 1, "--budget", 1)[2]


def test_a_prefix_reports_on_itself(call, trained, examples, tmp_path):
    code, out, err = call("compress", trained, examples, "--output", tmp_path / "p.safetensors", "--report")
    assert code == 0 and "loss_prefix" in out and "kl_prefix" in out
    metrics = Prefix.load(tmp_path / "p.safetensors").manifest.metrics
    assert metrics["held_back"] == 3 and {"loss_full_context", "loss_no_context"} <= set(metrics)
    assert ("this prefix does not help" in err) == (metrics["loss_prefix"] >= metrics["loss_no_context"])


def test_env_says_what_runs_and_why_the_rest_does_not(call):
    code, out, _ = call("env", "--head-dim", 64)
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert set(lines) == set(BACKENDS)
    assert lines["sdpa"].split() == ["sdpa", "runs"]
    if not torch.cuda.is_available():
        assert lines["varlen"].endswith("does not run: it needs a CUDA GPU") and "GPU           none" in out
    assert f"torch         {torch.__version__}" in out


def test_an_attention_kernel_that_cannot_run_is_refused_before_anything_loads(call, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("here it runs")
    output = tmp_path / "run"
    code, _, err = call("train", ROOT / "recipes/toy/base.yaml", "gist.backend=varlen", f"output={output}")
    assert code == 2 and err == "hyperllama: gist.backend: varlen cannot run here: it needs a CUDA GPU; set it to auto\n"
    assert not output.exists()
