"""What a saved hypernetwork says of itself: its config file and its model card."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hyperllama.base.identity import BaseIdentity
from hyperllama.data.chunking import SINGLE, Chunking
from hyperllama.data.text import Limits, TextFormat
from hyperllama.errors import UserError
from hyperllama.files import from_fields, is_path, read_json
from hyperllama.hypernetworks.registry import KINDS

CONFIG, CARD, GISTS = "hypernetwork.json", "README.md", "gists.safetensors"

FORMAT_VERSION = 4
SHIPPED = {"smollm2": "pretrained/smollm2-135m"}  # hypernetworks that come with this package, by name


@dataclass(frozen=True)
class _Files:
    files: list


@dataclass(frozen=True)
class _Config(_Files):
    """What every kind's manifest says."""

    kind: str
    gists: int
    elastic: bool
    base: dict
    dtype: Literal["float32", "bfloat16", "float16"]
    sink: int | None = None
    chunking: Chunking = SINGLE
    notes: dict = field(default_factory=dict)


def local(name: str | Path) -> str | Path:
    """The folder of a hypernetwork that comes with this package, if it is named and nothing here has that name; else `name`."""
    if str(name) not in SHIPPED or Path(name).exists():
        return name
    folder = SHIPPED[str(name)]
    # Beside the source, or where an installation puts its data.
    places = [Path(__file__).parents[2], Path(sysconfig.get_path("data")) / "share" / "hyperllama"]
    return next((place for place in places if (place / folder).is_dir()), places[0]) / folder


def read_config(folder: str | Path) -> dict:
    """The manifest of a saved hypernetwork; UserError if the folder is not one, or a file of it is missing."""
    folder = Path(folder)
    found = read_json(folder / CONFIG, "a hypernetwork's manifest") if (folder / CONFIG).is_file() else {"files": [CONFIG]}
    if isinstance(found, dict) and found.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        if found["format_version"] in range(FORMAT_VERSION):
            raise UserError(
                f"{folder}: a hypernetwork of an older format, which was trained on other tokens for the same text; train it "
                "again with its recipe.yaml and a new output"
            )
        raise UserError(f"{folder}: a hypernetwork of a format that this HyperLlama does not know; upgrade it")
    files = from_fields(_Files, found, str(folder / CONFIG)).files
    if wrong := [name for name in files if not isinstance(name, str) or name != Path(name).name or len(name) > 255]:
        raise UserError(f"{folder / CONFIG}: files has {str(wrong[0])[:60]!r}, which is no name of a file beside it")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(
            f"{folder}: not a hypernetwork, it has no {', '.join(missing)}; give the folder of a finished training run"
        )
    config = from_fields(_Config, found, str(folder / CONFIG))
    try:
        json.dumps(found, allow_nan=False)
    except ValueError:
        raise UserError(f"{folder / CONFIG}: has a number that is not finite; train it again, or copy it again") from None
    from_fields(BaseIdentity, config.base, f"{folder / CONFIG}: base")
    for key, kind in (("format", TextFormat), ("limits", Limits)):
        from_fields(kind, config.notes.get(key, {}), f"{folder / CONFIG}: notes: {key}")
    if config.gists < 0 or config.chunking.chunk_tokens < 1:
        raise UserError(f"{folder / CONFIG}: gists and chunk_tokens are counts, not {config.gists} and {config.chunking}")
    return found


def check_gists(run: str | Path, config: dict, gists: int | None) -> None:
    """UserError if the hypernetwork of a config cannot make prefixes of so many gists; None is all of them."""
    if gists is not None and gists < config["gists"] and not config["elastic"]:
        raise UserError(
            f"{run}: was trained for all of its {config['gists']} gists only, not for {gists}; leave that out, or train with "
            "gist.elastic=true"
        )
    if gists is not None and gists > config["gists"]:
        raise UserError(f"{run}: makes prefixes of 1 to {config['gists']} gists, not of {gists}")


def _card(config: dict, parameters: int) -> str:
    base = config["base"]
    chunking = Chunking(**config["chunking"])
    cut = "" if chunking.graph == "single" else f" for each chunk of {chunking.chunk_tokens} tokens ({chunking.graph})"
    named = "" if is_path(base["name"]) else f"base_model: {base['name']}\n"  # the hub knows its own names only
    return f"""---
{named}library_name: hyperllama
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
