"""Methods: what stands before a query. A new one is one function of a bench and some episodes.

Every method leaves a `State`: the prefix that queries of an episode read, and what it took to make. Full attention is a
prefix that keeps every token, so all methods are read by the same code; a method for text may also answer by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Literal

from hyperllama.base.decoder import inverse_frequencies
from hyperllama.data.episode import Episode, Example
from hyperllama.data.text import Encoder, Limits
from hyperllama.errors import UserError
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.pooling import PoolingHypernetwork
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.rows import last_rows, mean_pooled

Role = Literal["ours", "context", "budget", "control", "copy"]


@dataclass(frozen=True)
class State:
    """What queries of one episode read (None: nothing), and the tokens that were read to make it.

    `gists` says how many gist rows were computed beside them, 0 for plain full attention; `demonstrations` how many fitted;
    `maker` which hypernetwork made it, if that was here.
    """

    prefix: Prefix | None
    tokens: int
    gists: int = 0
    demonstrations: int = 0
    maker: Hypernetwork | None = None


@dataclass
class Bench:
    """The models, the episodes of an evaluation, and what methods share about them.

    `gists` is how many the hypernetwork makes, `budget` the number of key-value rows that a compressed context may have.
    """

    episodes: Sequence[Episode]
    encoder: Encoder | None = None
    reader: Reader | None = None
    hypernetwork: Hypernetwork | None = None
    multi_task: Reader | None = None
    prefixes: Path | None = None
    gists: int | None = None
    budget: int | None = None
    seed: int = 0
    batch_tokens: int = 8192
    _whole: dict = dataclasses.field(default_factory=dict)

    def context(self, episode: Episode) -> list[int]:
        """Token ids of an episode's context under the text format and its limits."""
        if episode.window is not None:
            return list(self.encoder.encode(episode).context)
        return self.encoder.context(episode.instruction, episode.demonstrations)[0]

    def partner(self, i: int) -> int:
        """The next episode of another category, or where all are of one, of another task; ValueError where there is none."""
        n, own = len(self.episodes), self.episodes[i]
        others = [(i + offset) % n for offset in range(1, n)]
        for key in ("category", "task"):
            for j in others:
                if getattr(self.episodes[j], key) != getattr(own, key):
                    return j
        raise ValueError("an evaluation of a single task has no other task's context")

    def whole(self, contexts: Sequence[Sequence[int]], reader: Reader | None = None) -> list[State]:
        """States of full attention over contexts; an empty one reads nothing. Those of the last call are kept for the next."""
        reader = reader or self.reader
        keys = [(id(reader), tuple(context)) for context in contexts]
        new = [key for key in dict.fromkeys(keys) if key not in self._whole and key[1]]
        made = reader.encode([key[1] for key in new], batch_tokens=self.batch_tokens)
        self._whole.update(zip(new, made, strict=True))
        return [State(self._whole.get(key), len(key[1])) for key in keys]

    def compressed(self, contexts: Sequence[list[int]], maker: Hypernetwork | None = None) -> list[State]:
        """States of prefixes by the hypernetwork, or by another `maker`, in passes of at most `batch_tokens` tokens."""
        maker, gists = (self.hypernetwork, self.gists) if maker is None else (maker, None)
        prefixes: list[Prefix] = []
        batch: list[list[int]] = []
        for context in contexts:
            if batch and sum(len(c) + self.budget for c in batch) + len(context) > self.batch_tokens:
                prefixes += maker.compress(batch, gists=gists)
                batch = []
            batch.append(context)
        prefixes += maker.compress(batch, gists=gists) if batch else []
        pairs = zip(prefixes, contexts, strict=True)
        return [State(prefix, len(context), prefix.rows, maker=maker) for prefix, context in pairs]

    @cached_property
    def chooser(self) -> PoolingHypernetwork:
        """Untrained, it keeps tokens as they are, as many as the budget: those that the second half of a context attends to."""
        settings = {"attended": 0.5, "sharpness": 1e4, "tokenizer": self.reader.tokenizer}
        return PoolingHypernetwork(self.reader.model, gists=self.budget, **settings)

    def forget(self) -> None:
        """Let go of the states that are kept: the next episodes are others."""
        self._whole.clear()


# What a method may need, by the name under which `Method.needs` has it: in words, for those who lack it.
NEEDS = {
    "model": "model, or a hypernetwork with its base",
    "hypernetwork": "hypernetwork, the folder of a run",
    "chunks": "hypernetwork, the folder of a run that reads contexts in chunks (gist.chunking)",
    "multi_task": "multi_task, the run of a full-attention model",
    "prefixes": "prefixes, a folder of prefix files",
    "budget": "budget, or a hypernetwork whose gists are one",
    "instructions": "data whose tasks have instructions",
    "demonstrations": "data with demonstrations",
    "other_tasks": "data of at least two tasks",
    "answers": "queries with answers in text (metric text)",
}


