"""Examples and tasks from plain JSON lines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hyperllama.data.episode import Example, Task, TaskSource, Weights
from hyperllama.errors import UserError
from hyperllama.files import read_json_lines

WANTED = '{"input": ..., "output": ...}'


def read_examples(path: str | Path) -> list[Example]:
    """Examples from JSON lines {"input": text, "output": text or texts, "choices": texts}; other keys are ignored.

    Raises UserError that names file and line.
    """
    examples = [example_from(value, where) for where, value in read_json_lines(path, WANTED)]
    if not examples:
        raise UserError(f"{path}: has no examples; expected lines of {WANTED}")
    return examples


def example_from(value: Any, where: str, outputs: bool = True) -> Example:
    """The Example of one decoded value, without `outputs` perhaps only an input; UserError, from `where` on, if it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("input"), str):
        raise UserError(f'{where}: needs "input" with a text')
    references = value.get("output", [] if not outputs else None)
    references = [references] if isinstance(references, str) else references
    if not isinstance(references, list) or (outputs and not references) or not all(isinstance(r, str) for r in references):
        raise UserError(f'{where}: needs "output" with a text or a list of texts')
    choices = value.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f'{where}: "choices" must be a list of texts')
    if choices and outputs and not set(references) & set(choices):
        raise UserError(f"{where}: its output {references[0]!r} is not among its choices {choices}")
    return Example(value["input"], references[0] if references else "", tuple(references), tuple(choices))


def read_json_lines_tasks(root: str, *, instances: int, weights: Weights = "equal") -> TaskSource:
    """A .jsonl file as one task, or every .jsonl file of a folder as a task each, with its first `instances` examples."""
    path = Path(root)
    paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not paths or not all(p.is_file() for p in paths):
        raise UserError(f"data.root: {root} is neither a .jsonl file nor a folder with some")
    whole = [Task(p.stem, "", (), tuple(read_examples(p)), datasets=(p.stem,)).distinct() for p in paths]
    return TaskSource([dataclasses.replace(task, examples=task.examples[:instances]) for task in whole], weights=weights)


def from_recipe(part: Any) -> TaskSource:
    """The source that a part of a recipe's data describes."""
    return read_json_lines_tasks(part.root, instances=part.instances_per_task, weights=part.task_weights)
