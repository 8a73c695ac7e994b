"""Runs of the scripts in processes of their own, to be killed, stopped and starved; or in two that belong together.

They start in a moment: each is forked from one server process that has imported everything and computed nothing.
"""

import gc
import json
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from accelerate import PartialState

import reward_modeling
import rl_training
import sft_training
from tests.double import use_float64
from utils.console import run_script

SCRIPTS = {"sft": sft_training, "reward": reward_modeling, "ppo": rl_training}
ROOT = Path(__file__).parent.parent
gc.freeze()  # of the server: its children would look through all that it has imported when they collect garbage


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
    _write_to("log.txt")
    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [f"{SCRIPTS[stage].__name__}.py", *arguments, "--use_cpu", "true", "--disable_tqdm", "true"]
    run_script(SCRIPTS[stage].main)


def _write_to(path: str) -> None:
    """Send what this process says to a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)


def start_command(words: Sequence[object], folder: Path, streams: Sequence[str], **environment: str) -> BaseProcess:
    """Start [script, *arguments] in `folder`, as `python` would; streams: files for its stdin, stdout and stderr."""
    environment = {**os.environ, **environment}
    process = from_server().Process(target=_command, args=([*map(str, words)], str(folder), streams, environment))
    process.start()
    return process


def run_command(words: Sequence[object], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run [script, *arguments] in `folder` as `python` would, without the ten seconds of its imports."""
    with tempfile.TemporaryDirectory() as kept:
        out, err = Path(kept, "out"), Path(kept, "err")
        process = start_command(words, folder, [os.devnull, str(out), str(err)], **environment)
        process.join(300)
        process.kill()
        process.join()
        shown = [path.read_text(encoding="utf-8") for path in (out, err)]
    return subprocess.CompletedProcess(words, process.exitcode, *shown)


def _command(words: list[str], folder: str, streams: Sequence[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.setsid()
    for number, path in enumerate(streams):
        os.dup2(os.open(path, (os.O_WRONLY if number else os.O_RDONLY) | os.O_CREAT | os.O_NOCTTY, 0o644), number)
    # what Python makes of them at its start
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    sys.stderr.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_two(jobs: Path, work: Callable[[], None], **environment: str) -> None:
    """Do `work` in two processes, each with the environment that torchrun gives it and `jobs` as its one argument.

    On the CPU as far as accelerate knows.  Raises AssertionError with the end of their output when one of them fails.
    """
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    _run_together(jobs, work, [{**shared, **environment, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")])


def run_one(jobs: Path, work: Callable[[], None]) -> None:
    """Do `work` in one process, which knows of no others; see `run_two`."""
    _run_together(jobs, work, [{}])


def _run_together(jobs: Path, work: Callable[[], None], environments: list[dict[str, str]]) -> None:
    logs = [jobs.with_suffix(f".{rank}.log") for rank in range(len(environments))]
    processes = [
        from_server().Process(target=_run_rank, args=({"ACCELERATE_USE_CPU": "true", **own}, str(jobs), work, str(log)))
        for own, log in zip(environments, logs, strict=True)
    ]
    end = time.monotonic() + 300
    for process in processes:
        process.start()
    # one that has failed leaves the other waiting for it
    while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    shown = "\n".join(log.read_text(encoding="utf-8", errors="replace")[-6000:] for log in logs if log.exists())
    assert [process.exitcode for process in processes] == [0] * len(processes), shown


def _run_rank(environment: dict[str, str], jobs: str, work: Callable[[], None], log: str) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    _write_to(log)
    torch.set_num_threads(1)
    sys.argv = ["jobs", jobs]
    work()


def run_jobs() -> None:
    """Run several scripts one after the other, as their command lines would; sys.argv[1] is a JSON file of those.

    Leaves a file that says how many processes there were: `accelerate launch --cpu` once silently ran a single one.
    """
    for script, *arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        folder = Path(arguments[arguments.index("--output_dir") + 1])
        state = PartialState()
        (folder / f"world_{state.process_index}.txt").write_text(f"{state.num_processes}", encoding="utf-8")
    if state.num_processes > 1:
        torch.distributed.destroy_process_group()


def run_jobs_in_float64() -> None:
    use_float64()
    run_jobs()


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
