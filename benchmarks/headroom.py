"""What a base model does with 0, 2, 4 and 16 demonstrations, task by task: what can be compressed at all.

    python -m benchmarks.headroom models/smollm2-135m recipes/words/train recipes/words/test [--queries N] [--json FILE]

Folders of JSON lines, a file a task. Answers are generated greedily, end at the separator, and count if they are the reference
to the letter. Queries are the same for all numbers of demonstrations, which are the first of one draw.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.measure import write_json
from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.data.json_lines import read_json_lines_tasks
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.inference.reader import Reader

SHOTS = (0, 2, 4, 16)


def headroom(reader: Reader, encoder: Encoder, folder: Path, queries: int) -> dict[str, dict[int, float]]:
    """For each task of a folder and each number of demonstrations the share of queries that are answered exactly."""
    episodes = read_json_lines_tasks(str(folder), instances=1000).evaluation(
        shots=max(SHOTS), queries=queries, episodes=1000, seed=0
    )
    found: dict[str, dict[int, float]] = {episode.task: {} for episode in episodes}
    for shots in SHOTS:
        contexts = [encoder.context("", episode.demonstrations[:shots])[0] for episode in episodes]
        read = reader.encode(contexts) if shots else [None] * len(contexts)
        asked = [(e, query, prefix) for e, prefix in zip(episodes, read, strict=True) for query in e.queries]
        prompts = [encoder.prompt(query.input) for _, query, _ in asked]
        prefixes = [prefix for _, _, prefix in asked] if shots else None
        settings = {"batch_size": 256, "max_new_tokens": encoder.format.answer_tokens, "stop": encoder.format.separator}
        right: dict[str, list[bool]] = {}
        for (episode, query, _), tokens in zip(asked, reader.generate(prompts, prefixes, **settings), strict=True):
            right.setdefault(episode.task, []).append(encoder.answer_of(tokens) == query.output.strip())
        for task, each in right.items():
            found[task][shots] = sum(each) / len(each)
    return found


def table(found: dict[str, dict[int, float]]) -> str:
    """The shares in %, a task a line, as Markdown."""
    lines = [f"|task|{'|'.join(map(str, SHOTS))}|", "|---" * (1 + len(SHOTS)) + "|"]
    lines += [f"|{task}|{'|'.join(f'{100 * each[shots]:.0f}' for shots in SHOTS)}|" for task, each in found.items()]
    means = [sum(each[shots] for each in found.values()) / len(found) for shots in SHOTS]
    return "\n".join([*lines, f"|**mean of {len(found)}**|{'|'.join(f'**{100 * mean:.0f}**' for mean in means)}|"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("folders", nargs="+", type=Path)
    options.add_argument("--queries", type=int, default=16)
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    start, tokenizer = time.perf_counter(), load_tokenizer(arguments.model)
    reader = Reader(load_base(arguments.model, dtype="bfloat16"), tokenizer)
    encoder = Encoder(tokenizer, TextFormat(answer_tokens=12), Limits())
    found = {str(folder): headroom(reader, encoder, folder, arguments.queries) for folder in arguments.folders}
    for folder, tasks in found.items():
        print(f"{folder}\n\n{table(tasks)}\n", flush=True)
    if arguments.json:
        seconds = time.perf_counter() - start
        write_json(arguments.json, {"queries": arguments.queries, "seconds": seconds, "tasks": found})


if __name__ == "__main__":
    main()
