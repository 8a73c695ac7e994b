"""chat.py in a real terminal: replies stream and are the models' own, commands do what /help says."""

import contextlib
import os
import pty
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers.generation.streamers import BaseStreamer

import chat
from inference import web_chat
from inference.side_by_side import ChatModels
from rollout.distribution import default_sampling
from rollout.sampler import generate_ids
from tests.adapter_folders import LENGTH, TEMPLATE, AdapterFolders, expected, make_adapter_folders, score_of
from tests.conftest import make_tokenizer
from tests.forks import start_command, wait_until
from tests.helpers import load_with_hidden_state_fn
from utils.console import RunError, run_script

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> AdapterFolders:
    return make_adapter_folders(tmp_path_factory.mktemp("folders"))


def arguments(folders: AdapterFolders, *more: str) -> list[str]:
    words = ["--base_model_name", folders.base, "--adapters", f"SFT={folders.sft}", f"v1.5={folders.ppo}"]
    return [*words, "--output_max_length", str(LENGTH), *more]


class Terminal:
    """chat.py on a pseudo-terminal."""

    def __init__(self, words: list[str]) -> None:
        self.master, slave = pty.openpty()
        environment = {"TERM": "dumb", "COLUMNS": "400", "PYTHONIOENCODING": "utf-8"}
        self.process = start_command([ROOT / "chat.py", *words], ROOT, [os.ttyname(slave)] * 3, **environment)
        # closed before the process has opened it, the terminal would be gone
        assert wait_until(lambda: select.select([self.master], [], [], 0)[0], self.process)
        os.close(slave)

    def read(self, until: str, seconds: float = 120) -> str:
        """What is on the screen from here to the regular expression `until`, which has to end it."""
        text, deadline = b"", time.monotonic() + seconds
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self.master], [], [], 0.2)
            if ready:
                try:
                    text += os.read(self.master, 4096)
                except OSError:  # what Linux says when the other side is gone
                    return clean(text)
                if re.search(until + r"$", clean(text)):
                    return clean(text)
        raise AssertionError(f"waited for {until!r}, found {clean(text)!r}")

    def ask(self, line: str, until: str = r"\[[^\]]+\] ") -> str:
        """Type a line; what is shown behind its echo, up to the next prompt."""
        os.write(self.master, line.encode() + b"\n")
        shown = self.read(r"\n(.*\n)*" + until)
        return re.sub(until + "$", "", shown.split("\n", 1)[1])

    def interrupt(self, until: str) -> str:
        """Press Ctrl-C, again where it came just before Python began to wait for a key: then Python sees it at the next."""
        for _ in range(20):
            os.kill(self.process.pid, signal.SIGINT)
            with contextlib.suppress(AssertionError):
                return self.read(until, seconds=5)
        raise AssertionError("Ctrl-C did nothing")

    def close(self) -> int:
        """Exit code of a program that ends by itself."""
        self.process.join(60)
        os.close(self.master)
        return self.process.exitcode


