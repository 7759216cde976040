"""The pictures of README: reading graphs, and the quickstart's result from runs/quickstart/results.json.

python docs/make_pictures.py
"""

import json
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

if __name__ == "__main__":
    ASSETS.mkdir(exist_ok=True)
    picture(GRAPHS, ASSETS / "masks.png")
    results = Path("runs/quickstart/results.json")
    if results.is_file():
        draw_results(json.loads(results.read_text()), ASSETS / "quickstart.png")
