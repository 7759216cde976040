"""Methods that answer without a model."""

from __future__ import annotations

from collections.abc import Sequence

from eval.methods.bench import Bench, method


@method("copy the input", "copy", "answers")
def copy_input(bench: Bench, indices: Sequence[int]) -> list[list[str]]:
    """The input itself as its answer."""
    return [[query.input for query in bench.episodes[i].queries] for i in indices]


@method("copy the first demonstration's output", "copy", "answers", "demonstrations")
def copy_demonstration(bench: Bench, indices: Sequence[int]) -> list[list[str]]:
    """The output of the first demonstration as the answer to everything."""
    first = [bench.episodes[i].demonstrations[:1] for i in indices]
    return [[shown[0].output if shown else ""] * len(bench.episodes[i].queries) for shown, i in zip(first, indices)]
