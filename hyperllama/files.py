"""Files that are whole or not there: written beside their place, then swapped in."""

import hashlib
import json
import os
import re
import secrets
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hyperllama.errors import UserError


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write `content` to `path` so that a crash or a full disk leaves the old file whole. Makes missing folders.

    Raises OSError when the disk refuses; the file that stood at `path` is then unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    # Not tempfile, whose files only their owner may read: asking for the umask would change it for all threads.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
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


def plain_name(text: str, otherwise: str = "task") -> str:
    """What of a name can stand in the name of a file anywhere: short ASCII, without slashes or a leading dot. Not unique."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "_", ascii_text).strip("._-")[:80] or otherwise


def canonical_json(value: Any) -> str:
    """JSON whose text depends on the value alone, for hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256(*parts: bytes | str) -> str:
    """Hexadecimal SHA-256 of the parts in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def read_json(path: str | Path, what: str) -> Any:
    """The JSON value in a file; UserError names the file, and the line where it stops being JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected {what}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, but {what} is a file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; expected {what}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); expected {what}") from None


def read_json_lines(path: str | Path, what: str) -> Iterator[tuple[str, Any]]:
    """The values of a file of JSON lines, each with "file, line n" to begin an error with; UserError where it is not JSON."""
    path = Path(path)
    try:
        # Not splitlines: a JSON string may hold other line separators of Unicode as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); expected JSON lines") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg}); expected {what}") from None


def whole_json_lines(path: str | Path) -> list[Any]:
    """The values of a file of JSON lines that grows, up to a line that a crash cut short; none if there is no file."""
    values = []
    for line in Path(path).read_text(encoding="utf-8").split("\n") if Path(path).exists() else ():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return values
