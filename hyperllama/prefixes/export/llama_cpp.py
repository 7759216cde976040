"""Prefixes as session files that stock llama.cpp loads in front of a prompt."""

from __future__ import annotations

import importlib.util
import json
import struct
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import PreTrainedConfig

from hyperllama.base.decoder import head_dim, inverse_frequencies, kv_heads
from hyperllama.base.fingerprints import identify
from hyperllama.base.loading import is_gguf, load_base, load_config
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import check_output, sha256, write_atomically
from hyperllama.prefixes.export.llama_session import MAGIC, VERSIONS, has_form_of, session_bytes, tokens_of
from hyperllama.prefixes.prefix import Prefix

# Architectures of GGUF files that were tested, and whether their rotary pairs stand side by side, not half a head apart.
SIDE_BY_SIDE = {"llama": True, "qwen2": False, "qwen3": False}

NORMAL_TOKEN = 1  # in tokenizer.ggml.token_type: neither control nor unused


CacheType = Literal["f16", "f32"]


class SessionWriter:
    """Writes prefixes of one base as session files for llama.cpp (`llama_state_seq_load_file`, llama-server's slots).

    `gguf` is the base in llama.cpp's format. It is loaded once for all prefixes, and takes as much memory as in bf16. `version`
    is that of session files. Without one the package xllamacpp is asked, which saves a row of `gguf`: its file must be of the
    form that is written here. `cache_type` and `flash_attention` are those of the llama.cpp that will load the files: it
    refuses files of others.

    Raises UserError for an architecture or a rotary scaling that was not tested, an unknown version, or xllamacpp missing or
    failing.
    """

    def __init__(
        self, gguf: str | Path, *, version: int | None = None, cache_type: CacheType = "f16", flash_attention: bool = True
    ):
        _check_version(version)
        self.gguf, self.reader = gguf, _read(gguf)
        self._side_by_side = SIDE_BY_SIDE[_architecture(self.reader, gguf)]
        self.model = load_base(str(gguf), dtype="bfloat16", device="cpu")  # fingerprints are of bf16
        self._form = {"cache_type": cache_type, "transposed": not flash_attention}
        self.version = ask_version(gguf, self.model.config, **self._form) if version is None else version

    def write(self, prefix: Prefix, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a prefix; returns the path. Numbers are rounded to the type of the cache.

        The rows have placeholders for tokens, which `tokens_of(path)` reads: a prompt of these ids, and behind them a query, is
        continued as the frozen model continues the query behind the prefix. llama.cpp compares them and reads only the query.
        The placeholders hang on the numbers of the prefix, so that no prefix is taken for another; they are ordinary tokens of
        the later half of the vocabulary, the rarer one, since a prompt that begins like one reads as much of the prefix.

        Raises UserError for a task module with more than keys and values, a prefix of other weights or rotary frequencies,
        numbers beyond the type of the cache, or a file that is there and is no session file without `overwrite`; OSError when
        the disk refuses.
        """
        _check_output(prefix, path, self.gguf, overwrite)
        self._check_base(prefix)
        keys = [_rows(_side_by_side(layer) if self._side_by_side else layer) for layer in prefix.keys]
        values = [_rows(layer) for layer in prefix.values]
        try:
            written = session_bytes(_placeholders(prefix, self.reader), keys, values, version=self.version, **self._form)
        except ValueError as error:
            raise UserError(f"{path}: the prefix has {error}; export it with --cache-type f32") from error
        write_atomically(path, written)
        return Path(path)

    def _check_base(self, prefix: Prefix) -> None:
        """UserError unless the GGUF file has the sizes, weights and rotary frequencies that the prefix was made for."""
        prefix.check_sizes(self.model)
        if prefix.manifest is None:
            return
        full = prefix.manifest.base.full is not None
        rotary, config = dict(prefix.manifest.rotary), self.model.config
        frequencies = rotary.pop("inv_freq", None)
        if frequencies is not None:
            own = inverse_frequencies(self.model).float().cpu()
            _check_frequencies(torch.tensor(frequencies), own, self.reader, self.gguf)
        was = config.rope_parameters, config.rms_norm_eps
        try:
            if frequencies is not None:
                config.rope_parameters = rotary  # compared by what they come to
            found = identify(self.model, full=full)
            # GGUF files keep it in float32, where 1e-5 is another number.
            config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
            rounded = identify(self.model, full=full)
        finally:
            config.rope_parameters, config.rms_norm_eps = was
        prefix.check(rounded if prefix.manifest.base.is_model(rounded) else found)


def to_llama_cpp(prefix: Prefix, path: str | Path, gguf: str | Path, *, overwrite: bool = False, **settings) -> Path:
    """Write one prefix as a session file; returns the path. `settings` and errors: see `SessionWriter` and its `write`."""
    _check_output(prefix, path, gguf, overwrite)
    return SessionWriter(gguf, **settings).write(prefix, path, overwrite=overwrite)


def request(prefix: Prefix, path: str | Path, text: str = "{input}", slot: int = 0) -> dict[str, Any]:
    """The body of a request to llama-server's /completion: `text` asked behind the session file at `path`, greedily.

    The slot must have restored the file. llama-server tokenises the text by itself, control tokens in it too; ids may stand in
    its place. The texts around it are those of the prefix's manifest. UserError for another file.
    """
    wanted = prefix.manifest.text_format if prefix.manifest else {}
    query = wanted.get("query", "{input}").replace("{input}", text)
    body = {"id_slot": slot, "prompt": [*tokens_of(path), query], "temperature": 0}
    body |= {"n_predict": wanted["answer_tokens"]} if "answer_tokens" in wanted else {}
    return body | ({"stop": [wanted["separator"]]} if wanted.get("separator") else {})


def is_session(path: Path) -> bool:
    """Whether a file begins as llama.cpp's session files of one sequence do."""
    with path.open("rb") as file:
        return file.read(4) == struct.pack("<I", MAGIC)


def _check_output(prefix: Prefix, path: str | Path, gguf: str | Path, overwrite: bool) -> None:
    """UserError for a prefix that cannot be written at all, or not there."""
    prefix.refuse_modules("a session file of llama.cpp holds")
    if problem := prefix.problem():
        raise UserError(f"{path}: a prefix {problem}; it is not written")
    check_output(path, reads=[gguf], ours=is_session, overwrite=overwrite)


def _check_version(version: int | None) -> None:
    named = " or ".join(map(str, VERSIONS))
    if version is None and importlib.util.find_spec("xllamacpp") is None:
        raise UserError(
            "which version of session files llama.cpp reads is asked of xllamacpp, which is not installed; pip install "
            f"'hyperllama[llama-cpp]', or name the version, {named}, with --session-version"
        )
    if version is not None and version not in VERSIONS:
        raise UserError(f"session files of version {version} are not known; choose {named}")


def _read(gguf: str | Path) -> GGUFReader:
    """A GGUF file's reader; UserError for what is none."""
    if not is_gguf(gguf):
        raise UserError(f"{gguf}: not the name of a GGUF file, which ends in .gguf; give the base as llama.cpp reads it")
    load_config(str(gguf))  # refuses what cannot be read
    return GGUFReader(Path(gguf).expanduser())


def _field(reader: GGUFReader, name: str):
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _architecture(reader: GGUFReader, gguf: str | Path) -> str:
    """The architecture of a GGUF file; UserError unless it and its rotary embedding were tested."""
    found = _field(reader, "general.architecture")
    if found not in SIDE_BY_SIDE:
        tested = ", ".join(SIDE_BY_SIDE)
        raise UserError(f"{gguf}: has the architecture {found}, but prefixes in llama.cpp were tested with {tested} alone")
    scaling = _field(reader, f"{found}.rope.scaling.type")
    if scaling not in (None, "none"):
        raise UserError(f"{gguf}: scales rotary positions ({scaling}), which was not tested; give a base without")
    return found


def _check_frequencies(made_with: Tensor, of_config: Tensor, reader: GGUFReader, gguf: str | Path) -> None:
    """UserError unless llama.cpp turns keys by the frequencies that the prefix was made with."""
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    found = of_config if factors is None else of_config / torch.from_numpy(np.array(factors)).float()
    if made_with.shape != found.shape or not torch.allclose(made_with, found, rtol=1e-4, atol=0):
        raise UserError(f"{gguf}: has other rotary frequencies than the base that this prefix was made for; give its own base")


def _side_by_side(keys: Tensor) -> Tensor:
    """Keys (N, G, D) with dimension i beside i + D/2, as the GGUF files of Llama order what rotates together."""
    return keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _rows(side: Tensor) -> np.ndarray:
    """(N, G, D) as a cache's rows (G, N * D)."""
    return side.detach().cpu().transpose(0, 1).flatten(1).float().numpy()


def _placeholders(prefix: Prefix, reader: GGUFReader) -> list[int]:
    """A token for each row, drawn by a hash of the prefix from the ordinary tokens of the later half of the vocabulary."""
    kinds = _field(reader, "tokenizer.ggml.token_type")
    count = len(reader.get_field("tokenizer.ggml.tokens").data)
    normal = [i for i in range(count) if kinds is None or kinds[i] == NORMAL_TOKEN]
    normal = normal[len(normal) // 2 :] or range(count)
    digest = sha256(*(side.detach().cpu().float().numpy().tobytes() for side in (*prefix.keys, *prefix.values)))
    return [normal[int(sha256(digest, str(row)), 16) % len(normal)] for row in range(prefix.rows)]


def ask_version(gguf: str | Path, config: PreTrainedConfig, *, cache_type: CacheType, transposed: bool) -> int:
    """The version of session files of the installed xllamacpp, which reads one token with `gguf` and saves its row.

    Raises UserError if it fails, or its file is not of the form that `session_bytes` writes.
    """
    import xllamacpp

    name = f"xllamacpp {xllamacpp.__version__}"
    try:
        saved = _saved_row(gguf, cache_type, not transposed)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{name} cannot save a session of {gguf} ({in_one_line(error)}); try another xllamacpp") from error
    magic, version = struct.unpack_from("<2I", saved)
    named = " and ".join(map(str, VERSIONS))
    if magic != MAGIC or version not in VERSIONS:
        raise UserError(f"{name} writes session files of version {version}, but {named} are known; use another xllamacpp")
    form = {"layers": config.num_hidden_layers, "width": kv_heads(config) * head_dim(config)}
    if not has_form_of(saved, **form, cache_type=cache_type, transposed=transposed):
        raise UserError(
            f"{name} writes session files of version {version} in another form than is known; use another xllamacpp, or name "
            "the version with --session-version"
        )
    return version


def _saved_row(gguf: str | Path, cache_type: str, flash_attention: bool) -> bytes:
    """The session file that llama.cpp writes when it has read one token."""
    import xllamacpp as x

    settings = x.CommonParams()
    settings.model.path = str(Path(gguf).expanduser().resolve())
    settings.cache_type_k = settings.cache_type_v = getattr(x.ggml_type, f"GGML_TYPE_{cache_type.upper()}")
    kind = "ENABLED" if flash_attention else "DISABLED"
    settings.flash_attn_type = getattr(x.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{kind}")
    settings.n_ctx, settings.n_parallel, settings.port, settings.verbosity = 256, 1, 0, -1  # any free port, and no log
    settings.n_gpu_layers, settings.warmup, settings.fit_params = 0, False, False
    with TemporaryDirectory() as folder:
        settings.slot_save_path = f"{folder}/"
        server = x.Server(settings)
        _post(f"{server.listening_address}/completion", {"prompt": [0], "n_predict": 0, "id_slot": 0})
        _post(f"{server.listening_address}/slots/0?action=save", {"filename": "row"})
        del server  # stops it
        return (Path(folder) / "row").read_bytes()


def _post(url: str, body: dict) -> None:
    """Ask a server on this machine; OSError with its words if it refuses."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600):
            pass
    except urllib.error.HTTPError as error:
        raise OSError(error.read().decode(errors="replace")) from error
