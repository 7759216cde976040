"""The hypernetwork: what it changes, what it must not change, and its files. Equivalences a, b and c of the design."""

import copy
import json

import peft
import pytest
import torch
from conftest import VOCABULARY, tiny_base, trained_hypernetwork
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import MANY
from transformers import DynamicCache

from attention_masks import GistLayout, Segment
from hyperllama.base.decoder import cache_argument, packed_arguments
from hyperllama.data.packing import pack_full, pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.errors import UserError
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.objectives.losses import answer_cross_entropy
from hyperllama.prefixes.prefix import Prefix
from hyperllama.training.full_attention import FullAttention


def tokens(n, seed):
    return tuple(torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def episode(context, *queries, seed=0):
    """An episode of random tokens: a context length, and (prompt, answer) lengths."""
    return EncodedEpisode(
        context=tokens(context, seed),
        queries=tuple((tokens(p, seed + 10 * i + 1), tokens(a, seed + 10 * i + 2)) for i, (p, a) in enumerate(queries)),
    )


RAGGED = [episode(17, (3, 2), (5, 1), seed=1), episode(6, (1, 4), seed=2), episode(11, (4, 2), (2, 2), (3, 3), seed=3)]


def read_stored(base, prefix, prompt, answer):
    """The loss of an answer behind a prefix, with the stock model and its cache."""
    ids = torch.tensor([(*prompt, *answer[:-1])])
    mask = torch.ones(1, prefix.rows + ids.shape[1], dtype=torch.long)
    logits = base(input_ids=ids, **cache_argument(base, prefix.to_cache()), attention_mask=mask).logits[0, len(prompt) - 1 :]
    return answer_cross_entropy(logits, torch.tensor(answer))


def test_a_one_packed_pass_equals_compress_store_load_read(base, tmp_path):
    hypernetwork = trained_hypernetwork(base)
    packed = hypernetwork(pack_gist(RAGGED, 3))
    total, count = 0.0, 0
    for i, (one, prefix) in enumerate(zip(RAGGED, hypernetwork.compress([e.context for e in RAGGED]))):
        prefix.save(tmp_path / f"{i}.safetensors")
        loaded = Prefix.load(tmp_path / f"{i}.safetensors", hypernetwork.identity)
        for prompt, answer in one.queries:
            loss = read_stored(base, loaded, prompt, answer)
            total, count = total + loss.sum, count + loss.count
    torch.testing.assert_close(packed.sum, total, atol=1e-4, rtol=1e-5)
    assert packed.count == count == sum(len(a) for e in RAGGED for _, a in e.queries)


@pytest.mark.parametrize("name", ["few_shot", "recurrent", "parallel", "batch"])
def test_a_holds_for_every_reading_graph(base, name):
    """Read segments see the same through stored prefixes as in the packed pass, also where gists must be moved."""
    layout, hypernetwork = MANY[name], trained_hypernetwork(base)
    with torch.no_grad():  # gist slots beyond those of the graph do not matter
        gists = torch.randn(max(s.gists for s in layout.segments), 32)
    hypernetwork.gists = torch.nn.Parameter(gists)
    ids = torch.randint(3, VOCABULARY, (1, layout.tokens))
    packed = base(
        inputs_embeds=hypernetwork.embed(ids, layout),
        use_cache=False,
        gist_lora=hypernetwork.lora,
        **packed_arguments(base, layout),
    ).logits
    readers = [i for i, s in enumerate(layout.segments) if not s.gists]
    compress_segments = [s for s in layout.segments if s.gists]
    compress = GistLayout(compress_segments)
    prefixes = hypernetwork.encode(ids[:, : compress.tokens], compress, [layout.segments[i].reads for i in readers])
    for i, prefix in zip(readers, prefixes):
        rows = slice(layout.row_starts[i], layout.row_starts[i] + layout.segments[i].tokens)
        mask = torch.ones(1, prefix.rows + layout.segments[i].tokens, dtype=torch.long)
        read = base(input_ids=ids[:, rows], **cache_argument(base, prefix.to_cache()), attention_mask=mask).logits
        torch.testing.assert_close(packed[:, rows], read, atol=2e-4, rtol=1e-4)


def test_b_a_prefix_that_keeps_every_token_is_plain_concatenation(base):
    ids = torch.tensor([[*tokens(9, 1), *tokens(5, 2), *tokens(3, 3)]])
    layout = GistLayout([Segment(9, gists=9), Segment(5, reads=(0,)), Segment(3, reads=(0,))])
    packed = base(input_ids=ids, use_cache=False, **packed_arguments(base, layout)).logits
    for start, end in ((9, 14), (14, 17)):
        plain = base(input_ids=torch.cat([ids[:, :9], ids[:, start:end]], 1)).logits[:, 9:]
        torch.testing.assert_close(packed[:, start:end], plain, atol=1e-4, rtol=1e-4)


def test_b_holds_for_gradients(base):
    """Of everything that a query sees: as if the context stood before it in one plain sequence."""
    layout = GistLayout([Segment(6, gists=6), Segment(4, reads=(0,))])
    embeds = torch.randn(1, 10, 32, requires_grad=True)
    packed = base(inputs_embeds=embeds, use_cache=False, **packed_arguments(base, layout)).logits
    plain = base(inputs_embeds=embeds).logits
    weights = torch.linspace(-1, 1, plain.numel()).view_as(plain).sin()
    found, expected = (torch.autograd.grad((logits * weights).sum(), embeds)[0] for logits in (packed, plain))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", MANY)
def test_gradients_of_every_reading_graph_are_those_of_the_dense_mask(base, name):
    layout, hypernetwork = MANY[name], trained_hypernetwork(base)
    embeds = torch.randn(1, layout.tokens, 32, requires_grad=True)
    parameters = [embeds, *hypernetwork.lora.parameters()]
    found = []
    for backend in ("sdpa", "dense"):
        arguments = packed_arguments(base, layout, backend)
        logits = base(inputs_embeds=embeds, use_cache=False, gist_lora=hypernetwork.lora, **arguments).logits
        loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()).sum()
        found.append([logits.detach(), *torch.autograd.grad(loss, parameters, allow_unused=name == "full")])
    for a, b in zip(*found):
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


