"""The page of the papers' claims is what its results make, and its verdicts follow from intervals."""

import pytest

from docs.make_results import PAGE, SETS, page, verdicts
from eval.systems import BASE, Results


def test_the_page_is_made_of_the_kept_results():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.make_results"
    assert SETS["sni"] in page()


def query(task: int, i: int, **scores) -> dict:
    about = {"evaluation": "", "seed": 0, "place": [task, i], "task": f"t{task}", "category": "c", "input": f"{task} {i}"}
    return {**about, "scores": {name: {"rouge_l": value} for name, value in scores.items()}, "answers": {}}


def results(prefix, swapped, multi_task, tasks=12) -> Results:
    """Each system's scores by task: none 0, full 0.5 but for a little that differs."""
    queries = []
    for task in range(tasks):
        wobble = 0.02 * (task % 3 - 1)
        scores = {f"{BASE}/no_context": 0.0, f"{BASE}/full_context": 0.5 + wobble, "ours/prefix": prefix + wobble}
        scores |= {"ours/swapped_prefix": swapped, "multi/multi_task": multi_task - wobble}
        queries.append(query(task, 0, **scores))
    systems = [name for name in queries[0]["scores"]]
    head = {"metrics": {"": {"kind": "text", "metric": "auto"}}, "costs": {"": {name: {} for name in systems}}}
    return Results(head, "", queries)


@pytest.mark.parametrize(
    ("scores", "compress", "own", "below"),
    [
        ((0.5, 0.0, 0.6), "holds", "holds", "full attention: alike within noise, multi: below"),
        ((0.3, 0.1, 0.3), "does not", "in part", "full attention: below, multi: alike within noise"),
        ((0.6, 0.7, 0.2), "holds", "does not", "full attention: above, multi: above"),
        ((0.4, 0.0, 0.6), "the interval reaches", "holds", "full attention: below, multi: below"),
    ],
)
def test_verdicts(scores, compress, own, below):
    found = {claim: told for claim, (told, _) in verdicts(results(*scores)).items()}
    assert compress in found["compress"] and (found["own"], found["below"]) == (own, below)


def test_there_is_no_verdict_where_the_base_gains_nothing_from_contexts():
    none = results(0.5, 0.0, 0.6)
    for i, asked in enumerate(none.queries):
        asked["scores"][f"{BASE}/no_context"] = {"rouge_l": 0.3 if i % 2 else 0.7}
    found = verdicts(none)
    assert {told for told, _ in found.values()} == {"cannot be told on this base"} and len(found) == 3
    assert all("over all 12 tasks the whole context gains" in figure for _, figure in found.values())
