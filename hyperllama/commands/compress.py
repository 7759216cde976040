"""`hyperllama compress` and `compose`: files of examples into prefix files or a store."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Literal

from hyperllama.base.distributed import processes
from hyperllama.data.episode import tell_twice
from hyperllama.errors import UserError
from hyperllama.files import check_output
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.config import check_gists, read_config
from hyperllama.hypernetworks.hub import fetch
from hyperllama.hypernetworks.loading import load_hypernetwork
from hyperllama.inference.many import Summary, compress_into, fitting, shown_of, task_files
from hyperllama.inference.quality import fewest_gists, leave_one_out
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix, is_prefix
from hyperllama.prefixes.store import PrefixStore


def compress(
    run: str | Path,
    files: Sequence[str | Path],
    output: str | Path,
    *,
    instruction: str | None = None,
    shots: int | None = None,
    base_path: str | None = None,
    dtype: str | None = None,
    report: bool = False,
    gists: int | None = None,
    budget: float | None = None,
    check_base: bool = False,
    overwrite: bool = False,
) -> list[tuple[Path, Prefix]]:
    """Compress files of examples, each one task, into prefix files. Returns their paths and prefixes.

    Of JSON lines all examples are shown, of an S-NI task its positive examples; `shots` keeps the first K. `instruction`
    replaces that of the file. `output` is a folder if there are several files, if it exists as one, or ends in a slash.
    `report` measures each prefix on held-back examples (see `leave_one_out`) and keeps the figures in its manifest.
    An elastic hypernetwork makes prefixes of `gists` gists, or of the fewest that cost at most `budget` nats a token.
    `check_base` compares all weights of the base with those of the training. A prefix file may be replaced, another file only
    with `overwrite`. Raises UserError for what cannot be compressed, named by its file, before anything is written.
    """
    shown = [shown_of(file, shots=shots, instruction=instruction) for file in task_files(files)]
    for one in shown if report or budget is not None else ():
        if (count := len(one.demonstrations)) < 2:
            raise UserError(f"{one.where}: has {count} different inputs, but a report holds one back and needs another")
    paths = _output_paths(output, [one.task for one in shown])
    for path in paths:
        check_output(path, reads=[one.where for one in shown], ours=is_prefix, overwrite=overwrite)
    tell_twice({one.where: one.repetition for one in shown})
    check_gists(run, read_config(fetch(run)), gists if budget is None else 1)
    hypernetwork, encoder = load_hypernetwork(run, base_path, dtype=dtype, check_base=check_base)
    contexts, manifests = zip(*(fitting(one, hypernetwork, encoder, run) for one in shown))
    reader = Reader(hypernetwork.base, encoder.tokenizer)
    asked = [(hypernetwork, reader, encoder, one.instruction, one.demonstrations) for one in shown]
    counts = [gists if budget is None else fewest_gists(*one, budget=budget) for one in asked]
    if report:
        measured = [leave_one_out(*one, gists=count) for one, count in zip(asked, counts, strict=True)]
        manifests = [dataclasses.replace(manifest, metrics=quality) for manifest, quality in zip(manifests, measured)]
    made = _in_passes(hypernetwork, contexts, manifests, counts)
    for path, prefix in zip(paths, made, strict=True):
        prefix.save(path)
    return list(zip(paths, made))


def _in_passes(
    hypernetwork: Hypernetwork, contexts: Sequence[list[int]], manifests: Sequence[Manifest], counts: Sequence[int | None]
) -> list[Prefix]:
    """A prefix of each context with its own number of gists, in a pass for each of these numbers."""
    prefixes: dict[int, Prefix] = {}
    for count in dict.fromkeys(counts):
        own = [i for i, n in enumerate(counts) if n == count]
        made = hypernetwork.compress([contexts[i] for i in own], [manifests[i] for i in own], gists=count)
        prefixes |= dict(zip(own, made, strict=True))
    return [prefixes[i] for i in range(len(contexts))]


def compress_to_store(
    run: str | Path,
    files: Sequence[str | Path],
    store: str | Path,
    *,
    instruction: str | None = None,
    shots: int | None = None,
    base_path: str | None = None,
    dtype: str | None = None,
    check_base: bool = False,
    batch_tokens: int = 16384,
) -> Summary:
    """Compress many files, or folders of them, into a store; what is there already is not compressed again.

    A pass has at most `batch_tokens`. Ranks (torchrun, or RANK and WORLD_SIZE set by hand) take every n-th task.
    """
    tasks = task_files(files)
    read_config(fetch(run))  # a store is not made for a run that is none
    place = PrefixStore(store)
    hypernetwork, encoder = load_hypernetwork(run, base_path, dtype=dtype, check_base=check_base)
    ranks = {"rank": int(os.environ.get("RANK", 0)), "ranks": processes()}
    settings = {"run": run, "shots": shots, "instruction": instruction, "progress": partial(print, file=sys.stderr), **ranks}
    with place.writing():
        return compress_into(place, hypernetwork, encoder, tasks, batch_tokens=batch_tokens, **settings)


def compose(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    gists: int | None = None,
    quantize: Literal["int8"] | None = None,
    overwrite: bool = False,
) -> tuple[Prefix, dict[str, float]]:
    """Put prefixes of one base one after the other into a new file; `gists` keeps the first so many of each.

    The file may replace another prefix that is not read, any other file only with `overwrite`. Returns the prefix, and what
    `quantize` loses (see `Prefix.save`).
    """
    check_output(output, reads=paths, ours=is_prefix, overwrite=overwrite)
    parts = []
    for path in paths:
        part = Prefix.load(path)
        try:
            parts.append(part if gists is None else part.truncate(gists))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    joined = reduce(Prefix.concat, parts)
    return joined, joined.save(output, quantize=quantize)


def _output_paths(output: str | Path, names: list[str]) -> list[Path]:
    if not str(output):
        raise UserError("--output: is empty; give a prefix file, or a folder for several")
    path = Path(output)
    if (path / "config.json").is_file():
        raise UserError(f"{output}: holds a model; give another folder for prefixes")
    if len(names) == 1 and not path.is_dir() and not str(output).endswith(os.sep):
        return [path]
    if path.is_file():
        raise UserError(f"{output}: a file, but several prefixes need a folder")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"two files are named {', '.join(twice)}: their prefixes would overwrite each other; compress them one by one"
        )
    return [path / f"{name}.safetensors" for name in names]
