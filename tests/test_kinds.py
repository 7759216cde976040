"""Every kind of hypernetwork, every reading graph and every objective: one packed batch is compress, store, load, read."""

import math

import pytest
import torch
from conftest import ARCHITECTURES, tiny_base
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div

from attention_masks import rotate
from hyperllama.base.adapters import Stack, adapted
from hyperllama.base.decoder import cache_argument, inverse_frequencies
from hyperllama.data.chunking import Chunking
from hyperllama.data.packing import Packing, nested_gists, pack_gist
from hyperllama.data.text import ContextIds, EncodedEpisode
from hyperllama.errors import UserError
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.hypernetworks.loading import load_hypernetwork_onto
from hyperllama.hypernetworks.pooling import in_shares
from hyperllama.hypernetworks.registry import KINDS as REGISTERED
from hyperllama.inference.reader import Reader
from hyperllama.inference.scoring import Question
from hyperllama.objectives.mix import Mix
from hyperllama.prefixes.prefix import Prefix

KINDS = {kind: settings.hypernetwork() for kind, settings in REGISTERED.items()}
EPISODES = [
    EncodedEpisode((5, 6, 7, 8, 9, 10, 11), (((12, 13), (14, 15)), ((16,), (17,))), answers=((1, 3), (4, 7)), index=3),
    EncodedEpisode((20, 21, 22), (((23, 24, 25), (26, 27, 28)),), answers=((1, 3),), index=4),
]
# Every kind, and pooling with all that it can have.
ALL = [*KINDS, "pooling with LoRA", "pooling of attended tokens"]
OWN = {
    "lora": {"rank": 4},
    "pooling with LoRA": {"rank": 4, "recency": 0.2, "sharpness": 4.0},
    "pooling of attended tokens": {"attended": 0.4, "sharpness": 2.0},
    "pooling of attended tokens with LoRA": {"attended": 0.4, "sharpness": 2.0, "rank": 4},
}
GRAPHS = {name: Chunking(name, 4) for name in ("single", "recurrent", "parallel")}


def made(kind, base=None, gists=3, **settings):
    """A hypernetwork whose weights all do something."""
    torch.manual_seed(1)
    settings |= OWN.get(kind, {})
    hypernetwork = KINDS[kind.split()[0]](base if base is not None else tiny_base(), gists=gists, **settings)
    with torch.no_grad():
        for name, parameter in hypernetwork.trainable().items():
            if "norm" not in name and kind != "gisting":
                parameter.add_(0.05 * torch.randn_like(parameter))
    return hypernetwork


def answers_loss(reader, prefixes, contexts=EPISODES):
    """Nats of all answers, each read behind its episode's prefix."""
    questions = [Question(p, (a,), prefix) for e, prefix in zip(contexts, prefixes, strict=True) for p, a in e.queries]
    return -sum(scores[0] for scores in reader.score(questions))


def context_of(episode):
    ids = ContextIds(episode.context)
    ids.ends = tuple(end for _, end in episode.answers)
    return ids


REFUSED = [*((kind, "recurrent") for kind in ALL if "pooling" in kind), ("hint", "recurrent"), ("hint", "parallel")]
CASES = [(kind, graph) for kind in ALL for graph in GRAPHS if (kind, graph) not in REFUSED]


def packing(kind, gists=3, chunking=GRAPHS["single"], **settings):
    """HINT's readers see the encoded instruction too."""
    return Packing(gists, chunking, whole=kind == "hint", **settings)


