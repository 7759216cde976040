"""`hyperllama check`: what a recipe's data is, without weights."""

import json
import re

import pytest
from data_files import WORDS, lines, write

from eval.check import check
from eval.sizing import Hardware
from hyperllama.errors import UserError


@pytest.fixture
def recipe(tmp_path, saved_base):
    for name in ("one", "two"):
        rows = [{"input": f"{name} {i} " + "x" * (i % 60), "output": str(i)} for i in range(60)]
        write(tmp_path / "data" / f"{name}.jsonl", lines(rows))
    return write(
        tmp_path / "r.yaml",
        f"""
output: {tmp_path}/run
model: {{name_or_path: {saved_base}}}
gist: {{tokens: 4, kind: lora}}
data: {{source: jsonl, root: {tmp_path}/data, shots: 5, queries: 2}}
limits: {{context_tokens: 300, query_tokens: 75, too_long_query: skip}}
training: {{max_steps: 7, per_device_train_batch_size: 2}}
""",
    )


def test_a_training_recipe(recipe, tmp_path, saved_base, monkeypatch):
    # No weights: a folder with config and tokenizer is enough.
    folder = tmp_path / "light"
    folder.mkdir()
    for path in saved_base.iterdir():
        if "safetensors" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    text = check(recipe, [f"model.name_or_path={folder}"], episodes=60)
    assert "tasks           2: one, two" in text and "examples        120" in text
    (dropped,) = [line for line in text.splitlines() if line.startswith("dropped")]
    count, total = (int(word) for word in dropped.replace(",", "").split() if word.isdigit())
    assert 0 < count < total == 300
    (skipped,) = [line for line in text.splitlines() if line.startswith("skipped")]
    assert int(skipped.split()[1]) > 0 and "cut             nothing" in text
    longest = next(int(line.split()[-1]) for line in text.splitlines() if line.strip().startswith("context"))
    assert 200 < longest <= 300 and "in 7 steps" in text
    mask = [line for line in text.splitlines() if line.startswith(("S0 ", "S1 ", "S2 ", "S3 ", "S4 ", "S5 "))]
    assert len(mask) > 10 and any("G" in line for line in mask) and re.search("2 contexts, [2-4] queries", text)
    assert "|" in text.split("context of ")[1] and "</s>" not in text
    assert "</s>" in check(recipe, [f"model.name_or_path={folder}", "format.end_token=true"], episodes=3)
    assert "state of a task 4 prefix rows 0.00 MB in bf16" in text


def test_the_memory_of_a_task_module_at_7b(recipe):
    """Without its tokenizer, which is not here: by the limits. 32 layers of 32 heads of 128, hidden size 4096."""
    seven = [
        "model.name_or_path=meta-llama/Llama-2-7b-hf",
        "gist.kind=hint",
        "hint.adapter_size=64",
        "hint.lora_rank=8",
        "limits.context_tokens=512",
    ]
    text = check(recipe, seven, hardware=Hardware.of(gpus=8))
    row, matrices = 2 * 32 * 4096 * 2 / 1e6, 2 * 32 * 4096 * 64 * 2 / 1e6
    parts = f"4 prefix rows {4 * row:.2f} MB + 512 fused rows {512 * row:.2f} MB + adapters of 64 {matrices:.2f} MB"
    parts += "".join(f" + LoRA beside {name} of 8 {matrices / 8:.2f} MB" for name in ("q_proj", "v_proj"))
    assert f"state of a task {parts} = {516 * row + 1.25 * matrices:.2f} MB in bf16, for a context of 512 tokens" in text
    assert f"cached: {512 * row:.2f} MB" in text
    assert "6,738,415,616 frozen" in text and "of generator" in text and "of fusion" in text


