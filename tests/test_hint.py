"""HINT: what an instruction becomes, alone, in a batch and in a file; and that the base without modules is the base."""

import dataclasses
import json

import pytest
import torch
from conftest import ARCHITECTURES, tiny_base
from hypothesis import given
from hypothesis import strategies as st

from hyperllama.base.adapters import Adapters, Stack, adapted
from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.data.packing import Packing, pack_gist
from hyperllama.data.text import EncodedEpisode
from hyperllama.errors import UserError
from hyperllama.hypernetworks.hint.hypernetwork import HintHypernetwork
from hyperllama.hypernetworks.hint.settings import HintSettings
from hyperllama.hypernetworks.loading import load_hypernetwork_onto
from hyperllama.inference.reader import Reader
from hyperllama.inference.scoring import Question
from hyperllama.objectives.mix import Mix
from hyperllama.prefixes.export.peft import to_peft
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix

# Prefix rows, bottleneck, rank of LoRA and fusion: all together, and each alone.
FORMS = {
    "all": (3, 4, 2, True),
    "adapters": (0, 4, 0, False),
    "lora": (0, 0, 3, False),
    "prefix": (3, 0, 0, False),
    "fusion": (0, 0, 0, True),
    "fused": (0, 4, 0, True),
    "layers": (0, 0, 0, "layers"),
    "all with layers": (3, 4, 2, "layers"),
}
CONTEXTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [31], [40, 41, 42, 43]]
EPISODES = [
    EncodedEpisode((5, 6, 7, 8, 9, 10, 11), (((12, 13), (14, 15)), ((16,), (17,)))),
    EncodedEpisode((20, 21, 22), (((23, 24, 25), (26, 27, 28)),)),
]


def made(form="all", base=None, trained=True, regime="frozen", **settings):
    """A hypernetwork for one of `FORMS`; `trained`: with weights that all do something."""
    base = tiny_base() if base is None else base
    torch.manual_seed(1)
    hypernetwork = HintHypernetwork(base, gists=FORMS[form][0], hint=hint_settings(form, regime), **settings)
    with torch.no_grad():
        for name, parameter in hypernetwork.trainable().items():
            if trained and not name.startswith("base."):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return hypernetwork


def hint_settings(form, regime="frozen"):
    _, size, rank, fusion = FORMS[form]
    sizes = {"adapter_size": size, "lora_rank": rank, "mlp_size": 16, "heads": 2, "fusion_rank": 2}
    return HintSettings(**sizes, regime=regime, fusion=bool(fusion), fusion_of="layers" if fusion == "layers" else "final")


def packing(hypernetwork, **more):
    return Packing(hypernetwork.num_gists, whole=hypernetwork.keeps_context, **more)


def tensors(prefix):
    own = prefix.adapters.tensors if prefix.adapters else ()
    return (*prefix.keys, *prefix.values, *own)