def clean(raw: bytes) -> str:
    """Without the colours and modes that a terminal library may switch."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw.decode(errors="replace")).replace("\r\n", "\n")


@pytest.fixture
def terminal(folders: AdapterFolders) -> Iterator[Terminal]:
    terminal = Terminal(arguments(folders, "--reward_model_lora_path", folders.reward))
    greeting = terminal.read(r"\[SFT\] ")
    assert f"{folders.base} with base, SFT, v1.5; /help lists the commands" in greeting
    yield terminal
    if terminal.process.is_alive():
        terminal.process.kill()
        terminal.close()


def test_a_conversation(folders: AdapterFolders, terminal: Terminal) -> None:
    """Two questions, a switch and a score; each reply against the model loaded alone, each score against transformers."""
    first, query, reply = expected(folders, folders.sft, ["你好 tea?"], 1)
    assert terminal.ask("你好 tea?") == chat.printable(first) + "\n"
    assert terminal.ask("/score") == f"SFT: {score_of(folders, query, reply):.3f}\n"

    assert terminal.ask("/adapter v1.5") == ""
    second, _, _ = expected(folders, folders.ppo, ["你好 tea?", first.strip(), "dogs"], 2)
    assert terminal.ask("dogs") == chat.printable(second) + "\n"
    assert terminal.ask("/adapter") == "models: base, SFT, v1.5 (now)\n"
    assert terminal.ask("/adapter none") == "there is no none\nmodels: base, SFT, v1.5 (now)\n"

    assert terminal.ask("/new") == ""
    assert terminal.ask("/score") == "nothing to score yet; ask something first\n"
    assert terminal.ask("/all") == "ask something first, or write /all TEXT\n"
    third, _, _ = expected(folders, folders.ppo, ["dogs"], 3)
    assert terminal.ask("dogs") == chat.printable(third) + "\n"
    os.write(terminal.master, b"/quit\n")
    assert terminal.close() == 0


def test_all_models_answer(folders: AdapterFolders, terminal: Terminal) -> None:
    models = {"base": None, "SFT": folders.sft, "v1.5": folders.ppo}
    assert terminal.ask("/all") == "ask something first, or write /all TEXT\n"
    assert terminal.ask("/score") == "nothing to score yet; ask something first\n"
    texts = {name: expected(folders, path, ["rice?"], 1)[0] for name, path in models.items()}
    assert len(set(texts.values())) == 3, "models that say the same prove nothing"
    shown = "".join(f"--- {name}\n{chat.printable(text)}\n" for name, text in texts.items())
    assert terminal.ask("/all rice?") == shown
    assert re.fullmatch(r"base: -?\d+\.\d{3}\nSFT: -?\d+\.\d{3}\nv1\.5: -?\d+\.\d{3}\n", terminal.ask("/score"))
    assert terminal.ask("/all") == shown  # the same question again, as if it had not been asked before
    follow_up, _, _ = expected(folders, folders.sft, ["rice?", texts["SFT"].strip(), "soup"], 2)
    assert terminal.ask("soup") == chat.printable(follow_up) + "\n"  # the dialogue holds the current model's reply
    os.write(terminal.master, b"\x04")  # Ctrl-D
    assert terminal.close() == 0


def test_help_and_mistakes_do_not_end_the_chat(terminal: Terminal) -> None:
    assert terminal.ask("/help") == chat.HELP + "\n"
    assert terminal.ask("/nonsense").startswith("there is no command /nonsense\n")
    assert terminal.ask("") == ""
    assert terminal.ask("x" * 300).startswith("error: that is ")  # the tiny base has 256 positions
    assert terminal.ask("dogs").endswith("\n")
    assert "(stopped; /quit ends the chat)" in terminal.interrupt(r"chat\)\n\[SFT\] ")
    os.write(terminal.master, b"/quit\n")
    assert terminal.close() == 0


def session(folders: AdapterFolders, longest: int = 200) -> chat.Session:
    """A session with the bare base alone."""
    tokenizer = make_tokenizer()
    model = PeftModel.from_pretrained(load_with_hidden_state_fn(folders.base), folders.sft)
    sampling = default_sampling(tokenizer, (2,), LENGTH)
    return chat.Session(
        ChatModels(model, tokenizer, TEMPLATE, (2,), {"base": []}, {"base": sampling}, longest, seed=0), "base"
    )


def test_the_oldest_turns_are_dropped(folders: AdapterFolders) -> None:
    talk = session(folders, longest=40)
    talk.turns = [{"role": r, "content": r * 3} for r in ("user", "assistant")] + [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    talk.turns, query = talk.models.encode_dialogue(talk.turns, "c")
    assert talk.models.tokenizer.decode(query) == "Q: a\nA:b\n\nQ: c\nA:"
    assert [turn["content"] for turn in talk.turns] == ["a", "b"]


def test_an_interrupted_reply_is_forgotten(folders: AdapterFolders, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    talk = session(folders)
    talk.obey("first")
    before = talk.turns
    lines = iter(["second", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))

    def interrupted(self: chat.Session, name: str, query: list[int]) -> list[int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.Session, "generate", interrupted)
    chat.converse(talk)
    assert talk.turns == before
    assert talk.last == []
    assert "(stopped" in capsys.readouterr().out


def test_without_a_reward_model(folders: AdapterFolders, capsys: pytest.CaptureFixture[str]) -> None:
    session(folders).obey("/score")
    assert capsys.readouterr().out == "there is no reward model; start with --reward_model_lora_path FOLDER\n"


def test_tokens_are_streamed_one_by_one(folders: AdapterFolders) -> None:
    """The streamer gets the prompt, then every token alone, before the reply is returned.

    But not what ends the reply: where <|im_end|> is no special token, it would be shown.
    """

    class Recorder(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    recorder = Recorder()
    sampling = default_sampling(make_tokenizer(), (2,), LENGTH)
    model = load_with_hidden_state_fn(folders.base)
    (reply,) = generate_ids(model, [[5, 6, 7]], [0], sampling, recorder)
    assert reply[-1] == 2
    assert recorder.pieces == [[5, 6, 7], *([token] for token in reply[:-1])]
    assert recorder.ended


def test_a_reply_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    streamer = chat.TerminalStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.put(torch.tensor([[5, 6]]))
    for token in tokenizer("a \x1b[31mred\x07 \x9b2J\r\n\t好 😀 end", add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out == "a [31mred 2J\n\t好 😀 end\n"


def test_mistakes_are_one_line(folders: AdapterFolders, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    cases = [
        (["--adapters"], "expected at least one argument"),
        (["--adapters", f"SFT={folders.reward}"], "is a reward adapter"),
        (["--adapters", f"SFT={folders.sft}", "--reward_model_lora_path", folders.sft], "holds no score head"),
        (["--adapters", f"SFT={folders.sft}", "--output_max_length", "256"], "leaves no room for a prompt"),
        (["--adapters", f"SFT={folders.sft}", "--port", "0"], "--port is 0; give a number from 1 to 65535"),
    ]
    for words, message in cases:
        monkeypatch.setattr(sys, "argv", ["chat.py", "--base_model_name", folders.base, *words])
        with pytest.raises(SystemExit) as stop:
            run_script(chat.main)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2
        assert len(errors) == 1
        assert message in errors[0]


def test_a_reply_on_the_page_can_be_stopped(folders: AdapterFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the rest: the sampling ends too, the lock is free, and the model remembers nothing of it."""
    put, drawn = web_chat.Stream.put, []

    def slow(self: web_chat.Stream, value: torch.Tensor) -> None:
        put(self, value)
        drawn.append(value)
        time.sleep(0.02)  # else the other thread is through before the first piece is read

    monkeypatch.setattr(web_chat.Stream, "put", slow)
    sampling = default_sampling(make_tokenizer(), (2,), 200, temperature=3.0)
    models = replace(session(folders).models, samplings={"base": sampling})
    page = web_chat.WebChat(models)
    assert len(list(page.ask("rice?", ["base"], web_chat.Visitor(page.fresh_columns())))) > 10
    whole = len(drawn)
    drawn.clear()
    visitor = web_chat.Visitor(page.fresh_columns())
    growing = page.ask("rice?", ["base"], visitor)
    next(growing)
    growing.close()
    assert 0 < len(drawn) < whole / 2
    assert not page.lock.locked()
    assert visitor.columns["base"].turns == []


