"""The study's page is what its result files say."""

import json

from test_recipe import ROOT

from docs.hint_lengths import draw_lengths
from docs.make_study import FOLDER, PAGE, TABLES, page


def test_the_page_is_made_of_the_result_files():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.make_study"


def test_every_table_has_a_recipe_and_every_recipe_a_place():
    tables = {p.stem for p in (ROOT / "recipes/study").glob("*.yaml") if "method: table" in p.read_text()}
    assert tables == set(TABLES)
    assert {p.stem for p in FOLDER.glob("*.json")} <= tables


def test_the_picture_of_lengths_is_made_of_its_result_file(tmp_path):
    results = json.loads((FOLDER / "hint-lengths.json").read_text(encoding="utf-8"))
    draw_lengths(results, tmp_path / "lengths.png", results)
    assert (tmp_path / "lengths.png").stat().st_size > 10_000 and (FOLDER / "hint-lengths.png").is_file()
