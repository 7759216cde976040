"""Sources of real data: official splits, symbol tuning, text windows, mixtures, and what they share."""

from collections import Counter
from random import Random

import pytest
from data_files import WORDS, lines, write
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperllama.data.episode import Example, Provenance, Task, TaskSource
from hyperllama.data.labelled import LabelledSet, load_labelled_set, read_labelled_sets
from hyperllama.data.leaks import dataset_name, find_leaks
from hyperllama.data.mixture import MixtureSource
from hyperllama.data.sni import read_sni, read_sni_hub
from hyperllama.data.stream import EpisodeStream
from hyperllama.data.symbols import KINDS, SymbolSettings, SymbolSource, symbol_pool
from hyperllama.data.synthetic import SyntheticLanguage, SyntheticSource
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.data.windows import WindowSettings, WindowSource, load_text_column, read_text_files
from hyperllama.errors import UserError
from hyperllama.recipe.loading import load_recipe
from hyperllama.recipe.schema import DataRecipe
from hyperllama.recipe.sources import make_source


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Input: a few words\nOutput: as they come"], kind="bytes", vocab_size=300)


def labelled(name="animals", rows=30, labels=("bird", "fish", "cat"), split="train"):
    made = tuple({"text": f"{name} {i}", "label": labels[i % len(labels)], "label_id": i % len(labels)} for i in range(rows))
    return LabelledSet(name, ("text",), tuple(labels), made, split)


class TestSni:
    def task(self, name, instances=5, **more):
        examples = [{"id": str(i), "input": f"{name} {i}", "output": [f"a{i}", f"b{i}"]} for i in range(instances)]
        shown = [{"input": f"shown {i}", "output": f"s{i}", "explanation": ""} for i in range(3)]
        return {"Definition": ["Do it."], "Positive Examples": shown, "Instances": examples, "Categories": ["Kind"],
                "Source": ["multinli"], "Input_language": ["English"], "Output_language": ["English"], **more}  # fmt: skip

    @pytest.fixture
    def clone(self, tmp_path):
        write(tmp_path / "tasks" / "t1.json", self.task("t1", 8))
        write(tmp_path / "tasks" / "t2.json", self.task("t2"))
        write(tmp_path / "tasks" / "t3.json", self.task("t3", Output_language=["French"]))
        for split in ("train", "test"):
            write(tmp_path / "splits" / "default" / f"{split}_tasks.txt", "t1\nt2\nt3\n")
        return str(tmp_path)

    def read(self, clone, split="test", **more):
        return read_sni(clone, **{"split": split, "splits": "splits/default", "instances": 4, **more})

    def test_the_english_track_with_categories_and_sources(self, clone):
        source = self.read(clone)
        assert [(t.name, t.category, t.datasets) for t in source.tasks] == [(n, "Kind", ("multinli",)) for n in ("t1", "t2")]

    def test_evaluation_is_the_official_one(self, clone):
        """The definition, the first k positive examples, the first instances, all references."""
        first, _ = self.read(clone).evaluation(shots=2, queries=100, episodes=100, seed=0)
        assert [e.input for e in first.demonstrations] == ["shown 0", "shown 1"] and first.instruction == "Do it."
        assert [e.input for e in first.queries] == ["t1 0", "t1 1", "t1 2", "t1 3"]
        assert first.queries[0].references == ("a0", "b0")

    def test_training_draws_one_reference_and_other_instances(self, clone):
        source = self.read(clone, "train")
        kept = [e.input for e in source.tasks[0].examples]
        assert (
            len(kept) == 4
            and kept != ["t1 0", "t1 1", "t1 2", "t1 3"]
            and kept == [e.input for e in self.read(clone, "train").tasks[0].examples]
        )
        outputs = Counter(source.draw(Random(i), 2, 1, i).queries[0].output[0] for i in range(200))
        assert set(outputs) == {"a", "b"} and min(outputs.values()) > 60

    def test_own_demonstrations_are_shown_in_order(self, clone):
        source = self.read(clone, "train", own_demonstrations=True)
        for i in range(20):
            assert [e.input for e in source.draw(Random(i), 2, 1, i).demonstrations] == ["shown 0", "shown 1"]

    def test_a_copy_on_the_hub_is_rows(self, tmp_path):
        rows = [{"task_name": "t1", "id": f"t1-{i}", "definition": "Do it.", "inputs": f"in {i // 2}", "targets": f"out {i}"}
                for i in range(10)]  # fmt: skip
        write(tmp_path / "hub" / "test.jsonl", lines(rows))
        source = read_sni_hub(str(tmp_path / "hub"), split="test", instances=4)
        (task,) = source.tasks
        assert (task.name, task.instruction, len(task.examples)) == ("t1", "Do it.", 4)
        assert task.examples[1] == Example("in 1", "out 2", ("out 2", "out 3"))
        (episode,) = source.evaluation(shots=2, queries=100, episodes=1, seed=0)
        assert len(episode.demonstrations) == 2 and not {e.input for e in episode.demonstrations} & {
            e.input for e in episode.queries
        }
        write(tmp_path / "bad" / "test.jsonl", lines([{"inputs": "x"}]))
        with pytest.raises(UserError, match="has no column task_name, definition, targets; it has inputs"):
            read_sni_hub(str(tmp_path / "bad"), split="test", instances=4)
        with pytest.raises(UserError, match=r"nowhere: no such folder or file; give a local data set"):
            read_sni_hub(str(tmp_path / "nowhere"), split="test", instances=4)
        with pytest.raises(UserError, match="split train: cannot be loaded .*check the names"):
            read_sni_hub(str(tmp_path / "hub"), split="train", instances=4)


