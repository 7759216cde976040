"""Training data by index: episode i is a function of the seed and i alone.

So a position in the stream is one number. A resumed run skips to it without replaying, and ranks and workers share the stream
by taking different indices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from torch.utils.data import Dataset

from hyperllama.data.episode import Episode, Source
from hyperllama.data.packing import GistBatch
from hyperllama.data.text import EncodedEpisode, Encoder
from hyperllama.errors import UserError


class EpisodeStream(Dataset):
    """`length` encoded episodes of `source`.

    An episode none of whose queries fit, or whose context is only demonstrations of which none fits, is drawn again. Its
    skipped queries count, and in the second case its dropped demonstrations.
    """

    def __init__(self, source: Source, encoder: Encoder, *, seed: int, length: int, shots: int, min_shots: int, queries: int):
        self.source, self.encoder, self.seed, self.length = source, encoder, seed, length
        self.shots, self.min_shots, self.queries = shots, min_shots, queries

    def __len__(self) -> int:
        return self.length

    def _drawn(self, index: int, attempt: int) -> Episode:
        """The text of an attempt at an episode. Only `__getitem__` knows which attempt the episode is."""
        rng = Random(f"{self.seed}/{index}/{attempt}")
        return self.source.draw(rng, rng.randint(self.min_shots, self.shots), self.queries, index)

    def __getitem__(self, index: int) -> EncodedEpisode:
        skipped = dropped = 0
        for attempt in range(100):
            encoded = self.encoder.encode(self._drawn(index, attempt))
            skipped += encoded.skipped_queries
            lost = encoded.dropped_demonstrations and len(encoded.context) <= len(self.encoder.start)
            if lost or encoded.queries:
                dropped += encoded.dropped_demonstrations
            if encoded.queries and not lost:
                return replace(encoded, skipped_queries=skipped, dropped_demonstrations=dropped, index=index)
        limits = self.encoder.limits
        raise UserError(
            f"limits.query_tokens={limits.query_tokens}, context_tokens={limits.context_tokens}: of 100 episodes in a row no "
            "query fits, or no demonstration; raise them"
        )


class Collator:
    """A list of encoded episodes -> what the Trainer hands on: the batch that `pack` makes, and its targets to be counted."""

    def __init__(self, pack: Callable[..., GistBatch], *settings):
        self.pack, self.settings = pack, settings

    def __call__(self, episodes: list[EncodedEpisode]) -> dict:
        batch = self.pack(episodes, *self.settings)
        return {"labels": batch.targets[: batch.answers], "batch": batch}
