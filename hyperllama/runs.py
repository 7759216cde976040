"""Folders that a verb owns: who writes into one, and what it was made from.

A folder of results says in `made_from.json` what they depend on beside the recipe: fingerprints of the data, of the base and of
other runs, and of this code. Whoever goes on there compares them first. While a process writes it holds a lock, which dies with
it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from hyperllama import __version__
from hyperllama.errors import UserError
from hyperllama.files import naming, read_json, write_atomically

MADE_FROM, LOCK, RECIPE = "made_from.json", ".lock", "recipe.yaml"
# What a model or a hypernetwork is made of, of all that may lie in its folder.
PARTS = ("*.safetensors", "*.bin", "*.gguf", "*config*.json", "hypernetwork.json", "*token*", "vocab*", "merges*", "*.jinja")
# A larger file is known by its size and so many blocks, evenly spread, the first and the last among them.
WHOLE_BYTES, BLOCKS, BLOCK_BYTES = 2**26, 64, 2**20


@contextmanager
def owned(path: str | Path, *, folder: bool = True) -> Iterator[None]:
    """A context in which this process alone writes into a folder, or else a file; UserError if another one does.

    The lock is the system's, so it is gone with its process. Where a file system has none, that is said, and nothing is locked.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    lock = path / LOCK if folder else path.with_name(f".{path.name[:100]}{LOCK}")
    with naming(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(lock, timeout=0).acquire()
        except Timeout:
            raise UserError(
                f"{path}: another process is writing there; wait until it is done, or give another output"
            ) from None
        except NotImplementedError:
            print(f"{path}: cannot be locked on this file system; let no other process write there", file=sys.stderr)
            held = None
    try:
        yield
    finally:
        if held is not None:
            lock.unlink(missing_ok=True)  # while it is held: who has opened it meanwhile notices that it is gone
            held.lock.release()


def check_folder(folder: str | Path) -> None:
    """UserError if a folder for a run holds files, but no run: they could be a user's own."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, but a run is a folder; set output to another one")
    if folder.is_dir() and not any((folder / name).is_file() for name in (MADE_FROM, RECIPE)):
        # A recipe may lie where its run goes.
        others = sorted(path.name for path in folder.iterdir() if path.name[0] != "." and path.suffix not in (".yaml", ".yml"))
        if others:
            raise UserError(f"{folder}: holds files that no run has written, such as {others[0]}; set output to a new folder")


def check_same(folder: str | Path, facts: Mapping[str, str | None]) -> None:
    """UserError if what is in a folder was made from other things than `facts`, fingerprints by what they are of.

    A fact that is None is not known, and not compared. Other code of the same version is only told of.
    """
    path = Path(folder) / MADE_FROM
    if not path.is_file():
        return
    before = read_json(path, "what a run was made from")
    before = before if isinstance(before, dict) else {}
    facts = {**facts, "version": __version__}
    changed = [name for name, now in facts.items() if before.get(name) and now and before[name] != now]
    if changed:
        raise UserError(
            f"{folder}: what is there was made from another {', '.join(changed)}; set output to a new folder, or remove this "
            f"one; to go on all the same, remove {MADE_FROM} in it"
        )
    if before.get("code") and before["code"] != code():
        print(f"{folder}: was begun by other code of HyperLlama {__version__}; what it adds may differ", file=sys.stderr)


def remember(folder: str | Path, facts: Mapping[str, str | None]) -> None:
    """Write what is being made in a folder from; see `check_same`."""
    known = {**{name: value for name, value in facts.items() if value}, "version": __version__, "code": code()}
    write_atomically(Path(folder) / MADE_FROM, json.dumps(known, indent=2) + "\n")


@cache
def code() -> str:
    """SHA-256 of our own source."""
    digest, root = hashlib.sha256(), Path(__file__).parent.parent
    for package in ("attention_masks", "eval", "hyperllama"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def digest_of(name: str | Path | None) -> str | None:
    """SHA-256 of a file, or of the `PARTS` of a model's or a run's folder; of a hub name its commit. None if that is not known.

    Of a file of more than `WHOLE_BYTES` a change of a few bytes may not be seen.
    """
    if not name:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted({file for pattern in PARTS for file in path.glob(pattern) if file.is_file()})
    elif path.is_file():
        files = [path]
    else:
        return _commit(str(name))
    digest = hashlib.sha256()
    for file in files:
        with naming(file):
            digest.update(f"{file.name if path.is_dir() else ''} {file.stat().st_size}\n".encode())
            for block in _blocks(file):
                digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            while block := file.read(BLOCK_BYTES):
                yield block
            return
        for i in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * i // (BLOCKS - 1))
            yield file.read(BLOCK_BYTES)


def _commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None
