"""Refining: prefixes are tuned on their own examples, and what is held back decides."""

import dataclasses

import pytest
import torch
from conftest import tiny_base, trained_hypernetwork
from hypothesis import given
from hypothesis import strategies as st

from hyperllama.data.chunking import Chunking
from hyperllama.data.episode import Example, Task
from hyperllama.data.packing import pack_gist
from hyperllama.data.text import EncodedEpisode, Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.hypernetworks.loading import untrained
from hyperllama.inference.many import compress_into, fitting, shown_of
from hyperllama.inference.reader import Reader
from hyperllama.inference.scoring import Question
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.store import PrefixStore
from hyperllama.tuning.prefix_tuner import PrefixTuner
from hyperllama.tuning.refining import ONE_PART_FROM, PARTS, Refiner, clearly_less, held_back_parts

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen")
# Every output is "a" or "b" alone, so that a few steps of tuning teach them; and one whose answers nothing can tell.
TASKS = [
    Task("a", "", (), tuple(Example(word, "a") for word in NUMBERS)),
    Task("few", "", (), tuple(Example(word, "b") for word in NUMBERS[:4])),
    Task("one", "", (), (Example("one", "a"),)),
    Task("told", "say b", (), ()),
]


@pytest.fixture(scope="module")
def setting():
    tokenizer = train_tokenizer(["a b say . " + " ".join(NUMBERS)], kind="words", vocab_size=0)
    text_format = TextFormat(instruction="{instruction} .", query=" {input}", answer=" {output} .", separator="")
    base = tiny_base()
    return base, Reader(base, tokenizer), Encoder(tokenizer, text_format, Limits())


def refiner(setting, maker=None, **settings):
    base, reader, encoder = setting
    maker = maker or trained_hypernetwork(base, tokenizer=reader.tokenizer)
    return Refiner(maker, reader, encoder, **{"steps": 8, "learning_rate": 0.1, **settings})


def made(setting, refine, tasks=TASKS):
    _, _, encoder = setting
    shown = [fitting(shown_of(task), refine.maker, encoder, "a-run", refine) for task in tasks]
    contexts, manifests = zip(*shown, strict=True)
    return refine.compress(contexts, manifests)


def cost(setting, prefix, examples):
    _, reader, encoder = setting
    asked = [Question(tuple(encoder.prompt(e.input)), (tuple(encoder.answer(e.output)),), prefix) for e in examples]
    return -sum(score for (score,) in reader.score(asked)) / len(asked)


def test_examples_are_learned_and_the_manifest_says_how(setting):
    refine = refiner(setting)
    prefixes = dict(zip([task.name for task in TASKS], made(setting, refine), strict=True))
    plain = dict(zip(prefixes, refine.maker.compress([c for c, _ in contexts(setting, refine)]), strict=True))
    for name, held_back in (("a", 3), ("few", 4)):
        manifest, examples = prefixes[name].manifest, next(task for task in TASKS if task.name == name).examples
        assert manifest.refined == refine.settings and manifest.metrics["held_back"] == held_back
        assert manifest.metrics["refined_steps"] in (2, 4, 6, 8) and not manifest.elastic
        assert manifest.metrics["loss_refined"] < manifest.metrics["loss_unrefined"]
        assert cost(setting, prefixes[name], examples) < 0.7 * cost(setting, plain[name], examples)
    for name in ("one", "told"):
        assert prefixes[name] == Prefix(plain[name].keys, plain[name].values, prefixes[name].manifest)
        assert prefixes[name].manifest.metrics == {"refined_steps": 0, "held_back": 0, "tuned_on": [0, 0]}


def contexts(setting, refine):
    return [fitting(shown_of(task), refine.maker, setting[2], "a-run", refine) for task in TASKS]


def test_tasks_that_are_tuned_together_become_what_each_becomes_alone(setting):
    refine = refiner(setting)
    together = made(setting, refine, TASKS[:2])
    alone = [made(setting, refine, [task])[0] for task in TASKS[:2]]
    for a, b in zip(together, alone, strict=True):
        (told, counted), (same, too) = (({**p.manifest.metrics}, p.manifest.metrics["tuned_on"]) for p in (a, b))
        assert told.pop("tuned_on") == same.pop("tuned_on") == counted == too and counted[0] > 0
        assert told == pytest.approx(same, rel=1e-3)
        for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
            torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


def test_what_is_too_long_for_a_pass_is_tuned_on_fewer_examples_a_step(setting):
    refine = refiner(setting, steps=3, batch_tokens=40)
    prefixes = made(setting, refine, TASKS[:2])
    tokens = [p.manifest.metrics["tuned_on"][0] for p in prefixes]
    (whole,) = made(setting, refiner(setting, steps=3), TASKS[:1])
    assert all(0 < n <= 3 * 40 for n in tokens) and tokens[0] < whole.manifest.metrics["tuned_on"][0]


