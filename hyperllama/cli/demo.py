"""The verb that serves a page."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from hyperllama.cli.app import Base, Dtype, Verb, app, quiet_libraries
from hyperllama.errors import UserError

HOST, PORT = "127.0.0.1", 7860


@app.command(cls=Verb)
def demo(
    run: Annotated[Path, typer.Argument(help="The folder of a finished hypernetwork run, or a base model.")] = Path("smollm2"),
    host: Annotated[str, typer.Option(help="Address to listen at; by default this machine alone can see the page.")] = HOST,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = PORT,
    base: Base = None,
    dtype: Dtype = None,
) -> None:
    """Serve a page on which examples are compressed, and answers behind them compared."""
    if find_spec("gradio") is None:
        raise UserError("demo: the page needs gradio, which is not installed; pip install 'hyperllama[demo]'")
    _check_free(host, port)
    quiet_libraries()
    from hyperllama.demo.work import Demo

    # A service is stopped so, and what users have made must not stay then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="hyperllama-demo-") as folder:
        work = Demo(run, folder, base_path=base, dtype=dtype)
        from hyperllama.demo.page import serve

        serve(work, host, port, folder, lambda address: typer.echo(f"{address} (Ctrl-C ends it)"))


def _check_free(host: str, port: int) -> None:
    """UserError, before anything loads, for a place at which nothing can listen."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(f"demo: cannot listen at {host}:{port} ({error.strerror}); give another --port or --host") from None
