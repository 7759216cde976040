"""The study's page: docs/study.md, from result files in docs/study and the words beside them. No figure is typed by hand.

python -m docs.make_study      takes over what runs/study holds, and writes the page
"""

from __future__ import annotations

import json
import shutil
from math import fsum
from pathlib import Path

from docs.hint_lengths import draw_lengths
from eval.tables import RESULTS, markdown

HERE = Path(__file__).parent
FOLDER, PAGE = HERE / "study", HERE / "study.md"
# The order of the page: what a reader asks first.
TABLES = (
    "text-kinds",
    "text-gists",
    "text-objectives",
    "text-recurrent",
    "hard-gists",
    "hard-elastic",
    "hard-objectives",
    "hard-kinds",
    "hard-seeds",
    "hard-shots",
    "hard-graphs",
    "hint-lengths",
    "hint-lengths-without-fusion",
    "hint-ablations",
    "hint-demonstrations",
    "hint-sni",
    "hint-symbols",
)


def page() -> str:
    """The page as it should be, from the files in docs/study: NAME.json are results, NAME.md what they say."""
    parts = [(FOLDER / "intro.md").read_text(encoding="utf-8").rstrip()]
    trained: set[float] = set()  # minutes of each run; a run that tables share is there once
    for name in TABLES:
        file, words = FOLDER / f"{name}.json", FOLDER / f"{name}.md"
        if not file.is_file():
            continue
        results = json.loads(file.read_text(encoding="utf-8"))
        parts += [f"## {results['question']}", f"`hyperllama study recipes/study/{name}.yaml`"]
        if words.is_file():
            parts.append(words.read_text(encoding="utf-8").rstrip())
        if (FOLDER / f"{name}.png").is_file():
            parts.append(f"![{results['question']}](study/{name}.png)")
        parts.append(markdown(results).rstrip())
        trained |= {cell["minutes"] for cell in results["cells"]}
    hours = f"Training for these tables took {fsum(trained) / 60:.1f} hours, on a core a run"
    parts += ["## What all of it took", f"{hours}; runs that tables share are counted once, bases and evaluations are not."]
    return "\n\n".join(parts) + "\n"


def take_over(runs: Path) -> None:
    """Copy the results of finished tables from a folder of runs."""
    for name in TABLES:
        if (runs / name / RESULTS).is_file():
            shutil.copy(runs / name / RESULTS, FOLDER / f"{name}.json")


if __name__ == "__main__":
    take_over(Path("runs/study"))
    lengths, flat = (FOLDER / f"hint-lengths{end}.json" for end in ("", "-without-fusion"))
    if lengths.is_file():
        found = [json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None for file in (lengths, flat)]
        draw_lengths(found[0], lengths.with_suffix(".png"), found[1])
    PAGE.write_text(page(), encoding="utf-8")