def assert_same(one, other):
    for a, b in zip(tensors(one), tensors(other), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def questions(prefixes):
    asked = [((7, 8), ((9, 10), (11,))), ((50,), ((51, 52, 53),)), ((60, 61, 62), ((63,), (64, 65)))]
    return [Question(*asked[i % 3], prefix) for i, prefix in enumerate(prefixes)]


@pytest.mark.parametrize("form", ["adapters", "lora"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_at_step_0_adapters_alone_are_the_base(kind, form):
    base = tiny_base(kind)
    hypernetwork = made(form, base, trained=False)
    prefixes = hypernetwork.compress(CONTEXTS)
    for prefix in prefixes:
        assert prefix.rows == 0 and all(down.any() and not up.any() for down, up in prefix.adapters.pairs.values())
    reader = Reader(base, _Tokenizer())
    assert reader.score(questions(prefixes)) == reader.score(questions([None] * 4))
    prompts = [[5, 6, 7], [8, 9], [3], [50, 51, 52, 53]]
    assert reader.generate(prompts, prefixes, max_new_tokens=6) == reader.generate(prompts, max_new_tokens=6)
    batch = pack_gist(EPISODES, Packing(0))
    alone = [Question(p, (a,)) for e in EPISODES for p, a in e.queries]
    assert hypernetwork(batch).sum.item() == pytest.approx(-sum(s[0] for s in reader.score(alone)), rel=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_at_step_0_fusion_of_layers_is_a_cached_prompt(kind):
    base = tiny_base(kind)
    hypernetwork, reader = made("layers", base, trained=False), Reader(base, _Tokenizer())
    asked = questions(hypernetwork.compress(CONTEXTS))
    whole = [Question((*context, *one.prompt), one.continuations) for context, one in zip(CONTEXTS, asked, strict=True)]
    for behind, read in zip(reader.score(asked), reader.score(whole), strict=True):
        assert behind == pytest.approx(read, abs=1e-4)
    assert reader.score(questions(made("fusion", base, trained=False).compress(CONTEXTS))) != reader.score(asked)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_single_and_batched_instructions_give_the_same_modules(form, kind):
    hypernetwork = made(form, tiny_base(kind))
    batched = hypernetwork.compress(CONTEXTS)
    for context, prefix in zip(CONTEXTS, batched, strict=True):
        (alone,) = hypernetwork.compress([context])
        assert_same(prefix, alone)
    for prefix, other in zip(hypernetwork.compress(CONTEXTS[::-1]), batched[::-1], strict=True):
        assert_same(prefix, other)


def test_padding_has_no_part_in_what_is_generated():
    generator = made().generator
    states = [torch.randn(n, 32) for n in (2, 9)]
    short, _ = (generator([state]) for state in states)
    padded = generator(states)
    assert short.keys() == padded.keys() and {"prefix_keys", "adapter_up", "q_proj_down", "v_proj_up"} < padded.keys()
    for name, own in short.items():
        torch.testing.assert_close(padded[name][:, :1], own, atol=1e-6, rtol=1e-5)
    assert (padded["adapter_down"][:, 0] - padded["adapter_down"][:, 1]).abs().max() > 1e-3, "instructions differ"


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_several_tasks_is_each_task_alone(form):
    base = tiny_base()
    hypernetwork, reader = made(form, base), Reader(base, _Tokenizer())
    small = made("adapters", base).compress(CONTEXTS[:1])  # another bottleneck, and no rows
    prefixes = [*hypernetwork.compress(CONTEXTS), *small, Prefix(*_rows(base, 2)), *hypernetwork.compress(CONTEXTS[1:2])]
    asked = questions(prefixes)
    alone = [reader.score([question])[0] for question in asked]
    for a, b in zip(reader.score(asked), alone, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    prompts = [[5 + i, 6, 7, 8][: 1 + i % 4] for i in range(len(prefixes))]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5}
    one_by_one = [reader.generate([p], [prefix], **settings)[0] for p, prefix in zip(prompts, prefixes, strict=True)]
    assert reader.generate(prompts, prefixes, **settings) == one_by_one
    beams = [reader.generate([p], [prefix], num_beams=3, **settings)[0] for p, prefix in zip(prompts, prefixes, strict=True)]
    assert reader.generate(prompts, prefixes, num_beams=3, **settings) == beams


def test_adapters_are_what_the_formula_says():
    """Beside each MLP, on all rows of a task; the hooks are gone afterwards."""
    base = tiny_base()
    ids, before = torch.tensor([[5, 6, 7]]), base(torch.tensor([[5, 6, 7]])).logits
    down, up = 0.3 * torch.randn(2, 32, 4), 0.3 * torch.randn(2, 4, 32)
    task = Adapters({"adapter": (down, up)})
    with adapted(base, Stack.of([task], base)):
        found = base(ids).logits
    for i, layer in enumerate(base.model.layers):
        own = layer.mlp.forward
        layer.mlp.forward = lambda x, own=own, i=i: own(x) + (x @ down[i]).relu() @ up[i]
    torch.testing.assert_close(found, base(ids).logits)
    for layer in base.model.layers:
        del layer.mlp.forward
    assert torch.equal(base(ids).logits, before) and not torch.allclose(found, before)
    for wrong in ({"adapter": (down, down)}, {"o_proj": (down, up)}, {"adapter": (down, up), "q_proj": (down[:1], up[:1])}, {}):
        with pytest.raises(ValueError, match="adapters need"):
            Adapters(wrong)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_lora_is_added_to_the_weights_and_is_peft_s(kind, tmp_path, saved_base):
    """One task's LoRA is a change of two matrices; stock PEFT reads it as LORA."""
    from peft import PeftModel

    base = tiny_base(kind)
    (prefix,) = made("lora", base).compress([[5, 6, 7]])
    ids = torch.tensor([[5, 6, 7, 8]])
    with adapted(base, Stack.of([prefix.adapters], base)), torch.no_grad():
        found = base(ids).logits
    assert (to_peft(prefix, tmp_path) / "adapter_config.json").is_file()
    assert "LoRA" in (tmp_path / "README.md").read_text()
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(tiny_base(kind), tmp_path)(ids).logits, found)
        assert not torch.allclose(base(ids).logits, found)
        for i, layer in enumerate(base.model.layers):
            for name, (down, up) in prefix.adapters.pairs.items():
                getattr(layer.self_attn, name).weight += (down[i] @ up[i]).T
        torch.testing.assert_close(base(ids).logits, found)
    to_peft(prefix, tmp_path)  # over the one before
    rows = Prefix(*_rows(base, 2))
    with pytest.raises(UserError, match="holds a LORA adapter"):
        to_peft(rows, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_a_module_file_holds_everything(form, tmp_path, saved_base):
    base, tokenizer = load_base(str(saved_base)), load_tokenizer(str(saved_base))
    hypernetwork = made(form, base, tokenizer=tokenizer)
    (prefix,) = hypernetwork.compress([[5, 6, 7]], [Manifest(base=hypernetwork.identity, task="t")])
    path = tmp_path / "t.safetensors"
    prefix.save(path)
    loaded = Prefix.load(path, hypernetwork.identity)
    assert loaded == prefix and loaded.nbytes == sum(t.nbytes for t in tensors(prefix))
    assert loaded.manifest.context_tokens == 3 and loaded.to(dtype=torch.bfloat16).nbytes * 2 == loaded.nbytes
    if prefix.adapters is not None:
        changed = Adapters({kind: (down, up + 1) for kind, (down, up) in prefix.adapters.pairs.items()})
        assert Prefix(prefix.keys, prefix.values, prefix.manifest, changed) != prefix
        assert Prefix(prefix.keys, prefix.values, prefix.manifest) != prefix
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="damaged"):
        Prefix.load(path)


def test_what_reads_keys_and_values_only_refuses_more(tmp_path):
    from hyperllama.tuning.prefix_tuner import PrefixTuner

    hypernetwork = made("all")
    (prefix,) = hypernetwork.compress([[5, 6, 7]])
    for refused in (
        lambda: prefix.to_cache(),
        lambda: prefix.truncate(1),
        lambda: Prefix.concat(prefix, prefix),
        lambda: prefix.save(tmp_path / "p.safetensors", quantize="int8"),
        lambda: PrefixTuner(hypernetwork.base, {"t": prefix}),
    ):
        with pytest.raises(UserError, match="keys and values only, but this task module has adapters"):
            refused()
    with pytest.raises(UserError, match="PEFT has no adapters beside MLPs"):
        to_peft(prefix, tmp_path / "peft")
    assert not list(tmp_path.iterdir())
    (rows,) = made("prefix").compress([[5, 6, 7]])
    assert (to_peft(rows, tmp_path / "peft") / "adapter_config.json").is_file()


def test_fused_rows_come_first_and_the_prefix_stands_where_it_always_stands():
    """What a prefix row is does not depend on where the instruction ends: its key differs by a rotation only."""
    hypernetwork = made("all")
    (prefix,) = hypernetwork.compress([[5, 6, 7]])
    assert prefix.rows == 3 + 3
    hypernetwork.fusion, hypernetwork.hint = None, dataclasses.replace(hypernetwork.hint, fusion=False)
    (alone,) = hypernetwork.compress([[5, 6, 7]])
    assert alone.rows == 3
    for a, b in zip(prefix.values, alone.values):
        torch.testing.assert_close(a[:, 3:], b)


def test_the_teacher_reads_without_modules():
    base = tiny_base()
    hypernetwork = made("all", base, mix=Mix(answer=0.0, distillation=1.0))
    batch = pack_gist(EPISODES, Packing(3, whole=True, teach=True))
    with torch.no_grad():
        taught = hypernetwork.teach(batch)
        assert torch.equal(taught, made("adapters", base, mix=Mix(answer=0.0, distillation=1.0)).teach(batch))
    assert hypernetwork(batch).sum.item() > 0


@pytest.mark.parametrize("form", ["all", "adapters"])
def test_the_paper_regime_trains_the_model_too(form, tmp_path, saved_base):
    base, tokenizer = load_base(str(saved_base)), load_tokenizer(str(saved_base))
    hypernetwork = made(form, base, tokenizer=tokenizer, regime="paper")
    before = hypernetwork.identity
    optimizer = torch.optim.SGD(hypernetwork.trainable().values(), lr=1e-2)
    hypernetwork(pack_gist(EPISODES, packing(hypernetwork))).mean.backward()
    assert all(p.grad is not None for p in base.parameters())
    optimizer.step()
    assert hypernetwork.identity.weights != before.weights
    hypernetwork.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "hypernetwork.json").read_text())["base"]["name"] == str(tmp_path)
    again = load_hypernetwork_onto(tmp_path, load_base(str(tmp_path)), tokenizer=tokenizer)
    assert again.trains_base and again.identity.weights == hypernetwork.identity.weights
    assert_same(again.compress([[5, 6, 7]])[0], hypernetwork.compress([[5, 6, 7]])[0])
    with pytest.raises(UserError, match="distillation: the regime paper changes the model"):
        made(form, base, regime="paper", mix=Mix(distillation=1.0))


def test_what_makes_no_sense_is_refused(tmp_path):
    from hyperllama.data.chunking import Chunking

    for settings, said in (
        ({"hint": HintSettings(adapter_size=0, fusion=False), "gists": 0}, "nothing is generated"),
        ({"hint": HintSettings(heads=0)}, "heads must be at least 1"),
        ({"hint": HintSettings(lora_rank=-1)}, "lora_rank must be at least 0"),
        ({"chunking": Chunking("parallel", 4)}, "choose single"),
        ({"elastic": True}, "one size"),
        ({"gists": -1}, "at least"),
    ):
        with pytest.raises(UserError, match=said):
            HintHypernetwork(tiny_base(), **settings)
    with pytest.raises(UserError, match="was trained for all of its 3 gists only, not for 2"):
        made().compress([[5, 6]], gists=2)
    made("all").save_pretrained(tmp_path)
    larger = HintHypernetwork(tiny_base(), gists=3, hint=HintSettings(adapter_size=5, fusion_rank=2, mlp_size=16, heads=2))
    with pytest.raises(
        UserError, match="is \\(11, 32\\), not \\(8, 32\\); these are weights of another base or other settings"
    ):
        larger.load_weights(tmp_path)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(list(FORMS)))
