"""Training on transformers' Trainer, with our own loss by tokens, checkpoints and log."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from functools import partial, wraps
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from hyperllama.base.distributed import gathered, join_deepspeed
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import append, whole_json_lines, write_atomically
from hyperllama.objectives.losses import TokenLoss
from hyperllama.training.checkpoints import CHECKPOINTS, Staging, make_universal, read_shape
from hyperllama.training.deepspeed import deepspeed_file

METRICS, PLOT, NOT_FINITE = "metrics.jsonl", "loss.png", "not_finite.json"


class GistTrainer(Trainer):
    """Trains a module whose `forward(batch)` returns a `TokenLoss` and which has `save_pretrained` and `load_weights`.

    The loss is the sum over an optimiser step's target tokens, on all ranks and accumulation steps, divided by their count.
    Checkpoints hold what `save_pretrained` writes, so trainable weights only, beside the Trainer's optimiser, scheduler,
    random states and step; the step is the data position. A checkpoint is never half written (`training.checkpoints`). Logs
    go to metrics.jsonl in `run`, with a plot at the end. A loss that is not finite stops training and names its episodes.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, dataset: Dataset, collator, run: str | Path):
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=collator,
            compute_loss_func=token_mean,
        )
        self.counts: Counter[str] = Counter()
        self.run, self.unchecked = Path(run), []
        self.add_callback(MetricsFile(self.run, self.counts))
        if args.disable_tqdm:
            self.remove_callback(PrinterCallback)  # prints dictionaries
            self.add_callback(Progress())

    def training_step(self, model, inputs, num_items_in_batch=None):
        batch = inputs["batch"]
        for name in ("tokens", "demonstrations", "dropped_demonstrations", "skipped_queries"):
            self.counts[name] += getattr(batch, name)
        self.counts["targets"] += batch.targets.numel()
        # The Trainer moves tensors in mappings; a value object moves itself.
        inputs = {**inputs, "batch": batch.to(self.args.device, non_blocking=True)}
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Looked at when something is logged or saved: asking now would wait for the device in every step.
        self.unchecked.append((self.state.global_step + 1, batch.episodes, loss))
        return loss

    def log(self, logs, start_time=None) -> None:
        self.refuse_what_is_not_finite()
        super().log(logs, start_time)

    def go_on(self, checkpoint: str | None) -> TrainOutput:
        """Train, from a checkpoint if there is one, and say so; also one of another number of processes."""
        if checkpoint is None:
            return self.train()
        shape, others = read_shape(checkpoint), ""
        if shape["processes"] != self.args.world_size:
            others = f", which {shape['processes']} processes wrote, on {self.args.world_size}"
            if self.is_deepspeed_enabled:
                make_universal(checkpoint, self.args)
                self.args.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
        if self.args.should_save:
            print(f"{self.run}: going on from {checkpoint}{others}", file=sys.stderr)
        return self.train(resume_from_checkpoint=checkpoint)

    def refuse_what_is_not_finite(self) -> None:
        """Stop if a loss since the last look was NaN or infinite: UserError, with the batch's episodes in not_finite.json."""
        unchecked, self.unchecked = self.unchecked, []
        bad = [(step, episodes, loss.item()) for step, episodes, loss in unchecked if not torch.isfinite(loss)]
        if bad:
            step, episodes, loss = bad[0]
            file = self.run / NOT_FINITE
            write_atomically(file, json.dumps({"step": step, "loss": str(loss), "episodes": list(episodes)}) + "\n")
            raise UserError(
                f"{self.run}: the loss of step {step} was {loss}; the numbers of its batch's episodes are in {file}. Lower "
                "training.learning_rate or change the data, then start again: it goes on from the newest checkpoint"
            )

    def _save_checkpoint(self, model, trial) -> None:
        # The Trainer's own, into a place beside: tests/test_faults.py notices if it is no longer called.
        self.refuse_what_is_not_finite()
        try:
            with Staging(self.args, self.state.global_step):
                super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is each of them, by who writes what
            raise UserError(
                f"{self.args.output_dir}: the checkpoint of step {self.state.global_step} cannot be written "
                f"({in_one_line(error)}); make room and start again: it goes on from the newest checkpoint"
            ) from error

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer does; DeepSpeed's engines leave the frozen base out of their checkpoints."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare

        def prepare_and_slim(*args, **kwargs):
            prepared = prepare(*args, **kwargs)
            for part in prepared if isinstance(prepared, tuple) else (prepared,):
                if self.is_deepspeed_enabled and hasattr(part, "save_checkpoint"):
                    part.save_checkpoint = partial(part.save_checkpoint, exclude_frozen_parameters=True)
                    part.load_checkpoint = _loading(part)
            return prepared

        self.accelerator.prepare = prepare_and_slim

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write trainable weights, from the first process only; all have to call it."""
        self.save_trained(output_dir or self.args.output_dir)

    def save_trained(self, folder: str | Path, notes: dict | None = None) -> None:
        """As `save_model`; `notes` go to the model's `save_pretrained`."""
        model = self.accelerator.unwrap_model(self.model)
        with gathered(p for name, p in model.named_parameters() if p.requires_grad or not name.startswith("base.")):
            if self.args.should_save:
                model.save_pretrained(folder, notes)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.accelerator.unwrap_model(model or self.model).load_weights(resume_from_checkpoint)


