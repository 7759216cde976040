"""The hub, against a folder that stands in for it."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from conftest import tiny_base, trained_hypernetwork
from test_prefix import random_prefix

from hyperllama import hub, workflows
from hyperllama.compressor import read_config
from hyperllama.errors import UserError
from hyperllama.prefix import Prefix


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder a repository; what huggingface_hub does with the network happens there."""
    remote = tmp_path / "remote"

    def create_repo(self, repository, *, private, exist_ok):
        (remote / repository).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{repository}"

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        shutil.copytree(folder_path, remote / repo_id, dirs_exist_ok=True)

    def snapshot_download(repository, *, allow_patterns):
        if not (remote / repository).is_dir():
            raise FileNotFoundError(f"404 {repository}")
        return str(remote / repository)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda name, file: str(Path(snapshot_download(name, allow_patterns=[])) / file)
    )
    return remote


def test_a_hypernetwork_goes_there_and_comes_back(stand_in, tmp_path):
    base = tiny_base()
    base.config.name_or_path = "a-base"
    hypernetwork = trained_hypernetwork(base)
    hypernetwork.save_pretrained(tmp_path / "run", {"data": "some"})
    (tmp_path / "run" / "checkpoints").mkdir()
    assert hub.push(tmp_path / "run", "me/hyper") == "https://hub/me/hyper"
    assert {path.name for path in (stand_in / "me/hyper").iterdir()} == {
        "README.md",
        "hypernetwork.json",
        "gists.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "base_model: a-base" in (stand_in / "me/hyper/README.md").read_text()
    folder = hub.fetch("me/hyper")
    assert read_config(folder)["gists"] == 3
    fresh = type(hypernetwork).from_pretrained(folder, tiny_base())
    assert fresh.fingerprint() == hypernetwork.fingerprint()


def test_a_prefix_with_its_card(stand_in, tmp_path):
    prefix = random_prefix()
    prefix.manifest.metrics["loss_prefix"] = 1.5
    prefix.save(tmp_path / "p.safetensors")
    hub.push(tmp_path / "p.safetensors", "me/prefix")
    assert Prefix.load(hub.fetch("me/prefix", prefix=True)) == prefix
    card = (stand_in / "me/prefix/README.md").read_text()
    assert all(
        text in card for text in ("base_model: a-base", "| task | a task |", "| loss_prefix | 1.5 |", "generate me/prefix")
    )


def test_what_is_here_is_not_fetched(stand_in, tmp_path):
    assert (
        hub.fetch(tmp_path) == tmp_path and hub.fetch("./me/hyper") == Path("./me/hyper") and hub.fetch("name") == Path("name")
    )


def test_refusals(stand_in, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="me/none: neither here nor on the hub .404 me/none.; correct the name"):
        hub.fetch("me/none")
    with pytest.raises(UserError, match="name: not the name of a repository; give owner/name"):
        hub.push(tmp_path, "name")
    with pytest.raises(UserError, match="not a hypernetwork, it has no"):
        hub.push(tmp_path, "me/hyper")
    random_prefix(manifest=False).save(tmp_path / "p.safetensors")
    with pytest.raises(UserError, match="without a manifest cannot be shared"):
        hub.push(tmp_path / "p.safetensors", "me/prefix")

    def refuse(*args, **kwargs):
        raise ConnectionError("401\nlog in")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    random_prefix().save(tmp_path / "p.safetensors")
    with pytest.raises(UserError, match="me/prefix: the hub refused .401 log in."):
        hub.push(tmp_path / "p.safetensors", "me/prefix")


def test_verbs_take_repositories(stand_in, tmp_path):
    random_prefix().save(tmp_path / "p.safetensors")
    hub.push(tmp_path / "p.safetensors", "me/prefix")
    assert workflows.inspect("me/prefix")["task"] == "a task"
