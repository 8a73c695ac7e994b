"""Runs of the scripts in processes of their own, to be killed, stopped and starved.

They start in a moment: each is forked from one server process that has imported everything and computed nothing.
"""

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import reward_modeling
import rl_training
import sft_training
from utils.arguments import run_script

SCRIPTS = {"sft": sft_training, "reward": reward_modeling, "ppo": rl_training}
ROOT = Path(__file__).parent.parent


def from_server() -> BaseContext:
    """The context whose processes are forked from the server."""
    os.environ["PYTHONPATH"] = str(ROOT)  # of the server, which imports this module by name
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def start(stage: str, arguments: Sequence[object], folder: Path, file_limit: int | None = None) -> BaseProcess:
    """Start a script as its command line would, with `folder` as the current one; its output goes to folder/log.txt.

    file_limit: the largest size of a file, in bytes, that it may write; a stand-in for a full disk.
    """
    arguments = (stage, list(map(str, arguments)), str(folder), file_limit)
    process = from_server().Process(target=_run, args=arguments)
    process.start()
    return process


def _run(stage: str, arguments: list[str], folder: str, file_limit: int | None) -> None:
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [f"{SCRIPTS[stage].__name__}.py", *arguments, "--use_cpu", "true", "--disable_tqdm", "true"]
    run_script(SCRIPTS[stage].main)


def wait_until(happened: Callable[[], object], process: BaseProcess, seconds: float = 120) -> bool:
    """Look every millisecond until `happened` (True), or the process has ended first (False)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happened():
            return True
        if not process.is_alive():
            return bool(happened())
        time.sleep(0.001)
    raise TimeoutError(f"nothing in {seconds} s")
