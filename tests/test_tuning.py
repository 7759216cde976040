"""Prefix tuning: step 0 is the start, gradients are those of a plain pass, and what is tuned can be read."""

import shutil

import pytest
import torch
from conftest import tiny_base, trained_hypernetwork
from data_files import WORDS, lines, write
from launch import torchrun, zero_settings
from transformers import DynamicCache

from attention_masks import rotate
from hyperllama.base.decoder import cache_argument, inverse_frequencies
from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.commands.tune import _named_apart, full_attention, tune
from hyperllama.data.episode import Episode
from hyperllama.data.packing import pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.errors import UserError
from hyperllama.files import whole_json_lines
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.capture import encode_whole
from hyperllama.prefixes.prefix import Prefix
from hyperllama.tuning.prefix_tuner import PrefixTuner
from hyperllama.tuning.starts import demonstrations_start, random_start, vocabulary_start

CONTEXTS = {"a": (5, 6, 7, 8, 9), "b": (40, 41, 42), "c": (60, 61, 62, 63, 64, 65)}
QUERIES = {"a": (((10, 11), (12, 13)), ((14,), (15,))), "b": (((20,), (21, 22, 23)),), "c": (((30, 31, 32), (33,)),)}


def starts(base, gists=3):
    hypernetwork = trained_hypernetwork(base, gists=gists)
    made = dict(zip(CONTEXTS, hypernetwork.compress(list(CONTEXTS.values())), strict=True))
    hypernetwork.lora.remove()
    return made


def batch(*names, gists=3):
    return pack_gist([EncodedEpisode((), QUERIES[name], task=name) for name in names], gists)


def plain_loss(base, prefix, name):
    """Answer by answer, through stock transformers with the prefix as its cache."""
    total = 0.0
    for prompt, answer in QUERIES[name]:
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        logits = base(ids, **cache_argument(base, prefix.to_cache())).logits[0, len(prompt) - 1 :]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    return total


@pytest.mark.parametrize("hidden", [None, 16])
def test_step_zero_is_the_start(base, hidden):
    """Equivalence d, for several tasks in one ragged pass, in any order."""
    prefixes = starts(base)
    tuner = PrefixTuner(base, prefixes, hidden=hidden)
    with torch.no_grad():
        loss = tuner(batch("c", "a", "b"))
        expected = sum(plain_loss(base, prefixes[name], name) for name in "abc")
    assert loss.count == 7 and loss.sum.item() == pytest.approx(expected.item(), abs=1e-3)
    assert tuner.prefixes() == prefixes


