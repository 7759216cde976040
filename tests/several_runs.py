"""Started by torchrun: trains a recipe several times, each with settings of its own, which a file of JSON lists."""

import json
import sys
from pathlib import Path

from hyperllama.base.distributed import close
from hyperllama.commands import train as commands_train

if __name__ == "__main__":
    recipe, runs = sys.argv[1:]
    for settings in json.loads(Path(runs).read_text()):
        commands_train.train(recipe, settings)
    close()
