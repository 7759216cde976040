"""Memory of a training step that is planned, beside what the process takes, for every kind.

    python -m benchmarks.memory [--json FILE]

The base of benchmarks/training_step.py, a Llama of 6 layers and hidden size 512 with 32,000 words in float32 under bf16
autocast, and the first two of its contexts, 200 and 420 tokens with 4 queries each; 16 gists, LoRA of rank 16. Measured is what
PyTorch's allocator has given out at most, with gradients there already, as they are when they accumulate.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers import set_seed

from benchmarks.bases import GISTS, OWN, VOCABULARY
from benchmarks.measure import allocated_bytes, machine, parser, write_json
from benchmarks.training_step import ragged_episodes
from eval.sizing import Steps, base_config, batches_of
from hyperllama.base.loading import default_device, random_base
from hyperllama.commands.train import packed_model
from hyperllama.data.packing import GistBatch
from hyperllama.hypernetworks.hint.settings import HintSettings
from hyperllama.hypernetworks.settings import LoraSettings, PoolingSettings
from hyperllama.objectives.packed_model import PackedModel
from hyperllama.recipe.schema import FullAttentionRecipe, GistRecipe, ModelRecipe, Recipe

LORA = {"lora": LoraSettings(rank=16)}
TRAINED = {
    "lora": {"gist": GistRecipe(GISTS, "lora"), **LORA},
    "pooling": {"gist": GistRecipe(GISTS, "pooling")},
    "pooling, lora": {"gist": GistRecipe(GISTS, "pooling"), "pooling": PoolingSettings(lora=True), **LORA},
    "full": {"gist": GistRecipe(GISTS, "full")},
    "gisting": {"gist": GistRecipe(GISTS, "gisting")},
    "hint": {"gist": GistRecipe(GISTS, "hint")},
    "hint, paper": {"gist": GistRecipe(GISTS, "hint"), "hint": HintSettings(regime="paper")},
    "full attention": {"method": "full_attention"},
    "full attention, lora": {"method": "full_attention", "full_attention": FullAttentionRecipe(lora=True), **LORA},
}


def main() -> None:
    chosen = parser(__doc__, rounds=1).parse_args()
    figures = {}
    print(f"{'MB':28}{'kept':>10}{'peak':>10}{'measured':>10}{'planned / measured':>20}")
    for name in TRAINED:
        for checkpointing in (False, True):
            label = f"{name}{', checkpointing' if checkpointing else ''}"
            found = figures[label] = compared(name, checkpointing)
            shown = "".join(f"{found[key] / 1e6:10,.1f}" for key in ("kept", "peak", "measured"))
            print(f"{label:28}{shown}{found['peak'] / found['measured']:20.3f}", flush=True)
    print(f"\n{machine()}")
    write_json(chosen.json, figures)


def compared(name: str, checkpointing: bool) -> dict[str, int]:
    """Bytes that a step of a kind keeps and takes at its peak, as planned, and the peak as measured."""
    model = ModelRecipe(architecture=OWN, vocab_size=VOCABULARY)
    training = {"bf16": True, "gradient_checkpointing": checkpointing}
    recipe = Recipe(output="out", model=model, training=training, **TRAINED[name])
    (batch,) = batches_of(recipe, ragged_episodes()[:2], 2)
    planned = Steps(recipe, base_config(recipe)).of(batch)
    set_seed(0)
    real = packed_model(recipe, random_base(OWN, vocab_size=VOCABULARY)).to(default_device()).train()
    if batch.sinks:
        real.sink = 0
    if checkpointing:
        real.activation_checkpointing_enable()
    step = partial(_step, real, batch.to(default_device()))
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return {"kept": planned.kept, "peak": planned.peak, "measured": allocated_bytes(step)}


def _step(model: PackedModel, batch: GistBatch) -> None:
    with torch.autocast(batch.ids.device.type, dtype=torch.bfloat16):
        loss = model(batch).sum
    loss.backward()


if __name__ == "__main__":
    main()
