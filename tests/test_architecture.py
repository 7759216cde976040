"""Imports point down only, packages import what they may, and the repository keeps its form."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# From the top down: a module imports only from lines below its own. `data` and `attention_masks` are packages.
LAYERS = [
    {"hyperllama.__main__"},
    {"hyperllama.cli"},
    {"eval.quickstart", "eval.check", "eval.starts", "eval.tables"},
    {"eval.run", "eval.plan"},
    {"eval.sizing"},
    {"eval.memory"},
    {"eval.report"},
    {"eval.summary", "eval.answering"},
    {"eval.methods", "eval.mistakes"},
    {"eval.metrics", "eval.intervals", "eval.flops"},
    {"hyperllama.tune"},
    {"hyperllama.workflows"},
    {"hyperllama.sources", "hyperllama.tuning", "hyperllama.quality", "hyperllama.hub", "hyperllama.contexts"},
    {"hyperllama.kinds"},
    {"hyperllama.two_pass", "hyperllama.pooling", "hyperllama.hint.hypernetwork"},
    {
        "hyperllama.recipe_files",
        "hyperllama.training",
        "hyperllama.reader",
        "hyperllama.hypernetwork",
        "hyperllama.full_attention",
        "hyperllama.prefix_tuning",
    },
    {"hyperllama.compressor"},
    {
        "hyperllama.packed",
        "hyperllama.encoding",
        "hyperllama.scoring",
        "hyperllama.export",
        "hyperllama.store",
        "hyperllama.lora",
        "hyperllama.recipe",
        "hyperllama.recipe_checks",
        "hyperllama.hint.generator",
        "hyperllama.hint.fusion",
        "hyperllama.checkpoints",
    },
    {"hyperllama.prefix", "hyperllama.environment", "hyperllama.fetching"},
    {"hyperllama.last_layer", "hyperllama.chunks", "hyperllama.adapters", "hyperllama.attended"},
    {"hyperllama.data.stream", "hyperllama.data.mixture", "hyperllama.data.dealing"},
    {"hyperllama.backbone", "hyperllama.data.packing", "hyperllama.objectives"},
    {"hyperllama.mix", "hyperllama.data.reading", "hyperllama.hint.settings"},
    {"hyperllama.data.text", "hyperllama.data.sni", "hyperllama.data.synthetic", "hyperllama.data.symbols"},
    {"hyperllama.data.templates", "hyperllama.data.windows", "hyperllama.data.p3", "hyperllama.data.vocabulary"},
    {"hyperllama.data.files", "hyperllama.data.labelled", "hyperllama.data.leaks", "hyperllama.data.prompts"},
    {"hyperllama.data.episode", "hyperllama.data.hub", "hyperllama.data.words", "hyperllama.data.copies"},
    {"hyperllama.files", "hyperllama.distributed"},
    {"hyperllama.errors", "hyperllama.noise", "hyperllama"},
    {"attention_masks.registration", "attention_masks.picture"},
    {"attention_masks"},
    {"attention_masks.attention", "attention_masks.draw"},
    {"attention_masks.dense", "attention_masks.sdpa", "attention_masks.varlen", "attention_masks.flex"},
    {"attention_masks.reading"},
    {"attention_masks.layout", "attention_masks.rotary"},
]
LEVEL = {module: i for i, layer in enumerate(LAYERS) for module in layer}
PACKAGES = ("attention_masks", "hyperllama", "eval")


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if name not in ("eval", "hyperllama.data", "hyperllama.hint"):  # docstrings only
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree, top_only=False):
    """Imported module names; with `top_only`, those that importing the module itself runs."""
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(LEVEL)
            yield from submodules or {node.module}


def test_every_module_has_its_place():
    assert {name for name, _ in modules()} == set(LEVEL)


def test_imports_point_down_only():
    wrong = []
    for name, tree in modules():
        lazily_exports = name in ("attention_masks", "hyperllama")  # their functions import what they are asked for
        for imported in imports(tree, top_only=lazily_exports):
            if imported in LEVEL and imported != name and LEVEL[imported] <= LEVEL[name]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_attention_masks_imports_torch_only():
    allowed = {"attention_masks.registration": {"transformers"}}
    for name, tree in modules():
        if name.startswith("attention_masks"):
            outside = {i.split(".")[0] for i in imports(tree, top_only=True)} - {"attention_masks", "torch"}
            outside -= sys.stdlib_module_names | allowed.get(name, set())
            assert not outside, (name, outside)


def test_no_module_has_two_rooms_worth_of_lines():
    long = {n: len(ast.unparse(t).splitlines()) for n, t in modules()}
    assert max(long.values()) < 450, long


def test_public_names_are_documented():
    bare = [
        f"{name}.{node.name}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node)
        and node in tree.body
    ]  # fmt: skip
    assert not bare
    assert all(ast.get_docstring(tree) for _, tree in modules())
