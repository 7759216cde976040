"""Model states: weights, gradients and the optimiser's states, and what ZeRO cuts of them, in bytes.

After Rajbhandari et al. 2020 (arXiv 1910.02054). Counts come from a model itself (`Parameters.of`), the rest by formula. What
a step takes beside them is in `eval.tracing`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hyperllama.base.outline import FourBits

# DeepSpeed's stage3_max_live_parameters, which none of our settings changes.
LIVE_PARAMETERS = 1_000_000_000
# Pinned host memory is taken in larger pieces than asked for; the factor is that of DeepSpeed's estimators.
HOST_FACTOR = 1.5


@dataclass(frozen=True)
class Zero:
    """One way to share out model states: ZeRO's stage, 0 for none, and whether what it cuts lies in the host's memory.

    `name` is what a recipe's `deepspeed` says.
    """

    name: str | None
    stage: int = 0
    offload: bool = False

    def __str__(self) -> str:
        return {None: "no ZeRO"}.get(self.name, f"ZeRO-{self.stage}{' offload' if self.offload else ''}")


# From the fastest to the slowest, where they fit.
SETTINGS = (
    Zero(None),
    Zero("zero1", 1),
    Zero("zero2", 2),
    Zero("zero3", 3),
    Zero("zero2-offload", 2, offload=True),
    Zero("zero3-offload", 3, offload=True),
)


@dataclass(frozen=True)
class Parameters:
    """Counts of a model's parameters, `trained` and `frozen`, and their bytes.

    `largest` is the bytes of the largest module, the most that ZeRO-3 must gather at once, `largest_trained` of those that are
    trained.
    """

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int
    largest: int
    largest_trained: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Parameters:
        """Those of a model, perhaps on the meta device; four bits count as what they are packed into."""
        own = list(model.parameters())
        trained, frozen = ([p for p in own if p.requires_grad == wanted] for wanted in (True, False))
        packed = [module for module in model.modules() if isinstance(module, FourBits)]
        whole = sum(module.in_features * module.out_features - module.weight.numel() for module in packed)
        modules = [list(module.parameters(recurse=False)) for module in model.modules()]
        return cls(
            sum(p.numel() for p in trained),
            sum(p.numel() for p in frozen) + whole,
            sum(p.nbytes for p in trained),
            sum(p.nbytes for p in frozen),
            max(sum(p.nbytes for p in one) for one in modules),
            max(sum(p.nbytes for p in one if p.requires_grad) for one in modules),
        )

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return self.trained_bytes + self.frozen_bytes


@dataclass(frozen=True)
class States:
    """Bytes of model states on one GPU, of what ZeRO holds beside them (`buffers`), and in the memory of one host."""

    weights: int
    gradients: int
    optimiser: int
    buffers: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """On one GPU."""
        return self.weights + self.gradients + self.optimiser + self.buffers


def model_states(count: Parameters, zero: Zero, *, gpus: int, nodes: int) -> States:
    """Weights, gradients and AdamW's states, on `gpus` GPUs in each of `nodes` nodes.

    Where all parameters are trained in 16 bits, this is what DeepSpeed's own estimators say
    (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_model_states_mem_needs`): of a trained parameter 2 bytes of
    weight, 2 and 4 of gradient, 4 of master weight and 8 of Adam. They differ from here where
    - weights are frozen: these have no gradients and states, and ZeRO 1 and 2 do not cut them; the estimators know none;
    - weights are in float32 or in 4 bits; without DeepSpeed, there are no masters, and states have the weights' dtype;
    - ZeRO-2 is offloaded: their host figure does not shrink with the number of nodes, and with more than four GPUs it is four
      bytes a parameter and GPU, the copies that processes load at the start; ours is what a node holds while it trains;
    - ZeRO-3 keeps up to `LIVE_PARAMETERS` parameters whole, of which theirs counts one layer only, and a share of the gradients
      in 16 bits, which theirs leaves out; ours counts the rest of both as `buffers`.
    """
    world, trained, gradients = gpus * nodes, count.trained, count.trained_bytes
    if not zero.stage:
        # DistributedDataParallel keeps its buckets, the size of all gradients, beside the gradients.
        return States(count.bytes, gradients * (2 if world > 1 else 1), 2 * count.trained_bytes)
    master, adam, summed = 4 * trained, 8 * trained, 4 * trained
    gathered = buffers = gathered_gradients = 0
    if zero.stage == 3:
        gathered, gathered_gradients = count.largest, count.largest_trained
        live = min(1, LIVE_PARAMETERS / (count.trained + count.frozen)) * count.bytes
        buffers = max(0, live - gathered)
    host = HOST_FACTOR * (master + adam + summed + (count.bytes if zero.stage == 3 else 0)) / nodes
    if zero.offload:
        left = 0 if zero.stage == 3 else count.bytes
        return States(int(gathered + left), int(gathered_gradients), 0, int(buffers), int(host))
    optimiser = int((master + adam) / world)
    if zero.stage == 3:
        buffers += gradients / world
        shared = int(gathered_gradients + summed / world)
        return States(int(gathered + count.bytes / world), shared, optimiser, int(buffers))
    cut = world if zero.stage == 2 else 1
    return States(count.bytes, int(gradients / cut + summed / world), optimiser)