@pytest.mark.parametrize("kind, graph", CASES)
def test_a_packed_batch_is_compress_store_load_read(kind, graph, tmp_path):
    hypernetwork = made(kind, chunking=GRAPHS[graph])
    loss = hypernetwork(pack_gist(EPISODES, packing(kind, chunking=GRAPHS[graph])))
    prefixes = hypernetwork.compress([context_of(episode) for episode in EPISODES])
    for i, prefix in enumerate(prefixes):
        prefix.save(tmp_path / f"{i}.safetensors")
    reader = Reader(hypernetwork.base, None)
    loaded = [Prefix.load(tmp_path / f"{i}.safetensors", reader.identity) for i in range(2)]
    chunks = {"single": 1}.get(graph, 2)
    kept = [len(e.context) if kind == "hint" else 0 for e in EPISODES]
    assert [prefix.rows for prefix in loaded] == [3 * chunks + kept[0], 3 + kept[1]]
    assert loss.count == 6 and loss.sum.item() == pytest.approx(answers_loss(reader, loaded), rel=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_everything_that_is_trained_has_a_gradient_and_nothing_else(kind):
    hypernetwork = made(kind, mix=Mix(reconstruction=0.5))
    hypernetwork(pack_gist(EPISODES, packing(kind, reconstruct=True))).mean.backward()
    for name, parameter in hypernetwork.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name
    frozen = {name for name, p in hypernetwork.base.named_parameters() if not p.requires_grad}
    assert (not frozen) == (kind == "gisting")


@pytest.mark.parametrize("kind", ALL)
def test_what_is_saved_comes_back(kind, tmp_path, saved_base):
    from hyperllama.base.loading import load_base, load_tokenizer

    base, tokenizer = load_base(str(saved_base)), load_tokenizer(str(saved_base))
    chunking = Chunking("parallel", 4) if kind != "hint" else Chunking()
    hypernetwork = made(kind, base, tokenizer=tokenizer, chunking=chunking)
    if kind == "gisting":
        with torch.no_grad():
            hypernetwork.base.get_input_embeddings().weight.mul_(1.1)
    hypernetwork.save_pretrained(tmp_path)
    where = tmp_path if kind == "gisting" else saved_base
    again = load_hypernetwork_onto(tmp_path, load_base(str(where)), tokenizer=tokenizer)
    assert type(again) is type(hypernetwork) and again.settings() == hypernetwork.settings() and again.chunking == chunking
    for a, b in zip(hypernetwork.compress([range(3, 12)]), again.compress([range(3, 12)])):
        assert (
            a.rows == (12 if kind == "hint" else 9)
            and a.nbytes == b.nbytes
            and all(torch.equal(x, y) for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values)))
        )
    with pytest.raises(UserError, match="was trained for"):
        load_hypernetwork_onto(tmp_path, tiny_base(seed=5))
    other = next(k for k in KINDS if k != hypernetwork.kind)
    with pytest.raises(UserError, match=f"a hypernetwork of kind {hypernetwork.kind}, not {other}"):
        KINDS[other].from_pretrained(tmp_path, base)


def test_pooling_starts_as_means_of_neighbours():
    hypernetwork = KINDS["pooling"](tiny_base(), gists=2)
    with torch.no_grad():
        hypernetwork.log_sharpness.fill_(5)
    (prefix,) = hypernetwork.compress([range(3, 5)])  # two tokens, two rows: each is its own share
    (whole,) = Reader(hypernetwork.base, None).encode([list(range(3, 5))])
    for a, b in zip((*prefix.keys, *prefix.values), (*whole.keys, *whole.values)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_sharp_pooling_with_recency_starts_from_the_first_token_and_mostly_late_ones():
    context = list(range(3, 43))
    hypernetwork = KINDS["pooling"](tiny_base(), gists=8, recency=0.1, sharpness=1e4)
    (prefix,) = hypernetwork.compress([context])
    (whole,) = Reader(hypernetwork.base, None).encode([context])
    values = whole.values[0]
    kept = torch.cdist(prefix.values[0][0], values[0]).argmin(1)
    torch.testing.assert_close(prefix.values[0], values[:, kept], atol=1e-3, rtol=1e-3)
    gaps = kept.diff()
    assert kept[0] == 0 and kept[-1] >= 38 and gaps.min() >= 1 and (gaps[1:].diff() <= 1).all() and gaps[1] > gaps[-1]


@given(st.integers(1, 300), st.integers(1, 40), st.floats(0, 4))
def test_tokens_stand_in_order_within_the_shares_of_the_rows(tokens, rows, recency):
    places = in_shares(tokens, rows, recency)
    assert len(places) == tokens and places[0] > 0 and places[-1] < rows and (places.diff() > 0).all()
    if recency and tokens > rows > 1:
        assert places[0] == 0.5 and places[1] > 1  # the first row is the first token's alone
        assert (places[1:].diff().diff() > -1e-4).all()  # and shares grow narrower to the end


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_attended_rows_are_tokens_as_they_are_those_that_the_last_ones_attend_to(kind, monkeypatch):
    monkeypatch.setattr("hyperllama.hypernetworks.attended.SCORES", 500)  # several blocks of queries
    base, contexts, rows = tiny_base(kind), [list(range(3, 43)), list(range(50, 71))], 8
    hypernetwork = KINDS["pooling"](base, gists=rows, attended=0.25, sharpness=1e4)
    oracle = tiny_base(kind)
    oracle.set_attn_implementation("eager")
    for prefix, context in zip(hypernetwork.compress(contexts), contexts, strict=True):
        with torch.no_grad():
            found = oracle(torch.tensor([context]), output_attentions=True)
        (whole,) = Reader(base, None).encode([context])
        for layer, attentions in enumerate(found.attentions):
            asking = attentions[0, :, -math.ceil(len(context) / 4) :]
            heads = asking.unflatten(0, (prefix.kv_heads, -1)).square().mean((1, 2)).sqrt()  # (N, T)
            for head, received in enumerate(heads):
                middle = received[1:-2].topk(rows - 3).indices + 1
                kept = [0, *sorted(middle.tolist()), len(context) - 2, len(context) - 1]
                torch.testing.assert_close(prefix.values[layer][head], whole.values[layer][head, kept])
                back = rotate(whole.keys[layer][head, kept], torch.arange(rows) - torch.tensor(kept), inverse_frequencies(base))
                torch.testing.assert_close(prefix.keys[layer][head], back, atol=1e-5, rtol=1e-4)


def test_rows_begin_in_one_way():
    with pytest.raises(UserError, match="beside recency 0"):
        KINDS["pooling"](tiny_base(), attended=0.5, recency=0.1)


@pytest.mark.parametrize("attended", [0.0, 0.5])
def test_lora_changes_nothing_before_it_is_trained(attended):
    """Nor which tokens are chosen, in the last layer either, whose other rows nobody asks for queries."""
    settings = {"gists": 3, "attended": attended, "sharpness": 400.0}
    (without,), (with_lora,) = (KINDS["pooling"](tiny_base(), **settings, rank=r).compress([range(3, 32)]) for r in (0, 4))
    assert all(torch.equal(a, b) for a, b in zip((*without.keys, *without.values), (*with_lora.keys, *with_lora.values)))


def test_the_first_gists_stand_alone():
    hypernetwork = made("lora", gists=6, elastic=True)
    contexts = [episode.context for episode in EPISODES]
    whole = hypernetwork.compress(contexts)
    for few in (1, 2, 4):
        for a, b in zip(hypernetwork.compress(contexts, gists=few), whole):
            first = b.truncate(few)
            for x, y in zip((*a.keys, *a.values), (*first.keys, *first.values), strict=True):
                torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="prefixes of 1 to 6 gists, not of 7"):
        hypernetwork.compress(contexts, gists=7)


