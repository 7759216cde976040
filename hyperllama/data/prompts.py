"""One prompt template, rendered: promptsource's Jinja (Bach et al. 2022, arXiv 2202.01279) in a sandbox.

A template means what it means to promptsource's `Template.apply`: `answer_choices` is rendered first and split at "|||", then
the main text is rendered and split into prompt and target. Templates are other people's code, so they run in Jinja's sandbox:
Python internals are refused, and sizes are bounded, but a template that merely takes long is not stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, lru_cache
from random import Random
from typing import Any

from hyperllama.data.episode import Example
from hyperllama.errors import UserError, in_one_line

TEXT_LENGTH = 2048  # characters of one printed value, cut at a word with "..." behind: promptsource's limit
OUTPUT_LENGTH = 1_000_000  # characters of one rendering, far beyond any prompt
LIST_LENGTH = 100_000  # items that a template may gather, as many as the sandbox lets `range` count
_MARK = "|||\ue000"  # the separator of a template; a "|||" in a field stays what it is


@dataclass(frozen=True)
class Template:
    """One prompt: `jinja` renders a row to "prompt ||| target", `answer_choices` to "choice ||| choice" if there is one.

    `key` is its folder in promptsource, such as "super_glue/cb". `original_task`: it asks what the set was made for.
    """

    name: str
    key: str
    jinja: str
    answer_choices: str | None = None
    original_task: bool = False
    metrics: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"template {self.key} {self.name!r}"


def render(template: Template, row: Mapping[str, Any], *, where: str = "") -> Example | None:
    """One row through a template, or None where prompt or target come out empty (promptsource's sign that it does not apply).

    The filter `choice` draws by the row and the template, so a row always renders to the same text. Choices are kept where the
    target is among them; a template that is scored by accuracy must have it there. Raises UserError that begins with `where`
    for a template that reaches for Python internals, has a mistake, needs a field that the row lacks, or fails on the row.
    """
    from jinja2.exceptions import SecurityError

    where = f"{where}, {template}" if where else str(template)
    try:
        missing = missing_fields(template, row)
        if missing or "answer_choices" in row:
            trouble = f"needs {', '.join(missing)}, which the row lacks" if missing else "answer_choices is no name for a field"
            raise UserError(f"{where}: {trouble}; rename a field of {', '.join(row)}")
        prompt, choices, _ = _compiled(template)
        values = {k: v if isinstance(v, str | int | float | None) else deepcopy(v) for k, v in row.items()}
        values["|rng"] = Random(f"{template.key}/{template.name}/{sorted(row.items())!r}")  # no name that a template can say
        offered = [choice.strip() for choice in _text(choices, values).split(_MARK)] if choices else None
        parts = [part.strip() for part in _text(prompt, {**values, "answer_choices": offered}).split(_MARK)]
    except UserError:
        raise
    except SecurityError as error:
        raise UserError(f"{where}: refused as unsafe ({in_one_line(error)}); leave it out or correct it") from error
    except Exception as error:  # a template can raise whatever an expression of Python can
        raise UserError(f"{where}: cannot be rendered ({type(error).__name__}: {in_one_line(error)})") from error
    if len(parts) != 2 or not all(parts):
        return None
    environment, _ = _environments()
    cut = [environment.call_filter("truncate", choice, [TEXT_LENGTH]) for choice in offered or () if choice]
    if parts[1] not in cut:
        if cut and "Accuracy" in template.metrics:
            raise UserError(f"{where}: the target {parts[1][:80]!r} is not among its answer choices {str(cut)[:300]}")
        cut = []  # choices that the prompt mentions, but not as the only answers
    return Example(parts[0], parts[1], (parts[1],), tuple(dict.fromkeys(cut)))


def missing_fields(template: Template, fields: Iterable[str]) -> list[str]:
    """Fields that a template needs and `fields` lacks. Raises UserError for a template that Jinja cannot read."""
    return sorted(_compiled(template)[2] - set(fields))


def _text(template: Any, values: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(values):
        pieces.append(piece)
        length += len(piece)
        if length > OUTPUT_LENGTH:
            raise OverflowError(f"more than {OUTPUT_LENGTH:,} characters")
    return "".join(pieces)


@lru_cache(maxsize=512)
def _compiled(template: Template) -> tuple[Any, Any, frozenset[str]]:
    """The main template, that of the answer choices, and the fields that they need."""
    from jinja2 import meta
    from jinja2.exceptions import TemplateSyntaxError

    made, needs = [], set()
    try:
        for environment, source in zip(_environments(), (template.jinja, template.answer_choices)):
            marked = None if source is None else source.replace("|||", _MARK)
            made.append(None if marked is None else environment.from_string(marked))
            needs |= set() if marked is None else meta.find_undeclared_variables(environment.parse(marked))
    except TemplateSyntaxError as error:
        raise UserError(f"{template}: not a Jinja template, line {error.lineno} ({in_one_line(error)}); correct it") from error
    except (RecursionError, MemoryError, OverflowError) as error:
        raise UserError(f"{template}: too large to compile ({type(error).__name__})") from error
    return made[0], made[1], frozenset(needs if template.answer_choices is None else needs - {"answer_choices"})


def _sandbox() -> tuple[type, type]:
    """Jinja's sandbox with bounds on what templates may compute, and what stands for a missing value in it."""
    from jinja2 import StrictUndefined, Undefined
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Missing(StrictUndefined):
        """A condition may ask for what is not there; to print it would be nonsense."""

        __bool__, __eq__, __ne__, __hash__ = Undefined.__bool__, Undefined.__eq__, Undefined.__ne__, Undefined.__hash__

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            # The sandbox's own waits until the value is used, and some uses print it as nothing.
            raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__}")

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            # Some of P3's templates gather items in lists and dictionaries; rows are copies, so nothing outlives a rendering.
            gathers = attr in ("append", "pop", "update") and type(obj) in (list, dict)
            return gathers or super().is_safe_attribute(obj, attr, value)

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            owner = getattr(obj, "__self__", None)
            if type(owner) in (list, dict) and len(owner) >= LIST_LENGTH:
                raise OverflowError(f"more than {LIST_LENGTH:,} items")
            return super().call(context, obj, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if operator == "**" and not (numbers and abs(left) <= 1e6 and abs(right) <= 32):
                raise OverflowError("a power that is too large")
            longest = max(len(x) if hasattr(x, "__len__") else 0 for x in (left, right))
            times = next((abs(x) for x in (left, right) if isinstance(x, int)), 0)
            if operator == "*" and not numbers and longest * times > LIST_LENGTH:
                raise OverflowError("a product that is too large")
            return super().call_binop(context, operator, left, right)

    return Sandbox, Missing


@cache
def _environments() -> tuple[Any, Any]:
    """The sandbox with promptsource's additions, for prompts, where printed values are cut, and for answer choices."""
    from jinja2 import BaseLoader, pass_context

    Sandbox, Missing = _sandbox()

    # With a context these are run at rendering, never at compilation, where Jinja evaluates what is constant.
    @pass_context
    def cut(context: Any, value: Any) -> str:
        return context.environment.call_filter("truncate", str(value), [TEXT_LENGTH])

    @pass_context
    def choice(context: Any, items: Sequence[Any]) -> Any:
        return context["|rng"].choice(items)

    def most_frequent(items: Iterable[Any]) -> list[Any]:
        counted = Counter(items).most_common()
        return [item for item, count in counted if count == counted[0][1]]

    environment = Sandbox(loader=BaseLoader(), undefined=Missing, finalize=cut)
    environment.globals.update(zip=zip)
    del environment.globals["lipsum"]  # draws from Python's global random numbers
    environment.filters.update(choice=choice, random=choice, most_frequent=most_frequent)
    return environment, environment.overlay(finalize=None)
