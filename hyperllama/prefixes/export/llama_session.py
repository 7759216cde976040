"""The bytes of llama.cpp's session files of one sequence, as `llama_state_seq_load_file` reads them.

All numbers are little endian. First u32 magic, u32 version, u32 count of tokens and so many i32 tokens. Then, of the cells: u32
streams, u32 cells, and for each its i32 position, u32 count of sequences and i32 sequence; u32 whether values are transposed,
u32 layers, and from version 4 on two u32 zeros. Then the keys of each layer: i32 type, u64 bytes of a row, the rows. Then the
values likewise, or transposed: i32 type, u32 bytes of a number, u32 numbers of a row and the columns.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hyperllama.errors import UserError

MAGIC = 0x67677371
VERSIONS = (3, 4)

# ggml's numbers for the types of a cache, by llama-server's name of them.
TYPES = {"f32": (0, np.dtype("<f4")), "f16": (1, np.dtype("<f2"))}


def session_bytes(
    tokens: Sequence[int],
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    *,
    version: int,
    cache_type: str,
    transposed: bool = False,
) -> bytes:
    """A session file of rows at positions 0 .. G-1, from keys and values of each layer (G, N * D); tokens go in as they are.

    `transposed` is for a llama.cpp that runs without flash attention. Raises ValueError for numbers that the type of the cache
    cannot hold.
    """
    rows = len(keys[0])
    number, dtype = TYPES[cache_type]
    parts = [struct.pack("<3I", MAGIC, version, len(tokens)), np.asarray(tokens, "<i4").tobytes(), struct.pack("<2I", 1, rows)]
    parts += [struct.pack("<iIi", position, 1, 0) for position in range(rows)]
    parts += [struct.pack("<2I", transposed, len(keys)), bytes(8) if version >= 4 else b""]
    for side, turned in ((keys, False), (values, transposed)):
        for layer in side:
            with np.errstate(over="ignore"):
                cells = layer.astype(dtype)
            if not np.isfinite(cells).all():
                raise ValueError(f"numbers that {cache_type} cannot hold")
            width = cells.shape[1]
            head = struct.pack("<i2I", number, dtype.itemsize, width) if turned else struct.pack("<iQ", number, cells[0].nbytes)
            parts += [head, np.ascontiguousarray(cells.T if turned else cells).tobytes()]
    return b"".join(parts)


def tokens_of(path: str | Path) -> list[int]:
    """The tokens at the head of a session file that `to_llama_cpp` wrote: a prompt that begins with them reads its rows.

    Raises UserError for another file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such session file; make one with hyperllama export --to llama.cpp")
    with path.open("rb") as file:
        head = file.read(12)
        magic, version, count = struct.unpack("<3I", head) if len(head) == 12 else (0, 0, 0)
        tokens = file.read(4 * count) if (magic, version in VERSIONS) == (MAGIC, True) else b""
    if not count or len(tokens) != 4 * count:
        raise UserError(f"{path}: no session file of a prefix; make one with hyperllama export --to llama.cpp")
    return np.frombuffer(tokens, "<i4").tolist()


def has_form_of(theirs: bytes, *, layers: int, width: int, cache_type: str, transposed: bool) -> bool:
    """Whether a session file of one row that llama.cpp wrote is, but for the numbers of its cells, what we would write.

    `width` is N * D. The version must be one of `VERSIONS`.
    """
    _, version, count = struct.unpack_from("<3I", theirs)
    if 12 + 4 * count > len(theirs):
        return False
    settings = {"version": version, "cache_type": cache_type, "transposed": transposed}
    tokens = np.frombuffer(theirs, "<i4", count, 12).tolist()
    # What two files share whose numbers differ in every byte is the form.
    filled = [[np.full((1, width), number)] * layers for number in (0.0, 1.1)]
    one, other = (np.frombuffer(session_bytes(tokens, side, side, **settings), np.uint8) for side in filled)
    found = np.frombuffer(theirs, np.uint8)
    return len(found) == len(one) and bool((found == one)[one == other].all())
