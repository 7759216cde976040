"""Packing: encoded episodes into one row of tokens without padding, compress region first, and its `GistLayout`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_masks import GistLayout, Segment
from hyperllama.data.text import EncodedEpisode

PLACEHOLDER = 0  # the id in gist rows; their embedding is replaced


@dataclass(frozen=True)
class GistBatch:
    """Several episodes as one packed row of T tokens.

    ids (1, T); target_rows (n,) rows whose output predicts targets (n,); `layout` says who sees whom. `tasks` names the
    episodes in the order of their contexts, `episodes` numbers them in the stream. The counts are what the limits left out.
    """

    ids: Tensor
    target_rows: Tensor
    targets: Tensor
    layout: GistLayout
    tasks: tuple[str, ...] = ()
    demonstrations: int = 0
    dropped_demonstrations: int = 0
    skipped_queries: int = 0
    episodes: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """T, every one of them real."""
        return self.layout.tokens

    def to(self, device, non_blocking: bool = False) -> GistBatch:
        """The same batch on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> GistBatch:
        """The same batch in pinned memory."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, move) -> GistBatch:
        moved = {name: move(getattr(self, name)) for name in ("ids", "target_rows", "targets", "layout")}
        return dataclasses.replace(self, **moved)


def pack_gist(episodes: Sequence[EncodedEpisode], gists: int) -> GistBatch:
    """Contexts with `gists` gist rows each, then all their queries, each of which reads its own context's gists.

    >>> from attention_masks import draw
    >>> batch = pack_gist([EncodedEpisode(context=(5, 6), queries=(((7,), (8, 9)), ((7,), (9,))))], gists=1)
    >>> print(draw(batch.layout))
    S0   0 | # . . . . .
    S0   1 | # # . . . .
    S0 g 2 | # # # . . .
    S1   3 | . . G # . .
    S2   3 | . . G . # .
    S2   4 | . . G . # #
    >>> batch.ids.tolist(), batch.target_rows.tolist(), batch.targets.tolist()
    ([[5, 6, 0, 7, 7, 8]], [3, 4, 5], [9, 8, 9])
    """
    # Neighbours of one length run as one attention call.
    contexts = sorted(episodes, key=lambda e: len(e.context))
    queries = [(prompt, answer, i) for i, episode in enumerate(contexts) for prompt, answer in episode.queries]
    queries.sort(key=lambda q: len(q[0]) + len(q[1]))
    pieces = [(*episode.context, *[PLACEHOLDER] * gists) for episode in contexts]
    segments = [Segment(len(piece), gists=gists) for piece in pieces]
    row = sum(map(len, pieces))
    target_rows, targets = [], []
    for prompt, answer, context in queries:
        piece = (*prompt, *answer[:-1])  # the last answer token is predicted, never read
        target_rows += range(row + len(prompt) - 1, row + len(piece))
        targets += answer
        row += len(piece)
        pieces.append(piece)
        segments.append(Segment(len(piece), reads=(context,)))
    return _batch(pieces, segments, target_rows, targets, contexts)


def gist_tokens(episode: EncodedEpisode, gists: int) -> int:
    """Rows that an episode takes in `pack_gist`."""
    return len(episode.context) + gists + sum(len(prompt) + len(answer) - 1 for prompt, answer in episode.queries)


def full_tokens(episode: EncodedEpisode) -> int:
    """Rows that an episode takes in `pack_full`."""
    return sum(len(episode.context) + len(prompt) + len(answer) - 1 for prompt, answer in episode.queries)


def pack_full(episodes: Sequence[EncodedEpisode], supervise_demonstrations: bool = False) -> GistBatch:
    """The full-attention baseline: each query behind its whole context, as one segment without gists.

    With `supervise_demonstrations` the answers of the demonstrations are targets too.
    """
    rows = [(episode, prompt, answer) for episode in episodes for prompt, answer in episode.queries]
    rows.sort(key=lambda r: len(r[0].context) + len(r[1]) + len(r[2]))
    pieces, segments, target_rows, targets, row = [], [], [], [], 0
    for episode, prompt, answer in rows:
        piece = (*episode.context, *prompt, *answer[:-1])
        for start, end in episode.answers if supervise_demonstrations else ():
            target_rows += range(row + start - 1, row + end - 1)
            targets += episode.context[start:end]
        target_rows += range(row + len(piece) - len(answer), row + len(piece))
        targets += answer
        row += len(piece)
        pieces.append(piece)
        segments.append(Segment(len(piece)))
    return _batch(pieces, segments, target_rows, targets, episodes)


def _batch(pieces, segments, target_rows, targets, episodes) -> GistBatch:
    return GistBatch(
        ids=torch.tensor([[token for piece in pieces for token in piece]]),
        target_rows=torch.tensor(target_rows),
        targets=torch.tensor(targets),
        layout=GistLayout(segments),
        tasks=tuple(e.task for e in episodes),
        demonstrations=sum(e.demonstrations for e in episodes),
        dropped_demonstrations=sum(e.dropped_demonstrations for e in episodes),
        skipped_queries=sum(e.skipped_queries for e in episodes),
        episodes=tuple(e.index for e in episodes),
    )
