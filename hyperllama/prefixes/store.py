"""A folder of prefix files, with an index that makes listing fast and can be rebuilt from the files.

The files count, the index does not. A file's name follows from task, base, context and hypernetwork, and ends in a hash of
them, so that processes agree on names without talking. To find out whether a prefix is there, its file is read whole, with its
checksum. `index/rank*.jsonl` repeats the files' headers, a line a prefix, so that thousands are listed from a few small files.
Each process appends to its own, once the prefix stands on the disk: a crash leaves a prefix without a line, never a line for
half a prefix. Lines are compared with headers when prefixes are loaded or checked, and repaired from them. Who adds and who
reads lock nobody out; only repair waits for nobody to add.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import secrets
import tempfile
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperllama.base.identity import BaseIdentity
from hyperllama.errors import UserError
from hyperllama.files import append, canonical_json, from_fields, plain_name, sha256, write_atomically
from hyperllama.prefixes.manifest import Manifest
from hyperllama.runs import LOCK, owned

if TYPE_CHECKING:  # it loads torch, which a list of what is there does without
    from hyperllama.prefixes.prefix import Prefix

INDEX, SUFFIX = "index", ".safetensors"
WRITING, REPAIR = "writing-", "repair"  # locks in the index: one for each process that adds, one for repair
WRITERS = 8  # files that are written at the same time


@dataclass(frozen=True)
class Entry:
    """A line of the index: what the header of a prefix file says, and the file's name and size in bytes."""

    file: str
    task: str
    base: BaseIdentity
    context_sha256: str | None
    hypernetwork_sha256: str | None
    rows: int
    bytes: int
    metrics: dict = field(default_factory=dict)
    created: str | None = None

    def differences(self, other: Entry) -> list[str]:
        """The names of the fields in which two entries differ. `created` is none: two ranks may have made one prefix twice."""
        mine, its = dataclasses.asdict(self), dataclasses.asdict(other)
        # As JSON: what was read from a file has lists for tuples, and a NaN equals itself.
        return [key for key in mine if key != "created" and canonical_json(mine[key]) != canonical_json(its[key])]


FIELDS = {field.name for field in dataclasses.fields(Entry)}