def test_only_one_model_works_at_a_time(folders: AdapterFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them share one base and its switches; the visitors' questions come from several threads."""
    page, drawn = web_chat.WebChat(session(folders).models), []
    monkeypatch.setattr(ChatModels, "can_score", True)
    monkeypatch.setattr(ChatModels, "score", lambda self, queries, responses: [1.25])
    put = web_chat.Stream.put
    monkeypatch.setattr(web_chat.Stream, "put", lambda self, value: (drawn.append(value), put(self, value)))
    visitor = web_chat.Visitor(page.fresh_columns())
    asking = threading.Thread(target=lambda: list(page.ask("tea?", ["base"], visitor)))
    with page.lock:
        asking.start()
        time.sleep(0.3)
        assert drawn == []
    asking.join(60)
    ((question, text, note),) = visitor.columns["base"].shown
    assert (question, len(text) > 0) == ("tea?", True)
    assert re.fullmatch(r"score 1\.250 · \d+ tokens", note)


def test_an_error_of_the_sampler_reaches_the_page(folders: AdapterFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised in another thread, while the page waits for the next piece of the reply."""

    def fails(*args: object) -> list[int]:
        raise RunError("NaN in the logits")

    monkeypatch.setattr(ChatModels, "generate_ids", fails)
    page, seen = web_chat.WebChat(session(folders).models), []

    def ask() -> None:
        try:
            list(page.ask("tea?", ["base"], web_chat.Visitor(page.fresh_columns())))
        except RunError as error:
            seen.append(str(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(30)
    assert seen == ["NaN in the logits"]


def test_a_column_shows_texts_as_texts() -> None:
    """tests/browser/check_web.py looks at it in a browser."""
    column = web_chat.Column(shown=[("<b>a\x1b</b>", "<script>alert(1)</script>", "3 tokens")])
    assert web_chat.column_html(column) == (
        '<div class="column"><div><div class="said asked" dir="auto">&lt;b&gt;a&lt;/b&gt;</div>'
        '<div class="said" dir="auto">&lt;script&gt;alert(1)&lt;/script&gt;</div>'
        '<div class="note">3 tokens</div></div></div>'
    )


def test_a_stopped_reply_says_so() -> None:
    columns = {name: web_chat.Column(shown=[("q", name, "note")]) for name in ("whole", "half")}
    columns["half"].shown.append(("q", "half a rep", web_chat.PENDING))
    web_chat.Visitor({**columns, "new": web_chat.Column()}).settle()
    assert columns["whole"].shown == [("q", "whole", "note")]
    assert columns["half"].shown == [("q", "half", "note"), ("q", "half a rep", "stopped, and forgotten")]


def test_the_page_without_gradio_is_one_line(folders: AdapterFolders, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """tests/browser/check_web.py has the page itself."""
    monkeypatch.setitem(sys.modules, "gradio", None)  # what Python takes for a package that cannot be imported
    monkeypatch.setattr(
        sys, "argv", ["chat.py", "--base_model_name", folders.base, "--adapters", f"SFT={folders.sft}", "--web"]
    )
    with pytest.raises(SystemExit) as stop:
        run_script(chat.main)
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert re.fullmatch(r"error: --web needs Gradio \(.*\); pip install -r requirements-web.txt\n", shown.err)
