"""`hyperllama evaluate`: methods side by side on the same examples, resumable and shared out over ranks.

Leaves in `output`: examples/rank*.jsonl (a line an example and method, see `eval.answering`), episodes.jsonl (what stands
before the queries of each episode), summary.json, report.md, quality.png, cost.png, and the resolved recipe. Ranks (torchrun,
or RANK and WORLD_SIZE set by hand) take every n-th episode and need no connection: whoever finishes last finds all lines
there and writes the report.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.answering import Kind, Query, before_queries, kind_of, queries_of, results
from eval.methods import METHODS, NEEDS, Bench, Method, found_in, instruction_fits
from eval.report import write_report
from eval.summary import summarise
from hyperllama.base.checks import check_config
from hyperllama.base.environment import versions
from hyperllama.base.loading import load_base, load_config, load_tokenizer
from hyperllama.data.episode import Episode, Source, repetition_of, tell_twice
from hyperllama.data.grouping import in_groups
from hyperllama.data.leaks import find_leaks
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.errors import UserError
from hyperllama.files import append, read_text, sha256, whole_json_lines, write_atomically
from hyperllama.hypernetworks import loading as hypernetworks_loading
from hyperllama.hypernetworks.config import check_gists, read_config
from hyperllama.inference.reader import Reader
from hyperllama.recipe.loading import differences, load_recipe, save_recipe
from hyperllama.recipe.schema import EvaluationRecipe
from hyperllama.recipe.sources import make_source
from hyperllama.runs import MADE_FROM, RECIPE, check_folder, check_same, digest_of, owned, remember

EXAMPLES, EPISODES, SUMMARY = "examples", "episodes.jsonl", "summary.json"
# May change between one start and the next: what is there stays valid.
FREE = ("methods", "resamples", "batch_tokens", "leaks")
GROUP_QUERIES = 2000


def evaluate(recipe_path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any] | None:
    """Evaluate what a recipe describes, or go on where the last run in its folder stopped.

    Returns the summary, or None for a rank that is done while others are not.
    """
    recipe = load_recipe(recipe_path, overrides, schema=EvaluationRecipe)
    unknown = sorted(set(recipe.methods) - set(METHODS))
    if unknown:
        raise UserError(f"{recipe_path}: methods: no method {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    output, rank = Path(recipe.output), int(os.environ.get("RANK", 0))
    check_folder(output)
    if (output / RECIPE).is_file():
        changed = set(differences(read_text(output / RECIPE, "the recipe of an evaluation"), save_recipe(recipe)))
        changed = {key for key in changed if key.split(".")[0] not in FREE}
        if changed:
            raise UserError(
                f"{output} holds an evaluation of another recipe (it differs in {', '.join(sorted(changed))}); "
                "set output to a new folder, or remove this one"
            )
    refuse_older(output)
    for name in filter(None, [recipe.model, recipe.multi_task]):
        check_config(load_config(name), name)
    if recipe.hypernetwork:
        check_gists(recipe.hypernetwork, read_config(recipe.hypernetwork), recipe.gists)
    source = make_source(recipe.data)
    if rank == 0:
        tell_twice(repetition_of(source))
    episodes = episodes_of(recipe, source)
    made_from = facts_of(recipe, episodes)
    check_same(output, made_from)
    applicable(recipe, episodes, kind_of(episodes, recipe.metric))  # refused before models load
    leaks = refuse_leaks(recipe, source, tell=rank == 0)
    with owned(output / f"rank{rank}", folder=False):
        return _evaluate(recipe, episodes, leaks, made_from)


def _evaluate(
    recipe: EvaluationRecipe, episodes: Sequence[Episode], leaks: str, made_from: dict[str, str | None]
) -> dict[str, Any] | None:
    output, rank, ranks = Path(recipe.output), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind, bench = kind_of(episodes, recipe.metric), make_bench(recipe, episodes)
    offered = sum(len(e.queries or (1,)) for e in episodes)
    bench.episodes = episodes = readable(episodes, bench.encoder) if bench.encoder else episodes
    methods = applicable(recipe, episodes, kind)  # what is left may lack what all had, such as a second task
    bench.methods = [method.name for method in methods]
    asked = {i: queries_of(bench, episode, kind) for i, episode in enumerate(episodes)}
    refuse_too_long(bench, methods, asked, kind, recipe.generation)
    if (output / MADE_FROM).is_file() or not (output / RECIPE).is_file():  # not over a recipe that a user has written there
        write_atomically(output / RECIPE, save_recipe(recipe))
    remember(output, made_from)
    run = Run(output / EXAMPLES, rank, [method.name for method in methods], {i: len(q) for i, q in asked.items()})
    keep_episodes(output, [before_queries(bench, i) for i in range(len(episodes))], asked, run.lines())
    for method, indices in run.left(bench, asked, range(rank, len(episodes), ranks)):
        run.write(results(bench, method, indices, [asked[i] for i in indices], kind, recipe.generation))
    lines = run.lines()
    if run.missing(lines):
        print(f"rank {rank}: done; {run.missing(lines)} of all results are still to come from others", file=sys.stderr)
        return None
    facts = describe(recipe, bench, episodes, kind, leaks, offered)
    summary = summarise(lines, [m.name for m in methods], facts, resamples=recipe.resamples, seed=recipe.seed)
    write_atomically(output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    write_report(summary, output)
    return summary | {"report": str(output / "report.md")}


def base_name(recipe: EvaluationRecipe) -> str | None:
    """The base that an evaluation reads with, if it has one."""
    return recipe.model or (read_config(recipe.hypernetwork)["base"]["name"] if recipe.hypernetwork else None)


def facts_of(recipe: EvaluationRecipe, episodes: Sequence[Episode]) -> dict[str, str | None]:
    """Fingerprints of all that an evaluation's results depend on beside its recipe."""
    models = {
        "base": base_name(recipe),
        "hypernetwork": recipe.hypernetwork,
        "multi_task": recipe.multi_task,
        "prefixes": recipe.prefixes,
    }
    data = sha256(*(repr(episode) for episode in episodes))
    return {"data": data, **{name: digest_of(path) for name, path in models.items()}}


