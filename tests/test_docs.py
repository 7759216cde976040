"""The documents name what is there: links, verbs with their options and keys, recipes, Python names. Two pages stay short."""

import ast
import importlib
import importlib.util
import re

import pytest
from test_recipe import ROOT
from typer.main import get_command

from hyperllama.cli import app
from hyperllama.recipe.loading import SCHEMAS, _nearest

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
}
VERBS = get_command(app).commands
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
KEY = re.compile(r"([a-z_]+(?:\.[a-z_]+)*)=.*")
DOTTED = re.compile(r"([a-z_]+(?:\.[a-z_]+)+)(?:[=:].*)?")
FILES = re.compile(r".*\.(jsonl?|md|png|py|safetensors|ya?ml)")
ELSEWHERE = ("vllm", "openai")  # in an environment of their own, where make test-serve runs this too
SECTIONS = {field for schema in SCHEMAS.values() for field in schema.__dataclass_fields__}


def code(text):
    """The lines of code on a page, but Python's, and the pieces of code within its sentences."""
    blocks = FENCE.findall(text)
    lines = [line.split("  #")[0] for language, block in blocks if language != "python" for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands(text):
    """Verbs that a page names, each with what follows it."""
    return re.findall(r"(?:^|\s)hyperllama ([a-z]+)(.*)", "\n".join(code(text)))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    here = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert not [link for link in here if link and not (ROOT / page).parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_verbs_options_and_keys_exist(page):
    unknown = []
    for verb, rest in commands(PAGES[page]):
        rest = re.split(r" --(?= )", rest)[0]  # what follows goes to another program
        options = {option for parameter in VERBS[verb].params for option in parameter.opts} if verb in VERBS else set()
        unknown += [verb] * (verb not in VERBS)
        unknown += [f"{verb} {option}" for option in re.findall(r"(?<!\S)--[a-z][\w-]*", rest) if option not in options]
        unknown += [found[1] for word in rest.split() if (found := KEY.fullmatch(word)) and not known(found[1])]
    for piece in code(PAGES[page]):
        dotted = [found[1] for word in piece.split() if (found := DOTTED.fullmatch(word))]
        unknown += [key for key in dotted if key.split(".")[0] in SECTIONS and not FILES.fullmatch(key) and not known(key)]
    assert not unknown


def known(key):
    return any(_nearest(key, schema) is None for schema in SCHEMAS.values())


@pytest.mark.parametrize("page", PAGES)
def test_recipes_exist(page):
    named = re.findall(r"\brecipes/[\w./-]*\w", "\n".join(code(PAGES[page])))
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


def absent(module):
    return importlib.util.find_spec(module.split(".")[0]) is None


@pytest.mark.parametrize("page", PAGES)
def test_python_can_import_what_it_names(page):
    for language, block in FENCE.findall(PAGES[page]):
        for node in ast.walk(ast.parse(block if language == "python" else "")):
            if isinstance(node, ast.ImportFrom) and not (node.module.split(".")[0] in ELSEWHERE and absent(node.module)):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_first_page_is_short_and_leads_to_all_others():
    text = PAGES["README.md"]
    assert len(text.split()) <= 900 and len(PAGES["docs/architecture.md"].split()) <= 900
    assert "make quickstart" in text and "make test" in text
    assert not [page for page in PAGES if page != "README.md" and f"({page})" not in text]
