"""The loss in chunks of targets: the same sum and gradients as at once, and never more logits than a chunk's."""

import copy

import pytest
import torch
from conftest import VOCABULARY, tiny_architecture, tiny_base, trained_hypernetwork
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import set_seed

from hyperllama.base.decoder import PLAIN_HEADS, has_plain_head
from hyperllama.base.loading import random_base
from hyperllama.data.packing import pack_full, pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.objectives import losses as objectives_losses
from hyperllama.training.full_attention import FullAttention
from hyperllama.tuning.prefix_tuner import PrefixTuner
from hyperllama.tuning.starts import random_start

ROWS = 3  # of logits in a chunk
EPISODES = [
    EncodedEpisode(tuple(range(5, 25)), (((30, 31), (32, 33, 34)), ((35,), (36, 37, 38, 39))), answers=((3, 9),)),
    EncodedEpisode(tuple(range(40, 49)), (((50, 51, 52), (53,)),), answers=((2, 5),)),
]
OF_LOGITS = (torch.ops.aten._log_softmax.default, torch.ops.aten._log_softmax_backward_data.default)


class Widest(TorchDispatchMode):
    """The most rows that the loss takes, or gives back, at once."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in OF_LOGITS:
            self.rows = max(self.rows, out.numel() // VOCABULARY)
        return out


def step(model, batch, half=False):
    """The loss, its gradients by name, and the most rows of logits at once."""
    model.zero_grad(set_to_none=True)
    with Widest() as widest:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = model(batch)
        loss.sum.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, widest.rows


def both(monkeypatch, model, batch, half=False):
    """A step at once and one in chunks, on the same model."""
    whole = step(model, batch, half)
    monkeypatch.setattr(objectives_losses, "LOGITS", ROWS * VOCABULARY)
    return whole, step(model, batch, half)


def hypernetwork(base):
    return trained_hypernetwork(base), pack_gist(EPISODES, 3)


def full_attention(base):
    return FullAttention(copy.deepcopy(base), None), pack_full(EPISODES, supervise_demonstrations=True)


def tied(base):
    set_seed(0)
    architecture = tiny_architecture(base.config.model_type, tie_word_embeddings=True)
    return full_attention(random_base(architecture, vocab_size=VOCABULARY))


def tuner(base):
    start = random_start(base, [list(range(5, 25))], 3)
    batch = pack_gist([EncodedEpisode((), e.queries, task="one") for e in EPISODES], 3)
    return PrefixTuner(base, {"one": start}), batch


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("kind", [hypernetwork, full_attention, tied, tuner])
def test_chunks_are_the_whole(base, monkeypatch, kind, checkpointing):
    model, batch = kind(base)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    (loss, gradients, rows), (chunked, found, fewer) = both(monkeypatch, model, batch)
    torch.testing.assert_close(chunked.sum, loss.sum, rtol=1e-6, atol=0)
    assert chunked.count == loss.count == len(batch.targets)
    assert found.keys() == gradients.keys() and len(found) >= 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item(), msg=name)
    assert rows == len(batch.targets) and fewer <= ROWS


@pytest.mark.parametrize("kind", [hypernetwork, full_attention])
def test_chunks_are_the_whole_under_autocast(monkeypatch, kind):
    model, batch = kind(tiny_base())
    (loss, gradients, _), (chunked, found, _) = both(monkeypatch, model.train(), batch, half=True)
    torch.testing.assert_close(chunked.sum, loss.sum, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():  # bfloat16's rounding of sums that are added up in another order
        torch.testing.assert_close(found[name], gradient, rtol=0.02, atol=0.02 * gradient.abs().max().item(), msg=name)


def test_chunks_are_as_many_as_needed(monkeypatch):
    monkeypatch.setattr(objectives_losses, "LOGITS", 1000)
    counts = [objectives_losses.head_chunks(rows, 100) for rows in (0, 1, 10, 11, 20, 21)]
    assert counts == [1, 1, 1, 2, 2, 3]
    assert objectives_losses.head_chunks(5, 10_000) == 5, "a row at least"
    batch = pack_gist(EPISODES, 3)
    assert objectives_losses.head_chunks(len(batch.targets), VOCABULARY) == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 100])
def test_every_target_is_in_one_chunk(monkeypatch, rows):
    set_seed(0)
    hidden, weight, targets = torch.randn(8, 6), torch.randn(11, 6), torch.arange(8)
    monkeypatch.setattr(objectives_losses, "LOGITS", rows * 11)
    whole = objectives_losses.answer_cross_entropy(hidden @ weight.T, targets)
    found = objectives_losses.HeadCrossEntropy()(hidden, targets, weight=weight, weights={"answer": 1.0})
    torch.testing.assert_close(found, whole.sum, rtol=1e-6, atol=0)
    with torch.no_grad():
        again = objectives_losses.HeadCrossEntropy()(hidden, targets, weight=weight, weights={"answer": 1.0})
        assert again == found


def test_logits_that_are_more_than_the_heads_are_left_to_the_model(monkeypatch):
    set_seed(0)
    base = random_base(tiny_architecture("granite", logits_scaling=8.0), vocab_size=VOCABULARY)
    assert not has_plain_head(base)
    (loss, _, _), (again, _, rows) = both(monkeypatch, *hypernetwork(base))
    assert again.sum == loss.sum and rows == loss.count
    ids = torch.randint(3, VOCABULARY, (1, 8))
    for kind in PLAIN_HEADS:  # and those of the others are the head's
        base = tiny_base(kind)
        assert has_plain_head(base)
        hidden = base.get_decoder()(input_ids=ids).last_hidden_state
        assert torch.equal(base(input_ids=ids).logits, base.get_output_embeddings()(hidden))
