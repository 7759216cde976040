"""What the page offers to compress: the word tasks where they are at hand, else a few small ones; and text that is pasted."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from hyperllama.data.episode import Example, merged
from hyperllama.data.json_lines import WANTED, example_from, read_examples
from hyperllama.errors import UserError
from hyperllama.files import json_of

WORDS = Path("recipes/words/test")
MOST_CHARACTERS = 200_000  # of pasted examples: more than a context holds

# For a package without the recipes beside it.
_SMALL = {
    "plural": "cat cats, box boxes, wolf wolves, city cities, child children, leaf leaves, day days, tooth teeth, bus buses, "
    "baby babies, knife knives, mouse mice, potato potatoes, church churches, key keys, foot feet, shelf shelves, dish dishes, "
    "lady ladies, chair chairs",
    "comparative": "big bigger, happy happier, tall taller, easy easier, hot hotter, good better, late later, thin thinner, "
    "busy busier, fast faster, bad worse, wide wider, sad sadder, lazy lazier, cold colder, safe safer, wet wetter, dry drier, "
    "long longer, red redder",
    "capital": "France Paris, Japan Tokyo, Kenya Nairobi, Peru Lima, Norway Oslo, Egypt Cairo, Spain Madrid, Cuba Havana, "
    "Italy Rome, Ghana Accra, Greece Athens, Nepal Kathmandu, Poland Warsaw, Chile Santiago, Iraq Baghdad, Finland Helsinki, "
    "Austria Vienna, Thailand Bangkok, Ireland Dublin, Portugal Lisbon",
}


@cache
def word_tasks() -> dict[str, tuple[Example, ...]]:
    """Tasks to choose from, by name: those of `recipes/words/test` here or beside the source, else a few small ones."""
    places = (Path.cwd(), Path(__file__).parents[2])
    files = next((found for place in places if (found := sorted((place / WORDS).glob("*.jsonl")))), [])
    if files:
        return {path.stem: tuple(read_examples(path)) for path in files}
    return {name: tuple(Example(*pair.split()) for pair in text.split(", ")) for name, text in _SMALL.items()}


def as_lines(examples: Iterable[Example]) -> str:
    """Examples as lines of an input, a tab and an output; `pasted` reads them back."""
    return "\n".join(f"{example.input}\t{example.output}" for example in examples)


def pasted(text: str) -> tuple[Example, ...]:
    """Examples from lines, each of JSON (as of `read_examples`) or an input, a tab and an output; empty lines are passed over.

    UserError names the line.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"examples: {len(text):,} characters, but the page takes {MOST_CHARACTERS:,}; paste fewer of them")
    return tuple(
        _example(line.strip("\r"), f"examples, line {number}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    )


def _example(line: str, where: str) -> Example:
    if line.lstrip().startswith("{"):
        return example_from(json_of(line, where, WANTED), where)
    before, tab, after = (part.strip() for part in line.partition("\t"))
    if not line.count("\t") or not before or not after:
        raise UserError(f"{where}: {line.strip()[:60]!r} is not input, tab, output; write it so, or as JSON: {WANTED}")
    return Example(before, after, (after,))


def unseen(examples: Iterable[Example], shots: int) -> dict[str, str]:
    """Inputs that are not among the first `shots` examples, with their outputs."""
    return {example.key: example.output for example in merged(examples)[0][shots:]}
