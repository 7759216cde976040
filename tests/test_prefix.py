"""The prefix and its file: whole, of the right base, or refused in one sentence."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import tiny_base, trained_hypernetwork
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_masks import GistLayout, Segment
from hyperllama.base.fingerprints import identify
from hyperllama.base.identity import BaseIdentity
from hyperllama.data.text import TextFormat
from hyperllama.errors import UserError
from hyperllama.hypernetworks.registry import KINDS
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix

IDENTITY = BaseIdentity(name="a-base", weights="1" * 64, config="2" * 64, tokenizer="3" * 64)


def random_prefix(gists=3, layers=2, heads=2, dim=8, dtype=torch.float32, seed=0, manifest=True):
    generator = torch.Generator().manual_seed(seed)

    def side():
        return [torch.randn(heads, gists, dim, generator=generator).to(dtype) for _ in range(layers)]

    return Prefix(side(), side(), Manifest(base=IDENTITY, task="a task", examples=4) if manifest else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("manifest", [True, False])
def test_round_trip(tmp_path, dtype, manifest):
    prefix = random_prefix(dtype=dtype, manifest=manifest)
    prefix.save(tmp_path / "deep" / "p.safetensors")
    loaded = Prefix.load(tmp_path / "deep" / "p.safetensors")
    assert loaded == prefix and loaded.dtype == dtype and loaded.manifest == prefix.manifest
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["p.safetensors"], "no temporary file stays"


def test_equality_and_repr():
    assert random_prefix() == random_prefix() != random_prefix(seed=1)
    assert random_prefix() != random_prefix(manifest=False) and random_prefix() != random_prefix(dtype=torch.float16)
    assert repr(random_prefix()) == "Prefix(rows=3, layers=2, kv_heads=2, head_dim=8, task='a task', base='a-base')"
    assert len(repr(random_prefix(manifest=False))) < 80 and random_prefix().nbytes == 2 * 2 * 2 * 3 * 8 * 4


@pytest.mark.parametrize(
    "keys, values, message",
    [
        ([], [], "one pair a layer, not 0 and 0"),
        ([torch.zeros(2, 3, 8)], [], "not 1 and 0"),
        ([torch.zeros(2, 3, 8)], [torch.zeros(2, 4, 8)], r"one shape .*\(2, 3, 8\).*\(2, 4, 8\)"),
        ([torch.zeros(3, 8)], [torch.zeros(3, 8)], r"one shape \(kv_heads, rows, head_dim\)"),
    ],
)
def test_shapes_are_checked(keys, values, message):
    with pytest.raises(ValueError, match=message):
        Prefix(keys, values)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path, place, bit):
    path = tmp_path / "p.safetensors"
    random_prefix().save(path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        loaded = Prefix.load(path)
    except UserError as error:
        assert str(path) in str(error)
    else:  # a blank of the header's padding, or white space in its JSON
        assert loaded == random_prefix()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_noticed(tmp_path, share):
    path = tmp_path / "p.safetensors"
    random_prefix().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="not a whole prefix file"):
        Prefix.load(path)


def test_other_files_are_refused(tmp_path):
    import safetensors.torch

    with pytest.raises(UserError, match="no such prefix file; make one with hyperllama compress"):
        Prefix.load(tmp_path / "missing.safetensors")
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="a safetensors file, but not a prefix"):
        Prefix.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("version, why", [(1, "older than this HyperLlama reads; compress"), (99, "newer")])
def test_another_format_is_refused(tmp_path, version, why):
    prefix = random_prefix()
    prefix.manifest = Manifest(base=IDENTITY, format_version=version)
    prefix.save(tmp_path / "p.safetensors")
    with pytest.raises(UserError, match=f"p.safetensors: format version {version} is {why}"):
        Prefix.load(tmp_path / "p.safetensors")


def test_another_base_is_refused_in_one_sentence_that_names_both(tmp_path):
    base, other = tiny_base(), tiny_base(seed=5)
    (prefix,) = trained_hypernetwork(base).compress([[3, 4, 5]])
    prefix.save(tmp_path / "p.safetensors")
    assert Prefix.load(tmp_path / "p.safetensors", identify(base)) == prefix
    with pytest.raises(UserError) as caught:
        Prefix.load(tmp_path / "p.safetensors", identify(other, name="another-base"))
    message = str(caught.value)
    assert "was made for LlamaForCausalLM" in message and "not for another-base" in message and "\n" not in message


def test_another_tokenizer_is_refused():
    prefix = random_prefix()
    prefix.check(IDENTITY)
    with pytest.raises(UserError, match="made with another tokenizer than that of b; use the tokenizer of a-base"):
        prefix.check(BaseIdentity("b", IDENTITY.weights, IDENTITY.config, "4" * 64))


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    """The kernel refuses to let the file grow, as a full disk would."""
    path = tmp_path / "p.safetensors"
    small = random_prefix()
    small.save(path)
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import resource, signal
from test_prefix import random_prefix
prefix = random_prefix(gists=4000)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    prefix.save({str(path)!r})
except OSError as error:
    sys.exit(0 if error.errno == 27 else f"wrong error: {{error}}")
sys.exit("the file was written")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Prefix.load(path) == small
    assert [f.name for f in tmp_path.iterdir()] == ["p.safetensors"]


def test_stack_pads_on_the_left():
    a, b = random_prefix(gists=2), random_prefix(gists=4, seed=1)
    cache, mask = Prefix.stack([a, b])
    assert mask.tolist() == [[False, False, True, True], [True, True, True, True]]
    keys, values, *_ = next(iter(cache))
    assert torch.equal(keys[0, :, 2:], a.keys[0]) and torch.equal(values[1], b.values[0]) and not keys[0, :, :2].any()
    with pytest.raises(ValueError, match="only prefixes of one base model stack"):
        Prefix.stack([a, random_prefix(layers=3)])


def test_a_cache_is_fresh_each_time():
    prefix = random_prefix()
    cache = prefix.to_cache()
    cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    assert prefix.to_cache().get_seq_length() == 3 and prefix == random_prefix()


def test_the_manifest_says_where_a_prefix_comes_from(tmp_path):
    base = tiny_base()
    hypernetwork = trained_hypernetwork(base)
    (prefix,) = hypernetwork.compress([[3, 4, 5]], [Manifest(base=hypernetwork.identity, task="t", examples=1)])
    prefix.save(tmp_path / "p.safetensors")
    manifest = Prefix.load(tmp_path / "p.safetensors").manifest
    assert (manifest.task, manifest.examples, manifest.context_tokens) == ("t", 1, 3)
    assert manifest.base == identify(base) and manifest.hypernetwork_sha256 == hypernetwork.fingerprint()
    assert manifest.rotary["rope_type"] == "default" and len(manifest.context_sha256) == 64 and manifest.created
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert "unknown" not in json.loads(Manifest(base=IDENTITY).to_json())


def test_unknown_fields_of_a_manifest_are_left_out():
    values = json.loads(Manifest(base=IDENTITY).to_json())
    assert Manifest.from_json(json.dumps({**values, "later": 1})) == Manifest(base=IDENTITY)


class TestAlgebra:
    def made(self, base, gists=3):
        hypernetwork = trained_hypernetwork(base, gists=gists)
        contexts = [tuple(range(3, 20)), tuple(range(50, 57))]
        return hypernetwork, contexts, hypernetwork.compress(contexts)

    def test_concat_is_what_a_reader_of_both_reads(self, base):
        """Parallel examples as a reading graph, encoded at once, are the two prefixes one after the other."""
        hypernetwork, contexts, (first, second) = self.made(base)
        layout = GistLayout([Segment(len(c) + 3, gists=3) for c in contexts])
        ids = torch.tensor([[token for context in contexts for token in (*context, 0, 0, 0)]])
        (both,) = hypernetwork.encode(ids, layout, [(0, 1)])
        joined = Prefix.concat(first, second)
        assert joined.rows == 6
        for a, b in zip((*joined.keys, *joined.values), (*both.keys, *both.values), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        manifest = joined.manifest
        assert manifest.context_tokens == 24 and manifest.context_sha256 not in (
            first.manifest.context_sha256,
            second.manifest.context_sha256,
        )

    def test_concat_survives_files_and_is_associative(self, base, tmp_path):
        _, _, (a, b) = self.made(base)
        for name, prefix in (("a", a), ("b", b)):
            prefix.save(tmp_path / name)
        a, b = (Prefix.load(tmp_path / name) for name in "ab")
        left, right = Prefix.concat(Prefix.concat(a, b), a), Prefix.concat(a, Prefix.concat(b, a))
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(left.keys, right.keys, strict=True))

    def test_what_cannot_be_joined_is_refused(self):
        _, _, (a, _) = self.made(tiny_base())
        _, _, (other, _) = self.made(tiny_base(seed=1))
        with pytest.raises(UserError, match="was made for .* not for"):
            Prefix.concat(a, other)
        with pytest.raises(UserError, match="without its base's rotary frequencies"):
            Prefix.concat(a, random_prefix())

    def test_truncate(self):
        prefix = random_prefix(gists=4)
        prefix.manifest = replace(prefix.manifest, elastic=True, metrics={"loss_prefix": 1.0})
        assert prefix.truncate(2).rows == 2 and torch.equal(prefix.truncate(2).keys[0], prefix.keys[0][:, :2])
        assert prefix.truncate(4) == prefix and prefix.truncate(2).manifest.metrics == {}
        for wrong in (0, 5):
            with pytest.raises(UserError, match="can be cut to 1 .. 4 of them"):
                prefix.truncate(wrong)
        prefix.manifest = replace(prefix.manifest, sink=1)
        assert prefix.truncate(2).rows == 3
        with pytest.raises(UserError, match="a prefix of 3 gists can be cut to 1 .. 3"):
            prefix.truncate(4)

    @pytest.mark.parametrize("kind, elastic, cut", [("lora", True, True), ("lora", False, False), ("pooling", True, False)])
    def test_only_what_was_trained_to_be_cut_is_cut(self, kind, elastic, cut):
        made = KINDS[kind].hypernetwork()(tiny_base(), gists=4, elastic=elastic)
        (prefix,) = made.compress([[5, 6, 7, 8, 9, 10]])
        assert prefix.truncate(4) is prefix
        if cut:
            assert prefix.truncate(1).rows == 1
        else:
            with pytest.raises(UserError, match="were not trained to do without the others"):
                prefix.truncate(1)
        if not elastic:
            with pytest.raises(UserError, match="was trained for all of its 4 gists only, not for 2"):
                made.compress([[5, 6, 7, 8]], gists=2)
        joined = Prefix.concat(prefix, prefix)
        with pytest.raises(UserError, match="were not trained"):
            joined.truncate(2)

    def test_text_formats_that_differ_are_not_joined(self):
        first, second = (random_prefix(), random_prefix())
        for prefix, separator, tokens in ((first, "\n\n", 16), (second, "\n", 32)):
            text_format = asdict(TextFormat(separator=separator, answer_tokens=tokens))
            prefix.manifest = replace(prefix.manifest, text_format=text_format, rotary={"inv_freq": [1.0]})
        with pytest.raises(UserError, match=r"format.separator is '\\n\\n' for .* and '\\n' for"):
            Prefix.concat(first, second)
        second.manifest = replace(second.manifest, text_format={**second.manifest.text_format, "separator": "\n\n"})
        assert Prefix.concat(first, second).manifest.text_format["answer_tokens"] == 32
        first.check_format(TextFormat(answer_tokens=3))
        with pytest.raises(UserError, match="was made for queries with format.query='Input"):
            first.check_format(TextFormat(query="Q: {input}"))

    def test_what_no_model_can_read_is_not_written(self, tmp_path):
        prefix = random_prefix(gists=4)
        prefix.manifest = replace(prefix.manifest, positions=4)
        with pytest.raises(UserError, match="of 4 rows leaves none of the 4 positions of its base for a query"):
            prefix.save(tmp_path / "p.safetensors")
        prefix.manifest = replace(prefix.manifest, positions=7, rotary={"inv_freq": [1.0]})
        with pytest.raises(UserError, match="of 8 rows leaves none of the 7 positions"):
            Prefix.concat(prefix, prefix)
        prefix.values[1][0, 0, 0] = math.nan
        with pytest.raises(UserError, match="numbers that are not finite"):
            prefix.save(tmp_path / "p.safetensors")
        assert not list(tmp_path.iterdir())

    def test_eight_bits_forget_what_was_measured_in_more(self, tmp_path):
        prefix = random_prefix()
        prefix.manifest = replace(prefix.manifest, metrics={"loss_prefix": 1.0})
        prefix.save(tmp_path / "p.safetensors", quantize="int8")
        assert set(Prefix.load(tmp_path / "p.safetensors").manifest.metrics) == {"int8_error_keys", "int8_error_values"}

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(gists=st.integers(1, 9), seed=st.integers(0, 99), spread=st.sampled_from([1e-3, 1.0, 1e3]))
    def test_eight_bits_lose_what_they_say(self, tmp_path, gists, seed, spread):
        prefix = random_prefix(gists=gists, seed=seed)
        prefix = Prefix([k * spread for k in prefix.keys], [v * spread for v in prefix.values], prefix.manifest)
        lost = prefix.save(tmp_path / "p", quantize="int8")
        loaded = Prefix.load(tmp_path / "p")
        for side in ("keys", "values"):
            a, b = (torch.stack(getattr(p, side)) for p in (prefix, loaded))
            assert ((a - b).pow(2).mean() / a.pow(2).mean()).sqrt().item() == pytest.approx(lost[side], rel=1e-3)
            assert lost[side] < 0.01 and loaded.dtype == torch.float32

    def test_eight_bits_are_smaller_and_on_record(self, base, tmp_path):
        _, _, (prefix, _) = self.made(base, gists=64)
        prefix.save(tmp_path / "whole")
        lost = prefix.save(tmp_path / "small", quantize="int8")
        sizes = [(tmp_path / name).stat().st_size for name in ("whole", "small")]
        assert sizes[1] < 0.5 * sizes[0]
        assert Prefix.load(tmp_path / "small").manifest.metrics == {f"int8_error_{side}": lost[side] for side in lost}
        assert prefix.manifest.metrics == {}, "the prefix itself is as it was"
