"""From the data section of a recipe to a source of episodes."""

from __future__ import annotations

from hyperllama.data.episode import Source, TaskSource
from hyperllama.data.mixture import MixtureSource
from hyperllama.data.registry import SOURCES
from hyperllama.errors import UserError
from hyperllama.recipe.schema import DataRecipe, SourceRecipe


def make_source(data: DataRecipe) -> Source:
    """The source that a recipe's `data` describes: one, or the mixture of several. UserError where its data is wrong."""
    made = [_part(part) for part in data.parts]
    if not data.mixture:
        return made[0]
    shots = [None if part.shots is None else (part.fewest_shots, part.shots) for part in data.parts]
    return MixtureSource(made, [part.weight for part in data.parts], shots)


def _part(part: SourceRecipe) -> Source:
    source = SOURCES[part.source].make()(part)
    if not part.leave_out:
        return source
    if not isinstance(source, TaskSource):
        raise UserError(f"data.leave_out: source {part.source} has no tasks by name; leave it empty")
    return source.without(part.leave_out)
