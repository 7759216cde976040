"""The Public Pool of Prompts as T0 was trained and tested on it (Sanh et al. 2022, arXiv 2110.08207), through `datasets`.

`bigscience/P3` has one configuration for each template of each data set, with columns inputs_pretokenized, targets_pretokenized
and, for templates with fixed answers, answer_choices. Configurations named `..._score_eval` hold T0's rank classification:
a row for each choice, with idx = [example, choice] and is_correct; the hub has them for the prompts that T0 was tested on.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from hyperllama.data.episode import Example, Provenance, TaskSource, Weights, merged
from hyperllama.errors import UserError, in_one_line
from hyperllama.files import sha256
from hyperllama.runs import digest_of

# How the names of configurations begin. The mixtures are the paper's, as github.com/bigscience-workshop/t-zero lists them in
# t0/datasets.csv (do_train = BASE, and do_eval = BASE). Story Cloze is behind an agreement and not on the hub.
T0_TRAIN = (
    "adversarial_qa_dbert", "adversarial_qa_dbidaf", "adversarial_qa_droberta", "ag_news", "amazon_polarity", "app_reviews",
    "cnn_dailymail_3.0.0", "common_gen", "cos_e_v1.11", "cosmos_qa", "dbpedia_14", "dream", "duorc_ParaphraseRC",
    "duorc_SelfRC", "gigaword", "glue_mrpc", "glue_qqp", "imdb", "kilt_tasks_hotpotqa", "multi_news", "paws_labeled_final",
    "qasc", "quail", "quarel", "quartz", "quoref", "ropes", "rotten_tomatoes", "samsum", "sciq", "social_i_qa", "trec",
    "wiki_bio", "wiki_hop_original", "wiki_qa", "wiqa", "xsum", "yelp_review_full",
)  # fmt: skip
T0_HELD_OUT = (
    "anli", "hellaswag", "story_cloze_2016", "super_glue_cb", "super_glue_copa", "super_glue_rte", "super_glue_wic",
    "super_glue_wsc.fixed", "winogrande_winogrande_xl",
)  # fmt: skip
# What else the hub has: the further training sets of T0+ and T0++, and a second form of Winogrande.
OTHERS = (
    "ai2_arc_ARC_Challenge", "ai2_arc_ARC_Easy", "openbookqa_main", "piqa", "race_high", "race_middle", "squad_v2",
    "super_glue_boolq", "super_glue_multirc", "super_glue_record", "trivia_qa_unfiltered", "web_questions",
    "winogrande_winogrande_debiased",
)  # fmt: skip
MIXTURES = {"t0_train": T0_TRAIN, "t0_held_out": T0_HELD_OUT}
RANKED = "_score_eval"

_ROUND = re.compile(rf"_r([123])(?:{RANKED})?$")
_FILE = re.compile(r"(?P<split>.+?)(?:-\d{5}-of-\d{5})?\.(?P<kind>jsonl|json|parquet)$")


@dataclass(frozen=True)
class P3Settings:
    """Which configurations of P3, each of which is a task.

    `mixture`: T0's training sets or its held-out ones; or `datasets`, beginnings of configurations' names such as "glue_mrpc",
    and `configs`, whole names. Rows are shuffled; `streaming` draws them from a buffer of `shuffle_buffer` rows, and fetches no
    more than it needs for that. Demonstrations are rows of `demonstrations_split` where data.split is another.
    """

    mixture: Literal["t0_train", "t0_held_out"] | None = None
    datasets: list[str] = field(default_factory=list)
    configs: list[str] = field(default_factory=list)
    streaming: bool = False
    shuffle_buffer: int = 25_000
    demonstrations_split: str = "train"

    def problems(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        if bool(self.mixture) == bool(self.datasets or self.configs):
            return ["mixture: give either a mixture, t0_train or t0_held_out, or datasets and configs"]
        return []


def dataset_prefix(config: str) -> str:
    """The data set that a configuration is a template of; the whole name, without _score_eval, for one that P3 does not have.

    >>> dataset_prefix("super_glue_cb_can_we_infer"), dataset_prefix("anli_GPT_3_style_r1_score_eval")
    ('super_glue_cb', 'anli')
    """
    known = (prefix for prefix in (*T0_TRAIN, *T0_HELD_OUT, *OTHERS) if _begins(config, prefix))
    return next(known, config.removesuffix(RANKED))


def select_configs(known: Sequence[str], settings: P3Settings) -> tuple[list[str], list[str]]:
    """The configurations of `known` that the settings ask for, sorted, and the data sets of a mixture that are not there.

    A prompt is one task: the plain configuration where there is one, not its `_score_eval`. Of T0's held-out sets only the
    prompts with a `_score_eval` are taken, if any has one: those that ask for the original task, which T0 was tested on.
    Raises UserError for a name that matches nothing, with the nearest one, and for a mixture of which nothing is there.
    """
    there, chosen, missing = set(known), set(settings.configs), []
    for config in settings.configs:
        if config not in there:
            raise UserError(f"data.p3.configs: there is no configuration {config!r}{_nearest(config, known)}")
    for prefix in MIXTURES[settings.mixture] if settings.mixture else settings.datasets:
        begin = {config for config in known if _begins(config, prefix)}
        ranked = {config.removesuffix(RANKED) for config in begin if config.endswith(RANKED)}
        if not begin and not settings.mixture:
            names = sorted({dataset_prefix(config) for config in known})
            raise UserError(f"data.p3.datasets: no configuration begins with {prefix!r}{_nearest(prefix, names)}")
        missing += [] if begin else [prefix]
        if settings.mixture == "t0_held_out" and ranked:
            begin = {config for config in begin if config.removesuffix(RANKED) in ranked}
        chosen |= {config for config in begin if not (config.endswith(RANKED) and config.removesuffix(RANKED) in begin)}
    if not chosen:
        raise UserError(f"data.p3.mixture: nothing of {settings.mixture} is there; it has {', '.join(sorted(known)[:5])} ...")
    return sorted(chosen), missing


class P3Task:
    """A configuration as a `Task` whose rows are read when they are first asked for.

    Examples are usable ones of the split, at most `instances`; `dropped` counts the others that were read, and
    `repetition` is as of every task. There is
    no instruction. `category` is the data set, of ANLI with the round, since T0 reports the rounds one by one.
    """

    instruction = ""

    def __init__(self, name: str, pool: _Pool, settings: P3Settings, split: str, instances: int):
        self.name, self.dropped, self.repetition = name, 0, (0, 0)
        self._pool, self._settings, self._split, self._instances = pool, settings, split, instances
        prefix = dataset_prefix(name)
        anli_round = _ROUND.search(name) if prefix == "anli" else None
        self.category = f"{prefix}_r{anli_round[1]}" if anli_round else prefix
        self.datasets = (prefix,)

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """What is asked; UserError where the split is not there or has no usable row."""
        split = self._pool.find_split(self.name, self._split)
        if split is None:
            there = ", ".join(sorted(self._pool.splits(self.name))) or "none"
            raise UserError(f"data.split: {self.name} has no split {self._split!r}; it has {there}")
        examples = self._read(split)
        if not examples:
            raise UserError(f"{self.name}, split {split}: no row has both an input and a target; leave it out of data.p3")
        return examples

    @cached_property
    def demonstrations(self) -> tuple[Example, ...]:
        """What is shown, from the split for demonstrations; none where it is the split of the examples, or not there."""
        own = self._pool.find_split(self.name, self._settings.demonstrations_split)
        return () if own is None or own == self._pool.find_split(self.name, self._split) else self._read(own)

    def fingerprint(self) -> str | None:
        """SHA-256 of the files of a local copy that may be read."""
        if not self._pool.local:
            return None
        splits = (self._pool.find_split(self.name, name) for name in (self._split, self._settings.demonstrations_split))
        files = [file for split in splits if split for file in self._pool.files(self.name, split)[1]]
        return sha256(self.name, *(digest_of(file) for file in files))

    def read(self) -> tuple[Example, ...]:
        """Examples and demonstrations as far as they have been read; all of a local copy."""
        if self._pool.local:
            return (*self.demonstrations, *self.examples)
        return (*self.__dict__.get("demonstrations", ()), *self.__dict__.get("examples", ()))

    def _read(self, split: str) -> tuple[Example, ...]:
        made = _ranked_examples if self.name.endswith(RANKED) else _plain_examples
        kept = []
        for example in made(self._pool, self.name, split):
            self.dropped += example is None
            kept += [] if example is None else [example]
            if len(kept) == self._instances:
                break
        examples, *counts = merged(kept)
        self.repetition = tuple(map(sum, zip(self.repetition, counts)))
        return examples

    def distinct(self) -> P3Task:
        """Itself: what it reads is distinct."""
        return self


class P3Source(TaskSource):
    """Episodes of P3, demonstrations and queries of one data set and template; a task is read when it is first drawn.

    What is drawn depends on the random numbers alone, not on what was read before. `missing` names data sets of the mixture
    that are not there, and configurations without the split. `texts` reads everything, and so do weights by "size".
    """

    tasks: list[P3Task]

    def __init__(self, tasks: Sequence[P3Task], *, weights: Weights, instances: int, missing: Sequence[str] = ()):
        super().__init__(tasks, weights=weights)
        self.missing = tuple(missing)
        self._length = sum(len(task.examples) if weights == "size" else instances for task in tasks)

    def __len__(self) -> int:
        """One episode for each example; with equal weights as if every task were full, so that nothing is read to count."""
        return self._length

    def fingerprint(self) -> str | None:
        """Of a local copy, SHA-256 of its files, see `hyperllama.runs.digest_of`; of the hub's None."""
        found = [task.fingerprint() for task in self.tasks]
        return None if None in found else sha256(*found)

    def provenance(self) -> Provenance:
        """Configurations, data sets, and the inputs that have been read so far: on the hub reading all would take hours."""
        read = [example.input for task in self.tasks for example in task.read()]
        datasets = frozenset(name for task in self.tasks for name in task.datasets)
        return Provenance(frozenset(task.name for task in self.tasks), datasets, frozenset(read))

    @property
    def dropped(self) -> int:
        """Rows without input or target among those read so far."""
        return sum(task.dropped for task in self.tasks)


