"""What every method of an evaluation has: a bench to work on, the state that it leaves, and the table that it is in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from hyperllama.data.episode import Episode
from hyperllama.data.grouping import in_groups
from hyperllama.data.text import Encoder
from hyperllama.errors import UserError
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.loading import untrained
from hyperllama.hypernetworks.pooling import PoolingHypernetwork
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix
from hyperllama.tuning.refiners import refining

Role = Literal["ours", "context", "budget", "control", "copy"]

PREFIXES = 512  # that are kept for other methods and later episodes


@dataclass(frozen=True)
class State:
    """What queries of one episode read (None: nothing), and the tokens that were read to make it.

    `gists` says how many gist rows were computed beside them, 0 for plain full attention; `demonstrations` how many fitted;
    `maker` which hypernetwork made it, if that was here; `tuned` the tokens, and the targets among them, that it was tuned on.
    """

    prefix: Prefix | None
    tokens: int
    gists: int = 0
    demonstrations: int = 0
    maker: Hypernetwork | None = None
    tuned: tuple[int, int] = (0, 0)


@dataclass
class Bench:
    """The models, the episodes of an evaluation, and what methods share about them.

    `gists` is how many the hypernetwork makes, `budget` the number of key-value rows that a compressed context may have,
    `refine` for how many steps prefixes are refined, and `refine_on` on what. `methods` names those that will be run, as far as
    is known: what two of them need comes from one pass.
    """

    episodes: Sequence[Episode]
    encoder: Encoder | None = None
    reader: Reader | None = None
    hypernetwork: Hypernetwork | None = None
    multi_task: Reader | None = None
    prefixes: Path | None = None
    gists: int | None = None
    budget: int | None = None
    refine: int = 0
    refine_on: str = "answers"
    seed: int = 0
    batch_tokens: int = 8192
    methods: Sequence[str] = ()
    _whole: dict = dataclasses.field(default_factory=dict)
    _made: dict = dataclasses.field(default_factory=dict)

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

    def whole(self, contexts: Sequence[Sequence[int]], reader: Reader | None = None, *, choose: bool = False) -> list[State]:
        """States of full attention over contexts; an empty one reads nothing. Those of the last call are kept for the next.

        With `choose` the most attended rows of contexts that have more than the budget are kept too, for `compressed`.
        """
        if choose:
            self._choose([context for context in contexts if len(context) > self.budget])
        reader = reader or self.reader
        keys = [(id(reader), tuple(context)) for context in contexts]
        new = [key for key in dict.fromkeys(keys) if key not in self._whole and key[1]]
        made = reader.encode([key[1] for key in new], batch_tokens=self.batch_tokens)
        self._whole.update(zip(new, made, strict=True))
        return [State(self._whole.get(key), len(key[1])) for key in keys]

    def _choose(self, contexts: Sequence[Sequence[int]]) -> None:
        """Keep both of contexts that are not known yet: the states of full attention, and the most attended of them."""
        new = {(id(self.reader), tuple(context)): context for context in contexts}
        new = [context for key, context in new.items() if key not in self._whole]
        for batch in in_groups(new, lambda context: (len(context),), (self.batch_tokens,)):
            for context, (chosen, whole) in zip(batch, self.chooser.compress_and_keep(batch), strict=True):
                self._whole[id(self.reader), tuple(context)] = whole
                self._made[id(self.chooser), tuple(context), getattr(context, "ends", ())] = chosen

    def compressed(self, contexts: Sequence[list[int]], maker: Hypernetwork | None = None) -> list[State]:
        """States of prefixes by the hypernetwork, or by another `maker`, in passes of at most `batch_tokens` tokens.

        The last ones that were made are kept: one task's prefix is another's control.
        """
        maker, gists = (self.hypernetwork, self.gists) if maker is None else (maker, None)
        keys = [(id(maker), tuple(context), getattr(context, "ends", ())) for context in contexts]
        own = dict(zip(keys, contexts, strict=True))
        new = [context for key, context in own.items() if key not in self._made]
        batches = in_groups(new, lambda context: (len(context) + self.budget,), (self.batch_tokens,))
        made = [prefix for batch in batches for prefix in maker.compress(batch, gists=gists)]
        self._made.update(zip([key for key in own if key not in self._made], made, strict=True))
        states = [State(self._made[key], len(key[1]), self._made[key].rows, maker=maker) for key in keys]
        for key in list(self._made)[: max(0, len(self._made) - PREFIXES)]:
            del self._made[key]
        return states

    def refined(self, indices: Sequence[int], maker: Hypernetwork, gists: int | None = None) -> list[State]:
        """States of what `maker` makes of episodes, refined on their own contexts."""
        models = (maker, self.reader, self.encoder)
        refiner = refining(self.refine_on, *models, self.refine, batch_tokens=self.batch_tokens)
        episodes = [self.episodes[i] for i in indices]
        contexts = [self.context(episode) for episode in episodes]
        manifests = [Manifest(base=self.reader.identity, instruction=episode.instruction or None) for episode in episodes]
        made = refiner.compress(contexts, manifests, gists=gists)
        return [
            State(prefix, len(context), prefix.rows, maker=maker, tuned=tuple(prefix.manifest.metrics["tuned_on"]))
            for prefix, context in zip(made, contexts, strict=True)
        ]

    @cached_property
    def chooser(self) -> PoolingHypernetwork:
        """Untrained, it keeps tokens as they are, as many as the budget: those that the second half of a context attends to."""
        return untrained(self.reader.model, self.budget, self.reader.tokenizer)

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
    "refine": "refine, for how many steps, and data with demonstrations unless refine_on is context",
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
