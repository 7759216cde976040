"""The page of `hyperllama demo`, with Gradio: nothing on it comes from elsewhere, and nothing is reported to anyone."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Gradio reads this when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from starlette.middleware import Middleware

from hyperllama.commands.compress import ROWS
from hyperllama.demo.cards import CSS, amount, answer_cards, caption_of, made_table, sentence
from hyperllama.demo.picture import draw_looks
from hyperllama.demo.tasks import as_lines, unseen, word_tasks
from hyperllama.demo.work import MOST_REFINING, Demo, Made, Wanted
from hyperllama.errors import UserError, in_one_line

OWN = "my own examples"
PICTURE = "looks.png"
MOST_SHOTS = 64
HOUR = 3600  # seconds that files of a page nobody uses are kept
INTRODUCTION = """# Examples in, a small prefix out

A hypernetwork reads the examples of a task once and writes a *prefix*, a few rows of keys and values for every layer.
The same frozen model then reads the prefix instead of the examples. Compress a task, ask what was not shown, and compare."""
# The browser itself refuses what would come from elsewhere, whatever a version of Gradio asks for.
OWN_ONLY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob: ws: wss:; base-uri 'self'"
)


class OwnOnly:
    """An ASGI middleware that tells browsers to load nothing from elsewhere."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", OWN_ONLY.encode())]}
            await send(message)

        await self.app(scope, receive, with_policy)


