"""From states to scored examples: one line of results for every query, with what it cost.

A line holds all that was scored, so that its metrics can be computed again from it alone: `input` and `references` (of a window
of plain text its prompt and its continuation), the `answer` up to its end, and `generated`, all that the model said, where that
is more; or `choices` with their `scores`, log-probabilities in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eval.flops import ModelCost
from eval.methods import Bench, Method, State
from eval.metrics import score_choices, score_text
from hyperllama.data.episode import Episode
from hyperllama.errors import UserError
from hyperllama.inference.reader import Reader
from hyperllama.inference.scoring import Question

Kind = Literal["text", "choices", "loss"]


@dataclass(frozen=True)
class Query:
    """One thing that is asked: token ids of the prompt and of each continuation, the right one first unless it is a choice.

    `input` and `references` are the same as text: answers that count as right, of which there is one unless text is generated.
    """

    place: int  # in the episode's queries
    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    right: int = 0
    input: str = ""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


def kind_of(episodes: Sequence[Episode], wanted: str) -> Kind:
    """What is measured: as `wanted`, or with "auto" by the data; UserError where the data does not allow it."""

    def own(episode: Episode) -> Kind:
        if episode.window is not None:
            return "loss"
        return "choices" if all(query.choices for query in episode.queries) else "text"

    kinds = {own(episode) for episode in episodes}
    if wanted == "auto":
        if len(kinds) > 1:
            raise UserError(
                f"metric: the data calls for {' and '.join(sorted(kinds))}; set metric, or evaluate them one by one"
            )
        return kinds.pop()
    if wanted == "choices" and kinds != {"choices"}:
        raise UserError("metric: choices needs data in which every query has choices; use text or loss")
    if wanted in ("text", "exact_match") and "loss" in kinds:
        raise UserError("metric: windows of plain text have no answers to generate; use loss")
    return "text" if wanted == "exact_match" else wanted


def queries_of(bench: Bench, episode: Episode, kind: Kind) -> list[Query]:
    """The queries of an episode that fit; UserError for one that does not, unless the limits say to skip it."""
    encoder = bench.encoder
    if encoder is None:  # methods that answer by themselves need no tokens
        return [
            Query(i, (), (), input=query.input, references=query.references or (query.output,))
            for i, query in enumerate(episode.queries)
        ]
    if episode.window is not None:
        decode = encoder.tokenizer.decode
        return [
            Query(i, prompt, (answer,), input=decode(prompt), references=(decode(answer),))
            for i, (prompt, answer) in enumerate(encoder.encode(episode).queries)
        ]
    found = []
    for i, query in enumerate(episode.queries):
        answers = query.choices if kind == "choices" else (query.output,)
        prompt, continuations = tuple(encoder.prompt(query.input)), tuple(tuple(encoder.answer(a)) for a in answers)
        if len(prompt) + max(map(len, continuations)) > encoder.limits.query_tokens:
            if encoder.limits.too_long_query == "skip":
                continue
            raise UserError(
                f"task {episode.task}: query {i} takes {len(prompt) + max(map(len, continuations))} tokens, more than "
                f"limits.query_tokens={encoder.limits.query_tokens}: raise it, or set limits.too_long_query to skip"
            )
        right = 0
        if kind == "choices":
            if query.output not in query.choices:
                raise UserError(
                    f"task {episode.task}: the answer {query.output!r} is not among its choices {list(query.choices)}; "
                    "correct the data, or evaluate with metric=text"
                )
            right = query.choices.index(query.output)
        # A likelihood is that of the output, whatever else counts as right in text.
        references = (kind == "text" and query.references) or (query.output,)
        found.append(Query(i, prompt, continuations, right, query.input, references, query.choices))
    return found


def before_queries(bench: Bench, i: int) -> dict[str, Any]:
    """The whole context of an episode, as text: a line of episodes.jsonl.

    Instruction, the demonstrations that fit, and how many were dropped; of a window of plain text its context.
    """
    episode = bench.episodes[i]
    line = {"episode": i, "task": episode.task, "category": episode.category}
    if episode.window is not None:
        return line | {"context": bench.encoder.tokenizer.decode(bench.context(episode))}
    given = episode.demonstrations
    shown = given if bench.encoder is None else [given[place] for place in bench.context(episode).shown]
    texts = [{"input": example.input, "output": example.output} for example in shown]
    return line | {"instruction": episode.instruction, "demonstrations": texts, "dropped": len(given) - len(shown)}


def results(
    bench: Bench, method: Method, indices: Sequence[int], asked: Sequence[Sequence[Query]], kind: Kind, generation: dict
) -> Iterator[dict[str, Any]]:
    """A line for every query in `asked` of the episodes `indices`: what was answered, its metrics, and what that cost."""
    if method.answers:
        for i, queries, answers in zip(indices, asked, method.run(bench, indices), strict=True):
            for query in queries:
                answer = answers[query.place]
                yield _line(bench, method, i, query, len(queries)) | {
                    "answer": answer,
                    "metrics": score_text(answer, query.references),
                }
        return
    states = method.run(bench, indices)
    reader = bench.multi_task if method.needs[0] == "multi_task" else bench.reader
    flat = [(i, state, query, len(queries)) for i, state, queries in zip(indices, states, asked) for query in queries]
    # Queries behind one prefix next to each other, so that a pass holds it once.
    answered = _generated(reader, flat, generation, bench) if kind == "text" else _scored(reader, flat, kind, bench)
    for (i, state, query, total), answer in zip(flat, answered, strict=True):
        yield _line(bench, method, i, query, total) | answer | _cost(bench, reader, state, query, kind)


def _line(bench: Bench, method: Method, i: int, query: Query, total: int) -> dict[str, Any]:
    episode = bench.episodes[i]
    place = {"episode": i, "query": query.place, "of": total, "task": episode.task, "category": episode.category}
    return {"method": method.name, **place, "input": query.input, "references": list(query.references), "weight": 1}


def _generated(reader: Reader, flat, generation: dict, bench: Bench) -> Iterator[dict[str, Any]]:
    prefixes = [state.prefix for _, state, _, _ in flat]
    prompts = [list(query.prompt) for _, _, query, _ in flat]
    encoder = bench.encoder
    settings = {"max_new_tokens": encoder.format.answer_tokens, "stop": encoder.format.separator, **generation}
    answers = reader.generate(prompts, prefixes, batch_size=256, batch_tokens=bench.batch_tokens, **settings)
    for (_, _, query, _), tokens in zip(flat, answers, strict=True):
        answer, generated = encoder.answer_of(tokens), encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        more = {"generated": generated} if generated.strip() != answer else {}
        yield {"answer": answer, **more, "metrics": score_text(answer, query.references)}


def _scored(reader: Reader, flat, kind: Kind, bench: Bench) -> Iterator[dict[str, Any]]:
    questions = [Question(query.prompt, query.continuations, state.prefix) for _, state, query, _ in flat]
    for (_, _, query, _), scores in zip(flat, reader.score(questions, batch_tokens=bench.batch_tokens), strict=True):
        if kind == "choices":
            best = max(range(len(scores)), key=scores.__getitem__)
            chance = 1 / len(scores)
            found = {"answer": query.choices[best], "choices": list(query.choices), "scores": scores}
            yield {**found, "metrics": score_choices(scores, query.right), "chance": chance}
        else:
            yield {"metrics": {"loss": -scores[0]}, "weight": len(query.continuations[0])}


def _cost(bench: Bench, reader: Reader, state: State, query: Query, kind: Kind) -> dict[str, Any]:
    """FLOPs to make the state once, of the query behind it, and of the query if the context is read again each time."""
    rows = state.prefix.rows if state.prefix is not None else 0
    facts = {"context_tokens": state.tokens, "state_rows": rows, "demonstrations": state.demonstrations}
    facts["state_bytes"] = state.prefix.nbytes if state.prefix is not None else 0
    try:
        cost = ModelCost.of(reader.model.config)
    except UserError:  # no formula for this architecture: the quality counts all the same
        return facts
    lengths = [len(continuation) for continuation in query.continuations]

    def ask(prompt: int, past: int) -> int:
        return cost.generate(prompt, lengths[0], past=past) if kind == "text" else cost.score(prompt, lengths, past=past)

    maker = state.maker or (bench.hypernetwork if state.gists else None)
    if not state.tokens:
        encode = 0
    elif maker is not None:
        encode = maker.compress_flops(cost, state.tokens)
    else:
        encode = cost.encode(state.tokens + state.gists)
    encode += cost.tune(*state.tuned)
    asked = ask(len(query.prompt), rows)
    if state.prefix is not None and state.prefix.adapters is not None:
        asked += cost.adapters(len(query.prompt) + sum(n - 1 for n in lengths), state.prefix.adapters.sizes)
    facts |= {"encode_flops": encode, "query_flops": asked}
    return facts | {"reread_flops": ask(state.tokens + len(query.prompt), 0)}
