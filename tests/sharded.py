"""Runs scripts one after the other with the parameters spread over two processes on the CPU: FSDP2, ZeRO-2, ZeRO-3.

accelerate ignores FSDP and DeepSpeed on the CPU without a word, and the run passes as plain DDP with the same numbers.  So
the two lines under `pretend_gpus` tell it that the CPU is a GPU, and each process writes down what really ran.  That shows
that the trainers' own logic is right; it says nothing about GPUs.

`run_two(JOBS, sharded.main)` of tests/forks.py; JOBS is a JSON file: [["sft_training.py", "--output_dir", ...], ...].
"""

import json
import os
import runpy
import sys
from argparse import Namespace
from pathlib import Path

from tests.double import use_float64

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "accelerate"


def read_config(name: str) -> Namespace:
    """What `accelerate launch` makes of a file in configs/accelerate."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "script.py"])
    args, defaults, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return args


def launcher_environment(name: str) -> dict[str, str]:
    """The variables by which `accelerate launch` tells the processes what the file says."""
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    args = read_config(name)
    args.main_process_port = 0
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def pretend_gpus() -> None:
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def main() -> None:
    import torch
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    use_float64()
    pretend_gpus()
    for script, *arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        folder = Path(arguments[arguments.index("--output_dir") + 1])
        ran = f"{AcceleratorState().distributed_type.value} {torch.distributed.get_world_size()}"
        (folder / f"ran_{os.environ['RANK']}.txt").write_text(ran, encoding="utf-8")
    torch.distributed.destroy_process_group()
