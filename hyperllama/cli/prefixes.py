"""Verbs that make prefixes, and verbs that use them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hyperllama.cli.app import (
    Base,
    ChatTemplate,
    CheckBase,
    Dtype,
    MaxNewTokens,
    Overwrite,
    Temperature,
    TopP,
    Verb,
    app,
    print_table,
    quiet_libraries,
)
from hyperllama.errors import UserError

if TYPE_CHECKING:  # help is printed without torch
    from hyperllama.prefixes.prefix import Prefix


@app.command(cls=Verb)
def compress(
    run: Annotated[Path, typer.Argument(help="The folder of a finished hypernetwork run, or a base model.")],
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
    refine: Annotated[int, typer.Option(min=0, help="Tune each prefix on its own examples for at most so many steps.")] = 0,
    refine_on: Annotated[
        Literal["answers", "context"],
        typer.Option(help="--refine on its examples' answers, or on what the model says with its whole context."),
    ] = "answers",
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --store: at most so many tokens a pass; 2,048 on a CPU, 16,384 on a GPU.")
    ] = None,
    overwrite: Overwrite = False,
    base: Base = None,
    check_base: CheckBase = False,
    dtype: Dtype = None,
) -> None:
    """Turn the examples of a task into a prefix file."""
    fewer = gists is not None or budget is not None
    if (output is None) == (store is None) or (store is not None and (report or fewer)) or None not in (gists, budget):
        raise UserError("compress: give either --output or --store; --report, and either --gists or --budget, go with --output")
    from hyperllama.commands.compress import compress as compress_files
    from hyperllama.commands.compress import compress_to_store

    quiet_libraries()
    settings = {"instruction": instruction, "shots": shots, "base_path": base, "dtype": dtype, "check_base": check_base}
    settings |= {"refine": refine, "refine_on": refine_on}
    if store is not None:
        summary = compress_to_store(run, examples, store, batch_tokens=batch_tokens, **settings)
        typer.echo(f"{store}: {summary}")
        if summary.failed:
            raise UserError("\n".join(summary.failed))
        return
    settings |= {"report": report, "gists": gists, "budget": budget, "overwrite": overwrite}
    made = compress_files(run, examples, output, **settings)
    for path, prefix in made:
        _tell_made(path, prefix, report)


def _tell_made(path: Path, prefix: Prefix, report: bool) -> None:
    from hyperllama.commands.compress import told_refined

    manifest = prefix.manifest
    refined = told_refined(manifest)
    dropped = f" ({manifest.dropped_examples} more did not fit)" if manifest.dropped_examples else ""
    typer.echo(
        f"{path}: {manifest.examples} examples{dropped}, {manifest.context_tokens} tokens "
        f"-> {prefix.rows} rows, {path.stat().st_size:,} bytes{f'; {refined}' if refined else ''}"
    )
    if report:
        from hyperllama.inference.quality import verdict

        print_table(manifest.metrics, "  ")
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
    overwrite: Overwrite = False,
    base: Base = None,
    check_base: CheckBase = False,
    dtype: Dtype = None,
) -> None:
    """Answer new inputs with a frozen model that reads a prefix."""
    if (not input) == (inputs is None):
        raise UserError("generate: give either --input TEXT, once or several times, or --inputs FILE")
    from hyperllama.commands.generate import Answering, Asked, Session, facts_of, read_asked
    from hyperllama.files import check_output

    quiet_libraries()
    settings = {"num_beams": num_beams, "batch_size": batch_size, **_sampling(temperature, top_p, max_new_tokens)}
    asked = [Asked(f"--input {text[:60]!r}", text) for text in input or ()] if inputs is None else read_asked(inputs)
    asked = asked[:limit]
    if output is not None:
        check_output(output, reads=[prefix, *([inputs] if inputs else [])], overwrite=overwrite)
    session = Session(prefix, base_path=base, chat_template=chat_template, dtype=dtype, check_base=check_base)
    answering = Answering(session, asked, seed=seed, **settings)
    if output is not None:
        before = answering.write(output, facts_of(answering, prefix))
        went_on = f", {before} of them from before" if before else ""
        typer.echo(f"{output}: {len(asked)} answers{went_on}", err=True)
        return
    for window in answering.windows():
        for one, answer in window:
            typer.echo(answer if inputs is None else one.line(answer))


@app.command(cls=Verb)
def chat(
    prefix: Annotated[Path, typer.Argument(help="A prefix file made by hyperllama compress.")],
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    chat_template: ChatTemplate = False,
    base: Base = None,
    dtype: Dtype = None,
) -> None:
    """Answer inputs one by one as they are typed, each behind the prefix alone; an empty line ends it."""
    from hyperllama.commands.generate import Session

    quiet_libraries()
    session = Session(prefix, base_path=base, chat_template=chat_template, dtype=dtype)
    settings = _sampling(temperature, top_p, max_new_tokens)
    if sys.stdin.isatty():
        typer.echo(f"{prefix}: {session.prefix}; an empty line ends it", err=True)
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        text = sys.stdin.readline().rstrip("\n")
        if not text:
            return
        session.stream(text, **settings)


@app.command("list", cls=Verb)
def list_store(
    store: Annotated[Path, typer.Argument(help="A store made by hyperllama compress --store.")],
    check: Annotated[bool, typer.Option("--check", help="Read every prefix whole: a flipped bit is noticed too.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild the index from the files.")] = False,
) -> None:
    """List the prefixes of a store; say where its index and its files disagree, or mend that."""
    from hyperllama.prefixes.store import PrefixStore

    if check or repair:  # these read the prefixes, which takes torch; a list is there at once
        quiet_libraries()
    place = PrefixStore(store, create=False)
    problems = place.repair() if repair else place.check() if check else place.compare()
    lines = (f"{entry.task}  {entry.rows} rows, {entry.bytes:,} bytes, {entry.base.name}  {entry.file}\n" for entry in place)
    typer.echo("".join(lines), nl=False)  # at once: a call for each line takes a third of the time
    typer.echo(f"{store}: {len(place)} prefixes", err=True)
    if problems:
        raise UserError("\n".join(problems))


@app.command(cls=Verb)
def compose(
    prefixes: Annotated[list[Path], typer.Argument(help="Prefix files of one base, in the order of reading.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new prefix file.")],
    gists: Annotated[int | None, typer.Option(min=1, help="Keep the first so many rows of each.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Store 8 bits a number, and say what that loses.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Put prefixes one after the other, cut them, or make their file smaller."""
    from hyperllama.commands.compress import compose as join

    quiet_libraries()
    made, lost = join(prefixes, output, gists=gists, quantize="int8" if int8 else None, overwrite=overwrite)
    error = "".join(f", {side} off by {100 * part:.2f} %" for side, part in lost.items())
    typer.echo(f"{output}: {made.rows} rows, {output.stat().st_size:,} bytes{error}")