class Page:
    """Lays out the page around a `Demo`; each of its events is a method."""

    def __init__(self, demo: Demo):
        self.demo, self.tasks = demo, word_tasks()
        self.blocks = gr.Blocks(title="HyperLlama", analytics_enabled=False, delete_cache=(HOUR, HOUR), fill_width=False)
        with self.blocks:
            self._lay_out()

    def _lay_out(self) -> None:
        first = "plural" if "plural" in self.tasks else next(iter(self.tasks))
        made = gr.State(None, time_to_live=HOUR, delete_callback=_forget)
        gr.Markdown(f"{INTRODUCTION}\n\n{self._said_of_models()}", elem_id="introduction")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=340):
                task = gr.Dropdown([*self.tasks, OWN], value=first, label="Task", elem_id="task")
                wanted = self._what(first)
            with gr.Column(scale=5, min_width=420):
                wanted += self._how()
                make = gr.Button("Compress", variant="primary", elem_id="compress")
                table = gr.HTML(made_table(None), elem_id="made")
                download = gr.DownloadButton("Download the prefix", interactive=False, elem_id="download")
        with gr.Row(elem_id="asking", equal_height=True):
            text = gr.Textbox(self._question(first, ROWS), label="Ask", elem_id="ask", scale=5, max_lines=4)
            ask = gr.Button("Ask", variant="primary", elem_id="answer", scale=1, min_width=120)
        status = gr.HTML("", elem_id="status")
        cards = gr.HTML(answer_cards(None), elem_id="answers")
        caption = gr.HTML("", elem_id="caption")
        looks = {"interactive": False, "show_label": False, "container": False, "buttons": []}
        picture = gr.Image(visible=False, elem_id="picture", **looks)
        task.input(self.choose, [task, wanted[2]], [wanted[0], text], queue=False, api_visibility="private")
        shown = [made, table, download, cards, caption, picture, status]
        make.click(self.compress, [made, task, *wanted], shown, show_progress_on=table, **_with_model())
        gr.on([ask.click, text.submit], self.ask, [made, text], [cards, status], show_progress="hidden", **_with_model())

    def _said_of_models(self) -> str:
        maker = self.demo.compressor
        base = Path(self.demo.reader.identity.name).name
        by = (
            f"the hypernetwork `{maker.made_by}`"
            if maker.made_by
            else "no hypernetwork: rows are tokens that are attended to most"
        )
        return f"Here: {by}; the base `{base}`, {self.demo.parameters / 1e6:,.0f} million weights."

    def _what(self, first: str) -> list[gr.Component]:
        lines = {"placeholder": "input <tab> output, a line each, or JSON lines", "lines": 9, "max_lines": 9}
        examples = gr.Textbox(as_lines(self.tasks[first]), label="Examples", elem_id="examples", **lines)
        instruction = gr.Textbox(label="Instruction (may be empty)", elem_id="instruction", max_lines=3)
        return [examples, instruction]

    def _how(self) -> list[gr.Component]:
        gists, several = self.demo.gists, len(self.demo.gists) > 1
        ends, small = (gists[0] if several else 0, max(1, gists[-1])), {"step": 1, "min_width": 120, "buttons": []}
        with gr.Row():
            shots = gr.Slider(0, MOST_SHOTS, ROWS, label="Shots", elem_id="shots", **small)
            rows = gr.Slider(*ends, min(ROWS, gists[-1]), label="Rows", elem_id="rows", visible=several, **small)
            steps = gr.Slider(0, MOST_REFINING, 0, label="Refining", elem_id="refine", visible=self.demo.refines, **small)
        return [shots, rows, steps]

    def choose(self, task: str, shots: int) -> tuple[Any, Any]:
        """The examples of a task that was chosen, and one to ask that is not shown; nothing changes for a user's own."""
        if task not in self.tasks:
            return "", ""
        return as_lines(self.tasks[task]), self._question(task, shots)

    def _question(self, task: str, shots: int) -> str:
        return next(iter(unseen(self.tasks[task], shots)), "")

    def compress(
        self,
        old: Made | None,
        task: str,
        text: str,
        instruction: str,
        shots: int,
        gists: int,
        refine: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  so Gradio is asked for one
    ) -> tuple[Any, ...]:
        """Make prefixes of what stands on the page; a sentence in the status line, and all else as it was, where that fails."""
        try:
            name = task if task in self.tasks and text == as_lines(self.tasks[task]) else "examples"
            wanted = Wanted(text, instruction, name, int(shots), int(gists), int(refine))
            progress(None, desc="compressing")
            made = self.demo.compress(wanted, lambda step, steps: progress((step, steps), desc="refining", unit="steps"))
            picture, caption = gr.Image(visible=False), made.looks
            if not isinstance(made.looks, str):
                drawn = made.file.with_name(PICTURE)
                caption = draw_looks(self.demo.words(made), made.looks, drawn)
                picture = gr.Image(str(drawn), visible=True)
        except Exception as error:
            return (*(gr.skip() for _ in range(6)), failed(error))
        _forget(old)
        label = f"Download {made.file.name} ({amount(made.file.stat().st_size)})"
        download = gr.DownloadButton(label, value=str(made.file), interactive=True)
        return made, made_table(made), download, answer_cards(None, made), caption_of(made, caption), picture, ""

    def ask(self, made: Made | None, text: str) -> Iterator[tuple[Any, Any]]:
        """The cards of all columns, whenever an answer has grown."""
        try:
            if made is None:
                raise UserError("nothing is compressed yet; press Compress first, then ask")
            for answers in self.demo.ask(made, text):
                yield answer_cards(answers, made, made.unseen.get(text.strip(), "")), ""
        except Exception as error:
            yield gr.skip(), failed(error)


def failed(error: Exception) -> str:
    """The status line for an error: a sentence. What is no UserError is printed for whoever runs the page."""
    if not isinstance(error, UserError):
        traceback.print_exception(error, file=sys.stderr)
        return sentence(f"that failed ({type(error).__name__}: {in_one_line(error)}); the page can still be used")
    return sentence(str(error))


def _forget(made: Made | None) -> None:
    if made is not None:
        made.remove()


def _with_model() -> dict[str, Any]:
    """Settings of events that need the model: they wait for each other, and say who waits."""
    return {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}


def serve(demo: Demo, host: str, port: int, folder: str | Path, tell: Callable[[str], object]) -> None:
    """Serve the page until it is interrupted; `tell` gets its address when it is there. Gradio's own files go into `folder`."""
    os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "gradio")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    blocks = Page(demo).blocks.queue(max_size=32)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        inbrowser=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        theme=gr.themes.Default(primary_hue="emerald", **fonts),
        css=CSS,
        app_kwargs={"middleware": [Middleware(OwnOnly)]},
    )
    tell(address)
    blocks.block_thread()
