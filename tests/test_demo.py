"""`hyperllama demo`: its work on a tiny base, and its page in a real browser.

The page needs gradio, playwright and Debian's chromium; `make test-demo` sets up all but the last.
"""

import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from conftest import trained_hypernetwork
from test_cli import ROOT, one_line, run

from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.commands.compress import compress
from hyperllama.commands.generate import Session
from hyperllama.data.episode import Example
from hyperllama.data.text import Limits, TextFormat
from hyperllama.demo import tasks
from hyperllama.demo.cards import answer_cards, made_table
from hyperllama.demo.picture import MOST_STRIPS, STRIP, draw_looks
from hyperllama.demo.tasks import as_lines, pasted, unseen, word_tasks
from hyperllama.demo.work import NOTHING, PREFIX, REFINED, WHOLE, Demo, Wanted
from hyperllama.errors import UserError
from hyperllama.prefixes.prefix import Prefix

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
ARGUMENTS += " --disable-component-update --disable-sync"
LINES = "one\tONE\ntwo\tTWO\nthree\tTHREE\nfour\tFOUR"


@pytest.fixture(scope="module")
def demo(saved_base, tmp_path_factory):
    return Demo(saved_base, tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def made(demo):
    return demo.compress(Wanted(LINES, "Shout.", "shout", shots=3, gists=4, refine=4))


def test_lines_of_either_form_are_examples():
    text = 'one\tONE\r\n\n{"input": "a\\tb", "output": ["c", "d"]}\n  two \t T W O \t3\n'
    assert pasted(text) == (
        Example("one", "ONE", ("ONE",)),
        Example("a\tb", "c", ("c", "d")),
        Example("two", "T W O \t3", ("T W O \t3",)),
    )
    assert pasted(as_lines(pasted(LINES))) == pasted(LINES) and pasted(" \n") == ()
    assert unseen(pasted(LINES + "\none\tEINS"), 2) == {"three": "THREE", "four": "FOUR"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("one\tONE\ntwo TWO", "examples, line 2: 'two TWO' is not input, tab, output"),
        ("\tONE", "examples, line 1"),
        ("one\t ", "examples, line 1"),
        ('one\tONE\n\n{"input": ', "examples, line 3: not JSON"),
        ('{"input": 3, "output": "x"}', 'examples, line 1: needs "input" with a text'),
        ('{"input": "\\ud83d", "output": "x"}', "half of a character"),
        ("x" * 300_000, "300,000 characters, but the page takes 200,000"),
    ],
)
def test_bad_examples_are_named_by_their_line(text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        pasted(text)


def test_there_are_tasks_with_and_without_the_recipes(monkeypatch, tmp_path):
    assert {"plural", "capital"} <= set(word_tasks()) and len(word_tasks()) == 17
    monkeypatch.setattr(tasks, "WORDS", tmp_path / "nowhere")
    small = word_tasks.__wrapped__()
    assert len(small) == 3 and all(len({e.input for e in examples}) == 20 for examples in small.values())
    assert small["plural"][2] == Example("wolf", "wolves")


def test_what_is_made_is_what_compress_makes(demo, made, saved_base, tmp_path):
    steps = []
    again = demo.compress(Wanted(LINES, "Shout.", "shout", shots=3, gists=4, refine=4), lambda *step: steps.append(step))
    assert steps == [(step, 4) for step in range(1, len(steps) + 1)] and steps
    examples = tmp_path / "shout.jsonl"
    pairs = [line.split("\t") for line in LINES.split("\n")]
    examples.write_text("".join(f'{{"input": "{a}", "output": "{b}"}}\n' for a, b in pairs))
    for column, refine in ((PREFIX, 0), (REFINED, 4)):
        settings = {"instruction": "Shout.", "shots": 3, "gists": 4, "refine": refine}
        ((_, prefix),) = compress(saved_base, [examples], tmp_path / "p.safetensors", **settings)
        for one in (made, again):
            own = one.states[column]
            assert all(torch.equal(a, b) for a, b in zip((*own.keys, *own.values), (*prefix.keys, *prefix.values)))
            manifests = [vars(p.manifest) | {"created": None} for p in (own, prefix)]
            assert manifests[0] == manifests[1]
    assert Prefix.load(made.file, demo.reader.identity) == made.states[REFINED] and made.file.name == "shout.safetensors"
    assert made.file.parent != again.file.parent and set(made.seconds) == {PREFIX, REFINED, WHOLE}
    assert made.states[PREFIX].rows == 4 and made.states[WHOLE].rows == len(made.context) and made.unseen == {"four": "FOUR"}
    assert made.looks.shape == (4, len(made.context)) and "".join(demo.words(made)).startswith("<s>Shout.\n\nInput: one\n")
    again.remove()
    assert not again.file.parent.exists() and made.file.exists()


def test_answers_are_those_of_a_session_and_grow(demo, made, tmp_path):
    grown = list(demo.ask(made, " five "))
    assert [answer.column for answer in grown[-1]] == [NOTHING, PREFIX, REFINED, WHOLE]
    for place, answer in enumerate(grown[-1]):
        state = made.states[answer.column]
        assert 0 < answer.first < answer.total and not answer.problem
        assert (answer.rows, answer.nbytes) == ((0, 0) if state is None else (state.rows, state.nbytes))
        texts = list(dict.fromkeys(answers[place].text for answers in grown))
        assert texts[0] == "" and len(texts) > 2, "it comes in pieces"
        first = next(i for i, answers in enumerate(grown) if answers[place].first is not None)
        assert all(answers[place].total is None for answers in grown[first:-1] if answers[place].text != answer.text)
        assert all(a.first is None for a in grown[first][place + 1 :]), "columns are answered one after the other"
    for column, path in ((REFINED, made.file), (PREFIX, tmp_path / "p.safetensors"), (WHOLE, tmp_path / "w.safetensors")):
        state = Prefix(made.states[column].keys, made.states[column].values, made.prefix.manifest)
        state.save(path)
        assert {a.column: a.text for a in grown[-1]}[column] == Session(path).answer(["five"])[0]


def test_two_users_have_their_own_answers(demo, made):
    other = demo.compress(Wanted("a\tx\nb\ty\nc\tz", shots=3, gists=2))
    alone = [list(demo.ask(one, "five"))[-1] for one in (made, other)]
    found = [SimpleQueue(), SimpleQueue()]
    threads = [
        threading.Thread(target=lambda q, m: q.put(list(demo.ask(m, "five"))[-1]), args=pair)
        for pair in zip(found, (made, other))
    ]
    for thread in threads:
        thread.start()
    both = [queue.get(timeout=60) for queue in found]
    assert [[a.text for a in answers] for answers in both] == [[a.text for a in answers] for answers in alone]
    assert [a.rows for a in both[1]] == [1, 2, len(other.context)] and demo.lock.acquire(timeout=10)
    demo.lock.release()


def test_who_stops_listening_stops_the_answers(demo, made, monkeypatch):
    calls, real = [], demo.reader.generate
    monkeypatch.setattr(demo.reader, "generate", lambda *args, **more: calls.append(more) or real(*args, **more))
    listening = demo.ask(made, "five")
    next(listening), next(listening)
    listening.close()
    assert demo.lock.acquire(timeout=30), "the model is free again"
    demo.lock.release()
    assert len(calls) < 5, "not all columns were answered"


def test_an_error_in_an_answer_reaches_who_asked_and_frees_the_model(demo, made, monkeypatch):
    monkeypatch.setattr(demo.reader, "generate", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(demo.ask(made, "five"))
    assert demo.lock.acquire(timeout=10)
    demo.lock.release()


@pytest.mark.parametrize(
    "text, said",
    [
        ("  ", "input: is empty"),
        ("x" * 9000, "9,000 characters"),
        ("x" * 600, "take .* positions, but the model has 512; shorten the input$"),
    ],
)
def test_inputs_that_cannot_be_answered(demo, made, text, said):
    with pytest.raises(UserError, match=said):
        next(demo.ask(made, text))


def test_a_column_without_room_says_so_and_the_others_answer(demo, made):
    room = 512 - 64 - made.states[WHOLE].rows - len(demo.encoder.prompt(""))
    *others, whole = list(demo.ask(made, "x" * (room + 20)))[-1]
    assert all(answer.total and not answer.problem for answer in others)
    assert whole.total is None and whole.problem.endswith("but the model has 512; shorten the input")
    assert 'data-state="problem"' in answer_cards([*others, whole], made)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"text": ""}, "examples: nothing to compress"),
        ({"text": "x" * 600 + "\ty"}, "examples: none of its 1 demonstrations fits"),
        ({"gists": 33}, "rows: 1 to 32, not 33"),
        ({"refine": 41}, "refine: 0 to 40 steps"),
        ({"instruction": "x" * 600}, "examples: an instruction takes"),
    ],
)
def test_what_cannot_be_compressed(demo, changes, said):
    with pytest.raises(UserError, match=said):
        demo.compress(Wanted(**{"text": LINES, **changes}))


