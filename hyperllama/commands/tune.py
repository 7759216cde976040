"""`hyperllama tune`: prefix tuning from a recipe, of one task or several at once."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import NamedTuple

from transformers import TrainingArguments, set_seed

from hyperllama.base.decoder import rotary_settings
from hyperllama.base.distributed import processes
from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.commands.train import RESULT, begin, settings_of
from hyperllama.data.episode import Episode, Example, Source, fingerprint_of, merged, repetition_of, tell_twice
from hyperllama.data.packing import pack_gist, pack_taught
from hyperllama.data.stream import Collator
from hyperllama.data.text import ContextIds, Encoder, Limits, TextFormat
from hyperllama.errors import UserError
from hyperllama.files import plain_name, whole_json_lines, write_atomically, written
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.config import read_config
from hyperllama.hypernetworks.hub import fetch
from hyperllama.hypernetworks.loading import load_hypernetwork, untrained
from hyperllama.inference.reader import Reader
from hyperllama.inference.scoring import Question
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix
from hyperllama.recipe.loading import load_recipe
from hyperllama.recipe.schema import StartRecipe, TuneRecipe
from hyperllama.recipe.sources import make_source
from hyperllama.runs import digest_of, owned
from hyperllama.training.checkpoints import CHECKPOINTS, newest_checkpoint, settings_to_go_on
from hyperllama.training.trainer import GistTrainer, training_arguments
from hyperllama.tuning.curves import (
    CURVES,
    CURVES_PLOT,
    Curves,
    TuningStream,
    TuningTask,
    plot_curves,
    questions_of,
    score_tasks,
)
from hyperllama.tuning.prefix_tuner import PrefixTuner
from hyperllama.tuning.self_study import made_up
from hyperllama.tuning.starts import demonstrations_start, random_start, vocabulary_start

PREFIXES = "prefixes"


def tune(recipe_path: str | Path, overrides: Sequence[str] = ()) -> dict[str, tuple[Path, dict]] | None:
    """Tune prefixes as a recipe describes, or go on where the last run stopped.

    Returns task -> prefix file and what is known about it; None if that run had finished, and on all ranks but the first.
    Leaves in `output`: prefixes/TASK.safetensors (of each task the best by its validation examples), curves.jsonl and
    curves.png, metrics.jsonl, recipe.yaml, versions.json and checkpoints/.
    """
    recipe = load_recipe(recipe_path, overrides, schema=TuneRecipe)
    run, first = Path(recipe.output), int(os.environ.get("RANK", 0)) == 0
    _arguments(recipe, {})  # refused before anything is read or written
    with owned(run) if first else nullcontext():
        source = make_source(recipe.data)
        if first:
            tell_twice(repetition_of(source))
        return _tune(recipe, source) if begin(run, recipe, _facts(recipe, source)) else None


def _facts(recipe: TuneRecipe, source: Source) -> dict[str, str | None]:
    """Fingerprints of what a run is made from."""
    start, deepspeed = recipe.start, settings_of(recipe.deepspeed)
    base = recipe.model
    if base is None and start.hypernetwork:
        base = read_config(fetch(start.hypernetwork))["base"]["name"]
    of_start = {"hypernetwork": digest_of(start.hypernetwork), "start.prefix": digest_of(start.prefix)}
    return {"data": fingerprint_of(source), "base": digest_of(base), **of_start, "deepspeed": deepspeed}


def _arguments(recipe: TuneRecipe, settings: dict) -> TrainingArguments:
    defaults = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    of_run = {"run": recipe.output, "seed": recipe.seed, "deepspeed": recipe.deepspeed}
    return training_arguments({**defaults, **recipe.training, **settings}, **of_run)


def _tune(recipe: TuneRecipe, source: Source) -> dict[str, tuple[Path, dict]] | None:
    run, start = Path(recipe.output), recipe.start
    setting = prepare(recipe, source)
    tasks, reader = setting.tasks, setting.reader
    step = min(recipe.tasks_per_step or len(tasks), len(tasks))
    checkpoint = newest_checkpoint(run / CHECKPOINTS)
    settings = settings_to_go_on({**recipe.training, "per_device_train_batch_size": step}, checkpoint, processes())
    arguments = _arguments(recipe, settings)
    set_seed(recipe.seed)
    starts = make_starts(start, setting)
    tuner = PrefixTuner(reader.model, starts, hidden=start.hidden, tokenizer=reader.tokenizer)
    examples, length = recipe.examples_per_task, arguments.max_steps * step * arguments.gradient_accumulation_steps
    stream = TuningStream(tasks, examples=examples, seed=recipe.seed, length=length * arguments.world_size)
    pack = pack_taught if recipe.objective == "context" else pack_gist
    trainer = GistTrainer(tuner, arguments, stream, Collator(pack, tuner.rows), run)
    curves = Curves(tuner, reader, tasks, run, every=recipe.measure_every, patience=recipe.patience)
    trainer.add_callback(curves)
    result = trainer.go_on(checkpoint)
    results, made = curves.results(), {}
    if not arguments.should_save:
        return None
    plot_curves(whole_json_lines(run / CURVES), run / CURVES_PLOT)
    for name, (prefix, facts) in results.items():
        manifest = dataclasses.replace(starts[name].manifest, metrics={**starts[name].manifest.metrics, **facts})
        path = run / PREFIXES / f"{name}.safetensors"
        Prefix(prefix.keys, prefix.values, manifest).save(path)
        made[name] = (path, facts)
    write_atomically(run / RESULT, json.dumps({"steps": result.global_step, **result.metrics}, indent=2) + "\n")
    return made


@dataclass(frozen=True)
class Setting:
    """What a tuning recipe comes to: tasks with their episodes (of what is trained on) and contexts, and the models."""

    episodes: list[Episode]
    contexts: list[ContextIds]
    tasks: list[TuningTask]
    reader: Reader
    encoder: Encoder
    hypernetwork: Hypernetwork | None
    seed: int


def prepare(recipe: TuneRecipe, source: Source) -> Setting:
    """Draw the tasks and load the models of a recipe; with objective "context" the model makes up its passages here."""
    data, start = recipe.data, recipe.start
    drawn = source.evaluation(shots=data.shots, queries=data.queries, episodes=recipe.episodes, seed=recipe.seed)
    named, of_context = _named_apart(drawn), recipe.objective == "context"
    parts = [split(episode, 0.0 if of_context else recipe.validation, recipe.seed, windows=of_context) for episode in named]
    episodes = [dataclasses.replace(e, demonstrations=part.train) for e, part in zip(named, parts, strict=True)]
    hypernetwork, encoder = None, None
    if start.hypernetwork:
        hypernetwork, encoder = load_hypernetwork(start.hypernetwork, recipe.model, dtype=recipe.dtype)
        base, tokenizer = hypernetwork.base, encoder.tokenizer
    else:
        base, tokenizer = load_base(recipe.model, dtype=recipe.dtype or "float32"), load_tokenizer(recipe.model)
    text_format = recipe.format or (encoder.format if encoder else TextFormat())
    encoder = Encoder(tokenizer, text_format, recipe.limits or (encoder.limits if encoder else Limits()))
    reader, contexts = Reader(base, tokenizer), [_context(encoder, episode) for episode in episodes]
    tasks = [
        TuningTask(e.task, *(questions_of(encoder, examples) for examples in part))
        for e, part in zip(episodes, parts, strict=True)
    ]
    if of_context:
        made = made_up(reader, encoder, contexts, recipe.passages, seed=recipe.seed)
        asked = [task.test if e.window is None else (_of_window(encoder, e),) for e, task in zip(episodes, tasks, strict=True)]
        tasks = [
            _studying(episode.task, context, passages, test, recipe.validation)
            for episode, context, passages, test in zip(episodes, contexts, made, asked, strict=True)
        ]
    return Setting(episodes, contexts, tasks, reader, encoder, hypernetwork, recipe.seed)


def _context(encoder: Encoder, episode: Episode) -> ContextIds:
    if episode.window is not None:
        return ContextIds(encoder.encode(episode).context)
    return encoder.context(episode.instruction, episode.demonstrations)[0]


def _of_window(encoder: Encoder, episode: Episode) -> Question:
    """What follows a window's context, as a question."""
    queries = encoder.encode(episode).queries
    if not queries:
        raise UserError(f"task {episode.task}: its window of text is too short; choose longer texts")
    return Question(queries[0][0], (queries[0][1],))


