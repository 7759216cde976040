"""Long contexts: MLPs that run chunk by chunk give the same prefixes, hold less, and leave the model as it was."""

import copy

import pytest
import torch
from conftest import VOCABULARY, tiny_base, trained_hypernetwork

from hyperllama.base.mlp_blocks import mlps_in_blocks
from hyperllama.prefixes.capture import encode_whole

CONTEXTS = [torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (41, 9, 26, 1)]


def assert_same(prefixes, expected):
    for a, b in zip(prefixes, expected, strict=True):
        for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def rows_of(module, seen):
    return module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))


def forwards(base):
    return [vars(module).get("forward") for module in base.modules()]


@pytest.mark.parametrize("chunk", [1, 7, 16, 88])  # of 89 rows: boundaries inside contexts, and between them and their gists
def test_prefixes_are_those_of_all_rows_at_once(base, chunk):
    hypernetwork, seen = trained_hypernetwork(base), []
    expected = hypernetwork.compress(CONTEXTS)
    hook = rows_of(base.get_decoder().layers[0].mlp.up_proj, seen)
    assert_same(hypernetwork.compress(CONTEXTS, block_rows=chunk), expected)
    assert seen == [chunk] * (89 // chunk) + [89 % chunk] * bool(89 % chunk)
    hook.remove()


def test_it_holds_where_the_lora_is_on_the_mlp_alone(base):
    hypernetwork = trained_hypernetwork(base, targets=["gate_proj", "up_proj", "down_proj"])
    without = encode_whole(base, CONTEXTS)
    expected = hypernetwork.compress(CONTEXTS)
    assert not torch.allclose(expected[0].values[1], without[0].values[1][:, -3:], atol=1e-3), "the LoRA does something"
    assert_same(hypernetwork.compress(CONTEXTS, block_rows=10), expected)


def test_whole_contexts_too(base):
    assert_same(encode_whole(base, CONTEXTS, block_rows=10), encode_whole(base, CONTEXTS))


def test_rows_that_read_are_not_touched_by_the_lora_inside_chunks():
    """The chunk in which the LoRA's rows end: it acts on those before its end and on no other."""
    base = tiny_base()
    hypernetwork, hidden = trained_hypernetwork(base), torch.randn(1, 20, 32)
    mlp, lora = base.get_decoder().layers[0].mlp, hypernetwork.lora
    with torch.no_grad():
        lora.rows = 13
        expected = mlp(hidden)
        with mlps_in_blocks(base, 5, lora):
            found = mlp(hidden)
        assert lora.rows == 13
        lora.rows = 0
        plain = mlp(hidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 13:], plain[:, 13:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[:, 12], plain[:, 12], atol=1e-3)


def test_the_last_layer_stays_left_out():
    base = tiny_base()
    hypernetwork, seen = trained_hypernetwork(base), []
    rows_of(base.get_decoder().layers[-1].mlp.up_proj, seen)
    hypernetwork.compress(CONTEXTS, block_rows=10)
    assert seen == [0]


def test_the_model_is_as_before_also_after_an_exception():
    base = tiny_base()
    hypernetwork = trained_hypernetwork(base)
    mlp = base.get_decoder().layers[1].mlp
    mlp.forward = mlp.forward  # as accelerate does: an own forward comes back, it is not lost
    before, weights = forwards(base), copy.deepcopy(base.state_dict())
    hypernetwork.compress(CONTEXTS, block_rows=10)
    assert forwards(base) == before

    seen = []

    def fails(_, args, output):
        seen.append(args)
        if len(seen) == 2:
            raise RuntimeError("in the second chunk")

    hook = base.get_decoder().layers[0].mlp.down_proj.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="second chunk"):
        hypernetwork.compress(CONTEXTS, block_rows=10)
    hook.remove()
    assert forwards(base) == before and hypernetwork.lora.rows == 89
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.state_dict().items())
    assert_same(hypernetwork.compress(CONTEXTS, block_rows=10), hypernetwork.compress(CONTEXTS))
