"""`hyperllama generate` and `chat`: answers behind a prefix."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from hyperllama import __version__
from hyperllama.base.checks import check_config
from hyperllama.base.fingerprints import identify
from hyperllama.base.loading import base_of, load_base, load_config, load_tokenizer
from hyperllama.data.sni import read_inputs
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.errors import UserError
from hyperllama.files import append, from_fields, read_text, sha256, whole_json_lines, write_atomically
from hyperllama.hypernetworks.hub import fetch
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.prefix import Prefix
from hyperllama.runs import digest_of, owned

WINDOW = 8  # batches that are answered together, the shortest inputs first


class AnswerStreamer(TextStreamer):
    """Prints an answer as it is generated, up to the text `stop`: what may be its beginning is held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop, self.held = stop, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text, self.held = self.held + text, ""
        if self.stop:
            text, found, rest = text.partition(self.stop)
            most = 0 if found or stream_end else min(len(self.stop) - 1, len(text))
            begun = next((n for n in range(most, 0, -1) if self.stop.startswith(text[-n:])), 0)
            # What begins with the stop is held for good: nothing behind it is shown.
            text, self.held = text[: len(text) - begun], text[len(text) - begun :] + found + rest
        self.show(text, stream_end)

    def show(self, text: str, stream_end: bool) -> None:
        """What is done with the next piece of the answer: it is printed."""
        super().on_finalized_text(text, stream_end)


