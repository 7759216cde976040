"""Rooms import one way, modules import no module that imports them, and the repository keeps its form."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Rooms from the top down: a module imports from its own room and from rooms below. Rooms of one line do not know each other.
ROOMS = [
    ["hyperllama.__main__"],
    ["hyperllama.cli"],
    ["eval", "hyperllama.demo"],
    ["hyperllama.commands"],
    ["hyperllama.recipe", "hyperllama.tuning"],
    ["hyperllama.inference", "hyperllama.training", "hyperllama.serving"],
    ["hyperllama.hypernetworks"],
    ["hyperllama.objectives", "hyperllama.prefixes"],
    ["hyperllama.base", "hyperllama.data"],
    ["hyperllama.runs"],
    ["hyperllama.files", "hyperllama.noise"],
    ["hyperllama.errors", "hyperllama"],
    ["attention_masks"],
]
PACKAGES = ("attention_masks", "hyperllama", "eval")


def room(module):
    """The room of a module: the longest name above that is its own or above it."""
    names = [name for line in ROOMS for name in line if module == name or module.startswith(name + ".")]
    return max(names, key=len)


LEVEL = {name: i for i, line in enumerate(ROOMS) for name in line}


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield (
                ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"),
                ast.parse(path.read_text(encoding="utf-8")),
            )


NAMES = {name for name, _ in modules()}


def imports(tree, top_only=False):
    """Imported module names; with `top_only`, those that importing the module itself runs."""
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES
            yield from submodules or {node.module}


def test_every_module_is_in_a_room():
    outside = {name for name in NAMES if name.startswith("hyperllama.") and room(name) == "hyperllama"}
    assert not outside


def test_rooms_import_one_way():
    wrong = []
    for name, tree in modules():
        own = room(name)
        if name == "hyperllama":  # its function imports what it is asked for
            continue
        for imported in NAMES.intersection(imports(tree)):
            other = room(imported)
            if other != own and LEVEL[other] <= LEVEL[own]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_no_module_imports_one_that_imports_it():
    graph = {name: NAMES.intersection(imports(tree)) - {name} for name, tree in modules() if "__init__" not in name}
    lazily_exports = ("hyperllama", "attention_masks")
    graph |= {name: NAMES.intersection(imports(dict(modules())[name], top_only=True)) for name in lazily_exports}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name not in done:
            open_.append(name)
            for imported in sorted(graph.get(name, ())):
                visit(imported)
            done.add(open_.pop())

    for name in sorted(graph):
        visit(name)


def test_the_top_of_the_package_stays_small():
    assert len(list((ROOT / "hyperllama").glob("*.py"))) <= 6


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


def test_functions_and_files_fit_in_a_head():
    functions, files = [], []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            files += [f"{path.name}: {text.count(chr(10))} lines"] if text.count("\n") > 400 else []
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 >= 50:
                    functions.append(f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not functions and not files
