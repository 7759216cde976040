"""DeepSpeed's settings files, by name or path."""

from __future__ import annotations

from pathlib import Path

DEEPSPEED = Path(__file__).parent.parent.parent / "recipes" / "deepspeed"


def deepspeed_file(name: str) -> Path:
    """The settings file of DeepSpeed that a recipe names: one of recipes/deepspeed, or a path."""
    shipped = DEEPSPEED / f"{name}.json"
    return shipped if shipped.is_file() else Path(name)
