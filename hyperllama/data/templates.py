"""P3's prompts over labelled sets of one's own: every template that applies to a set is a task (see `prompts.render`).

Templates come from JSON lines or from promptsource's folders of YAML (Bach et al. 2022, arXiv 2202.01279).
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from hyperllama.data.episode import Example, Task, TaskSource, Weights
from hyperllama.data.labelled import LabelledSet, labelled_sets
from hyperllama.data.prompts import Template, missing_fields, render
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import read_json_lines, read_text

# Where the names of sets differ from the folders of promptsource; folders are found by their own names too.
KEYS = {
    "mnli": "glue/mnli",
    "dbpedia14": "dbpedia_14",
    **{name: f"super_glue/{name}" for name in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc.fixed")},
    "wsc": "super_glue/wsc.fixed",
    **{f"anli_r{i}": "anli" for i in (1, 2, 3)},
    **{name: "winogrande/winogrande_xl" for name in ("winogrande", "winogrande_xl")},
    "story_cloze": "story_cloze/2016",
}
RENAME = {"poem_sentiment": {"text": "verse_text"}}


@dataclass(frozen=True)
class TemplateSettings:
    """Prompt templates over labelled sets.

    `templates`: JSON lines or a folder of promptsource's YAML, see `read_templates`. `sets`: names of sets below data.root, or
    "name" / "name:config" on the hub; empty for all of a folder. `keys`: the templates of a set, such as {cb: super_glue/cb},
    where its name does not say; they index answers by the label's number, so it must count labels as theirs does. `names`: only
    templates of these names; empty for all. `original_task_only`: leave out those that turn the task around. `rename`: for a
    set, {its field: the field that templates ask for}; "label" is the label's number.
    """

    templates: str | None = None
    sets: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    original_task_only: bool = True
    rename: dict[str, dict[str, str]] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        return [] if self.templates else ["templates: give P3's templates, JSON lines or YAML folders"]


@dataclass(frozen=True)
class RenderReport:
    """What became of the rows: examples `rendered`, and `dropped` since prompt or target came out empty; templates `skipped`.

    `skipped` says why, by task name.
    """

    rendered: int
    dropped: int
    skipped: dict[str, str]


class TemplateSource(TaskSource):
    """Episodes of labelled sets through templates, each template of each set a task; `report` says what was left out."""

    def __init__(
        self,
        sets: Sequence[LabelledSet],
        settings: TemplateSettings,
        *,
        instances: int | None,
        shown: Sequence[LabelledSet] = (),
        weights: Weights = "equal",
    ):
        tasks, self.report = render_tasks(sets, settings, instances=instances, shown=shown)
        super().__init__(tasks, weights=weights)


def render_tasks(
    sets: Sequence[LabelledSet],
    settings: TemplateSettings,
    *,
    instances: int | None,
    shown: Sequence[LabelledSet] = (),
) -> tuple[list[Task], RenderReport]:
    """A task named "set/template" for every set and every template that applies to it, with at most `instances` examples.

    Sets of the same name in `shown`, such as those of the training split, give the tasks their demonstrations. A template that
    needs a field which its set does not have is skipped. Raises UserError for templates or keys that are not there, for a set
    that no template applies to, and for what `render` raises.
    """
    if not settings.templates:
        raise UserError("data.templates.templates: give P3's templates, JSON lines or a folder of promptsource's YAML")
    library = _library(settings.templates)
    demonstrations = {labelled.name: labelled for labelled in shown}
    tasks: list[Task] = []
    report = _Rendering(settings, instances)
    for labelled in sets:
        tasks += report.of_set(labelled, demonstrations.get(labelled.name), library)
    for name in settings.names:
        if name not in report.names:
            raise UserError(f"data.templates.names: no set has a template {name!r}{_nearest(name, sorted(report.names))}")
    if not tasks:
        raise UserError("data.templates: none of the named templates asks for the original task; set original_task_only=false")
    return tasks, RenderReport(report.counts["rendered"], report.counts["dropped"], report.skipped)


@dataclass
class _Rendering:
    """Sets as they are rendered, and what was left out on the way."""

    settings: TemplateSettings
    instances: int | None
    counts: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def of_set(self, labelled: LabelledSet, own: LabelledSet | None, library: Mapping[str, Any]) -> list[Task]:
        """The tasks of one set; its demonstrations are rows of `own`, if there is one."""
        settings, key = self.settings, _key(labelled.name, self.settings, library)
        found = _templates(settings.templates, library, key)
        self.names |= {template.name for template in found}
        asked = [t for t in found if not settings.names or t.name in settings.names]
        chosen = [t for t in asked if t.original_task or not settings.original_task_only]
        fields = next((row for _, row in _rows(labelled, settings, None)), {})
        tasks = []
        for template in chosen:
            name = f"{labelled.name}/{template.name}"
            if missing := missing_fields(template, fields):
                self.skipped[name] = f"needs {', '.join(missing)}, which the set does not have"
                continue
            examples = tuple(_rendered(template, labelled, settings, self.instances, self.counts))
            if not examples:
                self.skipped[name] = "renders no row of the set to both an input and an output"
                continue
            shots = tuple(_rendered(template, own, settings, self.instances, self.counts)) if own else ()
            twice = tuple(map(sum, zip(labelled.repetition, own.repetition if own else (0, 0))))
            tasks.append(Task(name, "", shots, examples, labelled.name, (labelled.name, key), twice))
        if not tasks and (chosen or not settings.names):
            reasons = [f"{name!r} {why}" for name, why in self.skipped.items() if name.startswith(f"{labelled.name}/")]
            why = reasons[0] if reasons else "all turn the task around"
            raise UserError(
                f"data.templates: none of the {len(found)} templates of {key} applies to the set {labelled.name} ({why}); see "
                "data.templates.rename and original_task_only, or leave the set out of data.templates.sets"
            )
        return tasks


def _rendered(
    template: Template, labelled: LabelledSet, settings: TemplateSettings, instances: int | None, counts: Counter[str]
) -> Iterable[Example]:
    taken = 0
    for number, row in _rows(labelled, settings, instances):
        if instances is not None and taken >= instances:
            return
        example = render(template, row, where=f"{labelled.name}, split {labelled.split}, row {number}")
        counts["dropped" if example is None else "rendered"] += 1
        if example is not None:
            taken += 1
            yield example


def _rows(labelled: LabelledSet, settings: TemplateSettings, instances: int | None) -> Iterable[tuple[int, dict[str, Any]]]:
    """Rows as templates expect them, with their numbers: the label is its number, and fields have the templates' names."""
    rows, rename = labelled.rows, settings.rename.get(labelled.name)
    if rename is None:
        rename = {old: new for old, new in RENAME.get(labelled.name, {}).items() if rows and old in rows[0]}
    wrong = [old for old in rename if rows and old not in rows[0]]
    if wrong:
        raise UserError(
            f"data.templates.rename.{labelled.name}: the set has no field {wrong[0]!r}{_nearest(wrong[0], list(rows[0]))}"
        )
    order: Sequence[int] = range(len(rows))
    if instances is not None and instances < len(rows):
        # A file may be sorted by label. Every template sees the same rows.
        order = Random(f"rows of {labelled.name}").sample(order, len(rows))
    for i in order:
        row = {name: value for name, value in rows[i].items() if name != "label_id"}
        row["label"] = rows[i].get("label_id", rows[i].get("label"))
        yield i + 1, {rename.get(name, name): value for name, value in row.items()}


