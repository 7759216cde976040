"""Reading, checking and writing recipe files. No torch and no weights: all mistakes are reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hyperllama.errors import UserError, in_one_line
from hyperllama.hypernetworks.config import local
from hyperllama.recipe.checks import recipe_problems
from hyperllama.recipe.schema import (
    AnyRecipe,
    EvaluationRecipe,
    Recipe,
    SourceRecipe,
    StudyRecipe,
    TableRecipe,
    TuneRecipe,
    current,
    source_sections,
    with_sections,
)

SCHEMAS = {
    "hypernetwork": Recipe,
    "full_attention": Recipe,
    "evaluate": EvaluationRecipe,
    "tune": TuneRecipe,
    "study": StudyRecipe,
    "table": TableRecipe,
}
VERBS = {Recipe: "train", EvaluationRecipe: "evaluate", TuneRecipe: "tune", StudyRecipe: "study", TableRecipe: "study"}
OPEN = ("training", "model.architecture", "generation", "rows", "evaluations")  # keys below these are not in our schema


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, schema: type = Recipe, data: bool = True) -> Any:
    """Read and check a recipe file with `dotted.key=value` overrides; a `Recipe`, or what `schema` says.

    Without `data`, the files that `data.root` names need not be there.
    Raises UserError with one line for every problem: the file (or "command line"), the key, what is wrong, and the nearest
    known name.
    """
    written = _read(path)
    named = written.get("method", "hypernetwork")
    meant = SCHEMAS.get(named, schema)
    if meant is not schema:
        raise UserError(f"{path}: its method is {named}; run it with hyperllama {VERBS[meant]}")
    problems: list[str] = []
    schema = current(schema)
    merged = _merge(OmegaConf.structured(schema), written, schema, str(path), problems)
    for override in overrides:
        if "=" not in override or override.startswith("="):
            problems.append(f"command line: {override!r} is not of the form dotted.key=value")
            continue
        merged = _merge(merged, OmegaConf.from_dotlist([override]), schema, "command line", problems)
    recipe = _with_shipped(OmegaConf.to_object(merged))
    problems += [f"{path}: {problem}" for problem in recipe_problems(recipe, data=data)]
    if problems:
        raise UserError("\n".join(problems))
    return recipe


def _with_shipped(recipe: Any) -> Any:
    """A recipe in which a hypernetwork that comes with this package is named by its folder."""
    if dataclasses.is_dataclass(start := getattr(recipe, "start", None)):
        recipe = dataclasses.replace(recipe, start=_with_shipped(start))
    named = {key: name for key in ("hypernetwork", "start_from") if (name := getattr(recipe, key, None))}
    return dataclasses.replace(recipe, **{key: str(local(name)) for key, name in named.items()})


def load_any_recipe(path: str | Path, overrides: Sequence[str] = (), *, data: bool = True) -> AnyRecipe:
    """A recipe of whichever kind its `method` says it is; `data` as in `load_recipe`."""
    schema = SCHEMAS.get(_read(path).get("method", "hypernetwork"), Recipe)
    return load_recipe(path, overrides, schema=schema, data=data)


def _read(path: str | Path, extending: tuple[Path, ...] = ()):
    """What a recipe file says, over what the recipe says that it `extends`, whose path is beside its own."""
    path = Path(path)
    if not path.is_file():
        who = f"{extending[-1]}: extends {path}, but there is" if extending else f"{path}:"
        raise UserError(f"{who} no such recipe file")
    try:
        written = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"{path}: not YAML ({in_one_line(error)})") from error
    if not OmegaConf.is_dict(written):
        raise UserError(f"{path}: a recipe is a mapping of keys, this is {type(OmegaConf.to_container(written)).__name__}")
    extended = written.pop("extends", None)
    if extended is None:
        return written
    if not isinstance(extended, str):
        raise UserError(f"{path}: extends: the path of a recipe, from this one's folder, not {extended!r}")
    if path.resolve() in (one.resolve() for one in extending):
        raise UserError(f"{path}: extends: this recipe extends itself; remove the key from one of the files")
    return OmegaConf.merge(_read(path.parent / extended, (*extending, path)), written)


def save_recipe(recipe: AnyRecipe) -> str:
    """The resolved recipe as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def differences(old: str, new: str) -> list[str]:
    """Keys in which two resolved recipes differ. A key that one of them lacks has its default: an older version knew fewer."""

    def leaves(value, key=""):
        if isinstance(value, dict) and value:
            return {k: v for name, part in value.items() for k, v in leaves(part, f"{key}.{name}" if key else name).items()}
        return {key: value}

    a, b = (leaves(OmegaConf.to_container(OmegaConf.create(text))) for text in (old, new))
    schema = OmegaConf.structured(current(SCHEMAS.get(b.get("method", "hypernetwork"), Recipe)))
    default = leaves(OmegaConf.to_container(schema))
    return [key for key in sorted({*a, *b}) if a.get(key, default.get(key)) != b.get(key, default.get(key))]


