"""Super-NaturalInstructions (Wang et al. 2022, arXiv 2204.07705): a clone of natural-instructions, or a copy on the hub.

The official split lists decide which tasks train and which test; the English track has only tasks whose instruction, input
and output are English. Official training takes up to 100 instances a task at random, official evaluation the first 100 of
each of the 119 test tasks; a context is the definition and the first k positive examples.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from hyperllama.data.episode import Example, Task, TaskSource
from hyperllama.data.hub_datasets import load_split, require_columns
from hyperllama.data.json_lines import example_from, read_examples
from hyperllama.errors import UserError
from hyperllama.files import read_json, read_json_lines, read_text

LANGUAGES = ("Input_language", "Output_language", "Instruction_language")


def read_task(path: str | Path) -> Task:
    """One task from an S-NI task file (.json) or JSON lines of {"input": ..., "output": ...} (.jsonl).

    In JSON lines every example may be shown and asked. Inputs that are equal are one (`Task.distinct`). Raises UserError that
    names file and line.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; expected examples as JSON lines or an S-NI task file")
    if path.suffix == ".json":
        return read_sni_task(path)
    return Task(path.stem, "", (), tuple(read_examples(path))).distinct()


def read_sni_task(path: str | Path) -> Task:
    """One task file: definition, positive examples as demonstrations, instances as examples with all their references."""
    return _task(_task_file(path), Path(path))


def read_inputs(path: str | Path) -> list[tuple[str, Example, dict[str, Any]]]:
    """What is to be answered: JSON lines with "input", and perhaps "output", or the instances of an S-NI task file.

    Of each where it stands, the example, and the line's other fields. UserError if there is none.
    """
    path = Path(path)
    if path.suffix == ".json":
        value = _task_file(path)
        items = value.get("Instances", [])
        found = [(f"{path}, Instances {i}", item) for i, item in enumerate(items if isinstance(items, list) else ())]
    else:
        found = list(read_json_lines(path, '{"input": ...}'))
    if not found:
        raise UserError(f'{path}: has no inputs; expected lines of {{"input": ...}}, or an S-NI task with Instances')
    asked = [(where, example_from(item, where, outputs=False), item) for where, item in found]
    return [(where, one, {k: v for k, v in item.items() if k not in ("input", "output")}) for where, one, item in asked]


def read_sni(root: str, *, split: str, splits: str, instances: int, **settings) -> TaskSource:
    """The English tasks of one official split below `root`: `tasks/*.json`, listed in `splits`/`split`_tasks.txt.

    At most `instances` of each: a sample that the task's name decides for a split named train, else the first ones.
    `settings` go to `TaskSource`. Listed tasks that are not there are left out; UserError if that leaves none.
    """
    folder, listing = Path(root) / "tasks", Path(root) / splits / f"{split}_tasks.txt"
    if not folder.is_dir():
        raise UserError(
            f"data.root: {root} has no folder tasks; give a clone of natural-instructions, or a folder of its layout"
        )
    if not listing.is_file():
        raise UserError(f"data.split: {listing} is not there; choose a list below {Path(root) / splits}")
    names = [line.strip() for line in read_text(listing, "names of tasks").splitlines() if line.strip()]
    files = {path: _task_file(path) for path in (folder / f"{name}.json" for name in names) if path.is_file()}
    english = {path: value for path, value in files.items() if _is_english(value, path)}
    if not english:
        raise UserError(f"data.root: none of the {len(names)} tasks of {listing} is in {folder} and in English")
    return _source((_task(value, path) for path, value in english.items()), split, instances, **settings)


def read_sni_hub(name: str, *, split: str, instances: int, **settings) -> TaskSource:
    """S-NI as rows of task_name, definition, inputs, targets, as hub copies such as Muennighoff/natural-instructions have it.

    Rows of one task and input are one example with several references. Such copies have no positive examples, so
    demonstrations are other examples of the task.
    """
    rows = load_split(name, split=split)
    require_columns(rows, name, ("task_name", "definition", "inputs", "targets"))
    found: dict[str, tuple[str, dict[str, list[str]]]] = {}
    for row in rows:
        definition, examples = found.setdefault(row["task_name"], (row["definition"], {}))
        if row["inputs"] not in examples and len(examples) >= 4 * instances:
            continue  # the copies have millions of rows; the sample is drawn from the first few of a task
        targets = [row["targets"]] if isinstance(row["targets"], str) else row["targets"]
        examples.setdefault(row["inputs"], []).extend(targets)
    tasks = []
    for task, (definition, inputs) in found.items():
        answered = [(text, list(dict.fromkeys(targets))) for text, targets in inputs.items() if targets]
        if not answered:
            raise UserError(f"{name}: task {task} has no references; leave it out of the data")
        examples = tuple(Example(text, targets[0], tuple(targets)) for text, targets in answered)
        tasks.append(Task(task, definition, (), examples, datasets=(task,)))
    return _source(tasks, split, instances, **settings)


def _source(tasks: Iterable[Task], split: str, instances: int, **settings) -> TaskSource:
    def cap(task: Task) -> Task:
        if not task.examples:
            raise UserError(f"{task.name}: its list of Instances is empty, so nothing can be asked; leave it out")
        if len(task.examples) <= instances:
            return task
        kept = range(instances)
        if split == "train":
            kept = sorted(Random(task.name).sample(range(len(task.examples)), instances))
        return Task(**{**vars(task), "examples": tuple(task.examples[i] for i in kept)})

    return TaskSource([cap(task) for task in tasks], **settings)


def _task_file(path: str | Path) -> dict:
    value = read_json(path, "an S-NI task file")
    if not isinstance(value, dict) or not {"Instances", "Positive Examples", "Definition"} & value.keys():
        raise UserError(f"{path}: not an S-NI task file, it has no Instances; expected the schema of natural-instructions")
    return value


def _task(value: dict, path: Path) -> Task:
    lists = {}
    for key in ("Positive Examples", "Instances"):
        items = value.get(key, [])
        if not isinstance(items, list):
            raise UserError(f"{path}: {key} must be a list")
        lists[key] = tuple(example_from(item, f"{path}, {key} {i}") for i, item in enumerate(items))
    return Task(
        path.stem,
        "\n".join(_texts(value, "Definition", path)),
        lists["Positive Examples"],
        lists["Instances"],
        category=next(iter(_texts(value, "Categories", path)), ""),
        datasets=_texts(value, "Source", path),
    ).distinct()


def _texts(value: dict, key: str, where: str | Path) -> tuple[str, ...]:
    """The texts under a key, which the collection has as a list, and some files as one text; UserError for anything else."""
    found = value.get(key) or []
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"{where}: {key} must be a text or a list of texts, not {str(found)[:60]!r}")
    return tuple(found)


def _is_english(value: dict, where: Path) -> bool:
    return all(set(_texts(value, key, where) or ("English",)) == {"English"} for key in LANGUAGES)


def from_recipe(part: Any) -> TaskSource:
    """The source that a part of a recipe's data describes: a clone of natural-instructions, or rows on the hub."""
    settings = {"split": part.split, "instances": part.instances_per_task, "weights": part.task_weights}
    if part.hub:
        return read_sni_hub(part.hub, **settings)
    return read_sni(part.root, splits=part.splits, own_demonstrations=part.own_demonstrations, **settings)