class TestTaskSource:
    TASKS = [Task(n, "", (), tuple(Example(f"{n}{i}", "") for i in range(size))) for n, size in (("a", 30), ("b", 10))]

    def test_weights(self):
        equal, by_size = (TaskSource(self.TASKS, weights=w) for w in ("equal", "size"))
        shares = [Counter(s.draw(Random(i), 0, 1, i).task for i in range(800))["a"] / 800 for s in (equal, by_size)]
        assert shares[0] == pytest.approx(0.5, abs=0.06) and shares[1] == pytest.approx(0.75, abs=0.06)

    @given(shots=st.integers(0, 12), queries=st.integers(1, 6), seed=st.integers(0, 999), examples=st.integers(1, 10))
    def test_as_many_distinct_demonstrations_as_there_are(self, shots, queries, seed, examples):
        own = (Example("own 0", ""), Example("own 1", ""))
        task = Task("t", "", own, tuple(Example(str(i), "") for i in range(examples)))
        episode = TaskSource([task]).draw(Random(seed), shots, queries, 0)
        shown, asked = [e.input for e in episode.demonstrations], [e.input for e in episode.queries]
        assert len(asked) == min(queries, examples) and len(shown) == min(shots, examples + 2 - len(asked))
        assert len({*shown, *asked}) == len(shown) + len(asked)