def test_elastic_batches_have_any_number_of_nested_gists():
    assert [nested_gists(g) for g in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]
    drawn = []
    for index in range(60):
        episode = EncodedEpisode((5, 6), (((7,), (8,)),), index=index)
        batches = [pack_gist([episode], Packing(8, elastic=True)) for _ in range(2)]
        assert batches[0].layout == batches[1].layout, "the same episodes, the same gists: resuming changes nothing"
        drawn.append(batches[0].layout.segments[0].gists)
    assert set(drawn) == {1, 2, 4, 8}


@pytest.mark.parametrize("graph", ["single", "parallel"])
@pytest.mark.parametrize("kind", ["lora", *(kind for kind in ALL if kind.startswith("pooling"))])
def test_distillation_is_the_divergence_from_the_base_with_the_whole_context(kind, graph):
    hypernetwork = made(kind, mix=Mix(answer=0.3, distillation=0.7), chunking=GRAPHS[graph])
    found = hypernetwork(pack_gist(EPISODES, Packing(3, GRAPHS[graph], teach=True)))
    base, total = hypernetwork.base, 0.0
    for episode, prefix in zip(EPISODES, hypernetwork.compress([context_of(e) for e in EPISODES])):
        for prompt, answer in episode.queries:
            read = [*prompt, *answer[:-1]]
            rows = slice(-len(answer), None)
            own = base(torch.tensor([read]), **cache_argument(base, prefix.to_cache())).logits[0, rows].log_softmax(-1)
            taught = base(torch.tensor([[*episode.context, *read]])).logits[0, rows].log_softmax(-1)
            total += 0.3 * cross_entropy(own, torch.tensor(answer), reduction="sum").item()
            total += 0.7 * kl_div(own, taught, reduction="sum", log_target=True).item()
    assert found.sum.item() == pytest.approx(total, rel=1e-4) and found.count == 6


