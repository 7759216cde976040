"""Gist attention in stock models, and the refusal of models whose attention is something else."""

import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import VOCABULARY, tiny_architecture, tiny_base
from layouts import MANY
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, set_seed

from attention_masks import GistLayout, Segment, dense_mask
from hyperllama.base.checks import check_config, prepare
from hyperllama.base.decoder import cache_argument, packed_arguments
from hyperllama.base.fingerprints import identify
from hyperllama.base.loading import load_base, random_base
from hyperllama.errors import UserError


def test_registered_on_call_never_on_import():
    code = (
        "import sys, attention_masks; assert 'transformers' not in sys.modules and 'matplotlib' not in sys.modules;"
        "from transformers import AttentionInterface, AttentionMaskInterface;"
        "import attention_masks.registration;"
        "assert 'gist' not in AttentionInterface() and 'gist' not in AttentionMaskInterface();"
        "assert attention_masks.register() == attention_masks.register() == 'gist';"
        "assert 'gist' in AttentionInterface() and 'gist' in AttentionMaskInterface()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [n for n in MANY if not MANY[n].shifted])
def test_packed_model_equals_stock_eager_attention_under_the_dense_mask(base, name):
    layout = MANY[name]
    ids = torch.randint(3, VOCABULARY, (1, layout.tokens))
    packed = base(input_ids=ids, use_cache=False, **packed_arguments(base, layout)).logits
    base.set_attn_implementation("eager")
    mask = torch.zeros(1, 1, layout.tokens, layout.tokens).masked_fill(~dense_mask(layout), torch.finfo(torch.float32).min)
    stock = base(input_ids=ids, use_cache=False, attention_mask=mask, position_ids=layout.positions[None]).logits
    torch.testing.assert_close(packed, stock, atol=1e-4, rtol=1e-4)


# Prefixes of different sizes first, and readers of one or of both.
STORED = (Segment(2, gists=2), Segment(3, gists=3))
READ_BEHIND = {
    "plain": GistLayout([*STORED, Segment(4, reads=(0,)), Segment(3, reads=(1,))]),
    "shifted": GistLayout([*STORED, Segment(4, reads=(0, 1)), Segment(1, reads=(0,)), Segment(2)]),
}


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_a_layout_that_moves_keys_equals_its_segments_run_one_after_the_other(base, backend):
    """Where gists stand: the sequential run with a cache, in which each reader starts right after what it reads."""
    layout = MANY["recurrent"]
    ids = torch.randint(3, VOCABULARY, (1, layout.tokens))
    packed = base(input_ids=ids, use_cache=False, **packed_arguments(base, layout, backend)).logits
    for i, (rows, logits) in enumerate(sequential(base, ids, layout)):
        torch.testing.assert_close(packed[:, rows], logits, atol=1e-4, rtol=1e-4, msg=f"segment {i}")


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
@pytest.mark.parametrize("name", ["plain", "shifted"])
def test_rows_that_stand_apart_are_rows_whose_keys_and_values_are_replaced(base, backend, name):
    """Of the first rows only keys and values are there: the others' outputs and gradients are the same."""
    layout = READ_BEHIND[name]
    first = len(layout.gist_rows)
    heads, width = base.config.num_key_value_heads, base.config.head_dim
    states = [
        tuple(torch.randn(heads, first, width, requires_grad=True) for _ in "kv") for _ in range(base.config.num_hidden_layers)
    ]
    ids = torch.randint(3, VOCABULARY, (1, layout.tokens))
    found = []
    for apart in (False, True):
        arguments = packed_arguments(base, layout, backend, states, apart)
        logits = base(input_ids=ids[:, first if apart else 0 :], use_cache=False, **arguments).logits[0]
        kept = logits if apart else logits[first:]
        found.append([kept, *torch.autograd.grad(kept.square().sum(), [x for pair in states for x in pair])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def sequential(base, ids, layout):
    """Run segments one by one behind a cache of the gists that they read, each at positions 0, 1, 2, ... of its own."""
    from hyperllama.prefixes.prefix import Prefix

    states, results = [], []
    for segment, row in zip(layout.segments, layout.row_starts):
        rows = slice(row, row + segment.tokens)
        count = sum(layout.segments[j].gists for j in segment.reads)
        arguments = {"attention_mask": torch.ones(1, count + segment.tokens, dtype=torch.long), "use_cache": True}
        cache = Prefix.to_cache(join(base, [states[j] for j in segment.reads])) if segment.reads else DynamicCache()
        results.append((rows, base(input_ids=ids[:, rows], **arguments, **cache_argument(base, cache)).logits))
        gists = slice(count + segment.tokens - segment.gists, None)
        keys, values = zip(*((k[0, :, gists], v[0, :, gists]) for k, v, *_ in cache))
        states.append((keys, values, count + segment.tokens - segment.gists))
    return results


def join(base, parts):
    """Gists of several segments behind each other at positions 0, 1, 2, ..., moved by the model's own rotary code."""
    from hyperllama.prefixes.prefix import Prefix

    apply = sys.modules[type(base).__module__].apply_rotary_pos_emb
    keys, values = [], []
    for layer in range(base.config.num_hidden_layers):
        moved, place = [], 0
        for part_keys, _, position in parts:
            key = part_keys[layer][None]  # (1, N, G, D)
            cos, sin = base.get_decoder().rotary_emb(key, torch.full((1, key.shape[2]), abs(place - position)))
            sin = sin if place >= position else -sin
            # The model multiplies yarn's scaling into cosines and sines; the key carries it already.
            moved.append(apply(key, key, cos, sin)[1][0] / base.get_decoder().rotary_emb.attention_scaling)
            place += key.shape[2]
        keys.append(torch.cat(moved, 1))
        values.append(torch.cat([part[1][layer] for part in parts], 1))
    return Prefix(keys, values)


def test_without_a_layout_the_model_is_stock_sdpa(base):
    ids = torch.randint(3, VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ours = base(input_ids=ids, attention_mask=mask).logits
    base.set_attn_implementation("sdpa")
    assert torch.equal(ours, base(input_ids=ids, attention_mask=mask).logits)


def test_no_mask_of_the_whole_row_is_built(monkeypatch):
    base, layout = tiny_base(), MANY["batch"]

    def refuse(*args, **kwargs):
        raise AssertionError("a T x T mask was built")

    monkeypatch.setitem(transformers.AttentionMaskInterface()._global_mapping, "gist", refuse)
    base(input_ids=torch.zeros(1, layout.tokens, dtype=torch.long), use_cache=False, **packed_arguments(base, layout))


def test_a_moved_layout_without_frequencies_is_an_error():
    base, layout = tiny_base(), MANY["recurrent"]
    arguments = {**packed_arguments(base, layout), "gist_inv_freq": None}
    with pytest.raises(ValueError, match="needs gist_inv_freq"):
        base(input_ids=torch.zeros(1, layout.tokens, dtype=torch.long), use_cache=False, **arguments)


def enable(model):
    """As the installed version of transformers' Trainer does."""
    if hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def test_gradient_checkpointing_computes_the_same(base):
    from conftest import trained_hypernetwork

    from hyperllama.data.packing import pack_gist
    from hyperllama.data.text import EncodedEpisode

    hypernetwork = trained_hypernetwork(base).train()
    batch = pack_gist([EncodedEpisode(tuple(range(3, 12)), (((4, 5), (6, 7)), ((8,), (9,))))], 3)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable(hypernetwork)
        hypernetwork.zero_grad()
        hypernetwork(batch).sum.backward()
        gradients.append([p.grad.clone() for p in hypernetwork.trainable().values()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


REFUSED = [
    ("mistral", {"sliding_window": 64}, "sliding_window=64"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window=64"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='dynamic'"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("gemma2", {"sliding_window": 64}, "sliding_window=64"),
    ("smollm3", {"pad_token_id": 0, "no_rope_layers": [1, 0]}, "no_rope_layers"),
]


@pytest.mark.parametrize("kind, changes, attribute", REFUSED, ids=[f"{k}-{a}" for k, _, a in REFUSED])
def test_other_attention_is_refused_by_name(kind, changes, attribute):
    config = AutoConfig.for_model(**tiny_architecture(kind, **changes))
    with pytest.raises(UserError, match=f"base: .*{attribute}"):
        check_config(config, "base")


def test_a_model_without_rotary_positions_is_refused():
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(UserError, match="rope_parameters=None"):
        prepare(AutoModelForCausalLM.from_config(config), "base")


def test_a_model_that_pairs_dimensions_differently_is_refused():
    config = AutoConfig.for_model(**tiny_architecture("cohere"), vocab_size=64, pad_token_id=0)
    with pytest.raises(UserError, match="apply_rotary_pos_emb of CohereForCausalLM"):
        prepare(AutoModelForCausalLM.from_config(config), "base")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_positions_are_read_right(rope):
    base = tiny_base(rope_parameters={"rope_theta": 1e4, **rope})
    layout = MANY["recurrent"]
    ids = torch.randint(3, VOCABULARY, (1, layout.tokens))
    packed = base(input_ids=ids, use_cache=False, **packed_arguments(base, layout)).logits
    for rows, logits in sequential(base, ids, layout):
        torch.testing.assert_close(packed[:, rows], logits, atol=1e-4, rtol=1e-4)


def test_a_layout_longer_than_the_model_is_refused():
    from attention_masks import GistLayout, Segment

    base = tiny_base(max_position_embeddings=16)
    with pytest.raises(UserError, match="takes 17 positions, but the model has 16"):
        packed_arguments(base, GistLayout([Segment(12, gists=2), Segment(5, reads=(0,))]))


def test_identity_knows_a_model_in_two_dtypes_but_not_another(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "m")
    in_bf16 = load_base(str(tmp_path / "m"), dtype="bfloat16")
    assert identify(base).weights == identify(in_bf16).weights
    assert identify(base).weights != identify(tiny_base(seed=1)).weights
    with torch.no_grad():
        in_bf16.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    assert identify(base).weights != identify(in_bf16).weights


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: folder, "not a model folder, it has no config.json"),
        (lambda folder: folder / "nowhere", "no such model folder"),
        (lambda folder: (folder / "file.txt").write_text("x") and folder / "file.txt", "a file, but a base model is a folder"),
    ],
    ids=["empty", "missing", "file"],
)
def test_a_folder_that_is_not_a_model_is_named(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        load_base(str(make(tmp_path)))


def test_a_model_type_that_does_not_exist_is_named():
    set_seed(0)
    with pytest.raises(UserError, match=r"model.architecture: Unrecognized model identifier: llame"):
        random_base({"model_type": "llame"}, vocab_size=10)


def test_a_base_whose_files_lack_weights_is_refused(saved_base, tmp_path):
    """transformers would make them random, with a warning."""
    shutil.copytree(saved_base, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 of its weights are not in its files, model.layers.1.mlp.up_proj.weight first"):
        load_base(str(tmp_path / "base"))


def test_a_cache_has_the_name_that_a_model_gives_it(base):
    class Other(torch.nn.Module):
        def forward(self, ids, past_key_values=None):
            """As models outside transformers still have it."""

    cache = DynamicCache()
    assert cache_argument(Other(), cache) == {"past_key_values": cache}
    for model in (base, base.get_decoder()):
        (name,) = cache_argument(model, cache)
        assert name == ("cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values")
