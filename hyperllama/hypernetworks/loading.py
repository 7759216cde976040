"""Loading a trained hypernetwork of any kind, with its base and the encoder of its text format."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyperllama.base.identity import BaseIdentity
from hyperllama.base.loading import base_of, load_base, load_tokenizer
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.errors import UserError
from hyperllama.files import from_fields
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.config import read_config
from hyperllama.hypernetworks.hub import fetch
from hyperllama.hypernetworks.registry import KINDS

NOTED = {"format": TextFormat, "limits": Limits}  # what a hypernetwork's notes say of text


def load_hypernetwork(
    run: str | Path, base_path: str | None = None, *, dtype: str | None = None, check_base: bool = False
) -> tuple[Hypernetwork, Encoder]:
    """A trained hypernetwork with its base, and the encoder of its text format; `base_path` where the base has moved.

    The base is loaded in `dtype`, in that of the run unless given. `check_base` compares all of its weights with those of the
    training, not a sample. UserError for a folder that is no hypernetwork's, or another base.
    """
    run = fetch(run)
    config = read_config(run)
    name = base_of(run, config["base"]["name"], base_path)
    settings = {"dtype": dtype or config["dtype"], "quantize": config["base"].get("quantize")}
    base, tokenizer = load_base(name, **settings), load_tokenizer(name)
    notes = config["notes"]
    text_format, limits = (from_fields(kind, notes.get(key, {}), str(run)) for key, kind in NOTED.items())
    encoder = Encoder(tokenizer, text_format, limits)
    hypernetwork = load_hypernetwork_onto(run, base, tokenizer=tokenizer)
    if check_base:
        hypernetwork.check_base(from_fields(BaseIdentity, config["base"], str(run)), str(run))
    return hypernetwork, encoder


def load_hypernetwork_onto(
    folder: str | Path,
    base: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    backend: str = "auto",
) -> Hypernetwork:
    """Read a folder that a hypernetwork of any kind wrote onto the base that it was trained for; UserError for any other."""
    kind = read_config(folder)["kind"]
    if kind not in KINDS:
        raise UserError(
            f"{folder}: a hypernetwork of kind {kind[:60]!r}, which is not one of {', '.join(KINDS)}; update hyperllama"
        )
    return KINDS[kind].hypernetwork().from_pretrained(folder, base, tokenizer=tokenizer, backend=backend)
