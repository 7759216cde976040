"""The whole way in three minutes on a CPU: a pretrained model learns tasks that it was never trained on, from a small file.

    python -m eval.quickstart          (or: make quickstart)

Leaves in runs/quickstart: hypernetwork/ (the run), evaluation/ (every answer, report.md), results.json and results.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import psutil

from hyperllama.noise import quiet

if __name__ == "__main__":
    quiet()  # before any library is imported

from eval.report import draw_quality
from eval.run import evaluate, result_lines
from hyperllama.base.fetching import fetch_model
from hyperllama.commands.train import train
from hyperllama.files import write_atomically
from hyperllama.recipe.loading import load_recipe
from hyperllama.recipe.schema import EvaluationRecipe

RECIPES = Path(__file__).parent.parent / "recipes" / "quickstart"
SHOWN_TASKS = 4  # of which an answer is printed


def main() -> None:
    """Run the steps, or what is left of them, and report."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipes", type=Path, default=RECIPES, help="folder with hypernetwork.yaml and evaluate.yaml")
    recipes = options.parse_args().recipes
    fetch_model("smollm2")

    print("1/2  SmolLM2-135M stays as it is. A hypernetwork learns to turn examples into a prefix.", flush=True)
    train(recipes / "hypernetwork.yaml")
    recipe = load_recipe(recipes / "evaluate.yaml", schema=EvaluationRecipe)
    folder = Path(recipe.output).parent
    print("\n2/2  Sixteen examples of each of some unseen tasks become a prefix, which is then refined.\n", flush=True)
    summary = evaluate(recipes / "evaluate.yaml")
    figures = {name: method["metrics"]["exact_match"]["mean"] for name, method in summary["methods"].items()}
    draw_quality(summary, folder / "results.png", title(summary))
    show_answers(Path(recipe.output))
    seconds = time.time() - psutil.Process().create_time()  # imports count
    results = {**figures, "seconds": seconds, "evaluation": summary}
    write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
    tell(summary, figures)
    command = os.path.join(os.path.relpath(Path(sys.executable).parent), "hyperllama")
    print(f"\n{seconds:.0f} s in all; figures in {folder / 'results.json'}, picture in {folder / 'results.png'}\nBy hand:")
    plural = "recipes/words/test/plural.jsonl --shots 16 --refine 8 --output plural.safetensors"
    print(f"  {command} compress {recipe.hypernetwork} {plural}")
    print(f"  {command} generate plural.safetensors --input wolf --input story")


def title(summary: dict) -> str:
    """What a picture of the results says above it."""
    made = f"{summary['shots']} examples as {summary['budget']} rows"
    return f"{made}: {summary['queries']:,} new inputs of {summary['tasks']} unseen tasks, exact answers"


def tell(summary: dict, figures: dict[str, float]) -> None:
    """Print a table: what stands before the query, how often the answer is exactly right, and its bytes."""
    print(f"\n{summary['queries']:,} new inputs of {summary['tasks']} unseen tasks; exactly right, and bytes a task:\n")
    for name, method in summary["methods"].items():
        print(f"  {method['label']:42} {100 * figures[name]:5.1f} % {method['state_bytes']:12,.0f}")


def show_answers(evaluation: Path) -> None:
    """Print an input of some tasks, with what is answered without context and behind the refined prefix."""
    lines = result_lines(evaluation)
    found = {(line["method"], line["task"], line["query"]): line for line in lines}
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    for task in tasks[:: max(1, len(tasks) // SHOWN_TASKS)][:SHOWN_TASKS]:
        alone, refined = (found[name, task, 0] for name in ("no_context", "refined_prefix"))
        wrong = "" if refined["metrics"]["exact_match"] else f", wrong: {refined['references'][0]}"
        print(f"  {task:12} {refined['input']:12} -> {refined['answer']}{wrong} (without examples: {alone['answer'][:30]!r})")


if __name__ == "__main__":
    main()
