"""Tiny random models of four architectures, with grouped-query heads, in float32 on the CPU."""

import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import set_seed

from hyperllama.base.loading import random_base
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.hypernetworks.gist_lora import GistHypernetwork

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
VOCABULARY = 97


def tiny_architecture(kind: str, **changes) -> dict:
    settings = {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # large enough that attention is far from uniform
        "sliding_window": None,
    }
    return {**settings, **changes}


def tiny_base(kind: str = "llama", seed: int = 0, **changes):
    set_seed(seed)
    return random_base(
        tiny_architecture(kind, **changes), vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )


def trained_hypernetwork(base, gists: int = 3, seed: int = 1, **settings) -> GistHypernetwork:
    """A hypernetwork whose LoRA does something: B is random, not zero."""
    set_seed(seed)
    hypernetwork = GistHypernetwork(base, gists=gists, rank=4, alpha=8.0, **settings)
    with torch.no_grad():
        for matrix in hypernetwork.lora.B.values():
            matrix.weight.normal_(std=0.1)
    return hypernetwork


@pytest.fixture(params=ARCHITECTURES)
def base(request):
    return tiny_base(request.param)


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory) -> Path:
    """A folder with a tiny Llama and a byte-level tokenizer, as a user would give it."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["a few words to learn from, and their answers"], kind="bytes", vocab_size=300)
    set_seed(0)
    model = random_base(tiny_architecture("llama"), vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub_stand_in(tmp_path, monkeypatch):
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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M, where it has been fetched."""
    folder = Path(os.environ.get("HYPERLLAMA_MODELS", "models")) / "smollm2-135m"
    if not (folder / "config.json").is_file():
        pytest.skip(f"no model at {folder}: run hyperllama fetch smollm2, or set HYPERLLAMA_MODELS to the folder above it")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real data sets, where they are at hand."""
    folder = Path(os.environ.get("HYPERLLAMA_DATA", "../shared/data"))
    if not (folder / "sni").is_dir():
        pytest.skip(f"no data at {folder}: set HYPERLLAMA_DATA to a folder with sni/")
    return folder
