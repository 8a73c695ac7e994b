"""Checkpoints that are whole or not there at all.

A checkpoint is written to OUTPUT/unfinished/, flushed to the disk and then renamed to OUTPUT/checkpoint-N.  Its last file,
complete.json, lists all others with their sizes, so that a half copied or half deleted one is recognised as well.
"""

import json
import os
from pathlib import Path

from transformers import TrainingArguments

from utils.arguments import check_new_folder
from utils.console import InputError, say

UNFINISHED = "unfinished"  # folder in the output folder where the next checkpoint grows
COMPLETE_FILE = "complete.json"


def flush(path: str | Path) -> None:
    """Make the system write a file, or the names in a folder, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: str | Path) -> None:
    """Write complete.json into a finished checkpoint, and all of it to the disk."""
    folder = Path(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.name != COMPLETE_FILE]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.is_file()}
    (folder / COMPLETE_FILE).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    for path in (*paths, folder / COMPLETE_FILE, folder):
        flush(path)


def find_fault(checkpoint: str | Path) -> str | None:
    """What a checkpoint folder lacks, in words; None for a whole one."""
    try:
        sizes = json.loads((Path(checkpoint) / COMPLETE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"there is no {COMPLETE_FILE} in it, which is written last"
    for name, size in sizes.items():
        path = Path(checkpoint) / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def resume_path(training_args: TrainingArguments, stage: str) -> str | None:
    """Checkpoint folder that --resume_from_checkpoint names; `true` means the newest whole one in the output folder.

    None means a start from the beginning, with `true` as well where no checkpoint was made yet, so that one command line
    can start a run and go on with it.  Raises InputError when the folder that was named is missing or not whole, or when
    the output folder holds something else than a run of this stage ("sft", "reward", "ppo").
    """
    wanted = training_args.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not os.path.isdir(wanted):
            raise InputError(f"there is no checkpoint folder {wanted}; give --resume_from_checkpoint true or a folder")
        fault = find_fault(wanted)
        if fault is not None:
            raise InputError(
                f"the checkpoint {wanted} is not whole: {fault}; give another one, or --resume_from_checkpoint true for "
                "the newest whole one"
            )
        return wanted
    output = Path(training_args.output_dir)
    found = _stage_of(output)
    if found not in (None, stage):
        raise InputError(
            f"the output folder {output} holds a run of stage {found}, not {stage}; give another --output_dir"
        )
    for leftover in output.glob(f"{UNFINISHED}/checkpoint-*"):
        say(f"warning: {leftover} is not whole, the run ended while it saved; it is left out")
    for checkpoint in sorted(output.glob("checkpoint-*"), key=_checkpoint_number, reverse=True):
        fault = find_fault(checkpoint)
        if fault is None:
            say(f"going on from {checkpoint}")
            return str(checkpoint)
        say(f"warning: {checkpoint} is not whole: {fault}; it is left out")
    if found is None:
        check_new_folder(training_args.output_dir)
    say(f"there is no whole checkpoint in {output}: the run starts from the beginning")
    return None


def _stage_of(output: Path) -> str | None:
    """Stage of the run that an output folder holds; None where it holds none."""
    try:
        return json.loads((output / "run.json").read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checkpoint_number(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


# ---------------------------------------------------------------------------------------------------------------------
# Where the disk fails
# ---------------------------------------------------------------------------------------------------------------------
