"""Reading users' text, and writing files that are whole or not there. Errors name the file, and the line if there is one."""

import gzip
import hashlib
import json
import os
import re
import secrets
import tempfile
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hyperllama.errors import UserError

T = TypeVar("T")

# As JSON writes the halves of a pair that together are one character.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write `content` to `path` so that a crash or a full disk leaves the old file whole. Makes missing folders.

    A link is followed. Raises OSError that names `path` when the disk refuses, or `path` is no place for a file, such as a
    device; what stood at `path` is then unchanged.
    """
    content = content.encode() if isinstance(content, str) else content
    with naming(path):
        path = Path(os.path.realpath(path))  # or a link would be replaced, not the file that it names
        if path.exists() and not path.is_file():
            raise FileExistsError(17, "not a file", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile, whose files only their owner may read: asking for the umask would change it for all threads.
        temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                temporary.chmod(path.stat().st_mode & 0o777)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append(path: str | Path, text: str, *, sync: bool = False) -> None:
    """Add text to the end of a file that grows; with `sync` it is on the disk afterwards. Raises OSError that names `path`."""
    with naming(path), Path(path).open("a", encoding="utf-8") as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A context whose OSErrors are about `path`: a full disk's error names no file, that of a file beside it the wrong one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check_output(
    path: str | Path, *, reads: Iterable[str | Path] = (), ours: Callable[[Path], bool] | None = None, overwrite: bool = True
) -> None:
    """UserError unless a file may be written to `path`, before anything is computed for it.

    Never over a file that is read (`reads`). Without `overwrite` not over one that is there, unless `ours` says that it is of
    the kind that is to be written. Nothing is made.
    """
    path = Path(path)
    for read in map(Path, reads):
        if os.path.realpath(read) == os.path.realpath(path) or (read.exists() and path.exists() and read.samefile(path)):
            raise UserError(f"{path}: is read, so it cannot be written too; give another name for the output")
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # refuses a name that is too long
        there = path.exists()
        if there and not path.is_file():
            raise UserError(f"{path}: {'a folder' if path.is_dir() else 'not a file'}; give the name of a file for the output")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise UserError(f"{path}: cannot be written, {above} is a file; give another name for the output")
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another name for the output") from error
    if there and not overwrite and not (ours and ours(path)):
        raise UserError(f"{path}: is there already; give another name for the output, or --overwrite to replace it")


def plain_name(text: str, otherwise: str = "task") -> str:
    """What of a name can stand in the name of a file anywhere: short ASCII, without slashes or a leading dot. Not unique."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "_", ascii_text).strip("._-")[:80] or otherwise


def written(name: str | Path) -> str:
    """A model's or a run's name as it is kept in files: a path that is here begins with a dot or a slash, others do not.

    So `models/x` stays a folder, also where there is none of that name: the hub's `models/x` may be a stranger's.
    """
    name = str(name)
    return f"./{name}" if not is_path(name) and Path(name).exists() else name


def is_path(name: str | Path) -> bool:
    """Whether a name cannot be one of the hub's, which are `name` or `owner/name`."""
    return str(name).startswith((".", "/", "~")) or str(name).count("/") > 1


def canonical_json(value: Any) -> str:
    """JSON whose text depends on the value alone, for hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256(*parts: bytes | str) -> str:
    """Hexadecimal SHA-256 of the parts in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def read_text(path: str | Path, what: str) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; UserError, with `what` is expected, if it is none."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected {what}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, but {what} is a file") from None
    except UnicodeDecodeError as error:
        before = error.object[: error.start].count(b"\n") + 1
        wide = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        why = "text in UTF-16" if wide else f"not text in UTF-8 (byte {error.object[error.start]:#x} in line {before})"
        raise UserError(f"{path}: {why}; expected {what}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {what}") from None


def read_json(path: str | Path, what: str) -> Any:
    """The JSON value in a file; UserError names the file, and the line where it stops being JSON."""
    return json_of(read_text(path, what), str(path), what)


def read_json_lines(path: str | Path, what: str) -> Iterator[tuple[str, Any]]:
    """The values of a file of JSON lines, each with "file, line n" to begin an error with; UserError where it is not JSON."""
    # Not splitlines: a JSON string may hold other line separators of Unicode as they are.
    for number, line in enumerate(read_text(path, f"JSON lines of {what}").split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, json_of(line, where, what)


def write_zipped_lines(path: str | Path, lines: Iterable[Any]) -> None:
    """Write JSON lines through gzip; equal lines make equal bytes."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, gzip.compress(text.encode(), mtime=0))


def zipped_lines(path: str | Path) -> list[Any]:
    """The values of a file that `write_zipped_lines` wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def json_of(text: str, where: str, what: str) -> Any:
    """The JSON value of a text; UserError if it is none, or cannot be written, that begins with `where`, "file, line n" say."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = where if ", line " in where else f"{where}, line {error.lineno}"
        raise UserError(f"{place}: not JSON ({error.msg}); expected {what}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{where}: cannot be read as JSON ({str(error).split(';')[0]}); expected {what}") from None
    if _HALF.search(text) and (half := half_character(json.dumps(value, ensure_ascii=False))):
        raise UserError(f"{where}: has {half}, half of a character, which no tokenizer can read; correct or remove it")
    return value


def half_character(text: str) -> str | None:
    """The first character of a text that stands for half of one, as JSON would write it, such as \\ud83d; else None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def from_fields(kind: type[T], values: Any, where: str) -> T:
    """The dataclass `kind` of a mapping that was read from a file; keys that it does not know are passed over.

    Raises UserError that begins with `where` if a field without default is missing, or a value is not of its field's type.
    Fields may be dataclasses themselves.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: {str(values)[:60]!r} is no mapping of {', '.join(f.name for f in fields(kind)[:4])} ...")
    kinds, given = _types_of(kind), {}
    for known in fields(kind):
        if known.name in values:
            value, wanted = values[known.name], kinds[known.name]
            if is_dataclass(wanted):
                value = from_fields(wanted, value, f"{where}: {known.name}")
            elif not _fits(value, wanted):
                name = getattr(wanted, "__name__", str(wanted)) if typing.get_args(wanted) == () else str(wanted)
                raise UserError(f"{where}: {known.name} is {str(value)[:60]!r}, not {name.replace('typing.', '')}")
            given[known.name] = value
        elif known.default is MISSING and known.default_factory is MISSING:
            raise UserError(f"{where}: has no {known.name}")
    return kind(**given)


@cache
def _types_of(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if kind in (int, float):  # True is no number here, and a whole number may be written without a point
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return value is None if kind in (None, type(None)) else isinstance(value, origin or kind)


def whole_json_lines(path: str | Path) -> list[Any]:
    """The values of a file of JSON lines that grows, up to a line that a crash cut short; none if there is no file."""
    values = []
    # As bytes: a crash can leave half a character too.
    for line in Path(path).read_bytes().split(b"\n") if Path(path).exists() else ():
        try:
            values.append(json.loads(line))
        except ValueError:
            break
    return values
