"""FLOPs and bytes of reading, answering, scoring and compressing, by formula, from a model's config alone.

One multiply-add counts as 2 FLOPs. Counted are matrix products: linear layers (2 * in * out a row), attention and the output
head. Norms, biases, activations, rotation, softmax and embedding lookups are left out, as in `torch.utils.flop_counter`.
Attention is counted over the full rectangle of queries by keys, as that counter counts it and as dense kernels compute it;
causal kernels skip up to half of it. All figures are for one sequence without padding; a batch costs their sum.

An example: HINT (Ivison et al. 2023, arXiv 2212.10315) compares n inputs of i tokens under an instruction of t tokens. At N
FLOPs a token, writing the instruction before each input costs N * n * (t + i), and encoding it once N * (t + n * i). A
compressed prefix is not alone in that: a prompt whose keys and values are cached is encoded once too. The two differ in the
size of the state that a task leaves (`ModelCost.state_bytes`), and in the attention that each query and each new token pays for
reading it (`past`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attention_masks import GistLayout, Segment
from hyperllama.base.checks import check_config
from hyperllama.base.decoder import head_dim, kv_heads
from hyperllama.errors import UserError
from hyperllama.hypernetworks.hint.settings import HintSettings
from hyperllama.objectives.losses import head_chunks

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# What `hyperllama.hypernetworks.last_layer` leaves of the last layer for rows that are compressed.
KEPT_IN_LAST_LAYER = ("k_proj", "v_proj")


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one forward and backward pass; `again` is what of the forward pass is computed once more on the way back."""

    forward: int
    backward: int
    again: int

    @property
    def total(self) -> int:
        """All that the hardware computes."""
        return self.forward + self.backward + self.again


