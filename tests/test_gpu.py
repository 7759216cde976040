"""What can only be seen on a GPU: the packed step, compressing and reading there are those of a CPU."""

import pytest
import torch
from conftest import tiny_base, trained_hypernetwork

from hyperllama.data.packing import pack_gist
from hyperllama.data.stream import Collator
from hyperllama.data.text import EncodedEpisode
from hyperllama.files import whole_json_lines
from hyperllama.training import GistTrainer, training_arguments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

KINDS = ("llama", "qwen3")
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_a_cpu(kind):
    torch.backends.cuda.matmul.allow_tf32 = False
    here, there = on_both(kind)
    loss, expected = loss_and_gradients(here)
    on_gpu, found = loss_and_gradients(there)
    assert on_gpu == pytest.approx(loss, abs=1e-5) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
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
