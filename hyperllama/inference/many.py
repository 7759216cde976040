"""From tasks to prefixes: which part of a task is compressed, what its manifest says, and many tasks into a store.

Many tasks are compressed in packed passes. Tasks are read one after the other. A window of them is sorted by length and cut
into passes by tokens, and the prefixes of a pass are written before the next pass begins, so memory does not grow with the
number of tasks. A prefix that the store has is not made again, so a stopped run goes on when it is started again, with any
number of ranks.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch

from attention_masks import GistLayout
from hyperllama.base.identity import BaseIdentity
from hyperllama.data.episode import Example, Task, said_twice
from hyperllama.data.grouping import in_groups
from hyperllama.data.sni import read_task
from hyperllama.data.text import ContextIds, Encoder
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import written
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.prefixes.manifest import Manifest, context_sha256
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.store import PrefixStore

TASK_FILES = (".json", ".jsonl")
# A window of so many passes is sorted by length; the prefixes of a pass, at most so many, are in memory together.
WINDOW, PASS_TASKS = 8, 256
PROGRESS_SECONDS = 5
Context = tuple[ContextIds, Manifest]


class Maker(Protocol):
    """What makes prefixes in place of a hypernetwork; `settings` are how, beside the hypernetwork's own."""

    settings: dict

    def compress(
        self, contexts: Sequence[ContextIds], manifests: Sequence[Manifest], *, gists: int | None = None
    ) -> list[Prefix]:
        """As `Hypernetwork.compress`."""


@dataclass(frozen=True)
class Shown:
    """The part of a task that is compressed, as text. Errors begin with `where`, a file or the task's name."""

    where: str
    task: str
    instruction: str
    demonstrations: tuple[Example, ...]
    repetition: tuple[int, int] = (0, 0)

    def encode(self, encoder: Encoder, base: BaseIdentity, run: str | Path | None) -> tuple[ContextIds, Manifest]:
        """Token ids of the context, and the manifest of the prefix that the hypernetwork of `run` makes of them for `base`.

        Demonstrations that do not fit are left out whole and counted in the manifest. Raises UserError if none fits, or the
        instruction alone does not.
        """
        try:
            context, answers = encoder.context(self.instruction, self.demonstrations)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None
        if not context:
            raise UserError(f"{self.where}: nothing to compress, its instruction and demonstrations have no tokens")
        if self.demonstrations and not answers:
            raise UserError(
                f"{self.where}: none of its {len(self.demonstrations)} demonstrations fits into "
                f"context_tokens={encoder.limits.context_tokens}; give shorter ones, or train with a higher limit"
            )
        return context, Manifest(
            base=base,
            hypernetwork=None if run is None else written(run),
            task=self.task,
            instruction=self.instruction or None,
            examples=len(answers),
            dropped_examples=len(self.demonstrations) - len(answers),
            text_format=dataclasses.asdict(encoder.format),
        )


def shown_of(task: Task | str | Path, *, shots: int | None = None, instruction: str | None = None) -> Shown:
    """The part of a task, or of a file that `read_task` reads, that is compressed. Needs no model and no tokenizer.

    A task's own demonstrations are shown, of one that has none its examples; `shots` keeps the first K. `instruction`
    replaces that of the task. Raises UserError, naming the file, if it cannot be read or has nothing to compress.
    """
    where = task.name if isinstance(task, Task) else str(task)
    task = task.distinct() if isinstance(task, Task) else read_task(task)
    text = task.instruction if instruction is None else instruction
    demonstrations = tuple((task.demonstrations or task.examples)[:shots])
    if not demonstrations and not text:
        raise UserError(f"{where}: nothing to compress, neither demonstrations nor an instruction")
    return Shown(where, task.name, text, demonstrations, task.repetition)


def task_files(paths: Sequence[str | Path]) -> list[Path]:
    """Files of tasks: those given, and of a folder its .json and .jsonl files by name. A file named twice counts once.

    Raises UserError for a folder without any. Whether a file can be read is found out when it is.
    """
    found = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.suffix in TASK_FILES and p.is_file()) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path}: a folder without .json or .jsonl files; give task files, or the folder that they are in")
        found += inside
    return list(dict.fromkeys(found))


