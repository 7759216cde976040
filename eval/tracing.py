"""A training step that computes nothing: what it keeps, what it takes at its worst moment, and its FLOPs.

A model's own code runs forward and backward, on tensors that have a shape and a dtype but no numbers (`FakeTensorMode` of
PyTorch). So whatever a kind of hypernetwork does is counted as it does it, for a model of any size. Storages are counted from
the operation that makes them until nothing holds them. Attention is that of a CPU (`attention_masks.sdpa`), which keeps what
the fused kernels of a GPU keep; where a GPU has none for grouped heads with a mask, scores come on top. Not counted: the CUDA
context and NCCL (about 1 GB), the allocator's fragments, kernels' work spaces; a plan leaves memory free for them.

A deep model is traced with two layers and with three (`trace_deep`): what a layer more adds is the same from then on.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hyperllama.base.decoder import layers_of
from hyperllama.data.packing import GistBatch
from hyperllama.objectives.packed_model import PackedModel

DEPTHS = (2, 3)  # a first layer and a last one, and one between them
Moment = tuple  # (pass over a decoder, direction, place in it), see `_Places`


@dataclass(frozen=True)
class Trace:
    """One forward and backward pass over a batch, on one GPU, in bytes and FLOPs.

    `kept` is what is there when the forward pass ends; `peaks` the most that is there at once, by the moment: beside weights,
    their gradients and the optimiser's states. FLOPs are those of products and of attention; `again` is what gradient
    checkpointing, and a loss in chunks, compute once more on the way back, which `backward` does not include.
    """

    kept: int
    peaks: dict[Moment, int]
    forward: int
    backward: int
    again: int

    @property
    def peak(self) -> int:
        """The most that is there at any time."""
        return max(self.peaks.values())

    @property
    def total(self) -> int:
        """FLOPs of all that the hardware computes."""
        return self.forward + self.backward + self.again


def trace_deep(make: Callable[[int], PackedModel], layers: int, batch: GistBatch, *, autocast: bool = False) -> Trace:
    """The trace of a model with so many layers; `make` gives one with as many layers as it is told, on the meta device.

    Every figure grows by the same for each layer between the first and the last. Peaks do so moment by moment, of which
    another may be the highest in a deeper model. Of layers between, the highest is next to the last one if a layer more keeps
    more than it frees, and next to the first otherwise; it grows as its neighbour does.
    """
    if layers <= DEPTHS[1]:
        return trace(without_numbers(make(layers)), batch, autocast=autocast)
    less, more = (trace(without_numbers(make(depth)), batch, autocast=autocast) for depth in DEPTHS)
    grown = {moment: peak - less.peaks[moment] for moment, peak in more.peaks.items() if moment in less.peaks}

    def slope(moment: Moment) -> int:
        neighbours = [(*moment[:2], place) for place in ("first", "last")]
        return grown[moment] if moment in grown else max(grown.get(one, 0) for one in neighbours)

    further = layers - DEPTHS[1]
    figures = {name: getattr(more, name) for name in ("kept", "forward", "backward", "again")}
    figures = {name: value + further * (value - getattr(less, name)) for name, value in figures.items()}
    return Trace(peaks={moment: peak + further * slope(moment) for moment, peak in more.peaks.items()}, **figures)


def without_numbers(model: PackedModel) -> PackedModel:
    """A model on the meta device as one that stands on the CPU and has shapes only: kernels are chosen as there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model.to_empty(device="cpu")


def trace(model: PackedModel, batch: GistBatch, *, autocast: bool = False) -> Trace:
    """Count one training step of a model, with numbers or without, whose gradients are all there already.

    That is how it is from a second pass that is accumulated on; before, gradients come one by one.
    """
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    held = [x for p in model.parameters() for x in (p, p.grad) if x is not None]
    counter = Living([*held, *model.buffers()])
    with counter, _Places(model.decoders, counter):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(batch).sum
        kept = counter.now
        counter.turn_back()
        loss.backward()
    flops = counter.flops
    return Trace(kept, dict(counter.peaks), flops["forward"], flops["backward"], flops["again"])