def test_it_is_plain_prefix_tuning_of_what_was_made(setting):
    """By hand: Adam on the prefix of all examples, stopped where the manifest says."""
    base, reader, encoder = setting
    refine = refiner(setting, steps=4, looks=1)
    task = TASKS[1]
    (found,) = made(setting, refine, [task])
    (context, _), (start,) = contexts(setting, refine)[1], refine.maker.compress([contexts(setting, refine)[1][0]])
    assert list(context.examples) == list(task.examples)
    tuner = PrefixTuner(base, {"t": start}, tokenizer=reader.tokenizer)
    optimizer = torch.optim.Adam(tuner.trainable().values(), lr=refine.learning_rate)
    queries = tuple((tuple(encoder.prompt(e.input)), tuple(encoder.answer(e.output))) for e in task.examples)
    for _ in range(4):
        optimizer.zero_grad()
        tuner(pack_gist([EncodedEpisode((), queries, task="t")], tuner.rows)).mean.backward()
        optimizer.step()
    assert found.manifest.metrics["refined_steps"] == 4
    for a, b in zip((*found.keys, *found.values), (*tuner.prefixes()["t"].keys, *tuner.prefixes()["t"].values), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_what_held_back_examples_do_not_like_is_not_kept(setting):
    """Answers that nothing can tell are learned by heart: examples cost less, others more, and the start is kept."""
    guesses = Task("guesses", "", (), tuple(Example(word, "ab"[i * 5 % 7 % 2]) for i, word in enumerate(NUMBERS[:4])))
    refine = refiner(setting, steps=40, learning_rate=0.3)
    (found,) = made(setting, refine, [guesses])
    if found.manifest.metrics["refined_steps"] == 0:
        (start,) = refine.maker.compress([setting[2].context("", guesses.examples)[0]])
        assert (
            found.keys[0].equal(start.keys[0])
            and found.manifest.metrics["loss_refined"] == found.manifest.metrics["loss_unrefined"]
        )
    assert found.manifest.metrics["loss_refined"] <= found.manifest.metrics["loss_unrefined"]


def test_a_hypernetwork_of_chunks_is_refined_though_its_prefixes_differ_in_rows(setting):
    base, reader, _ = setting
    chunked = trained_hypernetwork(base, tokenizer=reader.tokenizer, chunking=Chunking("parallel", 12))
    prefixes = made(setting, refiner(setting, chunked), TASKS[:2])
    assert prefixes[0].rows > prefixes[1].rows and all(p.manifest.metrics["refined_steps"] for p in prefixes)


def test_rows_of_a_base_are_refined_without_any_hypernetwork(setting):
    base, reader, _ = setting
    prefixes = made(setting, refiner(setting, untrained(base, 6, reader.tokenizer)), TASKS[:2])
    assert [p.rows for p in prefixes] == [6, 6] and all(p.manifest.metrics["refined_steps"] for p in prefixes)


def test_a_store_resumes_and_keeps_refined_prefixes_apart(setting, tmp_path):
    _, _, encoder = setting
    refine = refiner(setting, steps=2)
    store, plain = PrefixStore(tmp_path / "store"), {"run": "a-run", "progress": lambda line: None}
    first = compress_into(store, refine.maker, encoder, TASKS[:1], maker=refine, **plain)
    both = compress_into(store, refine.maker, encoder, TASKS[:2], maker=refine, **plain)
    assert (first.made, both.made, both.there) == (1, 1, 1)
    other = dataclasses.replace(refine, steps=4)
    assert compress_into(store, refine.maker, encoder, TASKS[:2], maker=other, **plain).made == 2
    assert compress_into(store, refine.maker, encoder, TASKS[:2], **plain).made == 2
    assert len(store) == 6 and store.check() == []


@given(st.integers(0, 40))
def test_what_is_held_back(examples):
    parts = held_back_parts(examples, seed="s")
    everything = [i for part in parts for i in part]
    assert len(set(everything)) == len(everything) and all(len(part) < examples for part in parts)
    if examples >= ONE_PART_FROM:
        assert len(parts) == 1 and len(everything) == examples // 4
    elif examples >= 2:
        assert sorted(everything) == list(range(examples)) and len(parts) == min(PARTS, examples)
    else:
        assert parts == []


def test_a_fall_within_chance_is_none():
    assert clearly_less([1.0, 1.0, 1.0], [2.0, 2.1, 1.9])
    assert not clearly_less([1.0, 1.0, 1.0], [1.1, 0.8, 1.2]) and not clearly_less([1.0], [1.0])


def test_a_manifest_without_the_field_is_read():
    manifest = Manifest(base=tiny_identity())
    assert manifest.refined == {} and Manifest.from_json(manifest.to_json().replace('"refined":{},', "")) == manifest


def tiny_identity():
    from hyperllama.base.fingerprints import identify

    return identify(tiny_base())
