"""HINT (Ivison et al. 2023, arXiv 2212.10315) for decoder-only models: an instruction is read once and becomes modules."""
