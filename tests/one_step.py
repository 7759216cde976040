"""Started by torchrun: one optimiser step over this rank's half of the episodes, and what it logged in a file."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from test_training import gradient_step

if __name__ == "__main__":
    folder = Path(sys.argv[1]) / os.environ["RANK"]
    logged = gradient_step(folder, 2, 1)
    (folder / "step.json").write_text(json.dumps(logged))
    dist.destroy_process_group()