def refuse_too_long(
    bench: Bench, methods: Sequence[Method], asked: dict[int, list[Query]], kind: Kind, generation: dict
) -> None:
    """UserError if what stands before a query, the query and its answer take more positions than the model has."""
    if bench.reader is None:
        return
    positions = bench.reader.model.config.max_position_embeddings
    whole = any(method.role == "context" for method in methods)
    new = generation.get("max_new_tokens", bench.encoder.format.answer_tokens) if kind == "text" else 0
    for i, queries in asked.items():
        rows = len(bench.context(bench.episodes[i])) if whole else bench.budget or 0
        longest = max((len(q.prompt) + (new or max(map(len, q.continuations))) for q in queries), default=0)
        if rows + longest > positions:
            raise UserError(
                f"task {bench.episodes[i].task}: {rows} rows of context and {longest} tokens of a query with its answer are "
                f"more than the model's {positions} positions; lower limits.context_tokens or format.answer_tokens"
            )


def episodes_of(recipe: EvaluationRecipe, source: Source) -> list[Episode]:
    """The episodes of an evaluation; UserError if nothing is asked in any."""
    data = recipe.data
    episodes = source.evaluation(shots=data.shots, queries=data.queries, episodes=recipe.episodes, seed=recipe.seed)
    if not any(e.queries or e.window for e in episodes):
        raise UserError("data: gives no queries to evaluate; raise data.queries or data.instances_per_task")
    return episodes


def refuse_leaks(recipe: EvaluationRecipe, source: Source, *, tell: bool) -> str:
    """What data is shared with the training, in words; UserError if there is some, unless the recipe allows it."""
    leaks, found = check_leaks(recipe, source)
    if tell:
        print(f"shared with the training data: {leaks}", file=sys.stderr)
    if found and recipe.leaks == "refuse":
        raise UserError(f"leaks: {leaks}; evaluate on other data, or set leaks to warn to have it reported anyway")
    return leaks


def refuse_older(output: Path) -> None:
    """UserError if the results in a folder are those of a version that left inputs and references out of them."""
    for path in sorted((output / EXAMPLES).glob("rank*.jsonl")):
        if any("input" not in line for line in whole_json_lines(path)[:1]):
            raise UserError(
                f"{output} holds results of an older version, without inputs; remove it, or set output to a new folder"
            )


