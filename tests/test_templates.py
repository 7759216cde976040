"""Prompt templates over labelled sets: rendering in a sandbox, reading, and the real ones."""

import json
from collections import Counter
from random import Random

import jinja2
import pytest
import yaml
from data_files import lines, write
from omegaconf import OmegaConf

from hyperllama.data.episode import Example
from hyperllama.data.labelled import LabelledSet, read_labelled_sets
from hyperllama.data.prompts import TEXT_LENGTH, Template, missing_fields, render
from hyperllama.data.templates import (
    TemplateSettings,
    TemplateSource,
    read_templates,
    render_tasks,
    template_keys,
)
from hyperllama.errors import UserError

CHOICES = "Yes ||| No"


def made(jinja, row, *, choices=None, metrics=("Accuracy",)):
    return render(Template("t", "some/set", jinja, choices, True, metrics), row)


class TestRender:
    def test_prompt_target_and_choices(self):
        example = made("  Is {{a}} so?\n||| {{ answer_choices[label] }} ", {"a": "it", "label": 1}, choices=CHOICES)
        assert example == Example("Is it so?", "No", ("No",), ("Yes", "No"))

    def test_choices_are_an_expression_over_the_row(self):
        jinja, choices = "Which? ||| {{ answer_choices[label] }}", '{{ options | join(" ||| ") }} ||| neither'
        example = made(jinja, {"options": ["a b", "c"], "label": 1}, choices=choices)
        assert (example.output, example.choices) == ("c", ("a b", "c", "neither"))

    @pytest.mark.parametrize("jinja", [
        "{% if kind == 'x' %}{{a}} ||| b{% endif %}", "{{a}} ||| {% if kind == 'x' %}b{% endif %}", "{{a}} b",
        "{% if kind == 'x' %}{{a}}{% endif %} ||| b", "{{a}} ||| b ||| c",
    ])  # fmt: skip
    def test_what_does_not_apply_renders_to_nothing(self, jinja):
        assert made(jinja, {"a": "text", "kind": "y"}) is None

    def test_conditions(self):
        jinja = "{{a}} {% if kind == 'cause' %}because{% else %}so{% endif %} ||| {% if label != -1 %}{{b}}{% endif %}"
        assert made(jinja, {"a": "x", "b": "y", "kind": "cause", "label": 0}).input == "x because"
        assert made(jinja, {"a": "x", "b": "y", "kind": "effect", "label": 0}).input == "x so"
        assert made(jinja, {"a": "x", "b": "y", "kind": "effect", "label": -1}) is None

    def test_a_separator_in_a_field_is_text(self):
        row = {"a": "p ||| q", "b": ["r|||s"], "label": 0}
        example = made("{{a}} ||| {{ answer_choices[label] }}", row, choices="{{b[0]}} ||| {{a}}")
        assert example == Example("p ||| q", "r|||s", ("r|||s",), ("r|||s", "p ||| q"))

    def test_printed_values_are_cut_at_a_word(self):
        words = "word " * 1000
        example = made("{{a}}|{{a | length}} ||| {{ answer_choices[0] }}", {"a": words}, choices="{{a}} ||| b")
        cut, length = example.input.split("|")
        assert length == "5000" and cut.endswith("word...") and TEXT_LENGTH - 8 < len(cut) <= TEXT_LENGTH
        assert example.choices == (example.output, "b") and len(example.output) <= TEXT_LENGTH
        assert made("{{a}} ||| b", {"a": "x" * TEXT_LENGTH}).input == "x" * TEXT_LENGTH

    def test_choice_follows_the_row_alone(self):
        jinja = "{{ ['a', 'b', 'c', 'd'] | choice }}{{ range(100) | random }} {{i}} ||| b"
        first = [made(jinja, {"i": i}).input for i in range(30)]
        Random(1).random()
        assert first == [made(jinja, {"i": i}).input for i in range(30)]
        assert set("".join(first)) >= set("abcd") and len({text.split()[0] for text in first}) > 20

    def test_most_frequent(self):
        assert made("{{ x | most_frequent | join(',') }} ||| b", {"x": list("abcbac")}).input == "a,b,c"
        assert made("{{ x | most_frequent | join(',') }} ||| b", {"x": list("abcbb")}).input == "b"

    def test_zip_and_gathering(self):
        jinja = "{% set l = [] %}{% for p, q in zip(x, y) %}{{ l.append(p + q) or '' }}{% endfor %}{{ l | join(' ') }} ||| b"
        assert made(jinja, {"x": ["a", "c"], "y": ["b", "d"]}).input == "ab cd"

    def test_the_row_stays_as_it_is(self):
        row = {"x": ["a"], "y": {"k": "v"}}
        assert made("{% if x.append('c') or y.pop('k') %}{{ x | length }}{{ y | length }}{% endif %} ||| b", row).input == "20"
        assert row == {"x": ["a"], "y": {"k": "v"}}

    def test_a_target_that_is_no_choice(self):
        assert made("a ||| {{b}}", {"b": "other"}, choices=CHOICES, metrics=("ROUGE",)).choices == ()
        with pytest.raises(
            UserError, match=r"template some/set 't': the target 'other' is not among its answer choices \['Yes"
        ):
            made("a ||| {{b}}", {"b": "other"}, choices=CHOICES)

    @pytest.mark.parametrize("payload", [
        "{{ ''.__class__ }}", "{{ x.__init__.__globals__ }}", "{{ cycler.__init__.__globals__ }}", "{{ x['__class__'] }}",
        "{{ x | attr('__class__') }}", "{{ [x] | map(attribute='__class__') | list }}", "{{ '{0.__class__}'.format(x) }}",
        "{{ '{a.__class__}'.format_map({'a': x}) }}", "{% if x.__class__ %}{% endif %}", "{% set c = x.__class__ %}",
        "{{ self.__init__ }}", "{{ dict.mro() }}", "{{ x.upper.__self__ }}", "{{ [x] | selectattr('__class__') | list }}",
        "{{ [1].extend([2]) }}", "{{ x.__class__ is defined }}", "{{ range.__call__ }}",
    ])  # fmt: skip
    def test_internals_are_refused(self, payload):
        for template in (Template("evil", "k", f"{payload} {{{{x}}}} ||| b"), Template("evil", "k", "{{x}} ||| b", payload)):
            with pytest.raises(UserError, match=r"^set, row 1, template k 'evil': refused as unsafe \(access .*\)") as caught:
                render(template, {"x": "text"}, where="set, row 1")
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("jinja, message", [
        ("{% if %} ||| b", "not a Jinja template, line 1"),
        ("\n{{ x ||| b", "not a Jinja template, line 2"),
        ("{{ x | nothing }} ||| b", "not a Jinja template, line 1 .No filter named 'nothing'"),
        ("{{ y.z }} {{ v }} ||| b", "needs v, y, which the row lacks"),
        ("{{ x.nothing }} ||| b", "cannot be rendered .UndefinedError: 'str object' has no attribute 'nothing'"),
        ("{{ 1 / 0 }} ||| b", "cannot be rendered .ZeroDivisionError"),
        ("{{ x + 1 }} ||| b", "cannot be rendered .TypeError"),
        ("{{ range(10**9) }} ||| b", "cannot be rendered .OverflowError: Range too big"),
        ("{{ 'a' * 10**9 }} ||| b", "cannot be rendered .OverflowError"),
        ("{{ 10**10**10 }} ||| b", "cannot be rendered .OverflowError"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}a{% endfor %}{% endfor %} ||| b", "more than 1,000,000"),
        ("{% set l = [1] %}{% for i in l %}{% if l.append(i) %}{% endif %}{% endfor %} ||| b", "more than 100,000 items"),
        ("{% include 'x' %} ||| b", "cannot be rendered"),
    ])  # fmt: skip
    def test_mistakes_are_told_in_one_line(self, jinja, message):
        with pytest.raises(UserError, match=rf"template k 't': .*{message}") as caught:
            render(Template("t", "k", jinja.replace("\n{{", "{# #}\n{{")), {"x": "text"})
        assert "\n" not in str(caught.value)

    def test_a_condition_may_ask_for_what_is_not_there(self):
        assert made("{% if x.more or x[3] == 'a' %}no{% else %}yes{% endif %} ||| b", {"x": ["a"]}).input == "yes"


