"""Evaluation: methods are what they are called, figures are paired, and a run can be cut and shared out at will."""

import dataclasses
import json
import re
import time
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from conftest import tiny_architecture, tiny_base, trained_hypernetwork
from hypothesis import given
from hypothesis import strategies as st
from launch import hyperllama, start
from transformers import set_seed

from benchmarks.evaluation import evaluation_flops, ratios
from eval.answering import before_queries, kind_of, queries_of, results
from eval.intervals import Bootstrap
from eval.methods import METHODS, NEEDS, Bench, found_in
from eval.methods.shuffling import shuffled, shuffled_words
from eval.metrics import headline, normalise, rouge_l, score_choices, score_text
from eval.mistakes import telling
from eval.report import write_report
from eval.run import evaluate, readable
from eval.summary import difference, quantity, summarise
from hyperllama.base.decoder import cache_argument
from hyperllama.base.loading import random_base
from hyperllama.data.chunking import Chunking
from hyperllama.data.episode import Episode, Example, TextWindow
from hyperllama.data.synthetic import SyntheticLanguage, SyntheticSource
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError
from hyperllama.files import whole_json_lines
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.inference.reader import Reader

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
LANGUAGE = SyntheticLanguage(categories=12, words_per_category=4, symbols=16, task_categories=3)
WORDS = TextFormat(query=" {input}", answer=" {output}", separator="", end_token=False, answer_tokens=2)


class TestMetrics:
    @pytest.mark.parametrize(
        "answer, references, rouge, exact",
        [
            ("The cats sat.", ["the cat sat"], 1.0, 0.0),  # stemming is ROUGE's alone
            (" the  CAT, sat ", ["x", "The cat sat!"], 1.0, 1.0),
            ("a b c d", ["a c"], 2 / 3, 0.0),
            ("c a", ["a b c"], 0.4, 0.0),  # order counts: the longest common subsequence has one word
            ("", ["a"], 0.0, 0.0),
            ("?", ["!"], 0.0, 1.0),  # as the official script has it: nothing is left of either
        ],
    )
    def test_text(self, answer, references, rouge, exact):
        assert score_text(answer, references) == pytest.approx({"rouge_l": rouge, "exact_match": exact})

    def test_references_must_not_be_empty(self):
        with pytest.raises(UserError, match="has no references to score 'x' against"):
            score_text("x", [])

    @given(st.text(), st.text())
    def test_a_text_equals_itself_and_rouge_is_symmetric(self, a, b):
        assert normalise(a) == normalise(normalise(a))
        assert rouge_l(a, b) == pytest.approx(rouge_l(b, a)) and 0 <= rouge_l(a, b) <= 1

    def test_choices_are_ranked(self):
        assert score_choices([-3.0, -1.0, -2.0], 1) == {"accuracy": 1.0}
        assert score_choices([-3.0, -1.0, -2.0], 2) == {"accuracy": 0.0}

    def test_headline_metrics_of_categories(self):
        assert headline("text") == headline("text", "Title Generation") == "rouge_l"
        assert headline("text", "Word Analogy") == "exact_match" and headline("choices", "Word Analogy") == "accuracy"

    def test_copying_over_the_official_test_tasks(self, real_data, tmp_path):
        """The reference figures of an independent implementation: ROUGE-L and exact match, x100."""
        recipe = tmp_path / "copy.yaml"
        recipe.write_text(f"""
method: evaluate
output: {tmp_path}/out
data: {{source: sni, root: {real_data}/sni, split: test, shots: 2, queries: 100}}
""")
        found = evaluate(recipe)["methods"]
        figures = {name: [round(100 * m["mean"], 2) for m in found[name]["metrics"].values()] for name in found}
        assert figures == {"copy_input": [15.52, 0.0], "copy_demonstration": [30.27, 23.56]}


class TestIntervals:
    def test_means_weigh_units_and_intervals_cover_them(self):
        bootstrap = Bootstrap([2, 2, 6], seed=1)
        found = bootstrap.mean([2, 0, 3])
        assert found.mean == 0.5 and 0 <= found.low <= 0.5 <= found.high <= 1

    def test_differences_are_paired(self):
        rng = np.random.default_rng(0)
        hard = rng.normal(size=200) * 10  # episodes differ far more than methods do
        bootstrap = Bootstrap(np.ones(200))
        paired = bootstrap.difference(hard + 1 + rng.normal(size=200) * 0.1, hard)
        assert paired.mean == pytest.approx(1, abs=0.05) and paired.high - paired.low < 0.1 and paired.excludes_zero()
        assert bootstrap.mean(hard).high - bootstrap.mean(hard).low > 2

    def test_intervals_cover_at_their_rate(self):
        rng = np.random.default_rng(3)
        hits = 0
        for _ in range(200):
            found = Bootstrap(np.ones(80), resamples=400, seed=int(rng.integers(1e9))).mean(rng.normal(loc=0.3, size=80))
            hits += found.low <= 0.3 <= found.high
        assert 0.88 < hits / 200 <= 1

    def test_recovered_share(self):
        bootstrap = Bootstrap(np.ones(50))
        nothing, everything = np.zeros(50), np.ones(50)
        assert bootstrap.recovered(np.full(50, 0.75), nothing, everything).mean == 0.75
        assert bootstrap.recovered(np.full(50, 0.75), nothing, nothing) is None


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(SyntheticSource(LANGUAGE).texts(), kind="words", vocab_size=0)


