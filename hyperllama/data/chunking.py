"""How a context is cut into pieces that are compressed, and which of them know of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Chunking:
    """How a context is cut into segments with gists, and who reads them.

    graph: "single", the context as one segment; "recurrent", chunks of at most `chunk_tokens` of which each reads the gists of
    all before it (AutoCompressors, Chevalier et al. 2023, arXiv 2305.14788); "parallel", chunks that know nothing of each
    other. Demonstrations are cut only if they are longer than a chunk. Queries read the gists of all chunks.
    """

    graph: Literal["single", "recurrent", "parallel"] = "single"
    chunk_tokens: int = 256

    def chunks(self, context: Sequence[int], ends: Sequence[int] = ()) -> list[tuple[int, ...]]:
        """Pieces of a context; `ends` are the places in it at which a demonstration ends.

        >>> Chunking("parallel", 4).chunks(range(9), ends=[3, 6, 9])
        [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
        """
        pieces, start = [], 0
        while self.graph != "single" and len(context) - start > self.chunk_tokens:
            stop = max((e for e in ends if start < e <= start + self.chunk_tokens), default=start + self.chunk_tokens)
            pieces.append(tuple(context[start:stop]))
            start = stop
        return [*pieces, tuple(context[start:])]


SINGLE = Chunking()
