"""Sequences that repeat themselves: a small base is warmed up on them, so that it forms induction heads."""

import math
from random import Random


def copied_tokens(rng: Random, tokens: int, spread: int, progress: float) -> int:
    """The tokens after which a sequence to be copied starts again, at `progress` (0 to 1) of the warm-up.

    In the first quarter there are always `tokens` of them, so a head can copy by distance. After that the number varies, by up
    to `spread` either way, and only content tells where to copy from. When it varied from the start, copying was not learned
    (docs/log.md). Copying is what induction heads do (Olsson et al. 2022, arXiv 2209.11895).
    """
    widest = math.ceil(spread * max(0.0, progress - 0.25) / 0.75)
    return tokens + rng.randint(-widest, widest)
