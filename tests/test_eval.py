"""Evaluation: the conditions are what they are called."""

import pytest
from conftest import tiny_base, trained_hypernetwork

from eval.conditions import CONDITIONS, accuracy, answer_all
from eval.quickstart import unseen_tasks
from eval.report import bars
from hyperllama.data.episode import Episode, Example
from hyperllama.data.synthetic import SyntheticLanguage, SyntheticSource
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError
from hyperllama.reader import Reader

LANGUAGE = SyntheticLanguage(categories=12, words_per_category=4, symbols=16, task_categories=3)


@pytest.fixture(scope="module")
def setting():
    tokenizer = train_tokenizer(SyntheticSource(LANGUAGE).texts(), kind="words", vocab_size=0)
    text_format = TextFormat(query="{input}", answer="{output}", separator="", end_token=False, answer_tokens=2)
    hypernetwork = trained_hypernetwork(tiny_base(), tokenizer=tokenizer)
    return hypernetwork, Encoder(tokenizer, text_format, Limits(64, 16)), unseen_tasks(LANGUAGE, 4, 6, 2)


def test_conditions_are_what_they_are_called(setting):
    hypernetwork, encoder, episodes = setting
    answers = answer_all(hypernetwork, encoder, episodes, tasks_per_pass=3)
    assert tuple(answers) == CONDITIONS and all([len(a) for a in answers[name]] == [2] * 4 for name in CONDITIONS)
    reader = Reader(hypernetwork.base, encoder.tokenizer)

    def ask(prompt, prefix=None):
        return encoder.tokenizer.decode(reader.generate([prompt], prefix and [prefix], max_new_tokens=2)[0])

    contexts = [encoder.context("", episode.demonstrations)[0] for episode in episodes]
    for i, episode in enumerate(episodes):
        (own,), (other,) = (hypernetwork.compress([contexts[j % 4]]) for j in (i, i + 1))
        for q, query in enumerate(episode.queries):
            prompt = encoder.prompt(query.input)
            assert answers["prefix"][i][q] == ask(prompt, own)
            assert answers["swapped_prefix"][i][q] == ask(prompt, other)
            assert answers["full_context"][i][q] == ask(contexts[i] + prompt)
            assert answers["no_context"][i][q] == ask(encoder.start + prompt)
    assert answers["prefix"] != answers["swapped_prefix"]


def test_swapping_needs_different_tasks(setting):
    hypernetwork, encoder, episodes = setting
    with pytest.raises(UserError, match="needs neighbouring episodes of different tasks"):
        answer_all(hypernetwork, encoder, episodes[:1])


def test_accuracy_counts_any_reference():
    episode = Episode("", (), (Example("a", "b", ("b", "c")), Example("a", "b")), "t")
    assert accuracy([episode], [["c ", "c"]]) == 0.5


def test_the_picture_is_a_png(tmp_path):
    bars({"no_context": 0.03, "prefix": 0.9, "full_context": 1.0}, tmp_path / "r.png", title="t", chance=0.03)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
