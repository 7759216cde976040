"""Started by torchrun: trains with the logits of a few targets at a time, and writes how many chunks each step took."""

import json
import os
import sys
from pathlib import Path

from hyperllama.base.distributed import close
from hyperllama.commands import train as commands_train
from hyperllama.objectives import losses as objectives_losses

if __name__ == "__main__":
    objectives_losses.LOGITS, counts, head_chunks = 1000, [], objectives_losses.head_chunks

    def counting(rows, vocabulary):
        counts.append(head_chunks(rows, vocabulary))
        return counts[-1]

    objectives_losses.head_chunks = counting
    commands_train.train(sys.argv[1], sys.argv[2:])
    rank = int(os.environ["RANK"])
    run = next(Path(argument.split("=")[1]) for argument in sys.argv if argument.startswith("output="))
    (run / f"chunks-{rank}.json").write_text(json.dumps(counts))
    close()
