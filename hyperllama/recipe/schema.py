"""Recipes: what a run is, as typed values. `hyperllama.recipe.loading` reads them from YAML.

Sections of kinds of hypernetworks, of sources and of objectives come from their registries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, Literal

from hyperllama.data.chunking import Chunking
from hyperllama.data.passages import Passages
from hyperllama.data.registry import SOURCES
from hyperllama.data.text import Limits, TextFormat
from hyperllama.hypernetworks.registry import KINDS, kind_of
from hyperllama.objectives.mix import mix_class


def with_sections(schema: type, sections: Mapping[str, type]) -> type:
    """A recipe's dataclass with a field for each section that it has none for, under the section's name."""
    return _with_sections(schema, tuple(sections.items()))


@cache
def _with_sections(schema: type, sections: tuple[tuple[str, type], ...]) -> type:
    there = {known.name for known in fields(schema)}
    new = [(name, section, field(default_factory=section)) for name, section in sections if name not in there]
    if not new:
        return schema
    made = make_dataclass(schema.__name__, new, bases=(schema,), frozen=True)
    made.__doc__, made.__module__ = schema.__doc__, __name__
    return made


def kind_sections() -> dict[str, type]:
    """Settings of kinds of hypernetworks that have some, by kind."""
    return {kind: settings for kind, settings in KINDS.items() if fields(settings)}


def source_sections() -> dict[str, type]:
    """Settings of sources that have some, by source."""
    return {name: kind.settings for name, kind in SOURCES.items() if kind.settings is not None}


@dataclass(frozen=True)
class ModelRecipe:
    """The base model: a local folder or a hub name with its tokenizer; without one, an `architecture` initialised at random.

    `architecture` holds `model_type` and fields of its transformers config. Its `tokenizer`, "words", knows the words of a
    synthetic language; "bytes" is byte-level BPE of `vocab_size`, trained on the data's own text. `quantize: nf4` keeps the
    linear layers of the frozen base in 4 bits (Dettmers et al. 2023, arXiv 2305.14314); they compute in `dtype`.
    """

    name_or_path: str | None = None
    revision: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: Literal["words", "bytes"] = "bytes"
    vocab_size: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["nf4"] | None = None


@dataclass(frozen=True)
class GistRecipe:
    """What becomes of a context: `tokens`, G, is how many rows a prefix has, or each chunk of a context cut by `chunking`.

    `kind` is one of `hyperllama.hypernetworks.registry.KINDS`: "lora" (Phang 2024), "full" (a tuned copy of the base
    compresses), "gisting" (one model, all weights tuned: Mu et al. 2023), "pooling" (cross-attention over the base's keys and
    values) or "hint" (task modules from an encoded instruction; `tokens` may be 0). `elastic` trains for 1, 2, 4, ... up to G
    gists at once. `sink` puts the base's own row of its first token before the rows of every prefix, since attention of a
    pretrained model rests there; null does so unless a prefix has no other rows, or begins with that token anyway (pooling
    that is `attended` or has a `recency`). `backend`: the attention kernel; `hyperllama env` lists them.
    """

    tokens: int = 16
    kind: str = "pooling"
    chunking: Chunking = field(default_factory=Chunking)
    elastic: bool = False
    sink: bool | None = None
    backend: str = "auto"


@dataclass(frozen=True)
class SourceRecipe:
    """One source of episodes.

    source: "synthetic" (a generated language), "sni" (Super-NaturalInstructions; `split` is a list below `splits`), "p3" (the
    Public Pool of Prompts), "templates" (P3 prompts rendered over labelled sets), "symbols" (symbol tuning of labelled sets),
    "text" (windows of plain text), or "jsonl" (a file, or a folder of files). `root` is a local folder or file, `hub` a name
    for the `datasets` library instead. At most `instances_per_task` examples of a task are used. `task_weights`: every task is
    equally likely, or by its number of examples (sni, p3, templates and jsonl). `own_demonstrations`: show only those that a
    task's file means to be shown (S-NI's positive examples), not its other examples. `leave_out` names tasks that are not used,
    such as those whose inputs an evaluation has. In a mixture `weight` counts, and `shots`
    and `min_shots` replace the mixture's if they are given.
    """

    source: str = "synthetic"
    root: str | None = None
    hub: str | None = None
    split: str = "train"
    splits: str = "splits/default"
    instances_per_task: int = 100
    task_weights: Literal["equal", "size"] = "equal"
    own_demonstrations: bool = False
    leave_out: list[str] = field(default_factory=list)
    weight: float = 1.0
    shots: int | None = None
    min_shots: int | None = None

    @property
    def fewest_shots(self) -> int | None:
        """How many demonstrations an episode has at least."""
        return self.shots if self.min_shots is None else self.min_shots


SourceRecipe = with_sections(SourceRecipe, source_sections())


@dataclass(frozen=True)
class DataRecipe(SourceRecipe):
    """Where episodes come from and how they are drawn: one source, or a `mixture` of several by their weights.

    An episode has `min_shots` to `shots` demonstrations (exactly `shots` if `min_shots` is null; per class for symbols) and
    `queries` queries that share them.
    """

    mixture: list[SourceRecipe] = field(default_factory=list)
    shots: int = 16
    queries: int = 4

    @property
    def parts(self) -> list[SourceRecipe]:
        """The sources: those of the mixture, or the one."""
        return list(self.mixture) or [self]

    def __str__(self) -> str:
        return " + ".join(f"{part.source} {part.hub or part.root or ''}".strip() for part in self.parts)


@dataclass(frozen=True)
class FullAttentionRecipe:
    """For method full_attention: whether answers of demonstrations are targets too; `lora` (of that recipe) or all weights."""

    supervise_demonstrations: bool = False
    lora: bool = False


@dataclass(frozen=True)
class Recipe:
    """One training run. `training` is transformers' TrainingArguments, verbatim.

    `deepspeed` is the name of a file of recipes/deepspeed without .json, such as zero3, or a path to one of DeepSpeed's own.

    `start_from` is the run of a hypernetwork of the same base and kind whose weights training starts from, as after pretraining
    on text. `objectives` weigh what a hypernetwork is trained for.

    method "hypernetwork" freezes the base and trains gists and LoRA; "full_attention" trains all weights of the base, or LoRA
    on them, with demonstrations in plain sight: the multi-task baseline, or the base of a toy.
    """

    method: Literal["hypernetwork", "full_attention"] = "hypernetwork"
    output: str | None = None
    seed: int = 0
    model: ModelRecipe = field(default_factory=ModelRecipe)
    gist: GistRecipe = field(default_factory=GistRecipe)
    objectives: mix_class() = field(default_factory=mix_class())
    start_from: str | None = None
    data: DataRecipe = field(default_factory=DataRecipe)
    format: TextFormat = field(default_factory=TextFormat)
    limits: Limits = field(default_factory=Limits)
    full_attention: FullAttentionRecipe = field(default_factory=FullAttentionRecipe)
    deepspeed: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


Recipe = with_sections(Recipe, kind_sections())


@dataclass(frozen=True)
class EvaluationRecipe:
    """One evaluation: methods side by side on the same examples.

    `hypernetwork` is the folder of a run, whose base is read from there, or from `model` if it has moved; without one, `model`
    alone is evaluated. The base is loaded in `dtype`, that of the run unless given. `multi_task` is the run of a full-attention
    model, `prefixes` a folder of prefix files named by task.
    `gists` asks an elastic hypernetwork for fewer than it has. `budget` is the number of key-value rows of the methods that
    have one, those of a prefix (gists and sink) unless given: for contexts cut in chunks, give it. `refine` is the most
    steps of methods that tune prefixes, `refine_on` what on: "answers" of their own examples, or "context", what the model says
    with the whole of it. `methods` are names of
    `eval.methods.METHODS`; empty for all that apply. `metric`: "text" generates and scores ROUGE-L and exact match,
    "exact_match" the same with exact match first, "choices" ranks the choices of a query by likelihood, "loss" is that of the
    continuation; "auto" goes by the data. `format` and `limits` are those of the hypernetwork unless given. At most `episodes`
    episodes of a source that could go on for ever. A batch has at most `batch_tokens` tokens. `leaks`: whether data shared with
    the training refuses or warns.
    """

    method: Literal["evaluate"] = "evaluate"
    output: str | None = None
    seed: int = 0
    hypernetwork: str | None = None
    model: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    multi_task: str | None = None
    prefixes: str | None = None
    data: DataRecipe = field(default_factory=DataRecipe)
    episodes: int = 100
    gists: int | None = None
    budget: int | None = None
    refine: int = 0
    refine_on: Literal["answers", "context"] = "answers"
    methods: list[str] = field(default_factory=list)
    metric: Literal["auto", "text", "exact_match", "choices", "loss"] = "auto"
    format: TextFormat | None = None
    limits: Limits | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    batch_tokens: int = 8192
    resamples: int = 1000
    leaks: Literal["refuse", "warn"] = "refuse"


@dataclass(frozen=True)
class StartRecipe:
    """Where tuned prefixes start from.

    kind: "hypernetwork" (the prefix that the run `hypernetwork` makes of a task's examples), "demonstrations" (the keys and
    values of their first `gists` tokens) or "pooled_demonstrations" (means of neighbours), "vocabulary" (the activations of
    `words`, or of tokens drawn from the examples), "attended" (the keys and values to which the second half of the examples
    attends most, as a base by itself compresses), "random" (with the statistics of real keys and values), or "prefix" (the
    file `prefix`, or TASK.safetensors in that folder). `gists` counts where no hypernetwork decides it. With `sink` a start
    begins with one row more, the base's own of its first token, which is not tuned; prefixes of a hypernetwork or a file
    stay as they are. `hidden` puts an MLP of that width before the prefix while it is trained, and folds it away in the end.
    """

    kind: Literal["hypernetwork", "demonstrations", "pooled_demonstrations", "attended", "vocabulary", "random", "prefix"] = (
        "hypernetwork"
    )
    hypernetwork: str | None = None
    prefix: str | None = None
    words: list[str] = field(default_factory=list)
    gists: int = 16
    sink: bool = True
    hidden: int | None = None


@dataclass(frozen=True)
class TuneRecipe:
    """Prefix tuning of one task or several at once, a prefix each, of a frozen model.

    The base is `model`, or the one of `start.hypernetwork`, in `dtype`, that of the run unless given. Tasks are the
    evaluation episodes of `data`, at most `episodes`: a task is tuned on its data.shots demonstrations and reported on its
    data.queries queries. Of the demonstrations a share `validation` decides when to stop: after `patience` measurements,
    `measure_every` steps apart, without improvement of any task; null never stops early. A step sees `examples_per_task`
    examples of each of `tasks_per_step` tasks (0: all), on each rank. `training` is transformers' TrainingArguments,
    verbatim; `deepspeed` as in a `Recipe`.

    `objective`: "answers" trains on those of the examples; "context" trains a prefix to say what the model says with the whole
    context, on `passages` that the model makes up behind it (Eyuboglu et al. 2025, arXiv 2506.06266). Then all examples are
    context, a share `validation` of the passages decides when to stop, and data may be windows of plain text too.
    """

    method: Literal["tune"] = "tune"
    output: str | None = None
    seed: int = 0
    model: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    start: StartRecipe = field(default_factory=StartRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    episodes: int = 20
    objective: Literal["answers", "context"] = "answers"
    passages: Passages = field(default_factory=Passages)
    validation: float = 0.25
    patience: int | None = 5
    measure_every: int = 10
    examples_per_task: int = 8
    tasks_per_step: int = 0
    format: TextFormat | None = None
    limits: Limits | None = None
    deepspeed: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyRecipe:
    """The initialisation study: the recipe `tune` for every start, number of examples and seed, and full attention beside them.

    A start is a kind of `StartRecipe`, or "kind:key=value,..." with overrides of its own. `sizes` are data.shots. Seeds draw
    other tasks and other examples.
    """

    method: Literal["study"] = "study"
    output: str | None = None
    tune: str | None = None
    starts: list[str] = field(default_factory=lambda: ["hypernetwork", "demonstrations", "vocabulary", "random"])
    sizes: list[int] = field(default_factory=lambda: [4, 16, 64])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    resamples: int = 1000


@dataclass(frozen=True)
class TableRecipe:
    """One question of a study as a table: the recipe `train` with the overrides of each row, for each seed, evaluated alike.

    `rows` are names and overrides. A row whose only override is "run=FOLDER" is not trained: it is that run, for all seeds.
    A row with "method=full_attention" is a model all of whose weights are trained: the multi-task baseline.
    `evaluations` are names and overrides of the recipe `evaluate`; one, without overrides, unless given. `base_methods` are
    evaluated once for all rows, with the `model` and the `budget` of that recipe, whose `methods` are then those of rows; the
    table has intervals then, and leaves the results of every example in one file. Without rows, it is about the base alone.
    """

    method: Literal["table"] = "table"
    output: str | None = None
    question: str = ""
    train: str | None = None
    evaluate: str | None = None
    rows: dict[str, list[str]] = field(default_factory=dict)
    evaluations: dict[str, list[str]] = field(default_factory=dict)
    base_methods: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])


def current(schema: type) -> type:
    """A recipe's dataclass with the sections of all kinds, sources and objectives that are registered by now."""
    own = {known.name for known in fields(schema)}
    if "data" not in own:
        return schema
    part = with_sections(SourceRecipe, source_sections())
    if part is not SourceRecipe:
        mixture = ("mixture", list[part], field(default_factory=list))
        data = make_dataclass("DataRecipe", [mixture], bases=(with_sections(DataRecipe, source_sections()),), frozen=True)
        schema = make_dataclass(schema.__name__, [("data", data, field(default_factory=data))], bases=(schema,), frozen=True)
    if "objectives" in own:
        schema = with_sections(schema, kind_sections())
        mix = mix_class()
        if fields(mix) != fields(schema.__dataclass_fields__["objectives"].default_factory):
            changed = [("objectives", mix, field(default_factory=mix))]
            schema = make_dataclass(schema.__name__, changed, bases=(schema,), frozen=True)
    return schema


def has_sink(recipe: Recipe) -> bool:
    """Whether prefixes of a recipe's hypernetwork begin with the base's own row of its first token."""
    gist = recipe.gist
    return kind_of(recipe).has_sink(gist.tokens) if gist.sink is None else gist.sink


AnyRecipe = Recipe | EvaluationRecipe | TuneRecipe | StudyRecipe | TableRecipe
