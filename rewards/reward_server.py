"""--reward_server: scores from a program that runs elsewhere, asked over HTTP.

    POST URL    {"prompts": [...], "completions": [...]}    ->    {"scores": [0.3, -1.2, null, ...]}

A prompt is a text, or a list of messages where it is a dialogue; a completion is the text of a reply.  null says that the
server does not judge that reply.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from corpus.formats import Message, Prompt, bare, message_text
from rewards.reward_functions import RewardFunction
from utils.console import InputError, RunError, one_line, say

NAME = "reward_server"  # of its part of a score
TIMEOUT = 300.0  # seconds for an answer
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
WANTED = 'it has to answer {"scores": [...]}, a number for each reply'


class RewardServer:
    """A server in the form of a reward function: (prompts, completions) -> scores."""

    def __init__(self, url: str) -> None:
        """Raises InputError for what is no such address."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise InputError(f"--reward_server {url} is no address; write for example http://localhost:8000/scores")
        self.url = url
        self.has_answered = False

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str | list[Message]]) -> list[Any]:
        """prompts, completions: as reward functions get them.

        A lost connection, a timeout and an error of the server (5xx) are tried again, `WAITS` apart.  Raises RunError when
        that does not help, InputError where the server never answered, and for an answer without scores.
        """
        texts = [each if isinstance(each, str) else message_text(each[0]) for each in completions]
        body = json.dumps({"prompts": [bare(prompt) for prompt in prompts], "completions": texts}).encode()
        for wait in (*WAITS, None):
            try:
                answer = self.ask(body)
                break
            except (OSError, HTTPException) as error:
                reason = one_line(error) or type(error).__name__
                if isinstance(error, urllib.error.HTTPError):
                    reason += f": {error.read(200).decode(errors='replace')!r}"
                    if error.code < 500:  # it will not take the next one either
                        raise InputError(
                            f"--reward_server {self.url} refuses what it is asked ({reason}); {WANTED}"
                        ) from error
                if wait is None:
                    kind, advice = (RunError, "; start it again and go on with --resume_from_checkpoint true")
                    if not self.has_answered:
                        kind, advice = (InputError, "; start it, or correct the address")
                    tries = f"{len(WAITS) + 1} times in {sum(WAITS):g} s"
                    raise kind(f"--reward_server {self.url} was asked {tries} in vain ({reason}){advice}") from error
            say(f"--reward_server {self.url}: {reason}; asking again in {wait:g} s")
            time.sleep(wait)
        self.has_answered = True
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"--reward_server {self.url} answers {answer[:200]!r}; {WANTED}") from error
        if not isinstance(scores, list):
            raise InputError(f"--reward_server {self.url} answers {answer[:200]!r}; {WANTED}")
        return scores

    def ask(self, body: bytes) -> str:
        """The text that the server answers."""
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url, body, headers), timeout=TIMEOUT) as response:
            return response.read().decode(errors="replace")

    def as_function(self) -> RewardFunction:
        """It as one of the functions that make a score."""
        return RewardFunction("--reward_server", self.url, self, may_skip=True, name=NAME)
