"""What a traced step says of memory, against the allocator of a real one, for every kind."""

import pytest
import torch
from conftest import VOCABULARY, tiny_architecture
from transformers import set_seed

from benchmarks.measure import allocated_bytes
from eval.memory import Parameters
from eval.sizing import Steps, bare_model, base_config, batches_of, halves
from eval.tracing import trace, trace_deep, without_numbers
from hyperllama.base.loading import load_base, random_base
from hyperllama.commands.train import packed_model
from hyperllama.data.text import EncodedEpisode
from hyperllama.data.vocabulary import train_tokenizer
from hyperllama.hypernetworks.hint.settings import HintSettings
from hyperllama.hypernetworks.registry import KINDS
from hyperllama.hypernetworks.settings import LoraSettings, PoolingSettings
from hyperllama.objectives import losses as objectives_losses
from hyperllama.recipe.schema import FullAttentionRecipe, GistRecipe, ModelRecipe, Recipe

SIZE = {"hidden_size": 160, "intermediate_size": 440, "num_hidden_layers": 2, "num_attention_heads": 10, "head_dim": 16}
LORA = LoraSettings(rank=8)
# Of each what a recipe says.
TRAINED = {
    "lora": {"gist": GistRecipe(8, "lora"), "lora": LORA},
    "pooling": {"gist": GistRecipe(8, "pooling")},
    "pooling with LoRA": {"gist": GistRecipe(8, "pooling"), "pooling": PoolingSettings(lora=True), "lora": LORA},
    "full": {"gist": GistRecipe(8, "full")},
    "gisting": {"gist": GistRecipe(8, "gisting")},
    "hint": {"gist": GistRecipe(8, "hint")},
    "hint, regime paper": {"gist": GistRecipe(8, "hint"), "hint": HintSettings(regime="paper")},
    "full attention": {"method": "full_attention"},
    "full attention, LoRA": {"method": "full_attention", "full_attention": FullAttentionRecipe(lora=True), "lora": LORA},
}
HOW = {"float32": (False, "float32", False), "autocast": (True, "bfloat16", False), "DeepSpeed": (True, "bfloat16", True)}
# Every kind as most recipes train it; other numbers where most differs.
CASES = [(name, "autocast") for name in TRAINED]
CASES += [("pooling with LoRA", "float32"), ("hint, regime paper", "DeepSpeed")]


def recipe_of(name, how="float32", checkpointing=False, vocabulary=VOCABULARY, **changes):
    half, dtype, _ = HOW[how]
    architecture = tiny_architecture("qwen3", **{**SIZE, "max_position_embeddings": 2048, **changes})
    model = ModelRecipe(architecture=architecture, vocab_size=vocabulary, dtype=dtype)
    training = {"bf16": half, "gradient_checkpointing": checkpointing}
    return Recipe(output="out", model=model, training=training, **TRAINED[name])


