"""A prefix's report on itself, against the obvious way to compute it."""

import pytest
import torch
from conftest import tiny_base, trained_hypernetwork

from hyperllama.base.decoder import cache_argument
from hyperllama.data.episode import Example
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError
from hyperllama.inference.quality import fewest_gists, leave_one_out, verdict
from hyperllama.inference.reader import Reader


@pytest.fixture(scope="module")
def setting():
    tokenizer = train_tokenizer(["one two three four five six a b"], kind="words", vocab_size=0)
    text_format = TextFormat(query=" {input}", answer=" {output} .", separator="", end_token=False)
    base = tiny_base()
    return (
        trained_hypernetwork(base, tokenizer=tokenizer, elastic=True),
        Reader(base, tokenizer),
        Encoder(tokenizer, text_format, Limits()),
    )


DEMONSTRATIONS = [Example(word, "ab"[i % 2]) for i, word in enumerate(["one", "two", "three", "four", "five", "six"])]


def test_each_figure_is_what_it_is_called(setting):
    hypernetwork, reader, encoder = setting
    found = leave_one_out(hypernetwork, reader, encoder, "", DEMONSTRATIONS)
    assert found["held_back"] == 6
    model, sums = reader.model, dict.fromkeys(found, 0.0)
    for i, example in enumerate(DEMONSTRATIONS):
        context, _ = encoder.context("", [*DEMONSTRATIONS[:i], *DEMONSTRATIONS[i + 1 :]])
        prompt, answer = encoder.prompt(example.input), encoder.answer(example.output)
        (prefix,) = hypernetwork.compress([context])

        def likely(before, after, cache=None):
            ids = torch.tensor([[*before, *prompt, *after[:-1]]])  # noqa: B023
            with torch.no_grad():
                logits = model(ids, **({} if cache is None else cache_argument(model, cache.to_cache()))).logits[0]
            return logits[-len(after) :].log_softmax(-1)

        places = {"full_context": (context, None), "prefix": ([], prefix), "no_context": (encoder.start, None)}
        whole = likely(context, answer)
        for name, (before, cache) in places.items():
            rows = likely(before, answer, cache)
            sums[f"loss_{name}"] -= sum(rows[j, token].item() for j, token in enumerate(answer)) / 12
            if name != "full_context":
                sums[f"kl_{name}"] += (whole.exp() * (whole - rows)).sum().item() / 12
            other = encoder.answer("ba"[i % 2])
            scores = [sum(likely(before, a, cache)[j, t].item() for j, t in enumerate(a)) for a in (answer, other)]
            sums[f"accuracy_{name}"] += (scores[0] >= scores[1]) / 6
    sums["held_back"] = 6
    assert found == pytest.approx(sums, abs=1e-4)


def test_only_so_many_are_held_back(setting):
    assert leave_one_out(*setting, "", DEMONSTRATIONS, most=2)["held_back"] == 2
    with pytest.raises(UserError, match="needs another to compress; give at least two examples"):
        leave_one_out(*setting, "", DEMONSTRATIONS[:1])


def test_outputs_that_never_recur_are_no_choices(setting):
    found = leave_one_out(*setting, "", [Example(word, word) for word in ("one", "two", "three")])
    assert not any(name.startswith("accuracy") for name in found)


def test_a_prefix_that_does_not_help_says_so():
    losses = {"loss_prefix": 2.0, "loss_no_context": 1.5, "loss_full_context": 1.0}
    assert verdict(losses).startswith("this prefix does not help: 2.000 nats per token on held-back examples, 1.500 without")
    assert verdict({**losses, "loss_prefix": 1.2}) is None


def test_the_fewest_gists_within_a_budget(setting):
    hypernetwork, reader, encoder = setting
    losses = [leave_one_out(*setting, "", DEMONSTRATIONS, gists=g)["loss_prefix"] for g in (1, 2, 3)]
    for i, (gists, loss) in enumerate(zip((1, 2, 3), losses)):
        found = fewest_gists(*setting, "", DEMONSTRATIONS, budget=max(0.0, loss - losses[2]) + 1e-6)
        first = next(g for g, other in zip((1, 2, 3), losses) if other <= max(losses[2], loss) + 1e-6)
        assert found == first <= gists, i
    assert fewest_gists(*setting, "", DEMONSTRATIONS, budget=100) == 1