def test_gradients_are_those_of_a_plain_pass(base):
    prefixes = starts(base)
    tuner = PrefixTuner(base, prefixes)
    tuner(batch("b", "a")).sum.backward()
    copies = {n: [t.clone().requires_grad_() for t in (*prefixes[n].keys, *prefixes[n].values)] for n in "ab"}
    layers = prefixes["a"].layers
    for name, place in (("a", 0), ("b", 1)):
        keys, values = copies[name][:layers], copies[name][layers:]
        total = 0.0
        for prompt, answer in QUERIES[name]:
            cache = cache_argument(base, DynamicCache([(k[None], v[None]) for k, v in zip(keys, values)]))
            logits = base(torch.tensor([[*prompt, *answer[:-1]]]), **cache).logits[0, len(prompt) - 1 :]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        total.backward()
        for layer in range(layers):
            assert torch.allclose(tuner.keys.grad[layer, place], keys[layer].grad, atol=1e-4)
            assert torch.allclose(tuner.values.grad[layer, place], values[layer].grad, atol=1e-4)
    assert not tuner.keys.grad[:, 2].any(), "a task that is not in the batch"
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("hidden", [None, 16])
def test_gradient_checkpointing_changes_nothing(base, hidden):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tuner = PrefixTuner(base, starts(base), hidden=hidden).train()
        if checkpointing:
            tuner.gradient_checkpointing_enable()  # the name that every version in the range has
        if hidden:
            torch.nn.init.normal_(tuner.mlp.outer.weight, std=0.02)
        tuner(batch("a", "b", "c")).sum.backward()
        grads.append([p.grad.clone() for p in tuner.trainable().values()])
    base.gradient_checkpointing_disable()
    assert len(grads[0]) == (5 if hidden else 2) and all(g.any() for g in grads[0])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpoints_and_folding(base, tmp_path):
    torch.manual_seed(0)
    tuner = PrefixTuner(base, starts(base), hidden=8)
    torch.nn.init.normal_(tuner.mlp.outer.weight, std=0.1)
    tuner.save_pretrained(tmp_path)
    other = PrefixTuner(base, starts(base), hidden=8)
    assert other.prefixes() != tuner.prefixes()
    other.load_weights(tmp_path)
    for name, prefix in tuner.prefixes().items():
        loaded = other.prefixes()[name]
        for a, b in zip((*prefix.keys, *prefix.values), (*loaded.keys, *loaded.values)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # some processors round by where a matrix lies in memory
    with torch.no_grad():  # the folded prefix, read by stock transformers, is what was trained
        folded = plain_loss(base, tuner.prefixes()["a"], "a").item()
        assert tuner(batch("a")).sum.item() == pytest.approx(folded, rel=1e-4)


def test_training_lowers_the_loss_of_every_task(base):
    tuner = PrefixTuner(base, starts(base))
    optimiser = torch.optim.Adam(tuner.trainable().values(), lr=0.05)
    first = tuner(batch("a", "b", "c")).mean.item()
    for _ in range(30):
        optimiser.zero_grad()
        tuner(batch("a", "b", "c")).mean.backward()
        optimiser.step()
    assert tuner(batch("a", "b", "c")).mean.item() < 0.3 * first


def test_bf16_prefixes_are_trained_in_float32():
    base = tiny_base().to(torch.bfloat16)
    prefixes = {"a": starts(base)["a"]}
    tuner = PrefixTuner(base, prefixes)
    tuner(batch("a")).sum.backward()
    assert tuner.keys.dtype == torch.float32 and tuner.keys.grad.any() and tuner.prefixes()["a"].dtype == torch.bfloat16


class TestStarts:
    def test_random_has_the_statistics_of_real_ones(self, base):
        contexts = [tuple(range(3, 90)), tuple(range(90, 10, -1))]
        real = encode_whole(base, contexts)
        made = random_start(base, contexts, 64, seed=1)
        inv_freq = inverse_frequencies(base)
        for layer in range(made.layers):
            rows = torch.cat([p.values[layer] for p in real], 1)
            assert torch.allclose(made.values[layer].mean(1), rows.mean(1), atol=0.6 * rows.std().item())
            upright = rotate(made.keys[layer], -torch.arange(64), inv_freq)
            own = torch.cat([rotate(p.keys[layer], -torch.arange(p.rows), inv_freq) for p in real], 1)
            assert 0.7 < (upright.std(1) / own.std(1)).mean() < 1.3
        assert made == random_start(base, contexts, 64, seed=1) and made != random_start(base, contexts, 64, seed=2)

    def test_words_and_demonstrations(self, base):
        words, whole = vocabulary_start(base, [5, 6], 5), encode_whole(base, [(5, 6, 5, 6, 5)])[0]
        assert words == whole
        context = tuple(range(3, 13))
        first, pooled = demonstrations_start(base, context, 4), demonstrations_start(base, context, 4, pooled=True)
        (all_of_it,) = encode_whole(base, [context])
        assert (first.rows, pooled.rows) == (4, 4) and torch.equal(first.keys[1], all_of_it.keys[1][:, :4])
        assert first != pooled and demonstrations_start(base, (3, 4), 5).rows == 5
        for wrong in (lambda: vocabulary_start(base, [], 3), lambda: demonstrations_start(base, (), 3)):
            with pytest.raises(UserError):
                wrong()


def test_shapes_that_do_not_fit_are_refused(base):
    with pytest.raises(UserError, match="need one shape"):
        PrefixTuner(base, {"a": starts(base, 2)["a"], "b": starts(base, 3)["b"]})
    other = starts(tiny_base(num_hidden_layers=3))
    with pytest.raises(UserError, match="the model has 2 layers"):
        PrefixTuner(base, other)


@pytest.fixture
def tune_recipe(tmp_path, saved_base):
    """Three tasks of words, tuned from nothing in a second."""
    for name, answer in (("upper", str.upper), ("same", str), ("first", lambda w: w[0])):
        rows = [{"input": w, "output": answer(w), "choices": [answer(w), "no"]} for w in WORDS.split()[:24]]
        write(tmp_path / "data" / f"{name}.jsonl", lines(rows))
    return write(
        tmp_path / "tune.yaml",
        f"""
method: tune
output: {tmp_path}/run
model: {saved_base}
start: {{kind: random, gists: 3}}
data: {{source: jsonl, root: {tmp_path}/data, shots: 12, queries: 6}}
measure_every: 2
patience: null
training: {{max_steps: 8, use_cpu: true, disable_tqdm: true, learning_rate: 0.05, logging_steps: 1, save_steps: 2}}
""",
    )


def curves(run):
    return whole_json_lines(run / "curves.jsonl")


class TestTune:
    def test_a_run_leaves_the_best_prefix_of_every_task(self, tune_recipe, tmp_path, saved_base):
        made = tune(tune_recipe)
        run, measured = tmp_path / "run", curves(tmp_path / "run")
        assert set(made) == {"upper", "same", "first"} and {line["step"] for line in measured} == {0, 2, 4, 6, 8}
        assert {"validation_loss", "test_loss", "test_exact", "test_accuracy"} <= set(measured[0])
        assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
        reader = Reader(load_base(str(saved_base)), load_tokenizer(str(saved_base)))
        for name, (path, facts) in made.items():
            prefix = Prefix.load(path, reader.identity)
            best = min((line["validation_loss"], line["step"]) for line in measured if line["task"] == name)
            assert (facts["validation_loss"], facts["best_step"]) == best and facts["tuned_on"] == 9
            metrics = prefix.manifest.metrics
            assert prefix.rows == 3 + 1 and metrics["tuned_from"] == "random" and metrics["best_step"] == best[1]
        before, after = ([x["test_loss"] for x in measured if x["step"] == step] for step in (0, 8))
        assert sum(after) < 0.95 * sum(before)
        assert tune(tune_recipe) is None, "a finished run is left alone"

    @pytest.mark.parametrize("change", ["start.hidden=null", "start.hidden=8", "objective=context"])
    def test_a_resumed_run_is_one_that_was_never_stopped(self, tune_recipe, tmp_path, change):
        changes = [change, "passages.count=8", "passages.tokens=4"]
        tune(tune_recipe, changes)
        run = tmp_path / "run"
        whole, prefixes = curves(run), {path.name: Prefix.load(path) for path in (run / "prefixes").iterdir()}
        # As a crash after step 4 leaves it: later checkpoints, results and lines are not there.
        for path in (run / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > 6:
                shutil.rmtree(path)
        (run / "result.json").unlink()
        with (run / "curves.jsonl").open("a") as file:
            file.write('{"step": 10, "ta')
        tune(tune_recipe, changes)
        assert curves(run) == whole and {path.name: Prefix.load(path) for path in (run / "prefixes").iterdir()} == prefixes

    def test_it_stops_when_no_task_improves(self, tune_recipe, tmp_path):
        tune(tune_recipe, ["patience=2", "training.learning_rate=1.0e-9", "measure_every=1", "training.max_steps=50"])
        assert max(line["step"] for line in curves(tmp_path / "run")) < 50

    @pytest.mark.parametrize("kind", ["demonstrations", "pooled_demonstrations", "attended", "vocabulary"])
    def test_other_starts(self, tune_recipe, tmp_path, kind):
        made = tune(tune_recipe, [f"start.kind={kind}", "training.max_steps=2", f"output={tmp_path}/{kind}"])
        assert all(Prefix.load(path).manifest.metrics["tuned_from"] == kind for path, _ in made.values())

    def test_a_text_is_studied_until_its_prefix_says_what_its_context_says(self, tune_recipe, tmp_path):
        write(tmp_path / "text.txt", "a few words to learn from, and their answers. " * 40)
        windows = "{source: text, text: {context_tokens: 24, continuation_tokens: 8}}"
        text = tune_recipe.read_text().replace(f"{{source: jsonl, root: {tmp_path}/data, shots: 12, queries: 6}}", windows)
        recipe = write(tmp_path / "text.yaml", text)
        changes = [f"data.root={tmp_path}/text.txt", "episodes=2", "objective=context", "start.kind=attended"]
        made = tune(recipe, [*changes, "passages.count=16", "passages.tokens=6", "validation=0.5", "training.max_steps=16"])
        measured = curves(tmp_path / "run")
        for name, (path, facts) in made.items():
            at = {line["step"]: line for line in measured if line["task"] == name}
            assert facts["tuned_on"] == 8 and Prefix.load(path).rows == 4 and "test_loss" in at[0]
            assert facts["validation_loss"] < at[0]["validation_loss"]
        levels = full_attention(recipe, changes)
        assert set(levels) == set(made) and all(set(level) == {"test_loss", "test_exact"} for level in levels.values())

    def test_prefix_files_are_a_start(self, tune_recipe, tmp_path):
        first = tune(tune_recipe)
        second = [f"output={tmp_path}/second", "start.kind=prefix", f"start.prefix={tmp_path}/run/prefixes"]
        tune(tune_recipe, [*second, "training.max_steps=2", "training.learning_rate=0.0"])
        for name, (path, _) in first.items():
            again = Prefix.load(tmp_path / "second" / "prefixes" / path.name)
            assert all(torch.equal(a, b) for a, b in zip(again.keys, Prefix.load(path).keys)), name

    def test_names_of_tasks_are_names_of_files(self):
        named = _named_apart([Episode("", (), (), task) for task in ("a/b", "a_b", "A_B", "Übung", "a_b_2")])
        assert [episode.task for episode in named] == ["a_b", "a_b_2", "A_B_3", "Ubung", "a_b_2_2"]

    def test_fewer_tasks_a_step(self, tune_recipe, tmp_path):
        tune(tune_recipe, ["tasks_per_step=2", "training.max_steps=6"])
        at = {step: [x["validation_loss"] for x in curves(tmp_path / "run") if x["step"] == step] for step in (0, 2, 6)}
        assert all(a > b for a, b in zip(at[0], at[6]))

    @pytest.mark.parametrize(
        "change, expected",
        [
            ("start.kind=hypernetwork", "start.hypernetwork: give the folder of a run"),
            ("start.kind=prefix", "start.prefix: give a prefix file or a folder of them"),
            ("training.max_steps=0", "training.max_steps: say how many steps at most"),
            ("validation=1", "validation: a share below 1"),
            ("data.shots=0", "data.shots: at least 1"),
            ("start.hypernetwork=nowhere", "start.hypernetwork: nowhere does not exist"),
        ],
    )
    def test_problems(self, tune_recipe, change, expected):
        with pytest.raises(UserError, match=expected):
            tune(tune_recipe, [change])


@pytest.mark.slow
class TestRanks:
    """Two processes, with and without ZeRO: the curves of one process that accumulates, also after a stop."""

    @pytest.mark.parametrize("stage, hidden", [(0, "null"), (2, "null"), (3, "8")])
    def test_curves_are_those_of_one_process(self, tune_recipe, tmp_path, stage, hidden):
        changes = [f"start.hidden={hidden}", "training.save_steps=4"]
        tune(tune_recipe, [*changes, "training.gradient_accumulation_steps=2"])
        one = curves(tmp_path / "run")
        run = tmp_path / "ranks"
        if stage:
            pytest.importorskip("deepspeed")
        settings = [f"deepspeed={zero_settings(tmp_path, stage)}"] if stage else []
        done = torchrun("tune", tune_recipe, f"output={run}", *changes, *settings)
        assert done.stdout.count("upper, tuned on 9 examples") == 1, "the first rank reports"
        assert [(line["step"], line["task"]) for line in curves(run)] == [(line["step"], line["task"]) for line in one]
        for mine, its in zip(one, curves(run), strict=True):
            assert its["validation_loss"] == pytest.approx(mine["validation_loss"], abs=1e-5)
        assert {path.stem for path in (run / "prefixes").iterdir()} == {"upper", "same", "first"}
        if stage:
            before, name = curves(run), "first.safetensors"
            prefix = Prefix.load(run / "prefixes" / name)
            shutil.rmtree(run / "checkpoints" / "checkpoint-8")
            (run / "result.json").unlink()
            done = torchrun("tune", tune_recipe, f"output={run}", *changes, *settings)
            assert done.stderr.count("going on from") == 1
            assert curves(run) == before and Prefix.load(run / "prefixes" / name) == prefix
