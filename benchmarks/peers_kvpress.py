"""What kvpress keeps of 16 demonstrations in the memory of a few rows, on the same episodes as `hyperllama evaluate`.

    python -m benchmarks.peers_kvpress --write episodes.jsonl [--seeds 0 1 2]
    KVENV/bin/python -m benchmarks.peers_kvpress --read episodes.jsonl --json benchmarks/results/peers_kvpress_words.json

Two parts, as kvpress needs an older transformers than we have. The first runs in our environment and writes the episodes as
token ids. The second runs in one of its own, made by `python -m venv KVENV && KVENV/bin/pip install 'torch>=2.11,<2.14'
kvpress==0.5.5`, and imports nothing of ours.

Each context is read once under a press, which keeps `--rows` rows of every layer and key-value head. All queries are then
answered greedily behind what it has kept, up to the separator. As in kvpress's own pipeline their positions go on behind those
of the whole context; only where keys are rotated again do they go on behind the rows. No compression is measured too: it must
agree with the same in our evaluation. Presses that the file of figures has already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import string
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SHOTS = QUERIES = 16
SEPARATOR, NEW_TOKENS = "\n\n", 12
NOTHING = "no compression"


def write_episodes(path: Path, model: str, root: str, seeds: Sequence[int]) -> int:
    """Write the episodes of `hyperllama evaluate` with data.source=jsonl, a JSON line each; returns how many."""
    from hyperllama.base.loading import load_tokenizer
    from hyperllama.data.json_lines import read_json_lines_tasks
    from hyperllama.data.text import Encoder, Limits, TextFormat

    encoder = Encoder(load_tokenizer(model), TextFormat(separator=SEPARATOR, answer_tokens=NEW_TOKENS), Limits())
    source, lines = read_json_lines_tasks(root, instances=100), []
    for seed in seeds:
        for episode in source.evaluation(shots=SHOTS, queries=QUERIES, episodes=100, seed=seed):
            context, _ = encoder.context(episode.instruction, episode.demonstrations)
            if len(context.shown) < len(episode.demonstrations):
                raise SystemExit(f"{episode.task}: its demonstrations do not fit")
            queries = [
                {"prompt": encoder.prompt(query.input), "input": query.input, "references": query.references or [query.output]}
                for query in episode.queries
            ]
            line = {"seed": seed, "task": episode.task, "text": encoder.tokenizer.decode(context), "context": context}
            lines.append(json.dumps(line | {"queries": queries}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def presses(rows: int) -> dict[str, Any]:
    """Presses by name, made for so many rows.

    Some defaults are made for more memory than this: SnapKV protects a window of 64 tokens and Compactor 12 at both ends, so
    that nothing says which of these stay, and StreamingLLM and KVzip spend 4 rows on the first tokens. Smaller ones are
    measured too.
    """
    import kvpress as kv

    return {
        "KVzip": kv.KVzipPress(),
        "KVzip, one sink": kv.KVzipPress(n_sink=1),
        "KVzip+": kv.KVzipPress(kvzip_plus_normalization=True),
        "KeyDiff": kv.KeyDiffPress(),
        "Compactor": kv.CompactorPress(),
        "Compactor, fewer protected": kv.CompactorPress(sink_size_start=rows // 4, sink_size_end=rows // 8),
        "StreamingLLM": kv.StreamingLLMPress(),
        "StreamingLLM, one sink": kv.StreamingLLMPress(n_sink=1),
        "StreamingLLM, keys rotated again": kv.KeyRerotationPress(kv.StreamingLLMPress()),
        "SnapKV": kv.SnapKVPress(),
        "SnapKV, smaller window": kv.SnapKVPress(window_size=rows // 2),
        "ExpectedAttention": kv.ExpectedAttentionPress(),
        "Knorm": kv.KnormPress(),
        "TOVA": kv.TOVAPress(),
        "ObservedAttention": kv.ObservedAttentionPress(),
    }


@dataclass
class Memory:
    """What is left of a context: keys and values of every layer, and the position at which a query goes on.

    `masked`: for presses that mask rows instead of removing them, the heads and rows of every layer that nobody may see.
    """

    layers: list[tuple[Any, Any]]
    position: int
    masked: list[tuple[Any, Any]] | None

    def kept(self) -> list[int]:
        """How many rows each layer and key-value head keeps."""
        counts = []
        for i, (keys, _) in enumerate(self.layers):
            heads, rows = keys.shape[1:3]
            gone = self.masked[i][0].bincount(minlength=heads).tolist() if self.masked else [0] * heads
            counts += [rows - each for each in gone]
        return counts


def compress(model, press, context: Sequence[int], rows: int) -> Memory:
    """Read a context under a press that keeps `rows` rows of it; without one keep it whole."""
    import torch
    from kvpress import KeyRerotationPress, KVzipPress, ObservedAttentionPress
    from transformers import DynamicCache

    length, cache = len(context), DynamicCache()
    if press is not None:
        # Presses round down, KVzip what it takes and the others what they keep: a little more, or a row would be missing.
        press.compression_ratio = 1 - rows / length + (1e-9 if isinstance(press, KVzipPress) else -1e-9)
    eager = isinstance(press, ObservedAttentionPress)  # it needs the attention's weights
    model.set_attn_implementation("eager" if eager else "sdpa")
    torch.manual_seed(0)  # Compactor draws
    with torch.no_grad(), press(model) if press is not None else nullcontext():
        model.model(input_ids=torch.tensor([context]), past_key_values=cache)
    model.set_attn_implementation("sdpa")
    masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    hide(model, None)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    position = layers[0][0].shape[2] if isinstance(press, KeyRerotationPress) else length
    return Memory(layers, position, [(heads, at) for _, heads, at in masked] if masked[0] is not None else None)


def hide(model, masked: Sequence[Any] | None) -> None:
    """Say which rows of a cache attention shall not see, in every layer, in the way that kvpress has for it."""
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.masked_key_indices = masked and masked[i]


def answer(model, tokenizer, asked: Sequence[tuple[Memory, Sequence[int]]]) -> list[str]:
    """Greedy answers to prompts, each behind a memory of its own, in one batch; white space around them is taken off."""
    import torch
    from transformers import DynamicCache

    size, longest = max(memory.layers[0][0].shape[2] for memory, _ in asked), max(len(prompt) for _, prompt in asked)
    ids = torch.full((len(asked), longest), tokenizer.pad_token_id)
    mask = torch.zeros(len(asked), size + longest, dtype=torch.long)
    positions = torch.zeros_like(ids)
    before = []  # rows of padding before each memory
    for i, (memory, prompt) in enumerate(asked):
        before.append(size - memory.layers[0][0].shape[2])
        start = longest - len(prompt)
        ids[i, start:] = torch.tensor(prompt)
        mask[i, before[i] : size] = mask[i, size + start :] = 1
        positions[i, start:] = memory.position + torch.arange(len(prompt))
    cache, hidden = DynamicCache(), []
    for n in range(len(asked[0][0].layers)):
        pair = []
        for part in (0, 1):
            whole = [memory.layers[n][part] for memory, _ in asked]
            pair.append(torch.cat([torch.nn.functional.pad(x, (0, 0, more, 0)) for x, more in zip(whole, before)]))
        cache.update(*pair, n)
        if asked[0][0].masked:
            places = [(torch.full_like(m.masked[n][0], i), m.masked[n][0], m.masked[n][1]) for i, (m, _) in enumerate(asked)]
            batch, heads, rows = map(torch.cat, zip(*places))
            hidden.append((batch, heads, rows + torch.tensor(before)[batch]))
    hide(model, hidden or None)
    tokens: list[list[int]] = [[] for _ in asked]
    going = torch.arange(len(asked))  # those whose answers have not ended
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            output = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            ids = model.lm_head(output.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
        for i, token in zip(going.tolist(), ids[:, 0].tolist()):
            tokens[i].append(token)
        left = torch.tensor([not ends(tokens[i], tokenizer) for i in going.tolist()])
        if not left.any():
            break
        mask, positions = torch.nn.functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        if not left.all():
            cache.batch_select_indices(left.nonzero()[:, 0])
            going, ids, mask, positions = going[left], ids[left], mask[left], positions[left]
            place = left.cumsum(0) - 1
            hidden = [(place[batch[left[batch]]], heads[left[batch]], rows[left[batch]]) for batch, heads, rows in hidden]
            hide(model, hidden or None)
    hide(model, None)
    return [tokenizer.decode(each, skip_special_tokens=True).split(SEPARATOR)[0].strip() for each in tokens]


def ends(tokens: Sequence[int], tokenizer) -> bool:
    """Whether an answer has ended: with the end token, or with the separator in its text."""
    return tokens[-1] == tokenizer.eos_token_id or SEPARATOR in tokenizer.decode(tokens)


def normalise(text: str) -> str:
    """As `eval.metrics.normalise`, which S-NI's exact match compares: lower case, no punctuation, single spaces."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def measure(model, tokenizer, episodes: Sequence[dict], press, rows: int, batch: int) -> dict:
    """What is answered behind what a press keeps of each episode's context, and how long that takes."""
    start = time.perf_counter()
    memories = [compress(model, press, episode["context"], rows) for episode in episodes]
    compressed = time.perf_counter()
    asked = [(memory, query["prompt"]) for memory, e in zip(memories, episodes) for query in e["queries"]]
    answers = iter([said for i in range(0, len(asked), batch) for said in answer(model, tokenizer, asked[i : i + batch])])
    answered, scores = [], {}
    for episode in episodes:
        for query in episode["queries"]:
            said, wanted = next(answers), query["references"]
            letter, sni = said in [w.strip() for w in wanted], normalise(said) in map(normalise, wanted)
            scores.setdefault(episode["task"], {}).setdefault(episode["seed"], []).append((letter, sni))
            place = {"seed": episode["seed"], "task": episode["task"], "input": query["input"], "references": wanted}
            answered.append(place | {"answer": said, "right": letter})
    kept = [count for memory in memories for count in memory.kept()]
    seconds = {"compress": round(compressed - start, 1), "answer": round(time.perf_counter() - compressed, 1)}
    shares = {"kept": {"mean": round(mean(kept), 2), "least": min(kept), "most": max(kept)}, "seconds": seconds}
    seeds = sorted({episode["seed"] for episode in episodes})
    for place, name in enumerate(("to_the_letter", "exact_match")):
        tasks = {task: {seed: mean([x[place] for x in each[seed]]) for seed in seeds} for task, each in scores.items()}
        by_seed = {seed: round(mean([each[seed] for each in tasks.values()]), 4) for seed in seeds}
        by_task = {task: round(mean(list(each.values())), 4) for task, each in tasks.items()}
        shares[name] = {"mean": round(mean(list(by_task.values())), 4), "seeds": by_seed, "tasks": by_task}
    return shares | {"answers": answered}


