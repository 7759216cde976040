"""`hyperllama train`: a recipe is unpacked into components and trained."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput

from hyperllama.base.checks import check_backend, check_config
from hyperllama.base.distributed import processes, whole_models
from hyperllama.base.environment import versions
from hyperllama.base.identity import BaseIdentity
from hyperllama.base.loading import load_base, load_config, load_tokenizer, random_base, random_config
from hyperllama.data.dealing import Dealt
from hyperllama.data.episode import Source, fingerprint_of, repetition_of, tell_twice
from hyperllama.data.packing import Packing, full_tokens, gist_tokens, pack_full, pack_gist
from hyperllama.data.stream import Collator, EpisodeStream
from hyperllama.data.text import EncodedEpisode, Encoder
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError
from hyperllama.files import from_fields, read_text, whole_json_lines, write_atomically
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.config import read_config
from hyperllama.hypernetworks.registry import KINDS, kind_of
from hyperllama.objectives.packed_model import PackedModel
from hyperllama.recipe.loading import differences, load_recipe, save_recipe
from hyperllama.recipe.schema import Recipe, TuneRecipe, has_sink
from hyperllama.recipe.sources import make_source
from hyperllama.runs import RECIPE, check_folder, check_same, digest_of, owned, remember
from hyperllama.training.checkpoints import CHECKPOINTS, newest_checkpoint, settings_to_go_on
from hyperllama.training.deepspeed import deepspeed_file
from hyperllama.training.full_attention import FullAttention, lora_config
from hyperllama.training.trainer import METRICS, GistTrainer, training_arguments

VERSIONS, BASE, RESULT = "versions.json", "base", "result.json"


def make_base(recipe: Recipe, source: Source, arguments: TrainingArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model and tokenizer that a recipe names. A random one is kept in the run's folder."""
    model = recipe.model
    name = model.name_or_path or str(Path(recipe.output) / BASE)
    # The first process of a machine downloads or makes what the others then find.
    with arguments.main_process_first():
        if not model.name_or_path:
            with whole_models(arguments):
                _make_random_base(recipe, source)
        tokenizer = load_tokenizer(name, model.revision)
    return load_base(name, dtype=model.dtype, quantize=model.quantize, revision=model.revision), tokenizer


def _make_random_base(recipe: Recipe, source: Source) -> None:
    model, folder = recipe.model, Path(recipe.output) / BASE
    if not folder.is_dir():
        tokenizer = train_tokenizer(source.texts(), kind=model.tokenizer, vocab_size=model.vocab_size)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        base = random_base(model.architecture, vocab_size=len(tokenizer), dtype=model.dtype, **special)
        temporary = folder.with_name(f".{BASE}.{os.getpid()}")
        base.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)


def train(recipe_path: str | Path, overrides: Sequence[str] = ()) -> TrainOutput | None:
    """Train what a recipe describes, or go on where the last run in its folder stopped.

    None if that run had finished, and on all ranks but the first.
    Leaves in `output`: trained weights, recipe.yaml (resolved), versions.json, metrics.jsonl, loss.png, result.json and
    checkpoints/.
    """
    recipe = load_recipe(recipe_path, overrides)
    run = Path(recipe.output)
    checkpoint = newest_checkpoint(run / CHECKPOINTS)
    settings = settings_to_go_on(recipe.training, checkpoint, processes())
    arguments = training_arguments(settings, run=run, seed=recipe.seed, deepspeed=recipe.deepspeed)
    # What can be refused is refused here, before tokenizers are trained or weights loaded.
    _check_model(recipe, arguments)
    source = make_source(recipe.data)
    with owned(run) if arguments.process_index == 0 else nullcontext():
        facts = {"data": fingerprint_of(source), "base": digest_of(recipe.model.name_or_path)}
        facts |= {"start_from": digest_of(recipe.start_from), "deepspeed": settings_of(recipe.deepspeed)}
        if not begin(run, recipe, facts):
            return None
        if arguments.should_save:
            tell_twice(repetition_of(source))
        return _train(recipe, source, arguments, checkpoint)


def _train(recipe: Recipe, source: Source, arguments: TrainingArguments, checkpoint: str | None) -> TrainOutput | None:
    run = Path(recipe.output)
    set_seed(recipe.seed)
    base, tokenizer = make_base(recipe, source, arguments)
    stream = _stream(recipe, source, Encoder(tokenizer, recipe.format, recipe.limits), arguments)
    set_seed(recipe.seed)
    model = packed_model(recipe, base, tokenizer)
    collator, size = _collator(recipe)
    if isinstance(model, Hypernetwork):
        model.know_all_of_base()  # while all ranks are here: under ZeRO-3 none has the weights alone
    if arguments.world_size > 1:
        batch, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        stream = Dealt(stream, size, ranks=arguments.world_size, batch=batch, accumulation=accumulation)
    trainer = GistTrainer(model, arguments, stream, collator, run)
    result = trainer.go_on(checkpoint)
    notes = {"format": dataclasses.asdict(recipe.format), "limits": dataclasses.asdict(recipe.limits), "data": str(recipe.data)}
    trainer.save_trained(run, notes)
    if not arguments.should_save:
        return None
    _write_result(run, result)
    return result


