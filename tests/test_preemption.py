"""SIGTERM and SIGINT: the step finishes, a checkpoint is saved, the exit code says which signal it was."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forks import ROOT, start, wait_until
from tests.stress.kill_and_resume import STEPS, arguments_of, newest_whole, steps_done
from utils.files import read_jsonl

CLOCK = re.compile("seconds|per_second|runtime")


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8", errors="replace") if (folder / "log.txt").exists() else ""


def says(folder: Path, words: str) -> Callable[[], bool]:
    return lambda: words in log_of(folder)


@pytest.mark.parametrize(
    ("stage", "number"), [("ppo", signal.SIGTERM), ("sft", signal.SIGINT), ("reward", signal.SIGTERM)]
)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    """Stopped between two checkpoints; the resumed run writes the lines that it would have written anyway."""
    arguments = arguments_of(stage, tmp_path)
    run = tmp_path / "run"
    process = start(stage, arguments, tmp_path)
    assert wait_until(lambda: steps_done(run) >= 1, process)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == 128 + number
    step = int(newest_whole(run).partition("-")[2])
    assert 1 <= step < STEPS
    name = "iteration" if stage == "ppo" else "step"
    assert f"{number.name}: this step, a checkpoint, then the end" in log_of(tmp_path)
    assert f"stopped by {number.name} after {name} {step} of {STEPS}, which is saved; go on with" in log_of(tmp_path)
    assert "Traceback" not in log_of(tmp_path)
    short = STEPS // 2  # enough to see that it goes on
    arguments += ["--steps" if stage == "ppo" else "--max_steps", str(max(short, step + 1))]
    process = start(stage, arguments, tmp_path)
    process.join(240)
    assert process.exitcode == 0
    assert f"going on from run/checkpoint-{step}" in log_of(tmp_path)
    steps = [row[name] for row in read_jsonl(str(run / "metrics.jsonl")) if "learning_rate" in row]
    assert steps == sorted(set(steps))


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    """A person who presses Ctrl-C twice does not want to wait for an iteration of ten minutes."""
    process = start("ppo", [*arguments_of("ppo", tmp_path), "--ppo_epochs", "2000"], tmp_path)
    assert wait_until((tmp_path / "run" / "best").exists, process)  # the first iteration, which takes minutes
    os.kill(process.pid, signal.SIGINT)
    assert wait_until(says(tmp_path, "SIGINT: this step, a checkpoint"), process)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == -signal.SIGINT
    assert newest_whole(tmp_path / "run") == "the beginning"


# Started by torchrun in each of two processes; leaves its exit code in a file of its own.
RUNNER = """
import os, runpy, sys
sys.argv = sys.argv[1:]
rank = os.environ["RANK"]
open(f"pid_{rank}", "w").write(str(os.getpid()))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    open(f"code_{rank}", "w").write(str(end.code))
    raise
"""


def test_both_processes_stop_at_the_same_step_when_one_gets_the_signal(tmp_path: Path) -> None:
    """Processes that disagree about the last step wait for each other for ever."""
    (tmp_path / "runner.py").write_text(RUNNER)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "runner.py"]
    command += [str(ROOT / "sft_training.py"), *arguments_of("sft", tmp_path), "--disable_tqdm", "true"]
    command += ["--logging_steps", "1"]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    end = time.monotonic() + 200
    while steps_done(tmp_path / "run") < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid_1").read_text()), signal.SIGTERM)
    process.wait(200)
    assert [(tmp_path / f"code_{rank}").read_text() for rank in (0, 1)] == ["143", "143"], log_of(tmp_path)
    step = int(newest_whole(tmp_path / "run").partition("-")[2])
    assert f"stopped by SIGTERM after step {step} of {STEPS}" in log_of(tmp_path)
    names = {path.name for path in (tmp_path / "run" / f"checkpoint-{step}").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "loop_state_0.json", "loop_state_1.json"} <= names