def test_an_instruction_alone_and_a_kind_whose_looks_are_not_known(saved_base, tmp_path):
    run_folder = tmp_path / "run"
    hypernetwork = trained_hypernetwork(load_base(str(saved_base)), tokenizer=load_tokenizer(str(saved_base)))
    notes = {"format": vars(TextFormat()), "limits": vars(Limits(context_tokens=300)), "data": "none"}
    hypernetwork.save_pretrained(run_folder, notes)
    demo = Demo(run_folder, tmp_path / "files")
    assert demo.gists == range(3, 4) and demo.refines
    made = demo.compress(Wanted("", "Shout.", gists=3, refine=2))
    assert made.looks == "what its rows look at cannot be shown: kind lora gathers a context through all layers; choose pooling"
    assert made.prefix.manifest.hypernetwork == str(run_folder) and made.prefix.manifest.examples == 0
    assert "Not refined: of one example nothing can be held back." in made_table(made)


def test_what_users_write_is_text_on_the_page(demo, made):
    hostile = "<img src=x onerror=alert(1)>"
    (*_, answers) = demo.ask(made, "five")
    cards = answer_cards([replace(answers[0], text=hostile)], made, expected=hostile)
    assert "<img" not in cards and cards.count("&lt;img") == 2
    assert "<img" not in made_table(replace(made, task=hostile))


