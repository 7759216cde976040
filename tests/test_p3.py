"""P3: the prompted data through the datasets library, offline."""

import json
import pickle
import re
from collections import Counter
from random import Random

import pytest
from data_files import lines, write
from omegaconf import OmegaConf

from hyperllama.data.episode import Example
from hyperllama.data.p3 import OTHERS, T0_HELD_OUT, T0_TRAIN, P3Settings, dataset_prefix, read_p3, select_configs
from hyperllama.errors import UserError


def prompted(text, target, **more):
    return {"inputs": [1], "inputs_pretokenized": text, "targets": [2], "targets_pretokenized": target, **more}


def questions(name, count=6, **more):
    return [prompted(f"{name} {i}? ", f"\n{'ab'[i % 2]}", **more) for i in range(count)]


@pytest.fixture
def p3(tmp_path, monkeypatch):
    """A folder as the hub has it, in miniature."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "p3"
    write(root / "glue_mrpc_same" / "train.jsonl", lines([*questions("mrpc"), prompted(" ", "a"), prompted("x", None)]))
    write(root / "glue_mrpc_same" / "validation.jsonl", lines(questions("mrpc validation")))
    write(root / "imdb_Reviewer" / "train.json", lines(questions("imdb", answer_choices=["a ", "b"])))
    for name in ("super_glue_cb_infer", "super_glue_cb_other"):
        write(root / name / "train.jsonl", lines(questions(f"{name} train", answer_choices=["a", "b"])))
        rows = questions(name, answer_choices=["a", "b"])
        datasets.Dataset.from_list(rows).to_parquet(str(root / name / "validation-00000-of-00001.parquet"))
    write(root / "super_glue_cb_infer_score_eval" / "validation.jsonl", lines(ranked()))
    for part in ("train", "dev", "test"):
        write(root / "anli_GPT_3_style_r1" / f"{part}_r1.jsonl", lines(questions(f"anli {part}")))
    return root


def ranked():
    """Rows of two examples, out of order, and of one that has no right choice."""
    rows = [(1, 1, "no", True), (0, 0, "yes", True), (1, 0, "yes", False), (2, 0, "x", False), (0, 1, "no", False)]
    return [prompted(f"ranked {i}", text, idx=[i, j], is_correct=right, weight=1.0) for i, j, text, right in rows]


def source(root, split="train", instances=100, weights="equal", **settings):
    return read_p3(str(root), P3Settings(**settings), split=split, instances_per_task=instances, weights=weights)


def in_order(examples):
    return sorted(examples, key=lambda example: example.input)


class TestP3:
    def test_mixtures(self, p3):
        train, held_out = source(p3, mixture="t0_train"), source(p3, "validation", mixture="t0_held_out")
        assert [task.name for task in train.tasks] == ["glue_mrpc_same", "imdb_Reviewer"]
        assert [(task.name, task.category, task.datasets) for task in held_out.tasks] == [
            ("anli_GPT_3_style_r1", "anli_r1", ("anli",)), ("super_glue_cb_infer", "super_glue_cb", ("super_glue_cb",)),
        ]  # fmt: skip
        assert "wiqa" in train.missing and "story_cloze_2016" in held_out.missing
        assert len(T0_TRAIN) == 38 and len(T0_HELD_OUT) == 9 and not set(T0_TRAIN) & {*T0_HELD_OUT, *OTHERS}

    def test_examples(self, p3):
        (task,) = source(p3, datasets=["glue_mrpc"]).tasks
        assert in_order(task.examples) == [Example(f"mrpc {i}?", "ab"[i % 2], ("ab"[i % 2],)) for i in range(6)]
        assert (task.dropped, task.demonstrations, task.instruction) == (2, (), "")
        (task,) = source(p3, datasets=["imdb"], instances=2).tasks
        assert len(task.examples) == 2 and all(e.choices == ("a", "b") for e in task.examples)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_are_shuffled(self, p3, streaming):
        """IMDB is stored one class after the other."""
        write(p3 / "imdb_Sorted" / "train.jsonl", lines([prompted(str(i), "no" if i < 50 else "yes") for i in range(100)]))
        (task,) = source(p3, configs=["imdb_Sorted"], instances=20, streaming=streaming).tasks
        assert 4 < sum(e.output == "yes" for e in task.examples) < 16
        (again,) = source(p3, configs=["imdb_Sorted"], instances=20, streaming=streaming).tasks
        assert again.examples == task.examples

    def test_choices_are_kept_where_the_target_is_one(self, p3):
        rows = [prompted("1", "a", answer_choices=["a", " ", "a ", "b"]), prompted("2", "A", answer_choices=["a", "b"])]
        write(p3 / "imdb_Odd" / "train.jsonl", lines([*rows, prompted("3", "a", answer_choices=None)]))
        (task,) = source(p3, configs=["imdb_Odd"]).tasks
        assert [(e.output, e.choices) for e in in_order(task.examples)] == [("a", ("a", "b")), ("A", ()), ("a", ())]

    def test_numbers_are_texts(self, p3):
        write(p3 / "imdb_Odd" / "train.jsonl", lines([prompted("2 - 2", 0, answer_choices=[0, 1])]))
        assert source(p3, configs=["imdb_Odd"]).tasks[0].examples == (Example("2 - 2", "0", ("0",), ("0", "1")),)

    def test_demonstrations_come_from_their_split(self, p3):
        made = source(p3, "validation", datasets=["super_glue_cb"])
        assert [task.name for task in made.tasks] == ["super_glue_cb_infer", "super_glue_cb_other"]
        for i in range(20):
            episode = made.draw(Random(i), 3, 2, i)
            assert episode.instruction == "" and len(episode.queries) == 2
            assert all(re.match(rf"{episode.task} \d", e.input) for e in episode.queries)
            assert all(e.input.startswith(episode.task) for e in episode.demonstrations)
            assert not {e.input for e in episode.demonstrations} & {e.input for e in episode.queries}
        (first, _) = made.evaluation(shots=2, queries=9, episodes=0, seed=0)
        assert len({e.input for e in first.demonstrations}) == 2
        assert all(e.input.startswith("super_glue_cb_infer train") for e in first.demonstrations)
        assert sorted(e.input for e in first.queries) == [f"super_glue_cb_infer {i}?" for i in range(6)]

    @pytest.mark.parametrize("split, part", [("train", "train"), ("validation", "dev"), ("test", "test")])
    def test_anli_names_its_splits_by_round(self, p3, split, part):
        (task,) = source(p3, split, configs=["anli_GPT_3_style_r1"]).tasks
        assert in_order(task.examples)[0].input == f"anli {part} 0?"
        assert bool(task.demonstrations) == (split != "train")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rank_classification(self, p3, streaming):
        made = source(p3, "validation", configs=["super_glue_cb_infer_score_eval"], streaming=streaming)
        (task,) = made.tasks
        assert (task.examples, task.category) == (
            (Example("ranked 0", "yes", ("yes",), ("yes", "no")), Example("ranked 1", "no", ("no",), ("yes", "no"))),
            "super_glue_cb",
        )
        assert made.dropped == 1 and task.demonstrations == ()
        assert len(source(p3, "validation", configs=[task.name], streaming=streaming, instances=1).tasks[0].examples) == 1

    def test_streaming_reads_the_same(self, p3):
        def read(streaming):
            made = source(p3, "validation", datasets=["super_glue_cb", "anli", "glue"], streaming=streaming)
            return [in_order(task.examples) for task in made.tasks], made.dropped

        assert read(True) == read(False)

    def test_streaming_stops_at_the_last_row_used(self, p3):
        broken = p3 / "imdb_Broken" / "train.jsonl"
        write(broken, lines(questions("x", 2)))
        with broken.open("a", encoding="utf-8") as file:
            # Beyond the first chunk of 10 MB that the reader takes at once.
            file.writelines(json.dumps(prompted("y" * 100_000, "a")) + "\n" for _ in range(220))
            file.write("not JSON\n")
        (task,) = source(p3, configs=["imdb_Broken"], streaming=True, instances=2, shuffle_buffer=1).tasks
        assert len(task.examples) == 2
        with pytest.raises(UserError, match="imdb_Broken, split train: cannot be read"):
            source(p3, configs=["imdb_Broken"], instances=2).tasks[0].examples  # noqa: B018

    def test_only_what_is_drawn_is_read(self, p3, monkeypatch):
        import datasets

        read, load = [], datasets.load_dataset
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: read.append(k["data_files"]["train"][0]) or load(*a, **k))
        made = source(p3, mixture="t0_train")
        assert (len(made), read) == (200, [])
        names = {made.draw(Random(0), 1, 1, 0).task for _ in range(3)}
        assert len(names) == len(read) == 1 and names.pop() in read[0]
        source(p3, mixture="t0_train", weights="size")
        assert len(read) == 3

    def test_draws_do_not_depend_on_what_was_read(self, p3):
        one, other = (source(p3, datasets=["glue", "imdb", "super_glue_cb"]) for _ in range(2))
        backwards = [other.draw(Random(i), 2, 2, i) for i in reversed(range(12))][::-1]
        assert [one.draw(Random(i), 2, 2, i) for i in range(12)] == backwards
        assert pickle.loads(pickle.dumps(one)).draw(Random(5), 2, 2, 5) == backwards[5]

    def test_weights(self, p3):
        write(p3 / "imdb_Large" / "train.jsonl", lines(questions("large", 60)))
        made = source(p3, datasets=["imdb"], weights="size", instances=50)
        drawn = Counter(made.draw(Random(i), 1, 1, i).task for i in range(400))
        assert len(made) == 56 and drawn["imdb_Large"] > 320

    def test_provenance_and_texts(self, p3):
        made = source(p3, "validation", datasets=["super_glue_cb"])
        assert made.provenance().datasets == {"super_glue_cb"}
        assert "super_glue_cb_other 3?" in made.provenance().inputs and "super_glue_cb_infer train 0?" in set(made.texts())

    def test_hub(self, p3, monkeypatch):
        import datasets

        asked = []

        def load(name, config, *, split, streaming):
            asked.append((name, config, split, streaming))
            return datasets.Dataset.from_list(questions(f"{config} {split}")).to_iterable_dataset()

        monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["anli_x_r2", "anli_x_r2_score_eval", "imdb_y"])
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "validation", "test"])
        monkeypatch.setattr(datasets, "load_dataset", load)
        made = source("some/P3", "test", mixture="t0_held_out", streaming=True)
        episode = made.draw(Random(0), 2, 1, 0)
        assert (episode.task, episode.category) == ("anli_x_r2", "anli_r2") and episode.queries[0].input.startswith(
            "anli_x_r2 test"
        )
        assert asked == [("some/P3", "anli_x_r2", "test", True), ("some/P3", "anli_x_r2", "train", True)]

    def test_a_hub_out_of_reach(self, monkeypatch):
        import datasets

        def fail(*args, **kwargs):
            raise ConnectionError("no\nnetwork")

        monkeypatch.setattr(datasets, "get_dataset_config_names", fail)
        with pytest.raises(UserError, match="^some/other: its configurations cannot be listed .no network.; check"):
            source("some/other", mixture="t0_train")
        monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["imdb_y"])
        monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
        with pytest.raises(UserError, match="^some/other, imdb_y: its splits cannot be listed .no network."):
            source("some/other", mixture="t0_train").draw(Random(0), 1, 1, 0)

    @pytest.mark.parametrize("split, settings, message", [
        ("train", {}, "data.p3.mixture: give either"),
        ("train", {"mixture": "t0_train", "datasets": ["imdb"]}, "data.p3.mixture: give either"),
        ("train", {"configs": ["imdb_Reviewr"]}, "no configuration 'imdb_Reviewr', did you mean 'imdb_Reviewer'"),
        ("train", {"datasets": ["super_glue_bc"]}, "begins with 'super_glue_bc', did you mean 'super_glue_cb'"),
        ("nowhere", {"mixture": "t0_train"}, "no configuration of data.p3 below .* has a split 'nowhere', such as glue"),
        ("test", {"configs": ["imdb_Reviewer"]}, "imdb_Reviewer has no split 'test'; it has train"),
    ])  # fmt: skip
    def test_what_is_not_there(self, p3, split, settings, message):
        with pytest.raises(UserError, match=message):
            source(p3, split, **settings).draw(Random(0), 1, 1, 0)

    def test_a_mixture_of_which_nothing_is_there(self, tmp_path):
        write(tmp_path / "super_glue_boolq_exam" / "train.jsonl", lines(questions("x")))
        with pytest.raises(UserError, match="nothing of t0_train is there; it has super_glue_boolq_exam"):
            source(tmp_path, mixture="t0_train")

    @pytest.mark.parametrize("rows, name, message", [
        ([{"inputs_pretokenized": "a", "label": 1}], "imdb_x", "has no column targets_pretokenized; it has inputs_"),
        (questions("x"), "imdb_x_score_eval", "has no column idx, is_correct"),
        ([prompted("a", "b", idx=[1], is_correct=True)], "imdb_x_score_eval", r"idx is \[1\]; expected"),
        ([prompted("a", "b", answer_choices="b c")], "imdb_x", "answer_choices is 'b c'; expected a list"),
        ([prompted("", "b")], "imdb_x", "no row has both an input and a target"),
        ([], "imdb_x", "cannot be read"),
    ])  # fmt: skip
    @pytest.mark.parametrize("streaming", [False, True])
    def test_wrong_rows(self, p3, rows, name, message, streaming):
        write(p3 / name / "train.jsonl", lines(rows))
        with pytest.raises(UserError, match=rf"{name}, split train: .*{message}") as caught:
            source(p3, configs=[name], streaming=streaming).draw(Random(0), 1, 1, 0)
        assert "\n" not in str(caught.value)

    def test_wrong_roots(self, tmp_path):
        with pytest.raises(UserError, match="has no folders of P3"):
            source(tmp_path, mixture="t0_train")
        with pytest.raises(UserError, match="is no folder"):
            source(tmp_path / "nowhere", mixture="t0_train")

    def test_prefixes_do_not_run_into_each_other(self):
        names = ["wiki_qa_x", "wiki_bio_y", "winogrande_winogrande_debiased_z", "winogrande_winogrande_xl_z", "new_set_q"]
        assert [dataset_prefix(name) for name in names] == [
            "wiki_qa", "wiki_bio", "winogrande_winogrande_debiased", "winogrande_winogrande_xl", "new_set_q",
        ]  # fmt: skip
        assert select_configs(names, P3Settings(datasets=["winogrande"])) == (names[2:4], [])
        assert select_configs(names, P3Settings(mixture="t0_held_out"))[0] == names[3:4]

    def test_settings_in_a_recipe(self):
        structured = OmegaConf.merge(OmegaConf.structured(P3Settings), {"mixture": "t0_train", "streaming": True})
        assert OmegaConf.to_object(structured) == P3Settings(mixture="t0_train", streaming=True)