def test_readers_of_a_batch_are_known(lengths, form):
    """Every row of the read region belongs to the context that it reads, whatever is compressed."""
    rows, _, _, fusion = FORMS[form]
    episodes = [
        EncodedEpisode(tuple([10 + i] * n), (((30 + i,), (40 + i,)), ((50 + i, 60 + i), (70 + i,))))
        for i, n in enumerate(lengths)
    ]
    ids, layout, reading = pack_gist(episodes, Packing(rows, whole=fusion)).halves()
    assert len(layout.segments) == len(lengths) and ids.shape[1] == sum(lengths) + rows * len(lengths)
    own_rows = [start for start in layout.row_starts if ids[0, start]]
    owners = [int(ids[0, start]) - 10 for start in own_rows]  # contexts are sorted by length
    for own, group in zip(owners, reading.reader_rows(), strict=True):
        reads = reading.ids[0, len(reading.layout.gist_rows) :]
        assert sorted(reads[group].tolist()) == [30 + own, 50 + own, 60 + own]


def _rows(base, rows):
    config = base.config
    shape = (config.num_key_value_heads, rows, config.head_dim)
    return [[torch.randn(shape) for _ in range(config.num_hidden_layers)] for _ in range(2)]


class _Tokenizer:
    pad_token_id, eos_token_id = 0, None

    def get_vocab(self):
        return {}
