"""What each kind of hypernetwork says of itself before torch is loaded: its part of a recipe, checks, packing and sizes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class KindSettings:
    """A kind of hypernetwork, as recipes, checks, packing, evaluation and planning know it.

    A subclass is a dataclass of the kind's own settings, which stand in a recipe under the name `kind`, and a line of
    `hyperllama.hypernetworks.registry`. Below, `recipe` is a `hyperllama.recipe.schema.Recipe`.
    """

    kind: ClassVar[str]
    home: ClassVar[str]  # "module:Class" of the hypernetwork, imported when one is made or loaded
    summary: ClassVar[str]  # how it makes a prefix, in a few words for a model card
    fewest_rows: ClassVar[int] = 1
    makes_modules: ClassVar[bool] = False  # whether what it makes has adapters, which prefix tuning does not know

    @classmethod
    def hypernetwork(cls) -> type:
        """The class of the hypernetwork."""
        module, name = cls.home.split(":")
        return getattr(importlib.import_module(module), name)

    @property
    def trains_base(self) -> bool:
        """Whether training changes the base too, so that prefixes belong to what it becomes."""
        return False

    @property
    def trains_weights(self) -> bool:
        """Whether all weights of a model are trained, in its own dtype: those of the base, or of a copy of it."""
        return self.trains_base

    @property
    def keeps_context(self) -> bool:
        """Whether readers see a row for each token of the context as well, before its gists."""
        return False

    def values(self) -> list[str]:
        """What is wrong with the settings by themselves: "key: what is wrong", a sentence each."""
        return []

    def problems(self, recipe: Any) -> list[str]:
        """What is wrong with a recipe for this kind, beside `values`."""
        return []

    def has_sink(self, rows: int) -> bool:
        """Whether a prefix of `rows` rows begins with the base's first token unless a recipe says."""
        return True

    def arguments(self, recipe: Any) -> dict[str, Any]:
        """What the hypernetwork is made with, beside what all kinds are made with."""
        return {}

    def state_bytes(self, cost: Any, context: int, rows: int) -> dict[str, int]:
        """What a task leaves to be read, in bytes by its parts; `cost` is an `eval.flops.ModelCost`."""
        return {f"{rows} prefix rows": cost.state_bytes(rows)}


@dataclass(frozen=True)
class LoraSettings(KindSettings):
    """See `hyperllama.hypernetworks.row_lora.RowLora`. `targets` are names of linear layers; empty for all of them."""

    kind = "lora"
    home = "hyperllama.hypernetworks.gist_lora:GistHypernetwork"
    summary = "gist tokens behind the context, and LoRA on the frozen base for their rows"

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)

    def values(self) -> list[str]:
        wrong = [f"lora.rank: at least 1, not {self.rank}"] if self.rank < 1 else []
        return wrong + ([] if 0 <= self.dropout < 1 else [f"lora.dropout: a share below 1, not {self.dropout}"])

    def arguments(self, recipe: Any) -> dict[str, Any]:
        own = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
        return {**own, "targets": list(self.targets) or "all-linear"}


@dataclass(frozen=True)
class FullSettings(KindSettings):
    """A tuned copy of the base compresses."""

    kind = "full"
    home = "hyperllama.hypernetworks.full_copy:FullHypernetwork"
    summary = "gist tokens behind the context, read by a trained copy of the base"

    @property
    def trains_weights(self) -> bool:
        return True


@dataclass(frozen=True)
class GistingSettings(KindSettings):
    """One model, all of its weights tuned (Mu et al. 2023)."""

    kind = "gisting"
    home = "hyperllama.hypernetworks.gisting:GistingHypernetwork"
    summary = "gist tokens behind the context, read by the model itself, all of its weights trained"

    @property
    def trains_base(self) -> bool:
        return True

    def problems(self, recipe: Any) -> list[str]:
        return taught_by_what_changes(recipe, "gisting")


@dataclass(frozen=True)
class PoolingSettings(KindSettings):
    """Of gist.kind "pooling": see `PoolingHypernetwork`. `lora`: contexts are read with LoRA, as the recipe's `lora` says.

    Rows begin with single tokens that the second half of a context attends to: what won on real tasks and on text. Many
    demonstrations of a word each are better mixed: {attended: 0, sharpness: 1}.
    """

    kind = "pooling"
    home = "hyperllama.hypernetworks.pooling:PoolingHypernetwork"
    summary = "small cross-attentions over the base's own keys and values of the context"

    recency: float = 0.0
    sharpness: float = 400.0
    attended: float = 0.5
    lora: bool = False

    @property
    def begins_with_sink(self) -> bool:
        """Whether the first row of a prefix is that of the context's first token."""
        return bool(self.attended or self.recency)

    def values(self) -> list[str]:
        wrong = [f"pooling.recency: 0 or more, not {self.recency}"] if self.recency < 0 else []
        if self.sharpness <= 0:
            wrong.append(f"pooling.sharpness: above 0, not {self.sharpness}")
        if not 0 <= self.attended <= 1:
            wrong.append(f"pooling.attended: a share from 0 to 1, not {self.attended}")
        if self.attended and self.recency:
            wrong.append("pooling.attended: rows begin with attended tokens or, by recency, with shares; set one of them to 0")
        return wrong

    def problems(self, recipe: Any) -> list[str]:
        wrong = []
        if recipe.gist.chunking.graph == "recurrent":
            wrong.append("gist.chunking.graph: pooling takes chunks one by one, so none can read another; choose parallel")
        if recipe.gist.sink and self.begins_with_sink:
            wrong.append(
                "gist.sink: with pooling.attended or recency the first row is the first token's anyway; set it to null"
            )
        return wrong

    def has_sink(self, rows: int) -> bool:
        return not self.begins_with_sink

    def arguments(self, recipe: Any) -> dict[str, Any]:
        own = {"recency": self.recency, "sharpness": self.sharpness, "attended": self.attended}
        return own | (recipe.lora.arguments(recipe) if self.lora else {})


def taught_by_what_changes(recipe: Any, what: str) -> list[str]:
    """The problem of a recipe whose teacher would be the model that training changes; `what` names the setting."""
    if not recipe.objectives.taught:
        return []
    names = ", ".join(f"objectives.{name}" for name in recipe.objectives.taught)
    return [f"{names}: {what} changes the model that would teach; set it to 0"]
