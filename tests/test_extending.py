"""A new kind, source, objective, method or backend is one file and one line in a table: one of each, added from outside."""

import json

import pytest
from data_files import write

import eval.methods
from attention_masks import BACKENDS
from attention_masks.attention import Backend, why_not
from eval.methods import METHODS
from eval.run import evaluate
from hyperllama.commands.compress import compress
from hyperllama.commands.generate import generate
from hyperllama.commands.train import train
from hyperllama.data.registry import SOURCES, SourceKind
from hyperllama.errors import UserError
from hyperllama.hypernetworks.registry import KINDS
from hyperllama.objectives.mix import OBJECTIVES, Objective
from hyperllama.prefixes.prefix import Prefix
from hyperllama.recipe.loading import load_recipe

KIND = '''
"""A kind: as many of a context's first rows as it has gists, scaled by what is trained."""
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from hyperllama.files import write_atomically
from hyperllama.hypernetworks.base import Hypernetwork
from hyperllama.hypernetworks.settings import KindSettings
from hyperllama.prefixes.capture import gist_rows
from attention_masks import GistLayout, Segment


@dataclass(frozen=True)
class Settings(KindSettings):
    kind = "first"
    home = "first_kind:First"
    summary = "a context's first rows, scaled"

    scale: float = 1.0

    def values(self):
        return [] if self.scale else ["first.scale: not 0"]

    def arguments(self, recipe):
        return {"scale": self.scale}


class First(Hypernetwork):
    kind = "first"
    own_settings = ("scale",)

    def __init__(self, base, *, scale=1.0, **settings):
        super().__init__(base, **settings)
        self.scale = nn.Parameter(torch.full((base.config.num_hidden_layers,), scale))

    def settings(self):
        return {**super().settings(), "scale": 1.0}

    def gist_states(self, ids, layout, *, given=None, block_rows=None):
        pieces = ids.split([s.tokens for s in layout.segments], 1)
        kept = torch.cat([piece[:, : s.gists] for piece, s in zip(pieces, layout.segments)], 1)
        whole = GistLayout([Segment(s.gists, gists=s.gists) for s in layout.segments]).to(ids.device)
        with torch.no_grad():
            states = gist_rows(self.base, whole, backend=self.backend, input_ids=kept)
        shifts = layout.positions[layout.gist_rows] - whole.positions
        from attention_masks import rotate
        from hyperllama.base.decoder import inverse_frequencies
        inv_freq = inverse_frequencies(self.base)
        return [(rotate(k, shifts, inv_freq), v * scale) for (k, v), scale in zip(states, self.scale)]

    def save_weights(self, folder: Path):
        write_atomically(folder / "first.safetensors", safetensors.torch.save({"scale": self.scale.detach()}))
        return ["first.safetensors"]

    def load_weights(self, folder):
        with torch.no_grad():
            self.scale.copy_(safetensors.torch.load_file(Path(folder) / "first.safetensors")["scale"])
'''
SOURCE = '''
"""A source: what comes after a number."""
from dataclasses import dataclass

from hyperllama.data.episode import Example, Task, TaskSource


@dataclass(frozen=True)
class Settings:
    last: int = 30

    def problems(self):
        return [] if self.last > 9 else [f"last: at least 10, not {self.last}"]


def from_recipe(part):
    lines = tuple(Example(str(i), str(i + 1)) for i in range(part.counting.last))
    tasks = [Task(name, "", (), lines[k::2]) for k, name in enumerate(("even", "odd"))]
    return TaskSource(tasks)
'''
OBJECTIVE = '''
"""An objective: entropy of the answers, to be kept low."""


def entropy(logits, targets, teacher_logits=None):
    likely = logits.float().log_softmax(-1)
    return -(likely.exp() * likely).sum()
'''
METHOD = '''
"""A method: nothing but the first demonstration, in full attention."""
import dataclasses

from eval.methods import method


@method("the first demonstration alone", "context", "model", "demonstrations")
def first_demonstration(bench, indices):
    """The first demonstration in full attention."""
    shown = [dataclasses.replace(bench.episodes[i], demonstrations=bench.episodes[i].demonstrations[:1]) for i in indices]
    return bench.whole([bench.context(episode) for episode in shown])
'''
BACKEND = '''
"""A backend: the dense one, which counts its calls."""
from attention_masks.dense import dense_attention

calls = []


def counting(*args, **settings):
    calls.append(1)
    return dense_attention(*args, **settings)
'''
RECIPE = """
model: {{architecture: {{model_type: llama, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 2,
  num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 2048}}, vocab_size: 300}}
output: {output}/run
gist: {{kind: first, tokens: 3, backend: counting}}
first: {{scale: 2.0}}
objectives: {{answer: 1.0, entropy: 0.1}}
data: {{source: counting, root: ., shots: 3, queries: 2, counting: {{last: 20}}}}
training: {{max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1, use_cpu: true, disable_tqdm: true, report_to: none}}
"""


