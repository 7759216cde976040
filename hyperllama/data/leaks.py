"""Leaks: what a training set and an evaluation set share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hyperllama.data.episode import Provenance

# The names that collections give to one data set. A set that is built on the examples of another counts as that one.
ALIASES = {
    "mnli": ("multinli", "multinlimismatched", "gluemnli", "gluemnlimatched", "gluemnlimismatched", "xnli"),
    "snli": ("esnli", "defeasiblenlisnli"),
    "cb": ("supergluecb", "commitmentbank"),
    "copa": ("supergluecopa",),
    "rte": ("gluerte", "supergluerte"),
    "boolq": ("superglueboolq",),
    "wic": ("supergluewic",),
    "wsc": ("supergluewscfixed", "supergluewsc", "wscfixed", "wscfiexed", "enhancedwsc", "winogradwsc", "wsc273", "wsc285"),
    "multirc": ("supergluemultirc",),
    "record": ("supergluerecord",),
    "winogrande": tuple(f"winograndewinogrande{size}" for size in ("xs", "s", "m", "l", "xl", "debiased")),
    "qqp": ("glueqqp", "quoraquestionpairs"),
    "mrpc": ("gluemrpc",),
    "sst2": ("gluesst2",),
    "cola": ("gluecola",),
    "dbpedia14": ("dbpedia",),
    "piqa": ("physicaliqa",),
    "anli": ("anlir1", "anlir2", "anlir3"),
    "storycloze": ("storycloze2016", "storycloze2018", "rocstories"),
    "paws": ("pawslabeledfinal", "pawslabeledswap"),
    "wellformedquery": ("googlewellformedquery",),
}
_CANONICAL = {re.sub(r"[^a-z0-9]", "", alias): name for name, aliases in ALIASES.items() for alias in (name, *aliases)}


@dataclass(frozen=True)
class Leaks:
    """What two sources share: names of tasks and of data sets, and how many inputs are the same word for word."""

    tasks: tuple[str, ...]
    datasets: tuple[str, ...]
    inputs: int

    def __bool__(self) -> bool:
        return bool(self.tasks or self.datasets or self.inputs)

    def __str__(self) -> str:
        parts = [_list(self.tasks, "task"), _list(self.datasets, "data set")]
        parts.append(f"{self.inputs:,} identical inputs" if self.inputs else "")
        return "; ".join(part for part in parts if part) or "nothing"


def find_leaks(training: Provenance, evaluation: Provenance) -> Leaks:
    """What an evaluation set shares with a training set.

    Data sets are compared by name over the spellings of the collections (S-NI's "multinli" is P3's "glue/mnli"), inputs
    without case, punctuation and white space.

    >>> a = Provenance(frozenset({"t1"}), frozenset({"glue/mnli"}), frozenset({"A cat."}))
    >>> print(find_leaks(a, Provenance(frozenset({"t2"}), frozenset({"multinli", "cb"}), frozenset({"a  cat", "a dog"}))))
    data set mnli; 1 identical inputs
    """
    return Leaks(
        tuple(sorted(training.tasks & evaluation.tasks)),
        tuple(sorted(_datasets(training.datasets) & _datasets(evaluation.datasets))),
        len(_inputs(training.inputs) & _inputs(evaluation.inputs)),
    )


def dataset_name(name: str) -> str:
    """One spelling for a data set's name.

    >>> dataset_name("super_glue/wsc.fixed"), dataset_name("wsc_fiexed"), dataset_name("Multi_NLI")
    ('wsc', 'wsc', 'mnli')
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return _CANONICAL.get(plain, plain)


def _datasets(names: Iterable[str]) -> set[str]:
    # "synthetic" is S-NI's word for tasks that were written by a program; they share no data.
    return {dataset_name(name) for name in names} - {"synthetic", ""}


def _inputs(texts: Iterable[str]) -> set[int]:
    found = (re.sub(r"[\W_]+", " ", text.lower()).strip() for text in texts)
    # Hashes within one process: a million inputs fit; very short ones ("yes") are no sign of a leak.
    return {hash(text) for text in found if len(text) >= 5}


def _list(names: tuple[str, ...], what: str) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{what}{'s' if len(names) > 1 else ''} {shown}"