def _key(name: str, settings: TemplateSettings, library: Mapping[str, Any]) -> str:
    flat = {key.replace("/", "_"): key for key in library}
    guess = KEYS.get(name, name)
    key = settings.keys.get(name) or (guess if guess in library else flat.get(name))
    if key is None:
        raise UserError(
            f"data.templates.keys: there are no templates for the set {name}; give the folder of its templates, such as "
            f"{name}: {(_close(name, list(library)) or ['super_glue/cb'])[0]}, or leave the set out of data.templates.sets"
        )
    return key


def template_keys(path: str | Path) -> list[str]:
    """The folders, such as "super_glue/cb", that `path` has templates for; see `read_templates`."""
    return sorted(_library(path))


def read_templates(path: str | Path, key: str) -> list[Template]:
    """The templates of one data set, `key` being its folder in promptsource, in the order of the file.

    `path` is JSON lines with the fields of promptsource's templates and `key`, or a folder that holds them as templates.jsonl,
    or promptsource's own folder of DATASET/SUBSET/templates.yaml. Raises UserError that names file and line, or the nearest
    key.
    """
    return _templates(path, _library(path), key)


def _library(path: str | Path) -> dict[str, list[tuple[str, Any]] | Path]:
    """By key: templates with where they stand, or a YAML file that has them, which is read only when it is asked for."""
    path = Path(path).expanduser()
    lines = path / "templates.jsonl" if path.is_dir() else path
    if lines.is_file():
        found: dict[str, Any] = {}
        for where, value in read_json_lines(lines, "one template a line"):
            if not isinstance(value, dict) or not isinstance(value.get("key"), str):
                raise UserError(f'{where}: has no "key"; expected a template of promptsource with the folder that it is from')
            found.setdefault(value["key"], []).append((where, value))
    else:
        found = {file.parent.relative_to(path).as_posix(): file for file in sorted(path.rglob("templates.yaml"))}
    if not found:
        raise UserError(
            f"data.templates.templates: {path} has no templates; give JSON lines, or promptsource's folder of "
            "DATASET/SUBSET/templates.yaml"
        )
    return found


