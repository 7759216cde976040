"""Model states by hand and against DeepSpeed's estimators; FLOPs of a step against torch's counter."""

import pytest
import torch
from conftest import VOCABULARY, tiny_architecture
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed

from attention_masks import GistLayout, Segment
from eval.flops import ModelCost
from eval.memory import SETTINGS, Parameters, model_states
from eval.tracing import trace
from hyperllama.base.loading import random_base
from hyperllama.base.outline import NF4_BYTES, FourBits
from hyperllama.data.packing import pack_full, pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.hypernetworks.pooling import PoolingHypernetwork
from hyperllama.objectives import losses as objectives_losses
from hyperllama.training.full_attention import FullAttention

SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 16}


def episodes(count, context, queries, prompt, answer, spread=0):
    """Episodes of given lengths; with `spread`, no two contexts or queries are as long as each other."""
    return [
        EncodedEpisode(
            (5,) * (context + spread * i), tuple(((7,) * (prompt + spread * j), (8,) * answer) for j in range(queries))
        )
        for i in range(count)
    ]


def built(kind, size, *, full, checkpointing, lora):
    set_seed(0)
    base = random_base(tiny_architecture(kind, **size), vocab_size=VOCABULARY)
    model = FullAttention(base, None) if full else GistHypernetwork(base, gists=8, **lora)
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


@pytest.mark.parametrize("gpus, nodes", [(1, 1), (2, 1), (4, 1), (8, 1), (8, 4)])
def test_model_states_are_those_of_deepspeeds_estimators(gpus, nodes):
    """All parameters trained in 16 bits by Adam, which is what its estimators assume."""
    zero2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2").estimate_zero2_model_states_mem_needs
    zero3 = pytest.importorskip("deepspeed.runtime.zero.stage3").estimate_zero3_model_states_mem_needs
    trained, largest = 6_700_000_000, 131_072_000
    count = Parameters(trained, 0, 2 * trained, 0, 2 * largest, 2 * largest)
    place = {"num_gpus_per_node": gpus, "num_nodes": nodes}
    for setting in SETTINGS:
        ours = model_states(count, setting, gpus=gpus, nodes=nodes)
        if setting.stage == 2:
            host, gpu = zero2(count.trained, cpu_offload=setting.offload, **place)
        elif setting.stage == 3:
            host, gpu, _ = zero3(
                count.trained, largest, cpu_offload=setting.offload, cpu_offload_params=setting.offload, **place
            )
        else:
            continue
        assert ours.total - ours.buffers == pytest.approx(gpu, rel=1e-6)
        if setting.offload and (setting.stage == 3 or (nodes == 1 and gpus <= 4)):
            assert ours.host == pytest.approx(host, rel=1e-6)


def test_model_states_by_hand():
    count = Parameters(trained=10_000, frozen=1_100_000, trained_bytes=40_000, frozen_bytes=4_400_000, largest=240_000)
    nodes = {"gpus": 4, "nodes": 1}
    alone = model_states(count, SETTINGS[0], gpus=1, nodes=1)
    assert (alone.weights, alone.gradients, alone.optimiser) == (4_440_000, 40_000, 80_000)
    assert model_states(count, SETTINGS[0], **nodes).gradients == 80_000  # and the buckets of DDP
    half = Parameters(trained=10_000, frozen=1_100_000, trained_bytes=20_000, frozen_bytes=2_200_000, largest=120_000)
    zero1, zero2, zero3 = (model_states(half, setting, **nodes) for setting in SETTINGS[1:4])
    assert zero1.weights == zero2.weights == 2 * 1_110_000
    assert (zero1.gradients, zero2.gradients) == (20_000 + 10_000, 5_000 + 10_000)
    assert zero1.optimiser == zero2.optimiser == 30_000
    assert zero3.weights == 2 * 1_110_000 // 4 + 120_000
    assert (zero3.gradients, zero3.buffers) == (10_000, 2 * 1_110_000 - 120_000 + 5_000)
    offload2, offload3 = (model_states(half, setting, **nodes) for setting in SETTINGS[4:])
    assert (offload2.weights, offload2.gradients, offload2.optimiser) == (2 * 1_110_000, 0, 0)
    assert (offload2.host, offload3.host) == (16 * 10_000 * 1.5, (16 * 10_000 + 2 * 1_110_000) * 1.5)
    assert offload3.weights == 120_000
    tuned = Parameters(trained=10_000, frozen=0, trained_bytes=20_000, frozen_bytes=0, largest=8_000, largest_trained=8_000)
    assert model_states(tuned, SETTINGS[3], **nodes).gradients == 8_000 + 10_000


def test_parameters_are_counted_from_a_model():
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 8).to(torch.bfloat16)).requires_grad_(False)
    model[1].weight.requires_grad_(True)
    assert Parameters.of(model) == Parameters(256, 64 * 32 + 8, 512, 4 * 64 * 32 + 16, 4 * 64 * 32, 512)
    assert pytest.approx(0.516, abs=1e-3) == NF4_BYTES
    packed = nn.Sequential(FourBits(model[0]), model[1])
    size = -(-64 * 32 * NF4_BYTES // 1)
    assert Parameters.of(packed) == Parameters(256, 64 * 32 + 8, 512, size + 16, size, 512)


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
    found = trace(model, batch)
    for part in ("forward", "backward", "again"):
        assert getattr(found, part) == pytest.approx(getattr(step, part), rel=1e-3), part


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
