"""Formulas of FLOPs against what torch counts while the project's own code runs."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, VOCABULARY, tiny_architecture, tiny_base, trained_hypernetwork
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DynamicCache

from eval.flops import ModelCost, amortised
from hyperllama.base.adapters import Stack, adapted
from hyperllama.base.decoder import cache_argument
from hyperllama.base.loading import random_base
from hyperllama.errors import UserError
from hyperllama.hypernetworks.hint.hypernetwork import HintHypernetwork
from hyperllama.hypernetworks.hint.settings import HintSettings
from hyperllama.hypernetworks.pooling import PoolingHypernetwork
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.prefix import Prefix

aten = torch.ops.aten
TOLERANCE = 1e-3  # ten times closer than the 1 % that is promised

# Sizes such that one term taken for another shows: three layers, heads wider than hidden / heads, an MLP of its own width.
ODD = {"num_hidden_layers": 3, "head_dim": 12, "intermediate_size": 72}
VARIANTS = [
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 1},
    {"tie_word_embeddings": True},
]


@pytest.fixture(params=ARCHITECTURES)
def base(request):
    return tiny_base(request.param, **ODD)


def counted(run) -> int:
    """FLOPs that torch counts while `run` runs.

    Torch's counter has no formula for the CPU's fused attention kernel and would leave attention out. With the math kernel
    attention is two matrix products with heads expanded, which it counts by their shapes like any other.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def prefix_of(base, gists: int):
    return trained_hypernetwork(base, gists=gists).compress([tokens(9)[0]])[0]


def read(base, count: int, cache=None, head_rows: int = 1):
    """A pass of the stock model: its logits are of the last `head_rows` rows."""
    return base(tokens(count), **cache_argument(base, cache), use_cache=True, logits_to_keep=head_rows)


def close(formula: int, counter: int) -> bool:
    assert formula > 0 and isinstance(formula, int)
    return formula == pytest.approx(counter, rel=TOLERANCE)


@pytest.mark.parametrize("count, past, head_rows", [(1, 0, 1), (1, 5, 1), (7, 0, 7), (13, 4, 1), (40, 21, 17)])
def test_reading(base, count, past, head_rows):
    cache = prefix_of(base, past).to_cache() if past else None
    counter = counted(lambda: read(base, count, cache, head_rows))
    assert close(ModelCost.of(base.config).read(count, past=past, head_rows=head_rows), counter)


@pytest.mark.parametrize("context", [1, 8, 50])
def test_encoding_keeps_everything(base, context):
    cost, cache, decoder = ModelCost.of(base.config), DynamicCache(), base.get_decoder()
    assert close(cost.encode(context), counted(lambda: decoder(tokens(context), **cache_argument(decoder, cache))))
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.state_bytes(context, bytes_per_element=4) == kept


@pytest.mark.parametrize("targets", ["all-linear", "q_proj", ("k_proj", "down_proj")])
@pytest.mark.parametrize("lengths, gists", [((1,), 1), ((30,), 3), ((6, 47, 6), 8)])
def test_compressing(base, lengths, gists, targets):
    cost, hypernetwork = ModelCost.of(base.config), trained_hypernetwork(base, gists=gists, targets=targets)
    made = []
    counter = counted(lambda: made.extend(hypernetwork.compress([tokens(n)[0] for n in lengths])))
    assert close(sum(cost.compress(n, gists, hypernetwork.lora.rank, targets) for n in lengths), counter)
    assert {cost.state_bytes(gists, bytes_per_element=4)} == {prefix.nbytes for prefix in made}


