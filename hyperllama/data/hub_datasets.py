"""Rows from the `datasets` library: a name on the hub, or a local folder or file of JSON lines, CSV, text or parquet."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hyperllama.errors import UserError, in_one_line


def load_split(
    name: str, *, config: str | None = None, split: str = "train", streaming: bool = False, rows: int | None = None
) -> Any:
    """One split of a data set: a `datasets.Dataset`, or the first `rows` of it as a list if `streaming`.

    Streaming fetches only those rows. Raises UserError in one sentence if there is no such data set, config or split.
    """
    import datasets

    datasets.disable_progress_bars()
    where = f"{name}{f', config {config}' if config else ''}, split {split}"
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise UserError(f"{name}: no such folder or file; give a local data set, or the name of one on the hub")
    try:
        loaded = datasets.load_dataset(os.path.expanduser(name), config, split=split, streaming=streaming)
        return list(islice(loaded, rows)) if streaming else loaded
    except (ValueError, OSError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{where}: cannot be loaded ({in_one_line(error)}); check the names, and that the hub can be reached"
        ) from error


def require_columns(rows: Any, where: str, columns: Iterable[str]) -> None:
    """UserError that names the columns that the first row lacks, or says that there are no rows."""
    there: Sequence[str] | None = getattr(rows, "column_names", None)
    if there is None:
        there = list(rows[0]) if len(rows) else []
    if not len(rows):
        raise UserError(f"{where}: has no rows; choose another split")
    missing = [column for column in columns if column not in there]
    if missing:
        raise UserError(f"{where}: has no column {', '.join(missing)}; it has {', '.join(there)}")
