"""Precision from end to end: a run's dtype is kept and used again, and what is computed in few bits is what it should be."""

import copy
import json

import pytest
import torch
from conftest import ARCHITECTURES, VOCABULARY, tiny_base, trained_hypernetwork
from data_files import WORDS, lines, write
from launch import torchrun, zero_settings
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig

from attention_masks import sdpa
from eval.run import evaluate
from hyperllama.base.fingerprints import bit_sums
from hyperllama.commands import train as commands_train
from hyperllama.commands.compress import compress
from hyperllama.commands.generate import Session
from hyperllama.commands.inspect import inspect
from hyperllama.commands.tune import tune
from hyperllama.errors import UserError
from hyperllama.files import whole_json_lines
from hyperllama.hypernetworks.loading import load_hypernetwork
from hyperllama.inference.reader import Reader, end_tokens
from hyperllama.prefixes.prefix import Prefix
from hyperllama.recipe.loading import load_recipe


@pytest.fixture
def recipe(tmp_path, saved_base):
    rows = [{"input": w, "output": w.upper()} for w in WORDS.split()[:24]]
    write(tmp_path / "data" / "upper.jsonl", lines(rows))
    return write(
        tmp_path / "train.yaml",
        f"""
output: {tmp_path}/run
model: {{name_or_path: {saved_base}}}
gist: {{tokens: 2, kind: lora}}
hint: {{adapter_size: 2, lora_rank: 2, mlp_size: 8, fusion_rank: 2}}
lora: {{rank: 2}}
data: {{source: jsonl, root: {tmp_path}/data, shots: 3, queries: 2}}
limits: {{context_tokens: 300, query_tokens: 99}}
training: {{use_cpu: true, disable_tqdm: true, max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-2,
            logging_steps: 1}}
""",
    )


def test_a_run_in_bf16_stays_in_bf16(recipe, tmp_path):
    commands_train.train(recipe, ["model.dtype=bfloat16"])
    run, data = tmp_path / "run", tmp_path / "data" / "upper.jsonl"
    assert json.loads((run / "hypernetwork.json").read_text())["dtype"] == "bfloat16"
    assert load_hypernetwork(run)[0].base.dtype == torch.bfloat16
    assert load_hypernetwork(run, dtype="float32")[0].base.dtype == torch.float32
    ((path, prefix),) = compress(run, [data], tmp_path / "p.safetensors")
    assert Prefix.load(path).dtype == prefix.dtype == torch.bfloat16 and inspect(path)["dtype"] == "bfloat16"
    ((whole, wide),) = compress(run, [data], tmp_path / "w.safetensors", dtype="float32")
    assert wide.dtype == torch.float32 and wide.nbytes == 2 * prefix.nbytes and whole.stat().st_size > path.stat().st_size
    assert all(torch.allclose(a.float(), b, atol=0.2) for a, b in zip(prefix.values, wide.values))
    assert Session(path).reader.model.dtype == torch.bfloat16 and len(Session(path, dtype="float32").answer(["one"])) == 1
    assert Session(path, dtype="float32").reader.model.dtype == torch.float32
    changes = [f"hypernetwork={run}", f"data.root={tmp_path}/data", "data.source=jsonl", "data.queries=2", "leaks=warn"]
    changes += ["methods=[no_context,prefix,fewer_demonstrations]", f"output={tmp_path}/evaluation"]
    found = evaluate(write(tmp_path / "e.yaml", "method: evaluate\n"), changes)["methods"]
    assert found["prefix"]["state_bytes"] == prefix.nbytes
    changes = [f"start.hypernetwork={run}", f"data.root={tmp_path}/data", "data.source=jsonl", "data.queries=2", "data.shots=4"]
    changes += [f"output={tmp_path}/tuned", "training.use_cpu=true", "training.max_steps=1"]
    ((tuned, _),) = tune(write(tmp_path / "t.yaml", "method: tune\n"), changes).values()
    assert Prefix.load(tuned).dtype in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "changes, refused",
    [
        (["gist.kind=gisting"], True),
        (["gist.kind=full"], True),
        (["gist.kind=hint", "hint.regime=paper"], True),
        (["method=full_attention"], True),
        (["gist.kind=gisting", "deepspeed=zero2"], False),
        (["gist.kind=hint"], False),
        (["gist.kind=pooling"], False),
    ],
)
def test_all_weights_are_not_trained_in_few_bits(recipe, changes, refused):
    load_recipe(recipe, changes)
    if not refused:
        load_recipe(recipe, ["model.dtype=bfloat16", *changes])
        return
    with pytest.raises(UserError, match="model.dtype: bfloat16 weights lose small updates when all of them are trained"):
        load_recipe(recipe, ["model.dtype=bfloat16", *changes])


