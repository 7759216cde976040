"""Gist masks as reading graphs, and attention that computes no masked work.

A packed row of tokens is cut into segments. A segment attends causally to itself and fully to the gist rows of the
earlier segments that it reads; nothing else is visible. `Segment` and `GistLayout` say who reads whom, `dense_mask` and
`draw` show it, `gist_attention` computes it, and `register` teaches it to stock transformers models.

This package imports torch only; transformers and matplotlib are imported by `register` and `picture` when they are called.
"""

from attention_masks.attention import BACKENDS, choose, gist_attention, why_not
from attention_masks.dense import dense_mask
from attention_masks.draw import draw
from attention_masks.layout import GistLayout, Segment
from attention_masks.rotary import rotate

__all__ = [
    "BACKENDS",
    "GistLayout",
    "Segment",
    "choose",
    "dense_mask",
    "draw",
    "gist_attention",
    "picture",
    "register",
    "rotate",
    "why_not",
]


def register() -> str:
    """Teach transformers the attention implementation "gist"; see `attention_masks.registration.register`."""
    from attention_masks.registration import register

    return register()


def picture(layouts, path) -> None:
    """Draw layouts side by side into a PNG; see `attention_masks.picture.picture`."""
    from attention_masks.picture import picture

    picture(layouts, path)
