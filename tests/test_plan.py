"""The plan of a training run: by hand, and against DeepSpeed's estimators, autograd's saved tensors and torch's counter."""

import contextlib
import json
import re
import weakref

import pytest
import torch
from conftest import VOCABULARY, tiny_architecture, tiny_base
from data_files import lines, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, set_seed
from typer.testing import CliRunner

from eval.check import check
from eval.flops import ModelCost
from eval.memory import (
    NF4_BYTES,
    SETTINGS,
    Parameters,
    Precision,
    Zero,
    activations,
    model_states,
    precision,
)
from eval.plan import plan
from eval.sizing import Hardware, base_config, largest_episode, parameters
from hyperllama import backbone, cli
from hyperllama.backbone import random_base
from hyperllama.data.packing import pack_full, pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.errors import UserError
from hyperllama.full_attention import FullAttention
from hyperllama.hypernetwork import GistHypernetwork
from hyperllama.recipe import LoraRecipe, ModelRecipe, Recipe, load_recipe

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_7B |= {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 16}
WIDE = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
PURE = {"half": True, "deepspeed": True}  # DeepSpeed's bf16: every weight is cast, nothing runs under autocast


def episodes(count, context, queries, prompt, answer, spread=0):
    """Episodes of given lengths; with `spread`, no two contexts or queries are as long as each other."""
    return [
        EncodedEpisode(
            (5,) * (context + spread * i), tuple(((7,) * (prompt + spread * j), (8,) * answer) for j in range(queries))
        )
        for i in range(count)
    ]


def built(kind, size, *, full=False, dtype="float32", pure=False, checkpointing=False, lora=None):
    set_seed(0)
    base = random_base(tiny_architecture(kind, **size), vocab_size=VOCABULARY, dtype=dtype)
    model = FullAttention(base, None) if full else GistHypernetwork(base, gists=8, **(lora or {"rank": 8}))
    if pure:
        model.to(torch.bfloat16)
    if checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


def saved_bytes(model, run) -> int:
    """Bytes of all storages that autograd keeps while `run` runs, without those of the model itself."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


class Living(TorchDispatchMode):
    """Counts the bytes of storages that operations make, for as long as they live; `peak` is the most at one time."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.storages = {id_of(tensor.untyped_storage()) for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key, size = id_of(storage), storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.now -= size
        self.storages.discard(key)


def id_of(storage) -> int:
    return storage.data_ptr()


def autocast(on):
    return torch.autocast("cpu", dtype=torch.bfloat16) if on else contextlib.nullcontext()


