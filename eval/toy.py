"""The whole way in three minutes on a CPU: train a base, train a hypernetwork, compress unseen tasks, read the prefixes.

    python -m eval.toy          (or: make toy)

Leaves in runs/toy: base/ and hypernetwork/ (the two runs), example.jsonl and example.safetensors (one unseen task and
its prefix), results.json and results.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from hyperllama.noise import quiet

if __name__ == "__main__":
    quiet()  # before any library is imported

from eval.report import draw_quality
from eval.run import evaluate
from hyperllama.commands import compress as commands_compress
from hyperllama.commands import generate as commands_generate
from hyperllama.commands import train as commands_train
from hyperllama.data.episode import Episode
from hyperllama.data.synthetic import SyntheticSource
from hyperllama.files import write_atomically
from hyperllama.recipe.loading import load_recipe
from hyperllama.recipe.schema import EvaluationRecipe

METHODS = ("no_context", "swapped_prefix", "prefix", "full_context")
RECIPES = Path(__file__).parent.parent / "recipes" / "toy"


def main() -> None:
    """Run the three steps, or what is left of them, and report."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tasks", type=int, default=250, help="unseen tasks to evaluate, with 4 queries each")
    options.add_argument("--recipes", type=Path, default=RECIPES, help="folder with base.yaml and hypernetwork.yaml")
    arguments = options.parse_args()
    start = time.perf_counter()

    print("1/3  A tiny Llama learns to learn in context: full attention over demonstrations.", flush=True)
    commands_train.train(arguments.recipes / "base.yaml")
    print("\n2/3  It is frozen. A hypernetwork learns to compress demonstrations into a prefix.", flush=True)
    commands_train.train(arguments.recipes / "hypernetwork.yaml")

    print("\n3/3  Unseen tasks: the frozen model reads prefixes instead of demonstrations.\n", flush=True)
    recipe = load_recipe(arguments.recipes / "evaluate.yaml", schema=EvaluationRecipe)
    run, folder, language = Path(recipe.hypernetwork), Path(recipe.output).parent, SyntheticSource(recipe.data.synthetic)
    (example,) = language.evaluation(shots=recipe.data.shots, queries=6, episodes=1, seed=-1)
    show_one(run, folder, example)
    names = f"methods=[{','.join(METHODS)}]"
    summary = evaluate(arguments.recipes / "evaluate.yaml", [names, f"episodes={arguments.tasks}"])
    seconds = time.perf_counter() - start
    write_atomically(folder / "results.json", json.dumps({**summary, "seconds": seconds}, indent=2) + "\n")
    draw_results(summary, folder / "results.png")
    print(f"{summary['queries']:,} new words in {arguments.tasks} unseen tasks, share answered with the right symbol:\n")
    for method in (summary["methods"][name] for name in METHODS):
        print(f"  {method['label']:40} {100 * method['metrics']['accuracy']['mean']:5.1f} %")
    print(f"\n{seconds:.0f} s in all; figures in {folder / 'results.json'}, picture in {folder / 'results.png'}")
    print("All methods and what they cost:  hyperllama evaluate recipes/toy/evaluate.yaml")


def draw_results(summary: dict, path: str | Path) -> None:
    """The picture of a summary of the toy language."""
    made = f"{summary['shots']} demonstrations as {summary['budget']} rows"
    draw_quality(summary, path, f"{made}: {summary['queries']:,} new words in {summary['episodes']} unseen tasks")


def show_one(run: Path, folder: Path, episode: Episode) -> None:
    """Compress one unseen task into a file with the same code as the command line, and answer new words from that file."""
    lines = [json.dumps({"input": e.input, "output": e.output}) for e in episode.demonstrations]
    write_atomically(folder / "example.jsonl", "\n".join(lines) + "\n")
    path, prefix = commands_compress.compress(run, [folder / "example.jsonl"], folder / "example.safetensors")[0]
    print(f"{path}: {prefix.manifest.examples} demonstrations in {prefix.rows} rows, {path.stat().st_size:,} bytes")
    for example in episode.demonstrations[:4]:
        print(f"  shown   {example.input:8} -> {example.output}")
    print("  ...")
    words = [query.input for query in episode.queries]
    for query, answer in zip(episode.queries, commands_generate.generate(path, words)):
        print(f"  new     {query.input:8} -> {answer:6} {'right' if query.accepts(answer) else f'wrong, {query.output}'}")
    command = os.path.join(os.path.relpath(Path(sys.executable).parent), "hyperllama")
    print(f"\nThe same by hand:\n  {command} inspect {path}\n  {command} generate {path} --input {words[0]}\n", flush=True)


if __name__ == "__main__":
    main()