@dataclass(frozen=True)
class ModelCost:
    """The sizes of a decoder that decide what it costs: L layers, H query heads and N key-value heads of D dimensions.

    `linears` are the linear layers of one decoder layer: name -> (in, out). `qk_norm`: queries and keys are normalised, as in
    Qwen3. Lengths are in tokens, results in FLOPs.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    linears: dict[str, tuple[int, int]]
    qk_norm: bool = False

    @classmethod
    def of(cls, config) -> ModelCost:
        """The sizes in a transformers config; UserError for a model that these formulas have not been checked on."""
        name = getattr(config, "name_or_path", "") or config.model_type
        if config.model_type not in ARCHITECTURES:
            raise UserError(f"{name}: FLOPs are known for {', '.join(ARCHITECTURES)}, not for {config.model_type}")
        check_config(config, name)
        hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        width = head_dim(config)
        linears = {
            "q_proj": (hidden, heads * width),
            "k_proj": (hidden, kv_heads(config) * width),
            "v_proj": (hidden, kv_heads(config) * width),
            "o_proj": (heads * width, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
        sizes = (config.num_hidden_layers, heads, kv_heads(config), width, hidden, config.vocab_size)
        return cls(*sizes, linears, qk_norm=config.model_type == "qwen3")

    @property
    def per_row(self) -> int:
        """FLOPs of all linear layers of the decoder for one row, without the head."""
        return self.layers * sum(2 * i * o for i, o in self.linears.values())

    @property
    def per_pair(self) -> int:
        """FLOPs of attention for one pair of a query row and a key row, over all heads and layers: scores and values."""
        return self._per_pair_and_layer * self.layers

    @property
    def _per_pair_and_layer(self) -> int:
        return 4 * self.heads * self.head_dim

    @property
    def per_head_row(self) -> int:
        """FLOPs of the output head for one row."""
        return 2 * self.hidden * self.vocabulary

    def tune(self, tokens: int, targets: int) -> int:
        """FLOPs of so many rows, `targets` with the head, through frozen weights and back; their attention is left out.

        The way back has gradients of rows only, so it costs what the way there does.
        """
        return 2 * (tokens * self.per_row + targets * self.per_head_row)

    def read(self, tokens: int, *, past: int = 0, head_rows: int = 0) -> int:
        """FLOPs of `tokens` new rows that attend to `past` earlier keys and to each other.

        `past` is a prefix or a cached context, whose own cost is not in here. The head is on `head_rows` of the new rows.
        """
        if not 0 <= head_rows <= tokens or past < 0:
            raise ValueError(f"no pass has {tokens} rows, {past} past keys and the head on {head_rows} rows")
        return self.per_row * tokens + self.per_pair * tokens * (past + tokens) + self.per_head_row * head_rows

    def generate(self, prompt: int, answer: int, *, past: int = 0) -> int:
        """FLOPs of generating `answer` tokens, an end token included, after a prompt behind `past` keys, with a cache.

        The pass over the prompt gives the first token; each of the answer - 1 steps after it reads one more row.
        """
        if prompt < 1 or answer < 1:
            raise ValueError(f"generation needs a prompt and an answer of at least one token, not {prompt} and {answer}")
        steps = answer - 1
        pairs = steps * (past + prompt) + steps * (steps + 1) // 2
        decode = (self.per_row + self.per_head_row) * steps + self.per_pair * pairs
        return self.read(prompt, past=past, head_rows=1) + decode

    def score(self, prompt: int, choices: Sequence[int], *, past: int = 0) -> int:
        """FLOPs of the likelihoods of answers of `choices` tokens each, after one prompt that they share.

        The prompt is read once and its last row scores the first token of every choice. A choice of c tokens then needs
        c - 1 rows of its own, which attend to the past, the prompt and themselves; each scores one more token.
        """
        if prompt < 1 or not choices or min(choices) < 1:
            raise ValueError(f"scoring needs a prompt and choices of at least one token, not {prompt} and {list(choices)}")
        own = sum(self.read(c - 1, past=past + prompt, head_rows=c - 1) for c in choices)
        return self.read(prompt, past=past, head_rows=1) + own

    def encode(self, context: int) -> int:
        """FLOPs of reading a context with the decoder alone, all its keys and values kept; no head, nothing skipped."""
        return self.read(context)

    def compress(self, context: int, gists: int, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """FLOPs of `GistHypernetwork.compress` for a context of `context` tokens; contexts packed in one pass add up.

        context + gists rows pass through the decoder with LoRA of rank `rank` on the linear layers named in `targets`
        (2 * rank * (in + out) a row). Of the last layer only keys and values, with their LoRA, are computed. No head.
        """
        if context < 1 or gists < 1:
            raise ValueError(f"compressing needs at least one token and one gist, not {context} and {gists}")
        return self.compress_packed(GistLayout([Segment(context + gists, gists=gists)]), rank, targets)

    def compress_packed(self, layout: GistLayout, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """As `compress`, for a packed row of segments that all have gists, such as the chunks of a context."""
        rows = layout.tokens * (self._context_row() + self._lora_row(rank, targets))
        return rows + self._per_pair_and_layer * (self.layers - 1) * rectangle(layout)

    def pool(
        self, context: int, gists: int, rank: int = 0, targets: str | Sequence[str] = "all-linear", *, attended: float = 0.0
    ) -> int:
        """FLOPs of `PoolingHypernetwork.compress` for a context of `context` tokens: the decoder over it, perhaps with LoRA,
        and in each layer scores, means and maps; with `attended`, the scores of that share of its tokens once more.
        """
        layout = GistLayout([Segment(context, gists=context)])
        read = self.compress_packed(layout, rank, targets) if rank else self.encode(context)
        if rank and attended:  # of the last layer queries too, all of them, without LoRA
            read += 2 * context * self.hidden * self.heads * self.head_dim
        scores_and_means = 3 * 2 * gists * context * self.kv_heads * self.head_dim
        maps = 2 * 2 * gists * self.kv_heads * self.head_dim**2
        choosing = math.ceil(attended * context) * self._per_pair_and_layer // 2 * context
        return read + self.layers * (scores_and_means + maps + choosing)

    def hint(self, context: int, prefix_rows: int, settings: HintSettings) -> int:
        """FLOPs of `HintHypernetwork.compress` for an instruction of `context` tokens alone.

        The decoder over it, all layers; a cross-attention of L * (P + sum of b) queries over it; an MLP for each of them and
        each kind of parameter; and its keys and values in every layer, with LoRA, where it is fused. In a batch the queries are
        projected once, and shorter instructions are padded to the longest in the cross-attention alone.
        """
        if context < 1:
            raise ValueError(f"compressing needs at least one token, not {context}")
        hidden, width, sizes = self.hidden, self.kv_heads * self.head_dim, settings.sizes()
        inner, columns = settings.heads * math.ceil(hidden / settings.heads), prefix_rows + sum(sizes.values())
        queries = self.layers * columns
        looking = queries * (4 * hidden * inner + 4 * context * inner) + 4 * context * hidden * inner if queries else 0
        outputs = prefix_rows * 2 * (hidden + width)
        outputs += sum(size * (2 * hidden + sum(self._beside(name))) for name, size in sizes.items())
        fused = 2 * context * 2 * (hidden * width + settings.fusion_rank * (hidden + width)) if settings.fusion else 0
        return self.encode(context) + looking + self.layers * (2 * settings.mlp_size * outputs + fused)

    def packed(self, layout: GistLayout) -> int:
        """FLOPs of every row of a packed row, with plain weights and no head."""
        return layout.tokens * self.per_row + self.per_pair * rectangle(layout)

    def adapters(self, rows: int, sizes: Mapping[str, int]) -> int:
        """FLOPs of adapters for `rows` rows, in all layers; `sizes` has b of each kind, see `hyperllama.base.adapters`."""
        return rows * self.layers * sum(2 * size * sum(self._beside(name)) for name, size in sizes.items())

    def _beside(self, kind: str) -> tuple[int, int]:
        """What a module with a kind of adapters beside it reads and writes a row."""
        return self.linears.get(kind, (self.hidden, self.hidden))

    def train(
        self,
        layout: GistLayout,
        head_rows: int,
        *,
        rank: int | None = None,
        targets: str | Sequence[str] = "all-linear",
        checkpointing: bool = False,
    ) -> StepCost:
        """FLOPs of one forward and backward pass over a packed row, with the head on `head_rows` rows.

        With a `rank` the base is frozen: LoRA acts on the context's rows, and the last layer leaves them out as in `compress`.
        A product with a frozen weight then has one gradient, that of its input, which costs as much as its forward pass; LoRA,
        attention, and every product without a `rank`, have two. Checkpointing runs each layer's forward pass once more, up to
        the last tensor that its backward pass needs: that is what `down_proj` reads, or what its LoRA's second matrix reads.
        A loss that is computed in chunks of rows has the head's product once more, checkpointing or not.
        """
        context = 0 if rank is None else layout.compress_rows
        pairs = [run.count * run.tokens * (run.reads + run.tokens) for run in layout.runs]
        last = sum(p for p, end in zip(pairs, layout.run_ends, strict=True) if end > context)
        attention = self._per_pair_and_layer * ((self.layers - 1) * sum(pairs) + last)
        head = self.per_head_row * head_rows
        down = 2 * math.prod(self.linears["down_proj"])
        if rank is None:
            linear, lora, gradients = layout.tokens * self.per_row, 0, 2
            spared = layout.tokens * self.layers * down
        else:
            linear = (layout.tokens - context) * self.per_row + context * self._context_row()
            lora, gradients = context * self._lora_row(rank, targets), 1
            spared = (layout.tokens - context) * down
            if "down_proj" in self.targeted(targets):
                spared += context * (self.layers - 1) * 2 * rank * self.hidden
            else:
                spared += layout.tokens * (self.layers - 1) * down
        layers = linear + lora + attention
        backward = gradients * (linear + head) + 2 * (lora + attention)
        again = layers - spared if checkpointing else 0
        return StepCost(layers + head, backward, again + (head if head_chunks(head_rows, self.vocabulary) > 1 else 0))

    def targeted(self, targets: str | Sequence[str]) -> set[str]:
        """The names of linear layers that `targets` of a LoRA means; ValueError for one that the model does not have."""
        named = set(self.linears) if targets == "all-linear" else {targets} if isinstance(targets, str) else set(targets)
        if unknown := named - set(self.linears):
            raise ValueError(f"the model has no linear layers {sorted(unknown)}, only {', '.join(self.linears)}")
        return named

    def _context_row(self) -> int:
        """FLOPs of the linear layers for a row that is compressed: of the last layer, keys and values only."""
        cost = {name: 2 * i * o for name, (i, o) in self.linears.items()}
        return (self.layers - 1) * sum(cost.values()) + sum(cost[name] for name in KEPT_IN_LAST_LAYER)

    def _lora_row(self, rank: int, targets: str | Sequence[str]) -> int:
        """FLOPs of LoRA for a row that is compressed."""
        named = self.targeted(targets)
        cost = {name: 2 * rank * (i + o) for name, (i, o) in self.linears.items() if name in named}
        return (self.layers - 1) * sum(cost.values()) + sum(cost.get(name, 0) for name in KEPT_IN_LAST_LAYER)

    def state_bytes(self, rows: int, bytes_per_element: int = 2) -> int:
        """Bytes of the keys and values of `rows` rows (gists of a prefix, or tokens of a cached context) in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * rows * bytes_per_element

    def module_bytes(self, rows: int, sizes: Mapping[str, int], bytes_per_element: int = 2) -> int:
        """Bytes of a task module of HINT: the keys and values of `rows` rows, prefix and fused instruction, and adapters.

        `sizes` as in `adapters`.
        """
        matrices = self.layers * sum(size * sum(self._beside(name)) for name, size in sizes.items())
        return self.state_bytes(rows, bytes_per_element) + matrices * bytes_per_element


def rectangle(layout: GistLayout) -> int:
    """Pairs of a query row and a key row that attention is computed over, those that a mask hides included."""
    return sum(run.count * run.tokens * (run.reads + run.tokens) for run in layout.runs)


def amortised(encode: float, per_query: float, n: int) -> float:
    """The cost of one query, in the unit of the arguments, when a task's state is made once and read by `n` queries."""
    if n < 1:
        raise ValueError(f"a task's state is shared by at least one query, not {n}")
    return encode / n + per_query