# kind, size, episodes; layouts with and without reordering, one query a run and several
SHAPES = {
    "tiny llama": (
        "llama",
        {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3},
        episodes(3, 60, 2, 20, 4, 3),
    ),
    "small qwen3": ("qwen3", SMALL, episodes(2, 200, 3, 40, 6, 7)),
    "wide llama": ("llama", WIDE | {"num_hidden_layers": 3}, episodes(1, 300, 4, 30, 8)),
}
HOW = {
    "float32": {},
    "bfloat16 base": {"dtype": "bfloat16"},
    "autocast": {"half": True},
    "bfloat16 base, autocast": {"dtype": "bfloat16", "half": True},
    "DeepSpeed bf16": {"dtype": "bfloat16", **PURE},
    "two targets": {"lora": {"rank": 8, "targets": ["q_proj", "down_proj"]}},
    "full": {"full": True},
    "full, autocast": {"full": True, "half": True},
    "full, bfloat16": {"full": True, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_agree_with_what_is_measured(shape, how, checkpointing):
    """What autograd saves in forward, and all that lives at the peak of forward and backward, both within 15 %."""
    (kind, size, data), how = SHAPES[shape], HOW[how]
    full, half, deepspeed = (how.get(name, False) for name in ("full", "half", "deepspeed"))
    dtype, lora = how.get("dtype", "float32"), how.get("lora", {"rank": 8})
    model = built(kind, size, full=full, dtype=dtype, pure=deepspeed, checkpointing=checkpointing, lora=lora)
    batch = pack_full(data) if full else pack_gist(data, 8)
    expected = activations(
        ModelCost.of(model.base.config),
        batch.layout,
        len(batch.targets),
        precision(dtype=dtype, quantize=None, half=half, full=full, deepspeed=deepspeed),
        checkpointing=checkpointing,
        **({"rank": None} if full else lora),
    )
    casts = half and not deepspeed
    with autocast(casts):
        saved = saved_bytes(model, lambda: model(batch))
    assert expected.saved == pytest.approx(saved, rel=0.06)  # the rest are indices of the layout
    living = Living([*model.parameters(), *model.buffers()])
    with living:
        with autocast(casts):
            loss = model(batch).sum
        loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    # A plan counts gradients as there all the time.
    assert expected.peak + gradients == pytest.approx(living.peak, rel=0.15)
    if not full:
        assert expected.peak == pytest.approx(living.peak - gradients, rel=0.15)


def test_logits_are_the_peak_where_the_vocabulary_is_large():
    set_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base = random_base(tiny_architecture("llama", **size), vocab_size=20_000)
    model, batch = GistHypernetwork(base, gists=2, rank=2), pack_gist(episodes(1, 20, 4, 5, 20), 2)
    float32 = precision(dtype="float32", quantize=None, half=False, full=False, deepspeed=False)
    expected = activations(ModelCost.of(base.config), batch.layout, 80, float32, rank=2)
    assert expected.logits == 3 * 80 * 20_000 * 4 > 10 * expected.kept
    assert expected.peak == expected.kept + expected.logits
    living = Living([*model.parameters(), *model.buffers()])
    with living:
        model(batch).sum.backward()
    assert living.peak == pytest.approx(expected.peak, rel=0.05)


def test_a_layer_by_hand():
    """One frozen layer in float32, LoRA on keys: term by term as its module keeps it."""
    config = AutoConfig.for_model(**tiny_architecture("llama", num_hidden_layers=1), vocab_size=50)
    batch = pack_gist(episodes(1, 7, 1, 3, 2), 3)  # 10 rows of context, 4 that read 3 gists
    float32 = Precision(4, 4, 4)
    found = activations(ModelCost.of(config), batch.layout, 2, float32, rank=5, targets=["k_proj"])
    rows, context, hidden, inner, heads, kv_heads, width = 14, 10, 32, 48, 4, 2, 8
    norms = 3 * rows * (hidden + 1)
    attention = rows * (2 * heads * width + heads + 2 * kv_heads * width) + 2 * (4 + 3) * kv_heads * width + 4 * 7
    mlp = 3 * (rows - context) * inner  # the last layer's is for the query only
    lora = rows * hidden + context * 5
    assert found.kept == 4 * (norms + attention + mlp + lora + 2 * rows * width)
    assert found.saved == found.kept + 4 * 2 * 50
    dropped = activations(ModelCost.of(config), batch.layout, 2, float32, rank=5, targets=["k_proj"], dropout=0.1)
    assert dropped.kept - found.kept == context * hidden * (4 + 1) - rows * hidden * 4


@pytest.mark.parametrize("gpus, nodes", [(1, 1), (2, 1), (4, 1), (8, 1), (8, 4)])
def test_model_states_are_those_of_deepspeeds_estimators(gpus, nodes):
    """All parameters trained in 16 bits by Adam, which is what its estimators assume."""
    zero2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2").estimate_zero2_model_states_mem_needs
    zero3 = pytest.importorskip("deepspeed.runtime.zero.stage3").estimate_zero3_model_states_mem_needs
    count = Parameters(6_000_000_000, 700_000_000, 0, 131_072_000, full=True)
    half = precision(dtype="bfloat16", quantize=None, half=True, full=True, deepspeed=True)
    place = {"num_gpus_per_node": gpus, "num_nodes": nodes}
    for setting in SETTINGS:
        ours = model_states(count, half, setting, gpus=gpus, nodes=nodes)
        if setting.stage == 2:
            host, gpu = zero2(count.trained, cpu_offload=setting.offload, **place)
        elif setting.stage == 3:
            host, gpu, _ = zero3(
                count.trained, count.largest, cpu_offload=setting.offload, cpu_offload_params=setting.offload, **place
            )
        else:
            continue
        assert ours.total - ours.buffers == pytest.approx(gpu, rel=1e-6)
        if setting.offload and (setting.stage == 3 or (nodes == 1 and gpus <= 4)):
            assert ours.host == pytest.approx(host, rel=1e-6)


def test_model_states_by_hand():
    count = Parameters(linear=1_000_000, other=100_000, added=10_000, largest=60_000, full=False)
    nodes = {"gpus": 4, "nodes": 1}
    float32 = precision(dtype="float32", quantize=None, half=False, full=False, deepspeed=False)
    alone = model_states(count, float32, SETTINGS[0], gpus=1, nodes=1)
    assert (alone.weights, alone.gradients, alone.optimiser) == (4_440_000, 40_000, 80_000)
    assert model_states(count, float32, SETTINGS[0], **nodes).gradients == 80_000  # and the buckets of DDP
    half = precision(dtype="float32", quantize=None, half=True, full=False, deepspeed=True)
    zero1, zero2, zero3 = (model_states(count, half, setting, **nodes) for setting in SETTINGS[1:4])
    assert zero1.weights == zero2.weights == 2 * 1_110_000
    assert (zero1.gradients, zero2.gradients) == (20_000 + 10_000, 5_000 + 10_000)
    assert zero1.optimiser == zero2.optimiser == 30_000
    assert zero3.weights == 2 * 1_110_000 // 4 + 2 * 60_000
    assert (zero3.gradients, zero3.buffers) == (10_000, 2 * (1_100_000 - 60_000) + 5_000)
    offload2, offload3 = (model_states(count, half, setting, **nodes) for setting in SETTINGS[4:])
    assert (offload2.weights, offload2.gradients, offload2.optimiser) == (2 * 1_110_000, 0, 0)
    assert (offload2.host, offload3.host) == (16 * 10_000 * 1.5, (16 * 10_000 + 2 * 1_110_000) * 1.5)
    assert offload3.weights == 2 * 60_000
    nf4 = precision(dtype="bfloat16", quantize="nf4", half=True, full=False, deepspeed=False)
    assert pytest.approx(0.516, abs=1e-3) == NF4_BYTES
    assert model_states(count, nf4, Zero(None), gpus=1, nodes=1).weights == int(1e6 * NF4_BYTES + 2e5 + 4e4)


@pytest.mark.parametrize("targets", [[], ["q_proj", "down_proj"]])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_parameters_are_those_of_the_model_that_is_built(kind, targets):
    architecture = tiny_architecture(kind, num_hidden_layers=3)
    model = ModelRecipe(architecture=architecture, vocab_size=VOCABULARY)
    recipe = Recipe(output="out", model=model, lora=LoraRecipe(rank=4, targets=targets))
    counts = parameters(recipe, base_config(recipe))
    real = GistHypernetwork(tiny_base(kind, num_hidden_layers=3), gists=16, rank=4, targets=targets or "all-linear")
    assert counts.trained == sum(p.numel() for p in real.trainable().values())
    assert counts.frozen == sum(p.numel() for p in real.base.parameters()) and counts.linear < counts.frozen
    full = parameters(Recipe(method="full_attention", output="out", model=model), base_config(recipe))
    assert (full.trained, full.frozen) == (counts.frozen, 0)


def test_a_known_model_by_hand():
    """Llama 2 7B: 6.738 billion parameters, and LoRA of rank 8 on all linear layers but four of the last layer's."""
    recipe = Recipe(output="out", model=ModelRecipe(architecture=LLAMA_7B, vocab_size=32000), lora=LoraRecipe(rank=8))
    counts = parameters(recipe, base_config(recipe))
    assert counts.frozen == 6_738_415_616 and counts.largest == 32000 * 4096
    row = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert counts.added == 16 * 4096 + 8 * (31 * row + 2 * (4096 + 4096))


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "up_proj"]])
@pytest.mark.parametrize("full", [False, True], ids=["hypernetwork", "full"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_flops_of_a_step_are_those_that_torch_counts(targets, full, checkpointing):
    lora = {"rank": 4, "targets": targets}
    model = built("qwen3", {"num_hidden_layers": 3}, full=full, checkpointing=checkpointing, lora=lora)
    data = episodes(2, 30, 2, 9, 4, 3)
    batch = pack_full(data) if full else pack_gist(data, 8)
    step = ModelCost.of(model.base.config).train(
        batch.layout, len(batch.targets), checkpointing=checkpointing, **({} if full else lora)
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(batch).sum
        forward = counter.get_total_flops()
        loss.backward()
    assert step.forward == pytest.approx(forward, rel=1e-3)
    assert step.total == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.fixture
def recipe(tmp_path, saved_base):
    rows = [{"input": f"{i} " + "x" * (i % 60), "output": str(i)} for i in range(60)]
    write(tmp_path / "data" / "one.jsonl", lines(rows))
    return write(
        tmp_path / "r.yaml",
        f"""
output: {tmp_path}/run
model: {{name_or_path: {saved_base}}}
gist: {{tokens: 4}}
data: {{source: jsonl, root: {tmp_path}/data, shots: 5, queries: 2}}
limits: {{context_tokens: 300, query_tokens: 75, too_long_query: skip}}
training: {{max_steps: 7, per_device_train_batch_size: 2, gradient_accumulation_steps: 3}}
""",
    )


def shipped(tmp_path, monkeypatch, name="owner/model", **changes):
    """The config of a hub model, as it is shipped; the tests have no hub to ask."""
    folder = tmp_path / "shipped"
    write(folder / name.replace("/", "--") / "config.json", {**LLAMA_7B, **changes})
    monkeypatch.setattr(backbone, "SHIPPED_CONFIGS", folder)
    return f"model.name_or_path={name}"


def figures(text: str) -> dict[str, list[float]]:
    """The table of a report: weights, gradients, optimiser, buffers, activations, logits, a layer, peak."""
    found = re.findall(r"^  (no ZeRO|ZeRO-\d(?: offload)?)((?: +[\d,.]+)+) ", text, re.M)
    return {name: [float(cell.replace(",", "")) for cell in cells.split()][:8] for name, cells in found}


def test_the_report_with_data(recipe):
    text = check(recipe, hardware=Hardware.of(gpus=2, nodes=2), episodes=20)
    assert "tasks           1: one" in text and "drawn from the data" in text
    assert "one step        24 episodes (6 a GPU)" in text and "steps           7 (training.max_steps)" in text
    assert "type deepspeed=null" in text and set(figures(text)) == {str(setting) for setting in SETTINGS}
    epochs = check(recipe, ["training.max_steps=-1"], hardware=Hardware.of(gpus=1), episodes=20)
    assert "steps           15 (3 epochs of 60 examples)" in epochs


def test_the_report_without_data_or_tokenizer(recipe, tmp_path, monkeypatch):
    base = shipped(tmp_path, monkeypatch)
    text = check(recipe, [base, "data.root=/nowhere", "model.dtype=bfloat16"], hardware=Hardware.of(gpus=1, gpu="4090"))
    assert "figures of the data are left out: data.root: /nowhere is neither" in text
    assert "6,738,415,616 frozen" in text and "an upper bound, from limits and data.queries" in text
    # 304 rows of each context, twice two queries of 74 rows, one of whose 75 tokens is predicted and not read.
    assert "904 tokens (608 of contexts with gists), 256 targets" in text
    table = figures(text)
    assert table["no ZeRO"][0] == pytest.approx((6_738_415_616 * 2 + 4 * 39.6e6) / 1e9, abs=0.01)
    for cells in table.values():
        assert sum(cells[:5]) + max(cells[5:7]) == pytest.approx(cells[7], abs=0.05)
    no_tokenizer = check(recipe, [base], hardware=Hardware.of(gpus=1))
    assert "left out: owner/model: has no tokenizer" in no_tokenizer
    with pytest.raises(UserError, match="data.root: /nowhere does not exist"):
        check(recipe, ["data.root=/nowhere"])


def test_the_cheapest_setting_that_fits(recipe, tmp_path, monkeypatch):
    base = [shipped(tmp_path, monkeypatch), "data.root=/nowhere", "model.dtype=bfloat16", "training.bf16=true"]
    full = [*base, "method=full_attention", "training.gradient_checkpointing=true"]

    def choice(overrides, **hardware):
        text = check(recipe, overrides, hardware=Hardware.of(**hardware))
        return re.search("type deepspeed=(.*)", text)[1], figures(text), text

    assert choice(base, gpus=8, gpu="h100")[0] == "null"
    assert choice(full, gpus=8, gpu="h200")[0] == "null"
    large = [*full, shipped(tmp_path, monkeypatch, num_hidden_layers=64)]
    name, table, _ = choice(large, gpus=8, nodes=2, gpu="a100-40")
    assert name == "zero3" and table["ZeRO-3"][7] <= 36 < min(table[key][7] for key in ("no ZeRO", "ZeRO-1", "ZeRO-2"))
    assert choice(full, gpus=1, gpu="h100")[0] == "zero2-offload"
    text = choice([*base, "deepspeed=zero3"], gpus=8)[2]
    assert "The recipe's own setting, deepspeed=zero3, fits too" in text
    own = write(tmp_path / "own.json", {})
    assert "is none of those above" in choice([*base, f"deepspeed={own}"], gpus=8)[2]


def test_nothing_fits(recipe, tmp_path, monkeypatch):
    base = [shipped(tmp_path, monkeypatch, num_hidden_layers=80), "data.root=/nowhere", "limits.context_tokens=3000"]
    text = check(recipe, [*base, "training.per_device_train_batch_size=8"], hardware=Hardware.of(gpus=1, gpu="4090"))
    short = re.search(r"Nothing fits: the smallest, ZeRO-3 offload, needs ([\d.]+) GB, ([\d.]+) GB more than the 21.60", text)
    assert float(short[1]) - float(short[2]) == pytest.approx(21.6, abs=0.02)
    for change in ("gradient_checkpointing=true", "per_device_train_batch_size=1", "bf16=true"):
        assert f"with training.{change}: " in text
    assert "with model.quantize=nf4: " in text
    assert re.search("with .*checkpointing=true .*batch_size=1 .*nf4: fits, with deepspeed=null", text)


def test_four_bits_and_other_optimisers(recipe, tmp_path, monkeypatch):
    base = [shipped(tmp_path, monkeypatch), "data.root=/nowhere", "model.dtype=bfloat16"]
    text = check(recipe, [*base, "model.quantize=nf4", "training.optim=adafactor"], hardware=Hardware.of(gpus=1))
    assert "ZeRO-3" not in figures(text) and "ZeRO-3 is left out" in text
    assert "training.optim=adafactor is counted as AdamW" in text
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    weights = linear * NF4_BYTES + (6_738_415_616 - linear) * 2 + 4 * 39.6e6
    assert figures(text)["no ZeRO"][0] == pytest.approx(weights / 1e9, abs=0.01)


def test_time_by_hand(recipe, tmp_path, monkeypatch):
    overrides = [shipped(tmp_path, monkeypatch), "data.root=/nowhere", "training.max_steps=1000"]
    here = load_recipe(recipe, overrides, data=False)
    config = base_config(here)
    batch = pack_gist([largest_episode(here)] * 2, 4)
    step = ModelCost.of(config).train(batch.layout, len(batch.targets), rank=16).total * 3  # accumulated
    hours = 1000 * step / (312e12 * 0.5) / 3600
    text = "\n".join(plan(here, Hardware.of(gpus=4, nodes=2, gpu="a100-80", utilisation=0.5)))
    assert f"{hours * 8:,.2f} GPU-hours, at 50% of the peak" in text
    assert f"one step        48 episodes (6 a GPU), {batch.tokens * 3 * 8:,} tokens" in text


def test_text_windows_have_limits_of_their_own():
    recipe = Recipe(output="out")
    part = recipe.data.text
    windows = type(recipe)(output="out", data=type(recipe.data)(source="text", root="x"))
    episode = largest_episode(windows)
    assert len(episode.context) == part.context_tokens + 1
    assert [len(p) + len(a) for p, a in episode.queries] == [part.continuation_tokens]


def test_the_command_line(recipe, tmp_path, monkeypatch):
    base = shipped(tmp_path, monkeypatch)
    arguments = ["check", str(recipe), base, "data.root=/nowhere", "--gpus", "8", "--nodes", "2", "--gpu", "h200"]
    shown = CliRunner().invoke(cli.app, [*arguments, "--utilisation", "0.3"])
    assert shown.exit_code == 0 and "plan: 2 x 8 H200, each 141.00 GB (131.3 GiB)" in shown.output
    assert "at 30% of the peak" in shown.output
    for options, said in (
        (["--gpus", "8", "--gpu", "t4"], "--gpu: no GPU t4 is known; choose from h200, h100, a100-80, a100-40, 4090"),
        (["--gpus", "0"], "--gpus: at least 1, not 0"),
        (["--gpus", "1", "--nodes", "0"], "--nodes: at least 1, not 0"),
        (["--gpus", "1", "--utilisation", "40"], "--utilisation: a share of the GPU's peak"),
        (["--gpu", "h100"], "--gpu is for a plan: give --gpus too"),
    ):
        wrong = CliRunner().invoke(cli.app, ["check", str(recipe), *options])
        assert isinstance(wrong.exception, UserError) and said in str(wrong.exception)


def test_bad_input_is_one_sentence(recipe, tmp_path, monkeypatch):
    base, one = shipped(tmp_path, monkeypatch), Hardware.of(gpus=1)
    for overrides, said in (
        (["training.per_device_train_batch_size=0"], "training.per_device_train_batch_size: a whole number, at least 1, not 0"),
        (["training.gradient_accumulation_steps=x"], "training.gradient_accumulation_steps: a whole number"),
        (["training.max_steps=many"], "training.max_steps: a whole number, not 'many'"),
        (["training.bf16=true", "training.fp16=true"], "products are computed in one of them"),
        (["method=full_attention", "model.quantize=nf4"], "which 4 bits cannot be"),
        (["lora.targets=[nope]"], "no linear layers"),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            check(recipe, [base, "data.root=/nowhere", *overrides], hardware=one)
        assert "\n" not in str(caught.value)
    evaluation = write(tmp_path / "e.yaml", f"method: evaluate\noutput: x\ndata: {{source: jsonl, root: {tmp_path}/data}}\n")
    with pytest.raises(UserError, match="plans a training run, but its method is evaluate"):
        check(evaluation, hardware=one)
    folder = tmp_path / "gpt2"
    write(folder / "config.json", json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="gpt2"):
        check(recipe, [f"model.name_or_path={folder}"], hardware=one)


def test_a_shipped_config_is_for_hub_names_only(tmp_path, monkeypatch):
    shipped(tmp_path, monkeypatch, name="owner/model", hidden_size=64, num_attention_heads=4)
    assert backbone.find_config("owner/model").hidden_size == 64
    write(tmp_path / "owner" / "model" / "config.json", {**LLAMA_7B, "hidden_size": 32, "num_attention_heads": 4})
    monkeypatch.chdir(tmp_path)
    assert backbone.find_config("owner/model").hidden_size == 32
    with pytest.raises(UserError, match="no such model folder"):
        backbone.find_config("./owner/other")
