"""Dealing the episodes of an optimiser step to ranks, so that all ranks have nearly as many tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from torch.utils.data import Dataset

from hyperllama.data.text import EncodedEpisode


def deal(sizes: Sequence[int], ranks: int, batch: int) -> list[int]:
    """An order of episodes of these sizes in which the batches that ranks compute at the same time have nearly as many tokens.

    Position (m * ranks + r) * batch + j is episode j of rank r in micro-step m, as accelerate hands batches out. The largest
    episode left goes to the batch with the fewest tokens that has room; batches of like size are computed at the same time, and
    who gets the larger ones alternates.

    >>> deal([9, 1, 5, 5, 8, 2], ranks=2, batch=1)  # micro-steps (9, 8), (5, 5), (1, 2)
    [0, 4, 3, 2, 5, 1]
    """
    batches: list[list[int]] = [[] for _ in range(len(sizes) // batch)]
    fill = [(0, i) for i in range(len(batches))]
    for episode in sorted(range(len(sizes)), key=lambda e: (-sizes[e], e)):
        tokens, i = heappop(fill)
        batches[i].append(episode)
        if len(batches[i]) < batch:
            heappush(fill, (tokens + sizes[episode], i))
    batches.sort(key=lambda b: -sum(sizes[e] for e in b))
    steps = [batches[i : i + ranks] for i in range(0, len(batches), ranks)]
    return [e for m, step in enumerate(steps) for b in (step[::-1] if m % 2 else step) for e in b]


class Dealt(Dataset):
    """A stream of episodes in the order of `deal`: each optimiser step has the episodes that it has without.

    Every rank encodes all episodes of a step, to know their sizes; an episode costs a fraction of a millisecond, a step
    seconds. `size` gives the tokens that an episode takes in a batch.
    """

    def __init__(
        self, stream: Dataset, size: Callable[[EncodedEpisode], int], *, ranks: int, batch: int, accumulation: int = 1
    ):
        self.stream, self.size, self.ranks, self.batch, self.step = stream, size, ranks, batch, ranks * batch * accumulation
        self._dealt: tuple[int, list[EncodedEpisode]] = (-1, [])

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, index: int) -> EncodedEpisode:
        step, position = divmod(index, self.step)
        first = step * self.step
        if first + self.step > len(self.stream):
            return self.stream[index]  # a last step that is not full stays as it is
        if self._dealt[0] != step:
            episodes = [self.stream[i] for i in range(first, first + self.step)]
            order = deal([self.size(episode) for episode in episodes], self.ranks, self.batch)
            self._dealt = (step, [episodes[i] for i in order])
        return self._dealt[1][position]
