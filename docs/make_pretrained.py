"""A hypernetwork that ships: what is needed of a run, its weights in bf16, and a card with its data and its evaluation.

python -m docs.make_pretrained runs/pretrained/smollm2-135m pretrained/smollm2-135m [benchmarks/results/pretrained.json]
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hyperllama.hypernetworks.config import CARD, CONFIG, read_config

COPIED = (CONFIG, "recipe.yaml", "result.json", "versions.json", "metrics.jsonl", "loss.png", "adapter_config.json")
DATA = """
## Data

- 68 word tasks, written for this project, and eight labelled sets of short sentences and words whose labels are replaced by
  arbitrary symbols in every episode: `recipes/words` (Apache-2.0). Tasks of other families were kept for evaluation.
- Training tasks of Super-NaturalInstructions (Wang et al. 2022, arXiv 2204.07705) by the official split, with contexts of at
  most 512 tokens and queries of at most 128. Nothing of its test tasks.
- Eleven labelled sets for symbol tuning (Wei et al. 2023, arXiv 2305.08298); names in `recipe.yaml`.

The texts are not in this folder, and the weights only turn keys and values of the base into others. The base is
SmolLM2-135M-Instruct (Apache-2.0), which reads and writes English, and makes things up where it does not know; so does this.
"""
USE = """
From HyperLlama's own folder or an installation of it, by name:

```
hyperllama fetch smollm2
hyperllama compress smollm2 examples.jsonl --gists 16 --refine 20 --output task.safetensors
```
"""
EVALUATION = """
## Evaluation

{tasks} word tasks of families that training has not seen (`recipes/words/test`) and that the base can learn from examples: with
all of them in its prompt it answers a tenth more than without, or better. {draws} draws of examples, {queries} answers a row,
exact but for case and punctuation. 95 % intervals by bootstrap over tasks. The gain is full attention's over no context.

"""


def main(run: Path, folder: Path, results: Path | None = None) -> None:
    """Make the folder anew."""
    config = read_config(run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COPIED:
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    for name in config["files"]:
        if name.endswith(".safetensors"):
            tensors = {key: x.to(torch.bfloat16).contiguous() for key, x in load_file(run / name).items()}
            save_file(tensors, folder / name, {"format": "pt"})
            shutil.copymode(folder / CONFIG, folder / name)  # safetensors gives its files to their owner alone
    card = (run / CARD).read_text(encoding="utf-8").rstrip() + "\n" + USE + DATA
    if results is not None:
        card += evaluation(json.loads(results.read_text(encoding="utf-8")))
    (folder / CARD).write_text(card, encoding="utf-8")


def evaluation(results: dict) -> str:
    """The card's part on unseen tasks, of the figures that benchmarks.pretrained writes."""
    found, draws = results["evaluations"], results["seeds"]
    first = found["16 rows"]
    facts = {"tasks": len(first["tasks"]), "draws": len(draws), "queries": 16 * len(draws) * len(first["tasks"])}
    return EVALUATION.format(**facts) + table(found)


def table(evaluations: dict) -> str:
    """A row for each method of each evaluation."""
    lines = ["|evaluation|what stands before the query|exact answers, %|share of the gain, %|", "|---|---|---|---|"]
    for name, found in evaluations.items():
        for method in found["by_task"]:
            row = found[method]
            share = "" if row["share"] is None or method in ("no_context", "full_context") else _percent(row["share"])
            lines.append(f"|{name}|{row['label']}|{_percent(row)}|{share}|")
    return "\n".join(lines) + "\n"


def _percent(interval: dict) -> str:
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
