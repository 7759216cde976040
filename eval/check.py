"""`hyperllama check`: what a recipe's data is and what it costs, before anything is paid for. No GPU and no weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np

from attention_masks import GistLayout, Segment, draw
from eval.flops import ModelCost
from eval.plan import plan
from eval.run import check_leaks
from eval.sizing import Hardware
from hyperllama.base.checks import check_config
from hyperllama.base.loading import find_config, load_tokenizer, random_config
from hyperllama.commands.train import packing_of
from hyperllama.data.episode import Source, repetition_of, said_twice
from hyperllama.data.leaks import find_leaks
from hyperllama.data.mixture import MixtureSource
from hyperllama.data.p3 import P3Source
from hyperllama.data.packing import pack_full, pack_gist
from hyperllama.data.stream import EpisodeStream
from hyperllama.data.templates import TemplateSource
from hyperllama.data.text import EncodedEpisode, Encoder, Limits, TextFormat
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError
from hyperllama.hypernetworks.config import read_config
from hyperllama.hypernetworks.registry import kind_of
from hyperllama.recipe.loading import load_any_recipe
from hyperllama.recipe.schema import AnyRecipe, EvaluationRecipe, Recipe
from hyperllama.recipe.sources import make_source

PERCENTILES = (5, 50, 95, 100)
MASK_ROWS = 28


def check(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    against: str | Path | None = None,
    episodes: int = 500,
    hardware: Hardware | None = None,
) -> str:
    """A report on a recipe of any kind, as text; `episodes` are drawn for its figures, as training would draw them.

    With `hardware`, a plan of what training costs there comes last; then data or a tokenizer that is not at hand is no error:
    the report says so, and the plan goes by the limits. Neither is then asked of a network.

    Raises UserError for whatever running the recipe would refuse about its values, data, config or tokenizer.
    """
    if hardware is None:
        return "\n".join(_data_report(recipe_path, load_any_recipe(recipe_path, overrides), against, episodes)[0])
    recipe = load_any_recipe(recipe_path, overrides, data=False)
    if not isinstance(recipe, Recipe):
        raise UserError(f"{recipe_path}: --gpus plans a training run, but its method is {recipe.method}; leave --gpus out")
    if recipe.model.name_or_path:
        find_config(recipe.model.name_or_path, recipe.model.revision)  # without a base there is nothing to plan
    try:
        lines, encoded, vocabulary, size = _data_report(recipe_path, recipe, against, episodes, local=True)
    except UserError as error:
        lines = [f"{recipe_path}: method {recipe.method}", f"the figures of the data are left out: {error}"]
        encoded, vocabulary, size = [], None, None
    if not encoded:
        lines += state_lines(recipe, encoded)
    return "\n".join([*lines, "", *plan(recipe, hardware, encoded, vocabulary=vocabulary, examples=size)])


def _data_report(
    recipe_path: str | Path, recipe: AnyRecipe, against: str | Path | None, episodes: int, local: bool = False
) -> tuple[list[str], list[EncodedEpisode], int, int | None]:
    """The report on the data; the episodes that were drawn, the tokens of the vocabulary, and the examples if they end."""
    hub = next((part.hub for part in recipe.data.parts if part.hub), None)
    if local and hub:
        raise UserError(f"{hub} is on the hub, which a plan does not ask; check without --gpus reads it")
    source = make_source(recipe.data)
    encoder, made = _encoder(recipe, source, local)
    encoded = list(_draw(recipe, source, encoder, episodes))
    lines = [f"{recipe_path}: method {recipe.method}, data {recipe.data}", *_data(source), f"tokenizer       {made}", ""]
    lines += _figures(recipe, encoded)
    lines += state_lines(recipe, encoded) if isinstance(recipe, Recipe) else []
    lines += ["", *_leaks(recipe, source, against)]
    lines += ["", *_mask(recipe, encoded)]
    lines += ["", "one episode as text, | where answers begin and end:", "", *_text(encoder, encoded)]
    return lines, encoded, len(encoder.tokenizer), len(source) or None


def _encoder(recipe: AnyRecipe, source: Source, local: bool) -> tuple[Encoder, str]:
    """The encoder that a run would use, and where its tokenizer comes from."""
    text_format, limits, gist_notes = recipe.format, recipe.limits, {}
    if isinstance(recipe, Recipe):
        name, revision = recipe.model.name_or_path, recipe.model.revision
        if not name:
            tokenizer = train_tokenizer(source.texts(), kind=recipe.model.tokenizer, vocab_size=recipe.model.vocab_size)
            random_config(recipe.model.architecture, vocab_size=len(tokenizer))
            return Encoder(tokenizer, text_format, limits), f"{recipe.model.tokenizer}, {len(tokenizer):,} tokens, trained now"
    else:
        name, revision = recipe.model, None
        if recipe.hypernetwork:
            config = read_config(recipe.hypernetwork)
            name, gist_notes = name or config["base"]["name"], config["notes"]
    if name is None:
        raise UserError("model: this evaluation names no model, so there are no tokens to count; its methods only copy text")
    check_config(find_config(name, revision), name)
    text_format = text_format or TextFormat(**gist_notes.get("format", {}))
    limits = limits or Limits(**gist_notes.get("limits", {}))
    tokenizer = load_tokenizer(name, revision, local=local)
    return Encoder(tokenizer, text_format, limits), f"of {name}, {len(tokenizer):,} tokens"


def _draw(recipe: AnyRecipe, source: Source, encoder: Encoder, count: int) -> Iterator[EncodedEpisode]:
    data = recipe.data
    if isinstance(recipe, EvaluationRecipe):
        drawn = source.evaluation(shots=data.shots, queries=data.queries, episodes=recipe.episodes, seed=recipe.seed)
        yield from map(encoder.encode, drawn[:count])
        return
    stream = EpisodeStream(
        source, encoder, seed=recipe.seed, length=count, shots=data.shots, min_shots=data.fewest_shots, queries=data.queries
    )
    yield from (stream[i] for i in range(count))


def _data(source: Source) -> list[str]:
    found, size = source.provenance(), len(source)
    names = sorted(found.tasks)
    shown = ", ".join(names[:4]) + (f", ... {names[-1]}" if len(names) > 4 else "")
    lines = [f"tasks           {len(names):,}: {shown}", f"examples        {f'{size:,}' if size else 'endless'}"]
    if found.datasets:
        lines.append(f"made from       {len(found.datasets):,} data sets")
    if twice := said_twice(repetition_of(source)):
        lines.append(f"said twice      {twice}")
    for part in source.sources if isinstance(source, MixtureSource) else [source]:
        if isinstance(part, TemplateSource):
            report = part.report
            lines.append(f"rendered        {report.rendered:,} examples; {report.dropped:,} came out empty and are left out")
            lines += [f"not applicable  {name}: {reason}" for name, reason in report.skipped.items()]
        if isinstance(part, P3Source) and part.missing:
            lines.append(f"not there       {', '.join(part.missing)}")
    return lines


def _figures(recipe: AnyRecipe, encoded: Sequence[EncodedEpisode]) -> list[str]:
    queries = [len(prompt) + len(answer) for e in encoded for prompt, answer in e.queries]
    columns = {
        "context": [len(e.context) for e in encoded],
        "query + answer": queries,
        "answer": [len(answer) for e in encoded for _, answer in e.queries],
        "demonstrations": [e.demonstrations for e in encoded],
        "queries": [len(e.queries) for e in encoded],
    }
    lines = [
        f"{len(encoded):,} episodes, tokens{'':4}" + "".join(f"{f'{p} %' if p < 100 else 'longest':>9}" for p in PERCENTILES)
    ]
    for name, values in columns.items():
        if values and any(values):
            cells = "".join(f"{np.percentile(values, p):9,.0f}" for p in PERCENTILES)
            lines.append(f"  {name:<22}{cells}")
    shown, dropped = sum(e.demonstrations for e in encoded), sum(e.dropped_demonstrations for e in encoded)
    share = f" ({100 * dropped / (shown + dropped):.1f} %)" if shown + dropped else ""
    lines += [
        f"dropped         {dropped:,} of {shown + dropped:,} demonstrations{share} do not fit into limits.context_tokens",
        f"skipped         {sum(e.skipped_queries for e in encoded):,} queries do not fit into limits.query_tokens",
        "cut             nothing: what does not fit is left out whole",
    ]
    empty = sum(not e.context for e in encoded)
    if empty:
        lines.append(f"empty           {empty:,} episodes have no context at all")
    if isinstance(recipe, Recipe):
        batch = recipe.training.get("per_device_train_batch_size", 8) * recipe.training.get("gradient_accumulation_steps", 1)
        gists = recipe.gist.tokens if recipe.method == "hypernetwork" else 0
        # In full attention each query has its context before it.
        rows = [
            sum(len(p) + len(a) - 1 for p, a in e.queries)
            + (len(e.context) + gists) * (1 if recipe.method == "hypernetwork" else len(e.queries))
            for e in encoded
        ]
        steps = recipe.training.get("max_steps", -1)
        per_step = batch * float(np.mean(rows))
        total = f", {per_step * steps:,.0f} in {steps:,} steps" if steps > 0 else ""
        lines.append(f"one step        {batch} episodes a device, {per_step:,.0f} tokens on average{total}")
    return lines


def state_lines(recipe: Recipe, encoded: Sequence[EncodedEpisode]) -> list[str]:
    """What a task leaves to be read, in bytes of bf16, for the median context, or the longest that the limits allow.

    Prefix rows, or a task module with all its parts, beside the context's own keys and values; nothing without a hypernetwork,
    or for a model whose sizes are not known.
    """
    if recipe.method != "hypernetwork":
        return []
    model, gist = recipe.model, recipe.gist
    try:
        if model.name_or_path:
            config = find_config(model.name_or_path, model.revision)
        else:
            config = random_config(model.architecture, vocab_size=model.vocab_size)
        cost = ModelCost.of(config)
    except UserError:
        return []
    context = int(np.median([len(e.context) for e in encoded])) if encoded else recipe.limits.context_tokens
    chunks = len(gist.chunking.chunks(range(context)))
    parts = kind_of(recipe).state_bytes(cost, context, chunks * gist.tokens)
    said = " + ".join(f"{name} {size / 1e6:,.2f} MB" for name, size in parts.items())
    total = f" = {sum(parts.values()) / 1e6:,.2f} MB" if len(parts) > 1 else ""
    return [
        f"state of a task {said}{total} in bf16, for a context of {context:,} tokens",
        f"beside it       its keys and values, cached: {cost.state_bytes(context) / 1e6:,.2f} MB",
    ]


def _leaks(recipe: AnyRecipe, source: Source, against: str | Path | None) -> list[str]:
    lines = []
    if isinstance(recipe, EvaluationRecipe):
        lines.append(f"shared with training: {check_leaks(recipe, source)[0]}")
    if against is not None:
        other = make_source(load_any_recipe(against).data)
        lines.append(f"shared with {against}: {find_leaks(source.provenance(), other.provenance())}")
    return lines or ["shared data: not checked; name the other recipe with --against"]


def _mask(recipe: AnyRecipe, encoded: Sequence[EncodedEpisode]) -> list[str]:
    """The mask of the recipe's first batch, or as many of its episodes as can be drawn; a cell may stand for several rows."""
    if isinstance(recipe, Recipe):
        size, packing = recipe.training.get("per_device_train_batch_size", 8), packing_of(recipe)
    else:
        size, packing = 1, recipe.budget or (read_config(recipe.hypernetwork)["gists"] if recipe.hypernetwork else 16)
    full = isinstance(recipe, Recipe) and recipe.method == "full_attention"
    batch = list(encoded[:size])
    packed = pack_full(batch) if full else pack_gist(batch, packing)
    whole = packed.layout
    while len(batch) > 1 and sum(1 + len(e.queries) for e in batch) > MASK_ROWS // 4:
        batch.pop()
    layout = (pack_full(batch) if full else pack_gist(batch, packing)).layout
    unit = max(1, math.ceil(layout.tokens / MASK_ROWS))
    drawn = GistLayout([_shrunk(segment, unit) for segment in layout.segments])
    kinds = Counter("context" if segment.gists else "query" for segment in whole.segments[packed.sinks :])
    counts = ", ".join(
        f"{n} {kind if n == 1 else {'context': 'contexts', 'query': 'queries'}[kind]}" for kind, n in kinds.items()
    )
    what = f"mask of the first batch ({counts}, {whole.tokens:,} rows)"
    if len(batch) < size:
        what += f", its first {len(batch)} of {size} episodes"
    return [f"{what}; a cell is about {unit} row{'s' if unit > 1 else ''}:", "", draw(drawn)]


def _shrunk(segment: Segment, unit: int) -> Segment:
    gists = math.ceil(segment.gists / unit)
    rest = math.ceil((segment.tokens - segment.gists) / unit)
    return Segment(rest + gists, gists=gists, reads=segment.reads)


def _text(encoder: Encoder, episodes: Sequence[EncodedEpisode]) -> list[str]:
    """The first episode that asks anything: its task, counts and text are all read from its token ids' own record."""
    decode = encoder.tokenizer.decode
    encoded = next((episode for episode in episodes if episode.queries), episodes[0])
    ends = sorted({end for span in encoded.answers for end in span} | {len(encoded.context)})
    pieces, start = [], 0
    for end in ends:
        pieces.append(decode(list(encoded.context[start:end])))
        start = end
    query = Random(0).choice(encoded.queries) if encoded.queries else ((), ())
    counts = f"{encoded.demonstrations} demonstrations, {encoded.dropped_demonstrations} dropped"
    shown = [f"context of {encoded.task or 'an episode without a name'} ({counts}):", "|".join(pieces)]
    shown += ["", "a query and its answer:", f"{decode(list(query[0]))}|{decode(list(query[1]))}"]
    return [line for part in shown for line in part.split("\n")]
