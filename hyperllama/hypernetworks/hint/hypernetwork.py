"""HINT as one more kind of hypernetwork: an instruction becomes prefix rows, adapters and rows of its own encoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_masks import GistLayout, Segment, rotate
from hyperllama.base.adapters import BESIDE, AdaptedCalls, Adapters, Stack
from hyperllama.base.copies import train_all
from hyperllama.base.decoder import (
    head_dim,
    inverse_frequencies,
    kv_heads,
    layers_of,
    packed_arguments,
    part,
    require,
)
from hyperllama.base.loading import load_weights_into
from hyperllama.base.mlp_blocks import BLOCK_ROWS, gather_mlps_whole, mlps_in_blocks
from hyperllama.base.tensor_files import load_parameters
from hyperllama.data.packing import GistBatch
from hyperllama.errors import UserError
from hyperllama.files import from_fields, write_atomically
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.gisting import save_model
from hyperllama.hypernetworks.hint.fusion import Fusion
from hyperllama.hypernetworks.hint.generator import Generator
from hyperllama.hypernetworks.hint.settings import HintSettings
from hyperllama.objectives.losses import TokenLoss
from hyperllama.prefixes.capture import States, prefixes_of
from hyperllama.prefixes.prefix import Prefix

WEIGHTS = "hint.safetensors"


class HintHypernetwork(Hypernetwork):
    """Instructions in, task modules out (Ivison et al. 2023, arXiv 2212.10315): one pass reads, another generates and decodes.

    The hyperencoder is the base itself, modules off: its final normalised states of the instruction's tokens, packed, so that
    there is no padding to depend on. Of them `generator` makes `gists` prefix rows and adapters beside every MLP, and `fusion`
    rows to be read. Rows that read see the encoded instruction, at positions 0, 1, ..., then the prefix rows, then themselves.
    With regime "paper" the base is trained too, and the modules belong to what it becomes.

    Raises UserError for sizes that make no sense, contexts in chunks, or `elastic`.
    """

    kind = "hint"
    own_settings = ("hint",)
    fewest_gists = 0

    def __init__(self, base: PreTrainedModel, *, hint: HintSettings | dict | None = None, **settings):
        super().__init__(base, **settings)
        self.hint = from_fields(HintSettings, hint, "hint") if isinstance(hint, dict) else hint or HintSettings()
        if problems := self.hint.size_problems(self.num_gists):
            raise UserError(f"hint: {'; '.join(problems)}")
        if self.chunking.graph != "single":
            raise UserError("gist.chunking.graph: hint reads an instruction as a whole; choose single")
        if self.elastic:
            raise UserError("gist.elastic: the modules of hint have one size; set it to false")
        if self.trains_base and self.mix.taught:
            raise UserError(
                f"objectives.{self.mix.taught[0]}: the regime paper changes the model that would teach; set it to 0"
            )
        config = base.config
        sizes = (config.hidden_size, config.num_hidden_layers, kv_heads(config), head_dim(config), self.num_gists)
        beside = {name: BESIDE[name] for name in self.hint.sizes()}
        require(base, list(beside.values()), "hint.adapter_size or hint.lora_rank")
        modules = {name: part(layers_of(base)[0], place) for name, place in beside.items()}
        widths = {name: getattr(module, "out_features", config.hidden_size) for name, module in modules.items()}
        pairs = {name: (size, widths[name]) for name, size in self.hint.sizes().items()}
        self.generator = Generator(*sizes, pairs, self.hint).to(base.device) if self.num_gists or pairs else None
        self.fusion = Fusion(base, self.hint.fusion_rank) if self.hint.fusion else None
        self.calls = AdaptedCalls(base, beside)
        base.requires_grad_(False)
        if self.trains_base:
            train_all(base, "the regime paper")
        else:
            gather_mlps_whole(base)

    @property
    def trains_base(self) -> bool:
        return self.hint.trains_base

    @property
    def keeps_context(self) -> bool:
        return self.hint.keeps_context

    def settings(self) -> dict:
        return {**super().settings(), "hint": dataclasses.asdict(self.hint)}

    def forward(self, batch: GistBatch) -> TokenLoss:
        """Read the instructions, and answer with their modules. The teacher, if there is one, reads without any."""
        ids, layout, reading = batch.halves()
        states, stack = self.task_modules(ids, layout)
        teacher = self.teach(batch)
        sinks = self.sink_rows(reading.layout.positions[: reading.sinks])
        naming = self.calls.naming(stack, reading.reader_rows(), self.base.device)
        return self.reading_loss(reading, layout, states, sinks, teacher, **naming)

    def remove(self) -> None:
        """Take the hooks off the base."""
        self.calls.remove()

    def gist_states(
        self, ids: Tensor, layout: GistLayout, *, given: States | None = None, block_rows: int | None = BLOCK_ROWS
    ) -> States:
        return self.task_modules(ids, layout, block_rows=block_rows)[0]

    def task_modules(
        self, ids: Tensor, layout: GistLayout, *, block_rows: int | None = BLOCK_ROWS
    ) -> tuple[States, Stack | None]:
        """What instructions become: rows as `gist_states` gives them, and adapters, of each task in the order of `layout`.

        The last `num_gists` rows of a task stand for prefix rows and are not read.
        """
        rows = [segment.tokens for segment in layout.segments]
        tokens = [n - self.num_gists for n in rows]
        if min(tokens) < 1:
            raise UserError("hint needs at least one token of instruction or examples for each task")
        own = [piece[:, :n] for piece, n in zip(ids.split(rows, 1), tokens, strict=True)]
        read, encoded = self.hyperencode(torch.cat(own, 1), GistLayout([Segment(n) for n in tokens]), block_rows)
        made = self.generator(encoded.split(tokens)) if self.generator is not None else {}
        kinds = self.hint.sizes()
        pairs = {kind: tuple(made[f"{kind}_{side}"].to(self.base.dtype) for side in ("down", "up")) for kind in kinds}
        return self._rows(layout, tokens, read, made), Stack(pairs) if pairs else None

    def hyperencode(self, ids: Tensor, layout: GistLayout, block_rows: int | None = None) -> tuple[list[Tensor], Tensor]:
        """States (T, hidden) of packed instructions: what fusion projects at each layer, and the final normalised ones.

        With gradients only where the base is trained.
        """
        layout = layout.to(ids.device)
        trained = torch.is_grad_enabled() and self.trains_base
        long = block_rows is not None and layout.tokens > block_rows and not trained
        with torch.set_grad_enabled(trained), mlps_in_blocks(self.base, block_rows) if long else nullcontext():
            arguments = packed_arguments(self.base, layout, self.backend)
            of_layers = self.hint.fusion and self.hint.fusion_of == "layers"
            read = self.base.get_decoder()(input_ids=ids, use_cache=False, output_hidden_states=of_layers, **arguments)
        final = read.last_hidden_state[0]
        depth = self.base.config.num_hidden_layers
        return [x[0] for x in read.hidden_states[:-1]] if of_layers else [final] * depth, final

    def _rows(self, layout: GistLayout, tokens: list[int], read: list[Tensor], made: dict[str, Tensor]) -> States:
        """Of each context its encoded tokens, if they are read, and its prefix rows; keys stand where `layout` has them."""
        config, count, rows = self.base.config, sum(tokens), self.num_gists
        fused = self.fusion(self.base, read) if self.fusion is not None else None
        # Rows come as all tokens, then all prefixes; they go context by context.
        first, order = count if fused else 0, []
        for i, (n, end) in enumerate(zip(tokens, accumulate(tokens))):
            order += range(end - n, end) if fused else ()
            order += range(first + i * rows, first + (i + 1) * rows)
        order = torch.tensor(order, dtype=torch.long, device=read[0].device)
        places, inv_freq = layout.positions[layout.gist_rows], inverse_frequencies(self.base)
        nothing = read[0].new_zeros(kv_heads(config), 0, head_dim(config))
        states = []
        for layer in range(config.num_hidden_layers):
            sides = []
            for side, name in enumerate(("prefix_keys", "prefix_values")):
                parts = [fused[layer][side]] if fused else []
                parts += [made[name][layer].transpose(0, 1).flatten(1, 2)] if name in made else []
                sides.append(torch.cat([nothing, *parts], 1)[:, order])
            keys, values = sides
            states.append((rotate(keys, places, inv_freq).to(self.base.dtype), values.to(self.base.dtype)))
        return states

    @torch.no_grad()
    def encode(
        self,
        ids: Tensor,
        layout: GistLayout,
        readers: Sequence[Sequence[int]],
        *,
        sinks: int = 0,
        block_rows: int = BLOCK_ROWS,
    ) -> list[Prefix]:
        """As of every hypernetwork, with adapters in the prefixes; a reader reads the segments of one task."""
        layout = layout.to(self.base.device)
        states, stack = self.task_modules(ids.to(self.base.device), layout, block_rows=block_rows)
        prefixes = prefixes_of(states, layout, readers, inverse_frequencies(self.base))
        for prefix, reads in zip(prefixes, readers, strict=True):
            if stack is not None:
                pairs = {kind: tuple(side[:, reads[0]].clone() for side in pair) for kind, pair in stack.pairs.items()}
                prefix.adapters = Adapters(pairs)
        return prefixes

    def compress_flops(self, cost: Any, tokens: int) -> int:
        return cost.hint(tokens, self.num_gists, self.hint)

    def save_weights(self, folder: Path) -> list[str]:
        own = {name: x.detach().cpu().contiguous() for name, x in self.trainable().items() if not name.startswith("base.")}
        write_atomically(folder / WEIGHTS, safetensors.torch.save(own))
        if not self.trains_base:
            return [WEIGHTS]
        self.folder = folder
        return [WEIGHTS, *save_model(self.base, self.tokenizer, folder)]

    def load_weights(self, folder: str | Path) -> None:
        own = {name: x for name, x in self.trainable().items() if not name.startswith("base.")}
        load_parameters(Path(folder) / WEIGHTS, own, "a whole safetensors file of HINT", optional=["marker"])
        if self.trains_base:
            self.folder = Path(folder)
            load_weights_into(self.base, folder)