@pytest.fixture(scope="module")
def bench(words):
    base = tiny_base()
    episodes = SyntheticSource(LANGUAGE).evaluation(shots=6, queries=2, episodes=4, seed=0)
    return Bench(
        episodes=episodes,
        encoder=Encoder(words, WORDS, Limits(64, 16)),
        reader=Reader(base, words),
        hypernetwork=trained_hypernetwork(base, tokenizer=words),
        budget=3,
    )


class TestMethods:
    def run(self, bench, name, kind="choices", indices=(0, 1, 2, 3)):
        asked = [queries_of(bench, bench.episodes[i], kind) for i in indices]
        lines = list(results(bench, METHODS[name], indices, asked, kind, {}))
        bench.forget()
        return lines

    @pytest.mark.parametrize("kind", ["choices", "text"])
    def test_methods_are_what_they_are_called(self, bench, kind):
        """Each against a plain pass of the model over tokens, one query and choice at a time."""
        contexts = [bench.encoder.context("", e.demonstrations)[0] for e in bench.episodes]
        prefixes = [bench.hypernetwork.compress([context])[0] for context in contexts]
        lines = {name: self.run(bench, name, kind) for name in ("no_context", "full_context", "prefix", "swapped_prefix")}
        model = bench.reader.model
        for i, episode in enumerate(bench.episodes):
            for q, query in enumerate(episode.queries):
                prompt = bench.encoder.prompt(query.input)

                def plain(context, prefix=None, prompt=prompt, query=query):
                    if kind == "text":
                        ids = bench.reader.generate([[*context, *prompt]], prefix and [prefix], max_new_tokens=2)[0]
                        return bench.encoder.tokenizer.decode(ids).strip()
                    cache = {} if prefix is None else cache_argument(model, prefix.to_cache())
                    with torch.no_grad():
                        likely = model(torch.tensor([[*context, *prompt]]), **cache).logits[0, -1]
                    return max(query.choices, key=lambda choice: likely[bench.encoder.answer(choice)[0]].item())

                place = 2 * i + q
                assert lines["no_context"][place]["answer"] == plain(bench.encoder.start)
                assert lines["full_context"][place]["answer"] == plain(contexts[i])
                assert lines["prefix"][place]["answer"] == plain([], prefixes[i])
                assert lines["swapped_prefix"][place]["answer"] == plain([], prefixes[(i + 1) % 4])
        assert [x["answer"] for x in lines["prefix"]] != [x["answer"] for x in lines["swapped_prefix"]]

    def test_a_prefix_is_made_once_for_all_methods(self, bench, monkeypatch):
        alone = {name: self.run(bench, name) for name in ("prefix", "swapped_prefix")}
        bench._made.clear()
        compressed, compress = [], bench.hypernetwork.compress
        monkeypatch.setattr(
            bench.hypernetwork, "compress", lambda batch, **more: compressed.extend(batch) or compress(batch, **more)
        )
        shared = {
            name: self.run(bench, name, indices=part) for part in ((0, 1), (2, 3)) for name in ("prefix", "swapped_prefix")
        }
        assert len(compressed) == 4 and shared["swapped_prefix"] == alone["swapped_prefix"][4:]
        monkeypatch.setattr("eval.methods.bench.PREFIXES", 1)
        assert self.run(bench, "prefix") == alone["prefix"] and len(bench._made) == 1
        bench._made.clear()

    def test_nothing_is_computed_twice(self, words):
        """Ten methods together cost at most 2.5 times the dearest of them alone, and answer as each does alone."""
        language = dataclasses.replace(LANGUAGE, instructions=True, instruction_tokens=60)
        episodes, base = SyntheticSource(language).evaluation(shots=90, queries=1, episodes=3, seed=0), tiny_base()
        reader, hypernetwork = Reader(base, words), trained_hypernetwork(base, tokenizer=words)
        encoder = Encoder(words, WORDS, Limits(250, 16))

        def make(methods):
            return Bench(episodes, encoder, reader, hypernetwork, budget=3, methods=methods)

        ten = ["no_context", "instruction_only", "full_context", "fewer_demonstrations", "cut_context", "last_tokens"]
        ten += ["attended_tokens", "mean_pool", "prefix", "swapped_prefix"]
        found = evaluation_flops(make, ten)
        dearest = max(ten, key=lambda name: sum(found[name].values()))
        assert ratios(found, dearest)["all"] <= 2.5 and found["together"]["queries"] == sum(found[n]["queries"] for n in ten)
        apart = evaluation_flops(lambda methods: make(()), ["full_context", "attended_tokens"])
        assert apart["together"]["states"] == sum(apart[name]["states"] for name in ("full_context", "attended_tokens"))
        shared = evaluation_flops(make, ["full_context", "attended_tokens"])
        assert shared["together"]["states"] == shared["attended_tokens"]["states"]

    def test_needs_have_words(self):
        assert {need for method in METHODS.values() for need in method.needs} == set(NEEDS)

    def test_budgets_are_kept(self, bench):
        for name in ("fewer_demonstrations", "cut_context", "last_tokens", "attended_tokens", "mean_pool", "prefix"):
            states = METHODS[name].run(bench, range(4))
            assert all(0 < state.prefix.rows <= 3 for state in states), name
        bench.forget()
        fewer = METHODS["fewer_demonstrations"].run(bench, [0])[0]
        assert (fewer.demonstrations, fewer.tokens) == (1, 3)  # start, word, symbol

    def test_the_last_chunk_is_as_many_tokens_as_one_holds(self, bench, words):
        chunking = Chunking("parallel", 5)
        chunked = dataclasses.replace(bench, hypernetwork=trained_hypernetwork(tiny_base(), tokenizer=words, chunking=chunking))
        states = METHODS["last_chunk"].run(chunked, range(4))
        for state, episode in zip(states, chunked.episodes, strict=True):
            context = chunked.context(episode)
            (alone,) = chunked.hypernetwork.compress([[context[0], *context[-4:]]])  # behind the start token
            assert state.prefix.rows == 3 and torch.allclose(state.prefix.values[1], alone.values[1], atol=1e-5)

    def test_a_long_instruction_gives_way_to_demonstrations(self, words):
        episode = Episode("x " * 30, (Example("a", "b"), Example("c", "d")), (Example("e", "f"),), "t")
        reader = Reader(tiny_base(), words)
        bench = Bench([episode], Encoder(words, WORDS, Limits(64, 16)), reader, budget=6)
        (state,) = METHODS["fewer_demonstrations"].run(bench, [0])
        assert (state.demonstrations, state.tokens) == (2, 5)

    def test_a_budget_may_have_room_for_one_task_and_none_for_another(self, words):
        query, fits = Example("e", "f", ("f",)), (Example("a", "b"),)
        episodes = [Episode("", fits, (query,), "t1"), Episode("", (Example("x " * 9, "d"),), (query,), "t2")]
        encoder = Encoder(words, dataclasses.replace(WORDS, start_token=False), Limits(64, 16))  # so the latter reads nothing
        bench = Bench(episodes, encoder, Reader(tiny_base(), words), budget=4)
        both = self.run(bench, "fewer_demonstrations", "text", (0, 1))
        assert [line["state_rows"] for line in both] == [2, 0]
        alone = [*self.run(bench, "fewer_demonstrations", "text", (0,)), *self.run(bench, "no_context", "text", (1,))]
        assert both == [{**line, "method": "fewer_demonstrations"} for line in alone]

    @given(outputs=st.lists(st.sampled_from("abcd"), min_size=1, max_size=12), seed=st.integers(0, 9))
    def test_shuffled_labels(self, outputs, seed):
        demonstrations = tuple(Example(str(i), o, (o,)) for i, o in enumerate(outputs))
        changed = shuffled(Episode("", demonstrations, (), "t"), seed, 0).demonstrations
        assert [e.input for e in changed] == [str(i) for i in range(len(outputs))]
        assert sorted(e.output for e in changed) == sorted(outputs)
        kept = sum(a.output == b.output for a, b in zip(demonstrations, changed))
        largest = max(outputs.count(o) for o in outputs)
        assert kept == max(0, 2 * largest - len(outputs))  # none, but what a class of more than half must keep

    def test_shuffled_instructions_keep_words_and_no_neighbours(self):
        source = SyntheticSource(dataclasses.replace(LANGUAGE, instructions=True, instruction_tokens=40))
        for i, episode in enumerate(source.evaluation(shots=0, queries=1, episodes=20, seed=0)):
            words, changed = (
                text.split() for text in (episode.instruction, shuffled_words(episode.instruction, Random(f"0/{i}")))
            )
            assert sorted(words) == sorted(changed) and shuffled_words(episode.instruction, Random(f"0/{i}")).split() == changed
            before, after = set(pairwise(words)), set(pairwise(changed))
            named = {(a, b) for a, b in before if a in source.names and b in source.symbols}
            assert len(named) == 3 and not named & after and len(before & after) < len(before) / 5
        assert shuffled_words("alone", Random(0)) == "alone" and shuffled_words("", Random(0)) == ""

    def test_partners_are_of_another_task(self, bench):
        a, b = bench.episodes[0], bench.episodes[1]
        assert Bench([a, a, b]).partner(0) == 2 and Bench([a, b, a]).partner(2) == 1
        near, far = (Episode("", (), (), task, category) for task, category in (("t2", "x"), ("t3", "y")))
        assert Bench([Episode("", (), (), "t1", "x"), near, far]).partner(0) == 2  # a task of its own kind could help
        assert "other_tasks" in found_in([a, b]) and "other_tasks" not in found_in([a, a])

    def test_costs_stand_beside_answers(self, bench):
        (full, *_), (prefix, *_) = self.run(bench, "full_context"), self.run(bench, "prefix")
        assert full["state_rows"] == full["context_tokens"] == 13 and prefix["state_rows"] == 3
        assert full["state_bytes"] / prefix["state_bytes"] == 13 / 3
        assert full["reread_flops"] > full["query_flops"] > prefix["query_flops"] > 0
        assert full["reread_flops"] == pytest.approx(full["encode_flops"] + full["query_flops"], rel=0.05)

    def test_plain_text_is_scored_by_loss(self, words):
        text = " ".join(Random(0).choices(SyntheticSource(LANGUAGE).words, k=200))
        episodes = [Episode("", (), (), f"t{i}", window=TextWindow(text[70 * i :], 20, 9)) for i in range(3)]
        base = tiny_base()
        bench = Bench(episodes, Encoder(words, WORDS, Limits()), Reader(base, words), trained_hypernetwork(base), budget=3)
        assert kind_of(episodes, "auto") == "loss"
        lines = self.run(bench, "full_context", "loss", (0, 1, 2))
        ids = torch.tensor([words(text)["input_ids"][:31]])
        with torch.no_grad():
            likely = base(ids).logits[0].log_softmax(-1)
        expected = -sum(likely[row, ids[0, row + 1]].item() for row in range(21, 30))
        assert (lines[0]["weight"], lines[0]["metrics"]["loss"]) == (9, pytest.approx(expected, abs=1e-3))
        assert (lines[0]["input"], lines[0]["references"]) == (words.decode(ids[0, 21:22]), [words.decode(ids[0, 22:])])
        before = [before_queries(bench, i) for i in range(3)]
        assert [line["context"] for line in before] == [words.decode(bench.context(e)) for e in episodes]
        assert before[1]["task"] == "t1" and before[1]["context"] != before[0]["context"]
        (last,) = METHODS["fewer_demonstrations"].run(bench, [0])
        assert last.tokens == 3 and METHODS["prefix"].run(bench, [0])[0].prefix.rows == 3

    def test_a_line_holds_the_answer_as_scored_and_what_was_said_beyond_it(self, bench, words, monkeypatch):
        first, *others = (query for episode in bench.episodes for query in episode.queries)
        said = [words(f"{query.output} {other.input}", add_special_tokens=False)["input_ids"]
                for query, other in zip([first, *others], [*others, first])]  # fmt: skip
        ended = dataclasses.replace(bench.encoder.format, separator=f" {others[0].input}")
        monkeypatch.setattr(bench, "encoder", Encoder(words, ended, Limits(64, 16)))
        monkeypatch.setattr(bench.reader, "generate", lambda *args, stop, **settings: said if stop == ended.separator else [])
        one, two, *_ = self.run(bench, "no_context", "text")
        assert (one["answer"], one["generated"]) == (first.output, f"{first.output} {others[0].input}")
        assert "generated" not in two or two["generated"] != two["answer"]
        assert (one["input"], one["references"]) == (first.input, [first.output]) and one["metrics"]["exact_match"] == 1

    def test_what_stands_before_queries_is_what_is_read(self, words):
        """A demonstration that does not fit is left out where it stands, and those after it are not taken for it."""
        names = SyntheticSource(LANGUAGE).words
        shown = [Example(" ".join(names[i : i + n]), names[i]) for i, n in enumerate((3, 12, 2, 9, 1))]
        episode = Episode(names[0], tuple(shown), (Example(names[1], names[2]),), "t", "c")
        bench = Bench([episode], Encoder(words, WORDS, Limits(14, 16)))
        line = before_queries(bench, 0)
        texts, place = [{"input": shown[i].input, "output": shown[i].output} for i in (0, 2, 4)], {"task": "t", "category": "c"}
        assert line == {"episode": 0, **place, "instruction": names[0], "demonstrations": texts, "dropped": 2}
        again = [Example(**text) for text in line["demonstrations"]]
        assert bench.encoder.context(line["instruction"], again)[0] == bench.context(episode)
        alone = before_queries(Bench([episode]), 0)  # nothing is cut where there is no model
        assert len(alone["demonstrations"]) == 5 and alone["dropped"] == 0


