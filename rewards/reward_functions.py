"""Reward functions: Python functions of the user's that judge replies, as TRL's trainers take them.

    def reward(completions, answer, **kwargs) -> list[float | None]      all replies of a process at once
    def reward(prompt, response, answer) -> float | None                 one reply

The first form is that of trl.GRPOTrainer (https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function"):
arguments come by name, and are prompts, completions, completion_ids, trainer_state, log_extra, log_metric and every other
column of the prompt data.  Where the prompts are dialogues, prompts and completions are lists of messages.  In the second
form the first two arguments are texts, and the others columns.  A function gets what it names, with **kwargs everything.
"""

import asyncio
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import TrainerState

from utils.console import InputError, RunError, one_line

LARGEST = torch.finfo(torch.float32).max  # of a number that the processes can exchange
OF_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_Kind = inspect.Parameter
NAMED = (_Kind.POSITIONAL_OR_KEYWORD, _Kind.KEYWORD_ONLY)


class Replies(NamedTuple):
    """B replies to be judged."""

    rows: Sequence[dict[str, Any]]  # of `tokenize_prompts`, with the columns that it carried
    responses: Sequence[str]
    ids: Sequence[Sequence[int]]  # with the token that ends a reply

    def only(self, row: int) -> "Replies":
        return Replies(*(part[row : row + 1] for part in self))


@dataclass
class Notes:
    """What functions say beside their numbers."""

    extra: list[dict[str, Any]]  # of log_extra, for each reply
    metrics: dict[str, list[float]] = field(default_factory=dict)  # of log_metric

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        for row, value in zip(self.extra, values, strict=True):
            row[column] = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))


class _Fault(Exception):
    """What is wrong with a function's answer; row: whose answer, None where nobody knows."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class RewardFunction:
    """A function of the user's, in a shell that calls it with what it takes and checks its answers."""

    def __init__(
        self, argument: str, where: str, function: Callable[..., Any], may_skip: bool, name: str | None = None
    ) -> None:
        """argument: the one that named it, as --reward_function; where: MODULE:NAME, or with a `name` of its own anything;
        may_skip: whether None is an answer."""
        self.argument, self.where, self.function, self.may_skip = argument, where, function, may_skip
        self.name = name or where.partition(":")[2]
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:  # some builtins have none, and are taken for (prompt, response)
            parameters = {}
        kinds = {name: parameter.kind for name, parameter in parameters.items()}
        self.takes_all = _Kind.VAR_KEYWORD in kinds.values()
        self.judges_one = not set(OF_TRL) & set(kinds) and list(kinds.values()) != [_Kind.VAR_KEYWORD]
        named = [name for name, kind in kinds.items() if kind in NAMED]
        texts = [name for name, kind in kinds.items() if kind not in (_Kind.KEYWORD_ONLY, _Kind.VAR_KEYWORD)][:2]
        self.named = [name for name in named if not (self.judges_one and name in texts)]
        self.needed = [name for name in self.named if parameters[name].default is _Kind.empty]

    def columns(self, found: Sequence[str]) -> list[str]:
        """Those of a data set's columns that the function gets.  Raises InputError where it needs one that is not there."""
        given = () if self.judges_one else OF_TRL
        missing = [name for name in self.needed if name not in (*found, *given)]
        if missing:
            raise InputError(
                f"{self.argument} {self.where} takes {missing[0]}, but the prompt data has no such column, only "
                f"{', '.join(found)}; rename one, or give that argument a default"
            )
        taken = [name for name in found if self.takes_all or name in self.named]
        return [name for name in taken if name not in (*given, "prompt")]

    def judge(self, replies: Replies, state: TrainerState, notes: Notes) -> list[float | None]:
        """A number for each reply, None where the function does not apply.

        Raises InputError, which names prompt and reply, when the function fails, gives another number of answers than there
        are replies, or one that is no finite number.
        """
        try:
            return self._ask(replies, state, notes)
        except _Fault as fault:
            row, reason = fault.row, str(fault)
            if row is None and len(replies.rows) > 1:  # find the one that it is about
                for single in range(len(replies.rows)):
                    try:
                        self._ask(replies.only(single), state, Notes([{}]))
                    except _Fault as own:
                        row, reason = single, str(own)
                        break
            prompt, response = replies.rows[row or 0]["prompt"], replies.responses[row or 0]
            raise InputError(
                f"{self.argument} {self.where} on the prompt {prompt!r:.200} and the reply {response!r:.200} {reason}"
            ) from fault

    def _ask(self, replies: Replies, state: TrainerState, notes: Notes) -> list[float | None]:
        if self.judges_one:
            answers = [
                self._call(number, row["prompt"], response, **self._given(row.get("columns") or {}))
                for number, (row, response) in enumerate(zip(replies.rows, replies.responses, strict=True))
            ]
        else:
            answers = self._call(None, **self._given(self._of_batch(replies, state, notes)))
            try:
                answers = list(answers)
            except TypeError as error:
                raise _Fault(f"gives {answers!r:.100}; it has to give a list of numbers, one a reply") from error
            if len(answers) != len(replies.rows):
                raise _Fault(
                    f"gives {len(answers)} numbers for {len(replies.rows)} replies; it has to give one a reply"
                )
        return [self._number(row, answer) for row, answer in enumerate(answers)]

    def _given(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in arguments.items() if self.takes_all or name in self.named}

    def _of_batch(self, replies: Replies, state: TrainerState, notes: Notes) -> dict[str, Any]:
        """All that TRL's trainers give by name, a list with one entry a reply but for the last three."""
        dialogues = [row.get("turns") for row in replies.rows]
        columns = [row.get("columns") or {} for row in replies.rows]
        return {
            **{name: [each[name] for each in columns] for name in columns[0]},
            "prompts": [turns or row["prompt"] for row, turns in zip(replies.rows, dialogues, strict=True)],
            "completions": [
                [{"role": "assistant", "content": text}] if turns else text
                for text, turns in zip(replies.responses, dialogues, strict=True)
            ],
            "completion_ids": [list(ids) for ids in replies.ids],
            "trainer_state": state,
            "log_extra": notes.log_extra,
            "log_metric": notes.log_metric,
        }

    def _call(self, row: int | None, *texts: str, **arguments: Any) -> Any:
        try:
            answer = self.function(*texts, **arguments)
            return asyncio.run(answer) if inspect.iscoroutine(answer) else answer
        except (InputError, RunError):  # of a function of ours
            raise
        except Exception as error:  # whatever the user's own function does
            fault = f"fails ({type(error).__name__}: {one_line(error)}); it has to give a number for every reply"
            raise _Fault(fault, row) from error

    def _number(self, row: int, answer: Any) -> float | None:
        if answer is None and self.may_skip:
            return None
        try:
            value = float(answer)
        except (
            TypeError,
            ValueError,
            OverflowError,
            RuntimeError,
        ) as error:  # RuntimeError: a tensor of several numbers
            fault = f"gives {answer!r:.100} ({type(error).__name__}: {one_line(error)}); it has to give a number"
            raise _Fault(f"{fault} for every reply", row) from error
        if not abs(value) <= LARGEST:  # NaN too
            raise _Fault(f"gives {value}; it has to give a finite number for every reply", row)
        return value


