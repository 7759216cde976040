"""The shipped recipes of HINT run end to end, on sizes and data that are small."""

import json
from pathlib import Path

import pytest
from data_files import lines, write

from eval.run import evaluate
from hyperllama.commands import compress as commands_compress
from hyperllama.commands import generate as commands_generate
from hyperllama.commands import inspect as commands_inspect
from hyperllama.commands import train as commands_train
from hyperllama.commands.tune import tune
from hyperllama.data.synthetic import SyntheticLanguage, SyntheticSource
from hyperllama.errors import UserError
from hyperllama.prefixes.prefix import Prefix

RECIPES = Path(__file__).parent.parent / "recipes" / "hint"
FEW = ["training.max_steps=2", "training.save_steps=2", "training.use_cpu=true", "training.disable_tqdm=true"]
SMALL = ["hint.adapter_size=4", "hint.mlp_size=8", "hint.fusion_rank=2", "training.per_device_train_batch_size=2"]
LORA_ALONE = ["gist.tokens=0", "hint.fusion=false", "hint.adapter_size=0", "hint.lora_rank=2"]


def test_instructions_name_categories_and_their_symbols():
    from random import Random

    source = SyntheticSource(SyntheticLanguage(instructions=True))
    for seed in range(30):
        episode = source.task(Random(seed), 3, 5)
        said = dict(part.split()[1:] for part in episode.instruction.split(" , "))
        assert len(said) == 4 and set(said) <= set(source.names) and set(said.values()) <= set(source.symbols)
        for example in (*episode.demonstrations, *episode.queries):
            (category,) = [i for i, words in enumerate(source.categories) if example.input in words]
            assert said[source.names[category]] == example.output
        assert {word for part in episode.instruction.split() for word in part.split()} <= set(source.texts())
    plain = SyntheticSource(SyntheticLanguage())
    assert plain.words == source.words and plain.task(Random(0), 3, 5).instruction == "" and not plain.names
    (listed,) = SyntheticSource(SyntheticLanguage(instructions=True, lists=1.0))._list(Random(0)).queries
    assert len(f"{listed.input} {listed.output}".split()) == 4 * 9, "a name is one more word of its category"


@pytest.mark.parametrize(
    "named, most, fewest", [(None, 15, None), (None, 40, None), (2, 31, 7), (1, 255, None), (None, 16, None)]
)
def test_instructions_of_a_chosen_length_hold_remarks_of_no_use(named, most, fewest):
    from random import Random

    plain = SyntheticSource(SyntheticLanguage(instructions=True))
    settings = {"named_categories": named, "instruction_tokens": most, "min_instruction_tokens": fewest}
    source = SyntheticSource(SyntheticLanguage(instructions=True, **settings))
    lengths = set()
    for seed in range(60):
        episode, bare = source.task(Random(seed), 5, 3), plain.task(Random(seed), 5, 3)
        assert (episode.demonstrations, episode.queries, episode.task) == (bare.demonstrations, bare.queries, bare.task)
        parts, sentences = episode.instruction.split(" , "), bare.instruction.split(" , ")
        said = [part for part in parts if part.startswith("call ")]
        assert set(said) <= set(sentences) and len(said) == len(set(said)) == (named or 4)
        remarks = [part.split() for part in parts if part not in said]
        chosen = set(map(int, episode.task.removeprefix("synthetic ").split("+")))
        for words in remarks:
            (category,) = [i for i, own in enumerate(source.categories) if set(words) <= set(own)]
            assert category not in chosen and len(set(words)) == len(words) >= 1
        lengths.add(len(episode.instruction.split()))
    assert max(lengths) <= most and (fewest or most) - 1 <= min(lengths) and (fewest is None or len(lengths) > 10)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"instructions": False, "instruction_tokens": 20}, "are of instructions; set it to true"),
        ({"named_categories": 5}, "named_categories must be at least 1 and at most task_categories"),
        ({"instruction_tokens": 14}, "instruction_tokens must be at least 15, the sentences alone"),
        (
            {"min_instruction_tokens": 20},
            "min_instruction_tokens must be between 15, the sentences alone, and instruction_tokens",
        ),
        (
            {"categories": 100, "task_categories": 100, "symbols": 100, "instruction_tokens": 500},
            "needs a category that a task",
        ),
    ],
)
def test_instructions_that_cannot_be_are_refused(changes, problem):
    assert any(problem in found for found in SyntheticLanguage(**{"instructions": True, **changes}).problems())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [[], ["hint.regime=paper"], LORA_ALONE], ids=str)