QUERY_SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 3))


@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.lists(QUERY_SHAPES, min_size=1, max_size=3)), min_size=1, max_size=4),
    gists=st.integers(1, 4),
)
def test_c_a_ragged_packed_batch_is_each_episode_alone(shapes, gists):
    hypernetwork = trained_hypernetwork(tiny_base(), gists=gists)
    episodes = [episode(c, *queries, seed=100 * i) for i, (c, queries) in enumerate(shapes)]
    parameters = list(hypernetwork.trainable().values())

    def loss_and_gradients(batch):
        loss = hypernetwork(pack_gist(batch, gists))
        return [loss.sum.detach(), *torch.autograd.grad(loss.sum, parameters)]

    together = loss_and_gradients(episodes)
    alone = [sum(parts) for parts in zip(*(loss_and_gradients([one]) for one in episodes))]
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_c_prefixes_of_a_ragged_batch_are_those_of_each_context_alone(base):
    hypernetwork = trained_hypernetwork(base)
    contexts = [e.context for e in RAGGED]
    for together, context in zip(hypernetwork.compress(contexts), contexts):
        (alone,) = hypernetwork.compress([context])
        for a, b in zip((*together.keys, *together.values), (*alone.keys, *alone.values)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_full_attention_is_a_stock_forward_pass(base):
    model = FullAttention(copy.deepcopy(base), None)
    context, ((prompt, answer),) = tokens(9, 5), episode(1, (3, 2)).queries
    stock_ids = torch.tensor([(*context, *prompt, *answer)])
    logits = base(input_ids=stock_ids).logits[0]
    loss = model(pack_full([EncodedEpisode(context, ((prompt, answer),), answers=((2, 4),))]))
    torch.testing.assert_close(loss.sum, answer_cross_entropy(logits[11:13], torch.tensor(answer)).sum, atol=1e-4, rtol=1e-5)
    shown = model(pack_full([EncodedEpisode(context, ((prompt, answer),), answers=((2, 4),))], supervise_demonstrations=True))
    more = answer_cross_entropy(logits[1:3], torch.tensor(context[2:4])).sum
    torch.testing.assert_close(shown.sum, loss.sum + more, atol=1e-4, rtol=1e-5)
    assert (loss.count, shown.count) == (2, 4)
    loss.sum.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_read_rows_are_the_base_model_bit_for_bit(base):
    """Segments that read nothing are computed beside compressing ones as if there were no hypernetwork."""
    hypernetwork = trained_hypernetwork(base)
    layout = GistLayout([Segment(9, gists=3), Segment(6, gists=3), Segment(5), Segment(7)])
    ids = torch.randint(3, VOCABULARY, (1, layout.tokens))
    embeds = hypernetwork.embed(ids, layout)
    arguments = {"inputs_embeds": embeds, "use_cache": False, **packed_arguments(base, layout)}
    without = base(**arguments).logits
    skipping = base(gist_lora=hypernetwork.lora, **arguments).logits
    # Leaving rows out of the last layer changes the shapes of its products, whose rounding some processors let depend on them.
    torch.testing.assert_close(skipping[:, 15:], without[:, 15:], rtol=0, atol=1e-5)
    hypernetwork.lora.skip.remove()
    with_lora = base(gist_lora=hypernetwork.lora, **arguments).logits
    assert torch.equal(with_lora[:, 15:], without[:, 15:])
    assert not torch.allclose(with_lora[:, :15], without[:, :15])


def test_a_base_in_bf16_makes_the_prefix_of_float32_but_for_rounding():
    """Without gradients the update is in the base's dtype: hardly further off than with a LoRA that does nothing."""

    def error(strength: float) -> float:
        hypernetwork = trained_hypernetwork(tiny_base().to(torch.bfloat16))
        with torch.no_grad():
            for matrix in hypernetwork.lora.B.values():
                matrix.weight.mul_(strength)
        (rounded,) = hypernetwork.compress([tokens(60, 4)])
        assert rounded.dtype == torch.bfloat16
        hypernetwork.base.float()
        (exact,) = hypernetwork.compress([tokens(60, 4)])
        a, b = (torch.stack((*prefix.keys, *prefix.values)).float() for prefix in (rounded, exact))
        return ((a - b).norm() / b.norm()).item()

    assert error(1.0) < 2 * error(0.0) < 0.1


def test_training_leaves_every_bit_of_the_base(base):
    before = copy.deepcopy(base.state_dict())
    hypernetwork = trained_hypernetwork(base).train()
    assert set(hypernetwork.trainable()) == {n for n, _ in hypernetwork.named_parameters() if not n.startswith("base.")}
    optimizer = torch.optim.AdamW(hypernetwork.trainable().values(), lr=0.1)
    for _ in range(3):
        hypernetwork(pack_gist(RAGGED, 3)).mean.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_call_that_does_not_name_the_lora_is_the_base(base):
    ids = torch.randint(3, VOCABULARY, (2, 8))
    before = base(input_ids=ids).logits
    first, second = trained_hypernetwork(base, seed=1), trained_hypernetwork(base, seed=2)
    assert torch.equal(base(input_ids=ids).logits, before)
    alone = trained_hypernetwork(tiny_base(base.config.model_type), seed=2)(pack_gist(RAGGED, 3)).sum
    first(pack_gist(RAGGED, 3))
    assert torch.equal(second(pack_gist(RAGGED, 3)).sum, alone), "two hypernetworks on one base keep out of each other's way"
    assert torch.equal(base(input_ids=ids).logits, before)


def cached(model, embeds) -> DynamicCache:
    """The cache of a stock pass over embedded rows (1, T, hidden)."""
    cache, decoder = DynamicCache(), model.get_decoder()
    decoder(inputs_embeds=embeds, use_cache=True, **cache_argument(decoder, cache))
    return cache


def test_saved_adapter_loads_into_stock_peft(base, tmp_path):
    """PEFT applies it to every row: the gists alone, read by the adapted model, have the keys and values of the prefix."""
    hypernetwork = trained_hypernetwork(base, gists=8)
    hypernetwork.save_pretrained(tmp_path)
    gists = hypernetwork.gists.detach()[None]
    (ours,) = hypernetwork.encode(torch.zeros(1, 8, dtype=torch.long), GistLayout([Segment(8, gists=8)]), [(0,)])
    plain = cached(base, gists)
    hypernetwork.lora.remove()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path)
    cache = cached(adapted.get_base_model(), gists)
    for layer, ((keys, values, *_), (plain_keys, *_)) in enumerate(zip(cache, plain)):
        torch.testing.assert_close(ours.keys[layer], keys[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values[layer], values[0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(keys, plain_keys), "the adapter does something"
    assert (tmp_path / "README.md").read_text().startswith("---\nbase_model:")


def test_the_last_layer_computes_only_keys_and_values_for_context_rows(base):
    """Rows of the read region are the same with and without the skip; the skipped modules see no other rows."""
    hypernetwork, batch, rows = trained_hypernetwork(base), pack_gist(RAGGED, 3), []
    layer = base.get_decoder().layers[-1]
    watch = [m.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1])) for m in hypernetwork.lora.skip.modules]
    skipped = hypernetwork(batch)
    read_rows = batch.tokens - batch.layout.compress_rows
    assert rows == [read_rows] * 3 and layer.mlp in hypernetwork.lora.skip.modules
    hypernetwork.lora.skip.remove()
    rows.clear()
    whole = hypernetwork(batch)
    assert rows == [batch.tokens] * 3
    torch.testing.assert_close(skipped.sum, whole.sum, atol=1e-5, rtol=1e-6)
    assert not any("layers-1-mlp" in name for name in hypernetwork.trainable()), "no weights without an effect"
    for handle in watch:
        handle.remove()


