"""The hub, against a folder that stands in for it."""

from pathlib import Path

import huggingface_hub
import pytest
from conftest import tiny_base, trained_hypernetwork
from test_prefix import random_prefix

from hyperllama.commands import inspect as commands_inspect
from hyperllama.errors import UserError
from hyperllama.hypernetworks import hub as hypernetworks_hub
from hyperllama.hypernetworks.config import read_config
from hyperllama.prefixes.prefix import Prefix


def test_a_hypernetwork_goes_there_and_comes_back(hub_stand_in, tmp_path):
    base = tiny_base()
    base.config.name_or_path = "a-base"
    hypernetwork = trained_hypernetwork(base)
    hypernetwork.save_pretrained(tmp_path / "run", {"data": "some"})
    (tmp_path / "run" / "checkpoints").mkdir()
    assert hypernetworks_hub.push(tmp_path / "run", "me/hyper") == "https://hub/me/hyper"
    assert {path.name for path in (hub_stand_in / "me/hyper").iterdir()} == {
        "README.md",
        "hypernetwork.json",
        "gists.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "base_model: a-base" in (hub_stand_in / "me/hyper/README.md").read_text()
    folder = hypernetworks_hub.fetch("me/hyper")
    assert read_config(folder)["gists"] == 3
    fresh = type(hypernetwork).from_pretrained(folder, tiny_base())
    assert fresh.fingerprint() == hypernetwork.fingerprint()


def test_a_prefix_with_its_card(hub_stand_in, tmp_path):
    prefix = random_prefix()
    prefix.manifest.metrics["loss_prefix"] = 1.5
    prefix.save(tmp_path / "p.safetensors")
    hypernetworks_hub.push(tmp_path / "p.safetensors", "me/prefix")
    assert Prefix.load(hypernetworks_hub.fetch("me/prefix", prefix=True)) == prefix
    card = (hub_stand_in / "me/prefix/README.md").read_text()
    assert all(
        text in card for text in ("base_model: a-base", "| task | a task |", "| loss_prefix | 1.5 |", "generate me/prefix")
    )


def test_what_is_here_is_not_fetched(hub_stand_in, tmp_path):
    assert (
        hypernetworks_hub.fetch(tmp_path) == tmp_path
        and hypernetworks_hub.fetch("./me/hyper") == Path("./me/hyper")
        and hypernetworks_hub.fetch("name") == Path("name")
    )


def test_refusals(hub_stand_in, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="me/none: neither here nor on the hub .404 me/none.; correct the name"):
        hypernetworks_hub.fetch("me/none")
    with pytest.raises(UserError, match="name: not the name of a repository; give owner/name"):
        hypernetworks_hub.push(tmp_path, "name")
    with pytest.raises(UserError, match="not a hypernetwork, it has no"):
        hypernetworks_hub.push(tmp_path, "me/hyper")
    random_prefix(manifest=False).save(tmp_path / "p.safetensors")
    with pytest.raises(UserError, match="without a manifest cannot be shared"):
        hypernetworks_hub.push(tmp_path / "p.safetensors", "me/prefix")

    def refuse(*args, **kwargs):
        raise ConnectionError("401\nlog in")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    random_prefix().save(tmp_path / "p.safetensors")
    with pytest.raises(UserError, match="me/prefix: the hub refused .401 log in."):
        hypernetworks_hub.push(tmp_path / "p.safetensors", "me/prefix")


def test_verbs_take_repositories(hub_stand_in, tmp_path):
    random_prefix().save(tmp_path / "p.safetensors")
    hypernetworks_hub.push(tmp_path / "p.safetensors", "me/prefix")
    assert commands_inspect.inspect("me/prefix")["task"] == "a task"
