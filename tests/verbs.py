"""Verbs as `python -m hyperllama` runs them, each in a fork of one process, so that libraries are imported once.

python -m tests.verbs FOLDER < COMMANDS, a list of lists as JSON. What the n-th prints is left in FOLDER/n.out and FOLDER/n.err;
what importing prints is printed.
"""

import json
import os
import sys
from pathlib import Path

from hyperllama.cli import main


def verb(arguments):
    """Run a verb; its exit code."""
    sys.argv = ["hyperllama", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code


def fork(arguments, path):
    """Run a verb in a process of its own; its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{path}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = verb(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # The program itself imports what it needs, the way it does, before it finds that there is no such recipe.
    assert verb(["train", "nowhere.yaml"]) == 2
    from transformers.utils.logging import enable_progress_bar

    enable_progress_bar()  # each verb is to switch it off itself
    codes = [fork(command, folder / str(n)) for n, command in enumerate(json.load(sys.stdin))]
    sys.exit(any(codes))
