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

The texts are not in this folder, and the weights are 5.7 million numbers that turn keys and values of the base into others. The
base is SmolLM2-135M-Instruct (Apache-2.0), which reads and writes English; so does this.
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
    card = (run / CARD).read_text(encoding="utf-8").rstrip() + "\n" + DATA
    if results is not None:
        card += "\n" + evaluation(json.loads(results.read_text(encoding="utf-8")))
    (folder / CARD).write_text(card, encoding="utf-8")


def evaluation(results: dict) -> str:
    """The card's table of what the hypernetwork does on unseen tasks."""
    lines = [
        "## Evaluation\n",
        results["what"] + "\n",
        "|what stands before the query|rows|exact answers, %|95 % interval|",
        "|---|---|---|---|",
    ]
    for row in results["rows"]:
        mean, low, high = (f"{100 * row[key]:.1f}" for key in ("mean", "low", "high"))
        lines.append(f"|{row['label']}|{row['rows']}|{mean}|{low} to {high}|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
