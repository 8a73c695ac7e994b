"""Gold: a true score of a reply, where the user has one (a rule, a verifier, unit tests).  Measured and never trained on.

A reward model is an imitation.  Where its score rises and gold falls, the policy has found what it likes by mistake.
"""

import importlib
import os
import sys
from collections.abc import Callable

import torch

from utils.console import InputError, RunError, one_line

Gold = Callable[[str, str], float]
LARGEST = torch.finfo(torch.float32).max  # of a number that the processes can exchange


def load_gold(where: str) -> Gold:
    """The function (prompt, response) -> number that --gold_function MODULE:NAME names, in a shell that checks its answers.

    The module may also lie in the working folder.  Raises InputError when there is no such function; the shell raises
    RunError, which names the prompt, when the function fails or gives no finite number.
    """
    module_name, _, name = where.partition(":")
    if not module_name or not name:
        raise InputError(f"--gold_function {where} is not MODULE:NAME; write for example demo.gold:gold_score")
    sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's own module does when it is imported
        raise InputError(
            f"--gold_function {where}: cannot import {module_name} ({type(error).__name__}: {one_line(error)}); give a "
            "module that Python finds here"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(
            f"--gold_function {where}: {module_name} has no function {name}, found {function!r:.100}; correct the name"
        )

    def gold(prompt: str, response: str) -> float:
        case = f"--gold_function {where} on the prompt {prompt!r:.200} and the reply {response!r:.200}"
        try:
            value = float(function(prompt, response))
        except Exception as error:
            raise RunError(
                f"{case} fails ({type(error).__name__}: {one_line(error)}); it has to give a number for every reply"
            ) from error
        if not abs(value) <= LARGEST:  # NaN too
            raise RunError(f"{case} gives {value}; it has to give a finite number for every reply")
        return value

    return gold


def try_gold(gold: Gold, prompt: str) -> None:
    """Call it once, with the reply that is the hardest to judge, before a weight is loaded.  Raises InputError."""
    try:
        gold(prompt, "")
    except RunError as error:
        raise InputError(str(error)) from error
