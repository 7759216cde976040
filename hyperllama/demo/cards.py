"""Pieces of the page as HTML: what was made, a card for each answer, and the page's style."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hyperllama.commands.compress import told_refined
from hyperllama.demo.work import COLUMNS, NOTHING, PREFIX, REFINED, WHOLE, Answer, Made

COLOURS = {NOTHING: "#9aa0a6", PREFIX: "#2a7f62", REFINED: "#f58518", WHOLE: "#4c78a8"}
CSS = """
.gradio-container { max-width: 1180px !important; margin: auto; }
.quiet { opacity: 0.75; font-size: 0.92rem; }
:is(#made, #status, #answers, #caption) .html-container { padding: 0 !important; }
#introduction code { font-size: 0.9em; }
#made { min-height: 9.5rem; }
#made table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.5rem 0;
  border: 0 !important; }
#made th, #made td { text-align: right; padding: 0.3rem 0.5rem; border: 0 !important; }
#made tr { border: 0 !important; border-bottom: 1px solid rgba(128, 128, 128, 0.25) !important; }
#made th { font-weight: 500; opacity: 0.75; }
#made th:first-child, #made td:first-child { text-align: left; padding-left: 0; }
#made .mark { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px; margin-right: 0.5em; }
#made .big { font-size: 1.25rem; font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 0.8rem; }
@media (max-width: 800px) { .answers { grid-template-columns: 1fr 1fr; } }
.answer { border: 1px solid rgba(128, 128, 128, 0.3); border-top: 4px solid var(--own); border-radius: 8px;
  padding: 0.7rem 0.9rem; background: var(--block-background-fill); display: flex; flex-direction: column;
  min-height: 9.5rem; }
.answer .name { font-weight: 600; }
.answer .said { font-size: 1.35rem; line-height: 1.35; flex: 1; margin: 0.35rem 0 0.5rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.answer .said.long { font-size: 0.95rem; }
.answer .facts { font-size: 0.88rem; opacity: 0.75; font-variant-numeric: tabular-nums; line-height: 1.5; }
.asked { margin: 0 0 0.5rem; }
#status .wrong { border-left: 4px solid #d9534f; padding: 0.4rem 0.8rem; overflow-wrap: anywhere; }
#picture, #picture img { border: 0 !important; background: white; }
"""


def amount(size: int) -> str:
    """Bytes for people.

    >>> amount(0), amount(368_640), amount(3_340_800)
    ('0 bytes', '369 kB', '3.3 MB')
    """
    if size < 1000:
        return f"{size} bytes"
    return f"{size / 1e3:.0f} kB" if size < 999_500 else f"{size / 1e6:,.1f} MB"


def sentence(text: str) -> str:
    """What is wrong, for the status line."""
    return f'<div class="wrong" role="alert">{escape(text)}</div>'


def made_table(made: Made | None) -> str:
    """What was compressed, and how large and how dear each column's keys and values are."""
    if made is None:
        return '<p class="quiet">Choose a task or paste examples, then press Compress.</p>'
    manifest, count = made.prefix.manifest, made.states[PREFIX].rows
    dropped = f" ({manifest.dropped_examples} more did not fit)" if manifest.dropped_examples else ""
    examples = "an instruction" if not manifest.examples else f"{manifest.examples} examples"
    lines = "".join(_line(made, column) for column in (WHOLE, PREFIX, REFINED) if column in made.states)
    refined = f'<p class="quiet">{escape(_sentence_case(told_refined(manifest)))}</p>' if manifest.refined else ""
    return (
        f'<div class="big">{len(made.context):,} tokens &rarr; {count:,} rows</div>'
        f'<div class="quiet">{escape(made.task)}: {examples}{dropped}</div>'
        "<table><tr><th></th><th>stands before a query</th><th>keys and values</th><th>made in</th></tr>"
        f"{lines}</table>{refined}"
    )


def _line(made: Made, column: str) -> str:
    state, unit = made.states[column], "tokens" if column == WHOLE else "rows"
    mark = f'<span class="mark" style="background:{COLOURS[column]}"></span>'
    cells = (f"{mark}{column}", f"{state.rows:,} {unit}", amount(state.nbytes), f"{made.seconds[column]:.2f} s")
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def answer_cards(answers: Sequence[Answer] | None, made: Made | None = None, expected: str = "") -> str:
    """A card for each column; `expected` is what the examples say, where they know."""
    found = {answer.column: answer for answer in answers or ()}
    known = f'<div class="asked quiet">The examples say: <b>{escape(expected)}</b></div>' if expected else ""
    return f'{known}<div class="answers">{"".join(_card(column, found.get(column), made) for column in COLUMNS)}</div>'


def _card(column: str, answer: Answer | None, made: Made | None) -> str:
    said, facts, kind = "", "", ""
    if column == REFINED and made and REFINED not in made.states:
        facts = "not refined: set steps of refining, and compress again"
    if answer is not None:
        unit = "row" if answer.rows == 1 else "tokens" if column == WHOLE else "rows"
        sizes = f"{answer.rows:,} {unit}, {amount(answer.nbytes)}" if answer.rows else "nothing before the query"
        waiting = "waits" if answer.first is None else f"first token {answer.first:.2f} s"
        facts = f"{sizes}<br>{waiting}" + ("" if answer.total is None else f", all {answer.total:.2f} s")
        said = escape(answer.text) or ("<i>(empty)</i>" if answer.total is not None else "")
        kind = " long" if len(answer.text) > 40 else ""
        if answer.problem:
            said, facts, kind = escape(answer.problem), sizes, " long"
    state = "" if answer is None else "problem" if answer.problem else "done" if answer.total is not None else "waits"
    return (
        f'<div class="answer" data-column="{column}" data-state="{state}" style="--own:{COLOURS[column]}">'
        f'<div class="name">{column}</div><div class="said{kind}">{said}</div><div class="facts">{facts}</div></div>'
    )


def caption_of(made: Made, text: str) -> str:
    """The heading of the picture, or the sentence that stands in its place."""
    before = " Refining has moved the rows since; the picture shows what they were made of." if REFINED in made.states else ""
    more = before if not isinstance(made.looks, str) else ""
    return f"<b>What each row looks at</b><br><span class='quiet'>{escape(_sentence_case(text))}{more}</span>"


def _sentence_case(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."
