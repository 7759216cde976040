"""The first row of a prefix is the base's own of its first token: in every kind and graph, packed and stored, and tuned."""

import pytest
import torch
from conftest import tiny_base, trained_hypernetwork
from test_hypernetwork import RAGGED, read_stored

from hyperllama.base.decoder import cache_argument, inverse_frequencies
from hyperllama.base.fingerprints import identify
from hyperllama.data.chunking import Chunking
from hyperllama.data.packing import Packing, pack_gist
from hyperllama.errors import UserError
from hyperllama.hypernetworks.full_copy import FullHypernetwork
from hyperllama.hypernetworks.gisting import GistingHypernetwork
from hyperllama.hypernetworks.hint.hypernetwork import HintHypernetwork
from hyperllama.hypernetworks.pooling import PoolingHypernetwork
from hyperllama.prefixes.capture import encode_whole, sink_states
from hyperllama.prefixes.export.peft import from_peft, to_peft
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix
from hyperllama.tuning.prefix_tuner import PrefixTuner
from hyperllama.tuning.starts import demonstrations_start, random_start, vocabulary_start

SINK = 5
HINT = {"fusion": True, "adapter_size": 4, "mlp_size": 8, "heads": 2}


def moved(model):
    """A module whose trained weights are not those that it begins with."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def made(kind, base, **settings):
    settings = {"gists": 3, "sink": SINK, **settings}
    if kind == "lora":
        return trained_hypernetwork(base, **settings)
    torch.manual_seed(0)
    if kind == "hint":
        return moved(HintHypernetwork(base, hint=HINT | settings.pop("hint", {}), **settings))
    classes = {"full": FullHypernetwork, "gisting": GistingHypernetwork, "pooling": PoolingHypernetwork}
    return moved(classes[kind](base, **settings))


def packing(hypernetwork):
    return Packing(hypernetwork.num_gists, hypernetwork.chunking, sink=True, whole=hypernetwork.keeps_context)


@pytest.mark.parametrize("graph", ["single", "parallel", "recurrent"])
@pytest.mark.parametrize("kind", ["lora", "full", "gisting", "pooling"])
def test_a_packed_pass_reads_what_a_stored_prefix_holds(base, tmp_path, kind, graph):
    if (kind, graph) == ("pooling", "recurrent"):
        pytest.skip("pooling reads chunks one by one")
    hypernetwork = made(kind, base, chunking=Chunking(graph, 5))
    packed, total, count = hypernetwork(pack_gist(RAGGED, packing(hypernetwork))), 0.0, 0
    own = encode_whole(hypernetwork.base, [[SINK]])[0]
    for i, (one, prefix) in enumerate(zip(RAGGED, hypernetwork.compress([e.context for e in RAGGED]))):
        prefix.save(tmp_path / f"{i}.safetensors")
        loaded = Prefix.load(tmp_path / f"{i}.safetensors", hypernetwork.identity)
        chunks = len(hypernetwork.chunking.chunks(one.context))
        assert loaded.manifest.sink == SINK and loaded.rows == 1 + 3 * chunks
        for mine, base_row in zip((*loaded.keys, *loaded.values), (*own.keys, *own.values)):
            torch.testing.assert_close(mine[:, :1], base_row, atol=1e-6, rtol=1e-5)
        for prompt, answer in one.queries:
            loss = read_stored(hypernetwork.base, loaded, prompt, answer)
            total, count = total + loss.sum, count + loss.count
    torch.testing.assert_close(packed.sum, total, atol=2e-4, rtol=2e-5)
    assert packed.count == count


@pytest.mark.parametrize("hint", [{}, {"regime": "paper"}])
def test_a_module_of_hint_begins_with_it_too(hint):
    from hyperllama.inference.scoring import Question, continuation_scores

    hypernetwork = made("hint", tiny_base(), hint=hint)
    packed = hypernetwork(pack_gist(RAGGED, packing(hypernetwork)))
    prefixes = hypernetwork.compress([e.context for e in RAGGED])
    for one, prefix in zip(RAGGED, prefixes):
        assert prefix.rows == len(one.context) + 1 + 3
        own = encode_whole(hypernetwork.base, [[SINK]])[0].values[0]
        torch.testing.assert_close(prefix.values[0][:, :1], own, atol=1e-6, rtol=1e-5)
    asked = [Question(p, (a,), prefix) for one, prefix in zip(RAGGED, prefixes) for p, a in one.queries]
    stored = -sum(scores[0].likelihood for scores in continuation_scores(hypernetwork.base, asked))
    assert packed.sum.item() == pytest.approx(stored, abs=1e-3)


def test_c_a_ragged_batch_is_each_episode_alone(base):
    hypernetwork = made("lora", base)
    together = hypernetwork(pack_gist(RAGGED, packing(hypernetwork)))
    alone = [hypernetwork(pack_gist([one], packing(hypernetwork))) for one in RAGGED]
    torch.testing.assert_close(together.sum, sum(one.sum for one in alone), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_is_not_trained(kind):
    """Neither LoRA nor a tuned copy has a part in it, and no gradient goes through it."""
    hypernetwork = made(kind, tiny_base())
    rows = hypernetwork.sink_rows(torch.tensor([0, 7]))
    assert not any(x.requires_grad for pair in rows for x in pair)
    hypernetwork(pack_gist(RAGGED, packing(hypernetwork))).mean.backward()
    assert all(p.grad is None for p in hypernetwork.base.parameters())


def test_a_trained_base_has_it_anew_and_learns_from_it():
    hypernetwork = made("gisting", tiny_base())
    before = hypernetwork.sink_rows(torch.tensor([0]))
    assert all(x.requires_grad for pair in before for x in pair)
    moved(hypernetwork)
    after = hypernetwork.sink_rows(torch.tensor([0]))
    assert not torch.equal(before[-1][1], after[-1][1])


def test_gradient_checkpointing_changes_nothing():
    losses = []
    for checkpointing in (False, True):
        base = tiny_base()
        hypernetwork = made("lora", base).train()
        if checkpointing:
            base.gradient_checkpointing_enable()
        loss = hypernetwork(pack_gist(RAGGED, packing(hypernetwork))).mean
        loss.backward()
        losses.append((loss.item(), hypernetwork.gists.grad.clone()))
        assert base.training and all(layer.training for layer in base.get_decoder().layers)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    torch.testing.assert_close(losses[0][1], losses[1][1], atol=1e-6, rtol=1e-4)


def test_another_sink_is_another_hypernetwork(tmp_path):
    base = tiny_base()
    hypernetwork = made("lora", base)
    hypernetwork.save_pretrained(tmp_path)
    assert type(hypernetwork).from_pretrained(tmp_path, tiny_base()).sink == SINK
    assert made("lora", tiny_base(), sink=6).fingerprint() != hypernetwork.fingerprint()


def test_two_prefixes_have_one(base):
    hypernetwork = made("lora", base)
    first, second = hypernetwork.compress([RAGGED[0].context, RAGGED[1].context])
    both = Prefix.concat(first, second)
    assert both.rows == 4 + 3 and both.manifest.sink == SINK
    assert torch.equal(both.values[0], torch.cat([first.values[0], second.values[0][:, 1:]], 1))
    without = [trained_hypernetwork(tiny_base(base.config.model_type)).compress([RAGGED[i].context])[0] for i in (0, 1)]
    assert Prefix.concat(*without).rows == 6


def test_starts_have_it_and_tuning_leaves_it(base):
    own = encode_whole(base, [[SINK]])[0]
    context = [SINK, *range(6, 20)]
    starts = {
        "random": random_start(base, [context], 4, sink=SINK),
        "words": vocabulary_start(base, [8, 9], 4, sink=SINK),
        "first": demonstrations_start(base, context, 4),
        "pooled": demonstrations_start(base, context, 4, pooled=True),
    }
    for name, prefix in starts.items():
        assert prefix.rows == 4
        torch.testing.assert_close(prefix.keys[0][:, :1], own.keys[0], atol=1e-5, rtol=1e-5)
        prefix.manifest = Manifest(base=identify(base), sink=SINK, task=name)
    tuner = PrefixTuner(base, starts)
    assert tuner.keys.shape[3] == 3 and all(torch.equal(p.keys[0], starts[n].keys[0]) for n, p in tuner.prefixes().items())
    with torch.no_grad():
        tuner.keys.add_(1.0)
    for name, prefix in tuner.prefixes().items():
        assert torch.equal(prefix.keys[0][:, :1], starts[name].keys[0][:, :1])
        assert not torch.equal(prefix.keys[0][:, 1:], starts[name].keys[0][:, 1:])
    starts["first"].manifest = Manifest(base=identify(base), task="first")
    with pytest.raises(UserError, match="first token all or none; tune them apart"):
        PrefixTuner(base, starts)


def test_stock_peft_reads_it(base, tmp_path):
    import peft

    (prefix,) = made("lora", base).compress([RAGGED[0].context])
    ids = torch.tensor([RAGGED[0].queries[0][0]])
    mask = torch.ones(1, prefix.rows + ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        ours = base(ids, attention_mask=mask, **cache_argument(base, prefix.to_cache())).logits
        adapter = peft.PeftModel.from_pretrained(base, to_peft(prefix, tmp_path / "adapter"))
        torch.testing.assert_close(adapter(ids, attention_mask=torch.ones_like(ids)).logits, ours, atol=1e-5, rtol=1e-5)
    assert from_peft(tmp_path / "adapter") == prefix


def test_it_is_one_row_alone(base):
    states, whole = sink_states(base, SINK), encode_whole(base, [[SINK, 7, 8]])[0]
    for (keys, values), k, v in zip(states, whole.keys, whole.values):
        torch.testing.assert_close(keys, k[:, :1], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(values, v[:, :1], atol=1e-6, rtol=1e-5)
    assert len(inverse_frequencies(base)) * 2 == keys.shape[2]
