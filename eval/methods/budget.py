"""Methods that keep part of a context, in as many rows as a prefix has, without any training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from eval.methods.bench import Bench, State, instruction_fits, method
from eval.methods.full_attention import full_context
from hyperllama.base.decoder import inverse_frequencies
from hyperllama.data.text import Limits
from hyperllama.prefixes.rows import last_rows, mean_pooled


@method("fewer demonstrations, same memory", "budget", "model", "budget")
def fewer_demonstrations(bench: Bench, indices: Sequence[int]) -> list[State]:
    """As many whole demonstrations as the budget has room for, in full attention, after the instruction if it fits too.

    Of plain text, its last tokens.
    """
    tight = bench.encoder.within(Limits(context_tokens=bench.budget))
    contexts, counts = [], []
    for i in indices:
        episode = bench.episodes[i]
        if episode.window is not None:
            kept, shown = [*tight.start, *bench.context(episode)[len(tight.start) :][len(tight.start) - bench.budget :]], []
        else:
            room = bench.budget - len(tight.context(episode.instruction, ())[0]) if instruction_fits(tight, episode) else -1
            kept, shown = tight.context(episode.instruction if room >= 0 else "", episode.demonstrations)
        contexts.append(kept)
        counts.append(len(shown))
    return [dataclasses.replace(state, demonstrations=n) for state, n in zip(bench.whole(contexts), counts, strict=True)]


@method("first tokens of the context, same memory", "budget", "model", "budget", "instructions")
def cut_context(bench: Bench, indices: Sequence[int]) -> list[State]:
    """As many of the first tokens of instruction and demonstrations as the budget has rows, in full attention."""
    return bench.whole([bench.context(bench.episodes[i])[: bench.budget] for i in indices])


@method("first and last tokens' keys and values", "budget", "model", "budget")
def last_tokens(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The keys and values of the context's first token and of its last ones, which have seen all of it, and nothing else."""
    inv_freq = inverse_frequencies(bench.reader.model)
    return [
        dataclasses.replace(state, prefix=state.prefix and last_rows(state.prefix, bench.budget, inv_freq))
        for state in full_context(bench, indices)
    ]


@method("most attended keys and values", "budget", "model", "budget")
def attended_tokens(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The keys and values of the context's first token, its last ones, and those that its second half attends to most.

    For each head its own, without any training (after Li et al. 2024, arXiv 2404.14469).
    """
    contexts = [bench.context(bench.episodes[i]) for i in indices]
    long = [len(context) > bench.budget for context in contexts]
    chosen = iter(bench.compressed([context for context, cut in zip(contexts, long) if cut], bench.chooser))
    whole = iter(bench.whole([context for context, cut in zip(contexts, long) if not cut]))
    return [next(chosen if cut else whole) for cut in long]


@method("mean-pooled keys and values", "budget", "model", "budget")
def mean_pool(bench: Bench, indices: Sequence[int]) -> list[State]:
    """Means of neighbouring keys and values of the context, without any training."""
    inv_freq = inverse_frequencies(bench.reader.model)
    return [
        dataclasses.replace(state, prefix=state.prefix and mean_pooled(state.prefix, bench.budget, inv_freq))
        for state in full_context(bench, indices)
    ]
