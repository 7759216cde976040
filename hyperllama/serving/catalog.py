"""The prefixes of a store by the names under which they are served."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hyperllama.base.identity import BaseIdentity
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.errors import UserError
from hyperllama.files import from_fields
from hyperllama.prefixes.prefix import Prefix, stored_digest
from hyperllama.prefixes.store import SUFFIX, Entry, PrefixStore, no_collection
from hyperllama.serving.ticket import Ticket


@dataclass(frozen=True)
class Card:
    """A prefix that is served: its name, what its requests carry, and how its queries are written."""

    name: str
    ticket: Ticket
    encoder: Encoder


class Catalog:
    """The prefixes of a store for one base. A prefix that is added is there at once.

    A prefix has the name of its task and that of its file without the ending; where several prefixes for this base are of one
    task, only the latter. Names are looked up, never joined to a path. A file is read whole before its first use, and again
    when it has changed. Several threads may ask.
    """

    def __init__(self, store: PrefixStore, identity: BaseIdentity, tokenizer: PreTrainedTokenizerBase):
        self.store, self.identity, self.tokenizer = store, identity, tokenizer
        self._lock = threading.Lock()
        self._stamp: Hashable = None
        self._by_name: dict[str, list[Entry]] = {}
        self._listed: list[tuple[str, Entry]] = []
        self._cards: dict[tuple, Card] = {}
        self._encoders: dict[TextFormat, Encoder] = {}

    def listed(self) -> list[tuple[str, Entry]]:
        """The names of all prefixes for this base, one each, with their entries."""
        with self._lock:
            self._look()
            return self._listed

    def find(self, name: str) -> Card | None:
        """The prefix of a name, None if no prefix has it. UserError if several do, or if it cannot be served."""
        with self._lock:
            self._look()
            entries = self._by_name.get(name, [])
            if len(entries) > 1:
                files = ", ".join(sorted(map(_stem, entries)))
                raise UserError(f"{name}: {len(entries)} prefixes are of this task; ask for one of {files}")
            return self._card(name, entries[0]) if entries else None

    def _look(self) -> None:
        stamp = self.store.stamp()
        if stamp != self._stamp:
            with no_collection():
                self._name_all()
            self._stamp = stamp

    def _name_all(self) -> None:
        entries = list(self.store)
        tasks: defaultdict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            tasks[entry.task].append(entry)
        for task, found in tasks.items():  # those of other bases count where there is none for this one
            tasks[task] = [entry for entry in found if self._own(entry)] or found
        self._by_name = {**tasks, **{_stem(entry): [entry] for entry in entries}}
        own = [entry for entry in entries if self._own(entry)]
        self._listed = [(e.task if len(tasks[e.task]) == 1 else _stem(e), e) for e in own]

    def _own(self, entry: Entry) -> bool:
        return entry.base.is_model(self.identity)

    def _card(self, name: str, entry: Entry) -> Card:
        path = self.store.folder / entry.file
        if not path.is_file():
            raise UserError(f"{path}: in the index, but not there; run hyperllama list {self.store.folder} --repair")
        stat = path.stat()
        known = (name, entry.file, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if known not in self._cards:
            prefix = Prefix.load(path, self.identity)
            prefix.refuse_modules("an engine fills its cache with")
            form = from_fields(TextFormat, prefix.manifest.text_format, str(path))
            if form not in self._encoders:
                self._encoders[form] = Encoder(self.tokenizer, form, Limits())
            self._cards[known] = Card(name, Ticket(entry.file, stored_digest(path), prefix.rows), self._encoders[form])
        return self._cards[known]


def _stem(entry: Entry) -> str:
    return entry.file.removesuffix(SUFFIX)
