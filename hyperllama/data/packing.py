"""Packing: encoded episodes into one row of tokens without padding, compress region first, and its `GistLayout`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from attention_masks import GistLayout, Segment
from hyperllama.data.chunking import SINGLE, Chunking
from hyperllama.data.text import EncodedEpisode

PLACEHOLDER = 0  # the id in gist rows, sinks and of markers; their embedding, or their keys and values, are replaced
SINK = Segment(1, gists=1)


@dataclass(frozen=True)
class GistBatch:
    """Several episodes as one packed row of T tokens.

    ids (1, T); target_rows (n,) rows whose output predicts targets (n,); `layout` says who sees whom. The first `answers`
    targets are those of queries, the others are contexts' own tokens, to be said again from a row of `marker_rows` on.
    `teacher` is the same queries behind their whole contexts. The first `sinks` segments are sinks (see `Packing`), one a
    context, the others of the first `contexts` are compressed; `owners` says for each segment which context it is, or reads.
    `tasks` names the episodes in the order of their contexts, `episodes` numbers them in the stream. The counts are what the
    limits left out.
    """

    ids: Tensor
    target_rows: Tensor
    targets: Tensor
    layout: GistLayout
    marker_rows: Tensor | None = None
    answers: int | None = None
    teacher: GistBatch | None = None
    sinks: int = 0
    contexts: int = 0
    owners: tuple[int, ...] = ()
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
        names = ("ids", "target_rows", "targets", "layout", "marker_rows", "teacher")
        moved = {name: move(value) for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **moved)

    def halves(self) -> tuple[Tensor, GistLayout, GistBatch]:
        """The compress region alone, as ids and layout; and what reads it, behind placeholder rows for sinks and gists.

        Sinks are in the first half only if contexts read them: chunks that read other chunks.
        """
        segments = self.layout.segments
        before, cut = segments[: self.contexts], sum(segment.tokens for segment in segments[: self.contexts])
        kept = [i for i, segment in enumerate(before) if segment.gists]
        gists = sum(segment.gists for segment in before)
        placeholders = [Segment(before[i].gists, gists=before[i].gists) for i in kept]
        first = 0 if chunks_read(before) else self.sinks
        reading = dataclasses.replace(
            self,
            ids=torch.cat([self.ids.new_full((1, gists), PLACEHOLDER), self.ids[:, cut:]], dim=1),
            target_rows=self.target_rows + (gists - cut),
            marker_rows=None if self.marker_rows is None else self.marker_rows + (gists - cut),
            layout=GistLayout([*placeholders, *segments[self.contexts :]]).to(self.layout.device),
            contexts=len(kept),
            owners=(*(self.owners[i] for i in kept), *self.owners[self.contexts :]),
        )
        return self.ids[:, first:cut], GistLayout(before[first:]).to(self.layout.device), reading

    def reader_rows(self) -> list[list[int]]:
        """Of each context the rows of all segments that read it, counted from the first row that reads."""
        rows: list[list[int]] = [[] for _ in range(max(self.owners) + 1)]
        first = sum(segment.tokens for segment in self.layout.segments[: self.contexts])
        starts = [start - first for start in self.layout.row_starts]
        for i in range(self.contexts, len(self.owners)):
            rows[self.owners[i]] += range(starts[i], starts[i] + self.layout.segments[i].tokens)
        return rows


@dataclass(frozen=True)
class Packing:
    """How an episode is packed: its context and queries, and what these settings add.

    `elastic` draws how many gists a batch has: 1, 2, 4, ... up to all; a gist never sees those after it, so the first few stand
    alone. `reconstruct` adds a segment in which each context is said again (in-context autoencoder, Ge et al. 2023, arXiv
    2307.06945), `teach` the same queries behind their whole contexts. `whole` has a context's own rows read too, before its
    gists; then there may be none.
    With a `sink` whoever reads gists reads one more row before them, a segment of its own: the row that the base has of its
    first token alone, where attention rests (Xiao et al. 2023, arXiv 2309.17453). Its keys and values are given, not computed.
    """

    gists: int
    chunking: Chunking = SINGLE
    elastic: bool = False
    reconstruct: bool = False
    teach: bool = False
    whole: bool = False
    sink: bool = False

    def drawn_gists(self, episodes: Sequence[EncodedEpisode]) -> int:
        """How many gists the batch of these episodes has: always the same for the same episodes of the stream."""
        if not self.elastic:
            return self.gists
        return Random(f"gists/{episodes[0].index}").choice(nested_gists(self.gists))


def chunks_read(segments: Sequence[Segment]) -> bool:
    """Whether chunks read chunks among these segments of a compress region."""
    return any(segment.reads for segment in segments)


def chunk_segments(
    chunking: Chunking,
    chunks: Sequence[Sequence[int]],
    gists: int,
    first: int,
    *,
    whole: bool = False,
    sink: int | None = None,
) -> list[Segment]:
    """A segment for each chunk of a context, which ends in its gists; the first of them is segment `first` of its layout.

    `whole`: all rows of a segment are read like gists. `sink`: the segment that chunks read before the chunks that they read.
    """
    sinks = () if sink is None else (sink,)
    earlier = [(*sinks, *range(first, first + i)) if chunking.graph == "recurrent" and i else () for i in range(len(chunks))]
    rows = [len(chunk) + gists for chunk in chunks]
    return [Segment(n, gists=n if whole else gists, reads=reads) for n, reads in zip(rows, earlier, strict=True)]


def nested_gists(gists: int) -> list[int]:
    """1, 2, 4, ... and `gists` itself.

    >>> nested_gists(12)
    [1, 2, 4, 8, 12]
    """
    return [*(1 << i for i in range((gists - 1).bit_length())), gists]


def pack_gist(episodes: Sequence[EncodedEpisode], packing: Packing | int) -> GistBatch:
    """Contexts with their gist rows, then all queries, each of which reads its own context's gists.

    A whole number packs so many gists and nothing else.

    >>> from attention_masks import draw
    >>> batch = pack_gist([EncodedEpisode(context=(5, 6), queries=(((7,), (8, 9)), ((7,), (9,))))], 1)
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
    packing = Packing(packing) if isinstance(packing, int) else packing
    gists = packing.drawn_gists(episodes)
    # Neighbours of one length run as one attention call.
    contexts = sorted(episodes, key=lambda e: len(e.context))
    pieces, segments, owners, own = _compress_region(contexts, packing, gists)
    readers = [(prompt, answer, i) for i, episode in enumerate(contexts) for prompt, answer in episode.queries]
    if packing.reconstruct:  # a prompt that is no token of the model's: the marker
        readers += [(None, episode.context, i) for i, episode in enumerate(contexts)]
    readers.sort(key=lambda r: len(r[0] or (PLACEHOLDER,)) + len(r[1]))
    compressed = len(segments)
    places = list(zip(readers, _append(pieces, segments, owners, readers, own), strict=True))
    asked, again = ([one for one in places if (one[0][0] is None) == said_again] for said_again in (False, True))
    rows = [row for _, predicting in asked + again for row in predicting]
    targets = [token for (_, answer, _), _ in asked + again for token in answer]
    return dataclasses.replace(
        _batch(pieces, segments, rows, targets, contexts),
        answers=sum(len(answer) for (_, answer, _), _ in asked),
        marker_rows=torch.tensor([predicting[0] for _, predicting in again]) if again else None,
        sinks=len(contexts) if packing.sink else 0,
        contexts=compressed,
        owners=tuple(owners),
        teacher=_teacher(contexts, [reader for reader, _ in asked]) if packing.teach else None,
    )


