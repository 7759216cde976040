"""The pictures of README: reading graphs, and what runs of the quickstart and the tuning study left in runs/.

python docs/make_pictures.py
"""

import json
import shutil
from pathlib import Path

from attention_masks import GistLayout, Segment, picture
from eval.quickstart import draw_results

ASSETS = Path(__file__).parent / "assets"
GRAPHS = {
    "few-shot compression:\nqueries read one context's gists": GistLayout(
        [Segment(8, gists=2), Segment(4, reads=(0,)), Segment(3, reads=(0,))]
    ),
    "recurrent chunks": GistLayout([Segment(5, gists=2), Segment(5, gists=2, reads=(0,)), Segment(5, reads=(0, 1))]),
    "parallel examples": GistLayout([Segment(5, gists=2), Segment(5, gists=2), Segment(5, reads=(0, 1))]),
}
DRAWN = {
    "runs/quickstart/evaluation/quality.png": "evaluation.png",
    "runs/quickstart/evaluation/cost.png": "cost.png",
    "runs/tuning/study/starts.png": "starts.png",
}

if __name__ == "__main__":
    ASSETS.mkdir(exist_ok=True)
    picture(GRAPHS, ASSETS / "masks.png")
    results = Path("runs/quickstart/results.json")
    if results.is_file():
        draw_results(json.loads(results.read_text()), ASSETS / "quickstart.png")
    for source, name in DRAWN.items():
        if Path(source).is_file():
            shutil.copy(source, ASSETS / name)
