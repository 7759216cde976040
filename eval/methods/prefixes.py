"""Methods that read prefixes: a hypernetwork's, those of something else as controls, and stored ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from eval.methods.bench import Bench, State, method
from eval.methods.shuffling import shuffled, shuffled_words
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.rows import first_rows


@dataclass(frozen=True)
class FirstRows:
    """Makes of a context the prefix of its first `rows` tokens."""

    reader: Reader
    rows: int

    def compress(
        self, contexts: Sequence[Sequence[int]], manifests: Sequence[Manifest] | None = None, *, gists: int | None = None
    ) -> list[Prefix]:
        """As a hypernetwork's; `gists` are not heard, and fewer tokens are all kept."""
        made = [first_rows(whole, self.rows) for whole in self.reader.encode([context[: self.rows] for context in contexts])]
        manifests = manifests or [Manifest(base=self.reader.identity) for _ in contexts]
        return [Prefix(one.keys, one.values, manifest) for one, manifest in zip(made, manifests, strict=True)]

    def compress_flops(self, cost: Any, tokens: int) -> int:
        """FLOPs of that."""
        return cost.encode(min(tokens, self.rows))


@method("the prefix", "ours", "model", "hypernetwork")
def prefix(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The prefix that the hypernetwork makes of instruction and demonstrations."""
    return bench.compressed([bench.context(bench.episodes[i]) for i in indices])


@method("the prefix, refined", "ours", "model", "hypernetwork", "refine")
def refined_prefix(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The prefix, tuned for a few steps on its own context, if what was held back is the better for it."""
    return bench.refined(indices, bench.hypernetwork, bench.gists)


@method("most attended keys and values, refined", "budget", "model", "budget", "refine")
def refined_attended(bench: Bench, indices: Sequence[int]) -> list[State]:
    """Most attended keys and values, tuned as the prefix is: what a hypernetwork's start adds to tuning."""
    return bench.refined(indices, bench.chooser)


@method("first keys and values, refined", "budget", "model", "budget", "refine")
def refined_first(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The keys and values of the context's first tokens, tuned as the prefix is: how cartridges start from a text.

    (Eyuboglu et al. 2025, arXiv 2506.06266, and PEFT's CARTRIDGE.)
    """
    return bench.refined(indices, FirstRows(bench.reader, bench.budget))


@method("the last chunk's prefix", "control", "model", "chunks")
def last_chunk(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The prefix of as many of the context's last tokens as one chunk holds: does what stands before them matter?"""
    start = bench.encoder.start
    room = bench.hypernetwork.chunking.chunk_tokens - len(start)
    contexts = [bench.context(bench.episodes[i])[len(start) :] for i in indices]
    return bench.compressed([[*start, *context[max(0, len(context) - room) :]] for context in contexts])


@method("another task's prefix", "control", "model", "hypernetwork", "other_tasks")
def swapped_prefix(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The prefix of the next episode of another task: does it matter what was compressed?"""
    return bench.compressed([bench.context(bench.episodes[bench.partner(i)]) for i in indices])


@method("prefix of shuffled labels", "control", "model", "hypernetwork", "demonstrations")
def shuffled_prefix(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The prefix of demonstrations whose outputs have changed places: does it matter which output belongs to which input?"""
    return bench.compressed([bench.context(shuffled(bench.episodes[i], bench.seed, i)) for i in indices])


@method("prefix of the instruction's words, shuffled", "control", "model", "hypernetwork", "instructions")
def shuffled_instruction(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The prefix of the task's own instruction with its words in another order, where next to no neighbours are left together.

    The words themselves stay, and may tell something: in the synthetic language they allow a guess among the symbols named.
    What the prefix gains over this comes from knowing which word belongs to which.
    """
    changed = []
    for i in indices:
        words = shuffled_words(bench.episodes[i].instruction, Random(f"{bench.seed}/{i}"))
        changed.append(bench.context(dataclasses.replace(bench.episodes[i], instruction=words)))
    return bench.compressed(changed)


@method("shuffled labels, full attention", "control", "model", "demonstrations")
def shuffled_context(bench: Bench, indices: Sequence[int]) -> list[State]:
    """Demonstrations whose outputs have changed places, in full attention."""
    return bench.whole([bench.context(shuffled(bench.episodes[i], bench.seed, i)) for i in indices])


@method("prefix file", "ours", "model", "prefixes")
def stored_prefix(bench: Bench, indices: Sequence[int]) -> list[State]:
    """A prefix file of the episode's task: compressed earlier, tuned, or made by anything else."""
    states = []
    for i in indices:
        path = bench.prefixes / f"{bench.episodes[i].task}.safetensors"
        loaded = Prefix.load(path, bench.reader.identity)
        loaded.check_format(bench.encoder.format, str(path))
        states.append(State(loaded, loaded.manifest.context_tokens or 0 if loaded.manifest else 0, loaded.rows))
    return states