class TestBadData:
    def ask(self, words, query, kind, limits=None):
        bench = Bench([Episode("", (), (query,), "t")], Encoder(words, WORDS, limits or Limits()))
        return queries_of(bench, bench.episodes[0], kind)

    def test_an_answer_outside_its_choices(self, words):
        with pytest.raises(UserError, match=r"task t: the answer 'c' is not among its choices \['a', 'b'\]"):
            self.ask(words, Example("x", "c", ("c",), ("a", "b")), "choices")

    def test_a_query_too_long(self, words):
        query = Example("x " * 20, "c")
        with pytest.raises(UserError, match="task t: query 0 takes 21 tokens, more than limits.query_tokens=10"):
            self.ask(words, query, "text", Limits(query_tokens=10))
        assert self.ask(words, query, "text", Limits(query_tokens=10, too_long_query="skip")) == []

    def test_an_instruction_too_long(self, words):
        short, long = (Episode(text, (), (Example("x", "c"),), "t") for text in ("a b", "a " * 30))
        skip, error = (Encoder(words, WORDS, Limits(context_tokens=10, too_long_query=what)) for what in ("skip", "error"))
        assert readable([short, long], skip) == [short] and readable([short, long], error) == [short, long]
        with pytest.raises(UserError, match="limits.context_tokens=10: no instruction fits"):
            readable([long], skip)

    def test_kinds_that_the_data_does_not_allow(self):
        asked, chosen = (Episode("", (), (Example("a", "b", (), choices),)) for choices in ((), ("b", "c")))
        assert (kind_of([asked], "auto"), kind_of([chosen], "auto")) == ("text", "choices")
        with pytest.raises(UserError, match="the data calls for choices and text"):
            kind_of([asked, chosen], "auto")
        with pytest.raises(UserError, match="choices needs data in which every query has choices"):
            kind_of([asked], "choices")
        with pytest.raises(UserError, match="windows of plain text have no answers"):
            kind_of([Episode("", (), (), window=TextWindow("a", 1, 1))], "text")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, words):
    """A hypernetwork of the synthetic language as a run leaves it, untrained, and an evaluation recipe beside it."""
    folder = tmp_path_factory.mktemp("evaluation")
    set_seed(0)
    base = random_base(tiny_architecture("llama"), vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    base.save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    base.config.name_or_path = str(folder / "base")
    hypernetwork: GistHypernetwork = trained_hypernetwork(base, tokenizer=words)
    notes = {"format": vars(WORDS), "limits": {"context_tokens": 64, "query_tokens": 16}}
    hypernetwork.save_pretrained(folder / "run", notes)
    (folder / "run" / "recipe.yaml").write_text("output: x\nmodel: {architecture: {model_type: llama}, tokenizer: words}\n"
                                                "training: {max_steps: 1}\n")  # fmt: skip
    (folder / "evaluate.yaml").write_text(f"""
method: evaluate
output: {folder}/out
hypernetwork: {folder}/run
multi_task: {folder}/base
data:
  source: synthetic
  shots: 6
  queries: 2
  synthetic: {{categories: 12, words_per_category: 4, symbols: 16, task_categories: 3, split: test}}
episodes: 12
batch_tokens: 60
""")
    return folder


def answers(folder):
    lines = [line for path in sorted(folder.glob("examples/*.jsonl")) for line in whole_json_lines(path)]
    found = {(x["method"], x["episode"], x["query"]): (x["answer"], x["metrics"]) for x in lines}
    assert len(found) == len(lines), "something was scored twice"
    return found


class TestRuns:
    def test_a_run_leaves_report_and_pictures(self, run_folder, tmp_path):
        summary = evaluate(run_folder / "evaluate.yaml", [f"output={tmp_path}/out", "refine=2"])
        out = tmp_path / "out"
        elsewhere = {name for name, method in METHODS.items() if {"instructions", "chunks"} & set(method.needs)}
        wanted = set(METHODS) - elsewhere - {"stored_prefix", "copy_input", "copy_demonstration"}
        assert set(summary["methods"]) == wanted and summary["queries"] == 24
        assert json.loads((out / "summary.json").read_text())["methods"] == summary["methods"]
        report = (out / "report.md").read_text()
        assert (
            "## What it says" in report
            and "Does it depend on its context?" in report
            and "read again with every query" in report
        )
        assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("quality.png", "cost.png"))
        assert all(label["label"] in report for label in summary["methods"].values())
        assert {entry["answer"] for entry in summary["verdicts"]} <= {"yes", "no", "unclear", ""}
        # Nothing is done again, and a method more is added to what is there.
        before = answers(out)
        again = evaluate(run_folder / "evaluate.yaml", [f"output={out}", "refine=2", "methods=[prefix,no_context]"])
        assert set(again["methods"]) == {"prefix", "no_context"} and answers(out) == before
        with pytest.raises(UserError, match=r"holds an evaluation of another recipe \(it differs in episodes\)"):
            evaluate(run_folder / "evaluate.yaml", [f"output={out}", "refine=2", "episodes=3"])

    @pytest.mark.slow
    def test_two_shards_are_one_run(self, run_folder, tmp_path):
        evaluates = ("evaluate", run_folder / "evaluate.yaml")
        hyperllama(*evaluates, f"output={tmp_path}/one", **NO_GPU)
        logs = [tmp_path / f"{rank}.log" for rank in range(2)]
        command = ("-m", "hyperllama", *evaluates, f"output={tmp_path}/two")
        ranks = [{"out": log, "err": log, "RANK": str(rank), "WORLD_SIZE": "2"} for rank, log in enumerate(logs)]
        both = [start(*command, **rank, **NO_GPU) for rank in ranks]
        for process in both:
            process.join(120)
        assert all(process.exitcode == 0 for process in both), [log.read_text() for log in logs]
        assert sorted(path.name for path in (tmp_path / "two" / "examples").iterdir()) == ["rank0.jsonl", "rank1.jsonl"]
        assert answers(tmp_path / "two") == answers(tmp_path / "one")
        one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
        assert one["methods"] == two["methods"]

    @pytest.mark.slow
    def test_an_interrupted_run_goes_on(self, run_folder, tmp_path):
        evaluates = ("evaluate", run_folder / "evaluate.yaml")
        hyperllama(*evaluates, f"output={tmp_path}/whole", **NO_GPU)
        out = tmp_path / "cut"
        process = start("-m", "hyperllama", *evaluates, f"output={out}", **NO_GPU)
        path, deadline = out / "examples" / "rank0.jsonl", time.time() + 100
        while time.time() < deadline and (not path.exists() or path.stat().st_size < 4000):
            time.sleep(0.01)
        process.kill()
        process.join()
        there = len(path.read_text().splitlines())
        with path.open("a") as file:
            file.write('{"method": "prefix", "episode": 11, "qu')  # what a crash leaves
        assert 0 < there < 240 and not (out / "summary.json").exists()
        hyperllama(*evaluates, f"output={out}", **NO_GPU)
        assert answers(out) == answers(tmp_path / "whole")

    @pytest.mark.parametrize("kind", ["choices", "text", "loss", "windows"])
    def test_the_lines_alone_give_the_figures(self, run_folder, tmp_path, words, kind):
        changes = [f"output={tmp_path}/out", "episodes=4", f"metric={'auto' if kind == 'windows' else kind}"]
        if kind == "windows":
            (tmp_path / "a.txt").write_text(" ".join(Random(0).choices(SyntheticSource(LANGUAGE).words, k=900)))
            changes += ["data.source=text", f"data.root={tmp_path}", "leaks=warn"]
            changes += ["data.text.context_tokens=20", "data.text.continuation_tokens=6"]
        summary = evaluate(run_folder / "evaluate.yaml", changes)
        lines, encoder = whole_json_lines(tmp_path / "out/examples/rank0.jsonl"), Encoder(words, WORDS, Limits())
        episodes = whole_json_lines(tmp_path / "out/episodes.jsonl")
        assert [episode["episode"] for episode in episodes] == [0, 1, 2, 3]
        for name, method in summary["methods"].items():
            own, sums, weights = [line for line in lines if line["method"] == name], {}, 0
            assert len(own) == summary["queries"]
            for line in own:
                if kind == "text":
                    found = score_text(line["answer"], line["references"])
                elif kind == "choices":
                    found = score_choices(line["scores"], line["choices"].index(line["references"][0]))
                    assert line["answer"] == line["choices"][int(np.argmax(line["scores"]))]
                else:
                    found, text = {"loss": line["metrics"]["loss"]}, line["references"][0]
                    ids = words(text, add_special_tokens=False)["input_ids"] if kind == "windows" else encoder.answer(text)
                    assert len(ids) == line["weight"] and line["input"] and "answer" not in line
                weights += line["weight"]
                sums = {metric: sums.get(metric, 0) + value for metric, value in found.items()}
                assert episodes[line["episode"]]["task"] == line["task"]
            for metric, total in sums.items():
                assert method["metrics"][metric]["mean"] == pytest.approx(total / weights, abs=1e-9)

    def test_mistakes_are_shown_as_they_were_scored(self, run_folder, tmp_path):
        changes = [f"output={tmp_path}/out", "metric=loss"]
        summary = evaluate(run_folder / "evaluate.yaml", changes)
        lines = whole_json_lines(tmp_path / "out/examples/rank0.jsonl")
        by_place = {(x["method"], x["episode"], x["query"]): x for x in lines}
        report = (tmp_path / "out/report.md").read_text()
        assert summary["mistakes"]["other"] == "prefix" and summary["mistakes"]["rows"]
        for row in summary["mistakes"]["rows"]:
            full, ours = (by_place[name, row["episode"], row["query"]] for name in ("full_context", "prefix"))
            assert all((row["input"], row["references"]) == (x["input"], x["references"]) for x in (full, ours))
            assert [row["full"], row["other"]] == [x["metrics"]["loss"] / x["weight"] for x in (full, ours)]
            assert f" | {row['full']:.3f} nats a token | {row['other']:.3f} nats a token |" in report
        nasty = {"episode": 0, "query": 0, "task": "a|b", "input": "x|y\n<b>*z*" + "w" * 90, "references": ["r", "s"]}
        summary["mistakes"]["rows"] = [{**nasty, "full": "`f`", "other": ""}]
        write_report(summary, tmp_path)
        (row,) = [text for text in (tmp_path / "report.md").read_text().split("\n") if text.startswith("| a\\")]
        shown = "x\\|y⏎\\<b\\>\\*z\\*" + "w" * 49 + "…"
        assert row == f"| a\\|b | {shown} | r (or 1 more) | \\`f\\` | _nothing_ |"
        without = evaluate(run_folder / "evaluate.yaml", [*changes, "methods=[prefix,no_context]"])
        assert without["mistakes"] is None and "Left out: " in (tmp_path / "out/report.md").read_text()

    def test_results_of_other_data_or_an_older_version_are_not_mixed_in(self, run_folder, tmp_path):
        names, data = SyntheticSource(LANGUAGE).words, tmp_path / "data"
        data.mkdir()

        def task(name, start):
            pairs = [{"input": names[i], "output": names[i + 1]} for i in range(start, start + 9)]
            (data / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

        task("one", 0)
        changes = ["data.source=jsonl", f"data.root={data}", f"output={tmp_path}/out", "methods=[no_context,full_context]"]
        evaluate(run_folder / "evaluate.yaml", changes)
        episodes, path = (tmp_path / "out/episodes.jsonl").read_text(), tmp_path / "out/examples/rank0.jsonl"
        lines = path.read_text()
        path.write_text(lines[: len(lines) // 2])  # what a crash leaves
        evaluate(run_folder / "evaluate.yaml", changes)
        assert (tmp_path / "out/episodes.jsonl").read_text() == episodes and sorted(path.read_text()) == sorted(lines)
        other = "out: what is there was made from another data; set output to a new folder, or remove this one; to go on all"
        task("a", 9)  # becomes the first episode
        with pytest.raises(UserError, match=other):
            evaluate(run_folder / "evaluate.yaml", changes)
        (data / "a.jsonl").unlink()
        rows = (data / "one.jsonl").read_text().splitlines()
        asked = json.loads(path.read_text().splitlines()[0])["input"]
        changed = [row for row in rows if json.loads(row)["input"] != asked]
        (data / "one.jsonl").write_text("\n".join(row if row in changed else row.replace(asked, names[20]) for row in rows))
        with pytest.raises(UserError, match=other):  # the demonstrations are the same
            evaluate(run_folder / "evaluate.yaml", changes)
        older = [{key: value for key, value in json.loads(line).items() if key != "input"} for line in lines.splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in older))
        with pytest.raises(UserError, match="out holds results of an older version, without inputs; remove it, or set output"):
            evaluate(run_folder / "evaluate.yaml", changes)

    def test_leaks_refuse_or_warn(self, run_folder, tmp_path):
        changes = [f"output={tmp_path}/out", "data.synthetic.split=train", "episodes=2", "methods=[prefix]"]
        with pytest.raises(UserError, match="leaks: .*task synthetic language, train split.*; evaluate on other data"):
            evaluate(run_folder / "evaluate.yaml", changes)
        assert "train split" in evaluate(run_folder / "evaluate.yaml", [*changes, "leaks=warn"])["shared_with_training"]

    def test_wrong_methods_are_named(self, run_folder):
        with pytest.raises(UserError, match="methods: no method prefx; choose from no_context, "):
            evaluate(run_folder / "evaluate.yaml", ["methods=[prefx]"])
        with pytest.raises(
            UserError, match="methods: instruction_only needs data whose tasks have instructions; give it, or leave"
        ):
            evaluate(run_folder / "evaluate.yaml", ["methods=[instruction_only]"])

    def test_stored_prefixes_are_read_by_task(self, run_folder, tmp_path):
        from hyperllama.commands import compress as commands_compress

        data = tmp_path / "data"
        data.mkdir()
        source = SyntheticSource(LANGUAGE)
        for name in ("one", "two"):
            task = source.task(Random(name), 6, 4)
            lines = [json.dumps({"input": e.input, "output": e.output}) for e in (*task.demonstrations, *task.queries)]
            (data / f"{name}.jsonl").write_text("\n".join(lines))
        commands_compress.compress(run_folder / "run", sorted(data.iterdir()), f"{tmp_path}/prefixes/")
        changes = ["data.source=jsonl", f"data.root={data}", f"prefixes={tmp_path}/prefixes", f"output={tmp_path}/out"]
        summary = evaluate(run_folder / "evaluate.yaml", [*changes, "methods=[stored_prefix,copy_input]"])
        assert summary["queries"] == 4 and summary["methods"]["stored_prefix"]["state_rows"] == 3

    def test_a_model_alone_needs_no_hypernetwork(self, run_folder, tmp_path):
        changes = [f"output={tmp_path}/out", "hypernetwork=null", f"model={run_folder}/base", "multi_task=null", "budget=4"]
        changes += ["format.query=' {input}'", "format.answer=' {output}'", "format.separator=''", "format.end_token=false"]
        summary = evaluate(run_folder / "evaluate.yaml", changes)
        assert {"full_context", "mean_pool"} <= set(summary["methods"]) and summary["ours"] is None and not summary["verdicts"]
        assert "prefix" not in summary["methods"]
        others = {name: m["metrics"]["accuracy"]["mean"] for name, m in summary["methods"].items() if name != "full_context"}
        assert others[summary["mistakes"]["other"]] == max(others.values())


def line(method, episode, value, **more):
    place = {"method": method, "episode": episode, "query": 0, "of": 1, "task": "t", "category": "", "weight": 1}
    place |= {"input": f"input {episode}", "references": ["r"]}
    return {**place, "metrics": {"loss": value}, **more}


class TestMistakes:
    """Ten at most, every task once before one twice, what is lost most first, whatever the order of the lines."""

    def lines(self, kind, values):
        """A result line for each (task, value, answer), queries of one episode."""
        for i, (task, value, answer) in enumerate(values):
            metrics = {"text": {"rouge_l": value, "exact_match": float(value == 1)}, "choices": {"accuracy": float(value == 0)}}
            more = {"answer": answer}
            if kind == "choices":  # value: by how much the wrong one is likelier
                more |= {"choices": ["r", "w"], "scores": [-value, 0.0] if value else [0.0, -1.0]}
            if kind == "loss":
                more, metrics["loss"] = {"weight": 2}, {"loss": 2 * value}
            yield {**line("m", 0, 0.0), "query": i, "task": task, "metrics": metrics[kind], **more}

    def shown(self, kind, full, other):
        full, other = list(self.lines(kind, full)), list(self.lines(kind, other))
        found = telling(full, other, kind)
        assert found == telling(full[::-1], other[::-1], kind) and len(found["rows"]) <= 10
        return [row["query"] for row in found["rows"]], found

    def test_text(self):
        full = [(task, 1.0, "r") for task in "aaab"] + [("c", 0.5, "r x")]
        order, found = self.shown("text", full, [("", value, "no") for value in (0.5, 0.0, 1.0, 0.6, 0.0)])
        assert order == [1, 3, 0] and "exact match" in found["what"]
        assert found["rows"][0] == {
            "episode": 0, "query": 1, "task": "a", "input": "input 0", "references": ["r"], "full": "r", "other": "no"
        }  # fmt: skip
        order, found = self.shown("text", full[4:] * 2, [("", 0.4, "x"), ("", 0.6, "x")])
        assert order == [0] and "exact match" not in found["what"]

    def test_choices(self):
        right = [(task, 0.0, "r") for task in "aaab"]
        order, _ = self.shown("choices", right, [("", margin, "w") for margin in (0.5, 2.0, 0.0, 1.0)])
        assert order == [1, 3, 0]
        order, _ = self.shown("choices", [("t", 0.0, "r")] * 30, [("", 1.0 + i % 7, "w") for i in range(30)])
        assert order == [6, 13, 20, 27, 5, 12, 19, 26, 4, 11]

    def test_losses(self):
        order, found = self.shown("loss", [("a", 1.0, ""), ("a", 1.0, ""), ("b", 1.0, "")], [("", x, "") for x in (2, 4, 0.5)])
        assert order == [1, 0] and (found["rows"][0]["full"], found["rows"][0]["other"]) == (1.0, 4.0)


class TestSummary:
    FACTS = {"kind": "loss", "queries_offered": 40}

    def summary(self, **losses):
        lines = [line(name, i, value + i % 7) for name, value in losses.items() for i in range(40)]
        return summarise(lines, list(losses), self.FACTS, resamples=200, seed=0)

    def test_lower_is_better_for_a_loss(self):
        found = self.summary(no_context=5.0, full_context=1.0, prefix=2.0, swapped_prefix=6.0)
        by_question = {verdict["question"]: verdict for verdict in found["verdicts"]}
        assert by_question["Does it help?"]["answer"] == "yes"
        assert by_question["Is it as good as full attention?"]["answer"] == "no"
        assert by_question["Does it depend on its context?"]["answer"] == "yes"
        assert found["share_of_gain"]["mean"] == pytest.approx(0.75)

    def test_a_prefix_that_ignores_its_context_is_told_so(self):
        found = self.summary(no_context=5.0, full_context=5.0, prefix=2.0, swapped_prefix=2.0)
        by_question = {verdict["question"]: verdict for verdict in found["verdicts"]}
        assert by_question["Does it depend on its context?"]["answer"] == "unclear"
        assert "there is little to compress" in by_question["Is it as good as full attention?"]["sentence"]

    def test_figures_for_people(self):
        assert (quantity(0.1234, "accuracy"), quantity(1.23456, "loss")) == ("12.3 %", "1.235")
        assert difference({"mean": -0.1, "low": -0.2, "high": 0.05}, "accuracy") == "-10.0 [-20.0, +5.0]"
        assert re.fullmatch(r"\+1\.000 \[.*\]", difference({"mean": 1, "low": 0, "high": 2}, "loss"))