@pytest.mark.parametrize(
    "rows, size, lora, fusion, rank",
    [(3, 4, 0, True, 2), (0, 5, 2, False, 2), (4, 0, 0, True, 0), (0, 0, 0, True, 3), (0, 0, 3, False, 1)],
)
@pytest.mark.parametrize("context", [1, 23])
def test_compressing_with_hint(base, context, rows, size, lora, fusion, rank):
    hint = HintSettings(adapter_size=size, lora_rank=lora, fusion=fusion, fusion_rank=rank, heads=3, mlp_size=20)
    cost, hypernetwork, made = ModelCost.of(base.config), HintHypernetwork(base, gists=rows, hint=hint), []
    assert close(cost.hint(context, rows, hint), counted(lambda: made.extend(hypernetwork.compress([tokens(context)[0]]))))
    (prefix,) = made
    assert prefix.rows == rows + fusion * context
    matrices, sizes = (prefix.adapters.nbytes, prefix.adapters.sizes) if size or lora else (0, {})
    assert prefix.nbytes == cost.state_bytes(prefix.rows, 4) + matrices == cost.module_bytes(prefix.rows, sizes, 4)

    def read_with_modules():
        with adapted(base, Stack.of([prefix.adapters], base)):
            read(base, 7, Prefix.stack([prefix])[0] if prefix.rows else None)

    reading = cost.read(7, past=prefix.rows, head_rows=1) + cost.adapters(7, sizes)
    assert close(reading, counted(read_with_modules))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("context, attended", [(23, 0.0), (23, 0.3), (4, 1.0)])
def test_compressing_with_pooling(base, context, attended, rank):
    cost, hypernetwork = ModelCost.of(base.config), PoolingHypernetwork(base, gists=3, attended=attended, rank=rank)
    counter = counted(lambda: hypernetwork.compress([tokens(context)[0]]))
    hypernetwork.remove()
    assert close(cost.pool(context, 3, *([rank] if rank else []), attended=attended), counter)


@pytest.mark.parametrize("prompt, answer, past", [(1, 1, 0), (9, 1, 4), (3, 2, 0), (12, 6, 0), (5, 9, 11)])
def test_generating(base, prompt, answer, past):
    prefix = prefix_of(base, past) if past else None
    settings = {"max_new_tokens": answer, "min_new_tokens": answer, "do_sample": False, "pad_token_id": 0}
    cache = cache_argument(base, prefix.to_cache()) if prefix else {}
    mask = torch.ones(1, past + prompt, dtype=torch.long)
    counter = counted(lambda: base.generate(tokens(prompt), attention_mask=mask, **cache, **settings))
    cost = ModelCost.of(base.config)
    assert close(cost.generate(prompt, answer, past=past), counter)
    steps = sum(cost.read(1, past=past + prompt + step, head_rows=1) for step in range(answer - 1))
    assert cost.generate(prompt, answer, past=past) == cost.read(prompt, past=past, head_rows=1) + steps


@pytest.mark.parametrize("prompt, choices, past", [(6, [1, 1], 0), (4, [3], 5), (11, [1, 4, 2, 9], 0), (11, [5, 5, 2], 6)])
def test_scoring(base, prompt, choices, past):
    def run():
        cache = start.to_cache() if start else DynamicCache()
        read(base, prompt, cache)
        for choice in choices:
            if choice > 1:  # the first token is scored by the prompt's last row
                read(base, choice - 1, copy.deepcopy(cache), choice - 1)

    start = prefix_of(base, past) if past else None
    assert close(ModelCost.of(base.config).score(prompt, choices, past=past), counted(run))


def test_a_cached_context_is_encoded_once_and_read(base):
    cost, context, prompt, queries = ModelCost.of(base.config), 30, 7, 3

    def run():
        cache = DynamicCache()
        decoder = base.get_decoder()
        decoder(tokens(context), **cache_argument(decoder, cache), use_cache=True)
        for _ in range(queries):
            read(base, prompt, copy.deepcopy(cache))

    encode, query = cost.encode(context), cost.read(prompt, past=context, head_rows=1)
    assert close(encode + queries * query, counted(run))
    assert amortised(encode, query, queries) * queries == pytest.approx(encode + queries * query)
    # One pass over both computes the same, and the corner of the rectangle in which the context would look ahead.
    joint = cost.read(context + prompt, head_rows=1)
    assert joint - (encode + query) == cost.per_pair * context * prompt
    assert close(joint, counted(lambda: read(base, context + prompt)))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a_config_may_leave_the_head_dimension_out(kind):
    architecture = tiny_architecture(kind, num_attention_heads=2)
    del architecture["head_dim"]
    base = random_base(architecture, vocab_size=VOCABULARY)
    assert close(ModelCost.of(base.config).read(9, head_rows=1), counted(lambda: read(base, 9)))