@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_is_the_context_said_again_behind_its_prefix(kind):
    hypernetwork = made(kind, mix=Mix(reconstruction=0.5))
    found = hypernetwork(pack_gist(EPISODES, packing(kind, reconstruct=True)))
    prefixes = hypernetwork.compress([e.context for e in EPISODES])
    reader, embed, again = Reader(hypernetwork.base, None), hypernetwork.base.get_input_embeddings(), 0.0
    for episode, prefix in zip(EPISODES, prefixes):
        rows = torch.cat([hypernetwork.marker[None], embed(torch.tensor(episode.context[:-1]))])[None]
        cache, adapters = Prefix.stack([prefix])[0], Stack.of([prefix.adapters], hypernetwork.base)
        with adapted(hypernetwork.base, adapters):
            logits = hypernetwork.base(inputs_embeds=rows, **cache_argument(hypernetwork.base, cache)).logits[0]
        again += cross_entropy(logits, torch.tensor(episode.context), reduction="sum").item()
    expected = answers_loss(reader, prefixes) + 0.5 * again * 6 / 10  # a mean over 10 tokens, for each of 6 answers' tokens
    assert found.sum.item() == pytest.approx(expected, rel=1e-4)


def test_objectives_do_not_change_each_other_where_the_head_is_cut_into_chunks(monkeypatch):
    hypernetwork = made("lora", mix=Mix(1.0, 0.5, 0.5))
    batch = pack_gist(EPISODES, Packing(3, reconstruct=True, teach=True))

    def gradients():
        loss = hypernetwork(batch)
        return [loss.sum, *torch.autograd.grad(loss.sum, list(hypernetwork.trainable().values()))]

    whole = gradients()
    monkeypatch.setattr("hyperllama.objectives.losses.LOGITS", 200)
    for a, b in zip(whole, gradients(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_demonstrations_are_cut_only_if_they_are_longer_than_a_chunk():
    chunking = Chunking("parallel", 5)
    assert chunking.chunks(range(12), ends=[3, 5, 9, 12]) == [tuple(range(5)), tuple(range(5, 9)), (9, 10, 11)]
    assert chunking.chunks(range(12), ends=[12]) == [tuple(range(5)), tuple(range(5, 10)), (10, 11)]
    assert Chunking().chunks(range(12), ends=[3]) == [tuple(range(12))]


def test_a_context_in_chunks_may_be_longer_than_the_model():
    base = tiny_base(max_position_embeddings=32)
    hypernetwork = made("lora", base, gists=2, chunking=Chunking("recurrent", 8))
    (prefix,) = hypernetwork.compress([range(3, 51)])
    assert prefix.rows == 12
    whole = GistHypernetwork(tiny_base(max_position_embeddings=32), gists=2)
    with pytest.raises(UserError, match="50 positions, but the model has 32"):
        whole.compress([range(3, 51)])


@pytest.mark.parametrize("taught", [False, True], ids=["answers", "taught"])
@pytest.mark.parametrize("kind", [*ALL, "pooling of attended tokens with LoRA", "hint trained whole"])
def test_gradient_checkpointing_changes_nothing(kind, taught, monkeypatch):
    """Losses and gradients of every kind, though its context is read in a pass of its own; and layers are computed again."""
    losses, gradients, runs = [], [], []
    for checkpointing in (False, True):
        own = {"hint": {"regime": "paper"}} if kind == "hint trained whole" else {}
        if taught and (own or kind == "gisting"):
            pytest.skip("nothing teaches a model that is trained")
        base = tiny_base("qwen3", num_hidden_layers=3)
        hypernetwork = made(kind, base, sink=1, mix=Mix(distillation=1.0) if taught else Mix(), **own).train()
        if checkpointing:
            hypernetwork.activation_checkpointing_enable()
        counted = [0]
        for model in hypernetwork.decoders:
            for layer in model.get_decoder().layers:
                layer.mlp.register_forward_pre_hook(lambda *_, counted=counted: counted.__setitem__(0, counted[0] + 1))
        batch = pack_gist(EPISODES, packing(kind.split()[0], 3, sink=True, teach=taught))
        loss = hypernetwork(batch).mean
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in hypernetwork.trainable().items()})
        runs.append(counted[0])
        hypernetwork.remove()
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and runs[1] > runs[0]
    assert all(gradient is not None for gradient in gradients[0].values() if gradient is not gradients[0].get("marker"))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_two_that_share_a_base_have_calls_of_their_own():
    """Adapters that one names act once, though the other listens too."""
    base = tiny_base()
    batch = pack_gist(EPISODES, packing("hint"))
    one = made("hint", base)
    alone = one(batch).mean.item()
    other = made("hint", base)
    assert one(batch).mean.item() == pytest.approx(alone, abs=1e-6) == other(batch).mean.item()
