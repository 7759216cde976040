"""`hyperllama compress` and `compose`: files of examples into prefix files or a store."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Literal, Self

from hyperllama.base.distributed import processes
from hyperllama.data.episode import tell_twice
from hyperllama.data.text import ContextIds, Encoder
from hyperllama.errors import UserError
from hyperllama.files import check_output
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.config import check_gists, read_config
from hyperllama.hypernetworks.hub import fetch
from hyperllama.hypernetworks.loading import is_base, load_maker, untrained
from hyperllama.hypernetworks.registry import KINDS
from hyperllama.inference.many import Maker, Shown, Summary, compress_into, fitting, shown_of, task_files
from hyperllama.inference.quality import fewest_gists, leave_one_out
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix, is_prefix
from hyperllama.prefixes.store import PrefixStore
from hyperllama.tuning.refiners import refining
from hyperllama.tuning.refining import Refiner
from hyperllama.tuning.self_study import SelfStudy

ROWS = 16  # of a prefix that is made without a hypernetwork, unless given
REFINED_TOKENS = 2048  # of a pass into a store: what is refined takes long, and is written after each pass


@dataclass(frozen=True)
class Compressor:
    """What a run, a hypernetwork's or a base model, makes prefixes with: loaded once, for any number of tasks."""

    run: str | Path
    hypernetwork: Hypernetwork
    encoder: Encoder
    reader: Reader

    @classmethod
    def load(
        cls,
        run: str | Path,
        base_path: str | None = None,
        *,
        gists: int = ROWS,
        dtype: str | None = None,
        check_base: bool = False,
    ) -> Self:
        """See `load_maker`."""
        hypernetwork, encoder = load_maker(run, base_path, gists=gists, dtype=dtype, check_base=check_base)
        return cls(run, hypernetwork, encoder, Reader(hypernetwork.base, encoder.tokenizer))

    @property
    def made_by(self) -> str | Path | None:
        """The run, as manifests name it; None if it is a base, of whose rows prefixes are made as they are."""
        return None if is_base(self.run) else self.run

    def of_gists(self, gists: int | None) -> Self:
        """The same for prefixes of `gists` gists: of a base as many rows are chosen anew, as if it were loaded for them."""
        if gists is None or self.made_by is not None:
            return self
        base, tokenizer = self.reader.model, self.encoder.tokenizer
        limits = replace(self.encoder.limits, context_tokens=base.config.max_position_embeddings - gists)
        return replace(self, hypernetwork=untrained(base, gists, tokenizer), encoder=self.encoder.within(limits))

    def refiner(self, steps: int, on: str = "answers", **settings) -> Refiner | SelfStudy | None:
        """What refines for at most `steps` steps (see `hyperllama.tuning.refiners`); None for no steps."""
        parts = (self.hypernetwork, self.reader, self.encoder)
        return refining(on, *parts, steps, **settings) if steps else None

    def fitting(self, shown: Shown, refiner: Refiner | SelfStudy | None = None) -> tuple[ContextIds, Manifest]:
        """The context of `shown` and the manifest of its prefix; UserError for what cannot be compressed."""
        return fitting(shown, self.hypernetwork, self.encoder, self.made_by, refiner)


def compress(
    run: str | Path,
    files: Sequence[str | Path],
    output: str | Path,
    *,
    instruction: str | None = None,
    shots: int | None = None,
    base_path: str | None = None,
    dtype: str | None = None,
    report: bool = False,
    gists: int | None = None,
    budget: float | None = None,
    refine: int = 0,
    refine_on: Literal["answers", "context"] = "answers",
    check_base: bool = False,
    overwrite: bool = False,
) -> list[tuple[Path, Prefix]]:
    """Compress files of examples, each one task, into prefix files. Returns their paths and prefixes.

    `run` is a hypernetwork's, or a base model, from which rows are taken as they are (see `untrained`). Of JSON lines all
    examples are shown, of an S-NI task its positive examples; `shots` keeps the first K. `instruction`
    replaces that of the file. `output` is a folder if there are several files, if it exists as one, or ends in a slash.
    `report` measures each prefix on held-back examples (see `leave_one_out`) and keeps the figures in its manifest.
    An elastic hypernetwork makes prefixes of `gists` gists, or of the fewest that cost at most `budget` nats a token.
    `refine` tunes prefixes for at most so many steps on what `refine_on` says (`hyperllama.tuning.refiners`), and keeps what is
    better by what was held back; `report` measures what was made before.
    `check_base` compares all weights of the base with those of the training. A prefix file may be replaced, another file only
    with `overwrite`. Raises UserError for what cannot be compressed, named by its file, before anything is written.
    """
    shown = [shown_of(file, shots=shots, instruction=instruction) for file in task_files(files)]
    paths = _output_paths(output, [one.task for one in shown])
    for path in paths:
        check_output(path, reads=[one.where for one in shown], ours=is_prefix, overwrite=overwrite)
    _check_shown(shown, 2 if report or budget is not None else 0)
    check_maker(run, gists if budget is None else 1, refine)
    made_with = Compressor.load(run, base_path, gists=gists or ROWS, dtype=dtype, check_base=check_base)
    hypernetwork, refiner = made_with.hypernetwork, made_with.refiner(refine, refine_on)
    contexts, manifests = zip(*(made_with.fitting(one, refiner) for one in shown))
    asked = [(hypernetwork, made_with.reader, made_with.encoder, one.instruction, one.demonstrations) for one in shown]
    counts = [gists if budget is None else fewest_gists(*one, budget=budget) for one in asked]
    if report:
        measured = [leave_one_out(*one, gists=count) for one, count in zip(asked, counts, strict=True)]
        manifests = [replace(manifest, metrics=quality) for manifest, quality in zip(manifests, measured)]
    made = _in_passes(refiner or hypernetwork, contexts, manifests, counts)
    for path, prefix in zip(paths, made, strict=True):
        prefix.save(path)
    return list(zip(paths, made))


