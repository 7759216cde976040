"""Text becomes tokens as each family of tokenizers would have it: contexts as a whole, what follows as they would go on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hyperllama.data.episode import Example
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.data.tokens import Piece, TextTokens, template
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError

TEXT = [
    "Do what the examples do.\n\nInput: the cat sat\nOutput: a cat\n\nInput: cats sat there\nOutput: cats\n\n",
    "Input: é a</s>b ünd 日本 42\nOutput: it's 7\n\n",
] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]
MARKS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
GPT_4 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def starting(tokenizer, *more):
    """It puts <s> before a text, as Llama's tokenizers do."""
    own = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer.post_processor = Sequence([*more, own])


def byte_level(pattern=None, start=True):
    """As GPT-2 and SmolLM2 have it, or with a pattern of its own as Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    if start:
        starting(tokenizer, ByteLevel(trim_offsets=True))
    return tokenizer


def metaspace(scheme):
    """SentencePiece's BPE with bytes for what is unknown: Llama 2 puts a space before a text ("first"), others do not."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *bytes_], max_token_length=8, show_progress=False)
    # Trained on words: a model trained on whole texts would know lines by heart.
    tokenizer.train_from_iterator([f" {word}" for text in TEXT for word in text.replace("\n", " ").split(" ")], trainer)
    # Bytes are added as special tokens by the trainer; in published files they are plain vocabulary.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    starting(tokenizer)
    return tokenizer


def legacy_llama():
    """Llama 2's own file: a normaliser writes the spaces, and nothing splits words."""
    tokenizer = metaspace("never")
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    tokenizer.decoder = decoders.Sequence(strip)
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