class TestSymbols:
    def source(self, *sets, **settings_):
        return SymbolSource(sets or [labelled()], SymbolSettings(**settings_), instances=100)

    def test_labels_become_symbols_that_only_demonstrations_tell(self):
        source, seen = self.source(), set()
        for seed in range(40):
            episode = source.draw(Random(seed), 3, 2, 0)
            assert episode.instruction == "" and len(episode.demonstrations) == 9 and len(episode.queries) == 2
            classes = {}  # one symbol a class, one class a symbol
            for e in (*episode.demonstrations, *episode.queries):
                label = ("bird", "fish", "cat")[int(e.input.split()[1]) % 3]
                assert classes.setdefault(label, e.output) == e.output and e.output in e.choices and len(e.choices) == 3
            assert len(set(classes.values())) == len(classes) == 3
            seen |= set(classes.values())
            assert not {e.input for e in episode.demonstrations} & {e.input for e in episode.queries}
        assert len(seen) > 60

    def test_pools_of_training_and_evaluation_are_disjoint(self):
        for kind in KINDS:
            train, test = (set(symbol_pool(kind, split)) for split in ("train", "test"))
            assert not train & test and len(test) > 40 and len(train) > 5 * len(test)
        evaluated = self.source(labelled(split="test")).draw(Random(0), 2, 1, 0)
        assert all(any(c in symbol_pool(kind, "test") for kind in KINDS) for c in evaluated.queries[0].choices)

    def test_original_labels(self):
        episode = self.source(labels="original").draw(Random(0), 2, 2, 0)
        assert {e.output for e in episode.demonstrations} == {"bird", "fish", "cat"}
        assert episode.queries[0].choices == ("bird", "fish", "cat")

    def test_evaluation_takes_sets_in_turn_and_is_fixed(self):
        source = self.source(labelled("a"), labelled("b"))
        first = source.evaluation(shots=2, queries=3, episodes=6, seed=1)
        assert [e.task for e in first] == ["a", "b"] * 3 and first == source.evaluation(shots=2, queries=3, episodes=6, seed=1)
        assert first != source.evaluation(shots=2, queries=3, episodes=6, seed=2)

    @given(shots=st.integers(0, 20), queries=st.integers(1, 20), seed=st.integers(0, 99))
    def test_every_class_leaves_something_to_ask(self, shots, queries, seed):
        episode = self.source(labelled(rows=12)).draw(Random(seed), shots, queries, 0)
        assert len(episode.demonstrations) == 3 * min(shots, 3) and 1 <= len(episode.queries) <= queries

    def test_sets_from_files(self, tmp_path):
        rows = [
            {"premise": f"p{i}", "hypothesis": f"h{i}", "label": "yes" if i % 2 else "no", "label_id": i % 2} for i in range(6)
        ]
        write(tmp_path / "nli" / "train.jsonl", lines(rows))
        write(tmp_path / "other" / "train.jsonl", lines([{"text": "x", "label": "b"}, {"text": "y\u2028z", "label": "a"}]))
        nli, other = read_labelled_sets(str(tmp_path), [], split="train")
        assert (nli.labels, nli.text(nli.rows[0])) == (("no", "yes"), "Premise: p0\nHypothesis: h0")
        assert (other.labels, [r["label_id"] for r in other.rows], other.rows[1]["text"]) == (("a", "b"), [1, 0], "y\u2028z")
        assert read_labelled_sets(str(tmp_path / "nli" / "train.jsonl"), [], split="train")[0].rows == nli.rows

    @pytest.mark.parametrize(
        "rows, message",
        [
            ([{"text": "x"}], 'line 1: has no "label"; a labelled set needs one in every row'),
            ([{"text": "x", "label": "a"}, {"text": "y", "label": ""}], 'line 2: has no "label"'),
            ([{"text": "x", "label": "a"}], "has only the label 'a'; a task needs at least two"),
            ([{"label": "a"}, {"label": "b"}], "its rows have no text beside the label"),
            ([{"text": "x", "label": "a"}, {"label": "b"}], "a row has no text in field 'text'"),
            ([], "has no labelled rows"),
        ],
    )
    def test_sets_without_labels_are_refused(self, tmp_path, rows, message):
        write(tmp_path / "set" / "train.jsonl", lines(rows))
        with pytest.raises(UserError, match=message):
            read_labelled_sets(str(tmp_path), [], split="train")

    def test_missing_and_tiny_sets_are_named(self, tmp_path):
        write(tmp_path / "a" / "train.jsonl", lines([{"text": str(i), "label": "xyy"[i]} for i in range(3)]))
        with pytest.raises(UserError, match="has no train.jsonl for b; it has a"):
            read_labelled_sets(str(tmp_path), ["b"], split="train")
        with pytest.raises(UserError, match="a: label 'x' has fewer than two rows"):
            self.source(*read_labelled_sets(str(tmp_path), [], split="train"))

    def test_sets_of_the_datasets_library(self, tmp_path):
        import datasets

        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
        rows = {"text": [f"t{i}" for i in range(8)] + ["?"], "label": [i % 2 for i in range(8)] + [-1]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "set" / "train.parquet"))
        found = load_labelled_set(str(tmp_path / "set"), split="train", rows=100)
        assert (found.labels, len(found.rows), found.name) == (("no", "yes"), 8, "set")  # -1: no label
        assert all(row["label"] == ("yes" if int(row["text"][1:]) % 2 else "no") for row in found.rows)
        with pytest.raises(UserError, match="has no column kind; it has text, label"):
            load_labelled_set(str(tmp_path / "set"), split="train", label="kind", rows=100)


