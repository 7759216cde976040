"""Methods that read everything in full attention: what a prefix is to come up to."""

from __future__ import annotations

from collections.abc import Sequence

from eval.methods.bench import Bench, State, method


@method("no context", "context", "model")
def no_context(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The query alone, after the start token if the tokenizer has one."""
    return bench.whole([bench.encoder.start for _ in indices])


@method("instruction only", "context", "model", "instructions", "demonstrations")
def instruction_only(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The instruction without demonstrations, in full attention."""
    return bench.whole([bench.encoder.context(bench.episodes[i].instruction, ())[0] for i in indices])


@method("all demonstrations, full attention", "context", "model")
def full_context(bench: Bench, indices: Sequence[int]) -> list[State]:
    """Everything in full attention: what a prefix is to come up to."""
    chosen = "attended_tokens" in bench.methods  # from the same pass
    return bench.whole([bench.context(bench.episodes[i]) for i in indices], choose=chosen)


@method("multi-task model, full attention", "context", "multi_task")
def multi_task(bench: Bench, indices: Sequence[int]) -> list[State]:
    """Everything in full attention, read by a model that was trained on such episodes with all of its weights."""
    return bench.whole([bench.context(bench.episodes[i]) for i in indices], bench.multi_task)
