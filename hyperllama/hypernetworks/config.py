"""What a saved hypernetwork says of itself: its config file and its model card."""

from __future__ import annotations

from pathlib import Path

from hyperllama.data.chunking import Chunking
from hyperllama.errors import UserError
from hyperllama.files import read_json
from hyperllama.hypernetworks.registry import KINDS

CONFIG, CARD, GISTS = "hypernetwork.json", "README.md", "gists.safetensors"

FORMAT_VERSION = 4


def read_config(folder: str | Path) -> dict:
    """The manifest of a saved hypernetwork; UserError if the folder is not one, or a file of it is missing."""
    folder = Path(folder)
    config = read_json(folder / CONFIG, "a hypernetwork's manifest") if (folder / CONFIG).is_file() else {"files": [CONFIG]}
    if config.get("format_version", FORMAT_VERSION) < FORMAT_VERSION:
        raise UserError(
            f"{folder}: a hypernetwork of an older format, which was trained on other tokens for the same text; train it again "
            "with its recipe.yaml and a new output"
        )
    missing = [name for name in config["files"] if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: not a hypernetwork, it has no {', '.join(missing)}; give the folder of a finished training run"
        )
    return config


def _card(config: dict, parameters: int) -> str:
    base = config["base"]
    chunking = Chunking(**config["chunking"])
    cut = "" if chunking.graph == "single" else f" for each chunk of {chunking.chunk_tokens} tokens ({chunking.graph})"
    return f"""---
base_model: {base["name"]}
library_name: hyperllama
tags: [gisting, hypernetwork, soft-prefix]
---

# A hypernetwork for {base["name"]}

It reads the examples of a task and turns them into a soft prefix: {config["gists"]} keys and values at every layer{cut}. The
base model, frozen, reads the prefix instead of the examples.

| | |
|---|---|
| base model | `{base["name"]}`, weights {base["weights"][:16]} |
| kind | {config["kind"]}: {KINDS[config["kind"]].summary} |
| rows of a prefix | {config["gists"]}{cut}{"" if config["sink"] is None else ", behind the base's own first token"} |
| trained parameters | {parameters:,} |
| data | {config["notes"].get("data", "not recorded")} |

```
hyperllama compress THIS_FOLDER examples.jsonl --output task.safetensors
hyperllama generate task.safetensors --input "a new input"
```

The weights are in {", ".join(f"`{name}`" for name in config["files"])}.
"""
