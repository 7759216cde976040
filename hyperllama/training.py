"""Training on transformers' Trainer: what is ours is the loss in tokens, what a checkpoint holds, and the log."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hyperllama.distributed import gathered
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import whole_json_lines, write_atomically
from hyperllama.objectives import TokenLoss
from hyperllama.recipe_checks import deepspeed_file

CHECKPOINTS, METRICS, PLOT = "checkpoints", "metrics.jsonl", "loss.png"


class GistTrainer(Trainer):
    """Trains a module whose `forward(batch)` returns a `TokenLoss` and which has `save_pretrained` and `load_weights`.

    The loss is the sum over an optimiser step's target tokens, on all ranks and accumulation steps, divided by their count.
    Checkpoints hold what `save_pretrained` writes, so trainable weights only, beside the Trainer's optimiser, scheduler,
    random states and step; the step is the data position. Logs go to metrics.jsonl in `run`, and a plot at the end.
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
        self.add_callback(MetricsFile(Path(run), self.counts))

    def training_step(self, model, inputs, num_items_in_batch=None):
        batch = inputs["batch"]
        for name in ("tokens", "demonstrations", "dropped_demonstrations", "skipped_queries"):
            self.counts[name] += getattr(batch, name)
        self.counts["targets"] += batch.targets.numel()
        # The Trainer moves tensors in mappings; a value object moves itself.
        inputs = {**inputs, "batch": batch.to(self.args.device, non_blocking=True)}
        return super().training_step(model, inputs, num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write trainable weights, from the first process only; all have to call it."""
        model = self.accelerator.unwrap_model(self.model)
        with gathered(p for name, p in model.named_parameters() if p.requires_grad or not name.startswith("base.")):
            if self.args.should_save:
                model.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.accelerator.unwrap_model(model or self.model).load_weights(resume_from_checkpoint)


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
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs, **self.counts}) + "\n")
        self.counts.clear()

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            plot_loss(whole_json_lines(self.path), self.plot)


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


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end; the Trainer's state is the last file that it writes."""
    whole = []
    for path in Path(folder).glob("checkpoint-*"):
        try:
            whole.append((json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"], str(path)))
        except (OSError, ValueError, KeyError):
            continue
    return max(whole)[1] if whole else None


def training_arguments(settings: dict, *, run: str | Path, seed: int, deepspeed: str | None = None) -> TrainingArguments:
    """`TrainingArguments` from a recipe's `training`, verbatim, over a few defaults of ours; UserError if they refuse.

    `deepspeed`: see `Recipe`. While the arguments live, transformers builds models for ZeRO-3 partitioned.
    """
    defaults = {
        "output_dir": str(Path(run) / CHECKPOINTS),
        "seed": seed,
        "report_to": "none",
        "logging_steps": 10,
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Episodes are drawn by index: the order of indices is the order of training, and the checkpoint's step its position.
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }
    try:
        if deepspeed:
            defaults["deepspeed"] = str(deepspeed_file(deepspeed))
        return TrainingArguments(**{**defaults, **settings})
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"training: {in_one_line(error)}") from error