def read_p3(root: str, settings: P3Settings, *, split: str, instances_per_task: int, weights: Weights = "equal") -> P3Source:
    """P3 from the hub, by name, or from a folder of CONFIG/SPLIT.jsonl, .json or .parquet (or a clone of the hub's).

    Lists configurations only; see `P3Task` and `P3Source` for when rows are read. ANLI's "train" is train_r1 where its splits
    are named by round. Raises UserError for names that are not there, and where the hub cannot be reached.
    """
    for problem in settings.problems():
        raise UserError(f"data.p3.{problem}")
    pool = _Pool(os.path.expanduser(root), settings.streaming, settings.shuffle_buffer)
    configs, missing = select_configs(pool.configs(), settings)
    if pool.local:
        # On the hub the splits are not known before a configuration is read.
        without = [c for c in configs if pool.find_split(c, split) is None and c not in settings.configs]
        configs, missing = [c for c in configs if c not in without], missing + without
        if not configs:
            raise UserError(f"data.split: no configuration of data.p3 below {root} has a split {split!r}, such as {without[0]}")
    tasks = [P3Task(config, pool, settings, split, instances_per_task) for config in configs]
    return P3Source(tasks, weights=weights, instances=instances_per_task, missing=missing)


@dataclass(frozen=True)
class _Pool:
    """Where configurations are: a local folder, or a name on the hub."""

    root: str
    streaming: bool
    buffer: int

    @property
    def local(self) -> bool:
        return Path(self.root).is_dir()

    def configs(self) -> list[str]:
        if self.local:
            found = [folder.name for folder in Path(self.root).iterdir() if folder.is_dir() and self.splits(folder.name)]
            if not found:
                raise UserError(f"data.root: {self.root} has no folders of P3; expected CONFIG/SPLIT.jsonl, .json or .parquet")
            return sorted(found)
        if self.root.startswith((".", "/")) or Path(self.root).exists():
            raise UserError(f"data.root: {self.root} is no folder; give one of CONFIG/SPLIT.jsonl, or P3's name on the hub")
        import datasets

        try:
            return sorted(datasets.get_dataset_config_names(self.root))
        except Exception as error:  # of datasets, its http client or the network
            raise UserError(
                f"{self.root}: its configurations cannot be listed ({in_one_line(error)}); check the name, that the hub can "
                "be reached, or give a local folder of CONFIG/SPLIT.jsonl"
            ) from error

    def splits(self, config: str) -> set[str]:
        if self.local:
            files = (_FILE.fullmatch(path.name) for path in Path(self.root, config).iterdir())
            return {match["split"] for match in files if match}
        return _hub_splits(self.root, config)

    def find_split(self, config: str, split: str) -> str | None:
        """The split, or what ANLI calls it, if it is there."""
        there, names = self.splits(config), [split]
        if match := _ROUND.search(config):
            names.append(f"{ {'validation': 'dev'}.get(split, split) }_r{match[1]}")
        return next((name for name in names if name in there), None)

    def rows(self, config: str, split: str, needed: Sequence[str], wanted: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Rows with the columns `needed` and those of `wanted` that are there; P3's token ids are never decoded."""
        import datasets

        where = f"{self.root}, {config}, split {split}"
        datasets.disable_progress_bars()
        try:
            if self.local:
                kind, files = self.files(config, split)
                loaded = datasets.load_dataset(kind, data_files={"train": files}, split="train", streaming=self.streaming)
            else:
                loaded = datasets.load_dataset(self.root, config, split=split, streaming=self.streaming)
            there = loaded.column_names or list(next(iter(loaded), {}))
            missing = [column for column in needed if column not in there]
            if missing:
                raise UserError(f"{where}: has no column {', '.join(missing)}; it has {', '.join(there) or 'none'}")
            loaded = loaded.select_columns([column for column in (*needed, *wanted) if column in there])
            # Some sets (IMDB among them) are stored one class after the other: the first rows would all have one answer.
            yield from loaded.shuffle(seed=0, buffer_size=self.buffer) if self.streaming else loaded.shuffle(seed=0)
        except UserError:
            raise
        except Exception as error:  # of datasets, pyarrow, the http client or the network
            raise UserError(
                f"{where}: cannot be read ({in_one_line(error)}); check the data, or that the hub can be reached"
            ) from error

    def files(self, config: str, split: str) -> tuple[str, list[str]]:
        """The format of a local split, and its files."""
        found = [(match["kind"], str(path)) for path in sorted(Path(self.root, config).iterdir())
                 if (match := _FILE.fullmatch(path.name)) and match["split"] == split]  # fmt: skip
        kind = min(kind for kind, _ in found)
        return "json" if kind.startswith("json") else kind, [path for k, path in found if k == kind]


@lru_cache(maxsize=1024)
def _hub_splits(root: str, config: str) -> set[str]:
    import datasets

    try:
        return set(datasets.get_dataset_split_names(root, config))
    except Exception as error:  # of datasets, its http client or the network
        raise UserError(
            f"{root}, {config}: its splits cannot be listed ({in_one_line(error)}); can the hub be reached?"
        ) from error


def _plain_examples(pool: _Pool, config: str, split: str) -> Iterator[Example | None]:
    """A row each; None for a row without input or target."""
    for row in pool.rows(config, split, ("inputs_pretokenized", "targets_pretokenized"), ("answer_choices",)):
        choices = row.get("answer_choices") or []
        if not isinstance(choices, list):
            raise UserError(f"{pool.root}, {config}, split {split}: answer_choices is {choices!r}; expected a list of texts")
        yield _example(row["inputs_pretokenized"], [row["targets_pretokenized"]], choices)


def _ranked_examples(pool: _Pool, config: str, split: str) -> Iterator[Example | None]:
    """The rows of an example each; None where no choice is right.

    All rows are read first: nothing says that the choices of an example stand together.
    """
    columns = ("inputs_pretokenized", "targets_pretokenized", "idx", "is_correct")
    groups: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for row in pool.rows(config, split, columns):
        if not isinstance(row["idx"], list) or len(row["idx"]) != 2:
            raise UserError(f"{pool.root}, {config}, split {split}: idx is {row['idx']!r}; expected [example, choice]")
        groups.setdefault(row["idx"][0], []).append((row["idx"][1], row))
    for number in sorted(groups):
        rows = [row for _, row in sorted(groups[number], key=lambda pair: pair[0])]
        targets = [row["targets_pretokenized"] for row in rows]
        right = [target for target, row in zip(targets, rows) if row["is_correct"]]
        yield _example(rows[0]["inputs_pretokenized"], right, targets)


def _example(text: Any, targets: Sequence[Any], choices: Sequence[Any]) -> Example | None:
    inputs, references, offered = _texts([text]), _texts(targets), _texts(choices)
    if not inputs or not references:
        return None
    # As in T0, which calls a choice right if it equals the target, a row without such a choice has none to rank.
    return Example(inputs[0], references[0], references, offered if references[0] in offered else ())


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    """Different texts without white space around them, and without empty ones."""
    return tuple(dict.fromkeys(str(value).strip() for value in values if value is not None and str(value).strip()))


def _begins(config: str, prefix: str) -> bool:
    return config == prefix or config.startswith(f"{prefix}_")


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f", choose from {', '.join(islice(known, 10))} ..."


def from_recipe(part: Any) -> P3Source:
    """The source that a part of a recipe's data describes: a local copy, or the hub's."""
    settings = {"instances_per_task": part.instances_per_task, "weights": part.task_weights}
    return read_p3(part.hub or part.root, part.p3, split=part.split, **settings)
