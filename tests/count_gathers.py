"""Started by torchrun: trains under ZeRO-3 and counts how often each parameter was gathered in the last step, in a file."""

import json
import sys
from collections import Counter
from pathlib import Path

from hyperllama.base.distributed import close
from hyperllama.commands import train as commands_train
from hyperllama.training.trainer import GistTrainer


def count(arguments):
    """Train, and return how often each parameter was gathered in the last step."""
    # DeepSpeed has no public place to count at; the test that starts this notices if the private one moves.
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    gathered, names, counts = Counter(), {}, {}
    fetch, train_step = Coordinator._PartitionedParameterCoordinator__all_gather_params, GistTrainer.training_step

    def counting(self, params, *args, **kwargs):
        gathered.update(p.ds_id for p in params)
        return fetch(self, params, *args, **kwargs)

    def step(self, model, inputs, num_items_in_batch=None):
        names.update({p.ds_id: name for name, p in self.model.named_parameters()})
        gathered.clear()
        loss = train_step(self, model, inputs, num_items_in_batch)
        counts.clear()
        counts.update({names[i]: times for i, times in gathered.items()})
        return loss

    Coordinator._PartitionedParameterCoordinator__all_gather_params, GistTrainer.training_step = counting, step
    commands_train.train(arguments[0], arguments[1:])
    return counts


if __name__ == "__main__":
    found = count(sys.argv[1:])
    run = next(Path(argument.split("=")[1]) for argument in sys.argv if argument.startswith("output="))
    (run / "gathers.json").write_text(json.dumps(found))
    close()
