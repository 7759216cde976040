"""Text to tokens as a model's own tokenizer would have it: several pieces are one text, and users' text is text."""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperllama.errors import UserError
from hyperllama.files import half_character

if TYPE_CHECKING:  # recipes are read without torch
    from transformers import PreTrainedTokenizerBase

# Text that stands before a piece where its own surroundings cannot: in no known vocabulary does any of these join with all.
NEUTRAL = ("a", "\n", ".")


@dataclass(frozen=True)
class Piece:
    """Some text; in `template`s special tokens are special tokens, in what users write they are text."""

    text: str
    template: bool = False


def template(text: str) -> Piece:
    """A piece of a template."""
    return Piece(text, True)


class TextTokens:
    """A tokenizer without the tokens that it puts around a text. UserError for a tokenizer without offsets.

    `start` are the tokens that the tokenizer itself puts before a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not getattr(tokenizer, "is_fast", False):
            kind = type(tokenizer).__name__
            raise UserError(f"{kind}: a tokenizer without offsets of its tokens; give the model a tokenizer.json")
        self._tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._tokenizer.post_processor = None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
        self._special = ids
        self._pattern = _any_of(self._special)
        # Models that look up whole pieces, as Unigram and word lists do, find special tokens in plain text all the same.
        self._found = _any_of([token for token, i in ids.items() if i in self._tokenizer.encode(token).ids])
        around, alone = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
        at = next((i for i in range(len(around)) if around[i : i + len(alone)] == alone), 0)
        self.start = tuple(around[:at])

    def encode(self, pieces: Sequence[Piece]) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of the pieces as one text, and from which to which of its characters each token goes."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        place = 0
        for text, special in self._stretches(pieces):
            if special is not None:
                ids.append(special)
                spans.append((place, place + len(text)))
            else:
                found = self._found_in(text)
                ids += found.ids
                spans += [(place + a, place + b) for a, b in found.offsets] if place else found.offsets
            place += len(text)
        return ids, spans

    def _found_in(self, text: str):
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            half = half_character(text)
            if half is None:
                raise
            raise UserError(f"{text[:60]!r}: has {half}, half of a character, which no tokenizer can read; remove it") from None

    def _stretches(self, pieces: Sequence[Piece]) -> list[tuple[str, int | None]]:
        """The text of pieces, cut where templates have special tokens: text and None, or a special token and its id.

        What would be found as one in users' text is cut behind its first character.
        """
        cut: list[tuple[str, int | None]] = [("", None)]
        for piece in pieces:
            rest, pattern = 0, self._pattern if piece.template else self._found
            for found in pattern.finditer(piece.text) if pattern else ():
                end = found.end() if piece.template else found.start() + 1
                cut[-1] = (cut[-1][0] + piece.text[rest : found.start() if piece.template else end], None)
                cut += [(found[0], self._special[found[0]])] if piece.template else []
                cut.append(("", None))
                rest = end
            cut[-1] = (cut[-1][0] + piece.text[rest:], None)
        return [(text, special) for text, special in cut if text]

    def between(self, before: Sequence[Piece], pieces: Sequence[Piece], after: Sequence[Piece] = ()) -> list[int]:
        """Token ids of pieces as they are between what stands before them and after them.

        Where one token would lie on both sides of a seam, each side is tokenised without the other.
        """
        for surroundings in ((before, after), (before, ()), *(([Piece(text)], ()) for text in NEUTRAL)):
            found = self._cut(*surroundings, pieces)
            if found is not None:
                return found
        return self.encode(pieces)[0]

    def _cut(self, before: Sequence[Piece], after: Sequence[Piece], pieces: Sequence[Piece]) -> list[int] | None:
        ids, spans = self.encode([*before, *pieces, *after])
        first = sum(len(piece.text) for piece in before)
        last = first + sum(len(piece.text) for piece in pieces)
        a, b = (places_until(spans, end) for end in (first, last))
        seams = ((a, first), (b, last))
        clean = all(at == len(spans) or spans[at][0] >= end for at, end in seams)
        return ids[a:b] if clean else None


def _any_of(tokens: Collection[str]) -> re.Pattern | None:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def places_until(spans: Sequence[tuple[int, int]], character: int) -> int:
    """How many tokens end at a character or before it."""
    return bisect_right(spans, character, key=lambda span: span[1])