def _studying(
    name: str, context: ContextIds, passages: Sequence[Question], test: tuple[Question, ...], validation: float
) -> TuningTask:
    """A task of passages that the model has made up behind a context, a share of them to stop by."""
    if len(passages) < 2:
        raise UserError(f"task {name}: the model made up {len(passages)} different passages; raise passages.count or tokens")
    held_back = min(len(passages) - 1, math.floor(validation * len(passages)))
    return TuningTask(name, tuple(passages[held_back:]), tuple(passages[:held_back]), test, tuple(context))


def full_attention(recipe_path: str | Path, overrides: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """What each task of a tuning recipe reaches on its test examples with what is trained on in full attention instead."""
    recipe = load_recipe(recipe_path, overrides, schema=TuneRecipe)
    setting = prepare(recipe, make_source(recipe.data))
    whole = setting.reader.encode(setting.contexts)
    scored = score_tasks(setting.reader, whole, [task.test for task in setting.tasks])
    named = zip(setting.tasks, scored, strict=True)
    return {task.name: {f"test_{name}": value for name, value in scores.items()} for task, scores in named}


class Split(NamedTuple):
    """The examples of a task: to train on, to stop by, and to report on."""

    train: tuple[Example, ...] = ()
    validation: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()


def split(episode: Episode, validation: float, seed: int, *, windows: bool = False) -> Split:
    """An episode's demonstrations to train on, a share of them to stop by, its queries to report on.

    At least one demonstration is trained on; with fewer than four nothing is held back. Equal inputs are one example. Windows
    of plain text, which have no examples, are a UserError unless `windows`.
    """
    if windows and episode.window is not None:
        return Split()
    if episode.window is not None or not episode.demonstrations:
        raise UserError(f"task {episode.task}: has no examples to tune a prefix on; raise data.shots, or choose other data")
    shown = list(merged(episode.demonstrations)[0])
    known = {example.key for example in shown}
    Random(f"{seed}/{episode.task}").shuffle(shown)
    held_back = math.floor(validation * len(shown)) if len(shown) >= 4 else 0
    asked = tuple(query for query in episode.queries if query.key not in known)
    return Split(tuple(shown[held_back:]), tuple(shown[:held_back]), asked)


def make_starts(start: StartRecipe, setting: Setting) -> dict[str, Prefix]:
    """The prefix that each task starts from, by name, with a manifest that says so."""
    reader, encoder, hypernetwork, episodes = setting.reader, setting.encoder, setting.hypernetwork, setting.episodes
    contexts = setting.contexts
    # The same number of rows for every start, so that none has more memory than the hypernetwork's.
    rows = hypernetwork.rows if hypernetwork is not None else start.gists + start.sink
    sink = encoder.first_token() if start.sink and start.kind in ("vocabulary", "random") else None
    model, rng = reader.model, Random(f"start/{setting.seed}")
    if start.kind == "hypernetwork":
        made = hypernetwork.compress(contexts)
    elif start.kind in ("demonstrations", "pooled_demonstrations"):
        made = [demonstrations_start(model, c, rows, pooled=start.kind == "pooled_demonstrations") for c in contexts]
    elif start.kind == "attended":
        made = untrained(model, rows, encoder.tokenizer).compress(contexts)
    elif start.kind == "vocabulary":
        given = [token for word in start.words for token in encoder.tokenizer(word, add_special_tokens=False)["input_ids"]]
        drawn = [given or rng.choices(context, k=rows) for context in contexts]
        made = [vocabulary_start(model, words, rows, sink=sink) for words in drawn]
    elif start.kind == "random":
        made = [random_start(model, contexts, rows, seed=rng.randrange(2**31), sink=sink) for _ in contexts]
    else:
        path = Path(start.prefix)
        files = [path if path.is_file() else path / f"{episode.task}.safetensors" for episode in episodes]
        made = [Prefix.load(file, reader.identity) for file in files]
        for file, prefix in zip(files, made, strict=True):
            prefix.check_format(encoder.format, str(file))
    named = {}
    for episode, context, prefix in zip(episodes, contexts, made, strict=True):
        manifest = Manifest(
            base=reader.identity,
            rotary=rotary_settings(model),
            hypernetwork=start.hypernetwork and written(start.hypernetwork),
            task=episode.task,
            instruction=episode.instruction or None,
            examples=len(episode.demonstrations),
            context_tokens=len(context),
            positions=model.config.max_position_embeddings,
            sink=prefix.manifest.sink if prefix.manifest else sink,
            text_format=dataclasses.asdict(encoder.format),
            metrics={"tuned_from": start.kind},
        )
        named[episode.task] = Prefix(prefix.keys, prefix.values, manifest, prefix.adapters)
    return named


def _named_apart(episodes: Sequence[Episode]) -> list[Episode]:
    """The episodes with names that differ, in case too, and that can be names of files: the second "t" becomes "t_2"."""
    taken: set[str] = set()
    named = []
    for episode in episodes:
        plain = name = plain_name(episode.task)
        for number in count(2):
            if name.lower() not in taken:
                break
            name = f"{plain}_{number}"
        taken.add(name.lower())
        named.append(dataclasses.replace(episode, task=name))
    return named
