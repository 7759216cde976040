"""Rank classification: what four choices cost beside one, and beside a row for every choice.

    python -m benchmarks.scoring [--json FILE]

32 questions of 60 to 120 tokens behind the prefixes of 4 tasks (16 gists), choices of 2 to 6 tokens; a Llama
of 6 layers and hidden size 512, float32, no gradients. "a row a choice" repeats prefix and prompt for every choice in padded
batches of stock transformers, as evaluation harnesses do without a cache.
"""

from __future__ import annotations

import statistics
from random import Random

import torch

from benchmarks.measure import machine, median_ratio, paired, parser, write_json
from benchmarks.training_step import GISTS, VOCABULARY, benchmark_hypernetwork, ragged_episodes
from hyperllama.base.decoder import cache_argument
from hyperllama.inference.scoring import Question, continuation_scores
from hyperllama.prefixes.prefix import Prefix

QUESTIONS, CHOICES, BATCH = 32, 4, 16


def main() -> None:
    arguments = parser(__doc__, rounds=5).parse_args()
    hypernetwork, rng = benchmark_hypernetwork().eval(), Random(0)
    model = hypernetwork.base

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high)))

    prefixes = hypernetwork.compress([episode.context for episode in ragged_episodes()])
    prompts = [(tokens(60, 120), tuple(tokens(2, 6) for _ in range(CHOICES))) for _ in range(QUESTIONS)]
    four = [Question(prompt, choices, prefixes[i % 4]) for i, (prompt, choices) in enumerate(prompts)]
    one = [Question(q.prompt, q.continuations[:1], q.prefix) for q in four]

    def rows() -> list[float]:
        flat = [(q.prompt, choice, q.prefix) for q in four for choice in q.continuations]
        return [score for i in range(0, len(flat), BATCH) for score in padded(model, flat[i : i + BATCH])]

    packed = [score for scores in continuation_scores(model, four) for score in scores]
    worst = max(abs(a - b) for a, b in zip(packed, rows(), strict=True))
    steps = {
        "one choice": lambda: continuation_scores(model, one),
        "four choices": lambda: continuation_scores(model, four),
        "a row a choice": rows,
    }
    seconds = paired(steps, arguments.rounds)
    print(f"{QUESTIONS} questions; packed scores differ from a row a choice by at most {worst:.1e} nats\n")
    for name, times in seconds.items():
        ratio = median_ratio(times, seconds["one choice"])
        print(f"  {name:16} {statistics.median(times):7.3f} s   {ratio:5.2f} x one choice")
    figures = {
        "seconds": seconds,
        "four_to_one": median_ratio(seconds["four choices"], seconds["one choice"]),
        "row_a_choice_to_four": median_ratio(seconds["a row a choice"], seconds["four choices"]),
        "largest_difference": worst,
    }
    write_json(arguments.json, figures)
    print(f"\n{machine()}")


@torch.no_grad()
def padded(model, rows: list[tuple[tuple[int, ...], tuple[int, ...], Prefix]]) -> list[float]:
    """Summed log-probabilities of continuations, each in a row of its own behind a copy of its prefix."""
    longest = max(len(prompt) + len(choice) - 1 for prompt, choice, _ in rows)
    cache, gists = Prefix.stack([prefix for _, _, prefix in rows], device=model.device, dtype=model.dtype)
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for i, (prompt, choice, _) in enumerate(rows):
        row = (*prompt, *choice[:-1])
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row, device=model.device), 1
    positions = GISTS + torch.arange(longest, device=model.device).expand(len(rows), -1)
    mask = torch.cat([gists.to(mask.dtype), mask], dim=1)
    logits = model(ids, attention_mask=mask, position_ids=positions, **cache_argument(model, cache)).logits
    scores = []
    for i, (prompt, choice, _) in enumerate(rows):
        likely = logits[i, len(prompt) - 1 : len(prompt) - 1 + len(choice)].float().log_softmax(-1)
        scores.append(likely.gather(1, torch.tensor(choice, device=model.device)[:, None]).sum().item())
    return scores


if __name__ == "__main__":
    main()
