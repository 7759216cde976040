"""What prefixes can be refined on: the answers of their own examples, or what the model says with their whole context."""

from __future__ import annotations

from hyperllama.data.text import Encoder
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.inference.reader import Reader
from hyperllama.tuning.refining import Refiner
from hyperllama.tuning.self_study import SelfStudy

REFINERS = {"answers": Refiner, "context": SelfStudy}


def refining(on: str, maker: Hypernetwork, reader: Reader, encoder: Encoder, steps: int, **settings) -> Refiner | SelfStudy:
    """What makes prefixes as `maker` does and refines them for at most `steps` steps; `on` is a name of `REFINERS`."""
    return REFINERS[on](maker, reader, encoder, steps, **settings)
