"""What the verbs do. Here, and in `eval`, a recipe is unpacked into components; nothing below sees one."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput

from hyperllama.backbone import (
    BaseIdentity,
    check_backend,
    check_config,
    load_base,
    load_config,
    load_tokenizer,
    random_base,
    random_config,
)
from hyperllama.checkpoints import CHECKPOINTS, newest_checkpoint, settings_to_go_on
from hyperllama.compressor import CONFIG, Hypernetwork, read_config
from hyperllama.contexts import Summary, compress_into, shown_of, task_files
from hyperllama.data.dealing import Dealt
from hyperllama.data.episode import Example, Source
from hyperllama.data.packing import Packing, full_tokens, gist_tokens, pack_full, pack_gist
from hyperllama.data.sni import read_task
from hyperllama.data.stream import Collator, EpisodeStream
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.distributed import processes, whole_models
from hyperllama.environment import versions
from hyperllama.errors import UserError
from hyperllama.files import read_json, whole_json_lines, write_atomically
from hyperllama.full_attention import FullAttention
from hyperllama.hub import fetch
from hyperllama.kinds import KINDS, load_hypernetwork_onto
from hyperllama.prefix import Prefix
from hyperllama.quality import fewest_gists, leave_one_out
from hyperllama.reader import Reader
from hyperllama.recipe import Recipe, has_sink
from hyperllama.recipe_files import differences, load_recipe, save_recipe
from hyperllama.sources import make_source
from hyperllama.store import PrefixStore
from hyperllama.training import METRICS, GistTrainer, training_arguments

RECIPE, VERSIONS, BASE, RESULT = "recipe.yaml", "versions.json", "base", "result.json"


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
    if recipe.model.name_or_path:
        config = load_config(recipe.model.name_or_path, recipe.model.revision)
        check_config(config, recipe.model.name_or_path)
    else:
        config = random_config(recipe.model.architecture, vocab_size=recipe.model.vocab_size)
    half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else getattr(torch, recipe.model.dtype)
    check_backend(recipe.gist.backend, config, arguments.device, half)
    resolved = save_recipe(recipe)
    if finished(run, resolved):
        return None
    source = make_source(recipe.data)
    set_seed(recipe.seed)
    write_atomically(run / RECIPE, resolved)
    write_atomically(run / VERSIONS, json.dumps(versions(), indent=2) + "\n")
    base, tokenizer = make_base(recipe, source, arguments)
    encoder = Encoder(tokenizer, recipe.format, recipe.limits)
    data = recipe.data
    step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    stream = EpisodeStream(
        source,
        encoder,
        seed=recipe.seed,
        length=arguments.max_steps * step if arguments.max_steps > 0 else max(1, len(source) // data.queries),
        shots=data.shots,
        min_shots=data.shots if data.min_shots is None else data.min_shots,
        queries=data.queries,
    )
    set_seed(recipe.seed)
    if recipe.method == "full_attention":
        model = FullAttention(base, tokenizer, recipe.gist.backend)
        collator, size = Collator(pack_full, recipe.full_attention.supervise_demonstrations), full_tokens
    else:
        model, packing = make_hypernetwork(recipe, base, tokenizer), packing_of(recipe)
        _ = model.identity  # taken while all ranks are here: under ZeRO-3 none has the weights alone
        collator, size = Collator(pack_gist, packing), partial(gist_tokens, packing=packing)
    if arguments.world_size > 1:
        batch, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        stream = Dealt(stream, size, ranks=arguments.world_size, batch=batch, accumulation=accumulation)
    trainer = GistTrainer(model, arguments, stream, collator, run)
    result = trainer.go_on(checkpoint)
    notes = {"format": dataclasses.asdict(recipe.format), "limits": dataclasses.asdict(recipe.limits), "data": str(data)}
    trainer.save_trained(run, notes)
    if not arguments.should_save:
        return None
    left_out = {
        name: sum(line.get(name, 0) for line in whole_json_lines(run / METRICS))
        for name in ("demonstrations", "dropped_demonstrations", "skipped_queries")
    }
    # Written last: its presence says that everything else is there.
    write_atomically(run / RESULT, json.dumps({"steps": result.global_step, **result.metrics, **left_out}, indent=2) + "\n")
    if left_out["dropped_demonstrations"] or left_out["skipped_queries"]:
        print(
            f"{run}: {left_out['dropped_demonstrations']:,} demonstrations did not fit into limits.context_tokens beside "
            f"{left_out['demonstrations']:,} that did; {left_out['skipped_queries']:,} queries did not fit"
        )
    return result


def packing_of(recipe: Recipe) -> Packing:
    """What of an episode a recipe's hypernetwork is trained on."""
    again, taught = recipe.objectives.reconstruction > 0, recipe.objectives.distillation > 0
    hint = recipe.hint if recipe.gist.kind == "hint" else None
    shown = {"whole": hint is not None and hint.fusion, "late": hint is not None and hint.late_fusion}
    shown |= {"reconstruct": again, "teach": taught, "sink": has_sink(recipe)}
    return Packing(recipe.gist.tokens, recipe.gist.reading, recipe.gist.elastic, **shown)