def test_batches_of_equal_lengths_cost_their_sum(base):
    reader, prefix = Reader(base, _Tokenizer()), prefix_of(base, 4)
    prompts = [tokens(6, seed)[0].tolist() for seed in range(3)]
    settings = {"max_new_tokens": 3, "min_new_tokens": 3}
    counter = counted(lambda: reader.generate(prompts, [prefix] * 3, **settings))
    assert close(3 * ModelCost.of(base.config).generate(6, 3, past=4), counter)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_other_sizes(kind, changes):
    base = tiny_base(kind, **changes)
    cost, hypernetwork = ModelCost.of(base.config), trained_hypernetwork(base, gists=5)

    def run():
        (prefix,) = hypernetwork.compress([tokens(20)[0]])
        read(base, 7, prefix.to_cache(), head_rows=2)

    assert close(cost.compress(20, 5, hypernetwork.lora.rank) + cost.read(7, past=5, head_rows=2), counted(run))


class _Tokenizer:
    pad_token_id, eos_token_id = 0, None

    def get_vocab(self):
        return {}


def test_the_fused_kernel_gets_the_same_shapes(base):
    """The kernel that really runs on a CPU is called for as many queries and keys as the math kernel in the other tests."""

    def rectangle(query, key, value, *args, out_shape=None, **kwargs):
        batch, heads, rows, width = query
        return 4 * batch * heads * rows * key[2] * width

    hypernetwork = trained_hypernetwork(base, gists=5)
    fused = {aten._scaled_dot_product_flash_attention_for_cpu: rectangle}

    def run():
        (prefix,) = hypernetwork.compress([tokens(20)[0]])
        read(base, 7, prefix.to_cache())

    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        run()
    assert counter.get_flop_counts()["Global"].keys() >= fused.keys()
    assert counter.get_total_flops() == counted(run)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_without_a_past_and_with_one(kind):
    cost = ModelCost.of(tiny_base(kind).config)
    assert cost.read(6, past=0) == cost.read(6) == cost.encode(6)
    assert cost.generate(6, 4, past=0) == cost.generate(6, 4)
    assert cost.read(0, past=9) == 0
    # A past is paid for in attention alone, and in proportion.
    assert cost.read(6, past=8) - cost.read(6) == 8 * 6 * cost.per_pair
    assert cost.generate(6, 4, past=8) - cost.generate(6, 4) == 8 * 9 * cost.per_pair
    assert cost.score(6, [2, 3], past=8) - cost.score(6, [2, 3]) == 8 * 9 * cost.per_pair
    assert cost.score(6, [1, 1, 1]) == cost.score(6, [1]) == cost.generate(6, 1)


def test_amortised_is_linear_in_the_queries():
    totals = [n * amortised(1000, 7, n) for n in range(1, 6)]
    assert totals == pytest.approx([1000 + 7 * n for n in range(1, 6)])
    assert amortised(1000, 7, 10**9) == pytest.approx(7)
    with pytest.raises(ValueError, match="at least one query"):
        amortised(1000, 7, 0)


def test_a_known_model_by_hand():
    """Llama 3 8B: 6.98 billion weights in linear layers, 0.525 in the head, 128 KiB of cache a token in bf16."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    cost = ModelCost.of(AutoConfig.for_model("llama", num_attention_heads=32, num_key_value_heads=8, **sizes))
    assert cost.per_row == 2 * 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) == 2 * 6979321856
    assert cost.per_head_row == 2 * 525336576
    assert cost.state_bytes(1) == 128 * 1024


def test_what_is_not_known_is_refused():
    with pytest.raises(UserError, match="gpt2"):
        ModelCost.of(AutoConfig.for_model("gpt2"))
    with pytest.raises(UserError, match="sliding_window=64"):
        ModelCost.of(AutoConfig.for_model("mistral", sliding_window=64))
    cost = ModelCost.of(tiny_base().config)
    for wrong in (
        lambda: cost.read(3, head_rows=4),
        lambda: cost.read(3, past=-1),
        lambda: cost.generate(0, 1),
        lambda: cost.generate(3, 0),
        lambda: cost.score(3, []),
        lambda: cost.score(3, [2, 0]),
        lambda: cost.compress(0, 3, 4),
        lambda: cost.compress(5, 0, 4),
        lambda: cost.hint(0, 1, HintSettings()),
    ):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(ValueError, match="no linear layers"):
        cost.compress(5, 3, 4, targets="query")
