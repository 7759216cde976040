"""Models to be timed: a Llama of our own, any folder of a model, or a published shape with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from hyperllama.base.decoder import layers_of
from hyperllama.base.loading import find_config, load_base, random_base
from hyperllama.errors import UserError
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.hypernetworks.pooling import PoolingHypernetwork

GISTS, VOCABULARY, RANK = 16, 32_000, 16
OWN = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
# Published dimensions, from the configs that are shipped with us, and how many of their layers are taken unless told.
SHAPES = {"qwen3-0.6b": ("Qwen/Qwen3-0.6B-Base", 4), "qwen3-4b": ("Qwen/Qwen3-4B-Base", 1)}
KINDS = {"lora": GistHypernetwork, "pooling": PoolingHypernetwork}


def benchmark_base(folder: str | None = None, shape: str | None = None, layers: int | None = None) -> PreTrainedModel:
    """The model of a folder, or of a published shape with random weights, or else our own; its first `layers` layers.

    In float32, and always the same for the same arguments. UserError for more layers than there are.
    """
    set_seed(0)
    if folder is not None:
        return first_layers(load_base(folder, dtype="float32"), layers)
    if shape is None:
        return random_base(OWN | ({"num_hidden_layers": layers} if layers else {}), vocab_size=VOCABULARY)
    sizes, vocabulary = architecture_of(shape, layers)
    return random_base(sizes, vocab_size=vocabulary)


def architecture_of(shape: str, layers: int | None) -> tuple[dict[str, Any], int]:
    """The fields of a published model's config, with so many layers or the few of `SHAPES`, and its vocabulary."""
    name, few = SHAPES[shape]
    config = find_config(name).to_dict()
    vocabulary = config.pop("vocab_size")
    # A list with a word for each layer of the published model, which a config makes anew; and ids beside a tokenizer.
    for field in ("layer_types", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"):
        config.pop(field, None)
    return {**config, "num_hidden_layers": layers or few}, vocabulary


def first_layers(base: PreTrainedModel, layers: int | None) -> PreTrainedModel:
    """The model without the layers behind its first `layers`, or as it is for None; UserError if it has fewer."""
    found = layers_of(base)
    if layers is None or layers == len(found):
        return base
    if not 1 <= layers < len(found):
        raise UserError(f"--layers: the model has {len(found)} layers, so 1 to {len(found)} can be taken, not {layers}")
    del found[layers:]
    base.config.num_hidden_layers = layers
    if getattr(base.config, "layer_types", None):
        base.config.layer_types = base.config.layer_types[:layers]
    return base


def hypernetwork_on(base: PreTrainedModel, kind: str = "lora", gists: int = GISTS) -> Hypernetwork:
    """A hypernetwork of `KINDS` whose LoRA does something."""
    set_seed(0)
    hypernetwork = KINDS[kind](base, gists=gists, rank=RANK)
    with torch.no_grad():
        for matrix in hypernetwork.lora.B.values():
            matrix.weight.normal_(std=0.02)
    return hypernetwork.train()


def benchmark_hypernetwork() -> GistHypernetwork:
    """The model of the other benchmarks: our own Llama with gists."""
    return hypernetwork_on(benchmark_base())