def _templates(path: str | Path, library: Mapping[str, Any], key: str) -> list[Template]:
    if key not in library:
        raise UserError(f"data.templates: {path} has no templates for {key!r}{_nearest(key, list(library))}")
    entry = library[key]
    return [_template(key, value, where) for where, value in (_read_yaml(entry) if isinstance(entry, Path) else entry)]


def _template(key: str, value: dict[str, Any], where: str) -> Template:
    text = all(isinstance(value.get(name), str) for name in ("name", "jinja"))
    if not text or not isinstance(value.get("answer_choices"), str | None):
        raise UserError(f"{where}: not a template of promptsource; it needs texts name and jinja, and answer_choices or none")
    metrics = tuple(str(metric) for metric in value.get("metrics") or ())
    choices = value.get("answer_choices") or None
    return Template(value["name"], key, value["jinja"], choices, bool(value.get("original_task")), metrics)


def _read_yaml(file: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Knows promptsource's two tags as mappings; any other tag is an error."""

    for tag in ("!Template", "!TemplateMetadata"):
        Loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    try:
        # Loader is a SafeLoader: it builds plain values only.
        content = yaml.load(read_text(file, "templates of promptsource"), Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{file}: cannot be read as YAML ({in_one_line(error)})") from error
    templates = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(templates, dict) or not all(isinstance(value, dict) for value in templates.values()):
        raise UserError(f"{file}: not templates of promptsource; it has no mapping templates")
    for name, value in templates.items():
        yield f"{file}, {name}", {**(value.get("metadata") or {}), **value}


def _close(name: str, known: Sequence[str]) -> list[str]:
    return [k for k in known if name in k][:1] or difflib.get_close_matches(name, known, n=1)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = _close(name, known)
    return f", did you mean {close[0]!r}?" if close else f", choose from {', '.join(list(known)[:10])} ..."


def from_recipe(part: Any) -> TemplateSource:
    """The source that a part of a recipe's data describes."""
    sets = labelled_sets(part, part.templates.sets)
    return TemplateSource(sets, part.templates, instances=part.instances_per_task, weights=part.task_weights)