def mean(values: Sequence[float]) -> float:
    """The mean of at least one number."""
    return sum(values) / len(values)


@contextmanager
def without_chat_template(folder: str) -> Iterator[str]:
    """A folder with links to a model's files, save its chat template.

    KVzip takes as many of a context's first tokens as the template begins with for the template's own, and scores none of them.
    Our contexts have no template.
    """
    with tempfile.TemporaryDirectory() as links:
        for path in Path(folder).resolve().iterdir():
            if not path.name.startswith("chat_template"):
                (Path(links) / path.name).symlink_to(path)
        yield links


def read_episodes(arguments: argparse.Namespace) -> None:
    """Measure every press on written episodes, write what was found after each, and print a table."""
    from importlib.metadata import version

    import torch
    import transformers
    from kvpress.presses import kvzip_press

    logging.getLogger("kvpress").setLevel(logging.ERROR)
    episodes = [json.loads(line) for line in arguments.read.read_text(encoding="utf-8").splitlines()]
    episodes = [e for e in episodes if e["seed"] in arguments.seeds and (not arguments.tasks or e["task"] in arguments.tasks)]
    lengths = [len(episode["context"]) for episode in episodes]
    versions = {"kvpress": version("kvpress"), "torch": torch.__version__, "transformers": transformers.__version__}
    machine = versions | {"python": platform.python_version(), "threads": torch.get_num_threads()}
    facts = {"machine": machine, "model": arguments.model, "dtype": "bfloat16", "seeds": arguments.seeds}
    facts |= {"tasks": sorted({episode["task"] for episode in episodes}), "episodes": len(episodes)}
    facts |= {"queries": sum(len(e["queries"]) for e in episodes), "context_tokens": [min(lengths), max(lengths)]}
    there = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json and arguments.json.exists() else {}
    found = there["results"] if facts.items() <= there.items() else []
    with without_chat_template(arguments.model) as folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        # KVzip loads the tokenizer again for every context, which takes longer than the context.
        kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: tokenizer)
        names = [NOTHING, *presses(1)]
        todo = [(NOTHING, None, None)] + [
            (name, press, rows) for rows in arguments.rows for name, press in presses(rows).items()
        ]
        for name, press, rows in todo:
            seeds = arguments.seeds[:1] if name in arguments.one_seed else arguments.seeds
            before = [one for one in found if (one["press"], one["rows"]) == (name, rows)]
            if (arguments.presses and name not in arguments.presses) or any(set(seeds) <= set(one["seeds"]) for one in before):
                continue
            some = [episode for episode in episodes if episode["seed"] in seeds]
            result = measure(model, tokenizer, some, press, rows or max(lengths), arguments.batch)
            answers = [{"press": name, "rows": rows} | line for line in result.pop("answers")]
            found = [one for one in found if one not in before] + [{"press": name, "rows": rows, "seeds": seeds} | result]
            found.sort(key=lambda one: (-(one["rows"] or max(lengths)), names.index(one["press"])))
            print(table([{"press": name, **result}]).splitlines()[-1], result["seconds"], flush=True)
            if arguments.answers:
                with arguments.answers.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in answers)
            if arguments.json:
                seconds = round(sum(sum(one["seconds"].values()) for one in found), 1)
                whole = facts | {"seconds": seconds, "results": found}
                arguments.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(found)}")
    if few := sorted({one["press"] for one in found if one["seeds"] != arguments.seeds}):
        print(f"\nNot with every seed, to save time, at least with some rows: {', '.join(few)}.")


