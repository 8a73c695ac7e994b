"""Rules for --reward_function that many tasks need; docs/reward_functions.md has a table of them.

    --reward_function rewards.rules:number_equal

All take what TRL's trainers give by name: `completions` and columns of the prompt data, a list with one entry a reply.  A
row whose entry is empty is not judged: None.  With another marker, band or limit a rule is a line in a module of the user's:

    from functools import partial
    from rewards.rules import exact_answer
    answer_in_words = partial(exact_answer, marker="The answer is")
"""

import functools
import importlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

Texts = Sequence[str | list[dict[str, str]]]  # of dialogues: lists of messages, of which the last one counts
FENCED = re.compile(r"```[ \t]*(?:\w+)?[ \t]*\n(.*?)```", re.DOTALL)
SURE = 0.5  # a text is in a language that has at least this probability

# What runs a reply's code: argument, limits and tests come on stdin, which the code cannot read again.
TEST_RUNNER = """
import json, resource, sys
given = json.load(sys.stdin)
NOT_OFFERED = ("socket.", "subprocess.", "os.system", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "pty.")
def refuse(event, arguments):
    if event.startswith(NOT_OFFERED):
        raise PermissionError(event + " is not offered to replies")
sys.addaudithook(refuse)
for limit, most in ((resource.RLIMIT_AS, given["memory"]), (resource.RLIMIT_FSIZE, 1 << 20)):
    try:
        resource.setrlimit(limit, (most, most))
    except (ValueError, OSError):
        pass  # macOS has no limit of memory
names = {"__name__": "reply"}
for part in (given["code"], *given["tests"]):
    exec(compile(part, "reply", "exec"), names)
with open(given["file"], "w") as file:
    file.write(given["word"])
"""