@dataclass
class Summary:
    """What `compress_into` did: prefixes made, prefixes that were there already, and a sentence for each task that failed."""

    made: int = 0
    there: int = 0
    failed: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    repetition: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Tasks that were dealt with, in one way or another."""
        return self.made + self.there + len(self.failed)

    def count(self, contexts: Sequence[ContextIds]) -> None:
        """Count those that were compressed."""
        self.made += len(contexts)
        self.tokens += sum(map(len, contexts))

    def __str__(self) -> str:
        speed = f", {self.made / self.seconds:.1f} tasks/s" if self.made and self.seconds else ""
        return f"{self.made} made ({self.tokens:,} tokens{speed}), {self.there} were there, {len(self.failed)} failed"


def compress_into(
    store: PrefixStore,
    hypernetwork: Hypernetwork,
    encoder: Encoder,
    tasks: Iterable[Task | str | Path],
    *,
    run: str | Path | None,
    batch_tokens: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    shots: int | None = None,
    instruction: str | None = None,
    maker: Maker | None = None,
    progress: Callable[[str], object] = print,
) -> Summary:
    """Compress tasks, or files of tasks, into a store, in packed passes of at most `batch_tokens` tokens and gists.

    These are `pass_tokens` unless given. A task whose context this hypernetwork has already compressed for this base is
    skipped. This rank takes every `ranks`-th task, so all ranks must be given the same tasks in the same order. `maker` makes
    prefixes in place of the hypernetwork. `progress` gets a line every few seconds and in the end. A task that cannot be read,
    leaves nothing to compress or is longer than the model does not stop the others: it is in the summary's `failed`. Raises
    UserError for settings that make no sense, OSError when the disk refuses.
    """
    batch_tokens = pass_tokens(hypernetwork.base.device) if batch_tokens is None else batch_tokens
    if not 0 <= rank < ranks or batch_tokens < 1:
        raise UserError(f"rank {rank} of {ranks} ranks with batch_tokens={batch_tokens}: count ranks from 0, and tokens from 1")
    total, summary = f" of {len(range(rank, len(tasks), ranks))}" if isinstance(tasks, Sized) else "", Summary()
    tell = _Teller(lambda: progress(f"{store.folder}: {summary.done}{total} tasks: {summary}"), summary)

    def remembered(task: Task | str | Path) -> Shown:
        shown = shown_of(task, shots=shots, instruction=instruction)
        summary.repetition[shown.where] = shown.repetition
        return shown

    new = _new_contexts(
        islice(tasks, rank, None, ranks),
        lambda task: fitting(remembered(task), hypernetwork, encoder, run, maker),
        lambda manifest: store.path_of(manifest) if not store.remember(manifest, rank=rank) else None,
        hypernetwork.fingerprint(),
        tell,
    )
    for contexts, manifests in (zip(*batch) for batch in passes(new, hypernetwork.num_gists, batch_tokens)):
        store.add_all((maker or hypernetwork).compress(contexts, manifests), rank=rank)
        summary.count(contexts)
        tell()
    tell(silence=0)
    if twice := said_twice(summary.repetition):
        progress(twice)
    return summary


class _Teller:
    """Calls `say` every few seconds, and keeps a summary's seconds."""

    def __init__(self, say: Callable[[], object], summary: Summary):
        self.say, self.summary = say, summary
        self.start = self.told = time.perf_counter()

    def __call__(self, silence: float = PROGRESS_SECONDS) -> None:
        now = time.perf_counter()
        if now - self.told >= silence:
            self.told, self.summary.seconds = now, now - self.start
            self.say()


def _new_contexts(
    tasks: Iterable[Task | str | Path],
    fitting: Callable[[Task | str | Path], Context],
    missing: Callable[[Manifest], Path | None],
    fingerprint: str,
    tell: _Teller,
) -> Iterator[Context]:
    """Contexts of tasks, by `fitting`, that a store lacks: `missing` says where their prefix will be; the rest is counted."""
    summary, taken = tell.summary, set()
    for task in tasks:
        tell()
        try:
            context, manifest = fitting(task)
        except UserError as error:
            summary.failed.append(str(error))
            continue
        except Exception as error:  # a file of another form can fail anywhere, and the others are not to blame
            where = task.name if isinstance(task, Task) else task
            summary.failed.append(f"{where}: cannot be read as a task ({type(error).__name__}: {in_one_line(error)})")
            continue
        hashes = {"context_sha256": context_sha256(context), "hypernetwork_sha256": fingerprint}
        manifest = dataclasses.replace(manifest, **hashes)
        path = missing(manifest)
        if path is None or path in taken:
            summary.there += 1
            continue
        taken.add(path)  # the store does not know of it until its pass is written
        yield context, manifest


def fitting(
    shown: Shown,
    hypernetwork: Hypernetwork,
    encoder: Encoder,
    run: str | Path | None,
    maker: Maker | None = None,
) -> Context:
    """The context of `shown` and its manifest; UserError, named by its file, for one that the model has no positions for."""
    context, manifest = shown.encode(encoder, hypernetwork.identity, run)
    manifest = manifest if maker is None else dataclasses.replace(manifest, refined=maker.settings)
    layout, positions = GistLayout(hypernetwork.cut(context)[1]), hypernetwork.base.config.max_position_embeddings
    if layout.last_position >= positions:
        raise UserError(
            f"{shown.where}: takes {len(context)} tokens and {hypernetwork.num_gists} gists, but the model has {positions} "
            "positions; show fewer or shorter examples"
        )
    return context, manifest


def pass_tokens(device: torch.device) -> int:
    """Tokens of a pass unless told: on a CPU few, so that what norms and sums go through stays in its cache."""
    return 2048 if device.type == "cpu" else 16384


def passes(contexts: Iterable[Context], gists: int, batch_tokens: int) -> Iterator[list[Context]]:
    """Contexts of like length, with their gists no more than `batch_tokens` together, or one alone."""
    contexts = iter(contexts)
    while window := list(_window(contexts, gists, WINDOW * batch_tokens)):
        # The longest first: what does not fit into memory fails at once, not in the end.
        window.sort(key=lambda context: len(context[0]), reverse=True)
        yield from in_groups(window, lambda context: (len(context[0]) + gists, 1), (batch_tokens, PASS_TASKS))


def _window(contexts: Iterator[Context], gists: int, most: int) -> Iterator[Context]:
    tokens = 0
    for count, context in enumerate(contexts, 1):
        yield context
        tokens += len(context[0]) + gists
        if tokens >= most or count == WINDOW * PASS_TASKS:
            return
