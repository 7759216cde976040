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
from hyperllama.hypernetworks.config import CONFIG, read_config
from hyperllama.hypernetworks.hub import fetch
from hyperllama.hypernetworks.pooling import PoolingHypernetwork
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


def load_maker(
    run: str | Path, base_path: str | None = None, *, gists: int = 16, dtype: str | None = None, check_base: bool = False
) -> tuple[Hypernetwork, Encoder]:
    """As `load_hypernetwork`; of a base model, in place of a hypernetwork, `untrained` with `gists` rows.

    The text format is then the default one, and limits are the base's positions.
    """
    if not is_base(run):
        return load_hypernetwork(run, base_path, dtype=dtype, check_base=check_base)
    if base_path is not None or check_base:
        raise UserError(f"{run}: a base model, not a hypernetwork; leave {'--base' if base_path else '--check-base'} out")
    base, tokenizer = load_base(str(run), dtype=dtype or "float32"), load_tokenizer(str(run))
    limits = Limits(context_tokens=base.config.max_position_embeddings - gists)
    return untrained(base, gists, tokenizer), Encoder(tokenizer, TextFormat(), limits)


def is_base(run: str | Path) -> bool:
    """Whether a local path is a model's, and no hypernetwork's run."""
    path = Path(run).expanduser()
    return path.suffix == ".gguf" or ((path / "config.json").is_file() and not (path / CONFIG).is_file())


def untrained(base: PreTrainedModel, gists: int, tokenizer: PreTrainedTokenizerBase | None = None) -> PoolingHypernetwork:
    """What keeps tokens as they are: for each head the first, and those that the second half of a context attends to most.

    It is of use without any training.
    """
    return PoolingHypernetwork(base, gists=gists, attended=0.5, sharpness=1e4, elastic=True, tokenizer=tokenizer)


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