@pytest.fixture
def added(tmp_path, monkeypatch):
    """One file and one line each."""
    files = {"first_kind": KIND, "counting_source": SOURCE, "entropy": OBJECTIVE, "first_method": METHOD, "counted": BACKEND}
    for name, text in files.items():
        write(tmp_path / "plugins" / f"{name}.py", text)
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    import counted
    import counting_source
    import first_kind

    known = dict(METHODS)
    import first_method

    monkeypatch.setitem(KINDS, "first", first_kind.Settings)
    monkeypatch.setitem(SOURCES, "counting", SourceKind("counting_source:from_recipe", counting_source.Settings))
    monkeypatch.setitem(OBJECTIVES, "entropy", Objective("entropy:entropy"))
    monkeypatch.setitem(BACKENDS, "counting", Backend(counted.counting))
    yield counted.calls, first_method.first_demonstration
    METHODS.clear()
    METHODS.update(known)
    why_not.cache_clear()


def test_one_of_each_goes_all_the_way(added, tmp_path):
    calls, _ = added
    recipe = write(tmp_path / "recipe.yaml", RECIPE.format(output=tmp_path))
    train(recipe)
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert calls and any("loss" in line for line in losses)
    saved = json.loads((tmp_path / "run" / "hypernetwork.json").read_text())
    assert saved["kind"] == "first" and "a context's first rows, scaled" in (tmp_path / "run" / "README.md").read_text()
    shown = write(tmp_path / "task.jsonl", "".join(f'{{"input": "{i}", "output": "{i + 1}"}}\n' for i in range(4)))
    ((path, prefix),) = compress(tmp_path / "run", [shown], tmp_path / "p.safetensors")
    assert Prefix.load(path).rows == prefix.rows == 3 + (saved["sink"] is not None)
    assert len(generate(path, ["5"], max_new_tokens=2)) == 1
    changes = [f"hypernetwork={tmp_path}/run", f"output={tmp_path}/evaluation", "data.root=.", "data.source=counting"]
    changes += ["methods=[no_context,first_demonstration,prefix,full_context]", "leaks=warn", "data.shots=2", "data.queries=2"]
    summary = evaluate(write(tmp_path / "evaluate.yaml", "method: evaluate\n"), changes)
    assert summary["methods"]["prefix"]["encode_flops"] > 0
    assert list(summary["methods"]) == ["no_context", "full_context", "prefix", "first_demonstration"]


@pytest.mark.parametrize(
    "change, said",
    [
        ("first.scale=0", "first.scale: not 0"),
        ("first.skale=1", "first.skale: unknown key; did you mean first.scale?"),
        ("data.counting.last=5", "data.counting: last: at least 10, not 5"),
        ("objectives.entropie=1", "objectives.entropie: unknown key; did you mean objectives.entropy?"),
        ("objectives.entropy=-1", "objectives: weights are not negative"),
        ("gist.backend=countin", "did you mean counting?"),
    ],
)
def test_its_settings_are_checked_like_all_others(added, tmp_path, change, said):
    recipe = write(tmp_path / "recipe.yaml", RECIPE.format(output=tmp_path))
    load_recipe(recipe)
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        load_recipe(recipe, [change])


def test_tables_are_as_before():
    """Nothing that a test adds stays."""
    assert "first" not in KINDS and "first_demonstration" not in METHODS and "counting" not in {*SOURCES, *BACKENDS}
    assert set(eval.methods.FILES) == {"full_attention", "budget", "prefixes", "copies"}