FAMILIES = {
    "GPT-2": byte_level,
    "SmolLM2": lambda: byte_level(start=False),
    "Llama 3": lambda: byte_level(GPT_4),
    "Qwen": lambda: byte_level(GPT_4, start=False),
    "Llama 2": lambda: metaspace("first"),
    "Llama 2, legacy": legacy_llama,
    "Mistral": lambda: metaspace("always"),
    "without a first space": lambda: metaspace("never"),
    "Unigram": unigram,
}
EXAMPLES = [
    Example("the cat sat", "a cat"),
    Example("cats  sat there ", "cats"),
    Example("é ünd 日本", "7"),
    Example("42", "it's"),
]
FORMATS = {
    "default": TextFormat(),
    "one line break": TextFormat(separator="\n"),
    "a space before the seam": TextFormat(query="Q: {input} A: ", answer="{output}"),
    "breaks on both sides": TextFormat(query="\nInput: {input}\n", answer="\n{output}", separator="\n\n"),
    "no separator": TextFormat(separator=""),
    "input first": TextFormat(query="{input} ->", separator="\n"),
    "a space that goes on": TextFormat(query="{input} ->", separator=" . "),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A tokenizer of each family, read from files as a published one is."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for name, make in FAMILIES.items():
        PreTrainedTokenizerFast(tokenizer_object=make(), **MARKS).save_pretrained(folder / name)
        made[name] = AutoTokenizer.from_pretrained(folder / name)
    return made


def text_of(text_format, instruction, examples, query=None):
    """The text, written out by hand."""
    text = text_format.instruction.format(instruction=instruction) if instruction else ""
    for example in examples:
        text += text_format.query.format(input=example.input) + text_format.answer.format(output=example.output)
        text += text_format.separator
    return text if query is None else text + text_format.query.format(input=query.input)


def own_tokens(tokenizer, text):
    """What the tokenizer makes of a text without special tokens in it."""
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    @pytest.mark.parametrize("name", ["default", "one line break", "input first"])
    @pytest.mark.parametrize("instruction", ["", "Do what the examples do."])
    def test_context_and_prompt_and_answer_are_the_whole_text(self, loaded, family, name, instruction):
        tokenizer, text_format = loaded[family], FORMATS[name]
        encoder = Encoder(tokenizer, text_format, Limits())
        for n in range(1, len(EXAMPLES)):
            context, _ = encoder.context(instruction, EXAMPLES[:n])
            asked = EXAMPLES[n]
            whole = text_of(text_format, instruction, EXAMPLES[: n + 1])
            ours = [*context, *encoder.prompt(asked.input), *encoder.answer(asked.output)]
            # A context that goes on: the tokens before the query template's next beginning.
            after = own_tokens(tokenizer, whole + text_format.query.split("{input}")[0])
            assert ours == after[: len(ours)] and len(own_tokens(tokenizer, whole)) >= len(ours) - 1
            prompt = own_tokens(tokenizer, text_of(text_format, instruction, EXAMPLES[:n], asked))
            assert [*context, *encoder.prompt(asked.input)] == prompt

    @pytest.mark.parametrize("name", FORMATS)
    def test_every_text_comes_back(self, loaded, family, name):
        """Whatever lies on both sides of a seam: nothing is lost, nothing is there twice."""
        tokenizer, text_format = loaded[family], FORMATS[name]
        encoder = Encoder(tokenizer, text_format, Limits())
        context, spans = encoder.context("Do.", EXAMPLES[:2])
        text = text_of(text_format, "Do.", EXAMPLES[:2])
        ids = [*context, *encoder.prompt(EXAMPLES[3].input), *encoder.answer(EXAMPLES[3].output)]
        more = text_of(text_format, "", EXAMPLES[3:])
        assert self.said(tokenizer, ids) == self.said(tokenizer, own_tokens(tokenizer, text + more))
        for example, (start, end) in zip(EXAMPLES, spans, strict=False):
            said = self.said(tokenizer, context[start:end])
            written = text_format.answer.format(output=example.output) + text_format.separator
            assert said.strip() == self.plain(tokenizer, written).strip()

    @staticmethod
    def plain(tokenizer, text):
        """Metaspace decoders drop or add spaces at the ends of what they are given: those do not count."""
        return text.replace("▁", "").replace(" ", "") if "▁" in str(tokenizer.get_vocab()) else text

    def said(self, tokenizer, ids):
        return self.plain(tokenizer, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def test_special_tokens_in_what_users_write_are_text(self, loaded, family):
        tokenizer = loaded[family]
        encoder = Encoder(tokenizer, TextFormat(), Limits())
        context, _ = encoder.context("a</s>b", [Example("<s>x</s>", "</s>")])
        specials = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        ids = [*context[len(encoder.start) :], *encoder.prompt("a</s>b"), *encoder.answer("</s>")]
        assert not specials & set(ids)
        if "Unigram" not in family:  # which knows no "<"
            assert "a</s>b" in tokenizer.decode(encoder.prompt("a</s>b"), skip_special_tokens=True)

    def test_special_tokens_of_templates_are_special(self, loaded, family):
        tokenizer = loaded[family]
        text_format = TextFormat(query="<s>Input: {input}\nOutput:", separator="</s>")
        encoder = Encoder(tokenizer, text_format, Limits())
        context, spans = encoder.context("", [Example("a</s>b", "the cat"), Example("the cat", "cats")])
        assert context.count(tokenizer.eos_token_id) == 2 and context.count(tokenizer.bos_token_id) == 2 + len(encoder.start)
        assert [context[end - 1] for _, end in spans] == [tokenizer.eos_token_id] * 2
        assert encoder.answer("cats")[-1] == tokenizer.eos_token_id and encoder.prompt("x")[0] == tokenizer.bos_token_id

    def test_a_start_token_where_the_tokenizer_adds_one(self, loaded, family):
        tokenizer = loaded[family]
        own = tokenizer("Input")["input_ids"][0] == tokenizer.bos_token_id
        for start_token, expected in ((None, own), (True, True), (False, False)):
            encoder = Encoder(tokenizer, TextFormat(start_token=start_token), Limits())
            context, _ = encoder.context("", EXAMPLES[:2])
            assert context.count(tokenizer.bos_token_id) == expected == len(encoder.start)
            assert (context[0] == tokenizer.bos_token_id) == expected and context[0] == encoder.first_token()

    @settings(max_examples=20, deadline=None)
    @given(limit=st.integers(20, 200), seed=st.randoms(use_true_random=False))
    def test_what_does_not_fit_is_left_out_whole(self, loaded, family, limit, seed):
        tokenizer = loaded[family]
        encoder = Encoder(tokenizer, TextFormat(), Limits(context_tokens=limit))
        examples = [Example(" ".join(seed.choices(["cat", "the", "sat"], k=seed.randint(1, 20))), "cat") for _ in range(8)]
        context, spans = encoder.context("", examples)
        assert len(context) <= limit and len(spans) == len(context.shown) == len(context.ends)
        alone, _ = Encoder(tokenizer, TextFormat(), Limits()).context("", [examples[i] for i in context.shown])
        assert alone == context


@given(st.lists(st.text(alphabet="ab \n<s>/é日", max_size=8), min_size=1, max_size=6), st.sampled_from(["GPT-2", "Llama 2"]))
@settings(deadline=None)
def test_pieces_between_others_come_back(loaded, texts, family):
    tokens, tokenizer = TextTokens(loaded[family]), loaded[family]
    pieces = [Piece(text) for text in texts]
    ids, spans = tokens.encode(pieces)
    assert all(a <= b for a, b in spans) and [b for _, b in spans] == sorted(b for _, b in spans)
    middle = tokens.between(pieces[:1], pieces[1:], pieces[:1])
    if family == "GPT-2":
        assert tokenizer.decode(ids) == "".join(texts) and tokenizer.decode(middle) == "".join(texts[1:])


def test_a_template_may_say_anything_but_a_user_may_not(loaded):
    tokens = TextTokens(loaded["GPT-2"])
    ids, _ = tokens.encode([template("<s>"), Piece("<s>"), template("x</s>y")])
    assert ids.count(1) == 1 and ids.count(2) == 1


def test_tokenizers_without_offsets_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="Slow: a tokenizer without offsets"):
        Encoder(Slow(), TextFormat(), Limits())


def test_a_start_token_that_is_not_there_is_refused(loaded):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(start=False), eos_token="</s>")
    with pytest.raises(UserError, match="format.start_token: the tokenizer has no start token"):
        Encoder(tokenizer, TextFormat(start_token=True), Limits())


