"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): the keys and values of a prefix are all that is trained.

Where a tuned prefix starts from decides how many steps and examples it needs; Phang 2024 (arXiv 2402.16817, section 4.3) starts
from a generated one. The ways to start are functions here, each of which makes a `Prefix`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_masks import rotate
from hyperllama.base.decoder import inverse_frequencies, kv_heads
from hyperllama.base.distributed import gathered
from hyperllama.base.tensor_files import load_parameters
from hyperllama.data.packing import GistBatch
from hyperllama.errors import UserError
from hyperllama.files import write_atomically
from hyperllama.objectives.losses import TokenLoss
from hyperllama.objectives.mix import ANSWERS, Mix
from hyperllama.objectives.packed_model import PackedModel
from hyperllama.prefixes.prefix import Prefix

WEIGHTS = "tuner.safetensors"
TAUGHT = Mix(answer=0.0, distillation=1.0)


class PrefixTuner(PackedModel):
    """Prefixes of P tasks, trained at once in packed passes of a frozen model: `keys` and `values` (L, P, N, G, D), float32.

    `hidden` sets a two-layer MLP between what is trained and the prefix, as Li & Liang advise for stability. It is added to
    the start and its last matrix begins at zero, so that step 0 is the start, and it is folded away by `prefixes`. A sink, the
    base's own first row where a manifest says so, stays as it is.

    Raises UserError if the prefixes are not of one shape, or not of this model.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        starts: Mapping[str, Prefix],
        *,
        hidden: int | None = None,
        backend: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__(base, tokenizer, backend)
        for prefix in starts.values():
            prefix.refuse_modules("prefix tuning starts from")
        shapes = {(p.layers, p.kv_heads, p.rows, p.head_dim) for p in starts.values()}
        if len(shapes) != 1:
            raise UserError(
                f"prefixes that are tuned together need one shape, not (layers, kv_heads, rows, head_dim) of {sorted(shapes)}"
            )
        (self.shape,) = shapes
        config = base.config
        own = (config.num_hidden_layers, kv_heads(config))
        if own != self.shape[:2]:
            raise UserError(f"the model has {own[0]} layers of {own[1]} key-value heads, the prefixes {self.shape[:2]}")
        sinks = {p.manifest is not None and p.manifest.sink is not None for p in starts.values()}
        if len(sinks) != 1:
            raise UserError(
                "prefixes that are tuned together begin with the base's own first token all or none; tune them apart"
            )
        self.sinks = int(sinks.pop())
        self.names = {name: i for i, name in enumerate(starts)}
        self.manifests = {name: prefix.manifest for name, prefix in starts.items()}
        for side in ("keys", "values"):
            stacked = [torch.stack(list(getattr(prefix, side))) for prefix in starts.values()]
            sink, start = torch.stack(stacked, dim=1).float().to(base.device).tensor_split([self.sinks], 3)
            self.register_parameter(side, nn.Parameter(start.contiguous()))
            self.register_buffer(f"sink_{side}", sink.contiguous(), persistent=False)
        layers, heads, rows, width = self.shape
        tuned = (layers, heads, rows - self.sinks, width)
        self.mlp = _Reparametrisation(tuned, len(starts), hidden).to(base.device) if hidden else None
        if self.mlp is not None:
            # What the MLP adds is trained; the start stays as it is.
            self.keys.requires_grad_(False)
            self.values.requires_grad_(False)

    @property
    def rows(self) -> int:
        """The rows of each prefix, sink included."""
        return self.shape[2]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(self, batch: GistBatch, taught: Tensor | None = None) -> TokenLoss:
        """Cross entropy of a packed batch whose contexts are the G placeholder rows of its `tasks`, all named in this tuner.

        Of a batch with a teacher, the divergence from what that one says; `taught` (n, hidden size) are its hidden states at
        the targets, if they are known already.
        """
        if taught is None and batch.teacher is not None:
            taught = self.taught(batch.teacher)
        # Indices are the host's, so nothing is copied to the device and nothing there has to be looked at.
        places = [self.names[name] for name in batch.tasks]
        each = (x.unbind(1) for x in self._current())  # P of (L, N, G, D)
        keys, values = (torch.cat([one[i] for i in places], dim=2) for one in each)  # (L, N, p * G, D)
        if any(batch.layout.starts[: len(places)]):
            gists = torch.arange(self.rows, device=keys.device).repeat(len(places))
            shifts = batch.layout.positions[: len(gists)] - gists
            keys = rotate(keys, shifts, inverse_frequencies(self.base))
        states, ids = list(zip(keys, values)), batch.ids[:, keys.shape[2] :]
        mix = ANSWERS if taught is None else TAUGHT
        return self.answer_loss(batch, states, mix=mix, teacher=taught, apart=True, input_ids=ids)

    def _current(self) -> tuple[Tensor, Tensor]:
        keys, values = self.keys, self.values
        if self.mlp is not None:
            added_keys, added_values = self.mlp()
            keys, values = keys + added_keys, values + added_values
        return torch.cat([self.sink_keys, keys], 3), torch.cat([self.sink_values, values], 3)

    @torch.no_grad()
    def prefixes(self) -> dict[str, Prefix]:
        """The prefixes as they stand, in the model's dtype; the MLP is folded in. Under ZeRO-3 all ranks must call it."""
        with gathered(p for name, p in self.named_parameters() if not name.startswith("base.")):
            keys, values = (x.detach().to(self.base.dtype, copy=True) for x in self._current())
        return {
            name: Prefix(keys[:, i].clone().unbind(), values[:, i].clone().unbind(), self.manifests[name])
            for name, i in self.names.items()
        }

    def save_pretrained(self, folder: str | Path, notes: dict | None = None) -> None:
        """Write what is trained, with the start, into one safetensors file: a checkpoint. `prefixes` are what is used."""
        kept = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters() if not name.startswith("base.")}
        write_atomically(Path(folder) / WEIGHTS, safetensors.torch.save(kept, {"tasks": json.dumps(list(self.names))}))

    def load_weights(self, folder: str | Path) -> None:
        """Read a checkpoint that `save_pretrained` wrote."""
        own = {name: p for name, p in self.named_parameters() if not name.startswith("base.")}
        load_parameters(Path(folder) / WEIGHTS, own, "a whole safetensors file of prefixes")


class _Reparametrisation(nn.Module):
    """G embeddings a task through one shared two-layer MLP to the keys and values of every layer; zero at the start."""

    def __init__(self, shape: tuple[int, int, int, int], tasks: int, hidden: int):
        super().__init__()
        self.shape = (shape[0], 2, shape[1], shape[3])  # L, keys and values, N, D
        width = shape[0] * 2 * shape[1] * shape[3]
        self.embeddings = nn.Parameter(torch.randn(tasks, shape[2], hidden))
        self.inner, self.outer = nn.Linear(hidden, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self) -> Tensor:
        """What is added to keys and values: (2, L, P, N, G, D)."""
        made = self.outer(self.inner(self.embeddings).tanh()).unflatten(-1, self.shape)  # (P, G, L, 2, N, D)
        return made.permute(3, 2, 0, 4, 1, 5)
