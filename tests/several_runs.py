"""Trains a recipe several times in one process, or in each of torchrun's, with settings from a file of JSON lists.

What takes most of a short run and is no part of it is left out: the picture of the loss, and looking for garbage in imports.
Contexts that are read without gradients go through an MLP in blocks of so few rows that ranks have different numbers of them.
"""

import gc
import json
import sys
from pathlib import Path

from hyperllama.base.distributed import close
from hyperllama.commands import train as commands_train
from hyperllama.hypernetworks import pooling
from hyperllama.hypernetworks.hint.hypernetwork import HintHypernetwork
from hyperllama.training import trainer

ROWS = 16

if __name__ == "__main__":
    recipe, runs = sys.argv[1:]
    trainer.plot_loss = lambda metrics, path: None
    pooling.BLOCK_ROWS = HintHypernetwork.task_modules.__kwdefaults__["block_rows"] = ROWS
    gc.collect()
    gc.freeze()
    for settings in json.loads(Path(runs).read_text()):
        commands_train.train(recipe, settings)
    close()
