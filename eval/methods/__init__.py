"""Methods of an evaluation: each puts something else before a query. A new one is a function in a file, named in `FILES`.

Every method leaves a `State`: the prefix that queries of an episode read, and what it took to make. Full attention is a
prefix that keeps every token, so all methods are read by the same code; a method for text may also answer by itself.
"""

import importlib

from eval.methods.bench import METHODS, NEEDS, Bench, Method, State, found_in, instruction_fits, method

FILES = ("full_attention", "budget", "prefixes", "copies")  # each registers its methods; reports follow this order
for name in FILES:
    importlib.import_module(f"eval.methods.{name}")

__all__ = ["METHODS", "NEEDS", "Bench", "Method", "State", "found_in", "instruction_fits", "method"]
