"""Memory of a training step by formula: what lies on a GPU and in the host's memory, in bytes, from a model's sizes alone.

Three parts. *Model states* (`model_states`): weights, gradients and the optimiser's states, and what ZeRO cuts of them
(Rajbhandari et al. 2020, arXiv 1910.02054). *Activations* (`activations`): what each module keeps in its forward pass for its
backward pass. *What is there for a moment only*: logits, and the gradients inside one layer. Not counted: the CUDA context and
NCCL (about 1 GB), the allocator's fragments, kernels' work spaces; a plan leaves a share of the memory free for them.

Activations agree with what autograd saves on a CPU (tests/test_memory.py); on a GPU they are not measured yet.
Fused attention kernels save the same there; where a GPU has none for grouped heads with a mask, scores come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attention_masks import GistLayout
from eval.flops import KEPT_IN_LAST_LAYER, ModelCost
from hyperllama.objectives.losses import head_chunks

# 4 bits; one 8-bit constant for 64 weights, and one of 32 bits for 256 such constants (arXiv 2305.14314, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
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
class Precision:
    """Bytes of one number: of a weight of the base, of one of its decoder's linear layers, and of a trained parameter.

    Under `autocast` products are computed in 16 bits, whatever weights are kept in.
    """

    base: float
    linear: float
    trained: int
    autocast: bool = False

    @property
    def stream(self) -> int:
        """Bytes of a number between the layers: embeddings set it, and norms keep it."""
        return 2 if self.base == 2 else 4

    @property
    def product(self) -> int:
        """Bytes of a number that comes out of a linear layer or of attention."""
        return 2 if self.autocast else self.stream

    @property
    def lora(self) -> int:
        """Bytes of a number inside LoRA."""
        return 2 if self.autocast else self.trained

    @property
    def copies_weights(self) -> bool:
        """Whether autocast copies each weight in 16 bits, which backward needs to find the gradient of the input."""
        return self.autocast and self.linear == 4


def precision(*, dtype: str, quantize: str | None, half: bool, full: bool, deepspeed: bool) -> Precision:
    """Which numbers a run keeps: `half` is training.bf16 or fp16, `full` trains the base, which else is frozen.

    transformers' Trainer computes under autocast; with DeepSpeed it does not, and DeepSpeed casts all weights to 16 bits,
    LoRA too, of which it keeps masters in float32.
    """
    base = 2 if dtype == "bfloat16" or (deepspeed and half) else 4
    linear = NF4_BYTES if quantize else base
    trained = base if full else 2 if deepspeed and half else 4
    return Precision(base, linear, trained, autocast=half and not deepspeed)


@dataclass(frozen=True)
class Parameters:
    """Counts: `linear` weights of the decoder's linear layers, `other` of the base, `added` by the hypernetwork.

    `largest` is the count of the base's largest module, the most that ZeRO-3 must gather at once.
    """

    linear: int
    other: int
    added: int
    largest: int
    full: bool

    @property
    def trained(self) -> int:
        """How many parameters training changes."""
        return self.linear + self.other if self.full else self.added

    @property
    def frozen(self) -> int:
        """How many it does not."""
        return 0 if self.full else self.linear + self.other


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


def model_states(count: Parameters, precise: Precision, zero: Zero, *, gpus: int, nodes: int) -> States:
    """Weights, gradients and AdamW's states, on `gpus` GPUs in each of `nodes` nodes.

    Where all parameters are trained in 16 bits, this is what DeepSpeed's own estimators say
    (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_model_states_mem_needs`): of a trained parameter 2 bytes of
    weight, 2 and 4 of gradient, 4 of master weight and 8 of Adam. They differ from here where
    - the base is frozen: it has weights only, and ZeRO 1 and 2 do not cut it; their estimators know no frozen weights;
    - weights are in float32 or in 4 bits; without DeepSpeed, there are no masters, and states have the weights' dtype;
    - ZeRO-2 is offloaded: their host figure does not shrink with the number of nodes, and with more than four GPUs it is four
      bytes a parameter and GPU, the copies that processes load at the start; ours is what a node holds while it trains;
    - ZeRO-3 keeps up to `LIVE_PARAMETERS` parameters whole, of which theirs counts one layer only, and a share of the gradients
      in 16 bits, which theirs leaves out; ours counts the rest of both as `buffers`.
    """
    world, trained, width = gpus * nodes, count.trained, precise.trained
    base = count.linear * precise.linear + count.other * precise.base
    weights = base + count.added * width
    if not zero.stage:
        # DistributedDataParallel keeps its buckets, the size of all gradients, beside the gradients.
        return States(int(weights), trained * width * (2 if world > 1 else 1), trained * 2 * width)
    master, adam, summed = 4 * trained, 8 * trained, 4 * trained
    gathered = buffers = 0
    if zero.stage == 3:
        gathered = count.largest * precise.base
        buffers = max(0, min(LIVE_PARAMETERS, count.linear + count.other) - count.largest) * precise.base
    gathered_gradients = count.largest * width if zero.stage == 3 and count.full else 0
    host = HOST_FACTOR * (master + adam + summed + (weights if zero.stage == 3 else 0)) / nodes
    if zero.offload:
        left = 0 if zero.stage == 3 else weights
        return States(int(gathered + left), int(gathered_gradients), 0, int(buffers), int(host))
    optimiser = int((master + adam) / world)
    if zero.stage == 3:
        buffers += trained * width / world
        return States(int(gathered + weights / world), int(gathered_gradients + summed / world), optimiser, int(buffers))
    cut = world if zero.stage == 2 else 1
    return States(int(weights), int(trained * width / cut + summed / world), optimiser)


@dataclass(frozen=True)
class Activations:
    """Bytes on one GPU: `kept` from forward to backward; `logits` of a chunk with their gradients; `layer`, in its backward.

    Logits and their gradients are gone when the backward pass reaches the layers: the larger of `logits` and `layer` counts.
    `saved` is what autograd keeps when the forward pass ends: `kept` and the part of the logits that the loss needs.
    """

    kept: int
    layer: int
    logits: int
    saved: int

    @property
    def peak(self) -> int:
        """The most that is there at any time."""
        return self.kept + max(self.layer, self.logits)


def activations(
    cost: ModelCost,
    layout: GistLayout,
    head_rows: int,
    precise: Precision,
    *,
    rank: int | None,
    targets: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    checkpointing: bool = False,
) -> Activations:
    """Activations of one packed row, with logits on `head_rows` rows; a `rank` means a frozen base with LoRA.

    Without checkpointing every layer keeps what `_layer` says; with it, its input only, and one layer at a time is run again.
    The norm before the head keeps its input and a scale a row; cosines and sines are shared by all layers. The loss keeps
    log-probabilities in float32, and when the backward pass starts, two gradients of that size are beside them. Where it is
    computed in chunks (`LOGITS`), it keeps what the head reads instead, and these are of one chunk; a
    trained head then has the gradient of a chunk beside the sum of those before it.
    While a layer's backward pass runs, gradients take the place of what has just been used, but for one of the stream; that of
    the context's rows of a LoRA's input is spread over all rows, which takes one more of the stream and one of the MLP's width.
    """
    rows, stream = layout.tokens, precise.stream
    chunks = head_chunks(head_rows, cost.vocabulary)
    shared = _shared(cost, rows, head_rows, precise, rank is None, chunks)
    rotary = 2 * rows * cost.head_dim * stream
    named = cost.targeted(targets) if rank is not None else None
    layers = [
        _layer(cost, layout, precise, rank=rank, named=named, dropout=dropout, last=last)
        for last in (False,) * min(1, cost.layers - 1) + (True,)
    ]
    inner = cost.linears["gate_proj"][1]
    working = rows * cost.hidden * stream
    if rank is not None:
        working = 2 * working + rows * inner * precise.product
    if checkpointing:
        kept = shared + rotary + cost.layers * rows * cost.hidden * stream
        # In float32 the first norm of the layer keeps the layer's input, which is kept already.
        layer = max(layers) - (rows * cost.hidden * 4 if stream == 4 else 0) + working
    else:
        kept, layer = shared + rotary + layers[0] * (cost.layers - 1) + layers[-1], working
    if precise.linear < 1:  # one weight at a time is unpacked from its 4 bits
        layer += max(i * o for i, o in cost.linears.values()) * precise.product
    head = 2 * cost.vocabulary * cost.hidden if precise.autocast and precise.base == 4 else 0
    loss = 4 * -(-head_rows // chunks) * cost.vocabulary
    gradient = cost.vocabulary * cost.hidden * precise.trained if rank is None and chunks > 1 else 0
    # Checkpointing holds cosines and sines without saving them through autograd.
    saved = kept - (rotary if checkpointing else 0) + (loss + head if chunks == 1 else 0)
    return Activations(int(kept), int(layer), 3 * loss + head + gradient, int(saved))


def _shared(cost: ModelCost, rows: int, head_rows: int, precise: Precision, full: bool, chunks: int) -> int:
    """Bytes that the norm before the head and the head keep."""
    kept = rows * (4 * cost.hidden + 4)
    if full:  # a trained norm keeps what it scales, a trained head what it reads
        kept += rows * cost.hidden * precise.stream
    if chunks > 1:
        kept += head_rows * cost.hidden * precise.stream
    elif full:
        kept += head_rows * cost.hidden * precise.product
    return kept


def _layer(
    cost: ModelCost,
    layout: GistLayout,
    precise: Precision,
    *,
    rank: int | None,
    named: set[str] | None,
    dropout: float,
    last: bool,
) -> int:
    """Bytes that one decoder layer keeps for its backward pass, for all rows of a packed row.

    - norms: the input in float32 and a float32 scale a row and norm; a trained norm also keeps what it scales;
    - attention: queries, its output, a float32 log-sum a head and row; keys and values of the row, and once more, with the
      gists that it reads, of every query; a mask for each run of queries; in the last layer of a hypernetwork for the read
      region only;
    - MLP: the gate's output, its SiLU and the up projection's output, whose product is `down_proj`'s input; in the last layer
      of a hypernetwork for the read region only;
    - inputs of linear layers and what LoRA keeps, see `_linear_layers`.
    """
    rows, product, stream = layout.tokens, precise.product, precise.stream
    context = 0 if rank is None else layout.compress_rows
    (hidden, q), (_, k), inner = cost.linears["q_proj"], cost.linears["k_proj"], cost.linears["gate_proj"][1]
    kept = 2 * rows * (4 * hidden + 4)
    kept += (rows * (q + k) * 4 + rows * (cost.heads + cost.kv_heads) * 4) if cost.qk_norm else 0
    if rank is None:
        kept += rows * (2 * hidden + (q + k if cost.qk_norm else 0)) * stream
    unread = context if last else 0
    kept += (rows - unread) * (2 * q * product + cost.heads * 4)
    runs = [run for run, end in zip(layout.runs, layout.run_ends, strict=True) if end > unread]
    if any(not run.reads for run in runs):
        kept += 2 * rows * k * product
    for run in runs:
        if run.reads:
            kept += 2 * run.count * (run.tokens + run.reads) * k * product
            kept += run.tokens * (run.tokens + run.reads) * product if run.tokens > 1 else 0
    kept += 3 * (rows - context if last else rows) * inner * product
    acting = set(cost.linears) if named is None else named & set(KEPT_IN_LAST_LAYER) if last else named
    return kept + _linear_layers(cost, rows, context, precise, rank=rank, acting=acting, dropout=dropout)


def _linear_layers(
    cost: ModelCost, rows: int, context: int, precise: Precision, *, rank: int | None, acting: set[str], dropout: float
) -> int:
    """Bytes that the linear layers `acting` of one decoder layer keep: their inputs, a frozen one none (see `_inputs`).

    LoRA keeps `rank` numbers a context row; under autocast there are 16-bit copies of weights that are kept in float32.
    """
    kept = 0
    for names, dtype in (
        (("q_proj", "k_proj", "v_proj"), precise.stream),
        (("o_proj",), precise.product),
        (("gate_proj", "up_proj"), precise.stream),
        (("down_proj",), precise.product),
    ):
        width, users = cost.linears[names[0]][0], len(acting.intersection(names))
        if users:
            kept += _inputs(width, users, dtype, rows, context, precise, full=rank is None, dropout=dropout)
    low_rank = 0 if rank is None else sum(sum(cost.linears[name]) for name in acting) * rank
    if rank is not None:
        kept += len(acting) * context * rank * precise.lora
    if precise.autocast:
        kept += 2 * low_rank
    if precise.copies_weights:
        kept += 2 * sum(i * o for i, o in cost.linears.values())
    return kept


def _inputs(
    width: int, users: int, dtype: int, rows: int, context: int, precise: Precision, *, full: bool, dropout: float
) -> int:
    """Bytes of the input that `users` linear layers share, of `width` numbers of `dtype` bytes a row.

    A trained layer, or LoRA, keeps its input. Where that is cut from a tensor as it is, the whole tensor stays, all rows of it;
    where it is cast, or dropped out of (a mask of a byte each), every layer keeps a copy of its own rows.
    """
    if full:
        return users * rows * width * 2 if precise.autocast and dtype == 4 else rows * width * dtype
    if dropout:
        return users * context * width * (precise.lora + 1)
    if dtype == precise.lora:
        return rows * width * dtype
    return users * context * width * precise.lora
