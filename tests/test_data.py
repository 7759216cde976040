"""Data: sources, the text format and its limits, packing, and streams by index."""

import json
from collections import Counter
from random import Random

import pytest
from data_files import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyperllama.data.episode import Episode, Example, Task, TaskSource
from hyperllama.data.json_lines import read_examples, read_json_lines_tasks
from hyperllama.data.packing import pack_full, pack_gist
from hyperllama.data.sni import read_inputs, read_sni, read_sni_task, read_task
from hyperllama.data.stream import EpisodeStream
from hyperllama.data.synthetic import SyntheticLanguage, SyntheticSource
from hyperllama.data.text import EncodedEpisode, Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Input: a few words\nOutput: as they come"], kind="bytes", vocab_size=300)


def sni_task(**changes) -> dict:
    task = {
        "Definition": ["Say the colour."],
        "Positive Examples": [{"input": "grass", "output": "green", "explanation": "it is"}],
        "Instances": [
            {"id": "1", "input": "sky", "output": ["blue", "light blue"]},
            {"id": "2", "input": "coal", "output": ["black"]},
        ],
    }
    return {**task, **changes}


def test_sni_task(tmp_path):
    task = read_task(write(tmp_path / "task1_colour.json", sni_task()))
    assert (task.name, task.instruction) == ("task1_colour", "Say the colour.")
    assert task.demonstrations == (Example("grass", "green", ("green",)),)
    assert task.examples[0] == Example("sky", "blue", ("blue", "light blue"))
    assert task.examples[0].accepts(" light blue ") and not task.examples[0].accepts("green")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"definition": "x"}, "not an S-NI task file, it has no Instances"),
        ([1], "not an S-NI task file"),
        (sni_task(Instances=[{"input": "x"}]), r'Instances 0: needs "output"'),
        (sni_task(Instances=[{"output": "x"}]), r'Instances 0: needs "input"'),
        (sni_task(**{"Positive Examples": [3]}), r'Positive Examples 0: needs "input"'),
        (sni_task(Instances={"a": 1}), "Instances must be a list"),
        ('{"Instances": [\n{]}', "t.json, line 2: not JSON"),
    ],
)
def test_bad_sni_files_are_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read_sni_task(write(tmp_path / "t.json", content))
    assert str(tmp_path / "t.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "has no examples"),
        ("\n \n", "has no examples"),
        ('{"input": "a", "output": "b"}\nnot json\n', "line 2: not JSON"),
        ('{"input": "a", "output": "b"}\n\n{"input": "a"}\n', r'line 3: needs "output"'),
        ('["a"]', r'line 1: needs "input"'),
        ('{"input": "a", "output": []}', r'line 1: needs "output"'),
        ('{"input": "a", "output": 3}', r'line 1: needs "output"'),
    ],
)
def test_bad_json_lines_are_named_with_their_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read_examples(write(tmp_path / "e.jsonl", content))
    assert str(tmp_path / "e.jsonl") in str(caught.value)