class TestWindows:
    def source(self, **settings_):
        sizes = {"context_tokens": 40, "continuation_tokens": 20, **settings_}
        return WindowSource([("a.txt", WORDS), ("b.txt", WORDS[: len(WORDS) // 3])], WindowSettings(**sizes))

    def test_a_window_is_context_and_what_follows_it(self, tokenizer):
        encoder = Encoder(tokenizer, TextFormat(), Limits())
        for seed in range(20):
            encoded = encoder.encode(self.source().draw(Random(seed), 0, 0, 0))
            ((prompt, answer),) = encoded.queries
            assert (len(encoded.context), len(prompt), len(answer)) == (1 + 40, 1, 19)
            assert tokenizer.decode([*encoded.context[1:], *prompt, *answer]) in WORDS

    def test_pieces_around_what_is_predicted_are_compressed(self, tokenizer):
        """A and D are context, C is predicted after B; together they are a stretch of the text."""
        encoder = Encoder(tokenizer, TextFormat(), Limits())
        encoded = encoder.encode(self.source(prompt_tokens=6, after_tokens=10).draw(Random(3), 0, 0, 0))
        ((prompt, answer),) = encoded.queries
        assert (len(encoded.context), len(prompt), len(answer)) == (1 + 40 + 10, 6, 14)
        before, after = encoded.context[1:41], encoded.context[41:]
        assert tokenizer.decode([*before, *prompt, *answer, *after]) in WORDS

    def test_repeated_windows_say_their_beginning_again(self, tokenizer):
        encoder, source = Encoder(tokenizer, TextFormat(), Limits()), self.source(repeats=1.0)
        for seed in range(20):
            episode = source.draw(Random(seed), 0, 0, 0)
            encoded, period = encoder.encode(episode), episode.window.period
            ids = [*encoded.context, *encoded.queries[0][0], *encoded.queries[0][1]]  # no start token
            assert len(ids) == 60 and 60 // 8 <= period <= 30 and ids[period:] == ids[:-period]
        assert source.evaluation(shots=0, queries=0, episodes=1, seed=0)[0].window.period is None
        assert {self.source(repeats=0.5).draw(Random(i), 0, 0, 0).window.period is None for i in range(20)} == {True, False}

    def test_a_warm_up_copies_common_words_first_by_distance_then_by_content(self, tokenizer):
        encoder = Encoder(tokenizer, TextFormat(), Limits())
        source = self.source(warmup_episodes=400, repeat_tokens=8, repeat_spread=4)
        early, late = ({source.draw(Random(i), 0, 0, index).window.period for i in range(200)} for index in (0, 399))
        assert early == {8} and late == set(range(4, 13))
        assert {source.draw(Random(i), 0, 0, 100).window.period for i in range(60)} == {8}
        encoded = encoder.encode(source.draw(Random(1), 0, 0, 5))
        ids = [*encoded.context, *encoded.queries[0][0], *encoded.queries[0][1]]
        assert len(ids) == 60 and ids[8:] == ids[:-8] and len(set(ids)) > 3
        assert source.draw(Random(1), 0, 0, 400).window.period is None  # then text
        assert source.evaluation(shots=0, queries=0, episodes=1, seed=0)[0].window.period is None

    @pytest.mark.parametrize(
        "settings_, problem",
        [
            ({"repeat_spread": 16}, "repeat_spread must be at least 0 and less than repeat_tokens"),
            ({"repeat_words": 0}, "repeat_words must be at least 1"),
            ({"repeats": 1.5}, "repeats is a share"),
            ({"prompt_tokens": 20}, "prompt_tokens must be at least 1, and fewer"),
            ({"after_tokens": -1}, "after_tokens must be 0 or more"),
            ({"split": "random", "after_tokens": 3}, "split random draws all sizes"),
        ],
    )
    def test_impossible_windows_are_refused(self, settings_, problem):
        with pytest.raises(UserError, match=problem):
            self.source(**settings_)

    def test_context_lengths_vary_in_training_and_not_in_evaluation(self):
        source = self.source(min_context_tokens=10)
        drawn = {source.draw(Random(i), 0, 0, 0).window.context_tokens for i in range(80)}
        assert min(drawn) >= 10 and max(drawn) <= 40 and len(drawn) > 20
        fixed = source.evaluation(shots=0, queries=0, episodes=5, seed=0)
        assert {e.window.context_tokens for e in fixed} == {40} and len({e.task for e in fixed}) == 5

    @settings(max_examples=60, deadline=None)
    @given(context=st.integers(1, 30), continuation=st.integers(2, 20), seed=st.integers(0, 10**6))
    def test_random_cuts_leave_every_piece_a_token(self, context, continuation, seed):
        source = self.source(context_tokens=context, continuation_tokens=continuation, split="random")
        window = source.draw(Random(seed), 0, 0, 0).window
        pieces = (window.context_tokens, window.prompt_tokens, window.continuation_tokens)
        assert min(pieces) >= 1 and sum(pieces) == context + continuation == window.tokens

    def test_randomly_cut_pieces_are_a_stretch_of_the_text(self, tokenizer):
        encoder, source = Encoder(tokenizer, TextFormat(), Limits()), self.source(split="random")
        sizes = set()
        for seed in range(30):
            encoded = encoder.encode(source.draw(Random(seed), 0, 0, 0))
            for prompt, answer in encoded.queries:
                assert tokenizer.decode([*encoded.context[1:], *prompt, *answer]) in WORDS
                sizes.add((len(encoded.context), len(prompt)))
        assert len(sizes) > 20
        (fixed,) = source.evaluation(shots=0, queries=0, episodes=1, seed=0)
        assert (fixed.window.context_tokens, fixed.window.prompt_tokens) == (40, 1)

    def test_documents_are_drawn_by_length(self):
        source = self.source()
        share = Counter(source.draw(Random(i), 0, 0, 0).category for i in range(800))["a.txt"] / 800
        assert share == pytest.approx(0.75, abs=0.06)

    def test_the_held_out_part_is_never_trained_on(self):
        (_, train), (_, test) = (self.source(part=part).documents[0] for part in ("train", "test"))
        assert train + test == WORDS and 18 < len(train) / len(test) < 20
        assert not find_leaks(self.source(part="train").provenance(), self.source(part="test").provenance())
        assert find_leaks(self.source().provenance(), self.source().provenance()).tasks

    def test_a_text_too_short_is_drawn_again(self, tokenizer):
        source = WindowSource([("short", "a b c"), ("long", WORDS)], WindowSettings(40, None, 20))
        stream = EpisodeStream(
            source, Encoder(tokenizer, TextFormat(), Limits()), seed=0, length=99, shots=0, min_shots=0, queries=1
        )
        assert all(stream[i].queries for i in range(99))

    def test_files_and_columns(self, tmp_path):
        write(tmp_path / "x" / "one.txt", "one two")
        write(tmp_path / "x" / "deep" / "two.txt", "three")
        assert read_text_files(str(tmp_path / "x")) == [("deep/two.txt", "three"), ("one.txt", "one two")]
        (tmp_path / "x" / "bad.txt").write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="bad.txt: text in UTF-16; expected plain text; save it as UTF-8"):
            read_text_files(str(tmp_path / "x"))
        with pytest.raises(UserError, match="neither a text file nor a folder with .txt files"):
            read_text_files(str(tmp_path / "y"))
        write(tmp_path / "c" / "train.jsonl", lines([{"body": f"text {i}"} for i in range(5)]))
        found = load_text_column(str(tmp_path / "c"), config=None, split="train", column="body", rows=3)
        assert [text for _, text in found] == ["text 0", "text 1", "text 2"]
        with pytest.raises(UserError, match="has no column text; it has body"):
            load_text_column(str(tmp_path / "c"), config=None, split="train", column="text", rows=3)
        with pytest.raises(UserError, match="its text files are empty"):
            WindowSource([("a", " \n")], WindowSettings())


class TestMixture:
    def mixture(self):
        tasks = TaskSource([Task("t", "", (), tuple(Example(str(i), "x") for i in range(9)))])
        return MixtureSource([tasks, SymbolSource([labelled()], SymbolSettings(), instances=90)], [3.0, 1.0])

    def test_weights_and_determinism(self):
        source = self.mixture()
        drawn = [source.draw(Random(i), 2, 1, i) for i in range(800)]
        assert Counter(e.task for e in drawn)["t"] / 800 == pytest.approx(0.75, abs=0.05)
        assert drawn == [self.mixture().draw(Random(i), 2, 1, i) for i in range(800)] and len(source) == 9 + 30

    def test_parts_are_all_evaluated_and_known(self):
        source = self.mixture()
        made = source.evaluation(shots=2, queries=2, episodes=3, seed=0)
        assert [e.task for e in made] == ["t", "animals", "animals", "animals"]
        assert source.provenance().tasks == {"t", "animals"} and any("animals" in text for text in source.texts())
        assert len(MixtureSource([source, SyntheticSource(SyntheticLanguage())], [1, 1])) == 0
        for sources, weights in (([], []), ([source], [0]), ([source], [1, 2])):
            with pytest.raises(UserError, match="at least one source, each with a weight above 0"):
                MixtureSource(sources, weights)

    def test_tasks_may_be_left_out_by_name(self, tmp_path):
        for name in "abc":
            write(tmp_path / f"{name}.jsonl", lines([{"input": f"{name}{i}", "output": "x"} for i in range(3)]))
        settings = {"source": "jsonl", "root": str(tmp_path)}
        source = make_source(DataRecipe(**settings, leave_out=["b"]))
        assert [task.name for task in source.tasks] == ["a", "c"] and not {"b0"} & source.provenance().inputs
        assert {source.draw(Random(i), 1, 1, i).task for i in range(40)} == {"a", "c"}
        for names, problem in ((["d"], "there is no task d"), (["a", "b", "c"], "leaves no task")):
            with pytest.raises(UserError, match=f"data.leave_out: {problem}"):
                make_source(DataRecipe(**settings, leave_out=names))
        with pytest.raises(UserError, match=r"data\.leave_out: source synthetic has no tasks by name"):
            make_source(DataRecipe(leave_out=["a"]))

    def test_a_part_may_have_shots_of_its_own(self):
        whole = self.mixture()
        source = MixtureSource(whole.sources, [3.0, 1.0], [None, (1, 3)])
        drawn = [source.draw(Random(i), 5, 1, i) for i in range(200)]
        shown = {name: {len(e.demonstrations) for e in drawn if e.task == name} for name in ("t", "animals")}
        classes = len(whole.sources[1].sets[0].labels)
        assert shown == {"t": {5}, "animals": {classes, 2 * classes, 3 * classes}}
        made = source.evaluation(shots=2, queries=1, episodes=1, seed=0)
        assert [len(e.demonstrations) for e in made] == [2, 3 * classes]

    def test_ranks_and_workers_share_the_stream_without_overlap(self, tokenizer):
        """Episode i depends on seed and i alone, so any way to deal out indices deals out the same episodes once."""
        limits = Limits()
        stream = EpisodeStream(
            self.mixture(), Encoder(tokenizer, TextFormat(), limits), seed=3, length=40, shots=2, min_shots=1, queries=1
        )
        whole = [stream[i] for i in range(40)]
        dealt = {i: stream[i] for worker in range(4) for i in range(worker, 40, 4)}
        assert [dealt[i] for i in range(40)] == whole and len(set(whole)) > 30

    def test_a_recipe_makes_one(self, tmp_path):
        write(tmp_path / "cls" / "a" / "train.jsonl", lines([{"text": str(i), "label": "xy"[i % 2]} for i in range(8)]))
        write(tmp_path / "texts" / "a.txt", WORDS)
        recipe = load_recipe(
            write(
                tmp_path / "r.yaml",
                f"""
output: out
model: {{architecture: {{model_type: llama}}}}
data:
  shots: 2
  mixture:
    - {{source: symbols, root: {tmp_path}/cls, weight: 2}}
    - {{source: text, root: {tmp_path}/texts, text: {{context_tokens: 30, continuation_tokens: 10}}}}
""",
            )
        )
        source = make_source(recipe.data)
        kinds = Counter(source.draw(Random(i), 2, 1, i).window is None for i in range(300))
        assert kinds[True] / 300 == pytest.approx(2 / 3, abs=0.08)


class TestLeaks:
    def test_names_meet_over_their_spellings(self):
        groups = [
            ("multi_nli", "glue/mnli", "MNLI", "multinli"),
            ("super_glue/wsc.fixed", "wsc_fiexed"),
            ("cb", "super_glue/cb"),
            ("super_glue/rte", "glue/rte", "RTE"),
            ("anli_r2", "anli"),
        ]
        for group in groups:
            assert len({dataset_name(name) for name in group}) == 1, group
        assert dataset_name("imdb") != dataset_name("cb")

    def test_inputs_are_compared_as_people_read_them(self):
        a = Provenance(inputs=frozenset({"The  cat sat.", "yes", "another one"}))
        b = Provenance(inputs=frozenset({"the cat sat", "yes"}))
        assert find_leaks(a, b).inputs == 1  # a bare "yes" is no sign of anything

    def test_synthetic_tasks_share_no_data(self):
        a = Provenance(datasets=frozenset({"synthetic"}))
        assert not find_leaks(a, a)

    def test_what_is_shared_is_said(self):
        a = Provenance(frozenset({"t1", "t2"}), frozenset({"cb", "mnli"}), frozenset({"one two three"}))
        assert str(find_leaks(a, a)) == "tasks t1, t2; data sets cb, mnli; 1 identical inputs"
        assert str(find_leaks(a, Provenance())) == "nothing"

    def test_known_overlaps_of_the_real_data(self, real_data):
        test = read_sni(str(real_data / "sni"), split="test", splits="splits/default", instances=100).provenance()
        train = read_sni(str(real_data / "sni"), split="train", splits="splits/default", instances=100).provenance()
        sets = SymbolSource(read_labelled_sets(str(real_data / "cls"), [], split="train"), SymbolSettings(), instances=9999)
        assert {"cb", "copa", "mnli"} <= set(find_leaks(sets.provenance(), test).datasets)
        assert not find_leaks(train, test).tasks
        # Nine of the sets were made from training tasks of S-NI, under names that no table has: the inputs tell.
        assert find_leaks(train, sets.provenance()).inputs > 500


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_any_text_makes_windows_or_says_why(texts):
    tokenizer = train_tokenizer(["a"], kind="bytes", vocab_size=300)
    encoder = Encoder(tokenizer, TextFormat(), Limits())
    try:
        source = WindowSource([(str(i), text) for i, text in enumerate(texts)], WindowSettings(4, None, 3))
    except UserError as error:
        assert "empty" in str(error)
        return
    encoded = encoder.encode(source.draw(Random(0), 0, 0, 0))
    assert (len(encoded.queries), encoded.skipped_queries) in ((1, 0), (0, 1))
