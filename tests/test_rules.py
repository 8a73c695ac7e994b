"""rewards.rules: each rule on replies whose reward is plain to see."""

import socket
import subprocess
import sys
from functools import partial

import pytest
from transformers import TrainerState

from rewards import rules
from rewards.reward_functions import Notes, Replies, RewardFunction


def test_exact_answer() -> None:
    rights = ["Half of it is 36.\n#### 72", "72", 72, "Paris"]
    replies = ["So:\n#### 72", "#### 7\n#### 72 \nDone.", "72", "#### paris"]
    assert rules.exact_answer(replies, rights) == [1, 1, 0, 0]
    dialogues = [[{"role": "assistant", "content": "The answer is Paris"}], [{"role": "assistant", "content": "Paris"}]]
    assert rules.exact_answer(dialogues, ["Paris"] * 2, marker="The answer is") == [1, 0]


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        (r"The answer is \boxed{\frac{1}{2}}.", "1/2", 1),
        (r"so it is $\frac12$", 0.5, 1),
        ("12 - 9 = 3", "3", 1),
        ("3 + 1 = 4", "3", 0),
        ("We get 1,000 apples.", 1000, 1),
        (r"\boxed{0.75}", r"\frac{3}{4}", 1),
        (r"\boxed{\sqrt{2}}", r"\sqrt{2}", 1),
        ("the answer is -3.", "3", 0),
        ("I do not know.", "3", 0),
        ("", "3", 0),
        ("72", "Half of it is 36.\n#### 72", 1),
    ],
)
def test_number_equal(reply: str, answer: object, right: float) -> None:
    assert rules.number_equal([reply], [answer]) == [right]


@pytest.mark.parametrize(
    ("rule", "column", "reply", "entry"),
    [
        (rules.exact_answer, "answer", "#### 0", 0),
        (rules.number_equal, "answer", "0", 0),
        (rules.matches, "pattern", "a", "a"),
        (rules.passes_tests, "tests", "a = 1", ["assert a"]),
    ],
)
def test_a_row_without_an_entry_is_not_judged(rule: object, column: str, reply: str, entry: object) -> None:
    """Prompts with and without an answer in one file: those without would all be wrong, or all right."""
    assert rule([reply] * 4, **{column: [None, "", " ", entry]}) == [None, None, None, 1]


def test_matches() -> None:
    form = "<think>.+</think><answer>.+</answer>"
    replies = ["<think>a\nb</think><answer>c</answer>\n", "x <think>a</think><answer>c</answer>", ""]
    assert rules.matches(replies, [form] * 3) == [1, 0, 0]
    assert partial(rules.matches, pattern="ab|c")(["ab", "abc", "c"]) == [1, 0, 1]


def test_valid_json() -> None:
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    replies = ['{"name": "a"}', 'Here:\n```json\n{"name": "a"}\n```', '{"name": 1}', "{}", "{", "", "[" * 100_000]
    assert rules.valid_json(replies) == [1, 1, 1, 1, 0, 0, 0]
    assert rules.valid_json(replies, [schema] * 7) == [1, 1, 0, 0, 0, 0, 0]
    text = '{"type": "array", "minItems": 2}'
    assert rules.valid_json(["[1, 2]", "[1]", "[1]"], [text, text, ""]) == [1, 0, 1]


def test_length_band() -> None:
    ids = [[1] * count for count in (1, 5, 10, 20, 40)]
    rewards = rules.length_band([""] * 5, ids, lowest=10, highest=20)
    assert rewards == pytest.approx([0.1, 0.5, 1, 1, 0.5])


def test_same_language() -> None:
    english, german = "What is the capital of France?", "Wie heißt die Hauptstadt von Frankreich?"
    chinese = "你好，请问法国的首都在哪里？"
    answers = {"en": "The capital of France is the city of Paris.", "de": "Die Hauptstadt von Frankreich ist Paris."}
    prompts = [english, english, german, chinese, english, english, "ok"]
    replies = [answers["en"], answers["de"], answers["de"], answers["en"], "", "42", answers["en"]]
    assert rules.same_language(prompts, replies) == [1, 0, 1, 0, 0, None, None]


DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = ["assert double(2) == 4", "assert double(-1) == -2"]


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (DOUBLE, 1),
        (f"Wrong first:\n```python\ndef double(x):\n    return x\n```\nbetter:\n```python\n{DOUBLE}```\n", 1),
        ("def double(x):\n    return 4\n", 0),
        ("def double(x) return 2 * x", 0),
        ("", 0),
        (f"{DOUBLE}import sys\nsys.exit(0)", 0),
        (f"{DOUBLE}import os\nos._exit(0)", 0),
        (f"{DOUBLE}open('passed', 'w').write('yes')\nraise SystemExit", 0),
        ("def double(x):\n    while True:\n        pass\n", 0),
        ("def double(x):\n    return len([0] * 10 ** 9) and 2 * x\n", 0),
        ("import subprocess\ndef double(x):\n    subprocess.run(['true'])\n    return 2 * x\n", 0),
        ("import os\ndef double(x):\n    os.fork()\n    return 2 * x\n", 0),
    ],
)
def test_passes_tests(reply: str, right: float) -> None:
    assert rules.passes_tests([reply], [TESTS], seconds=2) == [right]
    if right:
        assert rules.passes_tests([reply], ["\n".join(TESTS)], seconds=30) == [right]


def test_code_reaches_no_server() -> None:
    """Nothing arrives at one that runs on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        reply = f"{DOUBLE}import socket\nsocket.create_connection(('127.0.0.1', {port}))\n"
        call = f"import socket\n    socket.create_connection(('127.0.0.1', {port}))"
        quiet = f"{DOUBLE}try:\n    {call}\nexcept OSError:\n    pass\n"
        assert rules.passes_tests([reply, quiet], [TESTS] * 2, seconds=30) == [0, 1]
        with pytest.raises(TimeoutError):
            server.accept()


def test_code_leaves_nothing_and_knows_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts in a folder of its own, which is deleted, and has none of our environment, where keys may be."""
    monkeypatch.setenv("SECRET_KEY", "value")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    reply = (
        f"{DOUBLE}import os\nassert 'SECRET_KEY' not in os.environ and os.listdir() == []\nopen('left', 'w').close()"
    )
    assert rules.passes_tests([reply], [TESTS], seconds=30) == [1]
    assert list(tmp_path.iterdir()) == []


def test_rules_come_by_name() -> None:
    """As stage 3 calls them: columns that a rule does not know are no hindrance, its settings no columns."""
    rows = [{"prompt": "1 + 1", "columns": {"answer": "2", "kind": "sum"}}]
    replies = Replies(rows, ["1 + 1 = 2"], [[1, 2, 3]])

    def judge(rule: object, found: list[str]) -> list[float | None]:
        function = RewardFunction("--reward_function", "rewards.rules:rule", rule, may_skip=True)
        function.columns(found)
        return function.judge(replies, TrainerState(), Notes([{}]))

    assert judge(rules.number_equal, ["answer", "kind"]) == [1]
    assert judge(rules.length_band, ["answer"]) == [0.15]
    assert judge(partial(rules.length_band, lowest=2, highest=3), ["answer"]) == [1]
    assert judge(partial(rules.exact_answer, marker="="), ["answer"]) == [1]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"math_verify.*; pip install -r requirements-rules\.txt"):
        rules.number_equal(["2"], ["2"])


def test_nothing_is_installed_for_the_others() -> None:
    """Rules are imported with the standard library alone."""
    lines = "import sys\nsys.modules.update(dict.fromkeys(['math_verify', 'jsonschema', 'py3langid']))\n"
    lines += "from rewards import rules\nassert rules.valid_json(['{}']) == [1]\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", lines], check=True)