def _merge(config, addition, schema: type, where: str, problems: list[str]):
    """Merge all keys at once; if a value is wrong, merge key by key, so that every problem is found."""
    known = []
    for key, value in _leaves(OmegaConf.to_container(addition), schema, ""):
        unknown = [f"{where}: {problem}" for problem in _unknown(key, value, schema)]
        problems += unknown
        known += [] if unknown else [(key, value)]
    try:
        return _with(config, known)
    except OmegaConfBaseException:
        pass  # some value is wrong: one by one, which is slow
    for key, value in known:
        try:
            config = _with(config, [(key, value)])
        except OmegaConfBaseException as error:
            problems.append(f"{where}: {key}: {str(error).splitlines()[0]}")
    return config


def _with(config, leaves: Sequence[tuple[str, Any]]):
    """The config with values at dotted keys."""
    nested: dict[str, Any] = {}
    for key, value in leaves:
        *parents, last = key.split(".")
        place = nested
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return OmegaConf.merge(config, nested)


def _unknown(key: str, value: Any, schema: type):
    """What is unknown about a key, or about the keys of a list's elements below it."""
    nearest = _nearest(key, schema)
    if nearest is not None:
        yield f"{key}: unknown key{nearest}"
    elif key == "data.mixture" and isinstance(value, list):
        for i, element in enumerate(value):
            one = with_sections(SourceRecipe, source_sections())
            for name, part in _leaves(element, one, "") if isinstance(element, dict) else ():
                for problem in _unknown(name, part, one):
                    yield f"{key}[{i}].{problem}"


def _leaves(value: Any, schema: Any, key: str):
    """Dotted keys and values, down to where the schema stops having named fields."""
    if dataclasses.is_dataclass(schema) and isinstance(value, dict):
        types = typing.get_type_hints(schema)
        for name, part in value.items():
            yield from _leaves(part, _named(types.get(name)), f"{key}.{name}" if key else str(name))
    elif key in OPEN and isinstance(value, dict):
        for name, part in value.items():
            yield f"{key}.{name}", part
    else:
        yield key, value


def _named(kind: Any) -> Any:
    """The dataclass of an optional one."""
    return next((part for part in typing.get_args(kind) if dataclasses.is_dataclass(part)), kind)


def _nearest(key: str, schema: Any) -> str | None:
    """None for a known key; for an unknown one a hint, which may be empty."""
    names, known = key.split("."), ""
    for i, name in enumerate(names):
        if not dataclasses.is_dataclass(schema):
            if known not in OPEN and typing.get_origin(schema) is not dict:
                return f"; {known} has no keys below it"
            if known == "training" and i == 1:
                return _hint("training", name, _training_fields())
            return None
        types = typing.get_type_hints(schema)
        if name not in types:
            return _hint(known, name, list(types))
        schema, known = _named(types[name]), f"{known}.{name}" if known else name
    return None


def _hint(parent: str, name: str, choices: list[str]) -> str | None:
    if name in choices:
        return None
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return (
        f"; did you mean {parent + '.' if parent else ''}{close[0]}?" if close else f"; choose from {', '.join(choices[:40])}"
    )


def _training_fields() -> list[str]:
    from transformers import TrainingArguments

    return [f.name for f in dataclasses.fields(TrainingArguments)]
