"""chat.py --web: a page at 127.0.0.1 on which all models answer the same questions, side by side.

Gradio is optional and imported here alone.  Each visitor has a dialogue with each model; the replies stream one after the
other, because the models share one base.  Whatever is said is shown as text: it is escaped here and nothing interprets it.
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

from inference.side_by_side import Talkers
from reporting.html import WEB
from utils.console import InputError, printable, say
from utils.data import Message

PENDING = "…"  # note below a reply that is being sampled
ADDRESS = "127.0.0.1"  # this machine alone: there is no password


@dataclass
class Column:
    """One model's dialogue."""

    turns: list[Message] = field(default_factory=list)  # what the model remembers
    shown: list[tuple[str, str, str]] = field(default_factory=list)  # (question, reply, note), all of them


@dataclass
class Visitor:
    """What one visitor said to each model.  Its handlers run at the same time and share this object."""

    columns: dict[str, Column]
    asked: int = 0  # questions so far
    stopped: bool = False  # the button was pressed

    def settle(self) -> None:
        """Say of a reply that was stopped that it was: the model does not remember it."""
        for column in self.columns.values():
            if column.shown and column.shown[-1][2] == PENDING:
                column.shown[-1] = (*column.shown[-1][:2], "stopped, and forgotten")


class Stopped(Exception):
    """Nobody wants the rest of the reply."""


class Stream(TextIteratorStreamer):
    """The pieces of a reply, which another thread samples until `stopped` is set."""

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
    for question, reply, note in column.shown:
        parts.append(f'<div class="said asked" dir="auto">{html.escape(printable(question))}</div>')
        parts.append(f'<div class="said" dir="auto">{html.escape(printable(reply))}</div>')
        parts.append(f'<div class="note">{html.escape(note)}</div>')
    return f'<div class="column"><div>{"".join(parts)}</div></div>'


def sample_into(
    column: Column, talkers: Talkers, lock: threading.Lock, name: str, query: list[int], question: str, asked: int
) -> Generator[None, None, list[int]]:
    """Sample a reply, yield whenever its text in the column has grown, and return its ids.  Closing it stops the sampling.

    lock: held while a model works, because all of them share one base and its switches.
    """
    stream = Stream(talkers.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def work() -> list[int]:
        try:
            with lock:
                return talkers.reply(name, query, question, asked, stream)
        finally:
            stream.end()  # an error must not leave the reader waiting

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            text = ""
            for piece in stream:
                text += piece
                column.shown[-1] = (question, text, PENDING)
                yield
            return future.result()
        finally:
            stream.stopped = True


def answer_all(
    talkers: Talkers, lock: threading.Lock, question: str, names: list[str], columns: dict[str, Column], asked: int
) -> Iterator[None]:
    """Let these models answer into their columns, one after the other.

    Raises InputError for a question that is too long.
    """
    for name in names:
        column = columns[name]
        turns, query = talkers.encode(column.turns, question)
        column.shown.append((question, "", PENDING))
        reply = yield from sample_into(column, talkers, lock, name, query, question, asked)
        note = f"{len(reply)} tokens"
        if talkers.can_score:
            with lock:
                note = f"score {talkers.score(query, reply):.3f} · {note}"
        text = talkers.text(reply)
        column.turns = [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": text}]
        column.shown[-1] = (question, text, note)
        yield


def build_page(talkers: Talkers, base: str) -> Any:
    """The page, a gradio.Blocks."""
    import gradio

    names = list(talkers.adapters)
    lock = threading.Lock()

    def fresh() -> dict[str, Column]:
        return {name: Column() for name in names}

    def drawn(visitor: Visitor) -> list[str]:
        return [column_html(visitor.columns[name]) for name in names]

    def send(question: str, chosen: list[str], visitor: Visitor) -> Iterator[list[Any]]:
        visitor.stopped = False
        if question.strip() and chosen:
            visitor.asked += 1
            growing = answer_all(talkers, lock, question.strip(), chosen, visitor.columns, visitor.asked)
            try:
                with contextlib.closing(growing):
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
        visitor.stopped, visitor.columns, visitor.asked = True, fresh(), 0
        return drawn(visitor)

    with gradio.Blocks(title=f"{base}: models side by side", analytics_enabled=False, fill_width=True) as page:
        visitor = gradio.State(Visitor(fresh()))  # each visitor gets a copy
        gradio.HTML(f'<h1 dir="auto">{html.escape(base)}</h1>')
        chosen = gradio.CheckboxGroup(names, value=names, label="who answers")
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


def serve(talkers: Talkers, base: str, port: int) -> None:
    """Show the page until Ctrl-C.  Raises InputError when the port is taken."""
    import gradio

    fonts = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]  # nothing is fetched
    theme = gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    page = build_page(talkers, base).queue(api_open=False)
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
    say(f"{base} with {', '.join(talkers.adapters)} at http://{ADDRESS}:{port}; Ctrl-C ends it")
    page.block_thread()
    sys.stdout.flush()
    os._exit(0)  # at once: Python would wait for a reply that is still being sampled for a page that is gone