def table(found: Sequence[dict]) -> str:
    """The means over tasks in %, a press and a number of rows a line, as Markdown; the last column is exact match."""
    lines = ["|press|rows kept (least to most)|to the letter|exact match|of each seed|", "|---|---|---|---|---|"]
    for one in found:
        kept, letter, sni = one["kept"], one["to_the_letter"], one["exact_match"]
        seeds = ", ".join(f"{seed}: {100 * each:.1f}" for seed, each in sni["seeds"].items())
        rows = f"{kept['mean']:.1f} ({kept['least']} to {kept['most']})"
        lines.append(f"|{one['press']}|{rows}|{100 * letter['mean']:.1f}|{100 * sni['mean']:.1f}|{seeds}|")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    part = options.add_mutually_exclusive_group(required=True)
    part.add_argument("--write", type=Path, metavar="FILE", help="write the episodes; in our environment")
    part.add_argument("--read", type=Path, metavar="FILE", help="measure presses on written episodes; in kvpress's environment")
    options.add_argument("--model", default="models/smollm2-135m")
    options.add_argument("--root", default="recipes/words/test")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--rows", type=int, nargs="+", default=[16, 8])
    options.add_argument("--tasks", nargs="+", help="only these")
    options.add_argument("--presses", nargs="+", help="only these")
    options.add_argument(
        "--one-seed", nargs="+", default=[], help="presses to measure with the first seed only, as they are slow"
    )
    options.add_argument("--batch", type=int, default=64, help="queries that are answered together")
    options.add_argument("--json", type=Path, help="write the figures here too")
    options.add_argument("--answers", type=Path, help="add every answer to this file")
    arguments = options.parse_args()
    if arguments.write:
        print(f"{write_episodes(arguments.write, arguments.model, arguments.root, arguments.seeds)} episodes")
    else:
        read_episodes(arguments)


if __name__ == "__main__":
    main()
