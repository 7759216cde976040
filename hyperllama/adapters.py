"""Adapters that stand beside a decoder's MLPs (He et al. 2022, arXiv 2110.04366), several tasks' in one batch.

In every layer x -> MLP(x) + relu(x @ down) @ up, where x is what the MLP reads. The decoder is not touched: inside a context
forward hooks add the second term, each row with its own task's matrices, by two batched products a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Adapters:
    """One task's matrices of all L layers: down (L, hidden, b) and up (L, b, hidden). Raises ValueError if shapes disagree."""

    down: Tensor
    up: Tensor

    def __post_init__(self):
        shape = tuple(self.down.shape)
        if len(shape) != 3 or tuple(self.up.shape) != (shape[0], shape[2], shape[1]) or self.up.dtype != self.down.dtype:
            raise ValueError(f"adapters need (L, hidden, b) and (L, b, hidden), not {shape} and {tuple(self.up.shape)}")

    @property
    def layers(self) -> int:
        return self.down.shape[0]

    @property
    def hidden(self) -> int:
        """The width of the model that they belong to."""
        return self.down.shape[1]

    @property
    def size(self) -> int:
        """b, the bottleneck."""
        return self.down.shape[2]

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def equals(self, other: Adapters | None) -> bool:
        """Whether the other has the same form and the same bits, on whatever device."""
        if other is None or self.down.shape != other.down.shape or self.down.dtype != other.down.dtype:
            return False
        return torch.equal(self.down.cpu(), other.down.cpu()) and torch.equal(self.up.cpu(), other.up.cpu())

    def to(self, device=None, dtype=None) -> Adapters:
        """The same adapters on another device or in another dtype."""
        return Adapters(self.down.to(device=device, dtype=dtype), self.up.to(device=device, dtype=dtype))


@dataclass(frozen=True)
class Stack:
    """Adapters of n tasks, layer by layer: down (L, n, hidden, b), up (L, n, b, hidden)."""

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, tasks: Sequence[Adapters | None], model: PreTrainedModel) -> Stack | None:
        """The adapters of several tasks in the model's dtype and place, or None if no task has any.

        Smaller bottlenecks are filled up with zeros, and so is a task without: zeros add nothing. A task that comes several
        times is copied to the device once.
        """
        if not any(tasks):
            return None
        distinct = {id(one): one for one in tasks}
        size = max(one.size for one in distinct.values() if one is not None)
        form = next(one for one in distinct.values() if one is not None)
        place = {"device": model.device, "dtype": model.dtype}
        down = torch.zeros(form.layers, len(distinct), form.hidden, size, **place)
        up = torch.zeros(form.layers, len(distinct), size, form.hidden, **place)
        for i, one in enumerate(distinct.values()):
            if one is not None:
                down[:, i, :, : one.size], up[:, i, : one.size] = one.down.to(**place), one.up.to(**place)
        column = {key: i for i, key in enumerate(distinct)}
        rows = torch.tensor([column[id(one)] for one in tasks], device=model.device)
        return cls(down.index_select(1, rows), up.index_select(1, rows))


def rows_of(groups: Sequence[Sequence[int]], device) -> tuple[Tensor, Tensor]:
    """Rows of a packed batch by task: (n, m) with 0 where a task has fewer, and which are there (n, m), bool."""
    rows = pad_sequence([torch.tensor(group, dtype=torch.long) for group in groups], batch_first=True)
    there = torch.arange(rows.shape[1])[None] < torch.tensor([len(group) for group in groups])[:, None]
    return rows.to(device), there.to(device)


@contextmanager
def adapted(model: PreTrainedModel, stack: Stack | None, groups: Sequence[Sequence[int]] | None = None) -> Iterator[None]:
    """A context in which a decoder's MLPs have adapters beside them.

    Without `groups` a batch (n, rows, hidden) has row i adapted by task i. With them a packed batch (1, T, hidden) has the rows
    groups[i] adapted by task i, and all others by none. No stack: nothing is changed.
    """
    if stack is None:
        yield
        return
    chosen = None if groups is None else rows_of(groups, model.device)

    def beside(layer: int):
        def add(module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0] if chosen is None else args[0][0][chosen[0]]
            # Under autocast products choose their dtype themselves; otherwise all are of the model's.
            change = torch.bmm(torch.relu(torch.bmm(x, stack.down[layer])), stack.up[layer]).to(output.dtype)
            if chosen is None:
                return output + change
            rows, there = chosen
            return output.index_add(1, rows[there], change[there][None])

        return add

    with ExitStack() as hooks:
        for i, layer in enumerate(model.get_decoder().layers):
            hooks.callback(layer.mlp.register_forward_hook(beside(i)).remove)
        yield