def test_binary_and_missing_files_are_named(tmp_path):
    (tmp_path / "e.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="e.jsonl: text in UTF-16; expected JSON lines of .*; save it as UTF-8"):
        read_task(tmp_path / "e.jsonl")
    with pytest.raises(UserError, match=r"x.jsonl: no such file; expected examples as JSON lines"):
        read_task(tmp_path / "x.jsonl")


def test_inputs_need_no_outputs(tmp_path):
    path = write(tmp_path / "e.jsonl", '{"input": "a"}\n{"input": "b", "output": "c"}')
    assert [(e.references, rest) for _, e, rest in read_inputs(path)] == [((), {}), (("c",), {})]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
def test_json_lines_round_trip_any_text(tmp_path, pairs):
    lines = "\n".join(json.dumps({"input": i, "output": o}) for i, o in pairs)
    examples = read_examples(write(tmp_path / "e.jsonl", lines))
    assert [(e.input, e.output) for e in examples] == pairs


def test_sni_folder_takes_the_listed_tasks_that_are_there(tmp_path):
    for name in ("task1", "task2", "task3"):
        write(tmp_path / "tasks" / f"{name}.json", sni_task())
    write(tmp_path / "splits" / "default" / "train_tasks.txt", "task1\ntask3\ntask9\n")
    source = read_sni(str(tmp_path), split="train", splits="splits/default", instances=1)
    assert [(t.name, len(t.examples)) for t in source.tasks] == [("task1", 1), ("task3", 1)]
    with pytest.raises(UserError, match="test_tasks.txt is not there; choose a list below"):
        read_sni(str(tmp_path), split="test", splits="splits/default", instances=1)
    write(tmp_path / "splits" / "default" / "test_tasks.txt", "task8\n")
    with pytest.raises(UserError, match="none of the 1 tasks"):
        read_sni(str(tmp_path), split="test", splits="splits/default", instances=1)
    with pytest.raises(UserError, match="has no folder tasks; give a clone of natural-instructions"):
        read_sni(str(tmp_path / "tasks"), split="test", splits="splits/default", instances=1)


def test_a_folder_of_json_lines_is_a_task_a_file(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", '{"input": "a", "output": "b"}')
    assert [t.name for t in read_json_lines_tasks(str(tmp_path), instances=9).tasks] == ["a", "b"]
    with pytest.raises(UserError, match="neither a .jsonl file nor a folder with some"):
        read_json_lines_tasks(str(tmp_path / "missing"), instances=9)


def test_an_episode_never_shows_what_it_asks():
    task = Task("t", "", (Example("d", "d"),), tuple(Example(str(i), str(i)) for i in range(9)))
    for seed in range(50):
        episode = TaskSource([task]).draw(Random(seed), 6, 3, 0)
        shown, asked = {e.input for e in episode.demonstrations}, {e.input for e in episode.queries}
        assert len(shown) == 6 and len(asked) == 3 and not shown & asked and "d" not in asked
    small = TaskSource([Task("t", "", (), task.examples[:2])]).draw(Random(0), 6, 3, 0)
    assert (len(small.queries), len(small.demonstrations)) == (2, 0)


class TestTextFormat:
    def test_pieces_are_tokenised_alike_in_context_and_query(self, tokenizer):
        encoder = Encoder(tokenizer, TextFormat(), Limits())
        context, spans = encoder.context("Do it.", [Example("one", "1"), Example("two", "2")])
        text = "<s>Do it.\n\nInput: one\nOutput: 1\n\nInput: two\nOutput: 2\n\n"
        assert tokenizer.decode(context) == text
        assert [tokenizer.decode(context[a:b]) for a, b in spans] == [" 1\n\n", " 2\n\n"]
        prompt, answer = encoder.prompt("two"), encoder.answer("2")
        start = spans[1][0] - len(prompt)
        assert context[start : start + len(prompt) + len(answer)] == prompt + answer, "an answer ends as demonstrations show"
        told = Encoder(tokenizer, TextFormat(end_token=True), Limits())
        assert told.answer("2") == [
            *answer[: -len(tokenizer("\n\n", add_special_tokens=False)["input_ids"])],
            tokenizer.eos_token_id,
        ]
        assert told.context("Do it.", [Example("one", "1"), Example("two", "2")])[0] == context

    def test_an_answer_is_what_stands_before_the_separator(self, tokenizer):
        encoder = Encoder(tokenizer, TextFormat(), Limits())
        for generated in ("2\n\nInput: three", " 2 \n\n", "2"):
            ids = tokenizer(generated, add_special_tokens=False)["input_ids"]
            assert encoder.answer_of(ids) == "2" and encoder.answer_of([*ids, tokenizer.eos_token_id]) == "2"
        without = Encoder(tokenizer, TextFormat(separator="", answer_tokens=1), Limits())
        assert without.answer("2") == tokenizer(" 2", add_special_tokens=False)["input_ids"] and without.answer_of(ids) == "2"

    def test_braces_in_data_are_data(self, tokenizer):
        encoder = Encoder(tokenizer, TextFormat(), Limits())
        assert tokenizer.decode(encoder.prompt("{output} {0} {")) == "Input: {output} {0} {\nOutput:"

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"query": "Q"}, "format.query: must use {input} and no other field, not 'Q'"),
            ({"answer": "{input}"}, "format.answer: must use {output}"),
            ({"instruction": "{instruction} {x}"}, "format.instruction: must use {instruction}"),
            ({"query": "{input}", "answer": "{output}"}, "format.answer: runs into the input before it"),
            ({"query": "{input}", "answer": " {output}", "separator": ""}, "format.query: runs into the answer before it"),
            ({"query": "{input"}, "format.query: not a template"),
        ],
    )
    def test_templates_are_checked(self, changes, message):
        (problem,) = TextFormat(**changes).problems()
        assert message in problem

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(lengths=st.lists(st.integers(0, 60), max_size=8), limit=st.integers(1, 200))
    def test_whole_demonstrations_are_dropped_and_counted(self, tokenizer, lengths, limit):
        encoder = Encoder(tokenizer, TextFormat(), Limits(context_tokens=limit))
        demonstrations = tuple(Example("x" * n, str(i)) for i, n in enumerate(lengths))
        encoded = encoder.encode(Episode("", demonstrations, (Example("a", "b"),)))
        assert len(encoded.context) <= limit
        assert encoded.demonstrations + encoded.dropped_demonstrations == len(lengths)
        text = tokenizer.decode(encoded.context).removeprefix("<s>")
        kept = [e for e in demonstrations if f"Input: {e.input}\nOutput: {e.output}\n\n" in text]
        assert (
            text == "".join(f"Input: {e.input}\nOutput: {e.output}\n\n" for e in kept) and len(kept) == encoded.demonstrations
        )

    def test_a_long_query_is_an_error_or_a_counted_skip(self, tokenizer):
        episode = Episode("", (), (Example("x" * 50, "y"), Example("x", "y")), task="t")
        with pytest.raises(
            UserError, match=r"task t: a query takes \d+ tokens, more than limits.query_tokens=20: raise it, or set"
        ):
            Encoder(tokenizer, TextFormat(), Limits(query_tokens=20)).encode(episode)
        encoded = Encoder(tokenizer, TextFormat(), Limits(query_tokens=20, too_long_query="skip")).encode(episode)
        assert (len(encoded.queries), encoded.skipped_queries) == (1, 1)

    def test_a_long_instruction_is_an_error(self, tokenizer):
        with pytest.raises(UserError, match="an instruction takes .* more than limits.context_tokens=10"):
            Encoder(tokenizer, TextFormat(), Limits(context_tokens=10)).context("x" * 50, [])


