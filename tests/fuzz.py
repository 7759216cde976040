"""Files that are damaged, or made to do harm: each is read right or refused in one sentence, in little memory.

`python tests/fuzz.py 10000` makes as many and counts what became of them; tests/test_fuzz.py runs some of them.
"""

import copy
import json
import math
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random

import safetensors.torch

os.environ["HF_HUB_OFFLINE"] = "1"  # an adapter may name any base

import torch
from conftest import tiny_base, trained_hypernetwork
from safetensors import safe_open

from hyperllama.base.fingerprints import identify
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError
from hyperllama.hypernetworks.loading import load_hypernetwork_onto
from hyperllama.hypernetworks.registry import KINDS
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.export.peft import from_peft, to_peft
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix, _checksum
from hyperllama.prefixes.store import PrefixStore

ODD = [
    None,
    -1,
    0,
    1,
    2**31,
    10**30,
    1.5,
    math.nan,
    math.inf,
    True,
    "",
    "x",
    "../../etc/passwd",
    "x" * 5000,
    [],
    [[]],
    {},
    {"a": 1},
]
ODD += [[1, 2], [-1, 3], "\ud800", "{input", "{input}{output}", -(2**63), [10**12, 0, 0, 0], 1e308]
DTYPES = ("I64", "F64", "BOOL", "U8", "F16", "BF16", "F32", "F8_E4M3", "C64", "nonsense", 7)