def test_the_toy_of_hint(tmp_path, changes):
    """From the recipes to a task module that is evaluated, compressed, inspected and generated from."""
    sizes = ["hidden_size=16", "intermediate_size=16", "num_hidden_layers=2", "num_attention_heads=2", "num_key_value_heads=2"]
    commands_train.train(RECIPES / "base.yaml", [*[f"model.architecture.{s}" for s in sizes], *FEW, f"output={tmp_path}/base"])
    run, base = tmp_path / "run", f"model.name_or_path={tmp_path}/base"
    commands_train.train(RECIPES / "hypernetwork.yaml", [*FEW, *SMALL, *changes, base, f"output={run}"])
    found = commands_inspect.inspect(run)
    assert found["kind"] == "hint" and found["finished"] and found["hint"]["mlp_size"] == 8
    summary = evaluate(RECIPES / "evaluate.yaml", ["episodes=5", f"hypernetwork={run}", f"output={tmp_path}/evaluation"])
    ours, fused = summary["methods"]["prefix"], "hint.fusion=false" not in changes
    sink = int(changes != LORA_ALONE)  # what has no rows has no sink
    assert sink == (found["sink"] is not None)
    rows = sink + found["gists"] + 16 * fused  # the start token, 4 categories of 3 words and 3 commas
    assert ours["state_rows"] == rows and ours["encode_flops"] > summary["methods"]["full_context"]["encode_flops"]
    assert set(summary["methods"]) == {"no_context", "full_context", "prefix", "swapped_prefix", "shuffled_instruction"}
    task = write(tmp_path / "task.jsonl", lines([{"input": "w1", "output": "s1"}]))
    ((path, _),) = commands_compress.compress(run, [task], tmp_path / "p.safetensors", instruction="call a <1> , call b <2>")
    said = commands_inspect.inspect(path)
    size, lora = (0, 2) if changes == LORA_ALONE else (4, 0)
    assert said["adapters"] == ({"q_proj": 2, "v_proj": 2} if lora else {"adapter": 4})
    assert said["adapter_bytes"] == 2 * 2 * 16 * (size + 2 * lora) * 4
    assert said["rows"] == sink + found["gists"] + Prefix.load(path).manifest.context_tokens * fused
    assert len(commands_generate.generate(path, ["w2", "w3"], max_new_tokens=2)) == 2
    with pytest.raises(UserError, match="prefix tuning starts from keys and values only"):
        tune(
            RECIPES.parent / "toy" / "tune.yaml",
            [f"start.hypernetwork={run}", "episodes=1", "training.use_cpu=true", f"output={tmp_path}/tuned"],
        )


@pytest.mark.slow
def test_pretraining_and_both_settings_of_natural_instructions(tmp_path, saved_base):
    write(tmp_path / "text" / "book.txt", " ".join(f"w{i % 700}" for i in range(4000)))
    for split, name in (("train", "t1"), ("test", "t2")):
        write(tmp_path / "sni" / "splits" / "default" / f"{split}_tasks.txt", name)
        shown = [{"input": f"{name} s{i}", "output": str(i), "explanation": ""} for i in range(3)]
        asked = [{"id": str(i), "input": f"{name} q{i}", "output": [str(i)]} for i in range(6)]
        task = {"Definition": [f"Do {name}."], "Positive Examples": shown, "Instances": asked, "Categories": ["X"]}
        write(tmp_path / "sni" / "tasks" / f"{name}.json", task)
    common = [
        *FEW,
        *SMALL,
        "limits.context_tokens=300",
        "limits.query_tokens=100",
        "gist.tokens=3",
        f"model.name_or_path={saved_base}",
    ]
    small = ["data.text.context_tokens=30", "data.text.continuation_tokens=30"]
    commands_train.train(
        RECIPES / "pretrain.yaml", [*common, *small, f"data.root={tmp_path}/text", f"output={tmp_path}/pretrained"]
    )
    for setting, shots in (("sni-definition", 0), ("sni-definition-positives", 2)):
        run, data = tmp_path / setting, [f"data.root={tmp_path}/sni", "limits.context_tokens=300", "limits.query_tokens=100"]
        start = [f"start_from={tmp_path}/pretrained", f"output={run}"]
        commands_train.train(RECIPES / f"{setting}.yaml", [*common, *data, *start])
        out = [f"hypernetwork={run}", f"output={run}-evaluated", f"data.shots={shots}", "format.answer_tokens=4"]
        evaluate(RECIPES / "sni-evaluate.yaml", [*data, *out, "methods=[no_context,full_context,prefix]"])
        found = [json.loads(line) for line in (tmp_path / f"{setting}-evaluated/examples/rank0.jsonl").read_text().splitlines()]
        assert len(found) == 3 * 6 and {line["task"] for line in found} == {"t2"}
    with pytest.raises(UserError, match="weights of another base or other settings"):
        larger = ["hint.adapter_size=5", f"output={tmp_path}/other", f"start_from={tmp_path}/pretrained"]
        commands_train.train(RECIPES / "sni-definition.yaml", [*common, *data, *larger])