class Living(TorchDispatchMode):
    """Counts the bytes of storages that operations make for as long as they live, and FLOPs.

    `now` is what lives, `peaks` the most that did, by what `moment` said then; storages of `known` tensors do not count.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now, self.moment, self.backward = 0, (0, "forward", "before"), False
        self.peaks: dict[Moment, int] = {}
        self.flops: Counter[str] = Counter()
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no other is taken for one of them
        self._storages = {id(storage) for storage in self._known}

    @property
    def peak(self) -> int:
        """The most that lived at any time."""
        return max(self.peaks.values(), default=0)

    def turn_back(self) -> None:
        """The backward pass begins."""
        self.backward = True
        self.at((0, "backward", "behind"))

    def at(self, moment: Moment) -> None:
        """Count what follows under another moment."""
        self.moment = moment
        self.peaks[moment] = max(self.peaks.get(moment, 0), self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # asked twice for each operation, and all are on the CPU
            return torch.device("cpu")
        out = function(*args, **(kwargs or {}))
        if formula := FLOPS.get(function.overloadpacket):
            # The backward pass itself runs without gradients, what it computes again does not.
            direction = "again" if torch.is_grad_enabled() else "backward"
            self.flops[direction if self.backward else "forward"] += formula(args)
        # Autograd sums gradients of what is used twice in place, but for tensors without numbers beside it: the sum takes the
        # place of one of them as soon as it is there.
        summed = self.backward and function is torch.ops.aten.add.Tensor and not torch.is_grad_enabled()
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), for_long=not summed)
        return out

    def _count(self, storage: torch.UntypedStorage, for_long: bool) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.now += size
            if for_long:
                self.at(self.moment)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.now -= size
        self._storages.discard(key)


class _Places:
    """Tells a counter where in a decoder a step is, by hooks on its layers: a context in which it does.

    A moment is the pass over a decoder (the first is 1), the direction, and the place: the first layer, one between, the last
    one, or before or behind them. These are the same in a deeper model.
    """

    def __init__(self, decoders: Sequence[nn.Module], counter: Living):
        self.decoders, self.counter, self.passes, self.hooks = decoders, counter, 0, []

    def __enter__(self) -> _Places:
        for decoder in self.decoders:
            layers = layers_of(decoder)
            for i, layer in enumerate(layers):
                place = "first" if i == 0 else "last" if i == len(layers) - 1 else "between"
                self.hooks.append(layer.register_forward_pre_hook(self._enter(place), with_kwargs=True))
                self.hooks.append(layer.register_forward_hook(self._leave(place)))
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

    def _enter(self, place: str) -> Callable:
        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.counter.backward:  # the layer is computed again
                return
            if place == "first":
                self.passes += 1
                self._when_back(args[0] if args else kwargs["hidden_states"], "before")
            self.counter.at((self.passes, "forward", place))

        return hook

    def _leave(self, place: str) -> Callable:
        def hook(layer: nn.Module, args: tuple, output: Any) -> None:
            if self.counter.backward:
                return
            self._when_back(output if isinstance(output, Tensor) else output[0], place)
            if place == "last":
                self.counter.at((self.passes, "forward", "behind"))

        return hook

    def _when_back(self, hidden: Tensor, place: str) -> None:
        """A moment of the backward pass begins when the gradient of `hidden` is there."""
        if hidden.requires_grad:
            moment = (self.passes, "backward", place)
            hidden.register_hook(lambda gradient: self.counter.at(moment))


def _matrices(x: Tensor, y: Tensor) -> int:
    """FLOPs of a product of matrices (..., m, k) and (..., k, n)."""
    return 2 * x.numel() * y.shape[-1]


def _attention(q: Tensor, k: Tensor) -> int:
    """FLOPs of attention of q (B, H, T, D) over k (B, N, S, D): scores and values, of pairs that a mask hides too."""
    return 4 * q.numel() * k.shape[2]


_aten = torch.ops.aten
# By operation, of its arguments. As a fused kernel's backward pass computes scores again, it has five products to two; here it
# has four, those that are needed.
FLOPS: dict[Any, Callable[[tuple], int]] = {
    _aten.mm: lambda args: _matrices(*args[:2]),
    _aten.bmm: lambda args: _matrices(*args[:2]),
    _aten.addmm: lambda args: _matrices(*args[1:3]),
    _aten.baddbmm: lambda args: _matrices(*args[1:3]),
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda args: _attention(*args[:2]),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda args: 2 * _attention(*args[1:3]),
}