def batch_of(recipe, context=400):
    """Contexts and queries of several lengths."""
    contexts, prompts = (context, context + context // 2), (60, 90)
    queries = [tuple(((7,) * n, (8,) * 6) for n in prompts[:count]) for count in (1, 2)]
    (batch,) = batches_of(recipe, [EncodedEpisode((5,) * n, q) for n, q in zip(contexts, queries)], 2)
    return batch


def real(recipe, batch, deepspeed=False):
    """The model that a run would train, with numbers, whose gradients are there."""
    set_seed(0)
    base = random_base(recipe.model.architecture, vocab_size=recipe.model.vocab_size, dtype=recipe.model.dtype)
    return ready(packed_model(recipe, base), recipe, batch, deepspeed)


def ready(model, recipe, batch, deepspeed=False):
    if batch.sinks:
        model.sink = 0
    if recipe.training["gradient_checkpointing"]:
        model.activation_checkpointing_enable()
    if deepspeed:
        model.to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return model.train()


def one_step(model, batch, autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(batch).sum
    loss.backward()


def test_every_kind_is_traced():
    assert {settings["gist"].kind for settings in TRAINED.values() if "gist" in settings} == set(KINDS)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("name, how", CASES)
def test_the_peak_is_that_of_the_allocator(name, how, checkpointing):
    """Within 15 %, though the allocator counts kernels' work spaces too."""
    recipe, deepspeed = recipe_of(name, how, checkpointing), HOW[how][2]
    batch = batch_of(recipe)
    planned = Steps(recipe, base_config(recipe)).of(batch, deepspeed=deepspeed)
    model = real(recipe, batch, deepspeed)
    measured = allocated_bytes(lambda: one_step(model, batch, halves(recipe.training) and not deepspeed))
    assert planned.peak == pytest.approx(measured, rel=0.15) and planned.peak > planned.kept > 0
    counts = Parameters.of(bare_model(recipe, base_config(recipe), deepspeed=deepspeed))
    own = list(model.parameters())
    assert counts.trained == sum(p.numel() for p in own if p.requires_grad)
    assert counts.bytes == sum(p.nbytes for p in own)
    assert counts.trained_bytes == sum(p.grad.nbytes for p in own if p.grad is not None)


@pytest.mark.parametrize("name, checkpointing", [("pooling with LoRA", True), ("hint, regime paper", False)])
def test_a_deep_model_is_that_of_three_layers_and_what_each_more_adds(name, checkpointing):
    recipe = recipe_of(name, checkpointing=checkpointing, num_hidden_layers=5)
    batch, config = batch_of(recipe, context=30), base_config(recipe)

    def make(layers):
        return bare_model(recipe, config, layers)

    found, whole = trace_deep(make, 5, batch), trace(without_numbers(make(5)), batch)
    for figure in ("kept", "peak", "forward", "backward", "again"):
        assert getattr(found, figure) == getattr(whole, figure), figure
    assert found.peaks.keys() == whole.peaks.keys()


def test_a_loss_in_chunks_keeps_no_logits(monkeypatch):
    recipe = recipe_of("full attention")
    batch = batch_of(recipe, context=20)
    whole = Steps(recipe, base_config(recipe)).of(batch)
    monkeypatch.setattr(objectives_losses, "LOGITS", 3 * VOCABULARY)
    chunked = Steps(recipe, base_config(recipe)).of(batch)
    assert len(batch.targets) == 18 and chunked.again > 0 == whole.again
    logits = 4 * 18 * VOCABULARY
    assert logits * 0.8 < whole.kept - chunked.kept < logits * 1.2


def test_gradients_of_what_is_used_twice_are_summed_in_place():
    """Of the embedding of many words, which the sink looks up too."""
    recipe = recipe_of("gisting", checkpointing=True, vocabulary=20_000)
    batch = batch_of(recipe, context=100)
    planned = Steps(recipe, base_config(recipe)).of(batch)
    model = real(recipe, batch)
    assert planned.peak == pytest.approx(allocated_bytes(lambda: one_step(model, batch, False)), rel=0.15)


def test_a_base_in_four_bits(tmp_path):
    """What bitsandbytes itself takes: its linear layers are whole for one product at a time."""
    pytest.importorskip("bitsandbytes")
    recipe = recipe_of("pooling with LoRA", "autocast", hidden_size=128, intermediate_size=384, num_attention_heads=8)
    set_seed(0)
    tokenizer = train_tokenizer(["a few words"], kind="bytes", vocab_size=300)
    random_base(recipe.model.architecture, vocab_size=VOCABULARY).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = ModelRecipe(name_or_path=str(tmp_path / "base"), dtype="bfloat16", quantize="nf4")
    recipe = Recipe(**{**vars(recipe), "model": model})
    batch = batch_of(recipe)
    planned = Steps(recipe, base_config(recipe)).of(batch)
    base = load_base(model.name_or_path, dtype=model.dtype, quantize=model.quantize)
    counts = Parameters.of(bare_model(recipe, base_config(recipe)))
    made = ready(packed_model(recipe, base), recipe, batch)
    measured = allocated_bytes(lambda: one_step(made, batch, True))
    assert planned.peak == pytest.approx(measured, rel=0.15)
    assert counts.bytes == pytest.approx(sum(p.nbytes for p in made.parameters()), rel=0.02)