def load_function(argument: str, where: str, may_skip: bool = False) -> RewardFunction:
    """The function that MODULE:NAME names; the module may also lie in the working folder.

    Raises InputError when there is no such function.
    """
    module_name, _, name = where.partition(":")
    if not module_name or not name:
        raise InputError(f"{argument} {where} is not MODULE:NAME; write for example demo.gold:gold_score")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name, None)
    except (Exception, SystemExit) as error:  # whatever the user's own module does when it is imported
        raise InputError(
            f"{argument} {where}: cannot import {module_name} ({type(error).__name__}: {one_line(error)}); give a "
            "module that Python finds here"
        ) from error
    if not callable(function):
        raise InputError(
            f"{argument} {where}: {module_name} has no function {name}, found {function!r:.100}; correct the name"
        )
    return RewardFunction(argument, where, function, may_skip)


def load_functions(argument: str, where: str) -> list[RewardFunction]:
    """Several functions, joined by commas; two of one name are called by their modules too."""
    functions = [load_function(argument, each.strip(), may_skip=True) for each in where.split(",")]
    names = [function.name for function in functions]
    for function in functions:
        if names.count(function.name) > 1:
            function.name = function.where
    if len({function.name for function in functions}) < len(functions):
        raise InputError(f"{argument} {where} names a function twice; give it once, and change its --reward_weights")
    return functions


def try_function(function: RewardFunction, row: dict[str, Any], end_id: int) -> None:
    """Call it once, with the reply that is the hardest to judge, before a weight is loaded.  Raises InputError."""
    function.judge(Replies([row], [""], [[end_id]]), TrainerState(), Notes([{}]))


def carried_columns(functions: Sequence[RewardFunction], found: Sequence[str]) -> list[str] | None:
    """What `tokenize_prompts` has to carry along for these functions, None without any."""
    wanted = {name for function in functions for name in function.columns(found)}
    return [name for name in found if name in wanted] if functions else None
