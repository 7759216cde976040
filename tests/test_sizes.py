"""Places and counts at the sizes of large models and long contexts: whole numbers, whatever their size."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from attention_masks import GistLayout, Segment, rotate
from eval.flops import ModelCost
from eval.memory import Parameters, Zero, model_states
from eval.sizing import bare_model, largest_episode
from hyperllama.base.fingerprints import spread, spread_sample
from hyperllama.commands.train import packing_of
from hyperllama.data.packing import pack_gist
from hyperllama.objectives.losses import LOGITS, head_chunks
from hyperllama.recipe.loading import load_recipe

LLAMA = "recipes/models/meta-llama--Llama-2-7b-hf"
RECIPE = "recipes/train/llama-2-7b-mixture.yaml"


@pytest.fixture(scope="module")
def llama():
    """Llama-2 7B without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(LLAMA))


@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 257, 2**24, 2**24 + 1, 49_152 * 576, 2**31 + 11, 2**40 + 3])
def test_places_are_exact(size):
    count = min(256, size)
    assert spread(256, size).tolist() == [i * (size - 1) // max(1, count - 1) for i in range(count)]
    if size:
        assert (spread(256, size)[0], spread(256, size)[-1]) == (0, size - 1)


@pytest.mark.parametrize("shape", [(2**24 + 1,), (2**16 + 1, 2**15 + 1), (3, 2**31 + 1)])
def test_a_sample_of_a_parameter_of_any_size(shape):
    assert spread_sample(torch.ones(1).expand(shape), 256).tolist() == [1.0] * 256


def test_a_sample_goes_by_the_order_of_entries_and_not_of_memory():
    x = torch.arange(700.0).view(20, 35)
    assert torch.equal(spread_sample(x.T, 9), x.T.flatten()[spread(9, 700)])
    assert spread_sample(torch.tensor(5.0), 9).tolist() == [5.0]
    assert spread_sample(torch.zeros(0, 3), 9).shape == (0,)


def test_every_parameter_of_llama_2_7b_has_its_sample(llama):
    largest = 0
    for name, parameter in llama.named_parameters():
        places = spread(256, parameter.numel())
        assert (places[0], places[-1]) == (0, parameter.numel() - 1), name
        assert spread_sample(parameter, 256).shape == (256,)
        largest = max(largest, parameter.numel())
    assert largest > 2**24


def test_counts_of_llama_2_7b_are_its_parameters(llama):
    recipe, counted = load_recipe(RECIPE, data=False), sum(p.numel() for p in llama.parameters())
    counts = Parameters.of(bare_model(recipe, llama.config))
    assert counts.frozen == counted
    assert head_chunks(10**6, llama.config.vocab_size) * (LOGITS // llama.config.vocab_size) >= 10**6
    cast = Parameters.of(bare_model(recipe, llama.config, deepspeed=True))
    assert model_states(cast, Zero("zero1", 1), gpus=1, nodes=1).weights == 2 * (counted + counts.trained)
    assert isinstance(ModelCost.of(llama.config).encode(10**6), int)


def test_positions_of_a_long_context(llama):
    recipe = load_recipe(RECIPE, ["limits.context_tokens=100000", "gist.chunking.graph=parallel"], data=False)
    batch = pack_gist([largest_episode(recipe)], packing_of(recipe))
    assert batch.layout.positions.dtype == torch.int64
    chunks = [Segment(2**16, gists=16) for _ in range(260)]
    layout = GistLayout([*chunks, Segment(5, reads=tuple(range(260)))])
    assert layout.tokens == 260 * 2**16 + 5 > 2**24
    assert layout.gist_rows.tolist() == [(i + 1) * 2**16 - 16 + j for i in range(260) for j in range(16)]
    assert layout.positions[-5:].tolist() == [layout.starts[-1] + i for i in range(5)]


def test_a_key_that_the_model_rotated_far_away_comes_back(llama):
    rotary, places = LlamaRotaryEmbedding(llama.config), torch.tensor([131_071, 1_000_003, 2**24 - 1])
    keys = torch.randn(1, 2, 3, 128)
    there = apply_rotary_pos_emb(keys, keys, *rotary(keys, places[None]))[1]
    assert not torch.allclose(there, keys, atol=0.1)
    assert torch.allclose(rotate(there, -places, rotary.inv_freq), keys, atol=1e-5)
