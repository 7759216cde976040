"""Every source of episodes by its name: a new one is a file of its own and a line in this table."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from hyperllama.data.p3 import P3Settings
from hyperllama.data.symbols import SymbolSettings
from hyperllama.data.synthetic import SyntheticLanguage
from hyperllama.data.templates import TemplateSettings
from hyperllama.data.windows import WindowSettings


@dataclass(frozen=True)
class SourceKind:
    """A source as recipes know it.

    `home` is "module:function", which makes the `Source` of one part of a recipe's data. `settings` is a dataclass of settings
    that only this source has, with `problems() -> list[str]`; they stand in a recipe under the source's name. A source that is
    `made_up` reads nothing and never ends. All others read a local `root`, or with `from_hub` the `datasets` library.
    """

    home: str
    settings: type | None = None
    from_hub: bool = True
    made_up: bool = False

    def make(self) -> Callable:
        """The function."""
        module, name = self.home.split(":")
        return getattr(importlib.import_module(module), name)


SOURCES: dict[str, SourceKind] = {
    "synthetic": SourceKind("hyperllama.data.synthetic:from_recipe", SyntheticLanguage, from_hub=False, made_up=True),
    "sni": SourceKind("hyperllama.data.sni:from_recipe"),
    "p3": SourceKind("hyperllama.data.p3:from_recipe", P3Settings),
    "templates": SourceKind("hyperllama.data.templates:from_recipe", TemplateSettings),
    "symbols": SourceKind("hyperllama.data.symbols:from_recipe", SymbolSettings),
    "text": SourceKind("hyperllama.data.windows:from_recipe", WindowSettings),
    "jsonl": SourceKind("hyperllama.data.json_lines:from_recipe", from_hub=False),
}
