"""chat.py --web: a page at 127.0.0.1 on which all models answer the same questions, side by side.

Gradio is optional and imported here alone.  Each visitor has a dialogue with each model; the responses stream one after the
other, because the models share one base.  Whatever is said is shown as text: it is escaped here and nothing interprets it.
(gradio.Chatbot with render_markdown=False does not escape: an <img> in a response is loaded, and code loses its indents.)
"""

import contextlib
import html
import os
import sys
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import TextIteratorStreamer

from corpus.formats import Message
from inference.side_by_side import ChatModels, prompt_seed
from reporting.html import WEB
from utils.console import InputError, printable, say

PENDING = "…"  # note below a response that is being sampled
ADDRESS = "127.0.0.1"  # this machine alone: there is no password


@dataclass
class Column:
    """One model's dialogue."""

    turns: list[Message] = field(default_factory=list)  # what the model remembers
    shown: list[tuple[str, str, str]] = field(default_factory=list)  # (question, response, note), all of them


@dataclass
class Visitor:
    """What one visitor said to each model.  Its handlers run at the same time and share this object."""

    columns: dict[str, Column]
    questions: int = 0  # number of questions so far
    stopped: bool = False  # the button was pressed

    def settle(self) -> None:
        """Mark a response that was stopped: the model does not remember it."""
        for column in self.columns.values():
            if column.shown and column.shown[-1][2] == PENDING:
                column.shown[-1] = (*column.shown[-1][:2], "stopped, and forgotten")


class Stopped(Exception):
    """Nobody wants the rest of the response."""


class Stream(TextIteratorStreamer):
    """The pieces of a response, which another thread samples until `stopped` is set."""

    stopped = False

    def put(self, value: Tensor) -> None:
        if self.stopped:
            raise Stopped
        super().put(value)


def check_gradio() -> None:
    """Raises InputError where Gradio is missing."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it is read when Gradio is imported
    try:
        import gradio  # noqa: F401  optional
    except ImportError as error:
        raise InputError(f"--web needs Gradio ({error}); pip install -r requirements-web.txt") from error


def column_html(column: Column) -> str:
    """A dialogue as HTML; dir="auto" lets each text run in the direction of its own script."""
    parts = []
    for question, response, note in column.shown:
        parts.append(f'<div class="said asked" dir="auto">{html.escape(printable(question))}</div>')
        parts.append(f'<div class="said" dir="auto">{html.escape(printable(response))}</div>')
        parts.append(f'<div class="note">{html.escape(note)}</div>')
    return f'<div class="column"><div>{"".join(parts)}</div></div>'


@dataclass(frozen=True)
class WebChat:
    """The models, and the lock that is held while one of them works: all share one base and its switches."""

    models: ChatModels
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fresh_columns(self) -> dict[str, Column]:
        return {name: Column() for name in self.models.adapters}

    def generate_into(self, column: Column, name: str, query: list[int], seed: int) -> Generator[None, None, list[int]]:
        """Sample a response, yield whenever its text in the column has grown, and return its ids.

        Closing the generator stops the sampling.
        """
        stream = Stream(self.models.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def work() -> list[int]:
            try:
                with self.lock:
                    return self.models.generate_ids(name, [query], [seed], stream)[0]
            finally:
                stream.end()  # an error must not leave the reader waiting

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            try:
                for piece in stream:
                    question, text, _ = column.shown[-1]
                    column.shown[-1] = (question, text + piece, PENDING)
                    yield
                return future.result()
            finally:
                stream.stopped = True

    def ask(self, question: str, names: list[str], visitor: Visitor) -> Iterator[None]:
        """Let these models respond into the visitor's columns, one after the other.

        Raises InputError for a question that is too long.
        """
        columns = visitor.columns  # a new dialogue gets new ones
        visitor.questions += 1
        seed = prompt_seed(self.models.seed, f"{visitor.questions} {question}")
        for name in names:
            column = columns[name]
            turns, query = self.models.encode_dialogue(column.turns, question)
            column.shown.append((question, "", PENDING))
            ids = yield from self.generate_into(column, name, query, seed)
            note = f"{len(ids)} tokens"
            if self.models.can_score:
                with self.lock:
                    note = f"score {self.models.score([query], [ids])[0]:.3f} · {note}"
            text = self.models.text(ids)
            column.turns = [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": text}]
            column.shown[-1] = (question, text, note)
            yield


def build_page(models: ChatModels, base: str) -> Any:
    """The page, a gradio.Blocks."""
    import gradio

    names = list(models.adapters)
    chat = WebChat(models)

    def drawn(visitor: Visitor) -> list[str]:
        return [column_html(visitor.columns[name]) for name in names]

    def send(question: str, chosen: list[str], visitor: Visitor) -> Iterator[list[Any]]:
        visitor.stopped = False
        if question.strip() and chosen:
            try:
                with contextlib.closing(chat.ask(question.strip(), chosen, visitor)) as growing:
                    for number, _ in enumerate(growing):
                        if visitor.stopped:
                            break
                        # the field is emptied once: the visitor may be writing the next question
                        yield ["" if number == 0 else gradio.skip(), *drawn(visitor)]
            except InputError as error:
                gradio.Warning(html.escape(str(error)))
        else:
            gradio.Warning("Write a question and choose a model.")
        visitor.settle()
        yield [gradio.skip(), *drawn(visitor)]

    def stop(visitor: Visitor) -> None:
        visitor.stopped = True

    def forget(visitor: Visitor) -> list[str]:
        visitor.stopped, visitor.columns, visitor.questions = True, chat.fresh_columns(), 0
        return drawn(visitor)

    with gradio.Blocks(title=f"{base}: models side by side", analytics_enabled=False, fill_width=True) as page:
        visitor = gradio.State(Visitor(chat.fresh_columns()))  # each visitor gets a copy
        gradio.HTML(f'<h1 dir="auto">{html.escape(base)}</h1>')
        chosen = gradio.CheckboxGroup(names, value=names, label="Models")
        with gradio.Row():
            dialogues = []
            for name in names:
                with gradio.Column(min_width=200):
                    gradio.HTML(f'<h2 dir="auto">{html.escape(name)}</h2>')
                    dialogues.append(gradio.HTML(column_html(Column()), elem_classes="dialogue"))
        with gradio.Row(equal_height=True):
            question = gradio.Textbox(label="question", max_lines=6, scale=4, autofocus=True, placeholder="Enter sends")
            send_button = gradio.Button("Send", variant="primary", min_width=80)
            stop_button = gradio.Button("Stop", min_width=80)
            new_button = gradio.Button("New dialogue", min_width=80)
        results = [question, *dialogues]
        gradio.on([send_button.click, question.submit], send, [question, chosen, visitor], results, concurrency_limit=1)
        stop_button.click(stop, visitor, None)
        new_button.click(forget, visitor, dialogues)
    return page


def serve(models: ChatModels, base: str, port: int) -> None:
    """Show the page until Ctrl-C.  Raises InputError when the port is taken."""
    import gradio

    fonts = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]  # nothing is fetched
    theme = gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    page = build_page(models, base).queue(api_open=False)
    try:
        page.launch(
            server_name=ADDRESS,
            server_port=port,
            share=False,
            quiet=True,
            footer_links=[],
            theme=theme,
            css_paths=WEB / "chat.css",
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise InputError(f"port {port} cannot be used: {error}; choose another one with --port") from error
    say(f"{base} with {', '.join(models.adapters)} at http://{ADDRESS}:{port}; Ctrl-C ends it")
    page.block_thread()
    sys.stdout.flush()
    os._exit(0)  # at once: Python would wait for a response that is still being sampled for a page that is gone
