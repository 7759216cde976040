"""A base in 4 bits: trained on, compressed with and read, and known again."""

import importlib.util

import pytest
import torch
from conftest import tiny_architecture
from data_files import WORDS, lines, write
from transformers import set_seed

from hyperllama.base.copies import train_all
from hyperllama.base.fingerprints import identify
from hyperllama.base.loading import load_base, load_tokenizer, random_base
from hyperllama.commands import compress as commands_compress
from hyperllama.commands import generate as commands_generate
from hyperllama.commands import train as commands_train
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError
from hyperllama.hypernetworks import loading as hypernetworks_loading
from hyperllama.hypernetworks.full_copy import FullHypernetwork
from hyperllama.prefixes.prefix import Prefix


@pytest.fixture
def base_folder(tmp_path):
    """As `saved_base`, in sizes that blocks of 64 weights divide."""
    tokenizer = train_tokenizer(["a few words to learn from, and their answers"], kind="bytes", vocab_size=300)
    set_seed(0)
    architecture = tiny_architecture("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    model = random_base(architecture, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_from_a_recipe_to_an_answer(base_folder, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    rows = [{"input": w, "output": w.upper()} for w in WORDS.split()[:12]]
    examples = write(tmp_path / "data" / "upper.jsonl", lines(rows))
    recipe = write(
        tmp_path / "train.yaml",
        f"""
output: {tmp_path}/run
model: {{name_or_path: {base_folder}, quantize: nf4}}
gist: {{tokens: 2, kind: lora}}
lora: {{rank: 2}}
data: {{source: jsonl, root: {tmp_path}/data, shots: 3, queries: 2}}
limits: {{context_tokens: 120, query_tokens: 30}}
training: {{use_cpu: true, disable_tqdm: true, max_steps: 3, per_device_train_batch_size: 2, learning_rate: 1.0e-2}}
""",
    )
    commands_train.train(recipe)
    hypernetwork, _ = hypernetworks_loading.load_hypernetwork(tmp_path / "run")
    linear = hypernetwork.base.get_decoder().layers[0].mlp.up_proj
    assert isinstance(linear, bitsandbytes.nn.Linear4bit) and linear.weight.dtype == torch.uint8
    ((path, prefix),) = commands_compress.compress(tmp_path / "run", [examples], tmp_path / "p.safetensors")
    assert prefix.manifest.base.quantize == "nf4"
    assert len(commands_generate.generate(path, ["one", "two"], max_new_tokens=3)) == 2
    identity = identify(hypernetwork.base, load_tokenizer(str(base_folder)))
    hypernetwork.base(torch.tensor([[5, 6, 7]]))
    assert identify(hypernetwork.base, load_tokenizer(str(base_folder))) == identity, "reading changes no fingerprint"
    whole = identify(load_base(str(base_folder)), load_tokenizer(str(base_folder)))
    with pytest.raises(UserError, match="made for"):
        Prefix.load(path, whole)


def test_without_bitsandbytes(base_folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest))
    with pytest.raises(UserError, match="needs bitsandbytes"):
        load_base(str(base_folder), quantize="nf4")


REFUSED = [["gist.kind=gisting"], ["gist.kind=hint", "hint.regime=paper"], ["method=full_attention"]]


@pytest.mark.parametrize("changes", REFUSED)
def test_weights_in_4_bits_are_not_trained(base_folder, tmp_path, changes):
    """Refused by the recipe, before a base loads, and by the classes themselves."""
    pytest.importorskip("bitsandbytes")
    recipe = write(
        tmp_path / "train.yaml",
        f"output: {tmp_path}/run\nmodel: {{name_or_path: {base_folder}, quantize: nf4}}\n"
        f"data: {{source: jsonl, root: {base_folder}}}\n",
    )
    with pytest.raises(UserError, match="model.quantize: all weights of the base are trained, which 4 bits cannot be"):
        commands_train.train(recipe, changes)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="model.quantize: .* which 4 bits cannot be"):
        train_all(load_base(str(base_folder), quantize="nf4"), "gisting")


def test_a_full_copy_has_whole_weights_with_the_numbers_of_4_bits(base_folder):
    """Also of a base that has read before, whose weights bitsandbytes may have packed anew."""
    pytest.importorskip("bitsandbytes")
    base, ids = load_base(str(base_folder), quantize="nf4"), torch.tensor([[5, 6, 7, 8]])
    before = FullHypernetwork(base, gists=2)
    linears = [m for m in before.compressor.get_decoder().layers.modules() if isinstance(m, torch.nn.Linear)]
    assert linears and all(type(m) is torch.nn.Linear and m.weight.dtype == torch.float32 for m in linears)
    assert sum(p.requires_grad for p in before.compressor.parameters()) > 10
    with torch.no_grad():
        read = base.train()(ids).logits
        torch.testing.assert_close(before.compressor(ids).logits, read, atol=1e-5, rtol=1e-5)
        base.eval()(ids)
    again = FullHypernetwork(base, gists=2)
    for own, first in zip(again.compressor.parameters(), before.compressor.parameters(), strict=True):
        torch.testing.assert_close(own, first, atol=1e-4, rtol=0.01)  # packing quantises the scales of blocks anew