class Session:
    """One prefix and its base, loaded, to answer inputs with.

    `chat_template` writes an input as a user's turn by the tokenizer's own template, for bases that were trained on
    conversations; otherwise by the text format in the prefix's manifest. The base is loaded in `dtype`, that of the prefix
    unless given. `check_base` compares all of its weights with those that the prefix was made for, not a sample.
    """

    def __init__(
        self,
        prefix_path: str | Path,
        *,
        base_path: str | None = None,
        chat_template: bool = False,
        dtype: str | None = None,
        check_base: bool = False,
    ):
        self.prefix = Prefix.load(fetch(prefix_path, prefix=True))
        if self.prefix.manifest is None:
            raise UserError(
                f"{prefix_path}: has no manifest, so its base and text format are unknown; use hyperllama.Reader in Python"
            )
        made_for = self.prefix.manifest.base
        name = base_of(prefix_path, made_for.name, base_path)
        if check_base and made_for.full is None:
            raise UserError(f"{prefix_path}: has no fingerprint of all weights; compress it with --check-base, or leave it out")
        check_config(load_config(name), name)
        self.tokenizer, self.chat_template = load_tokenizer(name), chat_template
        if chat_template and not self.tokenizer.chat_template:
            raise UserError(f"{name}: its tokenizer has no chat template; leave --chat-template out")
        settings = {"dtype": dtype or str(self.prefix.dtype).removeprefix("torch.")}
        base = load_base(name, quantize=self.prefix.manifest.base.quantize, **settings)
        self.reader = Reader(base, self.tokenizer)
        identity = identify(base, self.tokenizer, full=True) if check_base else self.reader.identity
        self.prefix.check(identity, str(prefix_path))
        self.encoder = Encoder(
            self.tokenizer, from_fields(TextFormat, self.prefix.manifest.text_format, str(prefix_path)), Limits()
        )

    def prompt(self, text: str) -> list[int]:
        """Token ids of an input as it follows the prefix."""
        if not self.chat_template:
            return self.encoder.prompt(text)
        turn = [{"role": "user", "content": text}]
        # What looks like a control token in the user's text is text, by versions of transformers that know how.
        settings = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": True}
        ids = self.tokenizer.apply_chat_template(turn, **settings)["input_ids"]
        return self.encoder.without_start(ids)

    def answer(self, inputs: Sequence[str], **settings) -> list[str]:
        """Answers to inputs. `settings` go to transformers' generate, over the text format's own."""
        settings = {"max_new_tokens": self.encoder.format.answer_tokens, "stop": self.stop, **settings}
        answers = self.reader.generate([self.prompt(text) for text in inputs], [self.prefix] * len(inputs), **settings)
        if self.chat_template:
            return [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        return [self.encoder.answer_of(answer) for answer in answers]

    @property
    def stop(self) -> str:
        """The text that ends an answer: the separator, but a turn of a conversation ends with the end token alone."""
        return "" if self.chat_template else self.encoder.format.separator

    def check_lengths(self, asked: Sequence[Asked], **settings) -> None:
        """UserError that names the first input which cannot be answered, for its length say, and counts the others."""
        new = settings.get("max_new_tokens", self.encoder.format.answer_tokens)
        prompts = [self.prompt(one.input) for one in asked]
        if problems := list(self.reader.too_long(prompts, [self.prefix] * len(prompts), new)):
            place, problem = problems[0]
            more = f" ({len(problems) - 1:,} more inputs cannot be answered)" if len(problems) > 1 else ""
            raise UserError(f"{asked[place].where}: {problem}{more}")

    def stream(self, text: str, **settings) -> None:
        """Print the answer to one input as it is generated."""
        self.answer([text], streamer=AnswerStreamer(self.tokenizer, self.stop), **settings)


def generate(
    prefix_path: str | Path,
    inputs: Sequence[str],
    *,
    base_path: str | None = None,
    chat_template: bool = False,
    dtype: str | None = None,
    **settings,
) -> list[str]:
    """Answer inputs behind one prefix; see `Session`."""
    session = Session(prefix_path, base_path=base_path, chat_template=chat_template, dtype=dtype)
    return session.answer(inputs, **settings)


@dataclass(frozen=True)
class Asked:
    """One thing to be answered: where it stands, its text, and what of its line goes with the answer."""

    where: str
    input: str
    rest: dict[str, Any] = field(default_factory=dict)

    def line(self, answer: str) -> str:
        """A line of results: the input, its answer, and all other fields that there were."""
        return json.dumps({"input": self.input, "output": answer, **self.rest}, ensure_ascii=False)


def read_asked(path: str | Path, limit: int | None = None) -> list[Asked]:
    """What a file asks (see `hyperllama.data.sni.read_inputs`); outputs that it has become "references"."""
    found = read_inputs(path)[:limit]
    known = [{"references": list(one.references)} if one.references else {} for _, one, _ in found]
    return [Asked(where, one.input, more | rest) for (where, one, rest), more in zip(found, known, strict=True)]


def facts_of(answering: Answering, prefix_path: str | Path) -> dict[str, Any]:
    """Fingerprints of all that answers depend on."""
    session = answering.session
    lines = [one.line("") for one in answering.asked]
    base = session.reader.identity
    facts = {
        "inputs": sha256(*lines),
        "prefix": digest_of(fetch(prefix_path, prefix=True)),
        "base": [base.weights, base.config],
    }
    facts |= {"dtype": str(session.reader.model.dtype), "chat_template": session.chat_template, "version": __version__}
    return facts | {"settings": answering.settings, "seed": answering.seed}


class Answering:
    """Answers to many inputs, a window of some hundreds at a time, as lines in order.

    With an `output` lines are kept in OUTPUT.partial as they come, and a rerun goes on there if prefix, base, inputs and
    settings are the same; when all are there the file gets its name. `seed` counts for each window by itself, so that a rerun
    samples the same.
    """

    def __init__(self, session: Session, asked: Sequence[Asked], *, seed: int = 0, batch_size: int = 32, **settings):
        self.session, self.asked, self.seed = session, list(asked), seed
        self.window = WINDOW * batch_size
        self.settings = {"batch_size": batch_size, **settings}
        session.check_lengths(self.asked, **settings)

    def windows(self, first: int = 0) -> Iterator[list[tuple[Asked, str]]]:
        """What is asked from input `first` on, which begins a window, with its answers; a list for each window."""
        for start in range(first, len(self.asked), self.window):
            window = self.asked[start : start + self.window]
            set_seed(self.seed + start)
            answers = self.session.answer([one.input for one in window], **self.settings)
            yield list(zip(window, answers, strict=True))

    def write(self, output: str | Path, facts: dict[str, Any]) -> int:
        """Write all answers to a file; returns how many were there from before."""
        path = Path(output)
        partial = path.with_name(f"{path.name}.partial")
        with owned(path, folder=False):
            begun, there = whole_json_lines(partial), 0
            if begun and begun[0] == {"made_from": facts}:
                there = (len(begun) - 1) // self.window * self.window
            elif begun:
                print(
                    f"{partial}: answers to other inputs, or by another prefix, base or settings; begins anew", file=sys.stderr
                )
            kept = [json.dumps(line, ensure_ascii=False) for line in ({"made_from": facts}, *begun[1 : there + 1])]
            write_atomically(partial, "\n".join(kept) + "\n")
            for window in self.windows(there):
                append(partial, "".join(one.line(answer) + "\n" for one, answer in window), sync=True)
            whole = read_text(partial, "answers").split("\n", 1)[1]
            write_atomically(path, whole)
            partial.unlink()
        return there
