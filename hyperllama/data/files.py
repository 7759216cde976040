"""Tasks from files: Super-NaturalInstructions JSON (Wang et al. 2022, arXiv 2204.07705) and plain JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hyperllama.data.episode import Example, Task, TaskSource
from hyperllama.errors import UserError
from hyperllama.files import read_json


def read_task(path: str | Path, *, outputs: bool = True) -> Task:
    """One task from an S-NI task file (.json) or JSON lines of {"input": ..., "output": ...} (.jsonl).

    In JSON lines every example may be shown and asked; `outputs=False` reads inputs that have no outputs. Raises UserError
    that names file and line.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; expected examples as JSON lines or an S-NI task file")
    if path.suffix == ".json":
        return read_sni_task(path)
    return Task(path.stem, "", (), tuple(read_json_lines(path, outputs=outputs)))


def read_json_lines(path: str | Path, *, outputs: bool = True) -> list[Example]:
    """Examples from JSON lines {"input": text, "output": text or list of texts}; other keys are ignored."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); expected JSON lines") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f'{path}, line {number}: not JSON ({error.msg}); expected {{"input": ..., "output": ...}}'
            ) from None
        examples.append(_example(value, f"{path}, line {number}", outputs))
    if not examples:
        raise UserError(f'{path}: has no examples; expected lines of {{"input": ..., "output": ...}}')
    return examples


def read_sni_task(path: str | Path) -> Task:
    """One Super-NaturalInstructions task: definition, positive examples as demonstrations, instances as examples."""
    path = Path(path)
    value = read_json(path, "an S-NI task file")
    if not isinstance(value, dict) or "Instances" not in value:
        raise UserError(f"{path}: not an S-NI task file, it has no Instances; expected the schema of natural-instructions")
    if not value["Instances"]:
        raise UserError(f"{path}: its list of Instances is empty; choose another task file")
    definition = value.get("Definition", "")
    lists = {}
    for key in ("Positive Examples", "Instances"):
        items = value.get(key, [])
        if not isinstance(items, list):
            raise UserError(f"{path}: {key} must be a list")
        lists[key] = tuple(_example(item, f"{path}, {key} {i}", True) for i, item in enumerate(items))
    instruction = "\n".join(definition) if isinstance(definition, list) else definition
    return Task(path.stem, instruction, lists["Positive Examples"], lists["Instances"])


def _example(value: Any, where: str, outputs: bool) -> Example:
    if not isinstance(value, dict) or not isinstance(value.get("input"), str):
        raise UserError(f'{where}: needs "input" with a text')
    references = value.get("output", [] if not outputs else None)
    references = [references] if isinstance(references, str) else references
    if not isinstance(references, list) or (outputs and not references) or not all(isinstance(r, str) for r in references):
        raise UserError(f'{where}: needs "output" with a text or a list of texts')
    return Example(value["input"], references[0] if references else "", tuple(references))


def read_sni(root: str, *, split: str, splits: str, instances_per_task: int) -> TaskSource:
    """The tasks of one official split below `root`: `tasks/*.json`, listed in `splits`/`split`_tasks.txt.

    Tasks that are listed but not there are left out; UserError if that leaves none.
    """
    folder, listing = Path(root) / "tasks", Path(root) / splits / f"{split}_tasks.txt"
    if not folder.is_dir():
        raise UserError(
            f"data.root: {root} has no folder tasks; give a clone of natural-instructions, or a folder of its layout"
        )
    if not listing.is_file():
        raise UserError(f"data.split: {listing} is not there; choose a list below {Path(root) / splits}")
    names = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    paths = [folder / f"{name}.json" for name in names]
    tasks = [read_sni_task(path) for path in paths if path.is_file()]
    if not tasks:
        raise UserError(f"data.root: none of the {len(names)} tasks of {listing} is in {folder}")
    return TaskSource([Task(t.name, t.instruction, t.demonstrations, t.examples[:instances_per_task]) for t in tasks])


def read_json_lines_tasks(root: str) -> TaskSource:
    """A .jsonl file as one task, or every .jsonl file of a folder as a task each."""
    path = Path(root)
    paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not paths or not all(p.is_file() for p in paths):
        raise UserError(f"data.root: {root} is neither a .jsonl file nor a folder with some")
    return TaskSource([read_task(p) for p in paths])
