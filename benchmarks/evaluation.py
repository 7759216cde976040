"""What methods of an evaluation cost together beside the dearest of them alone, in FLOPs that torch counts while they run.

    python -m benchmarks.evaluation [--hypernetwork smollm2] [--data recipes/words/test/plural.jsonl] [--json FILE]

Every method alone, on a bench of its own, and then all of them on one, as `hyperllama evaluate` runs them: states that several
methods read are made once. "states" is what stands before the queries, "queries" is reading and answering them, which nobody
can share: each method puts something else before them. Answers of all methods together have to be those of each alone.
FLOPs, and so these figures, do not depend on how busy the machine is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import parser, write_json
from eval.answering import Kind, Query, kind_of, queries_of, results
from eval.methods import METHODS, Bench
from hyperllama.data.json_lines import read_json_lines_tasks
from hyperllama.hypernetworks.loading import load_hypernetwork
from hyperllama.inference.reader import Reader

# Ten for two tasks without instructions; others by --methods.
TEN = ("no_context", "full_context", "fewer_demonstrations", "last_tokens", "attended_tokens", "mean_pool", "prefix")
TEN += ("swapped_prefix", "shuffled_prefix", "shuffled_context")


def counted(run: Callable[[], object]) -> tuple[object, int]:
    """What `run` returns, and the FLOPs that it took: matrix products, and attention of every pair, hidden ones too."""

    def forward(q: torch.Size, k: torch.Size, *args, out_shape=None, **settings) -> int:
        return 4 * q[0] * q[1] * q[2] * k[2] * q[3]

    def backward(given: torch.Size, q: torch.Size, k: torch.Size, *args, out_shape=None, **settings) -> int:
        return 2 * forward(q, k)

    # Torch's counter has no formulas for the kernels that it takes on a CPU.
    name = "_scaled_dot_product_flash_attention_for_cpu"
    kernels = {getattr(torch.ops.aten, name): forward, getattr(torch.ops.aten, f"{name}_backward"): backward}
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        made = run()
    return made, counter.get_total_flops()


def evaluation_flops(
    make_bench: Callable[[Sequence[str]], Bench], methods: Sequence[str], metric: str = "auto"
) -> dict[str, dict[str, int]]:
    """FLOPs of each method alone, and of all of them under the name "together", for states and for queries.

    `make_bench` makes a new bench for methods by name. RuntimeError if a method answers otherwise beside others than alone.
    """
    found, alone = {}, {}
    for name in methods:
        bench = make_bench([name])
        found[name], lines = evaluated(bench, [name], kind_of(bench.episodes, metric))
        alone |= lines
    bench = make_bench(methods)
    found["together"], together = evaluated(bench, methods, kind_of(bench.episodes, metric))
    if other := [name for name in methods if said(together[name]) != said(alone[name])]:
        raise RuntimeError(f"{', '.join(other)}: other answers beside other methods than alone")
    return found


def evaluated(bench: Bench, methods: Sequence[str], kind: Kind) -> tuple[dict[str, int], dict[str, list[dict]]]:
    """FLOPs of states and queries of methods on all episodes of a bench, and their result lines."""
    indices, spent, lines = range(len(bench.episodes)), {"states": 0, "queries": 0}, {}
    asked: list[list[Query]] = [queries_of(bench, episode, kind) for episode in bench.episodes]
    for name in methods:
        states, flops = counted(lambda name=name: METHODS[name].run(bench, indices))
        ready = replace(METHODS[name], run=lambda bench, indices, states=states: states)  # made already
        lines[name], more = counted(lambda ready=ready: list(results(bench, ready, indices, asked, kind, {})))
        spent["states"] += flops
        spent["queries"] += more
    bench.forget()
    return spent, lines


def said(lines: Sequence[dict]) -> list:
    """What was answered to each query, and how that was scored, but for the last digits of a likelihood."""
    return [(line.get("answer"), {name: round(value, 3) for name, value in line["metrics"].items()}) for line in lines]


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print a table, write the figures."""
    options = parser(__doc__, rounds=1)
    options.add_argument("--hypernetwork", default="smollm2")
    options.add_argument("--data", default="recipes/words/test", help="a file of a task, or a folder of some")
    options.add_argument("--tasks", type=int, default=2, help="the first so many")
    options.add_argument("--shots", type=int, default=16)
    options.add_argument("--queries", type=int, default=16)
    options.add_argument("--refine", type=int, default=0, help="steps, for methods that refine")
    options.add_argument("--methods", nargs="*", default=TEN, choices=METHODS)
    chosen = options.parse_args(arguments)
    source = read_json_lines_tasks(chosen.data, instances=1000)
    episodes = source.evaluation(shots=chosen.shots, queries=chosen.queries, episodes=chosen.tasks, seed=0)
    hypernetwork, encoder = load_hypernetwork(chosen.hypernetwork, dtype="float32")
    reader = Reader(hypernetwork.base, encoder.tokenizer)

    def make_bench(methods: Sequence[str]) -> Bench:
        sizes = {"gists": hypernetwork.num_gists, "budget": hypernetwork.rows, "refine": chosen.refine}
        return Bench(episodes, encoder, reader, hypernetwork, methods=methods, **sizes)

    found = evaluation_flops(make_bench, chosen.methods)
    dearest = max(chosen.methods, key=lambda name: sum(found[name].values()))
    print(f"{len(episodes)} tasks, {chosen.shots} shots, {chosen.queries} queries each; GFLOP\n")
    for name, spent in found.items():
        told = f"{spent['states'] / 1e9:9.1f} of states {spent['queries'] / 1e9:9.1f} of queries"
        print(f"{name:22} {told} {sum(spent.values()) / sum(found[dearest].values()):6.2f} x {dearest}")
    asked = {"tasks": len(episodes), "shots": chosen.shots, "queries": chosen.queries, "refine": chosen.refine}
    write_json(chosen.json, {**asked, "flops": found, "dearest": dearest, "ratios": ratios(found, dearest)})


def ratios(found: dict[str, dict[str, int]], dearest: str) -> dict[str, float]:
    """FLOPs of all methods together over those of the dearest alone: of all, of states, and of queries."""
    together, alone = found["together"], found[dearest]
    states = max(spent["states"] for name, spent in found.items() if name != "together")
    whole = sum(together.values()) / sum(alone.values())
    return {"all": whole, "states": together["states"] / states, "queries": together["queries"] / alone["queries"]}


if __name__ == "__main__":
    main()
