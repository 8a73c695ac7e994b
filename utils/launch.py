"""Started plainly with several visible GPUs, a script restarts itself under accelerate's launcher, one process a GPU.

`CUDA_VISIBLE_DEVICES=0,1,2 python rl_training.py ...` then means what its author expects. Without this the Trainer
would see three GPUs in one process and fall back to nn.DataParallel.
"""

import os
import sys
from collections.abc import Mapping

# Each launcher sets at least one of these in the processes it starts. SLURM_* is left out on purpose: inside an
# allocation every process has them, one that a user started by hand too.
ACCELERATE_SIGN = "ACCELERATE_DYNAMO_MODE"
LAUNCHER_SIGNS = (
    "LOCAL_RANK",  # torchrun, deepspeed, and accelerate launch with several processes
    "RANK",
    "WORLD_SIZE",
    ACCELERATE_SIGN,  # accelerate launch --num_processes 1: no rank is set, and one process was asked for
    "OMPI_COMM_WORLD_RANK",  # mpirun of Open MPI
    "MV2_COMM_WORLD_RANK",  # MVAPICH2
    "PMI_RANK",  # Intel MPI and MPICH
)


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "t", "yes", "y", "on")


def _wants_cpu(argv: list[str], environ: Mapping[str, str]) -> bool:
    """Whether ACCELERATE_USE_CPU or the TrainingArguments flag says so: --use_cpu, --use_cpu true, --use-cpu=true."""
    wanted = _is_true(environ.get("ACCELERATE_USE_CPU", "false"))
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--use_cpu", "--use-cpu"):
            if not equals:
                value = "true" if following.startswith("-") else following
            wanted = _is_true(value)
    return wanted


def launch_command(argv: list[str], environ: Mapping[str, str], gpu_count: int) -> list[str] | None:
    """The command that runs argv with one process a GPU, or None where this process should simply go on.

    argv: sys.argv, the script path first. None for fewer than two GPUs, for a run on the CPU, and where a launcher
    already started this process. A `use_cpu` inside a --config file is not seen here.
    """
    if gpu_count < 2 or any(sign in environ for sign in LAUNCHER_SIGNS) or _wants_cpu(argv, environ):
        return None
    # Every value is spelled out, because accelerate fills what is missing from the user's default_config.yaml (written
    # once by `accelerate config`, long forgotten) and warns about what it finds nowhere.
    options = {
        "--num_processes": str(gpu_count),
        "--num_machines": "1",
        "--machine_rank": "0",
        "--gpu_ids": "all",  # all that CUDA_VISIBLE_DEVICES shows
        "--mixed_precision": environ.get("ACCELERATE_MIXED_PRECISION", "no"),  # --bf16 of the script still wins
        "--dynamo_backend": "no",
        "--main_process_port": "0",  # any free port: two runs on one machine do not collide
    }
    flags = [word for option in options.items() for word in option]
    return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *flags, *argv]


def lost_processes(environ: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` was asked for several processes and started one, which it does on a CPU without a word.

    It then says where they were to meet, and gives no process a rank.
    """
    ranks = [sign for sign in LAUNCHER_SIGNS if sign != ACCELERATE_SIGN]
    return {ACCELERATE_SIGN, "MASTER_PORT"} <= environ.keys() and not any(sign in environ for sign in ranks)


def relaunch_on_all_gpus() -> None:
    """Replace this process by a launcher with one process a GPU, or return where there is nothing to do.

    main() of a script calls it as soon as the arguments are parsed: so one process, not one a GPU, says what is wrong with
    them, and --help and --plan start no others.  A program that imports a script and calls its main() would be replaced
    too: it has to hide the GPUs (CUDA_VISIBLE_DEVICES="") or say --use_cpu.
    """
    import torch

    command = launch_command(sys.argv, os.environ, torch.cuda.device_count())
    if command is None:
        return
    print(f"{torch.cuda.device_count()} visible GPUs: restarting as one process a GPU: {' '.join(command)}", flush=True)
    os.execv(command[0], command)