def header_of(content: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and its tensors' bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def packed(header, data: bytes) -> bytes:
    """A safetensors file of a header and bytes, whatever they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def changed(value, rng: Random):
    """A JSON value with something else in one place, or without it, or with more."""
    value = copy.deepcopy(value)
    path = rng.choice(list(places(value)))
    if not path:
        return rng.choice(ODD)
    place = value
    for key in path[:-1]:
        place = place[key]
    if rng.random() < 0.2:
        del place[path[-1]]
    elif isinstance(place, dict) and rng.random() < 0.1:
        place[rng.choice(["more", "keys_scale", "adapter_down", "base", ""])] = rng.choice(ODD)
    else:
        place[path[-1]] = rng.choice(ODD)
    return value


def bytes_changed(content: bytes, rng: Random) -> bytes:
    """A file cut short, with flipped bits, or of something else."""
    way = rng.randrange(6)
    if way == 0:
        return content[: rng.randrange(len(content))]
    if way == 1:
        found = bytearray(content)
        for _ in range(rng.randint(1, 9)):
            place = rng.randrange(len(found))
            found[place] ^= 1 << rng.randrange(8)
        return bytes(found)
    if way == 2:
        return content + rng.randbytes(rng.randint(1, 99))
    if way == 3:
        return rng.randbytes(rng.randrange(300))
    if way == 4:
        size = rng.choice([0, 1, 2**24, 2**24 + 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1, len(content)])
        return struct.pack("<Q", size) + content[8:]
    return bytes(len(content))


def tensors_changed(content: bytes, rng: Random, signed: bool) -> bytes:
    """A safetensors file with another header or other numbers; `signed`: with a checksum that fits, where there can be one."""
    header, data = header_of(content)
    way = rng.randrange(8)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    if way == 0:
        header[name]["shape"] = rng.choice([[-1], [0], [2**40, 2**40], [], [10**12, 0, 0, 0], [1] * 40, *ODD])
    elif way == 1:
        header[name]["dtype"] = rng.choice(DTYPES)
    elif way == 2:
        header[name]["data_offsets"] = rng.choice([[0, 2**60], [-1, 4], [9, 3], [0, 0], *ODD])
    elif way == 3:
        header[rng.choice(["more", *names])] = header.pop(name)
    elif way == 4:
        header = changed(header, rng)
    elif way == 5:
        padding = rng.choice([b" " * 2**21, b" " * (2**24 + 1), b"[" * 100_000, b'{"a":' * 50_000])
        return packed(json.dumps(header).encode() + padding, data)
    elif way == 6:
        return packed({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)} | header, data)
    else:
        return other_numbers(content, rng, signed)
    return packed(header, data)


def other_numbers(content: bytes, rng: Random, signed: bool) -> bytes:
    """A whole file of tensors of other shapes, dtypes or values."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        with safe_open(file.name, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    name = rng.choice(sorted(tensors))
    x = tensors[name]
    others = [
        lambda: x.double(),
        lambda: x.to(torch.int64),
        lambda: x.to(torch.bool),
        lambda: x.to(torch.float16),
        lambda: x[:0],
        lambda: x.flatten(),
        lambda: x[..., :0],
        lambda: x[:1],
        lambda: x.new_zeros(3, 0, 10**9, 0) if x.ndim == 4 else x.new_zeros(0, 10**9),
        lambda: torch.full_like(x.float(), math.nan),
        lambda: torch.full_like(x.float(), math.inf),
        lambda: torch.full_like(x.float(), 1e38),
        lambda: x.expand(7, *x.shape).contiguous(),
    ]
    tensors[name] = rng.choice(others)().contiguous()
    if rng.random() < 0.2:
        tensors[rng.choice(["more", "keys_scale", "values_scale", "adapter_down", "adapter_up"])] = torch.randn(2, 1, 1, 3)
    if signed and "hyperllama" in metadata:
        metadata["sha256"] = _checksum(metadata["hyperllama"], tensors)
    return safetensors.torch.save(tensors, metadata)


def manifest_changed(content: bytes, rng: Random) -> bytes:
    """A prefix whose manifest says something else, with a checksum that fits."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        with safe_open(file.name, framework="pt") as opened:
            metadata = dict(opened.metadata())
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    manifest = json.dumps(changed(json.loads(metadata["hyperllama"]), rng))
    manifest = rng.choice([manifest, manifest, manifest, manifest[:-3], "[" * 100_000, "null", "7"])
    return safetensors.torch.save(tensors, {"hyperllama": manifest, "sha256": _checksum(manifest, tensors)})


def any_change(content: bytes, rng: Random) -> bytes:
    """A prefix file, changed in one way or another."""
    way = rng.randrange(4)
    if way == 0:
        return bytes_changed(content, rng)
    return manifest_changed(content, rng) if way == 1 else tensors_changed(content, rng, way == 2)


class Fuzz:
    """Files of every kind, and what reading one should come to: "read" or "refused"."""

    def __init__(self, folder: Path):
        self.folder, self.base = folder, tiny_base()
        self.reader = Reader(self.base, train_tokenizer(["one two three"], kind="words", vocab_size=0))
        identity = identify(self.base)
        lora = trained_hypernetwork(self.base, elastic=True, sink=1)
        manifest = Manifest(base=identity, task="t", text_format={"query": "Q: {input}\nA:", "separator": "\n"})
        (self.prefix,) = lora.compress([[5, 6, 7, 8]], [manifest])
        lora.remove()
        self.makers = {}
        for kind in ("lora", "pooling", "hint", "full"):
            made = KINDS[kind].hypernetwork()(tiny_base(), gists=3)
            made.save_pretrained(folder / "of" / kind)
            self.makers[kind] = {path.name: path.read_bytes() for path in (folder / "of" / kind).iterdir()}
            if kind == "hint":
                (self.module,) = made.compress([[5, 6, 7]])
            made.remove()
        self.contents = {name: self.saved(prefix, **more) for name, prefix, more in (
            ("prefix", self.prefix, {}), ("int8", self.prefix, {"quantize": "int8"}), ("module", self.module, {}))}  # fmt: skip
        to_peft(self.prefix, folder / "peft")
        self.adapter = {path.name: path.read_bytes() for path in (folder / "peft").iterdir()}

    def saved(self, prefix: Prefix, **settings) -> bytes:
        prefix.save(self.folder / "one.safetensors", **settings)
        return (self.folder / "one.safetensors").read_bytes()

    def use(self, prefix: Prefix) -> None:
        """What a user does with a prefix: print it, read it, cut it, join it."""
        assert repr(prefix) and prefix.problem() is None
        prefix.check(self.reader.identity)
        self.reader.generate([[5, 6]], [prefix], max_new_tokens=2)
        with suppress(UserError):  # not all can be joined or cut
            Prefix.concat(prefix, prefix)
            prefix.truncate(1)

    def prefix_file(self, rng: Random) -> None:
        name = rng.choice(["prefix", "prefix", "int8", "module"])
        path = self.folder / "fuzzed.safetensors"
        path.write_bytes(any_change(self.contents[name], rng))
        self.use(Prefix.load(path))

    def peft_adapter(self, rng: Random) -> None:
        folder = self.folder / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        self.written(self.adapter, folder, rng)
        from_peft(folder)

    def hypernetwork(self, rng: Random) -> None:
        kind, folder = rng.choice(["lora", "pooling", "hint", "full"]), self.folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        self.written(self.makers[kind], folder, rng)
        made = load_hypernetwork_onto(folder, tiny_base())
        try:
            for prefix in made.compress([[5, 6, 7, 8, 9]]):
                assert prefix.problem() is None or "not finite" in prefix.problem()
        finally:
            made.remove()

    def store(self, rng: Random) -> None:
        folder = self.folder / "store"
        shutil.rmtree(folder, ignore_errors=True)
        store = PrefixStore(folder)
        path = store.add(self.prefix)
        index = folder / "index" / "rank0.jsonl"
        if rng.random() < 0.5:
            lines = index.read_bytes().strip()
            other = json.dumps(changed(json.loads(lines), rng)).encode() if rng.random() < 0.6 else bytes_changed(lines, rng)
            index.write_bytes(lines + b"\n" + other + b"\n")
        else:
            path.write_bytes(any_change(self.contents["prefix"], rng))
        again = PrefixStore(folder, create=False)
        problems = [*again.compare(), *again.check(), *again.repair()]
        assert all("\n" not in problem and len(problem) < 2000 for problem in problems)
        outside = [entry for entry in again if (folder / entry.file).resolve().parent != folder.resolve()]
        assert not outside
        for entry in again:
            self.use(again.load(entry))

    def written(self, files: dict[str, bytes], folder: Path, rng: Random) -> None:
        """The files of a folder, one of them changed."""
        folder.mkdir(parents=True)
        wrong = rng.choice([name for name in files if name.endswith((".json", ".safetensors"))])
        for name, content in files.items():
            if name == wrong and name.endswith(".json") and rng.random() < 0.7:
                content = json.dumps(changed(json.loads(content), rng)).encode()
            elif name == wrong:
                own = name.endswith(".safetensors") and rng.random() < 0.7
                content = tensors_changed(content, rng, False) if own else bytes_changed(content, rng)
            (folder / name).write_bytes(content)

    def one(self, seed: int) -> tuple[str, str]:
        """A file of a seed: its kind, and what became of it. Anything but "read" and "refused" is a fault."""
        rng = Random(seed)
        kind = rng.choice([self.prefix_file] * 5 + [self.peft_adapter, self.hypernetwork, self.hypernetwork, self.store])
        try:
            kind(rng)
        except UserError as error:
            long = "\n" in str(error) or len(str(error)) > 1500
            return kind.__name__, f"{seed}: a long sentence: {str(error)[:300]}" if long else "refused"
        except Exception as error:
            return kind.__name__, f"{seed}: {type(error).__name__}: {str(error)[:200]}"
        return kind.__name__, "read"


def megabytes() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(files: int, first: int = 0) -> None:
    """Make files, and print what became of them, by kind."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        before, counts, start = megabytes(), Counter(), time.perf_counter()
        most = before
        for seed in range(first, first + files):
            kind, outcome = fuzz.one(seed)
            if megabytes() > most + 100:
                most = megabytes()
                print(f"{kind} {seed}: {most - before:.0f} MiB more than at the start", flush=True)
            if outcome not in ("read", "refused"):
                print(kind, outcome, flush=True)
                outcome = "FAULT"
            counts[kind, outcome] += 1
        for (kind, outcome), count in sorted(counts.items()):
            print(f"{kind:14} {outcome:8} {count:6,}")
        print(f"{files:,} files in {time.perf_counter() - start:.0f} s; {megabytes() - before:.0f} MiB above {before:.0f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