def test_a_fingerprint_follows_every_change_of_the_weights():
    hypernetwork = trained_hypernetwork(tiny_base())
    weight, found = hypernetwork.lora.A[next(iter(hypernetwork.lora.A))].weight, [hypernetwork.fingerprint()]
    assert hypernetwork.fingerprint() == found[0] == copy.deepcopy(hypernetwork).fingerprint()
    for value in (1.0, 0.0, -0.0, float("nan")):
        weight.data[0, 0] = value  # which no version counter sees
        found.append(hypernetwork.fingerprint())
        assert hypernetwork.fingerprint() == found[-1]
    assert len(set(found)) == 5
    hypernetwork._hashed = None
    assert hypernetwork.fingerprint() == found[-1], "a hash that was kept is the hash that would be taken"


def test_hypernetwork_survives_its_files(base, tmp_path):
    hypernetwork = trained_hypernetwork(base, gists=4, targets=["q_proj", "down_proj"])
    hypernetwork.save_pretrained(tmp_path, {"data": "none"})
    loaded = GistHypernetwork.from_pretrained(tmp_path, base)
    assert loaded.num_gists == 4 and loaded.lora.names == hypernetwork.lora.names
    assert loaded.fingerprint() == hypernetwork.fingerprint()
    assert torch.equal(loaded(pack_gist(RAGGED, 4)).sum, hypernetwork(pack_gist(RAGGED, 4)).sum)