ENTRIES = [
    {"key": "one/two", "name": "plain", "jinja": "{{text}}? ||| {{ answer_choices[label] }}", "answer_choices": CHOICES,
     "original_task": True, "metrics": ["Accuracy"]},
    {"key": "one/two", "name": "turned around", "jinja": "{{label}} ||| {{text}}", "answer_choices": None,
     "original_task": False, "metrics": ["BLEU", "ROUGE"]},
    {"key": "one/two", "name": "needs more", "jinja": "{{text}} {{hint}} ||| b", "original_task": True, "metrics": None},
    {"key": "small", "name": "sometimes", "jinja": "{% if label %}{{text}} ||| yes{% endif %}", "original_task": True},
]  # fmt: skip


@pytest.fixture
def templates(tmp_path):
    return str(write(tmp_path / "templates.jsonl", lines(ENTRIES)))


def labelled(name, texts=("red", "green", "blue"), labels=(0, 1, 1), split="test"):
    names = ("yes", "no")
    rows = tuple({"text": t, "label": names[i], "label_id": i} for t, i in zip(texts, labels))
    return LabelledSet(name, ("text",), names, rows, split)


class TestTemplates:
    def test_yaml_equals_json_lines(self, tmp_path, templates):
        for key in ("one/two", "small"):
            blocks = []
            for i, entry in enumerate(e for e in ENTRIES if e["key"] == key):
                rest = {k: entry.get(k) for k in ("answer_choices", "jinja", "name")}
                body = yaml.safe_dump({**rest, "id": str(i), "reference": ""}, allow_unicode=True)
                inner = yaml.safe_dump({"metrics": entry.get("metrics"), "original_task": entry["original_task"]})
                indent = "".join(f"    {line}\n" for line in body.splitlines())
                metadata = "    metadata: !TemplateMetadata\n" + "".join(f"      {line}\n" for line in inner.splitlines())
                blocks.append(f"  id{i}: !Template\n{indent}{metadata}")
            file = tmp_path / "yaml" / key / "templates.yaml"
            file.parent.mkdir(parents=True)
            file.write_text("dataset: x\ntemplates:\n" + "".join(blocks), encoding="utf-8")
        assert template_keys(tmp_path / "yaml") == template_keys(templates) == ["one/two", "small"]
        for key in ("one/two", "small"):
            assert read_templates(tmp_path / "yaml", key) == read_templates(templates, key)
        assert read_templates(tmp_path, "small") == read_templates(templates, "small")  # the folder of templates.jsonl

    @pytest.mark.parametrize("text, message", [
        ("templates: {a: !!python/object/apply:os.getcwd []}", "cannot be read as YAML"),
        ("templates: {a: !Other {}}", "cannot be read as YAML"),
        ("a: [", "cannot be read as YAML"),
        ("other: {}", "no mapping templates"),
        ("templates: {a: !Template {name: x}}", "needs texts name and jinja"),
    ])  # fmt: skip
    def test_wrong_yaml(self, tmp_path, text, message):
        (tmp_path / "k").mkdir()
        (tmp_path / "k" / "templates.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message) as caught:
            read_templates(tmp_path, "k")
        assert "templates.yaml" in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("line, message", [
        ("{", "line 1: not JSON"), ('{"name": "x"}', 'line 1: has no "key"'), ('{"key": "k", "name": 3}', "1: not a template"),
    ])  # fmt: skip
    def test_wrong_json_lines(self, tmp_path, line, message):
        (tmp_path / "templates.jsonl").write_text(line, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_templates(tmp_path, "k")

    def test_names_that_are_not_there(self, tmp_path, templates):
        with pytest.raises(UserError, match="no templates for 'one/tow', did you mean 'one/two'"):
            read_templates(templates, "one/tow")
        with pytest.raises(UserError, match="has no templates; give JSON lines"):
            read_templates(tmp_path / "nowhere", "k")
        for settings, message in [
            ({}, "data.templates.templates: give"),
            ({"names": ["plane"]}, "no set has a template 'plane', did you mean 'plain'"),
            ({"names": ["turned around"]}, "set original_task_only=false"),
            ({"keys": {"s": "smal"}}, "no templates for 'smal', did you mean 'small'"),
            ({"keys": {}}, "data.templates.keys: there are no templates for the set s; give .* s: "),
            ({"rename": {"s": {"txt": "a"}}}, "data.templates.rename.s: the set has no field 'txt', did you mean 'text'"),
            ({"rename": {"s": {"text": "a"}}}, "none of the 3 templates of one/two applies to the set s .'s/plain' needs text"),
        ]:
            base = {"templates": templates, "keys": {"s": "one/two"}} if settings else {}
            with pytest.raises(UserError, match=message):
                render_tasks([labelled("s")], TemplateSettings(**{**base, **settings}), instances=9)

    def test_tasks(self, templates):
        settings = TemplateSettings(templates=templates, keys={"s": "one/two"})
        sets, shown = [labelled("s"), labelled("small")], [labelled("s", ("black", "white", ""), split="train")]
        tasks, report = render_tasks(sets, settings, instances=9, shown=shown)
        assert [(t.name, t.category, t.datasets) for t in tasks] == [
            ("s/plain", "s", ("s", "one/two")), ("small/sometimes", "small", ("small", "small")),
        ]  # fmt: skip
        assert tasks[0].examples == tuple(
            Example(f"{t}?", o, (o,), ("Yes", "No")) for t, o in [("red", "Yes"), ("green", "No"), ("blue", "No")]
        )
        assert [e.input for e in tasks[0].demonstrations] == ["black?", "white?", "?"]
        assert [e.input for e in tasks[1].examples] == ["green", "blue"] and not tasks[1].demonstrations
        assert (report.rendered, report.dropped) == (8, 1)
        assert report.skipped == {"s/needs more": "needs hint, which the set does not have"}

    def test_settings(self, templates):
        base = {"templates": templates, "keys": {"s": "one/two"}}
        everything, _ = render_tasks([labelled("s")], TemplateSettings(**base, original_task_only=False), instances=2)
        assert [t.name for t in everything] == ["s/plain", "s/turned around"]
        assert [len(t.examples) for t in everything] == [2, 2]
        assert {e.output for e in everything[1].examples} == {e.input[:-1] for e in everything[0].examples}  # the same rows
        renamed = TemplateSettings(**base, rename={"s": {"text": "hint"}}, names=["needs more"])
        with pytest.raises(UserError, match="'s/needs more' needs text"):
            render_tasks([labelled("s")], renamed, instances=2)
        structured = OmegaConf.merge(OmegaConf.structured(TemplateSettings), {"rename": {"s": {"text": "hint"}}})
        assert OmegaConf.to_object(structured) == TemplateSettings(rename={"s": {"text": "hint"}})

    def test_a_sample_of_rows_is_always_the_same(self, templates):
        settings = TemplateSettings(templates=templates, keys={"s": "one/two"})
        long = labelled("s", [f"text {i}" for i in range(50)], [i // 25 for i in range(50)])
        first, _ = render_tasks([long], settings, instances=12)
        assert render_tasks([long], settings, instances=12)[0] == first
        assert {e.output for e in first[0].examples} == {"Yes", "No"}  # though the set is sorted by label

    def test_a_row_that_fails_is_named(self, tmp_path):
        entry = {"key": "s", "name": "n", "jinja": "{{ 1 / (text | length - 4) }} ||| b", "original_task": True}
        settings = TemplateSettings(templates=str(write(tmp_path / "t.jsonl", lines([entry]))))
        with pytest.raises(UserError, match="^s, split test, row 3, template s 'n': cannot be rendered .ZeroDivisionError"):
            render_tasks([labelled("s")], settings, instances=None)

    def test_source(self, templates):
        source = TemplateSource([labelled("small")], TemplateSettings(templates=templates), instances=5)
        assert (len(source), source.report.dropped) == (2, 1)
        episode = source.draw(Random(0), 1, 1, 0)
        assert (episode.task, episode.category, episode.instruction) == ("small/sometimes", "small", "")
        assert {episode.demonstrations[0].input, episode.queries[0].input} == {"green", "blue"}
        assert source.provenance().datasets == {"small"}


def by_the_book(entry, row):
    """What promptsource's documentation says, word for word: a filter on every printed value, unprotected Jinja, no sandbox."""
    environment = jinja2.Environment(loader=jinja2.BaseLoader())
    choices = environment.from_string(entry["answer_choices"] or "").render(**row).split("|||")
    cut = entry["jinja"].replace("}}", " | string | truncate(2048) }}")
    rendered = environment.from_string(cut).render(**row, answer_choices=[choice.strip() for choice in choices])
    return [part.strip() for part in rendered.split("|||")]


def test_real_sets(real_data):
    """Seven of the local sets have templates; all of those render, and as promptsource's own rules have them."""
    path = real_data / "p3_templates"
    keys = {"boolq": "super_glue/boolq", "cb": "super_glue/cb", "copa": "super_glue/copa", "dbpedia14": "dbpedia_14",
            "mnli": "glue/mnli", "piqa": "piqa", "poem_sentiment": "poem_sentiment"}  # fmt: skip
    sets = read_labelled_sets(str(real_data / "cls"), list(keys), split="test")
    settings = TemplateSettings(templates=str(path), original_task_only=False)
    tasks, report = render_tasks(sets, settings, instances=40)
    assert Counter(task.category for task in tasks) == {
        "boolq": 10, "cb": 15, "copa": 12, "dbpedia14": 4, "mnli": 15, "piqa": 11, "poem_sentiment": 8,
    }  # fmt: skip
    assert not report.skipped and report.rendered == sum(len(task.examples) for task in tasks) == 75 * 40
    assert {task.name for task in tasks if not task.examples[0].choices} == {
        "piqa/Correct the solution", "piqa/no prompt needed", "piqa/Correct the solution if false: from sol 1",
        "piqa/Correct the solution if false: from sol 2",
    }  # fmt: skip
    entries = [json.loads(line) for line in (path / "templates.jsonl").read_text(encoding="utf-8").splitlines()]
    for labelled_set in sets:
        field = "verse_text" if labelled_set.name == "poem_sentiment" else "text"
        for template in read_templates(path, keys[labelled_set.name]):
            entry = next(e for e in entries if (e["key"], e["name"]) == (template.key, template.name))
            for row in labelled_set.rows[:8]:
                row = {field if name == "text" else name: value for name, value in row.items()}
                row["label"] = row.pop("label_id")
                example, expected = render(template, row), by_the_book(entry, row)
                assert ([example.input, example.output] if example else [""]) == (expected if all(expected) else [""])


def test_all_of_p3_compiles(real_data):
    """Every template can be read in the sandbox, whatever its data set is."""
    lines = (real_data / "p3_templates" / "templates.jsonl").read_text(encoding="utf-8").splitlines()
    needs = [missing_fields(Template(e["name"], e["key"], e["jinja"], e["answer_choices"]), ()) for e in map(json.loads, lines)]
    assert len(needs) == 2085 and all(needs)