@app.command(cls=Verb)
def export(
    prefix: Annotated[Path, typer.Argument(help="A prefix file.")],
    output: Annotated[Path, typer.Argument(help="Where the adapter's folder goes, or the session file.")],
    to: Annotated[Literal["peft", "llama.cpp"], typer.Option("--to", help="What is to read it.")] = "peft",
    cartridge: Annotated[bool, typer.Option("--cartridge", help="PEFT's CARTRIDGE instead of PREFIX_TUNING.")] = False,
    gguf: Annotated[Path | None, typer.Option(help="Of llama.cpp: the base as a GGUF file.")] = None,
    session_version: Annotated[
        int | None, typer.Option(help="Of llama.cpp: the version of its session files; else xllamacpp is asked.")
    ] = None,
    cache_type: Annotated[Literal["f16", "f32"], typer.Option(help="Of llama.cpp: the type of its cache.")] = "f16",
    no_flash_attention: Annotated[
        bool, typer.Option("--no-flash-attention", help="Of llama.cpp: for one that runs with --flash-attn off.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a prefix for stock PEFT, and everything that reads PEFT, or for llama.cpp."""
    only_llama = gguf is not None or session_version is not None or cache_type != "f16" or no_flash_attention
    if (to == "llama.cpp" and (gguf is None or cartridge)) or (to == "peft" and only_llama):
        raise UserError(
            "export: --to llama.cpp needs --gguf; it alone has --session-version, --cache-type and --no-flash-attention, and "
            "--cartridge is PEFT's"
        )
    quiet_libraries()
    from hyperllama.prefixes.prefix import Prefix

    loaded = Prefix.load(prefix)
    if to == "llama.cpp":
        settings = {"version": session_version, "cache_type": cache_type, "flash_attention": not no_flash_attention}
        _export_to_llama_cpp(loaded, output, gguf, overwrite=overwrite, **settings)
        return
    from hyperllama.prefixes.export.peft import lost_in_generate, to_peft

    typer.echo(f"{to_peft(loaded, output, kind='cartridge' if cartridge else 'prefix_tuning', overwrite=overwrite)}: {loaded}")
    if lost := loaded.rows and lost_in_generate():
        typer.echo(lost, err=True)


def _export_to_llama_cpp(prefix: Prefix, output: Path, gguf: Path, **settings) -> None:
    """Write the session file, and print a request that reads it."""
    import json

    from hyperllama.prefixes.export.llama_cpp import request, to_llama_cpp

    typer.echo(f"{to_llama_cpp(prefix, output, gguf, **settings)}: {prefix}")
    typer.echo(json.dumps(request(prefix, output), ensure_ascii=False))


@app.command(cls=Verb)
def push(
    path: Annotated[Path, typer.Argument(help="The folder of a hypernetwork's run, or a prefix file.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Share a hypernetwork or a prefix on the hub, with its card; verbs then take owner/name for a path."""
    quiet_libraries()
    from hyperllama.hypernetworks.hub import push as upload

    typer.echo(upload(path, repository, private=private))


@app.command(cls=Verb)
def inspect(path: Annotated[Path, typer.Argument(help="A prefix file, or the folder of a run.")]) -> None:
    """Say what a prefix or a run is, what made it, and for which base."""
    from hyperllama.commands.inspect import inspect as look

    quiet_libraries()
    print_table(look(path))


def _sampling(temperature: float | None, top_p: float | None, max_new_tokens: int | None) -> dict:
    """Settings of `generate`; UserError for those that contradict each other, in the names of the options."""
    from hyperllama.inference.sampling import contradictions, sampling

    settings = sampling(temperature, top_p, max_new_tokens)
    for problem in contradictions(settings):
        raise UserError("--" + problem.replace("top_p", "top-p"))
    return settings
