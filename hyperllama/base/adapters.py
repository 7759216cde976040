"""Adapters: pairs of small matrices beside modules of a decoder, several tasks' in one batch.

In every layer x -> module(x) + f(x @ down) @ up, where x is what the module reads. Beside an MLP f is a relu (He et al. 2022,
arXiv 2110.04366), beside a projection of attention it is nothing: then the pair is LoRA (Hu et al. 2021, arXiv 2106.09685). The
decoder is not touched: inside a context forward hooks add the second term, each row with its own task's matrices, by two
batched products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hyperllama.base.decoder import layers_of, part

LORA = ("q_proj", "v_proj")
# The kinds of pairs, and which module of a layer each stands beside.
BESIDE = {"adapter": "mlp", "q_proj": "query projection", "v_proj": "value projection"}

Pairs = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Adapters:
    """One task's pairs of all L layers by their kind (see `BESIDE`): down (L, in, b) and up (L, b, out).

    b may differ from one kind to another. Raises ValueError if shapes disagree, or nothing is there.
    """

    pairs: Pairs

    def __post_init__(self):
        for name, (down, up) in self.pairs.items():
            fit = down.ndim == up.ndim == 3 and down.shape[0] == up.shape[0] == self.layers and down.shape[2] == up.shape[1]
            if name not in BESIDE or not fit or up.dtype != down.dtype:
                shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
                raise ValueError(f"adapters need (L, in, b) and (L, b, out) for {', '.join(BESIDE)}; {name} has {shapes}")
        if not self.pairs:
            raise ValueError("adapters need at least one pair of matrices")

    @property
    def layers(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def sizes(self) -> dict[str, int]:
        """b of each kind: the bottleneck of an adapter, the rank of LoRA."""
        return {name: down.shape[2] for name, (down, _) in self.pairs.items()}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(side for pair in self.pairs.values() for side in pair)

    @property
    def nbytes(self) -> int:
        return sum(side.nbytes for side in self.tensors)

    def equals(self, other: Adapters | None) -> bool:
        """Whether the other has the same form and the same bits, on whatever device."""
        if other is None or self.pairs.keys() != other.pairs.keys():
            return False
        both = [(own, theirs) for name in self.pairs for own, theirs in zip(self.pairs[name], other.pairs[name])]
        return all(a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()) for a, b in both)

    def to(self, device=None, dtype=None) -> Adapters:
        """The same adapters on another device or in another dtype."""
        return Adapters({name: tuple(x.to(device=device, dtype=dtype) for x in pair) for name, pair in self.pairs.items()})


@dataclass(frozen=True)
class Stack:
    """Adapters of n tasks by their kind: down (L, n, in, b), up (L, n, b, out)."""

    pairs: Pairs

    @classmethod
    def of(cls, tasks: Sequence[Adapters | None], model: PreTrainedModel) -> Stack | None:
        """The adapters of several tasks in the model's dtype and place, or None if no task has any.

        Smaller bottlenecks are filled up with zeros, and so is a task without: zeros add nothing. A task that comes several
        times is copied to the device once.
        """
        if not any(tasks):
            return None
        distinct = {id(one): one for one in tasks}
        column = {key: i for i, key in enumerate(distinct)}
        rows = torch.tensor([column[id(one)] for one in tasks], device=model.device)
        pairs = {}
        for name in BESIDE:
            owned = [None if one is None else one.pairs.get(name) for one in distinct.values()]
            if any(owned):
                pairs[name] = tuple(side.index_select(1, rows) for side in _side_by_side(owned, model))
        return cls(pairs)


def _side_by_side(owned: Sequence[tuple[Tensor, Tensor] | None], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Pairs of n tasks and one kind as (L, n, in, b) and (L, n, b, out), of the largest b."""
    down, up = next(pair for pair in owned if pair is not None)
    size = max(pair[0].shape[2] for pair in owned if pair is not None)
    place = {"device": model.device, "dtype": model.dtype}
    downs = torch.zeros(down.shape[0], len(owned), down.shape[1], size, **place)
    ups = torch.zeros(down.shape[0], len(owned), size, up.shape[2], **place)
    for i, pair in enumerate(owned):
        if pair is not None:
            downs[:, i, :, : pair[0].shape[2]], ups[:, i, : pair[0].shape[2]] = (x.to(**place) for x in pair)
    return downs, ups


