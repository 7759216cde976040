"""Reading: rows of different tasks and lengths in one batch of stock generate equal each row alone."""

from random import Random

import pytest
import torch
from conftest import VOCABULARY, trained_hypernetwork
from transformers import PreTrainedTokenizerFast

from hyperllama.base.decoder import cache_argument
from hyperllama.commands.generate import AnswerStreamer
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.errors import UserError
from hyperllama.inference.reader import Reader, one_product_head
from hyperllama.prefixes.prefix import Prefix


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join(str(i) for i in range(VOCABULARY - 4))], kind="words", vocab_size=0)


PROMPTS = [[5, 6], [9], [5, 6, 4, 8, 9, 10, 11], [7, 3, 12], [20, 21, 22, 23]]


@pytest.fixture
def setting(base, tokenizer):
    hypernetwork = trained_hypernetwork(base, tokenizer=tokenizer)
    few = hypernetwork.compress([list(range(3, 20)), list(range(30, 37))])
    more = trained_hypernetwork(base, gists=5, seed=4, tokenizer=tokenizer).compress([list(range(40, 60))])
    return Reader(base, tokenizer), [few[0], few[1], more[0], few[0], more[0]]


def test_each_row_as_if_alone(setting):
    reader, prefixes = setting
    settings = {"max_new_tokens": 7, "min_new_tokens": 7}
    together = reader.generate(PROMPTS, prefixes, **settings)
    alone = [reader.generate([prompt], [prefix], **settings)[0] for prompt, prefix in zip(PROMPTS, prefixes)]
    in_pairs = reader.generate(PROMPTS, prefixes, batch_size=2, **settings)
    assert together == alone == in_pairs and all(len(row) == 7 for row in together)


def test_rows_with_and_without_a_prefix_in_one_call(setting):
    reader, prefixes = setting
    mixed = [None, *prefixes[1:3], None, prefixes[4]]
    together = reader.generate(PROMPTS, mixed, max_new_tokens=7, min_new_tokens=7)
    alone = [
        reader.generate([a], None if b is None else [b], max_new_tokens=7, min_new_tokens=7)[0] for a, b in zip(PROMPTS, mixed)
    ]
    assert together == alone and together != reader.generate(PROMPTS, prefixes, max_new_tokens=7, min_new_tokens=7)
    assert reader.generate(PROMPTS, [None] * 5, max_new_tokens=7) == reader.generate(PROMPTS, max_new_tokens=7)
    with pytest.raises(UserError, match="prompt 0: .* take 602 positions"):
        reader.generate(PROMPTS, mixed, max_new_tokens=600)


def test_sixteen_prefixes_of_all_sizes_in_one_batch(base, tokenizer):
    rng = Random(0)
    prefixes, prompts = [], []
    for i in range(16):
        hypernetwork = trained_hypernetwork(base, gists=1 + i % 5, seed=i, tokenizer=tokenizer)
        prefixes += hypernetwork.compress([rng.choices(range(4, 90), k=rng.randint(1, 30))])
        hypernetwork.lora.remove()
        prompts.append(rng.choices(range(4, 90), k=rng.randint(1, 9)))
    together = Reader(base, tokenizer).generate(prompts, prefixes, max_new_tokens=8)
    alone = [Reader(base, tokenizer).generate([a], [b], max_new_tokens=8)[0] for a, b in zip(prompts, prefixes)]
    assert together == alone and len({tuple(row) for row in together}) > 8


def test_generate_follows_the_logits_behind_the_prefix(setting):
    """Greedy by hand, one forward pass a token, with no cache but the prefix."""
    reader, prefixes = setting
    for prompt, prefix, found in zip(PROMPTS, prefixes, reader.generate(PROMPTS, prefixes, max_new_tokens=4, min_new_tokens=4)):
        ids = list(prompt)
        for _ in range(4):
            mask = torch.ones(1, prefix.rows + len(ids), dtype=torch.long)
            cache = cache_argument(reader.model, prefix.to_cache())
            logits = reader.model(input_ids=torch.tensor([ids]), **cache, attention_mask=mask).logits
            logits[..., reader.tokenizer.eos_token_id] = -float("inf")  # as min_new_tokens does
            ids.append(logits[0, -1].argmax().item())
        assert ids[len(prompt) :] == found


def test_beam_search(setting):
    reader, prefixes = setting
    settings = {"max_new_tokens": 5, "num_beams": 3}
    together = reader.generate(PROMPTS, prefixes, **settings)
    assert together == [reader.generate([p], [x], **settings)[0] for p, x in zip(PROMPTS, prefixes)]


