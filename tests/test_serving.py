"""The benchmark of serving, at a size that takes seconds: every way answers, states have the bytes that they should."""

import argparse
import json

import pytest

from benchmarks import serving

TINY = {"context": 48, "gists": 3, "rows": 3, "query": 5, "new": 3, "layers": 2, "hidden": 64, "rounds": 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_answers_and_is_measured(dtype, tmp_path, capsys):
    options = [word for name, size in TINY.items() for word in (f"--{name}", str(size))]
    serving.main([*options, "--dtype", dtype, "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    ways = ["prefix", "cached prompt", "whole prompt", "floor", "cached prompt + head", "floor + head"]
    assert list(figures["seconds"]) == ways and all(len(times) == 1 for times in figures["seconds"].values())
    states, values = figures["state_bytes_a_task"], 2 * 2 * 1 * 64  # layers, keys and values, heads, dimensions of a head
    assert states["prefix"] == states["floor"] == 3 * values * (4 if dtype == "float32" else 2)
    assert states["cached prompt"] == 48 / 3 * states["prefix"]
    assert figures["state_bytes_a_batch"]["prefix"] == 3 * states["prefix"]
    assert "compress takes" in capsys.readouterr().out


def test_a_way_that_answers_otherwise_is_not_timed():
    sizes = argparse.Namespace(**TINY)
    one = serving.Serving(serving.serving_hypernetwork(sizes), list(range(5, 53)), [[7, 8, 9], [4, 5, 6]], 3)
    serving.check(one)
    one.alone = lambda row: [0]
    with pytest.raises(RuntimeError, match="row 0 of a batch"):
        serving.check(one)
    one.caches["cached prompt"] = one.prefill(list(range(60, 108)))
    with pytest.raises(RuntimeError, match="says something else"):
        serving.check(one)