def _compress_region(contexts: Sequence[EncodedEpisode], packing: Packing, gists: int):
    """Pieces, segments and their owners of what is compressed, sinks first; and the segments to be read of each context."""
    sinks = len(contexts) if packing.sink else 0
    pieces, segments, own, owners = [(PLACEHOLDER,)] * sinks, [SINK] * sinks, [], list(range(sinks))
    for i, episode in enumerate(contexts):
        chunks, sink = packing.chunking.chunks(episode.context, [end for _, end in episode.answers]), i if sinks else None
        made = chunk_segments(packing.chunking, chunks, gists, len(segments), whole=packing.whole, sink=sink)
        reads = [len(segments) + place for place, segment in enumerate(made) if segment.gists]
        own.append((i, *reads) if sinks else tuple(reads))
        owners += [i] * len(made)
        segments += made
        pieces += [(*chunk, *[PLACEHOLDER] * gists) for chunk in chunks]
    return pieces, segments, owners, own


def _append(pieces: list, segments: list[Segment], owners: list[int], readers, reads: Sequence[tuple[int, ...]]) -> list[range]:
    """Append readers (prompt or None for a marker, answer, context), each reading `reads` of its context.

    Returns the rows that predict each one's answer.
    """
    row, predicting = sum(map(len, pieces)), []
    for prompt, answer, context in readers:
        piece = (*(prompt or (PLACEHOLDER,)), *answer[:-1])  # the last answer token is predicted, never read
        pieces.append(piece)
        segments.append(Segment(len(piece), reads=reads[context]))
        owners.append(context)
        row += len(piece)
        predicting.append(range(row - len(answer), row))
    return predicting


def _teacher(contexts: Sequence[EncodedEpisode], queries) -> GistBatch:
    """Whole contexts, all of whose rows are read by the queries in their order."""
    pieces = [episode.context for episode in contexts]
    segments = [Segment(len(piece), gists=len(piece)) for piece in pieces]
    predicting = _append(pieces, segments, [], queries, [(i,) for i in range(len(contexts))])
    rows = [row for one in predicting for row in one]
    return _batch(pieces, segments, rows, [token for _, answer, _ in queries for token in answer], contexts)


def pack_taught(episodes: Sequence[EncodedEpisode], rows: int) -> GistBatch:
    """Queries behind `rows` placeholder rows in place of their contexts; `teacher` is the same behind the whole contexts.

    Both have the same targets in the same places: contexts are in the order of their lengths.
    """
    episodes = sorted(episodes, key=lambda e: len(e.context))
    batch = pack_gist([dataclasses.replace(episode, context=()) for episode in episodes], rows)
    return dataclasses.replace(batch, teacher=pack_gist(episodes, Packing(rows, teach=True)).teacher)


def gist_tokens(episode: EncodedEpisode, packing: Packing | int) -> int:
    """Rows that an episode takes at most in `pack_gist`."""
    packing = Packing(packing) if isinstance(packing, int) else packing
    chunks = len(packing.chunking.chunks(episode.context, [end for _, end in episode.answers]))
    again = len(episode.context) if packing.reconstruct else 0
    queries = sum(len(prompt) + len(answer) - 1 for prompt, answer in episode.queries)
    return int(packing.sink) + len(episode.context) + chunks * packing.gists + again + queries


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
