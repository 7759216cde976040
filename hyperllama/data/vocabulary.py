"""Tokenizers for models that start at random, made with the tokenizers library."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def train_tokenizer(texts: Iterable[str], *, kind: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for `texts`: "words" knows each of their words, "bytes" is byte-level BPE of `vocab_size` tokens."""
    special = list(SPECIAL.values())
    if kind == "words":
        words = dict.fromkeys(word for text in texts for word in text.split())
        vocabulary = {token: i for i, token in enumerate([*special, "<unk>", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return _with_start(tokenizer, unk_token="<unk>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _with_start(tokenizer)


def _with_start(tokenizer: Tokenizer, **settings) -> PreTrainedTokenizerFast:
    """It puts its start token before a text, as Llama's does."""
    start = SPECIAL["bos_token"]
    tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings, **SPECIAL)