def test_a_mixture_with_text_and_a_random_base(tmp_path):
    write(tmp_path / "texts" / "a.txt", WORDS)
    write(tmp_path / "cls" / "a" / "train.jsonl", lines([{"text": f"t {i}", "label": "xy"[i % 2]} for i in range(20)]))
    path = write(
        tmp_path / "r.yaml",
        f"""
output: out
model: {{architecture: {{model_type: llama, max_position_embeddings: 512}}, vocab_size: 400}}
limits: {{context_tokens: 200, query_tokens: 60}}
data:
  shots: 2
  mixture:
    - {{source: symbols, root: {tmp_path}/cls}}
    - {{source: text, root: {tmp_path}/texts, text: {{context_tokens: 30, continuation_tokens: 10}}}}
training: {{max_steps: 3}}
""",
    )
    text = check(path, episodes=20)
    assert "data symbols" in text and "400 tokens, trained now" in text and "tasks           2" in text
    full = check(path, ["method=full_attention"], episodes=20)
    assert "contexts" not in full.split("mask of")[1].splitlines()[0]


def test_the_text_that_is_shown_is_that_of_the_task_that_is_named(tmp_path, saved_base):
    """An episode none of whose queries fits is drawn again, of another task perhaps, or of another source of a mixture."""
    for name, length in (("long", 90), ("short", 5)):
        rows = [{"input": f"{name} {i} " + "x" * length, "output": str(i)} for i in range(9)]
        write(tmp_path / "data" / f"{name}.jsonl", lines(rows))
    path = write(
        tmp_path / "r.yaml",
        f"""
output: {tmp_path}/run
model: {{name_or_path: {saved_base}}}
gist: {{tokens: 4, kind: lora}}
data: {{source: jsonl, root: {tmp_path}/data, shots: 5, min_shots: 1, queries: 2}}
limits: {{context_tokens: 300, query_tokens: 60, too_long_query: skip}}
training: {{max_steps: 1}}
""",
    )
    parts = [f"{{source: jsonl, root: {tmp_path}/data/{name}.jsonl}}" for name in ("long", "short")]
    redrawn = 0
    for changes in ([], [f"data={{shots: 5, min_shots: 1, queries: 2, mixture: [{', '.join(parts)}]}}"]):
        for seed in range(6):
            text = check(path, [*changes, f"seed={seed}"], episodes=1)
            name, shown, dropped = re.search(r"context of (\w+) \((\d+) demonstrations, (\d+) dropped\):\n", text).groups()
            context, query = text.split(" dropped):\n")[1].split("a query and its answer:")
            assert name == "short" and re.findall(r"Input: (\w+)", context) == ["short"] * int(shown) and "long" not in query
            count = next(line.split()[-1] for line in text.splitlines() if line.strip().startswith("demonstrations"))
            assert (count, dropped) == (shown, "0")
            redrawn += "skipped         0" not in text
    assert redrawn > 2


def test_leaks_against_another_recipe(recipe, tmp_path):
    other = write(tmp_path / "e.yaml", f"""
method: evaluate
output: {tmp_path}/out
data: {{source: jsonl, root: {tmp_path}/data/one.jsonl}}
""")  # fmt: skip
    text = check(recipe, against=other, episodes=5)
    assert f"shared with {other}: task one; data set one; 60 identical inputs" in text
    assert "name the other recipe with --against" in check(recipe, episodes=5)


def test_what_running_would_refuse_is_refused(recipe, tmp_path, saved_base):
    with pytest.raises(UserError, match="limits.query_tokens=75: raise it, or set limits.too_long_query to skip"):
        check(recipe, ["limits.too_long_query=error"])
    tokenizer = json.loads((saved_base / "tokenizer_config.json").read_text())
    tokenizer.pop("eos_token")
    folder = tmp_path / "endless"
    folder.mkdir()
    for path in saved_base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="format.end_token: the tokenizer has no end token"):
        check(recipe, [f"model.name_or_path={folder}", "format.end_token=true"])
    assert "one step" in check(recipe, [f"model.name_or_path={folder}"], episodes=3)
