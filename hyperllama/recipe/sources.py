"""From the data section of a recipe to a source of episodes."""

from __future__ import annotations

from hyperllama.data.episode import Source
from hyperllama.data.json_lines import read_json_lines_tasks
from hyperllama.data.labelled import LabelledSet, load_labelled_set, read_labelled_sets
from hyperllama.data.mixture import MixtureSource
from hyperllama.data.p3 import read_p3
from hyperllama.data.sni import read_sni, read_sni_hub
from hyperllama.data.symbols import SymbolSource
from hyperllama.data.synthetic import SyntheticSource
from hyperllama.data.templates import TemplateSource
from hyperllama.data.windows import WindowSource, load_text_column, read_text_files
from hyperllama.recipe.schema import DataRecipe, SourceRecipe


def make_source(data: DataRecipe) -> Source:
    """The source that a recipe's `data` describes: one, or the mixture of several. UserError where its data is wrong."""
    if not data.mixture:
        return _one(data)
    return MixtureSource([_one(part) for part in data.mixture], [part.weight for part in data.mixture])


def _one(part: SourceRecipe) -> Source:
    cap = part.instances_per_task
    if part.source == "synthetic":
        return SyntheticSource(part.synthetic)
    if part.source == "sni":
        if part.hub:
            return read_sni_hub(part.hub, split=part.split, instances=cap, weights=part.task_weights)
        settings = {"own_demonstrations": part.own_demonstrations, "weights": part.task_weights}
        return read_sni(part.root, split=part.split, splits=part.splits, instances=cap, **settings)
    if part.source == "p3":
        return read_p3(part.hub or part.root, part.p3, split=part.split, instances_per_task=cap, weights=part.task_weights)
    if part.source == "symbols":
        return SymbolSource(_labelled(part, part.symbols.sets), part.symbols, instances=cap)
    if part.source == "templates":
        return TemplateSource(_labelled(part, part.templates.sets), part.templates, instances=cap, weights=part.task_weights)
    if part.source == "text":
        if part.hub:
            name, _, config = part.hub.partition(":")
            documents = load_text_column(
                name, config=config or None, split=part.split, column=part.text.column, rows=part.text.rows
            )
            return WindowSource(documents, part.text)
        return WindowSource(read_text_files(part.root), part.text)
    return read_json_lines_tasks(part.root, instances=cap, weights=part.task_weights)


def _labelled(part: SourceRecipe, names: list[str]) -> list[LabelledSet]:
    """Sets of a local folder, or of the `datasets` library: `hub` and `names` are "name" or "name:config"."""
    if not part.hub:
        return read_labelled_sets(part.root, names, split=part.split)
    found = [name.partition(":") for name in names or [part.hub]]
    return [load_labelled_set(name, config=config or None, split=part.split, rows=10_000) for name, _, config in found]
