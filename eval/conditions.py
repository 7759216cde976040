"""The conditions under which queries are answered, side by side on the same tasks and queries.

A prefix only counts for something beside its controls: another task's prefix (does it matter which examples were
compressed?), no context at all, and the examples themselves in full attention.
"""

from __future__ import annotations

from collections.abc import Sequence

from hyperllama.data.episode import Episode
from hyperllama.data.text import Encoder
from hyperllama.errors import UserError
from hyperllama.hypernetwork import GistHypernetwork
from hyperllama.reader import Reader

CONDITIONS = ("no_context", "swapped_prefix", "prefix", "full_context")


def answer_all(
    hypernetwork: GistHypernetwork,
    encoder: Encoder,
    episodes: Sequence[Episode],
    *,
    tasks_per_pass: int = 32,
    **generation,
) -> dict[str, list[list[str]]]:
    """The base model's answers to every query of every episode: condition -> episode -> query -> text.

    `swapped_prefix` reads the prefix of the next episode, whose task must differ; the base is frozen in all conditions.
    `generation` goes to `Reader.generate`, over the text format's `answer_tokens`. Raises UserError unless neighbouring
    episodes are of different tasks.
    """
    if any(a.task == b.task for a, b in zip(episodes, [*episodes[1:], episodes[0]])):
        raise UserError("the swapped-prefix control needs neighbouring episodes of different tasks, and at least two of them")
    generation = {"max_new_tokens": encoder.format.answer_tokens, **generation}
    reader = Reader(hypernetwork.base, encoder.tokenizer)
    contexts = [encoder.context(episode.instruction, episode.demonstrations)[0] for episode in episodes]
    prefixes = []
    for start in range(0, len(contexts), tasks_per_pass):
        prefixes += hypernetwork.compress(contexts[start : start + tasks_per_pass])
    asked = [(i, encoder.prompt(query.input)) for i, episode in enumerate(episodes) for query in episode.queries]
    prompts = [prompt for _, prompt in asked]

    def grouped(answers: list[list[int]]) -> list[list[str]]:
        groups: list[list[str]] = [[] for _ in episodes]
        for (i, _), answer in zip(asked, answers, strict=True):
            groups[i].append(encoder.tokenizer.decode(answer, skip_special_tokens=True).strip())
        return groups

    swapped = [*prefixes[1:], prefixes[0]]
    return {
        "no_context": grouped(reader.generate([encoder.start + prompt for prompt in prompts], **generation)),
        "swapped_prefix": grouped(reader.generate(prompts, [swapped[i] for i, _ in asked], **generation)),
        "prefix": grouped(reader.generate(prompts, [prefixes[i] for i, _ in asked], **generation)),
        "full_context": grouped(reader.generate([contexts[i] + prompt for i, prompt in asked], **generation)),
    }


def accuracy(episodes: Sequence[Episode], answers: Sequence[Sequence[str]]) -> float:
    """The share of queries whose answer equals a reference, 0 to 1."""
    right = [q.accepts(a) for episode, given in zip(episodes, answers, strict=True) for q, a in zip(episode.queries, given)]
    return sum(right) / len(right)
