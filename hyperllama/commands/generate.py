"""`hyperllama generate` and `chat`: answers behind a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase, TextStreamer

from hyperllama.base.checks import check_config
from hyperllama.base.identity import identify
from hyperllama.base.loading import base_of, load_base, load_config, load_tokenizer
from hyperllama.data.episode import Example
from hyperllama.data.sni import read_task
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.errors import UserError
from hyperllama.hypernetworks.hub import fetch
from hyperllama.inference.reader import Reader
from hyperllama.prefixes.prefix import Prefix


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
        self.encoder = Encoder(self.tokenizer, TextFormat(**self.prefix.manifest.text_format), Limits())

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


def read_inputs(path: str | Path) -> list[Example]:
    """What `generate --inputs` reads: JSON lines with "input", and perhaps "output", or the instances of an S-NI task."""
    return list(read_task(path, outputs=False).examples)
