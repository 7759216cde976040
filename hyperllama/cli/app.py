"""The command line's frame: the app, options that several verbs have, and what they print."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Literal

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
Precision = Literal["float32", "bfloat16", "float16"]
Dtype = Annotated[Precision | None, typer.Option(help="Load the base in this precision.")]
CheckBase = Annotated[bool, typer.Option("--check-base", help="Compare all weights of the base, not a sample of them.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there, though we did not make it.")]
Base = Annotated[str | None, typer.Option(help="Where the base model is, if it has moved.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Train hypernetworks that turn few-shot examples into soft prefixes, and use them."""
    quiet()  # before any verb imports a library


def quiet_libraries() -> None:
    """No bars of loading weights, also where tqdm was imported before `quiet`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def print_table(value: dict, indent: str = "") -> None:
    """Print keys and values in two columns; what a key has below it stands further in."""
    width = max((len(key) for key, part in value.items() if not isinstance(part, dict)), default=0)
    for key, part in value.items():
        if isinstance(part, dict):
            if part:
                typer.echo(f"{indent}{key}:")
                print_table(part, indent + "  ")
        elif part is not None:
            text = f"{part:,}" if isinstance(part, int) and not isinstance(part, bool) else json.dumps(part, ensure_ascii=False)
            typer.echo(f"{indent}{key:<{width}}  {text.strip(chr(34))}")
