"""Memory and FLOPs of a training step: by hand, and against autograd, torch's counter and DeepSpeed's estimators."""

import contextlib
import weakref

import pytest
import torch
from conftest import VOCABULARY, tiny_architecture
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, set_seed

from attention_masks import GistLayout, Segment
from eval.flops import ModelCost
from eval.memory import NF4_BYTES, SETTINGS, Parameters, Precision, Zero, activations, model_states, precision
from hyperllama.base.loading import random_base
from hyperllama.data.packing import pack_full, pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.hypernetworks.pooling import PoolingHypernetwork
from hyperllama.objectives import losses as objectives_losses
from hyperllama.training.full_attention import FullAttention

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


def built(kind, size, *, full=False, dtype="float32", pure=False, checkpointing=False, lora=None, vocabulary=VOCABULARY):
    set_seed(0)
    base = random_base(tiny_architecture(kind, **size), vocab_size=vocabulary, dtype=dtype)
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


@pytest.mark.parametrize("how", ["float32", "bfloat16 base, autocast", "autocast", "DeepSpeed bf16", "full", "full, autocast"])
def test_a_loss_in_chunks_keeps_no_logits(monkeypatch, how):
    """With many words and targets: what is saved, and the peak, which is that of one chunk."""
    how, rows, words = HOW[how], 20, 3000
    monkeypatch.setattr(objectives_losses, "LOGITS", rows * words)
    full, half, deepspeed = (how.get(name, False) for name in ("full", "half", "deepspeed"))
    dtype, data = how.get("dtype", "float32"), episodes(2, 30, 4, 10, 20)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    model = built("llama", size, full=full, dtype=dtype, pure=deepspeed, vocabulary=words)
    batch = pack_full(data) if full else pack_gist(data, 8)
    assert len(batch.targets) == 8 * rows
    precise = precision(dtype=dtype, quantize=None, half=half, full=full, deepspeed=deepspeed)
    rank = None if full else 8
    expected = activations(ModelCost.of(model.base.config), batch.layout, len(batch.targets), precise, rank=rank)
    casts = half and not deepspeed
    with autocast(casts):
        saved = saved_bytes(model, lambda: model(batch))
    assert expected.saved == pytest.approx(saved, rel=0.06)
    living = Living([*model.parameters(), *model.buffers()])
    with living:
        with autocast(casts):
            loss = model(batch).sum
        loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None) if full else 0
    # The gradients of a trained base's layers come after the loss; those of its head are there by then.
    assert expected.peak <= living.peak * 1.15 and living.peak <= 1.15 * (expected.peak + gradients)
    monkeypatch.setattr(objectives_losses, "LOGITS", len(batch.targets) * words)
    whole = activations(ModelCost.of(model.base.config), batch.layout, len(batch.targets), precise, rank=rank)
    assert whole.logits - expected.logits >= 2 * 7 * rows * words * 4 and whole.peak > 1.5 * living.peak


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
    # The last layer's attention and MLP are for the query only.
    attention = (rows - context) * (2 * heads * width + heads) + 2 * (4 + 3) * kv_heads * width + 4 * 7
    mlp = 3 * (rows - context) * inner
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


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "up_proj"]])
@pytest.mark.parametrize("full", [False, True], ids=["hypernetwork", "full"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("rows", [0, 3], ids=["at once", "in chunks"])
def test_flops_of_a_step_are_those_that_torch_counts(monkeypatch, targets, full, checkpointing, rows):
    if rows:
        monkeypatch.setattr(objectives_losses, "LOGITS", rows * VOCABULARY)
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


@pytest.mark.parametrize("attended", [0.0, 0.5])
def test_pooling_keeps_of_a_context_what_a_prefill_keeps(attended):
    """With gradient checkpointing, where no gradient goes through the context: keys and values as they were read."""

    def kept(tokens, checkpointing):
        set_seed(0)
        architecture = tiny_architecture("llama", **SMALL, max_position_embeddings=4096)
        base = random_base(architecture, vocab_size=VOCABULARY, dtype="bfloat16")
        model = PoolingHypernetwork(base, gists=8, attended=attended).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        layout = GistLayout([Segment(tokens + 8, gists=8)])
        return saved_bytes(model, lambda: model.gist_states(torch.full((1, tokens + 8), 5), layout))

    read = 2000 * SMALL["num_hidden_layers"] * 2 * 2 * SMALL["head_dim"] * 2  # keys and values, two heads, bytes
    assert kept(2000, True) <= read * 1.01 and kept(2000, False) > 2 * read
