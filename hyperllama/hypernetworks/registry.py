"""Every kind of hypernetwork by its name: a new one is a class in this table."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyperllama.errors import UserError
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.config import read_config
from hyperllama.hypernetworks.full_copy import FullHypernetwork
from hyperllama.hypernetworks.gist_lora import GistHypernetwork
from hyperllama.hypernetworks.gisting import GistingHypernetwork
from hyperllama.hypernetworks.hint.hypernetwork import HintHypernetwork
from hyperllama.hypernetworks.pooling import PoolingHypernetwork

KINDS: dict[str, type[Hypernetwork]] = {
    cls.kind: cls for cls in (GistHypernetwork, FullHypernetwork, GistingHypernetwork, PoolingHypernetwork, HintHypernetwork)
}


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
        raise UserError(f"{folder}: a hypernetwork of kind {kind!r}, which is not one of {', '.join(KINDS)}; update hyperllama")
    return KINDS[kind].from_pretrained(folder, base, tokenizer=tokenizer, backend=backend)
