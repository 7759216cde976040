"""Which base model something was made for: what files say of it. Loads no torch, so that a store is listed at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hyperllama.errors import UserError


@dataclass(frozen=True)
class BaseIdentity:
    """How a base model is known again: its name for people, and SHA-256 fingerprints for files.

    `weights` is of a sample, `full` of all weights where that was asked for. A quantised base has fingerprints of its own;
    `quantize` says how to load it. A `name` that begins with a dot, a slash or a tilde is a path, any other the hub's.
    """

    name: str
    weights: str
    config: str
    tokenizer: str | None = None
    quantize: str | None = None
    full: str | None = None

    def is_model(self, other: BaseIdentity) -> bool:
        """Whether both are the same model, by all fingerprints that both have; tokenizers are not compared."""
        same = (self.weights, self.config) == (other.weights, other.config)
        return same and (self.full is None or other.full is None or self.full == other.full)

    def refuse_other(self, other: BaseIdentity, made_for: str) -> None:
        """UserError that names both if `other` is another model; `made_for` begins it, such as "a prefix was made for"."""
        if not self.is_model(other):
            sampled_same = self.weights == other.weights
            own, its = (self.full, other.full) if sampled_same and self.full and other.full else (self.weights, other.weights)
            mine, others = ("by its config",) * 2 if own == its else (own[:8], its[:8])
            raise UserError(
                f"{made_for} {self.name} ({mine}), not for {other.name} ({others}); give its own base, or make it "
                "again for this one"
            )

    def as_dict(self) -> dict:
        return asdict(self)
