"""chat.py --web in a real browser; run by scripts/test_browser.sh, which wants Chromium and Gradio to be there."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.adapter_folders import LENGTH, AdapterFolders, expected, make_adapter_folders, score_of
from tests.browser.chromium import Browser, contrast, luminance
from utils.console import printable

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\"> ${1+1} {{1+1}}"
ARABIC, EMOJI = "مرحبا، كيف حالك؟", "😀 👩‍👩‍👧‍👦 &amp; 你好"
COLUMNS = "[...document.querySelectorAll('.dialogue .column > div')].map(c => [...c.children].map(n => n.textContent))"


class Page:
    """The page in a browser."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser = browser
        browser.open(address)
        there = (
            "document.querySelectorAll('.dialogue .column').length === 3 && document.querySelector('textarea') !== null"
            " && [...document.querySelectorAll('button')].some(b => b.textContent.trim() === 'New dialogue')"
        )
        self.wait(lambda: browser.run(there))

    def wait(self, done: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, self.browser.run("document.body.innerText")
            time.sleep(0.1)

    def columns(self) -> list[list[str]]:
        """For each model its questions, replies and notes in turn."""
        return self.browser.run(COLUMNS)

    def press(self, name: str) -> None:
        self.browser.run(
            f"[...document.querySelectorAll('button')].find(b => b.textContent.trim() === '{name}').click()"
        )

    def ask(self, question: str, notes: str) -> None:
        """Type a question, press Enter and wait until every column ends with a note that holds `notes`."""
        before = [len(texts) for texts in self.columns()]
        self.browser.type("textarea", question)

        def taken() -> bool:  # Gradio ignores the key while it puts the last question away
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            for kind in ("rawKeyDown", "char", "keyUp"):
                self.browser.call("Input.dispatchKeyEvent", type=kind, **key)
            time.sleep(2)
            return self.browser.run("document.querySelector('textarea').value") == ""

        self.wait(taken)
        self.wait(
            lambda: all(
                len(texts) == count + 3 and notes in texts[-1]
                for texts, count in zip(self.columns(), before, strict=True)
            )
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> AdapterFolders:
    return make_adapter_folders(tmp_path_factory.mktemp("folders"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folders: AdapterFolders, *more: str) -> tuple[subprocess.Popen, str]:
    """chat.py --web, and the line that it says when the page is there."""
    words = [
        "--base_model_name",
        folders.base,
        "--adapters",
        f"SFT={folders.sft}",
        f"v1.5={folders.ppo}",
        "--web",
        *more,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    program = subprocess.Popen(
        [sys.executable, str(ROOT / "chat.py"), *words], stderr=subprocess.PIPE, text=True, env=environment
    )
    said = next((line for line in program.stderr if "at http://" in line or line.startswith("error: ")), "")
    return program, said


def end(program: subprocess.Popen) -> None:
    program.send_signal(signal.SIGINT)
    program.wait(timeout=60)


@pytest.fixture(scope="module")
def address(folders: AdapterFolders) -> Iterator[str]:
    """Where the program's page is."""
    port = free_port()
    limits = ["--port", str(port), "--output_max_length", str(LENGTH), "--reward_model_lora_path", folders.reward]
    program, said = start(folders, *limits)
    assert f"with base, SFT, v1.5 at http://127.0.0.1:{port}; Ctrl-C ends it" in said
    yield f"http://127.0.0.1:{port}"
    end(program)


@pytest.fixture
def page(address: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page in a new browser, light or dark; its console stays clean and it asks nobody but this machine."""
    browser = Browser(tmp_path / "profile")
    scheme = [{"name": "prefers-color-scheme", "value": getattr(request, "param", "light")}]
    browser.call("Emulation.setEmulatedMedia", features=scheme)
    yield Page(browser, address)
    problems, requests = browser.problems, browser.requests
    browser.close()
    assert problems == []
    assert all(request.startswith((address, "data:", "about:")) for request in requests), requests


def test_models_answer_side_by_side(folders: AdapterFolders, page: Page) -> None:
    """Two questions to three models, against each of them loaded alone: texts, lengths and scores."""
    questions = ("rice?", "dogs")
    for question in questions:
        page.ask(question, "score")
    columns = page.columns()
    for shown, path in zip(columns, (None, folders.sft, folders.ppo), strict=True):
        dialogue: list[str] = []
        for number, question in enumerate(questions):
            text, query, reply = expected(folders, path, [*dialogue, question], number + 1)
            note = f"score {score_of(folders, query, reply):.3f} · {len(reply)} tokens"
            assert shown[3 * number : 3 * number + 3] == [question, printable(text.strip()), note]
            dialogue += [question, text.strip()]
    assert len({shown[1] for shown in columns}) == 3, "models that say the same prove nothing"
    page.press("New dialogue")
    page.wait(lambda: page.columns() == [[], [], []])
    page.ask("rice?", "score")
    assert [shown[1] for shown in page.columns()] == [shown[1] for shown in columns]


def test_texts_are_shown_as_text(page: Page) -> None:
    for question in (SCRIPT, ARABIC, EMOJI):
        page.ask(question, "score")
    for shown in page.columns():
        assert shown[::3] == [SCRIPT, ARABIC, EMOJI]
    run = page.browser.run
    assert "models side by side" in run("document.title")
    assert run("document.querySelectorAll('.dialogue img').length") == 0
    direction = "getComputedStyle(document.querySelectorAll('.asked')[{}]).direction"
    assert [run(direction.format(number)) for number in range(3)] == ["ltr", "rtl", "ltr"]
    in_sight = (
        "(() => { const column = document.querySelector('.dialogue .column').getBoundingClientRect();"
        "const note = document.querySelector('.dialogue .note:last-child').getBoundingClientRect();"
        "return note.bottom <= column.bottom && column.bottom <= innerHeight; })()"
    )
    assert run(in_sight)
    assert run("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(("page", "dark"), [("light", False), ("dark", True)], indirect=["page"])
def test_light_dark_and_narrow(page: Page, dark: bool) -> None:
    """Texts have a contrast of at least 4.5, as WCAG asks; on a telephone the models stand below each other."""
    browser = page.browser
    page.ask("dogs", "score")
    colour = "getComputedStyle(document.querySelector('.dialogue {}')).{}"
    behind = {".asked": ".asked", ".said:not(.asked)": ".said:not(.asked)", ".note": ".column"}
    for text, ground in behind.items():
        colours = browser.run(colour.format(text, "color")), browser.run(colour.format(ground, "backgroundColor"))
        assert contrast(*colours) > 4.5, (text, colours)
    assert (luminance(browser.run(colour.format(".column", "backgroundColor"))) < 0.2) == dark
    lefts = "[...document.querySelectorAll('.dialogue .column')].map(node => node.getBoundingClientRect().left)"
    assert len(set(browser.run(lefts))) == 3
    browser.call("Emulation.setDeviceMetricsOverride", width=420, height=900, deviceScaleFactor=1, mobile=False)
    page.wait(lambda: len(set(browser.run(lefts))) == 1)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_a_question_that_is_too_long_is_a_message(page: Page) -> None:
    page.browser.type("textarea", "x" * 300)  # the tiny base has 256 positions
    page.press("Send")
    page.wait(lambda: "that is " in page.browser.run("document.body.innerText"))
    assert page.columns() == [[], [], []]
    page.ask("dogs", "score")


def test_stop_ends_the_sampling(folders: AdapterFolders, tmp_path: Path) -> None:
    """A stopped reply is said to be stopped, and the models are free at once for the next question."""
    port = free_port()
    program, _ = start(folders, "--port", str(port), "--output_max_length", "230", "--temperature", "3")
    browser = Browser(tmp_path / "profile")
    page = Page(browser, f"http://127.0.0.1:{port}")
    for attempt in itertools.count(1):  # a reply may end by itself before the button is pressed
        assert attempt < 10
        browser.type("textarea", f"tea {attempt}")
        page.press("Send")
        page.wait(lambda count=3 * attempt: any(len(shown) == count for shown in page.columns()))
        page.press("Stop")
        page.wait(lambda: not any(shown[-1:] == ["…"] for shown in page.columns()))
        if any("stopped" in text for shown in page.columns() for text in shown):
            break
    page.ask("dogs", "tokens")
    browser.close()
    end(program)


def test_mistakes_are_one_line(folders: AdapterFolders) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        program, said = start(folders, "--port", str(port))
        assert program.wait(timeout=60) == 2
    assert said.startswith(f"error: port {port} cannot be used")
    assert said.endswith("choose another one with --port\n")