class PrefixStore:
    """A folder of prefix files and their index. Several processes may add to it at the same time, each as a rank of its own.

    The folder is made if it is missing; with `create=False` it must be there, and may be read-only. Iteration gives entries by
    task. Raises UserError if the folder is a file, cannot be written, or is not there.
    """

    def __init__(self, folder: str | Path, *, create: bool = True):
        self.folder, self._repair = Path(folder), f"run hyperllama list {folder} --repair"
        self._stamp: Hashable = None
        self._ends: dict[Path, tuple[int, int]] = {}  # of each journal its file's number, and up to which byte it has been read
        self._newest: dict[str, tuple[int, Entry]] = {}  # with when it was written
        self._known: dict[str, Entry] = {}
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{folder}: a file, but a store of prefixes is a folder; give another name")
        if not create and not self.folder.is_dir():
            raise UserError(f"{folder}: no such store of prefixes; make one with hyperllama compress --store")
        if not create and not (self.folder / INDEX).is_dir() and not self._has_prefixes():
            raise UserError(f"{folder}: a folder without prefixes or an index of some; give one that compress --store made")
        if create:
            try:
                (self.folder / INDEX).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder / INDEX):
                    pass
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error.strerror}); give another folder") from error

    def _has_prefixes(self) -> bool:
        from hyperllama.prefixes.prefix import is_prefix

        return any(map(is_prefix, self.folder.glob(f"*{SUFFIX}")))

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._index().values(), key=lambda entry: (entry.task, entry.file)))

    def __len__(self) -> int:
        return len(self._index())

    def stamp(self) -> Hashable:
        """A value that changes when the index does, read from few files: whether what was made of the entries still holds."""
        return tuple((path, (s := path.stat()).st_ino, s.st_size, s.st_mtime_ns) for path in self._journals())

    def path_of(self, manifest: Manifest | None) -> Path:
        """Where a prefix with this manifest stands: its task's name, cleaned, and a hash of all by which it is known.

        Names are short ASCII without slashes or leading dots. Tasks whose names look alike once they are cleaned, or differ in
        case alone, differ in the hash. Raises UserError if the manifest names no task.
        """
        if manifest is None or not manifest.task:
            raise UserError("a store keeps prefixes by task, but the manifest of this one names none; give it a task")
        base, hashes = manifest.base, (manifest.context_sha256, manifest.hypernetwork_sha256)
        known = [manifest.task, base.weights, base.config, base.tokenizer, *hashes]
        known += [manifest.refined] if manifest.refined else []
        return self.folder / f"{plain_name(manifest.task)}-{sha256(canonical_json(known))[:16]}{SUFFIX}"

    def add(self, prefix: Prefix, *, rank: int = 0) -> Path:
        """Write a prefix and its line of the index, and return its path. One of the same task, base and hashes is replaced,
        as by a prefix that was tuned or cut: its manifest says the same.

        Raises UserError if the prefix has no manifest with a task, OSError when the disk refuses.
        """
        return self.add_all([prefix], rank=rank)[0]

    def add_all(self, prefixes: Sequence[Prefix], *, rank: int = 0) -> list[Path]:
        """As `add`, for several: their files are written at the same time, because a disk syncs many about as fast as one.

        If one cannot be written the others still are, with their lines, and then its error is raised.
        """
        paths = [self.path_of(prefix.manifest) for prefix in prefixes]
        with ThreadPoolExecutor(WRITERS) as pool:
            writes = [pool.submit(prefix.save, path) for prefix, path in zip(prefixes, paths, strict=True)]
        written = [w.exception() is None for w in writes]
        self._append([_entry(path, prefix) for path, prefix, whole in zip(paths, prefixes, written) if whole], rank)
        for write in writes:
            write.result()
        return paths

    def has(self, task: str, base: BaseIdentity, context_sha256: str | None, hypernetwork_sha256: str | None) -> bool:
        """Whether a whole prefix of this task, base, context and hypernetwork is there: the file is read, not the index."""
        hashes = {"context_sha256": context_sha256, "hypernetwork_sha256": hypernetwork_sha256}
        return self._whole(self.path_of(Manifest(base=base, task=task, **hashes))) is not None

    def remember(self, manifest: Manifest, *, rank: int = 0) -> bool:
        """As `has`, for a manifest with its hashes; a prefix that a crash has left without its line of the index gets one."""
        entry = self._whole(self.path_of(manifest))
        if entry is not None:
            known = self._index().get(entry.file)
            if known is None or known.differences(entry):
                self._append([entry], rank)
        return entry is not None

    def find(self, *, task: str | None = None, base: BaseIdentity | str | None = None) -> list[Entry]:
        """The entries of a task, and of a base by its fingerprints or, given as text, by its name."""
        return [entry for entry in self if task in (None, entry.task) and (base is None or _is_base(entry.base, base))]

    def load(self, which: Entry | str, identity: BaseIdentity | None = None) -> Prefix:
        """The prefix of an entry, or of a task by name, where `identity` chooses among several bases.

        Raises UserError if there is none or more than one, it is damaged or made for another base, or the index says
        another thing than the file.
        """
        entry = which if isinstance(which, Entry) else self._only(which, identity)
        path = self.folder / entry.file
        if not path.is_file():
            raise UserError(f"{path}: in the index, but not there; {self._repair}")
        prefix, found = self._read(path)
        if differ := entry.differences(found):
            raise UserError(f"{path}: the index says another thing of it ({', '.join(differ)}); {self._repair}")
        if identity is not None:
            prefix.check(identity, str(path))
        return prefix

    def compare(self) -> list[str]:
        """As `check`, by the names and sizes of files alone: of thousands in a moment, but a flipped bit is not noticed."""
        known = self._index()
        with os.scandir(self.folder) as files:  # of a hundred thousand files in a third of pathlib's time
            sizes = {file.name: file.stat().st_size for file in files if file.name.endswith(SUFFIX) and file.is_file()}
        found = [f"{self.folder / name}: not in the index; {self._repair}" for name in sorted(sizes.keys() - known.keys())]
        for name, entry in sorted((name, entry) for name, entry in known.items() if sizes.get(name) != entry.bytes):
            if name not in sizes:
                found.append(self._gone(name))
            else:
                found.append(
                    f"{self.folder / name}: {sizes[name]:,} bytes, not {entry.bytes:,} as in the index; {self._repair}"
                )
        return found

    def check(self) -> list[str]:
        """What is wrong, a sentence each that says how to repair it. Every file is read whole, one at a time."""
        found: list[str] = []
        for path, entry in self._whole_files(found):
            if (known := self._index().get(path.name)) is None:
                found.append(f"{path}: not in the index; {self._repair}")
            elif differ := known.differences(entry):
                found.append(f"{path}: the index says another thing of it ({', '.join(differ)}); {self._repair}")
        return found + [self._gone(entry.file) for entry in self if not (self.folder / entry.file).is_file()]

    def _gone(self, name: str) -> str:
        return f"{self.folder / name}: in the index, but not there; copy it back, or to forget it {self._repair}"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A context in which the index is not repaired; many processes may be in one. UserError while it is being repaired."""
        name = f"{WRITING}{os.getpid()}-{secrets.token_hex(4)}"
        with owned(self.folder / INDEX / name, folder=False):
            with owned(self.folder / INDEX / REPAIR, folder=False):
                pass
            yield

    def repair(self) -> list[str]:
        """Make the index anew from the files' headers. Returns a sentence for each file that is left alone.

        A whole prefix under another name gets its own. UserError while a process is in `writing`, whose lines would be lost.
        """
        with owned(self.folder / INDEX / REPAIR, folder=False), ExitStack() as others:
            for lock in sorted((self.folder / INDEX).glob(f".{WRITING}*")):
                others.enter_context(owned(lock.with_name(lock.name.removeprefix(".").removesuffix(LOCK)), folder=False))
            return self._repaired()

    def _repaired(self) -> list[str]:
        left: list[str] = []
        lines = []
        for path, entry in self._whole_files(left):
            home = self.folder / entry.file
            if home != path and home.exists():
                left.append(f"{path}: a second file of {home.name}; remove one of them, the damaged one if one is")
            else:
                path.rename(home)
                lines.append(_line(entry))
        # The new index is whole before the old ones go; in between, a line stands twice, which does no harm.
        first = self.folder / INDEX / "rank0.jsonl"
        write_atomically(first, "".join(lines))
        for path in set(self._journals()) - {first}:
            path.unlink()
        return left

    def _whole_files(self, others: list[str]) -> Iterator[tuple[Path, Entry]]:
        """The whole prefix files and what their entries should be; for the other files a sentence goes to `others`."""
        for path in sorted(path for path in self.folder.glob(f"*{SUFFIX}") if path.is_file()):
            try:
                yield path, self._read(path)[1]
            except UserError as error:
                others.append(str(error))

    def _journals(self) -> list[Path]:
        return sorted((self.folder / INDEX).glob("rank*.jsonl"))

    def _read(self, path: Path) -> tuple[Prefix, Entry]:
        """A file and what its entry should be, with its own name; UserError if it is not a whole prefix of a task."""
        from hyperllama.prefixes.prefix import Prefix

        prefix = Prefix.load(path)
        if prefix.manifest is None or not prefix.manifest.task:
            raise UserError(f"{path}: a prefix whose manifest names no task, by which a store keeps them; move it elsewhere")
        return prefix, dataclasses.replace(_entry(path, prefix), file=self.path_of(prefix.manifest).name)

    def _whole(self, path: Path) -> Entry | None:
        """The entry of a file, if it is a whole prefix under its own name."""
        try:
            entry = self._read(path)[1]
        except UserError:
            return None
        return entry if entry.file == path.name else None

    def _only(self, task: str, identity: BaseIdentity | None) -> Entry:
        found = self.find(task=task)
        found = [entry for entry in found if identity is not None and _is_base(entry.base, identity)] or found
        if not found:
            raise UserError(f"{self.folder}: no prefix of a task {task!r}; hyperllama list {self.folder} shows what is there")
        if len(found) > 1:
            files = ", ".join(entry.file for entry in found)
            raise UserError(f"{self.folder}: {len(found)} prefixes of task {task!r} ({files}); load one of them by its entry")
        return found[0]

    def _index(self) -> dict[str, Entry]:
        """The entries by file name, and what processes have written since. Of lines about one file the last counts."""
        stamp = self.stamp()
        if stamp != self._stamp:
            there = {path: (number, size) for path, number, size, _ in stamp}
            # Journals are appended to, so that only what is new is read; repair makes other files of them.
            if not all(
                path in there and there[path][0] == own and there[path][1] >= end for path, (own, end) in self._ends.items()
            ):
                self._ends, self._newest = {}, {}
            for path, (number, _) in there.items():
                lines, end = _lines(path, self._ends.get(path, (number, 0))[1])
                self._ends[path] = number, end
                for written, entry in lines:
                    if entry.file not in self._newest or self._newest[entry.file][0] <= written:
                        self._newest[entry.file] = written, entry
            self._known, self._stamp = {file: entry for file, (_, entry) in self._newest.items()}, stamp
        return self._known

    def _append(self, entries: Iterable[Entry], rank: int) -> None:
        # Not synced: a line that is lost costs nothing but a repair, and syncing would take as long as the file itself does.
        # A crash may have cut the line before these short.
        append(self.folder / INDEX / f"rank{rank}.jsonl", "\n" + "".join(map(_line, entries)))


def _entry(path: Path, prefix: Prefix) -> Entry:
    known = {f.name: getattr(prefix.manifest, f.name) for f in dataclasses.fields(Entry) if f.name in vars(prefix.manifest)}
    return Entry(**known, file=path.name, rows=prefix.rows, bytes=path.stat().st_size)


def _line(entry: Entry) -> str:
    # When it was written decides between lines of several ranks about one file.
    return json.dumps({"written": time.time_ns(), **dataclasses.asdict(entry)}) + "\n"


def _lines(path: Path, start: int) -> tuple[list[tuple[int, Entry]], int]:
    """Whole lines of an index file from a byte on, and the byte behind the last of them.

    A line that a crash cut short is passed over: its prefix is then one without a line.
    """
    with path.open("rb") as file:
        file.seek(start)
        read = file.read()
    whole = read[: read.rfind(b"\n") + 1]
    found, bases = [], {}
    with no_collection():
        for value in _values(whole.split(b"\n")):
            try:
                written = value.pop("written")
                # Most lines are of one base: it is looked at once.
                key = (*value["base"].items(),)
                if key not in bases:
                    bases[key] = from_fields(BaseIdentity, value["base"], str(path))
                entry = _quickly(value, bases[key]) or from_fields(Entry, value, str(path))
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            if isinstance(written, int) and os.sep not in entry.file and len(entry.file) <= 255:
                found.append((written, entry))
    return found, start + len(whole)


@contextmanager
def no_collection() -> Iterator[None]:
    """While many objects without cycles are made Python looks for cycles again and again: a context in which it does not."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _values(lines: list[bytes]) -> list[Any]:
    """What lines of JSON hold; one that is none is left out."""
    lines = [line for line in lines if line]
    with suppress(ValueError):  # as one list they are read in half the time; a broken one is left out below
        values = json.loads(b"[" + b",".join(lines) + b"]")
        if len(values) == len(lines):
            return values
    values = []
    for line in lines:
        with suppress(ValueError):
            values.append(json.loads(line))
    return values


def _quickly(value: dict, base: BaseIdentity) -> Entry | None:
    """The entry of a line that is as `_line` writes it; None for one to be looked at closely."""
    may_lack = (value["context_sha256"], value["hypernetwork_sha256"], value["created"])
    plain = value.keys() == FIELDS and type(value["rows"]) is type(value["bytes"]) is int and type(value["metrics"]) is dict
    if not plain or type(value["file"]) is not str or type(value["task"]) is not str:
        return None
    if not set(map(type, may_lack)) <= {str, type(None)}:
        return None
    value["base"] = base
    return Entry(**value)


def _is_base(found: BaseIdentity, wanted: BaseIdentity | str) -> bool:
    if isinstance(wanted, str):
        return found.name.removeprefix("./") == wanted.removeprefix("./")
    return found.is_model(wanted) and (not found.tokenizer or not wanted.tokenizer or found.tokenizer == wanted.tokenizer)