def _check_model(recipe: Recipe, arguments: TrainingArguments) -> None:
    """UserError if the base or the attention kernel that a recipe names cannot be used, as far as its config says."""
    if recipe.model.name_or_path:
        config = load_config(recipe.model.name_or_path, recipe.model.revision)
        check_config(config, recipe.model.name_or_path)
    else:
        config = random_config(recipe.model.architecture, vocab_size=recipe.model.vocab_size)
    half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else getattr(torch, recipe.model.dtype)
    check_backend(recipe.gist.backend, config, arguments.device, half)


def _stream(recipe: Recipe, source: Source, encoder: Encoder, arguments: TrainingArguments) -> EpisodeStream:
    """The episodes that a run draws: as many as its steps take, or an epoch of the source."""
    data = recipe.data
    step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return EpisodeStream(
        source,
        encoder,
        seed=recipe.seed,
        length=arguments.max_steps * step if arguments.max_steps > 0 else max(1, len(source) // data.queries),
        shots=data.shots,
        min_shots=data.fewest_shots,
        queries=data.queries,
    )


def packed_model(recipe: Recipe, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> PackedModel:
    """What a recipe trains; without a tokenizer a hypernetwork has no sink."""
    if recipe.method == "full_attention":
        lora = lora_config(recipe.model.name_or_path, **vars(recipe.lora)) if recipe.full_attention.lora else None
        return FullAttention(base, tokenizer, recipe.gist.backend, lora)
    return make_hypernetwork(recipe, base, tokenizer)


def _collator(recipe: Recipe) -> tuple[Collator, Callable[[EncodedEpisode], int]]:
    """How batches are packed, and how many rows an episode takes in one."""
    if recipe.method == "full_attention":
        return Collator(pack_full, recipe.full_attention.supervise_demonstrations), full_tokens
    packing = packing_of(recipe)
    return Collator(pack_gist, packing), partial(gist_tokens, packing=packing)


def _write_result(run: Path, result: TrainOutput) -> None:
    """Write result.json, whose presence says that everything else is there, and say what the limits left out."""
    left_out = {
        name: sum(line.get(name, 0) for line in whole_json_lines(run / METRICS))
        for name in ("demonstrations", "dropped_demonstrations", "skipped_queries")
    }
    write_atomically(run / RESULT, json.dumps({"steps": result.global_step, **result.metrics, **left_out}, indent=2) + "\n")
    if left_out["dropped_demonstrations"] or left_out["skipped_queries"]:
        print(
            f"{run}: {left_out['dropped_demonstrations']:,} demonstrations did not fit into limits.context_tokens beside "
            f"{left_out['demonstrations']:,} that did; {left_out['skipped_queries']:,} queries did not fit"
        )


def packing_of(recipe: Recipe) -> Packing:
    """What of an episode a recipe's hypernetwork is trained on."""
    shown = {"whole": kind_of(recipe).keeps_context, "sink": has_sink(recipe)}
    shown |= {"reconstruct": recipe.objectives.says_again, "teach": bool(recipe.objectives.taught)}
    return Packing(recipe.gist.tokens, recipe.gist.chunking, recipe.gist.elastic, **shown)


def make_hypernetwork(recipe: Recipe, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Hypernetwork:
    """The hypernetwork that a recipe describes, new or with the weights of `start_from`."""
    gist = recipe.gist
    settings = {"gists": gist.tokens, "chunking": gist.chunking, "elastic": gist.elastic, "mix": recipe.objectives}
    if has_sink(recipe) and tokenizer is not None:
        settings["sink"] = Encoder(tokenizer, recipe.format, recipe.limits).first_token()
    settings |= kind_of(recipe).arguments(recipe)
    made = KINDS[gist.kind].hypernetwork()(base, **settings, backend=gist.backend, tokenizer=tokenizer)
    if recipe.start_from:
        before = from_fields(BaseIdentity, read_config(recipe.start_from)["base"], recipe.start_from)
        if not made.trains_base:
            before.refuse_other(made.identity, f"start_from: {recipe.start_from} was trained for")
        made.load_weights(recipe.start_from)
    return made


def settings_of(deepspeed: str | None) -> str | None:
    """A fingerprint of DeepSpeed's settings, which a recipe only names."""
    return digest_of(deepspeed_file(deepspeed)) if deepspeed else None


def begin(run: Path, recipe: Recipe | TuneRecipe, facts: dict[str, str | None]) -> bool:
    """Whether a run has something left to do in its folder, which then says what it is made from.

    UserError if the folder holds something else, or a run of another recipe or of other data, base or runs (`facts`).
    """
    check_folder(run)
    resolved = save_recipe(recipe)
    if (run / RECIPE).is_file():
        changed = differences(read_text(run / RECIPE, "the recipe of a run"), resolved)
        # What was trained was trained without a query too long, or it would not be there.
        changed = [key for key in changed if key != "limits.too_long_query"]
        if changed:
            raise UserError(
                f"{run} holds a run of another recipe (it differs in {', '.join(changed)}); "
                "set output to a new folder, or remove this one"
            )
    check_same(run, facts)
    if (run / RESULT).is_file():
        print(f"{run}: training had finished already; remove the folder to train again")
        return False
    if not (run / RECIPE).is_file():  # or it says the same, and could be the recipe that a user has written there
        write_atomically(run / RECIPE, resolved)
    write_atomically(run / VERSIONS, json.dumps(versions(), indent=2) + "\n")
    remember(run, facts)
    return True
