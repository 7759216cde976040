"""Equal inputs are one example: none stands among its own demonstrations, wherever episodes are drawn."""

import json
from random import Random

import pytest
from data_files import lines, write

from hyperllama.commands.tune import split
from hyperllama.data.episode import Episode, Example, Task, TaskSource, merged, repetition_of, said_twice
from hyperllama.data.json_lines import read_json_lines_tasks
from hyperllama.data.labelled import read_labelled_sets
from hyperllama.data.mixture import MixtureSource
from hyperllama.data.p3 import P3Settings, read_p3
from hyperllama.data.sni import read_inputs, read_sni, read_task
from hyperllama.data.symbols import SymbolSettings, SymbolSource
from hyperllama.data.templates import TemplateSettings, TemplateSource
from hyperllama.inference.many import shown_of

PAIRS = [(f"question {i}", f"answer {i}") for i in range(8)]


def twice(pairs=PAIRS):
    return [{"input": i, "output": o} for i, o in (*pairs, *((f" {i}\n", o) for i, o in pairs))]


def jsonl(folder):
    write(folder / "t.jsonl", lines(twice()))
    return read_json_lines_tasks(str(folder), instances=100)


def sni(folder, **settings):
    examples = [{**row, "output": [row["output"]]} for row in twice()]
    task = {"Definition": "Answer.", "Positive Examples": twice()[:4], "Instances": examples, "Source": "squad"}
    write(folder / "tasks" / "task1.json", task)
    write(folder / "splits" / "default" / "train_tasks.txt", "task1\n")
    return read_sni(str(folder), split="train", splits="splits/default", instances=100, **settings)


def symbols(folder):
    rows = [{"text": f"row {i % 8}", "label": "ab"[i % 2]} for i in range(16)]
    write(folder / "set" / "train.jsonl", lines(rows))
    return SymbolSource(read_labelled_sets(str(folder), [], split="train"), SymbolSettings(), instances=100)


def templates(folder):
    """A template that leaves out the field in which rows differ."""
    rows = [{"text": f"row {i % 8}", "other": str(i), "label": "ab"[i % 2]} for i in range(16)]
    write(folder / "data" / "imdb" / "train.jsonl", lines(rows))
    template = {"key": "imdb", "name": "t", "jinja": "{{text}} ||| {{answer_choices[label]}}", "answer_choices": "a ||| b"}
    write(folder / "templates.jsonl", json.dumps({**template, "original_task": True}))
    sets = read_labelled_sets(str(folder / "data"), [], split="train")
    return TemplateSource(sets, TemplateSettings(templates=str(folder / "templates.jsonl")), instances=100)


def p3(folder):
    rows = [{"inputs_pretokenized": row["input"], "targets_pretokenized": row["output"]} for row in twice()]
    for part in ("train", "validation"):
        write(folder / "set_one" / f"{part}.jsonl", lines(rows))
    return read_p3(str(folder), P3Settings(configs=["set_one"], streaming=False), split="validation", instances_per_task=100)


def mixture(folder):
    return MixtureSource([jsonl(folder / "a"), symbols(folder / "b")], [1, 1])


SOURCES = [jsonl, sni, lambda folder: sni(folder, own_demonstrations=True), symbols, templates, p3, mixture]


@pytest.mark.parametrize("make", SOURCES)
def test_no_question_is_among_its_own_examples(tmp_path, make):
    source = make(tmp_path)
    episodes = [source.draw(Random(seed), 5, 3, seed) for seed in range(40)]
    episodes += source.evaluation(shots=5, queries=10, episodes=6, seed=0)
    for episode in episodes:
        keys = [example.input.strip() for example in (*episode.demonstrations, *episode.queries)]
        assert len(set(keys)) == len(keys) and episode.queries and episode.demonstrations
    assert sum(repeated for repeated, _ in repetition_of(source).values()) >= 8


def test_there_are_as_many_shots_as_different_inputs_allow():
    shown = tuple(Example(i, o) for i, o in PAIRS[:6])
    source = TaskSource([Task("t", "", shown, tuple(Example(i, o) for i, o in PAIRS))])
    counts = {len(source.draw(Random(seed), 6, 2, 0).demonstrations) for seed in range(60)}
    assert counts == {6}


def test_other_outputs_count_as_right_and_are_reported():
    examples = [Example("a", "1"), Example("b", "2", ("2", "two")), Example(" a ", "3"), Example("a", "1"), Example("b", "two")]
    kept, repeated, conflicting = merged(examples)
    assert kept == (Example("a", "1", ("1", "3")), examples[1]) and (repeated, conflicting) == (3, 1)
    offered = [Example("a", "x", ("x",), ("x", "y")), Example("a", "y", ("y",), ("y", "z"))]
    assert merged(offered)[0] == (Example("a", "x", ("x", "y"), ("x", "y", "z")),)
    assert said_twice({"f": (3, 1), "g": (0, 0), "h": (4, 0)}) == (
        "f and 1 more: 7 examples have an input that stands there before and count as one with it, 1 of them with other "
        "outputs, which all count as right"
    )
    assert said_twice({"f": (0, 0)}) is None


def test_what_is_compressed_and_what_is_held_back_is_distinct(tmp_path):
    path = write(tmp_path / "t.jsonl", lines(twice()))
    shown = shown_of(path)
    assert len(shown.demonstrations) == 8 and shown.repetition == (8, 0)
    doubled = tuple(Example(row["input"], row["output"]) for row in twice())
    task = split(Episode("", doubled, (*doubled, Example("new", "n")), "t"), 0.25, 0)
    assert len(task.train) == 6 and len(task.validation) == 2 and [q.input for q in task.test] == ["new"]
    assert not {e.key for e in task.train} & {e.key for e in task.validation}


def test_inputs_to_answer_are_not_merged(tmp_path):
    path = write(tmp_path / "t.jsonl", lines(twice()))
    assert len(read_inputs(path)) == 16


def test_one_text_is_a_list_of_one(tmp_path):
    """Else the letters of a name would be names."""
    (task,) = sni(tmp_path).tasks
    assert task.datasets == ("squad",) and task.instruction == "Answer."
    value = {"Definition": ["Do.", "It."], "Positive Examples": [], "Instances": [], "Categories": "QA", "Source": 7}
    with pytest.raises(Exception, match="Source must be a text or a list of texts, not '7'"):
        read_task(write(tmp_path / "x.json", value))


def test_a_task_without_instances_can_be_compressed_and_not_asked(tmp_path):
    task = {"Definition": ["Answer."], "Positive Examples": twice()[:3], "Instances": []}
    assert len(shown_of(write(tmp_path / "tasks" / "task1.json", task)).demonstrations) == 3
    write(tmp_path / "splits" / "default" / "train_tasks.txt", "task1\n")
    with pytest.raises(Exception, match="task1: its list of Instances is empty, so nothing can be asked; leave it out"):
        read_sni(str(tmp_path), split="train", splits="splits/default", instances=100)
