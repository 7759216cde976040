"""Started by torchrun: trains with the logits of a few targets at a time, and writes how many chunks each step took."""

import json
import os
import sys
from pathlib import Path

from hyperllama import objectives, workflows
from hyperllama.distributed import close

if __name__ == "__main__":
    objectives.LOGITS, counts, head_chunks = 1000, [], objectives.head_chunks

    def counting(rows, vocabulary):
        counts.append(head_chunks(rows, vocabulary))
        return counts[-1]

    objectives.head_chunks = counting
    workflows.train(sys.argv[1], sys.argv[2:])
    rank = int(os.environ["RANK"])
    run = next(Path(argument.split("=")[1]) for argument in sys.argv if argument.startswith("output="))
    (run / f"chunks-{rank}.json").write_text(json.dumps(counts))
    close()
