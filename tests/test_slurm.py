"""scripts/slurm_train.sh with stand-ins for Slurm's commands and for the training script."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAKES = {
    "scontrol": 'echo "scontrol $*" >> calls.txt; [ "$1" != show ] || printf "node7\\nnode8\\n"',
    "srun": 'echo $$ > srun.pid; export SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4; exec "$@"',
    "scancel": 'echo "scancel $*" >> calls.txt; kill -TERM "$(cat srun.pid)"',
}
# Does what the name of its last file says: waits for SIGTERM and saves, like a real run, or ends at once.
TRAINING = """
import os, signal, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
print("training", sys.argv[1:], [os.environ[name] for name in names], flush=True)
code = int(sys.argv[2])
if code == 143 and sys.argv[4] == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    open("ready", "w").close()
    time.sleep(60)
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "training.py").write_text(TRAINING)
    return tmp_path


def submit(folder: Path, *words: str) -> subprocess.Popen:
    variables = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "40123",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "slurm_train.sh"), *words],
        cwd=folder,
        env={**os.environ, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def calls(folder: Path) -> list[str]:
    return (folder / "calls.txt").read_text().splitlines()


def test_a_job_whose_time_is_up_is_queued_again(folder: Path) -> None:
    job = submit(folder, "training.py", "--code", "143", "--then", "waits")
    for _ in range(1000):
        if (folder / "ready").exists():
            break
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 143
    # the same command starts the run and goes on with it; the fourth process of all, the second on its node
    words = "['--code', '143', '--then', 'waits', '--resume_from_checkpoint', 'true']"
    assert f"training {words} ['3', '1', '4', 'node7', '20123']" in output
    assert calls(folder) == [
        "scontrol show hostnames node[7-8]",
        "scancel --signal=TERM 40123",
        "scontrol requeue 40123",
    ]


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_a_job_that_ends_by_itself_is_not_queued_again(folder: Path, code: int) -> None:
    """Not even with 143: a process that dies while others are killed would come back for ever."""
    job = submit(folder, "training.py", "--code", str(code), "--then", "ends")
    job.communicate(timeout=30)
    assert job.returncode == code
    assert calls(folder) == ["scontrol show hostnames node[7-8]"]


def test_a_job_without_a_script_is_one_line(folder: Path) -> None:
    job = submit(folder, "--config", "x.yaml")
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 2
    assert output.startswith("error: give a training script, found '--config'")
    assert not (folder / "calls.txt").exists()
