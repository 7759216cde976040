"""The Hugging Face hub: hypernetworks and prefixes by the name of a repository, through huggingface_hub."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from hyperllama.base.loading import meant_here
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import is_path, write_atomically
from hyperllama.hypernetworks.config import CARD, CONFIG, local, read_config
from hyperllama.prefixes.prefix import Prefix

PARTS = ("*.safetensors", "*.json", CARD)  # of a hypernetwork's repository
PREFIX = "prefix.safetensors"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+$")


def push(path: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a hypernetwork's folder or a prefix file with its card to `repository` ("owner/name"); returns its address.

    Of a run's folder only what is needed to use it. Raises UserError if the path is neither, or the hub refuses.
    """
    from huggingface_hub import HfApi

    path = Path(path)
    if not _REPOSITORY.match(repository):
        raise UserError(f"{repository}: not the name of a repository; give owner/name")
    with tempfile.TemporaryDirectory() as temporary:
        if path.is_dir():
            files = {name: (path / name).read_bytes() for name in (*read_config(path)["files"], CONFIG, CARD)}
        else:
            prefix = Prefix.load(path)
            files = {PREFIX: path.read_bytes(), CARD: prefix_card(prefix, repository)}
        for name, content in files.items():
            write_atomically(Path(temporary) / name, content)
        try:
            api = HfApi()
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(folder_path=temporary, repo_id=repository, commit_message=f"hyperllama push {path.name}")
        except Exception as error:  # of huggingface_hub, its http client or the network
            raise UserError(f"{repository}: the hub refused ({in_one_line(error)}); log in with hf auth login") from error
    return str(address)


def fetch(name: str | Path, *, prefix: bool = False) -> Path:
    """Where a hypernetwork's folder (or with `prefix` a prefix file) is: a local path as it is, else downloaded by repository.

    A hypernetwork may also be one that comes with this package, by its name. Raises UserError if there is none of these.
    """
    name = name if prefix else local(name)
    if Path(name).exists() or not _REPOSITORY.match(str(name)) or meant_here(name):
        return Path(name)
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if prefix:
            return Path(hf_hub_download(str(name), PREFIX))
        return Path(snapshot_download(str(name), allow_patterns=list(PARTS)))
    except Exception as error:  # as above
        raise UserError(f"{name}: neither here nor on the hub ({in_one_line(error)}); correct the name, or log in") from error


def prefix_card(prefix: Prefix, repository: str) -> str:
    """A model card that names base, task, examples and what was measured."""
    manifest = prefix.manifest
    if manifest is None:
        raise UserError("a prefix without a manifest cannot be shared: nobody could tell which base reads it")
    rows = {
        "base model": f"`{manifest.base.name}`, weights {manifest.base.weights[:16]}",
        "task": manifest.task or "not recorded",
        "examples": f"{manifest.examples}, {manifest.context_tokens} tokens in {prefix.rows} gists",
        "made by": f"`{manifest.hypernetwork}`" if manifest.hypernetwork else "not recorded",
        **{name: json.dumps(value) for name, value in manifest.metrics.items()},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    base = "" if is_path(manifest.base.name) else f"base_model: {manifest.base.name}\n"  # the hub knows its own names only
    return f"""---
{base}library_name: hyperllama
tags: [soft-prefix, prefix-tuning, gisting]
---

# A soft prefix for {manifest.base.name}

Keys and values that the frozen base model reads instead of the examples of a task.

| | |
|---|---|
{table}

```
hyperllama generate {repository} --input "a new input"
```
"""