def keep_episodes(output: Path, episodes: Sequence[dict], asked: dict[int, list[Query]], lines: Sequence[dict]) -> None:
    """Write what result lines name by number.

    UserError if it is not what the folder has already, or if `lines`, the results there, are of other queries than are asked:
    then the data has changed.
    """
    path = output / EPISODES
    text = "".join(json.dumps(episode, ensure_ascii=False) + "\n" for episode in episodes)
    same = not path.is_file() or path.read_text(encoding="utf-8") == text
    texts = {(i, query.place): (query.input, list(query.references)) for i, queries in asked.items() for query in queries}
    if not same or any((x["input"], x["references"]) != texts.get((x["episode"], x["query"])) for x in lines):
        raise UserError(
            f"{output} holds results of other data than the recipe gives now; remove it, or set output to a new folder"
        )
    write_atomically(path, text)


def readable(episodes: Sequence[Episode], encoder: Encoder) -> list[Episode]:
    """The episodes whose instructions are within the limits, where these say to skip others; UserError if none is."""
    limits = encoder.limits
    if limits.too_long_query == "error":
        return list(episodes)
    kept = [episode for episode in episodes if instruction_fits(encoder, episode)]
    if not kept:
        raise UserError(f"limits.context_tokens={limits.context_tokens}: no instruction fits; raise it")
    return kept


def result_lines(output: Path) -> list[dict]:
    """All lines of the results of an evaluation in a folder, of all ranks."""
    return [line for path in sorted((output / EXAMPLES).glob("rank*.jsonl")) for line in whole_json_lines(path)]


