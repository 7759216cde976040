"""Benchmarks at sizes that take seconds: what they compare is the same, and they count right."""

import json

import pytest
import torch
from conftest import tiny_base, trained_hypernetwork
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bases, compress, growth, stock_step, training_step
from benchmarks.parts import PARTS, by_part
from eval.flops import ModelCost
from hyperllama.base.loading import random_config
from hyperllama.data.packing import pack_gist
from hyperllama.errors import UserError
from hyperllama.prefixes.capture import encode_whole


@pytest.fixture
def episodes():
    return training_step.ragged_episodes(contexts=(5, 9), vocabulary=97)


class TestTrainingStep:
    def test_every_way_is_measured(self, tmp_path, capsys, monkeypatch):
        """Ways that compute the same thing have the same loss, or `check` would have raised."""
        monkeypatch.setattr(training_step, "refuse_lack_of_memory", lambda: None)  # it would outlive this test
        monkeypatch.setattr(bases, "OWN", {**bases.OWN, "hidden_size": 64, "intermediate_size": 96})
        monkeypatch.setattr(bases, "VOCABULARY", 500)
        path = tmp_path / "figures.json"
        sizes = ["--layers", "2", "--contexts", "12", "20", "--rounds", "1"]
        training_step.main([*sizes, "--json", str(path)])
        figures = json.loads(path.read_text())
        assert list(figures["seconds"]) == ["packed", *training_step.PEERS, *stock_step.STOCK]
        assert figures["packed_rows"] > figures["tokens"] == pytest.approx(12 + 20 + 8 * 50, rel=0.3)
        parts = figures["parts"]
        assert set(parts) == set(PARTS) and all(part["seconds"] > 0 for part in parts.values())
        assert sum(part["flops"] for part in parts.values()) == figures["flops"]
        assert parts["head and loss"]["flops"] == 4 * 64 * 64 * 500  # 64 targets, forward and back to the hidden states
        assert "left to win" in capsys.readouterr().out

    def test_flops_by_part_are_those_that_torch_counts(self, episodes):
        hypernetwork = trained_hypernetwork(tiny_base())

        def step():
            hypernetwork(pack_gist(episodes, 3)).sum.backward()

        spent = by_part(step, 97, rounds=2)
        with FlopCounterMode(display=False) as counter:  # it has no formula for attention on a CPU
            step()
        products = spent["linear products"].flops + spent["head and loss"].flops
        assert products == counter.get_total_flops() > 0 and spent["attention"].flops > 0
        cost = ModelCost.of(hypernetwork.base.config)
        batch = pack_gist(episodes, 3)
        total = cost.train(batch.layout, len(batch.targets), rank=4).total
        assert products + spent["attention"].flops == pytest.approx(total, rel=0.02)

    def test_other_losses_are_not_timed(self):
        training_step.check({"packed": 1.0, "two_pass": 1.00001, "peft packed": 2.0, "peft an episode": 3.0})
        with pytest.raises(RuntimeError, match="should compute the same loss do not: .*two_pass"):
            training_step.check({"packed": 1.0, "two_pass": 1.001})

    def test_what_does_not_fit_is_named(self, capsys):
        def run(way):
            if way == "small":
                return 1
            raise RuntimeError(way)

        ways = {"small": "small", "large": "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"}
        assert training_step.fitting(ways, run) == {"small": 1} == {name: 1 for name in ways}
        assert "large: left out" in capsys.readouterr().out
        with pytest.raises(RuntimeError, match="a mistake"):
            training_step.fitting({"wrong": "a mistake"}, run)

    def test_models_and_ways_that_there_are_not(self):
        with pytest.raises(UserError, match="no way two_pass of kind pooling; choose from packed, peft packed, "):
            training_step.names_of("pooling", ["two_pass"])
        with pytest.raises(UserError, match="the model has 2 layers, so 1 to 2 can be taken, not 3"):
            bases.first_layers(tiny_base(), 3)
        one = bases.first_layers(tiny_base(), 1)
        assert one(torch.tensor([[3, 4]])).logits.shape == (1, 2, 97) and len(one.model.layers) == 1

    def test_a_published_shape(self):
        sizes, vocabulary = bases.architecture_of("qwen3-0.6b", 2)
        config = random_config(sizes, vocab_size=vocabulary)
        sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        assert (*sizes, config.intermediate_size, config.vocab_size) == (1024, 16, 8, 128, 3072, 151_936)
        assert config.tie_word_embeddings and config.num_hidden_layers == 2

    def test_stock_rows_see_nothing_of_each_other_and_packed_prefixes_would(self, episodes):
        """Why prefix tuning is padded: a row behind another one in a packed row has another loss there."""
        ways = stock_step.stock_ways(tiny_base, episodes, rank=2, rows=3)
        found = {name: training_step.loss_of(way) for name, way in ways.items()}
        assert found["peft packed"] == pytest.approx(found["peft one by one"], rel=1e-5)
        assert found["peft packed"] == pytest.approx(found["peft packed, targets"], rel=1e-5)
        assert abs(found["peft an episode"] / found["peft packed"] - 1) > 1e-4
        model, rows = ways["peft prefix tuning"].model, stock_step.rows_of(episodes)
        pack = stock_step.DataCollatorWithFlattening(return_tensors="pt")
        together = stock_step.loss_of(model, pack(rows))
        alone = [stock_step.loss_of(model, stock_step.padded([row])) for row in rows]
        mean = sum(loss.sum.item() for loss in alone) / sum(int(loss.count) for loss in alone)
        assert found["peft prefix tuning"] == pytest.approx(mean, rel=1e-5)
        assert abs(together.mean.item() / mean - 1) > 1e-3


