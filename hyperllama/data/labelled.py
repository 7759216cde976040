"""Labelled sets, for symbol tuning and for prompt templates: rows of text fields with a label."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyperllama.data.hub_datasets import load_split, require_columns
from hyperllama.errors import UserError
from hyperllama.files import read_json_lines


@dataclass(frozen=True)
class LabelledSet:
    """`rows` have the text `fields`, and "label" (a name of `labels`, which are in the order of ids) and "label_id".

    No two rows have the same text: of those that had the first is there. `repetition` counts the others, and those of them with
    another label.
    """

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    split: str
    repetition: tuple[int, int] = (0, 0)

    def text(self, row: dict[str, Any]) -> str:
        """The fields of a row as one input: the text of an only field, else "Name: text" lines."""
        if len(self.fields) == 1:
            return str(row[self.fields[0]])
        return "\n".join(f"{field[:1].upper()}{field[1:].replace('_', ' ')}: {row[field]}" for field in self.fields)


def read_labelled_sets(root: str, names: list[str], *, split: str) -> list[LabelledSet]:
    """Sets below `root`: NAME/`split`.jsonl for each of `names`, or for every folder that has one; or one .jsonl file.

    A line has text fields, `label` and perhaps `label_id`. Raises UserError that names file and line.
    """
    path = Path(root)
    if path.is_file():
        return [_from_rows(path.stem, [row for _, row in _lines(path)], str(path), split)]
    if not path.is_dir():
        raise UserError(f"data.root: {root} does not exist; give a folder of labelled sets, or a .jsonl file")
    there = sorted(file.parent.name for file in path.glob(f"*/{split}.jsonl"))
    missing = sorted(set(names) - set(there))
    if missing or not there:
        raise UserError(
            f"data.root: {root} has no {split}.jsonl for {', '.join(missing) or 'any set'}; it has {', '.join(there) or 'none'}"
        )
    files = {name: path / name / f"{split}.jsonl" for name in names or there}
    return [_from_rows(name, [row for _, row in _lines(file)], str(file), split) for name, file in files.items()]


def load_labelled_set(name: str, *, config: str | None = None, split: str, label: str = "label", rows: int) -> LabelledSet:
    """A set of the `datasets` library whose column `label` is a ClassLabel, a text or a whole number."""
    loaded = load_split(name, config=config, split=split)
    require_columns(loaded, name, (label,))
    names = getattr(loaded.features[label], "names", None)
    loaded = loaded.shuffle(seed=0).select(range(min(rows, len(loaded))))
    rows_ = []
    for row in loaded:
        value = row.pop(label)
        if names and 0 <= value < len(names):
            rows_.append({**row, "label": names[value], "label_id": value})
        elif not names:
            rows_.append({**row, "label": value})
    return _from_rows(config or Path(name).name, rows_, f"{name}, split {split}", split)


def _lines(path: Path):
    for where, row in read_json_lines(path, 'fields and "label"'):
        if not isinstance(row, dict) or row.get("label") in (None, ""):
            raise UserError(f'{where}: has no "label"; a labelled set needs one in every row')
        yield where, row


def _from_rows(name: str, rows: list[dict], where: str, split: str) -> LabelledSet:
    if not rows or any("label" not in row for row in rows):
        raise UserError(f"{where}: has no labelled rows; symbol tuning and templates need a label in every row")
    fields = tuple(key for key, value in rows[0].items() if key not in ("label", "label_id") and isinstance(value, str))
    if not fields:
        raise UserError(f"{where}: its rows have no text beside the label")
    ids = {str(row["label"]): row.get("label_id") for row in rows}
    if len(ids) < 2:
        raise UserError(f"{where}: has only the label {next(iter(ids))!r}; a task needs at least two")
    # In the order of ids where there are some, so that templates which index by id find what they mean.
    ordered = sorted(ids, key=lambda label: (ids[label] is None, ids[label] if ids[label] is not None else 0, label))
    places = {label: i if ids[label] is None else ids[label] for i, label in enumerate(ordered)}
    kept = [{**row, "label": str(row["label"]), "label_id": places[str(row["label"])]} for row in rows]
    for row in kept:
        for field in fields:
            if not isinstance(row.get(field), str):
                raise UserError(f"{where}: a row has no text in field {field!r}; every row needs the same fields")
    first: dict[str, dict] = {}
    others = 0
    whole = LabelledSet(name, fields, tuple(ordered), (), split)
    for row in kept:
        others += first.setdefault(whole.text(row).strip(), row)["label"] != row["label"]
    return replace(whole, rows=tuple(first.values()), repetition=(len(kept) - len(first), others))


def labelled_sets(part: Any, names: list[str]) -> list[LabelledSet]:
    """Sets of a local folder, or of the `datasets` library: `part.hub` and `names` are "name" or "name:config"."""
    if not part.hub:
        return read_labelled_sets(part.root, names, split=part.split)
    found = [name.partition(":") for name in names or [part.hub]]
    return [load_labelled_set(name, config=config or None, split=part.split, rows=10_000) for name, _, config in found]
