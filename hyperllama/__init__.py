"""HyperLlama: hypernetworks by gisting. Few-shot examples in, a soft prefix out.

Names are imported when they are first used, so that `import hyperllama` and the command line start at once.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "GistHypernetwork": "hyperllama.hypernetwork",
    "Manifest": "hyperllama.prefix",
    "Prefix": "hyperllama.prefix",
    "Reader": "hyperllama.reader",
    "Episode": "hyperllama.data.episode",
    "Example": "hyperllama.data.episode",
    "GistBatch": "hyperllama.data.packing",
    "TextFormat": "hyperllama.data.text",
    "UserError": "hyperllama.errors",
    "load_base": "hyperllama.backbone",
    "load_tokenizer": "hyperllama.backbone",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'hyperllama' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
