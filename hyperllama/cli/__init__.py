"""The command line: verbs. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import os
import sys

from hyperllama.cli import demo, jobs, prefixes, serving  # noqa: F401  each adds its verbs
from hyperllama.cli.app import app
from hyperllama.errors import UserError


def main() -> None:
    """Run a verb. An error is one line on stderr (a recipe's problems a line each) and exit code 2."""
    arguments = sys.argv[1:] or ["--help"]
    debug = "--debug" in arguments
    try:
        # DeepSpeed's launcher adds --local_rank to the command; the variable LOCAL_RANK says the same.
        arguments = [a for a in arguments if a != "--debug" and not a.startswith("--local_rank=")]
        code = app(args=arguments, standalone_mode=False)
        if "torch" in sys.modules:
            from hyperllama.base.distributed import close

            close()
    except KeyboardInterrupt:
        _fail("stopped; run the same command again to go on", 130)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if debug:
            raise
        if isinstance(error, UserError):
            _fail(str(error))
        elif isinstance(error, OSError) and error.filename:
            _fail(f"{error.filename}: {error.strerror or type(error).__name__}; see to it, then run the same command again")
        # typer's own errors about arguments carry their sentence in `message`.
        elif hasattr(error, "format_message"):
            _fail(" ".join(error.format_message().split()) + " (see hyperllama --help)")
        else:
            _fail(f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'} (--debug shows where)")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> None:
    print("\n".join(f"hyperllama: {line}" for line in message.splitlines()), file=sys.stderr)
    sys.exit(code)
