"""A full disk, a read-only and a vanished output folder: one line, exit code 1, and every earlier checkpoint as it was.

The full disk is a limit on the size of a file: the write itself fails, inside each library, as it does on a full disk.
"""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from runs.checkpoints import find_fault
from tests.conftest import make_tokenizer
from tests.forks import start, wait_until
from tests.stress.kill_and_resume import arguments_of, newest_whole, steps_done
from utils.console import RunError
from utils.files import append_jsonl, saving, write_json


def last_line(folder: Path) -> str:
    """The one line of the error; there is no traceback."""
    log = (folder / "log.txt").read_text(encoding="utf-8")
    assert "Traceback" not in log, log[-3000:]
    return log.splitlines()[-1]


def whole_checkpoints(run: Path) -> dict[str, dict[str, bytes]]:
    found = {}
    for checkpoint in sorted(run.glob("checkpoint-*")):
        assert find_fault(checkpoint) is None
        found[checkpoint.name] = {str(path): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    return found


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("sft", "adapter_model.safetensors"),
        ("reward", "optimizer.pt"),
        ("ppo", "tokenizer.json"),
        ("ppo", "samples.jsonl"),
    ],
)
def test_a_full_disk_while_it_saves(tmp_path: Path, stage: str, file: str) -> None:
    """The limit is just below the size of one file of the second checkpoint, which another library writes each time.

    The run goes on afterwards, from the checkpoint before.
    """
    steps = "--steps" if stage == "ppo" else "--max_steps"
    arguments = [*arguments_of(stage, tmp_path), steps, "4"]
    run = tmp_path / "run"
    process = start(stage, arguments, tmp_path)
    process.join(200)
    assert process.exitcode == 0
    before = whole_checkpoints(run)
    assert list(before) == ["checkpoint-4"]
    arguments[-1] = "8"
    if file == "samples.jsonl":  # let it be the largest file
        append_jsonl([{"iteration": 0, "response": "x" * 500_000}], str(run), file)
        limit = (run / file).stat().st_size
    else:
        limit = (run / "checkpoint-4" / file).stat().st_size - 1
    process = start(stage, arguments, tmp_path, file_limit=limit)
    process.join(200)
    assert process.exitcode == 1
    line = last_line(tmp_path)
    assert line.startswith("error: cannot write run/")
    assert "then go on with --resume_from_checkpoint true" in line
    assert whole_checkpoints(run) == before
    assert not (run / "unfinished").exists()
    process = start(stage, arguments, tmp_path)
    process.join(200)
    assert process.exitcode == 0
    assert newest_whole(run) == "checkpoint-8"


@pytest.mark.parametrize("stage", ["ppo", "sft"])
def test_an_output_folder_that_vanishes(tmp_path: Path, stage: str) -> None:
    """The Trainer would make a new one and write on, into a place that nobody looks at."""
    run = tmp_path / "run"
    process = start(stage, arguments_of(stage, tmp_path), tmp_path)
    assert wait_until(lambda: steps_done(run) >= 1, process)
    os.rename(run, tmp_path / "elsewhere")
    process.join(200)
    assert process.exitcode == 1
    assert last_line(tmp_path).startswith("error: cannot write run/")
    assert "No such file or directory; bring the output folder back" in last_line(tmp_path)
    assert not run.exists()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """The tests may run as root, whom no mode stops: so a file lies where the folder of the checkpoint has to go."""
    run = tmp_path / "run"
    process = start("reward", arguments_of("reward", tmp_path), tmp_path)
    assert wait_until((run / "checkpoint-4").exists, process)
    before = (run / "checkpoint-4" / "adapter_model.safetensors").read_bytes()
    while process.is_alive():
        try:
            (run / "unfinished").touch(exist_ok=False)
            break
        except FileExistsError:
            continue
    process.join(200)
    assert process.exitcode == 1
    assert last_line(tmp_path).startswith("error: cannot write run/checkpoint-")
    assert (run / "checkpoint-4" / "adapter_model.safetensors").read_bytes() == before
    assert find_fault(run / "checkpoint-4") is None


def test_each_failure_of_the_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    """Python, Rust (safetensors, tokenizers) and C++ (torch) each have words of their own for the same thing."""
    missing = tmp_path / "missing"
    writers = {
        "No such file or directory": [
            lambda: append_jsonl([{}], str(missing), "metrics.jsonl"),
            lambda: write_json({}, str(missing), "run.json"),
            lambda: save_file({"a": torch.zeros(1)}, missing / "a.safetensors"),
            lambda: make_tokenizer().backend_tokenizer.save(str(missing / "tokenizer.json")),
        ],
        "cannot be written": [lambda: torch.save({}, missing / "a.pt")],
    }
    for reason, of_reason in writers.items():
        for write in of_reason:
            with pytest.raises(RunError, match=f"^cannot write .*: .*{reason}.*, then go on"):
                with saving(missing):
                    write()
    for number, advice in (
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EFBIG, "raise the limit on the size of a file"),
        (errno.EROFS, "make the folder writable"),
        (errno.EACCES, "make the folder writable"),
        (errno.ENOTDIR, "bring the output folder back"),
        (errno.EIO, "see to the disk and the folder"),
    ):
        with pytest.raises(RunError, match=f": {os.strerror(number)}; {advice}, then go on with --resume"):
            with saving(tmp_path):
                raise OSError(number, os.strerror(number))
    with pytest.raises(RunError, match="No space left on device; make room"), saving(tmp_path):
        raise SafetensorError(
            'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space" }'
        )
    with pytest.raises(RunError, match=r"cannot write .*: in words; see to the disk"), saving(tmp_path):
        raise OSError("in words")
    shutil.rmtree(missing, ignore_errors=True)


def test_a_mistake_in_the_program_is_no_failure_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(KeyError), saving(tmp_path):
        raise KeyError("state")
    with pytest.raises(RuntimeError, match="shapes"), saving(tmp_path):
        raise RuntimeError("shapes differ")