def test_a_picture_of_any_tokens(tmp_path):
    words = ["$\\frac{", " a", "\n", "", "é", "a_very_long_word_indeed"] * 3
    said = draw_looks(words, torch.rand(2, 18).softmax(1), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and "each of 2 rows" in said and "not drawn" not in said
    tokens = STRIP * MOST_STRIPS + 5
    said = draw_looks(["a"] * tokens, torch.ones(1, tokens) / tokens, tmp_path / "b.png")
    assert said.endswith("The first 5 of 593 tokens are not drawn.")


def test_the_verb_says_what_is_missing_before_anything_loads(monkeypatch, capsys, saved_base):
    monkeypatch.setattr("hyperllama.cli.demo.find_spec", lambda name: None)
    one_line(
        run(monkeypatch, capsys, "demo", saved_base), "needs gradio, which is not installed; pip install 'hyperllama[demo]'"
    )
    monkeypatch.setattr("hyperllama.cli.demo.find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one_line(run(monkeypatch, capsys, "demo", saved_base, "--port", port), f"cannot listen at 127.0.0.1:{port}")


# The page in a browser.


def served(folder, *arguments):
    """A running `hyperllama demo`, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # One thread: with more, passes wait for whatever else runs on the machine.
    settings = {"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "hyperllama", "demo", *map(str, arguments), "--port", str(port)]
    errors = folder / "errors.txt"
    with errors.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT, env=settings)
    line = process.stdout.readline()
    assert line.startswith(f"http://127.0.0.1:{port}/"), line + errors.read_text()
    return process, line.split()[0], errors


@pytest.fixture(scope="module")
def browser():
    missing = [name for name in ("gradio", "playwright") if find_spec(name) is None]
    missing += [] if CHROMIUM.exists() else [str(CHROMIUM)]
    if missing:
        pytest.skip(f"the page needs {', '.join(missing)}: make test-demo, and apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser, saved_base, tmp_path_factory):
    """The page on a tiny base, and a check that nothing unforeseen was printed and no file stayed."""
    folder = tmp_path_factory.mktemp("page")
    process, address, errors = served(folder, saved_base)
    yield address
    process.send_signal(2)
    assert process.wait(30) in (0, 130) and "Traceback" not in errors.read_text()
    assert not list(folder.glob("hyperllama-demo-*")), "what users have made is gone"


def opened(browser, address):
    """A new tab with a session of its own, which notes what it asks for and from where."""
    page = browser.new_context(viewport={"width": 1220, "height": 900}, accept_downloads=True).new_page()
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#compress")
    return page


def choose(page, task):
    page.click("#task input")
    page.get_by_role("option", name=task, exact=True).click()
    page.wait_for_timeout(300)


def set_number(page, name, value):
    number = page.locator(f"#{name} input[type=number]")
    number.fill(str(value))
    number.press("Tab")


def pressed_compress(page):
    page.evaluate("document.querySelector('#made').dataset.old = document.querySelector('#made').innerText")
    page.click("#compress")


def compressed(page, timeout=120):
    page.wait_for_function(
        "document.querySelector('#made table') && document.querySelector('#download').innerText.includes('.safetensors')",
        timeout=timeout * 1000,
    )


def answers(page, columns, timeout=120):
    """Texts by column, when all are there."""
    done = f"document.querySelectorAll('.answer[data-state=done]').length == {columns}"
    page.wait_for_function(done, timeout=timeout * 1000)
    cards = page.locator(".answer[data-state=done]")
    return {card.get_attribute("data-column"): card.locator(".said").inner_text() for card in cards.all()}


def status(page, text):
    page.wait_for_function(f"document.querySelector('#status').innerText.includes({text!r})", timeout=60_000)


@contextmanager
def elsewhere():
    """The address of another server, which lets every page read it."""

    class Open(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Open) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.slow
class TestPage:
    def test_choose_compress_refine_ask_download(self, browser, address, tmp_path):
        page = opened(browser, address)
        choose(page, "capital")
        assert page.input_value("#examples textarea").startswith("Ecuador\tQuito")
        for name, value in (("shots", 6), ("rows", 5), ("refine", 3)):
            set_number(page, name, value)
        pressed_compress(page)
        compressed(page)
        assert "5 rows" in page.inner_text("#made") and "capital: 6 examples" in page.inner_text("#made")
        assert page.get_attribute("#picture img", "src").startswith(address) and "mean over layers" in page.inner_text(
            "#caption"
        )
        page.fill("#ask textarea, #ask input", "France")
        page.click("#answer")
        found = answers(page, 4)
        assert list(found) == [NOTHING, PREFIX, REFINED, WHOLE]
        assert "5 rows" in page.inner_text("[data-column=prefix]") and "s, all" in page.inner_text("[data-column=prefix]")
        with page.expect_download() as begun:
            page.click("#download")
        begun.value.save_as(tmp_path / begun.value.suggested_filename)
        session = Session(tmp_path / "capital.safetensors")
        assert session.prefix.rows == 5 and session.prefix.manifest.refined["steps"] == 3
        assert [session.answer(["France"])[0].split()] == [found[REFINED].split()]
        assert not page.wrong
        page.context.close()

    def test_two_tabs_at_once_do_not_mix(self, browser, address):
        pages = [opened(browser, address) for _ in range(2)]
        for page, task, rows in zip(pages, ("plural", "ordinal"), (3, 7)):
            choose(page, task)
            set_number(page, "shots", 4)
            set_number(page, "rows", rows)
            set_number(page, "refine", 2)
        for page in pages:
            pressed_compress(page)
        for page, task, rows in zip(pages, ("plural", "ordinal"), (3, 7)):
            compressed(page)
            assert f"{task}: 4 examples" in page.inner_text("#made") and f"{rows} rows" in page.inner_text("#made")
            assert f"{task}.safetensors" in page.inner_text("#download")
        for page in pages:
            page.click("#answer")
        for page, rows in zip(pages, (3, 7)):
            answers(page, 4)
            assert f"{rows} rows" in page.inner_text("[data-column=prefix]")
            page.context.close()

    def test_bad_input_is_a_sentence_and_the_page_lives_on(self, browser, address):
        page = opened(browser, address)
        page.click("#answer")
        status(page, "nothing is compressed yet; press Compress first, then ask")
        page.fill("#examples textarea", "one\tONE\nno tab <b>here</b>")
        pressed_compress(page)
        status(page, "examples, line 2: 'no tab <b>here</b>' is not input, tab, output")
        assert not page.locator("#made table").count()
        page.fill("#examples textarea", "one\tONE\ntwo\tTWO")
        set_number(page, "rows", 4)
        pressed_compress(page)
        compressed(page)
        assert page.inner_text("#status").strip() == "" and "examples: 2 examples" in page.inner_text("#made")
        page.fill("#ask textarea, #ask input", "x" * 9000)
        page.click("#answer")
        status(page, "9,000 characters, but the page takes 8,000; shorten it")
        page.fill("#ask textarea, #ask input", "three")
        page.click("#answer")
        assert set(answers(page, 3)) == {NOTHING, PREFIX, WHOLE} and page.inner_text("#status").strip() == ""
        assert "not refined" in page.inner_text('[data-column="refined prefix"]')
        page.context.close()

    def test_nothing_comes_from_elsewhere(self, browser, address):
        page = opened(browser, address)
        page.wait_for_timeout(2000)
        hosts = {url.split("/")[2] for url in page.asked if not url.startswith(("data:", "blob:"))}
        assert hosts == {address.split("/")[2]}
        with elsewhere() as other:
            fetch = f"fetch('{other}').then(() => 'came', error => String(error))"
            assert "came" not in page.evaluate(fetch), "the page's policy refuses it"
            page.goto(other)
            assert page.evaluate(fetch) == "came", "another page may"
        page.context.close()


@pytest.mark.slow
@pytest.mark.real
def test_the_page_with_the_hypernetwork_that_ships(browser, smollm2, tmp_path):
    process, address, _ = served(tmp_path, "smollm2", "--base", smollm2)
    try:
        page = opened(browser, address)
        choose(page, "plural")
        set_number(page, "refine", 5)
        pressed_compress(page)
        compressed(page, timeout=300)
        assert "16 rows" in page.inner_text("#made") and "369 kB" in page.inner_text("#made")
        page.fill("#ask textarea, #ask input", "wolf")
        page.click("#answer")
        found = answers(page, 4, timeout=300)
        assert found.pop(NOTHING) != "wolves" and set(found.values()) == {"wolves"}, found
    finally:
        process.terminate()
    assert process.wait(30) == 0 and not list(tmp_path.glob("hyperllama-demo-*")), "what users have made is gone"