class TestGrowth:
    def test_every_size_is_measured_and_slopes_are_named(self, tmp_path, capsys):
        path = tmp_path / "figures.json"
        sizes = ["--contexts", "20", "40", "--rows", "2", "4", "--tasks", "1", "3", "--rounds", "1"]
        growth.main([*sizes, "--json", str(path)])
        figures = json.loads(path.read_text())
        assert [list(found) for found in figures["contexts"].values()] == [["20", "40"]] * 3
        assert all(value > 0 for found in figures["rows"].values() for value in found.values())
        files = figures["rows"]["read: bytes of the file"]
        assert files["4"] - files["2"] == pytest.approx(2 * 2 * 2 * 2 * 64 * 4, abs=64)  # rows, layers, sides, heads, D, bytes
        assert {"store: check, seconds", "store: open and list, seconds"} <= set(figures["tasks"])
        assert set(figures["exponents"]) == {name for part in ("contexts", "rows", "tasks") for name in figures[part]}
        assert "worse than linear: " in capsys.readouterr().out

    def test_the_slope_of_the_upper_half(self):
        squares = {size: float(size**2) for size in (4, 8, 16, 32)}
        assert growth.exponent({1: 1e9, 2: 1e9, **squares}) == pytest.approx(2)
        assert growth.exponent({8: 3.0}) == 0


class TestCompressing:
    def test_ways_make_the_same_prefixes_and_stand_beside_a_prefill(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(compress, "LENGTHS", {"short": (20, 40)})
        monkeypatch.setattr(compress, "PASSES", {"one at a time": 1, "passes of 99": 99})
        path = tmp_path / "figures.json"
        compress.main(["--tasks", "4", "--rounds", "1", "--json", str(path)])
        figures = json.loads(path.read_text())["short"]
        assert figures["largest_difference"] < 1e-4 and figures["tokens"] > 4 * 20
        for what in ("store", "compress"):
            assert list(figures[what]["seconds"]) == [*compress.PASSES, "prefill"]
            assert figures[what]["shares_of_prefill"]["prefill"] == 1
        assert figures["parts"]["passes"]["linear products"] > 0 and "of prefill" in capsys.readouterr().out

    def test_a_prefill_leaves_what_the_base_has_of_a_context(self, tmp_path):
        """The stock model has the hypernetwork's base: its cache is what a prefix of every token holds."""
        ways, context = compress.Compressing(compress.small_base, tmp_path), [3, 4, 5, 6]
        with torch.no_grad():
            cache = ways.stock(torch.tensor([context]), use_cache=True, logits_to_keep=1).past_key_values
        (whole,) = encode_whole(ways.hypernetwork.base, [context])
        for (keys, values, *_), own_keys, own_values in zip(cache, whole.keys, whole.values, strict=True):
            torch.testing.assert_close(keys[0], own_keys)
            torch.testing.assert_close(values[0], own_values)
