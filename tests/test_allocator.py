"""What a script does with the memory that it frees."""

import os
import platform
import sys
from multiprocessing.connection import Connection

import pytest
import torch

from tests.forks import from_server
from utils.arguments import run_script
from utils.plan import resident_bytes

BLOCK = 24 << 20  # bytes: large enough that glibc gives it back to Linux, unless it is told otherwise

only_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="mallopt is a function of glibc on Linux"
)


def measure(connection: Connection, environment: dict[str, str]) -> None:
    """Send how many bytes stay resident of a block that a script has used and freed."""
    os.environ.update(environment)

    def main() -> None:
        before = resident_bytes()
        block = torch.ones(BLOCK // 4)
        del block
        connection.send(resident_bytes() - before)

    run_script(main)


def kept_bytes(**environment: str) -> int:
    """`measure` in a process of its own: what mallopt changes cannot be taken back."""
    context = from_server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sender, environment))
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
@pytest.mark.parametrize("variable", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_a_users_own_setting_of_the_allocator_stays(variable: str) -> None:
    """benchmarks/plan.py sets both, so that freed memory goes back; the scripts it measures silently replaced them."""
    assert kept_bytes(**{variable: "65536"}) < BLOCK / 2
