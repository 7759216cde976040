"""`hyperllama inspect`: what a file or folder is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hyperllama.commands.train import RESULT, VERSIONS
from hyperllama.errors import UserError
from hyperllama.files import read_json
from hyperllama.hypernetworks.config import CONFIG, local, read_config
from hyperllama.hypernetworks.hub import fetch
from hyperllama.prefixes.prefix import Prefix
from hyperllama.runs import RECIPE
from hyperllama.training.checkpoints import CHECKPOINTS, newest_checkpoint


def inspect(path: str | Path) -> dict:
    """What a prefix file or a run's folder is, for people: what made it, for which base, how large."""
    path = fetch(local(path), prefix=True)
    if not path.is_dir():
        prefix = Prefix.load(path)
        sizes = {"rows": prefix.rows, "layers": prefix.layers, "kv_heads": prefix.kv_heads, "head_dim": prefix.head_dim}
        if prefix.adapters is not None:
            sizes |= {"adapters": prefix.adapters.sizes, "adapter_bytes": prefix.adapters.nbytes}
        sizes |= {"dtype": str(prefix.dtype).removeprefix("torch."), "file_bytes": path.stat().st_size}
        return {
            "prefix": str(path),
            **sizes,
            **(dataclasses.asdict(prefix.manifest) if prefix.manifest else {"manifest": None}),
        }
    if not (path / RECIPE).is_file() and not (path / CONFIG).is_file():
        raise UserError(f"{path}: neither a prefix file nor the folder of a run")
    found = {"run": str(path), "finished": (path / RESULT).is_file()}
    if (path / CONFIG).is_file():
        found |= read_config(path)
    for name, file in (("result", RESULT), ("versions", VERSIONS)):
        if (path / file).is_file():
            found[name] = read_json(path / file, f"the {name} of a run")
    if not found["finished"]:
        found["newest_checkpoint"] = newest_checkpoint(path / CHECKPOINTS)
    return found