def told_refined(manifest: Manifest) -> str:
    """What refining did to a prefix, by its manifest, as part of a sentence; nothing if it was not refined."""
    if not manifest.refined:
        return ""
    metrics = manifest.metrics
    if "divergence_refined" in metrics:
        before, after = (f"{metrics[name]:.3f}" for name in ("divergence_unrefined", "divergence_refined"))
        kept = f"refined for {metrics['refined_steps']} steps"
        return f"{kept}: {after} nats a token from what the model says with its whole context, not {before}"
    if not metrics["held_back"]:
        return "not refined: of one example nothing can be held back"
    before, after = (f"{metrics[name]:.2f}" for name in ("loss_unrefined", "loss_refined"))
    if not metrics["refined_steps"]:
        return f"refining does not help (held-back examples cost {before} nats a token), so it is left as it was"
    return f"refined for {metrics['refined_steps']} steps: held-back examples cost {after} nats a token, not {before}"


def _check_shown(shown: Sequence[Shown], fewest: int) -> None:
    """Say what stands twice; UserError for a task of fewer demonstrations than a report needs."""
    for one in shown:
        if (count := len(one.demonstrations)) < fewest:
            raise UserError(f"{one.where}: has {count} different inputs, but a report holds one back and needs another")
    tell_twice({one.where: one.repetition for one in shown})


def check_maker(run: str | Path, gists: int | None, refine: int) -> None:
    """UserError if a run makes no prefixes, not of so many gists, or none that can be refined."""
    if refine < 0:
        raise UserError(f"--refine: steps of tuning, 0 or more, not {refine}")
    if is_base(run):
        return
    config = read_config(fetch(run))
    check_gists(run, config, gists)
    if refine and config["kind"] in KINDS and KINDS[config["kind"]].makes_modules:
        raise UserError(f"{run}: makes task modules, which prefix tuning does not know; leave --refine out")


def _in_passes(
    maker: Hypernetwork | Maker, contexts: Sequence[list[int]], manifests: Sequence[Manifest], counts: Sequence[int | None]
) -> list[Prefix]:
    """A prefix of each context with its own number of gists, in a pass for each of these numbers."""
    prefixes: dict[int, Prefix] = {}
    for count in dict.fromkeys(counts):
        own = [i for i, n in enumerate(counts) if n == count]
        made = maker.compress([contexts[i] for i in own], [manifests[i] for i in own], gists=count)
        prefixes |= dict(zip(own, made, strict=True))
    return [prefixes[i] for i in range(len(contexts))]


def compress_to_store(
    run: str | Path,
    files: Sequence[str | Path],
    store: str | Path,
    *,
    instruction: str | None = None,
    shots: int | None = None,
    base_path: str | None = None,
    dtype: str | None = None,
    refine: int = 0,
    refine_on: Literal["answers", "context"] = "answers",
    check_base: bool = False,
    batch_tokens: int | None = None,
) -> Summary:
    """Compress many files, or folders of them, into a store; what is there already is not compressed again.

    `run`, `refine` and `refine_on` as in `compress`. A pass has at most `batch_tokens`, or
    `hyperllama.inference.many.pass_tokens`. Ranks (torchrun, or RANK and WORLD_SIZE set by hand) take every n-th task.
    """
    tasks = task_files(files)
    check_maker(run, None, refine)  # a store is not made for a run that is none
    place = PrefixStore(store)
    made_with = Compressor.load(run, base_path, dtype=dtype, check_base=check_base)
    maker = made_with.refiner(refine, refine_on)
    if refine:
        batch_tokens = min(batch_tokens or REFINED_TOKENS, REFINED_TOKENS)
    ranks = {"rank": int(os.environ.get("RANK", 0)), "ranks": processes()}
    settings = {
        "run": made_with.made_by,
        "shots": shots,
        "instruction": instruction,
        "progress": partial(print, file=sys.stderr),
        **ranks,
    }
    with place.writing():
        parts = (place, made_with.hypernetwork, made_with.encoder)
        return compress_into(*parts, tasks, batch_tokens=batch_tokens, maker=maker, **settings)


def compose(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    gists: int | None = None,
    quantize: Literal["int8"] | None = None,
    overwrite: bool = False,
) -> tuple[Prefix, dict[str, float]]:
    """Put prefixes of one base one after the other into a new file; `gists` keeps the first so many of each.

    The file may replace another prefix that is not read, any other file only with `overwrite`. Returns the prefix, and what
    `quantize` loses (see `Prefix.save`).
    """
    check_output(output, reads=paths, ours=is_prefix, overwrite=overwrite)
    parts = []
    for path in paths:
        part = Prefix.load(path)
        try:
            parts.append(part if gists is None else part.truncate(gists))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    joined = reduce(Prefix.concat, parts)
    return joined, joined.save(output, quantize=quantize)


def _output_paths(output: str | Path, names: list[str]) -> list[Path]:
    if not str(output):
        raise UserError("--output: is empty; give a prefix file, or a folder for several")
    path = Path(output)
    if (path / "config.json").is_file():
        raise UserError(f"{output}: holds a model; give another folder for prefixes")
    if len(names) == 1 and not path.is_dir() and not str(output).endswith(os.sep):
        return [path]
    if path.is_file():
        raise UserError(f"{output}: a file, but several prefixes need a folder")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"two files are named {', '.join(twice)}: their prefixes would overwrite each other; compress them one by one"
        )
    return [path / f"{name}.safetensors" for name in names]
