"""What goes through a model together: neighbours, as many as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_groups(items: Iterable[T], sizes: Callable[[T], Sequence[int]], most: Sequence[int]) -> Iterator[list[T]]:
    """Neighbours whose `sizes`, of each kind, come to no more than `most` of that kind; one alone may be larger.

    >>> list(in_groups([3, 1, 2, 9, 1], lambda n: (n, 1), (5, 2)))
    [[3, 1], [2], [9], [1]]
    """
    group: list[T] = []
    sums = [0] * len(most)
    for item in items:
        own = sizes(item)
        if group and any(so_far + size > limit for so_far, size, limit in zip(sums, own, most, strict=True)):
            yield group
            group, sums = [], [0] * len(most)
        group.append(item)
        sums = [so_far + size for so_far, size in zip(sums, own, strict=True)]
    if group:
        yield group
