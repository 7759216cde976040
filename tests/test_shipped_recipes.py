"""The shipped recipes of real collections train and evaluate end to end, on small data that is made here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from data_files import lines, write

from eval.run import evaluate
from hyperllama.commands import compress as commands_compress
from hyperllama.commands import generate as commands_generate
from hyperllama.commands import inspect as commands_inspect
from hyperllama.commands import train as commands_train
from hyperllama.errors import UserError
from hyperllama.hypernetworks import loading as hypernetworks_loading

RECIPES = Path(__file__).parent.parent / "recipes"
SETS = {
    "cb": ("premise", "hypothesis"),
    "copa": ("premise", "question", "choice1", "choice2"),
    "mnli": ("premise", "hypothesis"),
    "poem_sentiment": ("text",),
}
LABELS = {"copa": ("choice1", "choice2"), "poem_sentiment": ("negative", "positive")}
NLI = {"jinja": "{{premise}} So {{hypothesis}}? ||| {{ answer_choices[label] }}", "answer_choices": "Yes ||| No ||| Maybe"}
TEMPLATES = [
    {"key": "super_glue/cb", "name": "so", **NLI},
    {"key": "glue/mnli", "name": "so", **NLI},
    {"key": "super_glue/copa", "name": "pick", "answer_choices": "{{choice1}} ||| {{choice2}}",
     "jinja": "{{premise}} {{choice1}} or {{choice2}}?{% if question == 'cause' %} ||| {{ answer_choices[label] }}{% endif %}"},
    {"key": "poem_sentiment", "name": "mood", "answer_choices": "bad ||| good",
     "jinja": "{{verse_text}} ||| {{ answer_choices[label] }}"},
]  # fmt: skip


@pytest.fixture
def collections(tmp_path):
    """Labelled sets, templates and a clone of S-NI, each in the layout of the real one."""
    for name, fields in SETS.items():
        labels = LABELS.get(name, ("entailment", "contradiction", "neutral"))
        for split, first in (("train", 0), ("test", 100)):
            rows = []
            for i in range(first, first + 24):
                row = {field: f"{name[0]}{i} {field[0]}{i * 7 % 10}" for field in fields}
                row |= {"question": ("cause", "effect")[i // 2 % 2]} if "question" in fields else {}
                rows.append({**row, "label": labels[i % len(labels)], "label_id": i % len(labels)})
            write(tmp_path / "cls" / name / f"{split}.jsonl", lines(rows))
    defaults = {"dataset": "", "subset": None, "id": "", "original_task": True, "metrics": ["Accuracy"], "reference": ""}
    write(tmp_path / "templates.jsonl", lines([{**defaults, **template} for template in TEMPLATES]))
    for split, names in (("train", ("t1", "t2")), ("test", ("t3", "t4"))):
        write(tmp_path / "sni" / "splits" / "default" / f"{split}_tasks.txt", "\n".join(names))
        for name in names:
            shown = [{"input": f"{name} s{i}", "output": str(i), "explanation": ""} for i in range(3)]
            asked = [{"id": str(i), "input": f"{name} q{i}", "output": [str(i), f"{i}."]} for i in range(6)]
            task = {
                "Definition": [f"Do {name}."],
                "Positive Examples": shown,
                "Instances": asked,
                "Categories": ["Title Generation"],
            }
            write(tmp_path / "sni" / "tasks" / f"{name}.json", task)
    return tmp_path


SMALL = ["limits.context_tokens=300", "limits.query_tokens=100", "gist.tokens=3", "lora.rank=2", "training.max_steps=2"]
SMALL += [f"training.{key}" for key in ("per_device_train_batch_size=2", "save_steps=2", "use_cpu=true", "disable_tqdm=true")]


def train_and_evaluate(name, folder, saved_base, data, evaluation):
    """Both recipes of a collection with all their own settings but sizes and places; returns summary and result lines."""
    run, out = folder / "run", folder / "out"
    commands_train.train(RECIPES / f"{name}.yaml", [*SMALL, *data, f"output={run}", f"model.name_or_path={saved_base}"])
    summary = evaluate(RECIPES / f"{name}-evaluate.yaml", [*data, *evaluation, f"output={out}", f"hypernetwork={run}"])
    found = [json.loads(line) for line in (out / "examples" / "rank0.jsonl").read_text().splitlines()]
    return summary, found


@pytest.mark.slow
def test_symbol_tuning(collections, saved_base):
    data = [f"data.root={collections}/cls"]
    sets = ["data.symbols.sets=[mnli,copa]"], ["data.symbols.sets=[cb,poem_sentiment]", "episodes=6", "data.queries=2"]
    commands_train.train(
        RECIPES / "symbols-small.yaml",
        [*SMALL, *data, *sets[0], f"output={collections}/run", f"model.name_or_path={saved_base}"],
    )
    summary = evaluate(
        RECIPES / "symbols-small-evaluate.yaml",
        [*data, *sets[1], f"output={collections}/out", f"hypernetwork={collections}/run"],
    )
    assert summary["kind"] == "choices" and summary["queries"] == 12 and set(summary["categories"]) == {"cb", "poem_sentiment"}
    assert {"prefix", "swapped_prefix", "shuffled_prefix", "fewer_demonstrations", "mean_pool"} <= set(summary["methods"])
    assert "instruction_only" not in summary["methods"]
    assert summary["chance"] == pytest.approx((6 / 3 + 6 / 2) / 12, abs=1e-6)
    assert f"{collections}/run: nothing" in summary["shared_with_training"]
    original = evaluate(
        RECIPES / "symbols-small-evaluate.yaml",
        [*data, *sets[1], f"output={collections}/original", f"hypernetwork={collections}/run", "data.symbols.labels=original"],
    )
    found = [json.loads(line) for line in (collections / "original" / "examples" / "rank0.jsonl").read_text().splitlines()]
    assert {line["answer"] for line in found} <= {"negative", "positive", "entailment", "contradiction", "neutral"}
    assert original["queries"] == 12


@pytest.mark.slow
def test_templates(collections, saved_base):
    data = [f"data.root={collections}/cls", f"data.templates.templates={collections}/templates.jsonl"]
    run, out = collections / "run", collections / "out"
    commands_train.train(
        RECIPES / "templates-small.yaml",
        [*SMALL, *data, "data.templates.sets=[mnli,poem_sentiment]", f"output={run}", f"model.name_or_path={saved_base}"],
    )
    summary = evaluate(
        RECIPES / "templates-small-evaluate.yaml", [*data, f"output={out}", f"hypernetwork={run}", "data.queries=5"]
    )
    assert summary["kind"] == "choices" and summary["queries"] == 10 and set(summary["categories"]) == {"cb", "copa"}
    found = [json.loads(line) for line in (out / "examples" / "rank0.jsonl").read_text().splitlines()]
    assert {line["task"] for line in found} == {"cb/so", "copa/pick"}
    assert {line["answer"] for line in found if line["task"] == "cb/so"} <= {"Yes", "No", "Maybe"}


@pytest.mark.slow
def test_super_natural_instructions(collections, saved_base):
    summary, found = train_and_evaluate("sni-small", collections, saved_base, [f"data.root={collections}/sni"], [
        "limits.context_tokens=300", "limits.query_tokens=100", "format.answer_tokens=4",
    ])  # fmt: skip
    assert summary["kind"] == "text" and summary["queries"] == 12 and set(summary["categories"]) == {"Title Generation"}
    wanted = {"instruction_only", "copy_input", "copy_demonstration", "prefix", "full_context"}
    assert wanted <= set(summary["methods"])
    assert {line["answer"] for line in found if line["method"] == "copy_demonstration"} == {"0"}
    assert summary["methods"]["copy_demonstration"]["metrics"]["exact_match"]["mean"] == pytest.approx(2 / 12)


@pytest.mark.slow
def test_p3_from_a_local_copy(collections, saved_base):
    for config, split in (("glue_mrpc_same", "train"), ("super_glue_cb_infer", "train"), ("super_glue_cb_infer", "validation")):
        rows = [
            {"inputs_pretokenized": f"{config} {split} {i}?", "targets_pretokenized": "ab"[i % 2], "answer_choices": ["a", "b"]}
            for i in range(12)
        ]
        write(collections / "p3" / config / f"{split}.jsonl", lines(rows))
    data = ["data.hub=null", f"data.root={collections}/p3"]
    summary, found = train_and_evaluate("p3", collections, saved_base, data, ["data.queries=4"])
    assert summary["queries"] == 4 and set(summary["categories"]) == {"super_glue_cb"}
    assert {line["task"] for line in found} == {"super_glue_cb_infer"} and f"{collections}/run: nothing" in (
        summary["shared_with_training"]
    )
    shutil.rmtree(collections / "out")
    shared = ["data.p3.mixture=null", "data.p3.datasets=[glue_mrpc]", "data.split=train", f"hypernetwork={collections}/run"]
    with pytest.raises(ValueError, match="task glue_mrpc_same; data set mrpc"):
        evaluate(RECIPES / "p3-evaluate.yaml", [*data, *shared, f"output={collections}/out"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "llama-2-7b"])
def test_pretraining_on_text_is_gone_on_from(collections, saved_base, name):
    """Both pretrain; a hypernetwork of the same base starts from there, on tasks."""
    write(collections / "text" / "book.txt", " ".join(f"w{i % 700}" for i in range(4000)))
    sizes = ["context_tokens=40", "continuation_tokens=30", "prompt_tokens=1", "after_tokens=5"]
    data = [f"data.root={collections}/text", "data.hub=null", *[f"data.text.{size}" for size in sizes]]
    data += ["data.text.min_context_tokens=20"] if name == "small" else []
    ours = [f"output={collections}/text-run", f"model.name_or_path={saved_base}", "deepspeed=null", "model.dtype=float32"]
    ours += ["training.bf16=false", "training.gradient_checkpointing=false", "training.dataloader_num_workers=0"]
    commands_train.train(RECIPES / "hyperpretrain" / f"{name}.yaml", [*SMALL, *data, *ours])
    run = [f"data.root={collections}/sni", f"output={collections}/run", f"model.name_or_path={saved_base}"]
    alpha = ["lora.alpha=16" if name == "llama-2-7b" else "lora.alpha=32"]
    start = [f"start_from={collections}/text-run", "training.max_steps=1", "training.learning_rate=0.0"]
    commands_train.train(RECIPES / "sni-small.yaml", [*SMALL, *run, *alpha, *start])
    before, after = (
        hypernetworks_loading.load_hypernetwork(collections / folder)[0].compress([range(5, 30)])[0]
        for folder in ("text-run", "run")
    )
    assert all(torch.equal(x, y) for x, y in zip((*before.keys, *before.values), (*after.keys, *after.values)))
    other = [f"output={collections}/other", f"model.name_or_path={saved_base}", *run[:1], f"start_from={collections}"]
    with pytest.raises(UserError, match="start_from: .* is not the folder of a trained hypernetwork"):
        commands_train.train(RECIPES / "sni-small.yaml", [*SMALL, *other])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "gisting", "lora"])
def test_every_kind_of_hypernetwork_has_a_toy(tmp_path, kind):
    """From the recipe to prefixes that are evaluated, inspected and generate."""
    sizes = ["hidden_size=16", "intermediate_size=16", "num_hidden_layers=2", "num_attention_heads=2", "num_key_value_heads=2"]
    base = [*[f"model.architecture.{size}" for size in sizes], "training.max_steps=2", "training.use_cpu=true"]
    commands_train.train(RECIPES / "toy" / "base.yaml", [*base, f"output={tmp_path}/base"])
    run = tmp_path / kind
    changes = ["training.max_steps=2", "training.use_cpu=true", f"model.name_or_path={tmp_path}/base", f"output={run}"]
    commands_train.train(RECIPES / "toy" / "kinds" / f"{kind}.yaml", changes)
    assert commands_inspect.inspect(run)["kind"] == kind
    few = ["methods=[no_context,full_context,prefix,swapped_prefix]", "episodes=5", "leaks=warn", "multi_task=null"]
    summary = evaluate(RECIPES / "toy" / "evaluate.yaml", [*few, f"hypernetwork={run}", f"output={tmp_path}/evaluation"])
    assert summary["methods"]["prefix"]["state_rows"] == 16 + 1 and summary["methods"]["prefix"]["encode_flops"] > 0
    write(tmp_path / "task.jsonl", lines([{"input": "w1", "output": "s1"}] * 3))
    ((path, _),) = commands_compress.compress(run, [tmp_path / "task.jsonl"], tmp_path / "p.safetensors")
    assert len(commands_generate.generate(path, ["w2"], max_new_tokens=2)) == 1