class Run:
    """The result lines of an evaluation on disk: what is there already is not computed again."""

    def __init__(self, folder: Path, rank: int, methods: Sequence[str], sizes: dict[int, int]):
        self.folder, self.methods, self.sizes = folder, list(methods), sizes
        self.path = folder / f"rank{rank}.jsonl"
        if self.path.exists():  # a line that a crash cut short, and the episode that it belongs to, are done again
            complete = _complete(whole_json_lines(self.path))
            write_atomically(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in complete))

    def lines(self) -> list[dict]:
        """Every whole episode's lines, of all ranks, in the order of methods, episodes and queries."""
        found = {}
        for path in sorted(self.folder.glob("rank*.jsonl")):
            for line in _complete(whole_json_lines(path)):
                if line["method"] in self.methods and line["episode"] in self.sizes:
                    found[self.methods.index(line["method"]), line["episode"], line["query"]] = line
        return [found[key] for key in sorted(found)]

    def missing(self, lines: Sequence[dict]) -> int:
        """How many results are not there yet."""
        return len(self.methods) * sum(self.sizes.values()) - len(lines)

    def left(self, bench: Bench, asked: dict[int, list[Query]], mine: Sequence[int]) -> Iterator[tuple[Method, list[int]]]:
        """What this rank still has to do: a method and a group of episodes at a time, all methods of a group together."""
        done = {(line["method"], line["episode"]) for line in self.lines()}
        mine = [i for i in mine if self.sizes[i]]
        todo = [i for i in mine if any((name, i) not in done for name in self.methods)]
        finished = 0
        for group in _groups(bench, asked, todo):
            for name in self.methods:
                left = [i for i in group if (name, i) not in done]
                if left:
                    yield METHODS[name], left
            bench.forget()
            finished += len(group)
            print(
                f"{self.path.parent.parent}: {finished} of {len(todo)} episodes, {len(self.methods)} methods", file=sys.stderr
            )

    def write(self, lines: Iterator[dict]) -> None:
        """Append results in one go."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.folder.mkdir(parents=True, exist_ok=True)
        append(self.path, text, sync=True)


def _complete(lines: Sequence[dict]) -> list[dict]:
    """The lines of episodes that are there with all of their queries."""
    groups = defaultdict(list)
    for line in lines:
        groups[line["method"], line["episode"]].append(line)
    return [line for group in groups.values() if len(group) >= group[0]["of"] for line in group]


def _groups(bench: Bench, asked: dict[int, list[Query]], indices: Sequence[int]) -> Iterator[list[int]]:
    """Neighbouring episodes whose contexts together have at most `batch_tokens` tokens, or one alone."""

    def sizes(i: int) -> tuple[int, int]:
        return len(bench.context(bench.episodes[i])) if bench.encoder is not None else 0, len(asked[i])

    return in_groups(indices, sizes, (bench.batch_tokens, GROUP_QUERIES))


def make_bench(recipe: EvaluationRecipe, episodes: Sequence[Episode]) -> Bench:
    """The models that a recipe names, loaded, with the text format of the hypernetwork unless the recipe has its own."""
    shared = {"episodes": episodes, "seed": recipe.seed, "batch_tokens": recipe.batch_tokens, "budget": recipe.budget}
    shared |= {"refine": recipe.refine, "refine_on": recipe.refine_on}
    shared["prefixes"] = Path(recipe.prefixes) if recipe.prefixes else None
    if not recipe.hypernetwork and not recipe.model:
        return Bench(**shared)
    hypernetwork, name, encoder = None, recipe.model, None
    if recipe.hypernetwork:
        hypernetwork, encoder = hypernetworks_loading.load_hypernetwork(recipe.hypernetwork, recipe.model, dtype=recipe.dtype)
        base, tokenizer = hypernetwork.base, encoder.tokenizer
        shared["gists"] = recipe.gists or hypernetwork.num_gists
        shared["budget"] = recipe.budget or max(1, shared["gists"] + (hypernetwork.sink is not None))
    else:
        base, tokenizer = load_base(name, dtype=recipe.dtype or "float32"), load_tokenizer(name)
    text_format = recipe.format or (encoder.format if encoder else TextFormat())
    encoder = Encoder(tokenizer, text_format, recipe.limits or (encoder.limits if encoder else Limits()))
    multi_task = None
    if recipe.multi_task:
        other = load_tokenizer(recipe.multi_task)
        if other.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"multi_task: {recipe.multi_task} has another tokenizer than the base; both must read the same tokens"
            )
        multi_task = Reader(load_base(recipe.multi_task, dtype=recipe.dtype or str(base.dtype).removeprefix("torch.")), other)
    return Bench(encoder=encoder, reader=Reader(base, tokenizer), hypernetwork=hypernetwork, multi_task=multi_task, **shared)


def applicable(recipe: EvaluationRecipe, episodes: Sequence[Episode], kind: Kind) -> list[Method]:
    """The methods to evaluate: those that are asked for, or all for which models and data are there."""
    there = found_in(episodes) | {name for name in ("hypernetwork", "multi_task", "prefixes") if getattr(recipe, name)}
    there |= {"model"} if recipe.hypernetwork or recipe.model else set()
    there |= {"budget"} if recipe.hypernetwork or recipe.budget else set()
    there |= {"refine"} if recipe.refine and ("demonstrations" in there or recipe.refine_on == "context") else set()
    if recipe.hypernetwork and read_config(recipe.hypernetwork).get("chunking", {}).get("graph", "single") != "single":
        there.add("chunks")
    there |= {"answers"} if kind == "text" else set()
    chosen = []
    for method in METHODS.values():
        missing = [NEEDS[need] for need in method.needs if need not in there]
        if method.name in recipe.methods and missing:
            raise UserError(f"methods: {method.name} needs {'; '.join(missing)}; give it, or leave the method out")
        if not missing and (not recipe.methods or method.name in recipe.methods):
            chosen.append(method)
    if not chosen:
        raise UserError("methods: none can run on this data without a model; name a model or a hypernetwork")
    return chosen


def check_leaks(recipe: EvaluationRecipe, source: Source) -> tuple[str, bool]:
    """What the evaluation shares with the training data of its hypernetwork and models, in words, and whether it does."""
    base = base_name(recipe)
    found, shares = [], False
    for run in dict.fromkeys(filter(None, (recipe.hypernetwork, base, recipe.multi_task))):
        path = Path(run) / RECIPE
        if not path.is_file():
            found.append(f"{run}: what it was trained on is not known")
            continue
        try:
            training = make_source(load_recipe(path).data)
        except UserError as error:
            found.append(f"{run}: not checked ({str(error).splitlines()[0]})")
            continue
        leaks = find_leaks(training.provenance(), source.provenance())
        found.append(f"{run}: {leaks}")
        shares = shares or bool(leaks)
    return "; ".join(found) or "no run to compare with", shares


def describe(recipe: EvaluationRecipe, bench: Bench, episodes, kind: Kind, leaks: str, offered: int) -> dict[str, Any]:
    """What was evaluated, for the summary."""
    return {
        "kind": kind,
        "metric": recipe.metric,
        "data": str(recipe.data),
        "shots": recipe.data.shots,
        "episodes": len(episodes),
        "tasks": len({episode.category or episode.task for episode in episodes}),
        "queries_offered": offered,
        "budget": bench.budget,
        "base": bench.reader.identity.as_dict() if bench.reader else None,
        "hypernetwork": recipe.hypernetwork,
        "multi_task": recipe.multi_task,
        "shared_with_training": leaks,
        "versions": versions(),
    }