def _loading(engine):
    """The `load_checkpoint` of a DeepSpeed engine, which takes the trained weights alone, with optimiser states as they were.

    On another number of processes DeepSpeed 0.19 gives all groups of parameters the first one's settings, so that norms and
    biases would decay, and one tensor to count steps, which each of them then counts on.
    """
    load = engine.load_checkpoint

    @wraps(load)
    def load_what_is_there(*args, **kwargs):
        optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        decays = [group.get("weight_decay") for group in optimizer.param_groups]
        loaded = load(*args, **{**kwargs, "load_module_strict": False})
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
        return loaded

    return load_what_is_there


def token_mean(outputs: TokenLoss, labels, num_items_in_batch=None) -> torch.Tensor:
    """Divide a summed loss by the target tokens of the whole optimiser step."""
    return outputs.sum / (outputs.count if num_items_in_batch is None else num_items_in_batch)


class MetricsFile(TrainerCallback):
    """Appends each log as a line of JSON; on resuming, first drops the lines after the step that is resumed from.

    Beside the Trainer's figures stands what this rank has read since the last line, what the limits left out included.
    """

    def __init__(self, run: Path, counts: Counter[str]):
        self.path, self.plot, self.counts = run / METRICS, run / PLOT, counts

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            kept = [line for line in whole_json_lines(self.path) if line["step"] <= state.global_step]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            append(self.path, json.dumps({"step": state.global_step, **logs, **self.counts}) + "\n")
        self.counts.clear()

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            plot_loss(whole_json_lines(self.path), self.plot)


class Progress(TrainerCallback):
    """A line on stderr for each loss that is logged: the step, the loss in nats, and how long the rest takes at this pace."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin, self.first = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            step, last = state.global_step, state.max_steps
            left = (time.perf_counter() - self.begin) / max(1, step - self.first) * (last - step)
            print(f"step {step:,} of {last:,}: loss {logs['loss']:.4f}, {_time(left)} left", file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    """A duration for people: 42 s, 7 min or 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plot_loss(metrics: list[dict], path: str | Path) -> None:
    """The training loss over steps, as a PNG."""
    from matplotlib.figure import Figure

    points = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    if not points:
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), color="#4c78a8")
    axis.set(xlabel="optimiser step", ylabel="loss (nats per target token)", ylim=(0, None), title="training loss")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def training_arguments(settings: dict, *, run: str | Path, seed: int, deepspeed: str | None = None) -> TrainingArguments:
    """`TrainingArguments` from a recipe's `training`, verbatim, over a few defaults of ours; UserError if they refuse.

    `deepspeed`: see `Recipe`. While the arguments live, transformers builds models for ZeRO-3 partitioned.
    """
    defaults = {
        "output_dir": str(Path(run) / CHECKPOINTS),
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,  # `Progress` says more in a log file, and as much on a screen
        "logging_steps": 10,
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Nothing in a step waits for the device. A batch is copied from pinned memory while the step before it runs, and
        # losses that are not finite are found by us, when something is logged: the Trainer's filter asks in every step.
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},
        "logging_nan_inf_filter": False,
        # Episodes are drawn by index: the order of indices is the order of training, and the checkpoint's step its position.
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        # Models go to a CUDA GPU or stay on the CPU; without this, bf16 on a CPU is refused.
        "use_cpu": not torch.cuda.is_available(),
    }
    try:
        if deepspeed:
            defaults["deepspeed"] = str(deepspeed_file(deepspeed))
        arguments = TrainingArguments(**{**defaults, **settings})
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"training: {in_one_line(error)}") from error
    _ = arguments.device  # joins the process group
    if arguments.deepspeed:
        join_deepspeed()
    return arguments