def text_of(completion: str | list[dict[str, str]]) -> str:
    """The text of a reply, which is the content of its last message in a dialogue."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}; pip install -r requirements-rules.txt") from error


def is_empty(entry: Any) -> bool:
    """Whether a row has nothing in a column: null, no text, no list."""
    return entry is None or entry == [] or (isinstance(entry, str) and not entry.strip())


def exact_answer(completions: Texts, answer: Sequence[Any], marker: str = "####", **kwargs: Any) -> list[float | None]:
    """1 where what stands behind the last marker of a reply, to the end of its line, is the answer; else 0.

    answer: a column; where it has the marker itself, as in GSM8K, what stands behind it counts.  Spaces at the ends do not.
    """

    def behind(text: str) -> str | None:
        _, found, rest = text.rpartition(marker)
        return rest.strip().split("\n")[0].strip() if found else None

    def judge(reply: str, right: Any) -> float | None:
        if is_empty(right):
            return None
        wanted = behind(str(right))
        return float(behind(reply) == (str(right).strip() if wanted is None else wanted))

    return [judge(text_of(reply), right) for reply, right in zip(completions, answer, strict=True)]


def number_equal(completions: Texts, answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    r"""1 where the reply's answer has the value of the right one: 1/2, 0.5, \frac{1}{2}; else 0.

    Math-Verify finds the answer: in \boxed{...}, behind "the answer is", or the last number or formula of the reply.
    answer: a column of numbers, formulas or LaTeX.  Words are taken for products of letters: they are for `exact_answer`.
    """
    library = _library("math_verify")

    def judge(reply: str, right: Any) -> float | None:
        if is_empty(right):
            return None
        # formulas without dollar signs around them are found in a box alone
        wanted = library.parse(str(right)) or library.parse(rf"\boxed{{{right}}}")
        return float(library.verify(wanted, library.parse(reply)))

    return [judge(text_of(reply), right) for reply, right in zip(completions, answer, strict=True)]


def matches(completions: Texts, pattern: str | Sequence[str], **kwargs: Any) -> list[float | None]:
    """1 where the whole reply fits the regular expression, in which a dot takes line ends too; else 0.

    pattern: a column, or one text for all rows.
    """
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    return [
        None if is_empty(each) else float(re.fullmatch(each, text_of(reply).strip(), re.DOTALL) is not None)
        for reply, each in zip(completions, patterns, strict=True)
    ]


def valid_json(completions: Texts, schema: Sequence[Any] | None = None, **kwargs: Any) -> list[float]:
    """1 where the reply is JSON, alone or in a fence, that fits the JSON schema of its row; else 0.

    schema: a column of schemas, as objects or as JSON text; without one, or where it is empty, any JSON is right.  Raises an
    error of jsonschema where a schema is none.
    """

    def fits(reply: str, wanted: Any) -> bool:
        try:
            value = json.loads(inside_fence(reply))
        except (ValueError, RecursionError):
            return False
        if is_empty(wanted):
            return True
        wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
        library = _library("jsonschema")
        kind = library.validators.validator_for(wanted)
        kind.check_schema(wanted)
        return kind(wanted).is_valid(value)

    wanted = [None] * len(completions) if schema is None else schema
    return [float(fits(text_of(reply), each)) for reply, each in zip(completions, wanted, strict=True)]


def length_band(
    completions: Texts, completion_ids: Sequence[Sequence[int]], lowest: int = 20, highest: int = 200, **kwargs: Any
) -> list[float]:
    """1 for lowest to highest tokens (with the one that ends a reply); tokens / lowest below; highest / tokens above."""
    return [min(1.0, len(ids) / lowest, highest / max(1, len(ids))) for ids in completion_ids]


@functools.cache
def _languages() -> Any:
    library = _library("py3langid.langid")
    return library.LanguageIdentifier.from_model_file(library.MODEL_FILE, norm_probs=True)


def same_language(prompts: Texts, completions: Texts, **kwargs: Any) -> list[float | None]:
    """1 where a reply is in the language of its prompt, 0 where in another one, None where one of them is too short to tell.

    An empty reply is in no language: 0.  py3langid names the languages; a dialogue's last message is its prompt.
    """

    def judge(prompt: str, reply: str) -> float | None:
        if not reply.strip():
            return 0.0
        (asked, sure), (answered, as_sure) = (_languages().classify(text) for text in (prompt, reply))
        return float(asked == answered) if min(sure, as_sure) >= SURE else None

    return [judge(text_of(prompt), text_of(reply)) for prompt, reply in zip(prompts, completions, strict=True)]


def passes_tests(
    completions: Texts,
    tests: Sequence[str | Sequence[str]],
    seconds: float = 5,
    memory_mb: int = 1024,
    **kwargs: Any,
) -> list[float | None]:
    """1 where the Python code of a reply, alone or in its last fence, passes all tests of its row; else 0.

    tests: a column of Python code, as one text or a list, which raises where the reply is wrong: "assert double(2) == 4".
    Each reply runs in a process of its own, in an empty folder that is deleted behind it, with these limits, without network
    and without processes.  THIS IS NO SANDBOX: code that sets out to harm can.  Train on it in a container.
    """

    def judge(reply: str, asserts: str | Sequence[str]) -> float | None:
        if is_empty(asserts):
            return None
        with tempfile.TemporaryDirectory() as folder:
            word, file = secrets.token_hex(), os.path.join(folder, "passed")
            given = {
                "code": inside_fence(reply),
                "tests": [asserts] if isinstance(asserts, str) else list(asserts),
                "memory": memory_mb << 20,
                "word": word,  # a reply that ends the process before its tests does not know it
                "file": file,
            }
            try:
                subprocess.run(
                    [sys.executable, "-I", "-c", TEST_RUNNER],
                    input=json.dumps(given),
                    text=True,
                    cwd=folder,
                    env={},
                    timeout=seconds,
                    check=False,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except subprocess.TimeoutExpired:
                return 0.0
            if not os.path.isfile(file):
                return 0.0
            with open(file, encoding="utf-8") as written:
                return float(written.read(len(word) + 1) == word)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(judge, map(text_of, completions), tests))


def inside_fence(reply: str) -> str:
    """What stands in the last Markdown fence, or the whole text where there is none."""
    fenced = FENCED.findall(reply)
    return fenced[-1] if fenced else reply
