"""What a script does with the memory that it frees."""

import platform
import sys
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import torch

from runs.memory_plan import resident_bytes
from tests.forks import from_server
from utils.console import keep_freed_memory, run_script

BLOCK = 24 << 20  # bytes: large enough that glibc gives it back to Linux, unless it is told otherwise

only_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="mallopt is a function of glibc on Linux"
)


def measure(connection: Connection) -> None:
    """Send how many bytes stay resident of a block that a script has used and freed."""
    torch.set_num_threads(1)

    def main() -> None:
        before = resident_bytes()
        block = torch.ones(BLOCK // 4)
        del block
        connection.send(resident_bytes() - before)

    run_script(main)


def kept_bytes() -> int:
    """`measure` in a process of its own: what mallopt changes cannot be taken back."""
    context = from_server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sender,))
    process.start()
    assert receiver.poll(120)
    found = receiver.recv()
    process.join(120)
    return found


@only_glibc
def test_a_script_keeps_what_it_frees() -> None:
    """mallopt takes any number without a word: only the resident memory shows that it did something."""
    assert kept_bytes() > BLOCK / 2


@only_glibc
@pytest.mark.parametrize(
    ("variable", "left"),
    [("MALLOC_MMAP_THRESHOLD_", [(-1, 2**31 - 1)]), ("MALLOC_TRIM_THRESHOLD_", [(-3, 2**25)])],
)
def test_a_users_own_setting_of_the_allocator_stays(
    monkeypatch: pytest.MonkeyPatch, variable: str, left: list[tuple[int, int]]
) -> None:
    """benchmarks/plan.py sets both, so that freed memory goes back; the scripts it measures silently replaced them.

    What mallopt is asked for, with the numbers of glibc's malloc.h: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD -3.  The
    resident memory was measured here once, and the test failed about once in two hundred times: with one of the two
    settings the block lies on the heap, and goes back to Linux only where nothing happens to lie above it.
    """
    asked = []
    library = SimpleNamespace(mallopt=lambda parameter, value: asked.append((parameter, value)))
    monkeypatch.setattr("utils.console.ctypes.CDLL", lambda name: library)
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "65536")
    keep_freed_memory()
    assert asked == left
