"""What a script says and how it ends: one line for what a user can understand, a traceback for everything else."""

import ctypes
import io
import os
import platform
import signal
import sys
import unicodedata
from collections.abc import Callable

BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class InputError(Exception):
    """Something that the user gave is wrong.  The message says what is wrong, what was found and what to do.

    It is one line, whatever the values of the user in it hold.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class RunError(Exception):
    """A run cannot go on, though its input is right: a full disk, numbers that are not finite.  The message says why."""


class Preempted(Exception):
    """SIGTERM or SIGINT ended a run, after its step and with a checkpoint.  signal_number: which of the two."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def one_line(error: Exception) -> str:
    """A library's message, which may run over many lines, as part of one of ours."""
    return " ".join(str(error).split())[:300]


def is_main_process() -> bool:
    """Whether this is the first process of the run: the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def printable(text: str) -> str:
    """Text without what drives a terminal or turns the order of a line around; line ends and tabs stay.

    Replies, and names and values out of downloaded files, may hold anything.
    """
    return "".join(c for c in text if c in "\n\t" or not (unicodedata.category(c) == "Cc" or c in BIDI_CONTROLS))


def say(line: str) -> None:
    """One line for the user on stderr, from the first process alone."""
    if is_main_process():
        print(printable(line), file=sys.stderr, flush=True)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, instead of giving it back to Linux page by page.

    A forward pass on a CPU frees and takes the same megabytes again and again; each time Linux clears the pages.  Without
    this a PPO iteration takes about an eighth longer (benchmarks/ppo_iteration.py, two cores).  Elsewhere than on Linux
    with glibc it does nothing; what the user has set with glibc's own variables stays.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
            mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest value that there may be
        if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: likewise


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; what a user can understand becomes one line on stderr, anything else keeps its traceback.

    Exit codes: 2 for an InputError, 1 for a RunError, 128 + the number of the signal for a run that one ended.
    """
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a line at once, and in its place where a file gets stderr too
        sys.stdout.reconfigure(line_buffering=True)
    try:
        main()
    except (InputError, RunError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except Preempted as stop:
        say(str(stop))
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(128 + signal.SIGINT)
