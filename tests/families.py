"""Tiny random models of every causal LM class of transformers that a config of a few settings can make."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, LAYERS = 97, 2
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that attention is far from uniform
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What many published models of a family have, and what is as little as a window or dropout that a config turns on by itself.
PLAIN = {"sliding_window": None, "attention_dropout": 0.0, "layer_types": ["full_attention"] * LAYERS}
LARGEST = 3_000_000  # weights of a model that is tiny


def families() -> list[str]:
    """The `model_type` of every causal LM that transformers has."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(family: str, seed: int = 0):
    """A random model of a family, or None if none so small can be made of these settings."""
    for settings in (SIZES | PLAIN, SIZES):
        try:
            default = AutoConfig.for_model(family)
            config = AutoConfig.for_model(family, **{k: v for k, v in settings.items() if _takes(default, k)})
            if getattr(config, "num_hidden_layers", None) != LAYERS or config.hidden_size != SIZES["hidden_size"]:
                return None
            with torch.device("meta"):  # some stay large whatever they are told, and take long to make
                if sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > LARGEST:
                    return None
            set_seed(seed)
            return _moved(AutoModelForCausalLM.from_config(config))
        except Exception:  # whatever a config says to settings that are not its own
            continue
    return None


@torch.no_grad()
def _moved(model):
    """Norms and biases begin at ones and zeros, behind which an order of computation can hide that trained weights show."""
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.is_floating_point():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _takes(config, name: str) -> bool:
    own = getattr(type(config), name, None)
    return hasattr(config, name) and not (isinstance(own, property) and own.fset is None)


# Proportions and rotary settings of published models, made small: heads that share keys, tied words, scaled frequencies.
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "SmolLM2": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "tie_word_embeddings": True}),
    "Llama 3": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "rope_parameters": LLAMA_3_ROPE}),
    "Qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def shaped_model(shape: str):
    """A tiny model with the proportions of a published one."""
    family, changes = SHAPES[shape]
    default = AutoConfig.for_model(family)
    settings = {k: v for k, v in (SIZES | PLAIN).items() if _takes(default, k)}
    set_seed(0)
    return _moved(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**settings, **changes})))
