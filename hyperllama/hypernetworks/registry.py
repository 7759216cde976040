"""Every kind of hypernetwork by its name: a new one is a file of its own and a line in this table."""

from __future__ import annotations

from typing import Any

from hyperllama.hypernetworks.hint.settings import HintSettings
from hyperllama.hypernetworks.settings import FullSettings, GistingSettings, KindSettings, LoraSettings, PoolingSettings

KINDS: dict[str, type[KindSettings]] = {
    settings.kind: settings for settings in (LoraSettings, FullSettings, GistingSettings, PoolingSettings, HintSettings)
}


def kind_of(recipe: Any) -> KindSettings:
    """The settings of the kind of hypernetwork that a recipe trains."""
    kind = recipe.gist.kind
    return getattr(recipe, kind) if hasattr(recipe, kind) else KINDS[kind]()
