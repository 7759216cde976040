"""Started by torchrun: trains under ZeRO-3 and counts how often each parameter was gathered in the last step, in a file."""

import json
import sys
from collections import Counter
from pathlib import Path

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from hyperllama import workflows
from hyperllama.distributed import close
from hyperllama.training import GistTrainer

gathered, names, counts = Counter(), {}, []
fetch = "_PartitionedParameterCoordinator__all_gather_params"
original = getattr(PartitionedParameterCoordinator, fetch)


def counting(self, params, *args, **kwargs):
    gathered.update(p.ds_id for p in params)
    return original(self, params, *args, **kwargs)


def step(self, model, inputs, num_items_in_batch=None):
    names.update({p.ds_id: name for name, p in self.model.named_parameters()})
    gathered.clear()
    loss = train_step(self, model, inputs, num_items_in_batch)
    counts.append({names[i]: times for i, times in gathered.items()})
    return loss


train_step, GistTrainer.training_step = GistTrainer.training_step, step
setattr(PartitionedParameterCoordinator, fetch, counting)
workflows.train(sys.argv[1], sys.argv[2:])
run = next(Path(argument.split("=")[1]) for argument in sys.argv if argument.startswith("output="))
(run / "gathers.json").write_text(json.dumps(counts[-1]))
close()