def test_a_prefix_changes_the_answer_and_is_not_changed(setting):
    reader, prefixes = setting
    before = [Prefix([k.clone() for k in p.keys], [v.clone() for v in p.values], p.manifest) for p in prefixes]
    with_prefix = reader.generate(PROMPTS, prefixes, max_new_tokens=6)
    assert with_prefix != reader.generate(PROMPTS, max_new_tokens=6) and prefixes == before


def test_without_prefixes_it_is_stock_generate(setting):
    reader, _ = setting
    (found,) = reader.generate([PROMPTS[2]], max_new_tokens=6, min_new_tokens=6)
    ids = torch.tensor([PROMPTS[2]])
    stock = reader.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, min_new_tokens=6,
                                  pad_token_id=0, eos_token_id=reader.tokenizer.eos_token_id)  # fmt: skip
    assert found == stock[0, 7:].tolist()


def test_the_head_takes_the_rows_of_a_batch_in_one_product(setting):
    """It sees rows without gaps, and the model has no hook left, also after an exception."""
    reader, prefixes = setting
    head, gapless = reader.model.get_output_embeddings(), []
    watch = head.register_forward_hook(lambda _, args, output: gapless.append(args[0].is_contiguous()))
    reader.generate(PROMPTS, prefixes, max_new_tokens=3)
    assert gapless and all(gapless)
    watch.remove()
    with pytest.raises(ValueError, match="inside"), one_product_head(reader.model):
        raise ValueError("inside")
    gapless.clear()
    watch = head.register_forward_hook(lambda _, args, output: gapless.append(args[0].is_contiguous()))
    reader.model(input_ids=torch.tensor(PROMPTS[2:3] * 2), logits_to_keep=1)
    assert gapless == [False], "stock again: if it hands over rows without gaps one day, one_product_head can go"


def test_what_a_reader_refuses(setting, tokenizer):
    from conftest import tiny_base

    reader, prefixes = setting
    with pytest.raises(UserError, match="was made for"):
        Reader(tiny_base(reader.model.config.model_type, seed=9), tokenizer).generate([[5]], prefixes[:1])
    with pytest.raises(UserError, match="prompt 0: is empty after tokenisation"):
        reader.generate([[]], prefixes[:1])
    with pytest.raises(UserError, match="new tokens take 605 positions, but the model has 512"):
        reader.generate([[5, 6]], prefixes[:1], max_new_tokens=600)
    with pytest.raises(ValueError, match="2 prompts need as many prefixes, not 1"):
        reader.generate([[5], [6]], prefixes[:1])
    with pytest.raises(ValueError, match="one answer a prompt"):
        reader.generate([[5]], prefixes[:1], num_return_sequences=2)


def test_an_answer_stops_at_a_text_as_if_it_had_been_cut_there(setting):
    """In a batch and alone, at a text of one token or of several; what comes behind it is not there."""
    reader, prefixes = setting
    long = reader.generate(PROMPTS, prefixes, max_new_tokens=12, min_new_tokens=12)
    for length in (1, 2):
        stop = reader.tokenizer.decode(long[0][4 : 4 + length])
        stopped = reader.generate(PROMPTS, prefixes, max_new_tokens=12, stop=stop)
        for whole, cut in zip(reader.generate(PROMPTS, prefixes, max_new_tokens=12), stopped):
            ends = [n for n in range(1, len(whole) + 1) if stop in reader.tokenizer.decode(whole[:n])]
            assert cut == (whole[: ends[0]] if ends else whole)
        assert any(len(cut) < 12 for cut in stopped)


@pytest.mark.parametrize("cuts", [[3, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9], [9]])
def test_what_is_streamed_ends_before_the_stop(capsys, cuts):
    text = "yes\n#\n\nmore #\n\n"
    streamer, start = AnswerStreamer(None, "\n\n"), 0
    for end in [*cuts, len(text)]:
        streamer.on_finalized_text(text[start:end])
        start = end
    streamer.on_finalized_text("", stream_end=True)
    assert capsys.readouterr().out == "yes\n#\n"


def test_what_only_begins_like_the_stop_is_shown(capsys):
    streamer = AnswerStreamer(None, "\n\n")
    for piece in ("one\n", "two\n"):
        streamer.on_finalized_text(piece)
    streamer.on_finalized_text("", stream_end=True)
    assert capsys.readouterr().out == "one\ntwo\n\n"
