"""Episodes whose labels or words have changed places, for controls."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from random import Random

from hyperllama.data.episode import Episode, Example


def shuffled(episode: Episode, seed: int, index: int) -> Episode:
    """The episode with the outputs of its demonstrations dealt out anew, so that as many as possible are wrong."""
    outputs = [(e.output, e.references) for e in episode.demonstrations]
    order = sorted(range(len(outputs)), key=lambda i: outputs[i][0])
    # Turned by the size of the largest class, no output meets its own class unless that has more than half of all.
    largest = max((sum(o == output for output, _ in outputs) for o, _ in outputs), default=0)
    Random(f"{seed}/{index}").shuffle(order)
    order.sort(key=lambda i: outputs[i][0])  # stable: at random within a class
    turned = order[largest:] + order[:largest]
    changed: list[Example] = list(episode.demonstrations)
    for place, source in zip(order, turned, strict=True):
        output, references = outputs[source]
        changed[place] = dataclasses.replace(episode.demonstrations[place], output=output, references=references)
    return dataclasses.replace(episode, demonstrations=tuple(changed))


def shuffled_words(text: str, rng: Random, draws: int = 100) -> str:
    """The words of a text in another order: that of `draws` orders which keeps the fewest pairs of neighbours."""
    words = text.split()
    neighbours = set(pairwise(words))
    orders = (rng.sample(words, len(words)) for _ in range(draws))
    return " ".join(min(orders, key=lambda order: sum(pair in neighbours for pair in pairwise(order))))