class TestPacking:
    EPISODES = [EncodedEpisode((5, 6, 7), (((8, 9), (10, 11)), ((12,), (13,)))), EncodedEpisode((5,), (((6,), (7, 8, 9)),))]

    @pytest.mark.parametrize("pack", [lambda e: pack_gist(e, 2), pack_full], ids=["gist", "full"])
    def test_each_target_follows_its_row(self, pack):
        batch = pack(self.EPISODES)
        ids = [*batch.ids[0].tolist(), None]
        starts = {*batch.layout.row_starts, batch.tokens}
        last = {start - 1 for start in starts}  # an answer's last token is predicted, never read
        for row, target in zip(batch.target_rows.tolist(), batch.targets.tolist()):
            assert row in last or ids[row + 1] == target
        assert sorted(batch.targets.tolist()) == [7, 8, 9, 10, 11, 13]
        assert batch.tokens == batch.ids.shape[1] == batch.layout.tokens

    def test_teacher_forcing_rows(self):
        batch = pack_full(self.EPISODES[1:])
        assert batch.ids.tolist() == [[5, 6, 7, 8]]
        assert list(zip(batch.target_rows.tolist(), batch.targets.tolist())) == [(1, 7), (2, 8), (3, 9)]

    def test_compress_region_first_and_every_query_reads_its_context(self):
        batch = pack_gist(self.EPISODES, 2)
        readers = [s for s in batch.layout.segments if not s.gists]
        assert batch.layout.compress_rows == 3 + 1 + 2 * 2 and len(readers) == 3
        for segment, start in zip(batch.layout.segments, batch.layout.row_starts):
            if segment.reads:
                (context,) = segment.reads
                first = batch.ids[0, batch.layout.row_starts[context]].item()
                size = batch.layout.segments[context].tokens
                # The first episode has the longer context; its prompts start with 8 and 12, the second's with 6.
                assert first == 5 and (size == 5) == (batch.ids[0, start].item() in (8, 12))

    def test_counts_add_up(self):
        episodes = [EncodedEpisode((5,), (((6,), (7,)),), demonstrations=3, dropped_demonstrations=2, skipped_queries=1)] * 2
        batch = pack_gist(episodes, 1)
        assert (batch.demonstrations, batch.dropped_demonstrations, batch.skipped_queries) == (6, 4, 2)