@pytest.mark.slow
@pytest.mark.parametrize("kind, stage", [("pooling", 2), ("hint", 3)])
def test_kinds_train_in_bf16_under_deepspeed(recipe, tmp_path, kind, stage):
    pytest.importorskip("deepspeed")
    few = ["training.max_steps=4", f"gist.kind={kind}"]
    commands_train.train(recipe, [*few, "training.gradient_accumulation_steps=2", f"output={tmp_path}/one"])
    settings = json.loads(zero_settings(tmp_path, stage).read_text()) | {"bf16": {"enabled": "auto"}}
    file = write(tmp_path / "bf16.json", json.dumps(settings))
    torchrun("train", recipe, f"deepspeed={file}", "training.bf16=true", *few)
    one, ranks = (
        [x["loss"] for x in whole_json_lines(tmp_path / run / "metrics.jsonl") if "loss" in x] for run in ("one", "run")
    )
    assert len(one) == len(ranks) == 4 and ranks == pytest.approx(one, rel=0.02)


OF_CHECKPOINTS = {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version"}  # what these say is no setting
UNLIKE = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 3,
    "top_p": 0.5,
    "typical_p": 0.5,
    "min_p": 0.3,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "top_h": 0.5,
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 1.5,
    "length_penalty": 2.0,
    "num_beams": 3,
    "min_length": 12,
    "min_new_tokens": 8,
    "max_length": 3,
    "max_new_tokens": 1,
    "max_time": 0.0,
    "early_stopping": True,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 2,
    "suppress_tokens": list(range(0, 90)),
    "begin_suppress_tokens": list(range(0, 90)),
    "bad_words_ids": [[i] for i in range(20, 90)],
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "exponential_decay_length_penalty": (1, 1.5),
    "sequence_bias": [[[7], 9.0]],
    "guidance_scale": 2.0,
    "watermarking_config": {"bias": 5.0},
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_checkpoint_changes_no_setting(name):
    """What is greedy is greedy: no default of a checkpoint's generation config is taken over unasked."""
    base = tiny_base()
    (prefix,) = trained_hypernetwork(base).compress([[3, 4, 5, 6]])
    prompts = [[7, 8, 9], [10, 11]]
    expected = Reader(base, _Tokenizer()).generate(prompts, [prefix] * 2, max_new_tokens=6)
    if name not in GenerationConfig().to_dict() and not hasattr(GenerationConfig(), name):
        pytest.skip("not a setting of this version of transformers")
    config = copy.deepcopy(base.generation_config)
    setattr(config, name, UNLIKE[name])
    base.generation_config = config
    assert Reader(base, _Tokenizer()).generate(prompts, [prefix] * 2, max_new_tokens=6) == expected
    assert base.generation_config is config, "it is the model's again afterwards"


# Of what a generation config may say, what is not tried above: it names no setting of how a token is chosen.
OF_OTHERS = {
    "_from_model_config",
    "num_return_sequences",
    "use_cache",
    "return_dict_in_generate",
    "token_healing",
    "low_memory",
}
OF_OTHERS |= {"output_attentions", "output_hidden_states", "output_logits", "output_scores", "decoder_start_token_id"}
OF_OTHERS |= {
    "cache_config",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    "max_cache_len",
    "prefill_chunk_size",
}
OF_OTHERS |= {"continuous_batching_config", "encoder_no_repeat_ngram_size", "stop_strings", "use_mtp"}
# Of other ways to generate, each of which needs a model, a list or a function beside it.
OF_OTHERS |= {"assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind"}
OF_OTHERS |= {"is_assistant", "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"}
OF_OTHERS |= {"prompt_lookup_num_tokens", "target_lookbehind", "speculation_type", "constraints", "force_words_ids"}
OF_OTHERS |= {"dola_layers", "penalty_alpha", "diversity_penalty", "num_beam_groups"}


def test_all_that_a_checkpoint_may_say_is_listed():
    """A new version of transformers with a new setting fails here, so that it is tried above."""
    assert not set(GenerationConfig().to_dict()) - set(UNLIKE) - OF_CHECKPOINTS - OF_OTHERS


def test_all_end_tokens_of_a_checkpoint_end_an_answer():
    base = tiny_base()
    (prefix,) = trained_hypernetwork(base).compress([[3, 4, 5, 6]])
    (free,) = Reader(base, _Tokenizer()).generate([[7, 8, 9]], [prefix], max_new_tokens=6)
    base.generation_config.eos_token_id = [2, free[3]]
    assert end_tokens(base, _Tokenizer()) == sorted({2, free[3]})
    (ended,) = Reader(base, _Tokenizer()).generate([[7, 8, 9]], [prefix], max_new_tokens=6)
    assert ended == free[: free.index(free[3])]


class _Tokenizer:
    pad_token_id, eos_token_id = 0, 2

    def get_vocab(self):
        return {str(i): i for i in range(VOCABULARY)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_sums_of_bits_tell_any_change_of_one(dtype):
    torch.manual_seed(0)
    x = (100 * torch.randn(5, 7)).to(dtype)
    sums = bit_sums(x, block=8)
    assert sums == bit_sums(x) == bit_sums(x.clone())
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    for place in (0, 8, 34):
        for bit in range(8 * x.element_size()):
            changed = x.clone()
            flat = changed.view(-1).view(bits)
            one = -(1 << bit) if bit == 8 * x.element_size() - 1 else 1 << bit
            flat[place] ^= one
            assert all(a != b for a, b in zip(bit_sums(changed, block=8), sums)), (place, bit)
    assert bit_sums(x.flip(0))[1] != sums[1], "order counts"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_fingerprint_follows_the_weights_and_not_their_place(kind):
    hypernetwork = trained_hypernetwork(tiny_base(kind))
    first = hypernetwork.fingerprint()
    weight = hypernetwork.gists
    with torch.no_grad():
        weight.data[0, 0] += 1e-3  # as DeepSpeed changes weights: no version counter sees it
    assert hypernetwork.fingerprint() != first
    with torch.no_grad():
        weight.data[0, 0] -= 1e-3
    hypernetwork.gists = torch.nn.Parameter(weight.detach().clone())
    assert (hypernetwork.fingerprint() == first) == torch.equal(weight, hypernetwork.gists)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_heads_are_repeated_on_a_gpu_where_no_fused_kernel_takes_them(monkeypatch, on_gpu, masked, dtype):
    q, k, v = (torch.randn(2, heads, rows, 8, dtype=dtype) for heads, rows in ((6, 5), (3, 7), (3, 7)))
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2) if masked else None
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    seen = []

    def watch(q, k, v, **settings):
        seen.append((k.shape[1], settings["enable_gqa"]))
        return scaled_dot_product_attention(q, k, v, **settings)

    monkeypatch.setattr(sdpa, "_on_gpu", lambda x: on_gpu)
    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", watch)
    torch.testing.assert_close(sdpa.grouped_attention(q, k, v, attn_mask=mask), expected)
    assert seen == [(6, False) if on_gpu and (masked or dtype == torch.float32) else (3, True)]


@pytest.mark.parametrize("rows", [7, 300])
def test_few_rows_in_16_bits_are_computed_in_float32_where_gradients_are_wanted(rows, monkeypatch):
    """A CPU is slower in 16 bits then: outputs and gradients are those of float32, rounded once; of many rows, as they were."""
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, rows, 8, generator=numbers).bfloat16().requires_grad_() for heads in (4, 2, 2))
    given = torch.randn(1, 4, rows, 8, generator=numbers).bfloat16()

    def found(*states, dtype=torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            output = sdpa.grouped_attention(*states, attn_mask=None, is_causal=True)
        return [output, *torch.autograd.grad(output, states, given.to(dtype))]

    exact = found(*(x.detach().double().requires_grad_() for x in (q, k, v)), dtype=torch.double)
    short = found(q, k, v)
    assert all(x.dtype == torch.bfloat16 for x in short)
    same = all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(short, exact))
    assert same == (rows == 7)
    monkeypatch.setattr(sdpa, "SHORT_ROWS", 0)
    for a, b in zip(found(q, k, v), exact):
        torch.testing.assert_close(a.double(), b, atol=0.03, rtol=0.03)
    in_16_bits = found(q, k, v)[0]
    monkeypatch.undo()
    with torch.no_grad():  # nothing is gained without gradients
        assert torch.equal(sdpa.grouped_attention(q, k, v, attn_mask=None, is_causal=True), in_16_bits)
