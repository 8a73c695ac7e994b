"""--reward_server: what is sent, what may come back, and a server that is away for a while."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

import rl_training
from rewards import reward_server
from rewards.reward_functions import Notes, Replies
from rewards.reward_server import RewardServer
from tests.conftest import write_rows
from tests.helpers import PROMPTS, Stages, run_main
from utils.console import InputError, RunError
from utils.files import read_jsonl

TURNS = [{"role": "user", "content": "Tea?", "tool_calls": None}]
GIVEN = Replies([{"prompt": "a="}, {"prompt": "<Tea?>", "turns": TURNS}], ["x", "yes"], [[1], [2, 3]])


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Answers of a server, each (status, text), or None to hang up, the last one for good -> its address."""
    servers = []

    def start(*answers: tuple[int, str] | Callable[[Any], str] | None) -> str:
        class Handler(BaseHTTPRequestHandler):
            asked: list[Any] = []  # noqa: RUF012

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = answers[min(len(self.asked), len(answers) - 1)]
                self.asked.append(asked)
                if answer is None:
                    return  # without a line
                status, text = (200, answer(asked)) if callable(answer) else answer
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *words: Any) -> None:
                """Quiet."""

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        start.asked = Handler.asked
        return f"http://127.0.0.1:{server.server_port}/scores"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_server.time, "sleep", lambda seconds: None)


def scores(url: str, server: RewardServer | None = None) -> list[float | None]:
    return (server or RewardServer(url)).as_function().judge(GIVEN, TrainerState(), Notes([{}, {}]))


def test_what_is_sent_and_what_comes_back(serve: Callable[..., str]) -> None:
    assert scores(serve((200, '{"scores": [1, null]}'))) == [1.0, None]
    assert serve.asked == [{"prompts": ["a=", [{"role": "user", "content": "Tea?"}]], "completions": ["x", "yes"]}]


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (200, '{"scores": [1, 2, 3]}', r"the reply 'x' gives 3 numbers for 1 replies; it has to give one a reply"),
        (200, '{"scores": [1, NaN]}', r"the prompt '<Tea\?>' and the reply 'yes' gives nan; it has to give a finite"),
        (200, '{"scores": [1, "good"]}', r"the reply 'yes' gives 'good' \(ValueError"),
        (
            200,
            '{"score": [1, 2]}',
            r"""answers '{"score": \[1, 2\]}'; it has to answer {"scores": \[...\]}, a number""",
        ),
        (200, '{"scores": 3}', r"""answers '{"scores": 3}'; it has to answer"""),
        (200, "<html>", r"answers '<html>'; it has to answer"),
        (
            404,
            "no such page",
            r"refuses what it is asked \(HTTP Error 404: Not Found: 'no such page'\); it has to answer",
        ),
    ],
)
def test_a_wrong_answer_is_one_line(serve: Callable[..., str], status: int, text: str, message: str) -> None:
    with pytest.raises(InputError, match="--reward_server http://127.0.0.1:.*" + message) as stopped:
        scores(serve((status, text)))
    assert "\n" not in str(stopped.value)


def test_a_lost_connection_is_tried_again(serve: Callable[..., str], capsys: pytest.CaptureFixture) -> None:
    url = serve(None, (503, "loading"), (200, '{"scores": [1, 2]}'))
    assert scores(url) == [1.0, 2.0]
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"--reward_server {url}: .*closed.*; asking again in 1 s", first)
    assert second == f"--reward_server {url}: HTTP Error 503: Service Unavailable: 'loading'; asking again in 2 s"


def test_a_server_that_is_gone_ends_the_run(serve: Callable[..., str]) -> None:
    """Before its first answer the address may be wrong; behind it the run can go on when the server is back."""
    server = RewardServer(serve((200, '{"scores": [1, 2]}'), (500, "")))
    scores("", server)
    with pytest.raises(
        RunError, match=r"was asked 6 times in 31 s in vain \(HTTP Error 500: .*; start it again and go on"
    ):
        scores("", server)
    assert len(serve.asked) == 1 + 6
    with pytest.raises(
        InputError, match=r"http://127.0.0.1:9/ was asked 6 times .*refused.*; start it, or correct the"
    ):
        scores("http://127.0.0.1:9/")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/x", "http://", "http://me:secret@host/"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError, match=f"--reward_server {url} is no address; write for example http://localhost"):
        RewardServer(url)


@pytest.fixture
def words(stages: Stages, tmp_path: Path) -> list[str]:
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    words = ["--model_name", stages.base, "--sft_model_lora_path", stages.sft, "--prompt_template", "{prompt}="]
    words += ["--dataset", data, "--steps", "2", "--save_freq", "1", "--batch_size", "4", "--mini_batch_size", "2"]
    words += ["--ppo_epochs", "1", "--output_max_length", "6", "--guard", "off", "--output_dir", str(tmp_path / "run")]
    return words


def lengths(asked: dict[str, Any]) -> str:
    return json.dumps({"scores": [len(text) for text in asked["completions"]]})


def test_a_run_on_a_server_and_its_resumption(
    serve: Callable[..., str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The server may have moved; it may not be left out."""
    words += ["--reward_function", "tests.judges:length"]
    run_main(rl_training, [*words, "--reward_server", serve(lengths)], monkeypatch)
    samples = (tmp_path / "run" / "samples.jsonl").read_bytes()
    for row in read_jsonl(str(tmp_path / "run" / "samples.jsonl")):
        assert row["reward_server score"] == row["score"] / 2 == len(row["response"])
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    words += ["--resume_from_checkpoint", "true"]
    with pytest.raises(
        InputError, match=r"--reward_server was 'http.*' in the run of .*, and is None now, which a run"
    ):
        run_main(rl_training, words, monkeypatch)
    run_main(rl_training, [*words, "--reward_server", serve(lengths)], monkeypatch)
    assert "going on with --reward_server http://127.0.0.1:" in capsys.readouterr().err
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == samples


def test_the_server_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "reward_models.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(source, names)
    server = HTTPServer(("127.0.0.1", 0), names["Scores"])
    monkeypatch.setattr(names["Scores"], "log_message", lambda *words: None)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    assert scores(f"http://127.0.0.1:{server.server_port}/scores") == [-99.0, -97.0]
    server.shutdown()
    server.server_close()
