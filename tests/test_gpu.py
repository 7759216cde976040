"""What can only be seen on a GPU: the packed step, compressing and reading there are those of a CPU."""

import pytest
import torch
from conftest import VOCABULARY, tiny_base, trained_hypernetwork
from waiting import KINDS, model_and_batch, train_watched

from hyperllama.data.packing import pack_gist
from hyperllama.data.stream import Collator
from hyperllama.data.text import EncodedEpisode
from hyperllama.files import whole_json_lines
from hyperllama.objectives import losses as objectives_losses
from hyperllama.training.trainer import GistTrainer, training_arguments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BASES = ("llama", "qwen3")
EPISODES = [
    EncodedEpisode((5, 6, 7, 8, 9, 10, 11), (((12, 13), (14, 15)), ((16,), (17,)))),
    EncodedEpisode((20, 21, 22), (((23, 24, 25), (26, 27, 28)),)),
]


def on_both(kind):
    """The same hypernetwork on the CPU and on the GPU."""
    here, there = (trained_hypernetwork(tiny_base(kind)).to(device) for device in ("cpu", "cuda"))
    there.load_state_dict(here.state_dict())
    return here, there


def loss_and_gradients(model):
    loss = model(pack_gist(EPISODES, model.num_gists).to(model.gists.device)).mean
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.trainable().items()}


@pytest.mark.parametrize("kind", BASES)
def test_a_step_is_that_of_a_cpu(kind):
    torch.backends.cuda.matmul.allow_tf32 = False
    here, there = on_both(kind)
    loss, expected = loss_and_gradients(here)
    on_gpu, found = loss_and_gradients(there)
    assert on_gpu == pytest.approx(loss, abs=1e-5) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_prefixes_are_those_of_a_cpu(kind):
    here, there = on_both(kind)
    contexts = [list(episode.context) for episode in EPISODES]
    for a, b in zip(here.compress(contexts), there.compress(contexts), strict=True):
        for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
            torch.testing.assert_close(x, y.cpu(), rtol=0, atol=1e-4)


def test_training_in_bf16_with_checkpointing_learns(tmp_path):
    settings = {"max_steps": 20, "bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True}

    class Repeated(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return EPISODES[index % 2]

    arguments = training_arguments(settings, run=tmp_path, seed=0)
    hypernetwork = trained_hypernetwork(tiny_base("llama")).cuda()
    GistTrainer(hypernetwork, arguments, Repeated(), Collator(pack_gist, hypernetwork.num_gists), tmp_path).train()
    losses = [line["loss"] for line in whole_json_lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] / 2


class NeverWaits:
    """The host is not to wait for the device, for whatever reason."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_the_device(kind, checkpointing, tmp_path):
    """As the Trainer takes it: a pinned batch that is copied beside the step before, forward, backward, clipping, AdamW."""
    model, batch = model_and_batch(kind, "cuda")
    settings = {"bf16": True, "gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
    try:
        train_watched(model, batch, NeverWaits(), tmp_path, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")  # for the tests that follow, also when this one fails


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_forward_backward_and_optimiser_never_wait(checkpointing):
    """Without the Trainer: what is ours."""
    model, batch = model_and_batch("hypernetwork", "cuda")
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimiser, batch = torch.optim.AdamW(model.train().trainable().values(), fused=True), batch.pin_memory()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(batch.to("cuda", non_blocking=True)).mean.backward()
            optimiser.step()
            optimiser.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_loss_in_chunks_is_that_at_once(monkeypatch):
    loss, expected = loss_and_gradients(trained_hypernetwork(tiny_base()).to("cuda"))
    monkeypatch.setattr(objectives_losses, "LOGITS", 2 * VOCABULARY)
    chunked, found = loss_and_gradients(trained_hypernetwork(tiny_base()).to("cuda"))
    assert chunked == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