class TestSynthetic:
    def test_a_query_is_an_unshown_word_of_a_shown_category(self):
        source = SyntheticSource(SyntheticLanguage())
        for seed in range(30):
            episode = source.task(Random(seed), 16, 4)
            shown = {e.input: e.output for e in episode.demonstrations}
            assert Counter(Counter(shown.values()).values()) == {4: 4}
            for query in episode.queries:
                (category,) = [c for c in source.categories if query.input in c]
                assert query.input not in shown and {shown[w] for w in category if w in shown} == {query.output}

    def test_test_tasks_have_category_sets_that_training_never_has(self):
        train, test = (SyntheticSource(SyntheticLanguage(split=split)) for split in ("train", "test"))
        seen = {train.task(Random(i), 4, 1).task for i in range(3000)}
        held_out = {test.task(Random(i), 4, 1).task for i in range(300)}
        assert len(held_out) > 50 and not seen & held_out

    def test_warm_up_mixes_kinds_and_ends(self):
        source = SyntheticSource(SyntheticLanguage(repeats=0.4, warmup_episodes=1000, lists=0.33))
        early = Counter(source.draw(Random(i), 16, 1, i).task.split()[0] for i in range(1000))
        late = Counter(source.draw(Random(i), 16, 1, 1000 + i).task.split()[0] for i in range(1000))
        assert 330 < early["repeat"] < 470 and 150 < early["list"] < 250 and late["repeat"] == 0 and 270 < late["list"] < 390

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"task_categories": 40}, "at most categories and symbols"),
            ({"categories": 4}, "fewer than 100 sets"),
            ({"words_per_category": 1}, "at least 2"),
            ({"repeats": 1.7}, "shares between 0 and 1"),
        ],
    )
    def test_impossible_languages_are_refused(self, changes, message):
        with pytest.raises(UserError, match=f"data.synthetic: .*{message}"):
            SyntheticSource(SyntheticLanguage(**changes))


class TestStream:
    def stream(self, tokenizer, **changes):
        settings = {"seed": 1, "length": 20, "shots": 8, "min_shots": 0, "queries": 2}
        source = TaskSource([Task("t", "", (), tuple(Example("x" * i, str(i)) for i in range(40)))])
        limits = changes.pop("limits", Limits(query_tokens=60, too_long_query="skip"))
        return EpisodeStream(source, Encoder(tokenizer, TextFormat(), limits), **{**settings, **changes})

    def test_an_episode_depends_on_seed_and_index_alone(self, tokenizer):
        a, b = self.stream(tokenizer), self.stream(tokenizer)
        assert [b[i] for i in reversed(range(20))] == [a[i] for i in range(20)][::-1]
        assert a[3] != a[4] and a[3] != self.stream(tokenizer, seed=2)[3] and len(a) == 20

    def test_shots_vary_within_bounds(self, tokenizer):
        shown = {self.stream(tokenizer, limits=Limits())[i].demonstrations for i in range(20)}
        assert min(shown) >= 0 and max(shown) <= 8 and len(shown) > 3

    def test_episodes_without_a_query_that_fits_are_drawn_again_and_counted(self, tokenizer):
        items = [
            self.stream(tokenizer, queries=1, length=40, limits=Limits(query_tokens=30, too_long_query="skip"))[i]
            for i in range(40)
        ]
        assert all(item.queries for item in items) and sum(item.skipped_queries for item in items) > 5
        with pytest.raises(UserError, match="query_tokens=2, .*of 100 episodes in a row no query fits"):
            self.stream(tokenizer, limits=Limits(query_tokens=2, too_long_query="skip"))[0]

    def test_episodes_of_whose_demonstrations_none_fits_are_drawn_again_and_counted(self, tokenizer):
        tight = {"shots": 1, "length": 40, "limits": Limits(context_tokens=34, query_tokens=60)}
        items = [self.stream(tokenizer, min_shots=1, **tight)[i] for i in range(40)]
        assert {item.demonstrations for item in items} == {1} and sum(item.dropped_demonstrations for item in items) > 5
        without = [self.stream(tokenizer, **tight)[i].demonstrations for i in range(40)]
        assert 0 in without, "an episode that asks for none is as it was"
        with pytest.raises(UserError, match="context_tokens=3: of 100 episodes in a row .*or no demonstration; raise them"):
            self.stream(tokenizer, min_shots=1, shots=1, limits=Limits(context_tokens=3, query_tokens=60))[0]


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_tokenizers_survive_their_files(tmp_path, kind):
    from hyperllama.base.loading import load_tokenizer

    tokenizer = train_tokenizer(["some words 1 2", "others"], kind=kind, vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("some others")["input_ids"] == tokenizer("some others")["input_ids"] and len(loaded) == len(tokenizer)
    assert loaded.decode(loaded("some others")["input_ids"], skip_special_tokens=True) == "some others"
    assert loaded("some others")["input_ids"][0] == loaded.bos_token_id
    assert None not in (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)


def test_real_sni_reads_and_encodes(real_data):
    source = read_sni(str(real_data / "sni"), split="test", splits="splits/default", instances=100)
    assert len(source.tasks) >= 50 and all(t.instruction and t.demonstrations and t.examples for t in source.tasks)
    tokenizer = train_tokenizer([source.tasks[0].instruction], kind="bytes", vocab_size=300)
    stream = EpisodeStream(
        source, Encoder(tokenizer, TextFormat(), Limits(4096, 2048, "skip")), seed=0, length=30, shots=2, min_shots=2, queries=2
    )
    assert all(stream[i].demonstrations <= 2 and stream[i].queries for i in range(30))
