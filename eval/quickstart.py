"""The whole way in three minutes on a CPU: train a base, train a hypernetwork, compress unseen tasks, read the prefixes.

    python -m eval.quickstart          (or: make quickstart)

Leaves in runs/quickstart: base/ and hypernetwork/ (the two runs), example.jsonl and example.safetensors (one unseen task and
its prefix), results.json and results.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from random import Random

from eval.conditions import CONDITIONS, accuracy, answer_all
from eval.report import LABELS, bars
from hyperllama import workflows
from hyperllama.data.episode import Episode
from hyperllama.data.synthetic import SyntheticLanguage, SyntheticSource
from hyperllama.files import write_atomically
from hyperllama.recipe import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes" / "quickstart"


def unseen_tasks(language: SyntheticLanguage, count: int, shots: int, queries: int) -> list[Episode]:
    """Tasks of the test split: their sets of categories never occur in training."""
    source = SyntheticSource(SyntheticLanguage(**{**vars(language), "split": "test"}))
    return [source.task(Random(f"quickstart test {i}"), shots, queries) for i in range(count)]


def main() -> None:
    """Run the three steps, or what is left of them, and report."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tasks", type=int, default=250, help="unseen tasks to evaluate, with 4 queries each")
    options.add_argument("--recipes", type=Path, default=RECIPES, help="folder with base.yaml and hypernetwork.yaml")
    arguments = options.parse_args()
    start = time.perf_counter()

    print("1/3  A tiny Llama learns to learn in context: full attention over demonstrations.", flush=True)
    workflows.train(arguments.recipes / "base.yaml")
    print("\n2/3  It is frozen. Gist tokens and LoRA learn to compress demonstrations into a prefix.", flush=True)
    workflows.train(arguments.recipes / "hypernetwork.yaml")

    print("\n3/3  Unseen tasks: the frozen model reads prefixes instead of demonstrations.\n", flush=True)
    recipe = load_recipe(arguments.recipes / "hypernetwork.yaml")
    run, folder = Path(recipe.output), Path(recipe.output).parent
    show_one(run, folder, unseen_tasks(recipe.data.synthetic, 1, recipe.data.shots, 6)[0])
    episodes = unseen_tasks(recipe.data.synthetic, arguments.tasks, recipe.data.shots, 4)
    hypernetwork, encoder = workflows.load_hypernetwork(run)
    answers = answer_all(hypernetwork, encoder, episodes, batch_size=250)
    results = {name: accuracy(episodes, answers[name]) for name in CONDITIONS}
    seconds = time.perf_counter() - start
    queries = sum(len(episode.queries) for episode in episodes)
    figures = {
        **results,
        "seconds": seconds,
        "tasks": len(episodes),
        "queries": queries,
        "shots": recipe.data.shots,
        "gists": recipe.gist.tokens,
        "symbols": recipe.data.synthetic.symbols,
        "versions": workflows.versions(),
    }
    write_atomically(folder / "results.json", json.dumps(figures, indent=2) + "\n")
    draw_results(figures, folder / "results.png")
    print(f"{queries:,} new words in {len(episodes)} unseen tasks, share answered with the right symbol:\n")
    for name in CONDITIONS:
        print(f"  {' '.join(LABELS[name].split()):40} {100 * results[name]:5.1f} %")
    print(f"\n{seconds:.0f} s in all; figures in {folder / 'results.json'}, picture in {folder / 'results.png'}")


def draw_results(figures: dict, path: str | Path) -> None:
    """The picture of a results.json."""
    made = f"{figures['shots']} demonstrations as {figures['gists']} gists"
    title = f"{made}: {figures['queries']:,} new words in {figures['tasks']} unseen tasks"
    bars({name: figures[name] for name in CONDITIONS}, path, title=title, chance=1 / figures["symbols"])


def show_one(run: Path, folder: Path, episode: Episode) -> None:
    """Compress one unseen task into a file with the same code as the command line, and answer new words from that file."""
    lines = [json.dumps({"input": e.input, "output": e.output}) for e in episode.demonstrations]
    write_atomically(folder / "example.jsonl", "\n".join(lines) + "\n")
    path, prefix = workflows.compress(run, [folder / "example.jsonl"], folder / "example.safetensors")[0]
    print(f"{path}: {prefix.manifest.examples} demonstrations in {prefix.gists} gists, {path.stat().st_size:,} bytes")
    for example in episode.demonstrations[:4]:
        print(f"  shown   {example.input:8} -> {example.output}")
    print("  ...")
    words = [query.input for query in episode.queries]
    for query, answer in zip(episode.queries, workflows.generate(path, words)):
        print(f"  new     {query.input:8} -> {answer:6} {'right' if query.accepts(answer) else f'wrong, {query.output}'}")
    command = os.path.join(os.path.relpath(Path(sys.executable).parent), "hyperllama")
    print(f"\nThe same by hand:\n  {command} inspect {path}\n  {command} generate {path} --input {words[0]}\n", flush=True)


if __name__ == "__main__":
    main()