def test_ours_puts_its_start_token_first_as_llamas_does():
    for kind in ("words", "bytes"):
        tokenizer = train_tokenizer(["a few words"], kind=kind, vocab_size=300)
        encoder = Encoder(tokenizer, TextFormat(), Limits())
        assert encoder.start == [tokenizer.bos_token_id] == tokenizer("")["input_ids"]


@pytest.mark.real
def test_smollm2(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    encoder = Encoder(tokenizer, TextFormat(), Limits())
    context, spans = encoder.context("Do.", EXAMPLES[:3])
    assert encoder.start == [] and tokenizer.bos_token_id not in context
    whole = tokenizer(text_of(TextFormat(), "Do.", EXAMPLES[:3], EXAMPLES[3]))["input_ids"]
    assert [*context, *encoder.prompt(EXAMPLES[3].input)] == whole
    assert [tokenizer.decode(context[a:b]) for a, b in spans] == [" a cat\n\n", " cats\n\n", " 7\n\n"]
    # An answer ends as demonstrations show it, not as a text that ends there would.
    assert encoder.answer("7") == context[spans[2][0] : spans[2][1]]
    assert tokenizer.decode(encoder.prompt("a<|im_end|>b")) == "Input: a<|im_end|>b\nOutput:"
    assert tokenizer.eos_token_id not in encoder.prompt("a<|im_end|>b")
