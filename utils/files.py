"""Files that are whole or not there at all, JSON and JSON lines, and one line for the user where the disk fails."""

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.console import InputError, RunError, one_line

ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on the size of a file",
    errno.EROFS: "make the folder writable",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.ENOENT: "bring the output folder back",
    errno.ENOTDIR: "bring the output folder back",
}
# Not only an OSError carries the system's number: safetensors and tokenizers (Rust) and shutil have it in their text alone.
NUMBER = re.compile(r"(?:os error |code: |Errno )(\d+)")
TORCH_ERROR = re.compile(r"PytorchStreamWriter|inline_container|iostream error|cannot be opened|does not exist")


def read_json_object(path: str) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file.  Raises InputError when the file is something else."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {one_line(error)}; is the file complete?") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object; restore the file or remove it")
    return content


def _disk_error(error: Exception) -> tuple[int | None, str] | None:
    """Number and text of the system's error behind an exception; None where the disk had nothing to do with it."""
    number = NUMBER.search(str(error))
    if number:
        return int(number[1]), os.strerror(int(number[1]))
    if isinstance(error, OSError):
        return None, one_line(error)
    if isinstance(error, RuntimeError) and TORCH_ERROR.search(str(error)):
        return None, "the file cannot be written to its end, as on a full disk"
    return None


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Turn a failure of the disk inside the block into one line that names `path`.  Raises RunError."""
    try:
        yield
    except Exception as error:
        found = _disk_error(error)
        if found is None:
            raise
        number, reason = found
        advice = ADVICE.get(number, "see to the disk and the folder")
        raise RunError(
            f"cannot write {path}: {reason}; {advice}, then go on with --resume_from_checkpoint true (checkpoints "
            "that were made before are not touched)"
        ) from error


def write_json(content: Any, *path: str) -> None:
    """Write JSON that a person can read.  A kill in here leaves the old file.  Raises RunError where the disk fails."""
    target = os.path.join(*path)
    with saving(target):
        with open(target + ".new", "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=2, default=str)
            file.write("\n")
        os.replace(target + ".new", target)


@contextlib.contextmanager
def folder_when_done(target: str) -> Iterator[str]:
    """A folder to write into, which becomes `target` when the block ends well and disappears with all in it if not.

    It lies beside `target`, to be on its disk; what already was an empty folder is replaced.
    """
    target = os.path.realpath(target)
    parent = os.path.dirname(target)
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished_", dir=parent) as temporary:
        folder = os.path.join(temporary, "folder")
        os.mkdir(folder)
        yield folder
        os.replace(folder, target)


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def append_jsonl(rows: list[dict[str, Any]], *path: str) -> None:
    """Add rows at the end of a JSON-lines file.  Raises RunError where the disk fails."""
    with saving(os.path.join(*path)), open(os.path.join(*path), "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def drop_rows_after(path: str, key: str, last: int) -> None:
    """Forget the rows whose `key` is above `last`: a resumed run writes them again.

    So is a last line without its end, which a process leaves behind that is killed while it writes.
    """
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            rows = [json.loads(line) for line in file if line.endswith("\n")]
        replace_jsonl(path, [row for row in rows if row.get(key, 0) <= last])


def replace_jsonl(path: str, rows: list[dict[str, Any]]) -> None:
    """Let a JSON-lines file hold these rows.  A kill in here leaves the old file.  Raises RunError where the disk fails."""
    with saving(path):
        with open(path + ".new", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(path + ".new", path)
