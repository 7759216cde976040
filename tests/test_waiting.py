"""A training step never asks the device for a number: seen on a CPU, by the operations that a GPU would have to wait for."""

import pytest
import torch
from conftest import VOCABULARY
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from waiting import KINDS, model_and_batch, train_watched

from hyperllama.objectives import losses as objectives_losses

aten = torch.ops.aten
# Numbers that the host reads, shapes that depend on numbers, and tensors made of the host's numbers.
WAITS = {
    aten._local_scalar_dense: ".item(), .tolist(), bool() or a number out of a tensor",
    aten.equal: "torch.equal",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten._unique2: "unique",
    aten.unique_consecutive: "unique_consecutive",
    aten.bincount: "bincount",
    aten.lift_fresh: "torch.tensor(...) or new_tensor, a copy from the host",
    aten.is_pinned: "a copy from the host",
}


INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
# What a CPU does without an operation, and a GPU with one.
READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)


class ReadsNothing(TorchFunctionMode):
    """Raises where a tensor is read by the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in READS, f"a step waits for the device: {function.__name__}"
        return function(*args, **(kwargs or {}))


class WaitsForNothing(TorchDispatchMode):
    """Raises for an operation for which a GPU's host would wait, in the backward pass too."""

    def __enter__(self):
        self.reads = ReadsNothing()
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.reads.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        assert packet not in WAITS, f"a step waits for the device: {WAITS[packet]}"
        for index in args[1] if packet in INDEXING else ():
            assert index is None or index.dtype != torch.bool, "a step waits for the device: a mask as an index"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, {"bf16": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing(kind, settings, tmp_path, monkeypatch):
    """From the end of one optimiser step to the end of the next: data, forward, backward, clipping, AdamW, schedule."""
    monkeypatch.setattr(objectives_losses, "LOGITS", 2 * VOCABULARY)
    train_watched(*model_and_batch(kind), WaitsForNothing(), tmp_path, use_cpu=True, **settings)


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "int": lambda x: int(x.sum()),
    "mask": lambda x: x[x > 0],
    "mask assignment": lambda x: x.index_put((x > 0,), torch.zeros(())),
    "tensor": lambda x: torch.tensor([1, 2]),
    "new_tensor": lambda x: x.new_tensor(3),
    "cpu": lambda x: x.cpu(),
    "backward": lambda x: _ReadsBackward.apply(x.requires_grad_()).sum().backward(),
}


class _ReadsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * gradient.sum().item()


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_noticed(name):
    with pytest.raises(AssertionError, match="waits for the device"), WaitsForNothing():
        WAITING[name](torch.arange(4) - 1.5)
