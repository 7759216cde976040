"""Likelihoods: packed scores are those of one plain pass a continuation, and pooled prefixes are what they are called."""

import pytest
import torch
from conftest import tiny_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_masks import rotate
from hyperllama.base.decoder import inverse_frequencies
from hyperllama.errors import UserError
from hyperllama.inference.scoring import Question, continuation_scores
from hyperllama.prefixes.capture import encode_whole
from hyperllama.prefixes.rows import last_rows, mean_pooled

TOKENS = st.lists(st.integers(3, 96), min_size=1, max_size=6).map(tuple)


def plain(model, context, prompt, continuation) -> float:
    """One ordinary forward pass over everything."""
    ids = torch.tensor([[*context, *prompt, *continuation]])
    with torch.no_grad():
        likely = model(ids).logits[0].log_softmax(-1)
    start = len(context) + len(prompt) - 1
    return sum(likely[start + i, token].item() for i, token in enumerate(continuation))


def test_packed_scores_are_those_of_plain_passes(base):
    contexts = [tuple(range(3, 15)), (7, 8), (40, 41, 42, 43)]
    prefixes = encode_whole(base, contexts)
    asked = [
        (0, (5, 6), ((9,), (10, 11, 12), (13, 14))),
        (2, (20,), ((21, 22),)),
        (0, (5, 6, 7), ((9, 9), (8,))),
        (None, (5, 6), ((9,), (9, 10))),
        (1, (30, 31), ((32,), (33,), (34,), (35,))),
    ]
    questions = [Question(prompt, answers, None if c is None else prefixes[c]) for c, prompt, answers in asked]
    expected = [[plain(base, () if c is None else contexts[c], p, a) for a in answers] for c, p, answers in asked]
    for batch_tokens in (4, 30, 8192):
        scores = continuation_scores(base, questions, batch_tokens=batch_tokens)
        for found, wanted in zip(scores, expected, strict=True):
            assert [answer.likelihood for answer in found] == pytest.approx(wanted, abs=2e-4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contexts=st.lists(TOKENS, min_size=1, max_size=3),
    asked=st.lists(st.tuples(st.integers(0, 2), TOKENS, st.lists(TOKENS, min_size=1, max_size=3)), min_size=1, max_size=4),
)
def test_any_packing_scores_alike(contexts, asked):
    model = tiny_base()
    prefixes = encode_whole(model, contexts)
    questions = [Question(p, tuple(answers), prefixes[c % len(prefixes)]) for c, p, answers in asked]
    expected = [[plain(model, contexts[c % len(contexts)], p, a) for a in answers] for c, p, answers in asked]
    for found, wanted in zip(continuation_scores(model, questions, batch_tokens=25), expected, strict=True):
        assert [answer.likelihood for answer in found] == pytest.approx(wanted, abs=2e-4)


def test_an_answer_is_greedy_if_greedy_decoding_writes_it():
    model, contexts, prompts = tiny_base(), [[3, 4, 5], [9, 8]], [(5, 6), (7,)]
    prefixes, written = encode_whole(model, contexts), []
    for context, prompt in zip(contexts, prompts):
        ids = [*context, *prompt]
        for _ in range(4):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        written.append(tuple(ids[-4:]))
    questions = []
    for prompt, prefix, (*start, last) in zip(prompts, prefixes, written):
        answers = ((*start, last), tuple(start), (*start, (last + 1) % 40), ((start[0] + 1) % 40, *start[1:], last))
        questions.append(Question(prompt, answers, prefix))
    found = continuation_scores(model, questions, batch_tokens=12)
    assert [[answer.greedy for answer in of_one] for of_one in found] == [[True, True, False, False]] * 2


def test_choices_share_their_prompt_and_queries_their_prefix(monkeypatch):
    """Four choices of one token cost the rows of one, and a prefix stands in the row once."""
    from hyperllama.inference import scoring as inference_scoring

    rows = []
    layout = inference_scoring.GistLayout
    monkeypatch.setattr(
        inference_scoring, "GistLayout", lambda segments: rows.append(sum(s.tokens for s in segments)) or layout(segments)
    )
    model = tiny_base()
    (prefix,) = encode_whole(model, [tuple(range(3, 33))])
    questions = [Question((5, 6, 7), ((9,), (10,), (11, 12), (13,)), prefix) for _ in range(5)]
    continuation_scores(model, questions)
    assert rows == [30 + 5 * (3 + 1)]


def test_empty_questions_are_refused():
    for question in (Question((), ((3,),)), Question((3,), ()), Question((3,), ((),))):
        with pytest.raises(UserError, match="none may be empty"):
            continuation_scores(tiny_base(), [question])


def test_pooling_and_cutting(base):
    inv_freq = inverse_frequencies(base)
    (prefix,) = encode_whole(base, [tuple(range(3, 13))])
    last, pooled = last_rows(prefix, 4, inv_freq), mean_pooled(prefix, 4, inv_freq)
    assert (last.rows, pooled.rows) == (4, 4)
    for layer in range(prefix.layers):
        kept = torch.tensor([0, 7, 8, 9])  # the first, where attention rests, and the last three
        assert torch.equal(last.values[layer], prefix.values[layer][:, kept])
        moved = rotate(last.keys[layer], kept - torch.arange(4), inv_freq)
        assert torch.allclose(moved, prefix.keys[layer][:, kept], atol=1e-5)
        upright = rotate(prefix.keys[layer], -torch.arange(10), inv_freq)
        found = pooled.values[layer], rotate(pooled.keys[layer], -torch.arange(4), inv_freq)
        for own, rows in zip(found, (prefix.values[layer], upright)):
            means = [rows[:, :1], rows[:, 1:].unflatten(1, (3, 3)).mean(2)]  # the first row is nobody's neighbour
            assert torch.allclose(own, torch.cat(means, 1), atol=1e-5)
    assert last_rows(prefix, 10, inv_freq) is prefix and mean_pooled(prefix, 12, inv_freq) is prefix
    (uneven,) = encode_whole(base, [tuple(range(3, 10))])
    assert torch.allclose(mean_pooled(uneven, 1, inv_freq).values[0], uneven.values[0].mean(1, keepdim=True), atol=1e-6)
