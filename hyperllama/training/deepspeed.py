"""DeepSpeed's settings files, by name or path."""

from __future__ import annotations

from pathlib import Path

from hyperllama.files import read_json

DEEPSPEED = Path(__file__).parent.parent.parent / "recipes" / "deepspeed"


def deepspeed_file(name: str) -> Path:
    """The settings file of DeepSpeed that a recipe names: one of recipes/deepspeed, or a path."""
    shipped = DEEPSPEED / f"{name}.json"
    return shipped if shipped.is_file() else Path(name)


def zero_stage(name: str | None) -> int:
    """The ZeRO stage of the settings that a recipe names; 0 without settings or without their file."""
    path = deepspeed_file(name) if name else None
    if path is None or not path.is_file():
        return 0
    return int(read_json(path, "DeepSpeed's settings").get("zero_optimization", {}).get("stage", 0))
