"""HyperLlama: hypernetworks by gisting. Few-shot examples in, a soft prefix out.

Names are imported when they are first used, so that `import hyperllama` and the command line start at once.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Episode": "hyperllama.data.episode",
    "Example": "hyperllama.data.episode",
    "FullHypernetwork": "hyperllama.hypernetworks.full_copy",
    "GistBatch": "hyperllama.data.packing",
    "GistHypernetwork": "hyperllama.hypernetworks.gist_lora",
    "GistingHypernetwork": "hyperllama.hypernetworks.gisting",
    "HintHypernetwork": "hyperllama.hypernetworks.hint.hypernetwork",
    "Manifest": "hyperllama.prefixes.manifest",
    "PoolingHypernetwork": "hyperllama.hypernetworks.pooling",
    "Prefix": "hyperllama.prefixes.prefix",
    "PrefixStore": "hyperllama.prefixes.store",
    "Reader": "hyperllama.inference.reader",
    "TextFormat": "hyperllama.data.text",
    "UserError": "hyperllama.errors",
    "compress": "hyperllama.commands.compress",
    "from_peft": "hyperllama.prefixes.export.peft",
    "load_base": "hyperllama.base.loading",
    "load_hypernetwork": "hyperllama.hypernetworks.loading",
    "load_tokenizer": "hyperllama.base.loading",
    "to_peft": "hyperllama.prefixes.export.peft",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'hyperllama' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