def instruction_fits(encoder: Encoder, episode: Episode) -> bool:
    """Whether an episode's instruction alone is within the limits of a context."""
    try:
        encoder.context(episode.instruction, ())
    except UserError:
        return False
    return True


def found_in(episodes: Sequence[Episode]) -> set[str]:
    """Which of `NEEDS` the episodes of an evaluation meet."""
    there = {
        "instructions": any(episode.instruction for episode in episodes),
        "demonstrations": any(episode.demonstrations for episode in episodes),
        "other_tasks": len({episode.task for episode in episodes}) > 1,
    }
    return {name for name, holds in there.items() if holds}


@dataclass(frozen=True)
class Method:
    """A method by name: its `label` for people, what it `needs` (see `NEEDS`), the `role` it plays in a comparison."""

    name: str
    label: str
    role: Role
    needs: tuple[str, ...]
    run: Callable[[Bench, Sequence[int]], list]

    @property
    def what(self) -> str:
        """What the method does, in a sentence or two."""
        return " ".join(self.run.__doc__.split())

    @property
    def answers(self) -> bool:
        """Whether the method answers by itself, without a model."""
        return self.role == "copy"


METHODS: dict[str, Method] = {}


def method(label: str, role: Role, *needs: str):
    """Register a function (bench, indices of episodes) -> a State for each, or with role "copy" the answers to its queries."""

    def register(run):
        METHODS[run.__name__] = Method(run.__name__, label, role, needs, run)
        return run

    return register


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
    return bench.whole([bench.context(bench.episodes[i]) for i in indices])


@method("multi-task model, full attention", "context", "multi_task")
def multi_task(bench: Bench, indices: Sequence[int]) -> list[State]:
    """Everything in full attention, read by a model that was trained on such episodes with all of its weights."""
    return bench.whole([bench.context(bench.episodes[i]) for i in indices], bench.multi_task)


@method("fewer demonstrations, same memory", "budget", "model", "budget")
def fewer_demonstrations(bench: Bench, indices: Sequence[int]) -> list[State]:
    """As many whole demonstrations as fit into the budget in full attention, behind the instruction if that fits too.

    Of plain text, its last tokens.
    """
    tight = Encoder(bench.encoder.tokenizer, bench.encoder.format, Limits(context_tokens=bench.budget))
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


@method("the prefix", "ours", "model", "hypernetwork")
def prefix(bench: Bench, indices: Sequence[int]) -> list[State]:
    """The prefix that the hypernetwork makes of instruction and demonstrations."""
    return bench.compressed([bench.context(bench.episodes[i]) for i in indices])


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

    Which words there are stays as it was, and may tell something: in the synthetic language a guess among the symbols that are
    named. What the prefix is better by, it owes to which word belongs to which.
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
        loaded = Prefix.load(bench.prefixes / f"{bench.episodes[i].task}.safetensors", bench.reader.identity)
        states.append(State(loaded, loaded.manifest.context_tokens or 0 if loaded.manifest else 0, loaded.rows))
    return states


@method("copy the input", "copy", "answers")
def copy_input(bench: Bench, indices: Sequence[int]) -> list[list[str]]:
    """The input itself as its answer."""
    return [[query.input for query in bench.episodes[i].queries] for i in indices]


@method("copy the first demonstration's output", "copy", "answers", "demonstrations")
def copy_demonstration(bench: Bench, indices: Sequence[int]) -> list[list[str]]:
    """The output of the first demonstration as the answer to everything."""
    first = [bench.episodes[i].demonstrations[:1] for i in indices]
    return [[shown[0].output if shown else ""] * len(bench.episodes[i].queries) for shown, i in zip(first, indices)]


def shuffled(episode: Episode, seed: int, index: int) -> Episode:
    """The episode with the outputs of its demonstrations dealt out anew, so that as many as possible are wrong."""
    outputs = [(e.output, e.references) for e in episode.demonstrations]
    order = sorted(range(len(outputs)), key=lambda i: outputs[i][0])
    # Turned by the size of the largest class, no output meets its own class unless that has more than half of all.
    largest = max((sum(o == output for output, _ in outputs) for o, _ in outputs), default=0)
    Random(f"{seed}/{index}").shuffle(order)
    order.sort(key=lambda i: outputs[i][0])  # stable: at random within a class
    turned = order[largest:] + order[:largest]
    changed: list[Example] = list(episode.demonstrations)
    for place, source in zip(order, turned, strict=True):
        output, references = outputs[source]
        changed[place] = dataclasses.replace(episode.demonstrations[place], output=output, references=references)
    return dataclasses.replace(episode, demonstrations=tuple(changed))


def shuffled_words(text: str, rng: Random, draws: int = 100) -> str:
    """The words of a text in another order: that of `draws` orders which keeps the fewest pairs of neighbours."""
    words = text.split()
    neighbours = set(pairwise(words))
    orders = (rng.sample(words, len(words)) for _ in range(draws))
    return " ".join(min(orders, key=lambda order: sum(pair in neighbours for pair in pairwise(order))))
