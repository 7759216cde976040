"""A base is known again: in every dtype, however its numbers are written, and wherever it is named."""

import json
import shutil

import pytest
import torch
from conftest import tiny_base, trained_hypernetwork
from transformers import AutoModelForCausalLM

from hyperllama.base.checks import check_vocabulary
from hyperllama.base.fingerprints import ROUNDED, identify
from hyperllama.base.identity import BaseIdentity
from hyperllama.base.loading import load_base, load_config, load_tokenizer
from hyperllama.data.text import Limits, TextFormat
from hyperllama.errors import UserError
from hyperllama.files import written
from hyperllama.hypernetworks.hub import fetch
from hyperllama.hypernetworks.loading import load_hypernetwork
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.export.peft import to_peft


def saved(folder, dtype=torch.float32):
    """A checkpoint of numbers that need all bits of their dtype."""
    model = tiny_base()
    model.to(dtype).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_one_checkpoint_is_one_base_in_every_dtype(tmp_path, stored):
    """Numbers that are first rounded to float16 round to bf16 in another way, in one of sixteen cases."""
    path = saved(tmp_path / "base", stored)
    found = {dtype: identify(load_base(path, dtype=dtype)) for dtype in ("float32", "bfloat16", "float16")}
    assert len(set(found.values())) == 1
    assert load_base(path, dtype="float16").dtype == torch.float16


def test_a_model_in_float16_that_has_changed_is_another(tmp_path):
    model = load_base(saved(tmp_path / "base"), dtype="float16")
    before = identify(model)
    assert hasattr(model, ROUNDED)
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    assert identify(model).weights != before.weights


def test_numbers_that_are_equal_are_one(tmp_path):
    folder = tmp_path / "base"
    saved(folder)
    config = json.loads((folder / "config.json").read_text())
    found = []
    for theta in (10000, 100000, 100000.0):
        config |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        (folder / "config.json").write_text(json.dumps(config))
        found.append(identify(load_base(str(folder))).config)
    assert found[1] == found[2] != found[0]


def test_a_sample_does_not_see_a_few_weights_and_the_whole_does():
    base = tiny_base()
    weight = base.model.layers[0].mlp.up_proj.weight
    sample, whole = identify(base), identify(base, full=True)
    with torch.no_grad():
        weight.view(-1)[1] += 1  # beside the first of the sampled ones
    assert identify(base) == sample and identify(base, full=True).full != whole.full
    assert sample.is_model(whole) and not whole.is_model(identify(base, full=True))
    assert identify(base, full=True).full == identify(base.to(torch.bfloat16), full=True).full


def test_all_weights_are_compared_where_that_is_asked(tmp_path):
    path = saved(tmp_path / "base")
    hypernetwork = trained_hypernetwork(load_base(path))
    hypernetwork.know_all_of_base()
    hypernetwork.save_pretrained(tmp_path / "run")
    recorded = BaseIdentity(**json.loads((tmp_path / "run" / "hypernetwork.json").read_text())["base"])
    assert len(recorded.full) == 64
    again = trained_hypernetwork(load_base(path, dtype="bfloat16"))
    again.check_base(recorded, "run")
    with torch.no_grad():
        again.base.model.layers[0].mlp.up_proj.weight.view(-1)[1] += 1
    again.identity  # noqa: B018  the sample sees nothing
    with pytest.raises(UserError, match="run was trained for .*, not for "):
        again.check_base(recorded, "run")
    with pytest.raises(UserError, match="its training recorded no fingerprint of all weights"):
        again.check_base(BaseIdentity("b", "w", "c"), "run")


def test_paths_and_names_are_told_apart_when_they_are_written(tmp_path, monkeypatch, saved_base):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved_base, "models/tiny")
    assert written("models/tiny") == "./models/tiny" and written("owner/name") == "owner/name"
    assert written(tmp_path / "x") == str(tmp_path / "x") and written("~/x") == "~/x" and written("./x") == "./x"
    tokenizer = load_tokenizer("models/tiny")
    hypernetwork = trained_hypernetwork(load_base("models/tiny"), tokenizer=tokenizer)
    hypernetwork.save_pretrained("run", {"format": vars(TextFormat()), "limits": vars(Limits())})
    assert json.loads((tmp_path / "run/hypernetwork.json").read_text())["base"]["name"] == "./models/tiny"
    assert "\nbase_model:" not in (tmp_path / "run/README.md").read_text().split("---")[1], "the hub knows its own names only"
    (prefix,) = hypernetwork.compress([[5, 6, 7]])
    to_peft(prefix, "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "./models/tiny"
    assert load_hypernetwork("run")[0].identity == hypernetwork.identity
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"run: its base was ./models/tiny, which is not here; say where it is with --base"):
        load_hypernetwork("../run")
    assert load_hypernetwork("../run", "../models/tiny")[0].identity.weights == prefix.manifest.base.weights


def test_a_mistyped_folder_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert fetch("runs/wrods") == fetch("runs/wrods")  # a path: nothing is downloaded
    with pytest.raises(UserError, match="models/tyni: no such model folder"):
        (tmp_path / "models").mkdir()
        load_config("models/tyni")


def test_a_padding_token_without_an_embedding_is_not_read(saved_base):
    base, tokenizer = load_base(str(saved_base)), load_tokenizer(str(saved_base))
    prompts = [[5, 6, 7, 8], [9]]
    expected = Reader(base, tokenizer).generate(prompts, max_new_tokens=4)
    tokenizer.add_special_tokens({"pad_token": "<a new one>"})
    assert tokenizer.pad_token_id >= base.config.vocab_size
    assert Reader(base, tokenizer).generate(prompts, max_new_tokens=4) == expected


def test_other_tokens_without_an_embedding_are_refused(saved_base):
    base, tokenizer = load_base(str(saved_base)), load_tokenizer(str(saved_base))
    tokenizer.add_tokens(["brandnew"])
    for refused in (check_vocabulary, Reader, lambda b, t: trained_hypernetwork(b, tokenizer=t)):
        with pytest.raises(UserError, match=r"has [0-9,]+ embeddings, none for tokens of its tokenizer such as 'brandnew'"):
            refused(base, tokenizer)


def test_what_transformers_loads_is_what_we_load(tmp_path):
    """The fingerprint of a user's own model, but for one that was rounded to float16 before we could see it."""
    path = saved(tmp_path / "base")
    for dtype in (torch.float32, torch.bfloat16):
        assert identify(AutoModelForCausalLM.from_pretrained(path, dtype=dtype)) == identify(load_base(path))