def make_hypernetwork(recipe: Recipe, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Hypernetwork:
    """The hypernetwork that a recipe describes, new or with the weights of `start_from`."""
    gist = recipe.gist
    settings = {"gists": gist.tokens, "reading": gist.reading, "elastic": gist.elastic, "mix": recipe.objectives}
    if has_sink(recipe) and tokenizer is not None:
        settings["sink"] = Encoder(tokenizer, recipe.format, recipe.limits).first_token()
    if gist.kind == "pooling":
        pooling = recipe.pooling
        settings |= {"recency": pooling.recency, "sharpness": pooling.sharpness, "attended": pooling.attended}
    if gist.kind == "lora" or (gist.kind == "pooling" and recipe.pooling.lora):
        lora = recipe.lora
        settings |= {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout}
        settings |= {"targets": list(lora.targets) or "all-linear"}
    if gist.kind == "hint":
        settings["hint"] = recipe.hint
    made = KINDS[gist.kind](base, **settings, backend=gist.backend, tokenizer=tokenizer)
    if recipe.start_from:
        before = BaseIdentity(**read_config(recipe.start_from)["base"])
        if not made.trains_base and before.weights != made.identity.weights:
            raise UserError(f"start_from: {recipe.start_from} was trained for {before.name}, not for {made.identity.name}")
        made.load_weights(recipe.start_from)
    return made


def load_hypernetwork(run: str | Path, base_path: str | None = None, *, dtype: str = "float32") -> tuple[Hypernetwork, Encoder]:
    """A trained hypernetwork with its base, and the encoder of its text format; `base_path` where the base has moved."""
    run = fetch(run)
    config = read_config(run)
    name = base_path or config["base"]["name"]
    base, tokenizer = load_base(name, dtype=dtype, quantize=config["base"].get("quantize")), load_tokenizer(name)
    notes = config["notes"]
    encoder = Encoder(tokenizer, TextFormat(**notes.get("format", {})), Limits(**notes.get("limits", {})))
    return load_hypernetwork_onto(run, base, tokenizer=tokenizer), encoder


def compress(
    run: str | Path,
    files: Sequence[str | Path],
    output: str | Path,
    *,
    instruction: str | None = None,
    shots: int | None = None,
    base_path: str | None = None,
    report: bool = False,
    gists: int | None = None,
    budget: float | None = None,
) -> list[tuple[Path, Prefix]]:
    """Compress files of examples, each one task, into prefix files. Returns their paths and prefixes.

    Of JSON lines all examples are shown, of an S-NI task its positive examples; `shots` keeps the first K. `instruction`
    replaces that of the file. `output` is a folder if there are several files, if it exists as one, or ends in a slash.
    `report` measures each prefix on held-back examples (see `hyperllama.quality`) and keeps the figures in its manifest.
    An elastic hypernetwork makes prefixes of `gists` gists, or of the fewest that cost at most `budget` nats a token.
    """
    shown = [shown_of(file, shots=shots, instruction=instruction) for file in task_files(files)]
    paths = _output_paths(output, [one.task for one in shown])
    taken = {Path(one.where).resolve() for one in shown} & {path.resolve() for path in paths}
    if taken:
        raise UserError(f"{output}: is a file of examples itself, which the prefix would overwrite; choose another output")
    hypernetwork, encoder = load_hypernetwork(run, base_path)
    if not hypernetwork.elastic and (gists is not None or budget is not None):
        raise UserError(
            f"{run}: was trained for all of its {hypernetwork.num_gists} gists only; leave --gists and --budget out, or train "
            "with gist.elastic=true"
        )
    contexts, manifests = zip(*(one.encode(encoder, hypernetwork.identity, run) for one in shown))
    reader = Reader(hypernetwork.base, encoder.tokenizer)
    asked = [(hypernetwork, reader, encoder, one.instruction, one.demonstrations) for one in shown]
    counts = [gists if budget is None else fewest_gists(*one, budget=budget) for one in asked]
    if report:
        measured = [leave_one_out(*one, gists=count) for one, count in zip(asked, counts, strict=True)]
        manifests = [dataclasses.replace(manifest, metrics=quality) for manifest, quality in zip(manifests, measured)]
    prefixes: dict[int, Prefix] = {}
    for count in dict.fromkeys(counts):  # a pass for each number of gists
        own = [i for i, n in enumerate(counts) if n == count]
        made = hypernetwork.compress([contexts[i] for i in own], [manifests[i] for i in own], gists=count)
        prefixes |= dict(zip(own, made, strict=True))
    found = [(path, prefixes[i]) for i, path in enumerate(paths)]
    for path, prefix in found:
        prefix.save(path)
    return found


def compress_to_store(
    run: str | Path,
    files: Sequence[str | Path],
    store: str | Path,
    *,
    instruction: str | None = None,
    shots: int | None = None,
    base_path: str | None = None,
    batch_tokens: int = 16384,
) -> Summary:
    """Compress many files, or folders of them, into a store; what is there already is not compressed again.

    A pass has at most `batch_tokens`. Ranks (torchrun, or RANK and WORLD_SIZE set by hand) take every n-th task.
    """
    tasks = task_files(files)
    read_config(fetch(run))  # a store is not made for a run that is none
    place = PrefixStore(store)
    hypernetwork, encoder = load_hypernetwork(run, base_path)
    ranks = {"rank": int(os.environ.get("RANK", 0)), "ranks": processes()}
    settings = {"run": run, "shots": shots, "instruction": instruction, "progress": partial(print, file=sys.stderr), **ranks}
    return compress_into(place, hypernetwork, encoder, tasks, batch_tokens=batch_tokens, **settings)


def compose(
    paths: Sequence[str | Path], output: str | Path, *, gists: int | None = None, quantize: Literal["int8"] | None = None
) -> tuple[Prefix, dict[str, float]]:
    """Put prefixes of one base one after the other into a new file; `gists` keeps the first so many of each.

    Returns the prefix, and what `quantize` loses (see `Prefix.save`).
    """
    parts = [Prefix.load(path) for path in paths]
    try:
        parts = parts if gists is None else [part.truncate(gists) for part in parts]
    except ValueError as error:
        raise UserError(f"--gists: {error}") from error
    joined = reduce(Prefix.concat, parts)
    return joined, joined.save(output, quantize=quantize)


def finished(run: Path, resolved: str) -> bool:
    """Whether a run of this recipe is complete in its folder; UserError if the folder holds a run of another recipe."""
    if not (run / RECIPE).is_file():
        return False
    changed = differences((run / RECIPE).read_text(encoding="utf-8"), resolved)
    if changed:
        raise UserError(
            f"{run} holds a run of another recipe (it differs in {', '.join(changed)}); "
            "set output to a new folder, or remove this one"
        )
    if (run / RESULT).is_file():
        print(f"{run}: training had finished already; remove the folder to train again")
        return True
    return False


def _output_paths(output: str | Path, names: list[str]) -> list[Path]:
    path = Path(output)
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


class AnswerStreamer(TextStreamer):
    """Prints an answer as it is generated, up to the text `stop`: what may be its beginning is held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop, self.held = stop, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text, self.held = self.held + text, ""
        if self.stop:
            text, found, rest = text.partition(self.stop)
            most = 0 if found or stream_end else min(len(self.stop) - 1, len(text))
            begun = next((n for n in range(most, 0, -1) if self.stop.startswith(text[-n:])), 0)
            # What begins with the stop is held for good: nothing behind it is shown.
            text, self.held = text[: len(text) - begun], text[len(text) - begun :] + found + rest
        super().on_finalized_text(text, stream_end)


class Session:
    """One prefix and its base, loaded, to answer inputs with.

    `chat_template` writes an input as a user's turn by the tokenizer's own template, for bases that were trained on
    conversations; otherwise by the text format in the prefix's manifest.
    """

    def __init__(self, prefix_path: str | Path, *, base_path: str | None = None, chat_template: bool = False):
        self.prefix = Prefix.load(fetch(prefix_path, prefix=True))
        if self.prefix.manifest is None:
            raise UserError(
                f"{prefix_path}: has no manifest, so its base and text format are unknown; use hyperllama.Reader in Python"
            )
        name = base_path or self.prefix.manifest.base.name
        check_config(load_config(name), name)
        self.tokenizer, self.chat_template = load_tokenizer(name), chat_template
        if chat_template and not self.tokenizer.chat_template:
            raise UserError(f"{name}: its tokenizer has no chat template; leave --chat-template out")
        self.reader = Reader(load_base(name, quantize=self.prefix.manifest.base.quantize), self.tokenizer)
        self.prefix.check(self.reader.identity, str(prefix_path))
        self.encoder = Encoder(self.tokenizer, TextFormat(**self.prefix.manifest.text_format), Limits())

    def prompt(self, text: str) -> list[int]:
        """Token ids of an input as it follows the prefix."""
        if not self.chat_template:
            return self.encoder.prompt(text)
        turn = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]

    def answer(self, inputs: Sequence[str], **settings) -> list[str]:
        """Answers to inputs. `settings` go to transformers' generate, over the text format's own."""
        settings = {"max_new_tokens": self.encoder.format.answer_tokens, "stop": self.stop, **settings}
        answers = self.reader.generate([self.prompt(text) for text in inputs], [self.prefix] * len(inputs), **settings)
        if self.chat_template:
            return [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        return [self.encoder.answer_of(answer) for answer in answers]

    @property
    def stop(self) -> str:
        """The text that ends an answer: the separator, but a turn of a conversation ends with the end token alone."""
        return "" if self.chat_template else self.encoder.format.separator

    def stream(self, text: str, **settings) -> None:
        """Print the answer to one input as it is generated."""
        self.answer([text], streamer=AnswerStreamer(self.tokenizer, self.stop), **settings)


def generate(
    prefix_path: str | Path, inputs: Sequence[str], *, base_path: str | None = None, chat_template: bool = False, **settings
) -> list[str]:
    """Answer inputs behind one prefix; see `Session`."""
    return Session(prefix_path, base_path=base_path, chat_template=chat_template).answer(inputs, **settings)


def inspect(path: str | Path) -> dict:
    """What a prefix file or a run's folder is, for people: what made it, for which base, how large."""
    path = fetch(path, prefix=True)
    if not path.is_dir():
        prefix = Prefix.load(path)
        sizes = {"gists": prefix.gists, "layers": prefix.layers, "kv_heads": prefix.kv_heads, "head_dim": prefix.head_dim}
        if prefix.adapters is not None:
            sizes |= {"adapters": prefix.adapters.sizes, "adapter_bytes": prefix.adapters.nbytes}
        if prefix.late:
            sizes["late_rows"] = prefix.late
        sizes |= {"dtype": str(prefix.dtype).removeprefix("torch."), "file_bytes": path.stat().st_size}
        return {
            "prefix": str(path),
            **sizes,
            **(dataclasses.asdict(prefix.manifest) if prefix.manifest else {"manifest": None}),
        }
    if not (path / RECIPE).is_file() and not (path / CONFIG).is_file():
        raise UserError(f"{path}: neither a prefix file nor the folder of a run")
    found = {"run": str(path), "finished": (path / RESULT).is_file()}
    if (path / CONFIG).is_file():
        found |= read_config(path)
    for name, file in (("result", RESULT), ("versions", VERSIONS)):
        if (path / file).is_file():
            found[name] = read_json(path / file, f"the {name} of a run")
    if not found["finished"]:
        found["newest_checkpoint"] = newest_checkpoint(path / CHECKPOINTS)
    return found


def read_inputs(path: str | Path) -> list[Example]:
    """What `generate --inputs` reads: JSON lines with "input", and perhaps "output", or the instances of an S-NI task."""
    return list(read_task(path, outputs=False).examples)
