"""The verb that serves prefixes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hyperllama.cli.app import Base, Verb, app, quiet_libraries


@app.command(cls=Verb)
def serve(
    store: Annotated[Path, typer.Argument(help="A store made by hyperllama compress --store.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Options of vllm serve.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; this machine alone unless given.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Ask clients for this key; else that of VLLM_API_KEY.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the base as a model; else its folder's.")] = None,
    cache_gib: Annotated[float, typer.Option(min=0, help="Memory for prefixes in use, GiB.")] = 1.0,
    base: Base = None,
) -> None:
    """Serve the prefixes of a store by vLLM's OpenAI server: each is a model."""
    quiet_libraries()
    from hyperllama.serving.server import serve as become_server

    key = api_key or os.environ.get("VLLM_API_KEY")
    settings = {"host": host, "port": port, "api_key": key, "name": name, "most_bytes": int(cache_gib * 2**30)}
    become_server(store, base=base, more=more or (), **settings)