def test_hypernetwork_refuses_another_base(tmp_path):
    trained_hypernetwork(tiny_base()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"was trained for LlamaForCausalLM \([0-9a-f]{8}\), not for LlamaForCausalLM"):
        GistHypernetwork.from_pretrained(tmp_path, tiny_base(seed=7))


def test_a_folder_without_a_hypernetwork_is_named(tmp_path):
    with pytest.raises(UserError, match="not a hypernetwork, it has no hypernetwork.json;"):
        GistHypernetwork.from_pretrained(tmp_path, tiny_base())


@pytest.mark.parametrize("changes", [{"format_version": 2}, {"format_version": 1, "kind": None, "files": None}])
def test_a_hypernetwork_of_an_older_format_is_refused(tmp_path, changes):
    path = tmp_path / "hypernetwork.json"
    trained_hypernetwork(tiny_base()).save_pretrained(tmp_path)
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(UserError, match="a hypernetwork of an older format.*; train it again with its recipe.yaml"):
        GistHypernetwork.from_pretrained(tmp_path, tiny_base())


def test_a_damaged_adapter_is_named(tmp_path):
    base = tiny_base()
    trained_hypernetwork(base).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        GistHypernetwork.from_pretrained(tmp_path, base)


def test_unknown_lora_targets_are_named():
    with pytest.raises(UserError, match=r"no linear layers \['c_attn'\]; choose all-linear or from down_proj, gate_proj"):
        GistHypernetwork(tiny_base(), targets=["c_attn"])


def test_nothing_to_compress_is_an_error():
    hypernetwork = trained_hypernetwork(tiny_base())
    for contexts in ([], [[]], [[3, 4], []]):
        with pytest.raises(UserError, match="every context needs at least one token"):
            hypernetwork.compress(contexts)


def test_a_context_longer_than_the_model_is_an_error():
    hypernetwork = trained_hypernetwork(tiny_base(max_position_embeddings=32))
    hypernetwork.compress([tokens(29, 0)])
    with pytest.raises(UserError, match="takes 33 positions, but the model has 32"):
        hypernetwork.compress([tokens(30, 0)])


def test_a_bf16_base_trains_in_float32():
    base = tiny_base().to(torch.bfloat16)
    hypernetwork = trained_hypernetwork(base)
    assert {p.dtype for p in hypernetwork.trainable().values()} == {torch.float32}
    hypernetwork(pack_gist(RAGGED, 3)).sum.backward()
    (prefix,) = hypernetwork.compress([RAGGED[0].context])
    assert prefix.dtype == torch.bfloat16 and hypernetwork.gists.grad.isfinite().all()


def test_peers_compute_the_same_loss_and_gradients():
    from benchmarks.peers import row_per_episode, row_per_query, two_pass

    hypernetwork = trained_hypernetwork(tiny_base())
    parameters = list(hypernetwork.trainable().values())
    packed = hypernetwork(pack_gist(RAGGED, 3))
    expected = torch.autograd.grad(packed.sum, parameters)
    for peer in (row_per_query, row_per_episode, two_pass):
        loss = peer(hypernetwork, RAGGED)
        torch.testing.assert_close(loss.sum, packed.sum, atol=1e-4, rtol=1e-5, msg=peer.__name__)
        assert loss.count == packed.count
        # Of the last layer only keys and values of gists count; two passes do not even compute the rest for them.
        for a, b in zip(torch.autograd.grad(loss.sum, parameters, allow_unused=True), expected):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, atol=2e-4, rtol=2e-4)
