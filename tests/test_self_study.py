"""Self-study: prefixes are tuned to say what the model says with the whole context, on passages that it makes up."""

import dataclasses

import pytest
import torch
from conftest import tiny_base, trained_hypernetwork

from hyperllama.data.episode import Example, Task
from hyperllama.data.packing import pack_taught
from hyperllama.data.passages import Passages
from hyperllama.data.text import ContextIds, EncodedEpisode, Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.inference.many import fitting, shown_of
from hyperllama.inference.reader import Reader
from hyperllama.inference.scoring import Question, answer_distributions
from hyperllama.tuning.prefix_tuner import PrefixTuner
from hyperllama.tuning.self_study import SelfStudy, made_up

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
SHOWN = Task("shown", "", (), tuple(Example(word, "a") for word in WORDS))
TOLD = Task("told", "say a b . " * 4, (), ())
FEW = Passages(count=12, tokens=6)


@pytest.fixture(scope="module")
def setting():
    tokenizer = train_tokenizer(["a b say . in : " + " ".join(WORDS)], kind="words", vocab_size=0)
    text_format = TextFormat(instruction="{instruction}", query=" in : {input}", answer=" {output}", separator=" .")
    base = tiny_base()
    return base, Reader(base, tokenizer), Encoder(tokenizer, text_format, Limits())


def study(setting, maker=None, **settings):
    base, reader, encoder = setting
    maker = maker or trained_hypernetwork(base, tokenizer=reader.tokenizer)
    return SelfStudy(maker, reader, encoder, **{"steps": 8, "learning_rate": 0.05, "passages": FEW, **settings})


def made(setting, refine, tasks):
    fitted = [fitting(shown_of(task), refine.maker, setting[2], "a-run", refine) for task in tasks]
    contexts, manifests = zip(*fitted, strict=True)
    return contexts, refine.compress(contexts, manifests)


def divergence(setting, prefix, context, passages):
    """Mean nats a token from the model behind the whole context, by its own distributions, without any code of tuning."""
    reader = setting[1]
    (whole,) = reader.encode([context])
    taught, said = (
        torch.cat(list(answer_distributions(reader.model, [dataclasses.replace(q, prefix=p) for q in passages])))
        for p in (whole, prefix)
    )
    return (taught.exp() * (taught - said)).sum(-1).mean().item()


def test_passages_are_queries_behind_demonstrations_and_anything_behind_a_document(setting):
    _, reader, encoder = setting
    contexts = [encoder.context("", SHOWN.examples)[0], encoder.context(TOLD.instruction, ())[0]]
    shown, told = made_up(reader, encoder, contexts, FEW)
    head = tuple(encoder.query_head())
    assert len(head) == 2 and {passage.prompt for passage in shown} == {head}
    assert {len(passage.prompt) for passage in told} == {1} and len({passage.prompt for passage in told}) > 1
    for passages, longest in ((shown, 6), (told, 5)):
        assert 2 < len(passages) <= FEW.count and len(set(passages)) == len(passages)
        assert all(0 < len(passage.continuations[0]) <= longest for passage in passages)
    end = encoder.tokenizer.convert_tokens_to_ids(".")
    assert all(end not in passage.continuations[0][:-1] for passage in shown), "a query ends at the separator"
    assert [shown, told] == made_up(reader, encoder, contexts, FEW) != made_up(reader, encoder, contexts, FEW, seed=1)


def test_a_prefix_comes_nearer_to_the_whole_context_and_says_so(setting):
    refine = study(setting)
    contexts, prefixes = made(setting, refine, [SHOWN, TOLD])
    starts = refine.maker.compress(contexts)
    passages = made_up(setting[1], setting[2], contexts, FEW)
    for context, prefix, start, own in zip(contexts, prefixes, starts, passages, strict=True):
        metrics, held_back = prefix.manifest.metrics, own[: len(own) // 4]
        assert prefix.manifest.refined == refine.settings and metrics["held_back"] == len(held_back)
        assert metrics["refined_steps"] in (2, 4, 6, 8) and metrics["tuned_on"][0] > metrics["tuned_on"][1] > 0
        assert metrics["divergence_unrefined"] == pytest.approx(divergence(setting, start, context, held_back), rel=1e-3)
        assert metrics["divergence_refined"] == pytest.approx(divergence(setting, prefix, context, held_back), rel=1e-3)
        assert metrics["divergence_refined"] < 0.9 * metrics["divergence_unrefined"]


def test_what_makes_nothing_better_is_not_kept(setting):
    refine = study(setting, learning_rate=0.0)
    contexts, (prefix,) = made(setting, refine, [SHOWN])
    (start,) = refine.maker.compress(contexts)
    assert prefix.manifest.metrics["refined_steps"] == 0 and prefix.keys[0].equal(start.keys[0])


def test_a_lesson_has_the_same_targets_behind_the_prefix_and_behind_the_context(setting):
    """And the loss is the divergence that distributions give, contexts of whatever length and order."""
    base, reader, encoder = setting
    contexts = [tuple(encoder.context(TOLD.instruction, ())[0]), tuple(encoder.context("", SHOWN.examples[:2])[0])]
    starts = dict(zip("ab", trained_hypernetwork(base).compress([ContextIds(context) for context in contexts])))
    said = [(((5,), (6, 7)), ((8, 9), (5,))), (((9,), (7, 5, 6)),)]
    batch = pack_taught([EncodedEpisode(c, own, task=n) for n, c, own in zip("ab", contexts, said)], 3)
    assert batch.teacher.targets.equal(batch.targets) and batch.teacher.layout.tokens > batch.layout.tokens
    loss = PrefixTuner(base, starts, tokenizer=reader.tokenizer)(batch)
    asked = [[Question(prompt, (answer,)) for prompt, answer in own] for own in said]
    sums = [
        divergence(setting, starts[n], context, own) * sum(len(q.continuations[0]) for q in own)
        for n, context, own in zip("ab", contexts, asked)
    ]
    assert loss.count == 6 and loss.sum.item() == pytest.approx(sum(sums), rel=1e-4)