def rows_of(groups: Sequence[Sequence[int]], device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a packed batch by task: (n, m) with 0 where a task has fewer; the places (r,) of the others in it; and these.

    All are numbers: a choice by true and false would wait for a GPU to count them.
    """
    rows = pad_sequence([torch.tensor(group, dtype=torch.long) for group in groups], batch_first=True)
    widest = rows.shape[1]
    places = [i * widest + j for i, group in enumerate(groups) for j in range(len(group))]
    there = torch.tensor(places, dtype=torch.long)
    return rows.to(device), there.to(device), rows.flatten()[there].to(device)


@dataclass(frozen=True, eq=False)
class Acting:
    """Adapters of n tasks, and the rows of a packed batch that each acts on, as `rows_of` gives them.

    Without `rows` a batch (n, rows, hidden) has row i adapted by task i.
    """

    stack: Stack
    rows: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def on(cls, stack: Stack, groups: Sequence[Sequence[int]] | None, device) -> Acting:
        """Task i on the rows groups[i] of a packed batch; all others have none."""
        return cls(stack, None if groups is None else rows_of(groups, device))

    def change(self, name: str, layer: int, x: Tensor, output: Tensor) -> Tensor:
        """The output of a module that read `x`, with the adapters of a kind added."""
        down, up = (side[layer] for side in self.stack.pairs[name])
        x = x if self.rows is None else x[0][self.rows[0]]
        inner = torch.bmm(x, down)
        # Under autocast products choose their dtype themselves; otherwise all are of the model's.
        change = torch.bmm(torch.relu(inner) if name == "adapter" else inner, up).to(output.dtype)
        if self.rows is None:
            return output + change
        _, there, rows = self.rows
        return output.index_add(1, rows, change.flatten(0, 1).index_select(0, there)[None])


@contextmanager
def adapted(model: PreTrainedModel, stack: Stack | None, groups: Sequence[Sequence[int]] | None = None) -> Iterator[None]:
    """A context in which modules of a decoder have adapters beside them; see `Acting`. No stack: nothing is changed."""
    with ExitStack() as hooks:
        if stack is not None:
            acting = Acting.on(stack, groups, model.device)
            for hook in _beside_all(model, stack.pairs, lambda: acting):
                hooks.callback(hook.remove)
        yield


class AdaptedCalls:
    """Lets calls of a decoder name adapters that act in them alone, by the keyword arguments of `naming`.

    Unlike `adapted`, also when gradient checkpointing runs a layer again in the backward pass: attention, the first in a layer,
    is given the call's arguments then too, and decides for the layer.
    """

    def __init__(self, model: PreTrainedModel, kinds: Iterable[str]):
        self.acting: Acting | None = None
        self.hooks = _beside_all(model, kinds, lambda: self.acting)
        for layer in layers_of(model):
            self.hooks.append(part(layer, "attention").register_forward_pre_hook(self._choose, with_kwargs=True))

    def naming(self, stack: Stack | None, groups: Sequence[Sequence[int]] | None, device) -> dict[str, Any]:
        """Arguments of a call in which task i acts on the rows groups[i] of a packed batch; none for no stack."""
        return {} if stack is None else {"gist_adapters": (self, Acting.on(stack, groups, device))}

    def _choose(self, attention, args, kwargs) -> None:
        # Another hypernetwork on the same decoder has calls of its own.
        owner, acting = kwargs.get("gist_adapters", (None, None))
        self.acting = acting if owner is self else None

    def remove(self) -> None:
        """Take the hooks off the decoder."""
        for hook in self.hooks:
            hook.remove()


def _beside_all(model: PreTrainedModel, kinds: Iterable[str], acting: Callable[[], Acting | None]) -> list[RemovableHandle]:
    """Hooks that add what `acting` says at the time."""

    def hook(name: str, layer: int):
        def add(module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            now = acting()
            return output if now is None else now.change(name, layer, args[0], output)

        return add

    places = [(layer, name, i) for i, layer in enumerate(layers_of(model)) for name in kinds]
    return [part(layer, BESIDE[name]).register_forward_hook(hook(name, i)) for layer, name, i in places]
