"""What the three training scripts do alike between their arguments and their data."""

import math
import os
import sys

import torch
from transformers import TrainingArguments, set_seed

from reporting.trackers import check_trackers
from runs.checkpoints import resume_path
from utils.arguments import ModelArguments, check_output_dir, choose_precision
from utils.console import say
from utils.launch import lost_processes, relaunch_on_all_gpus
from utils.quiet import hide_progress_bars

BATCHES = {"sft": "rows a step", "reward": "pairs a step", "ppo": "replies an iteration"}  # by stage


def say_processes(stage: str, args: TrainingArguments) -> None:
    """How many processes there are, and what a step of the Trainer takes in all of them."""
    factors = ["batch_size"] if stage == "ppo" else ["per_device_train_batch_size", "gradient_accumulation_steps"]
    count = math.prod(getattr(args, name) for name in factors) * args.world_size
    parts = " x ".join(f"--{name} {getattr(args, name)}" for name in factors)
    say(f"processes: {args.world_size}; {count} {BATCHES[stage]} in all ({parts} in each)")
    if lost_processes(os.environ):
        say(
            "warning: accelerate launch was asked for several processes and started one, as it does on a CPU; "
            f"torchrun --nproc_per_node NUMBER {sys.argv[0]} ... starts several, on a CPU with --use_cpu true"
        )


def start_stage(
    stage: str, model_args: ModelArguments, training_args: TrainingArguments, only_plan: bool
) -> tuple[torch.dtype, str | None]:
    """Check what can be checked before anything is read, and seed.

    stage: "sft", "reward" or "ppo".  Returns the type of the base weights, and the checkpoint to go on from or None.  With
    several visible GPUs it does not return but starts the script again, see utils/launch.py.  only_plan: for --plan, which
    needs one process, and no folder, tracker or checkpoint.

    Raises InputError for an output folder, a tracker or a checkpoint that cannot be used.
    """
    checkpoint = None
    if training_args.disable_tqdm:
        hide_progress_bars()
    if not only_plan:
        relaunch_on_all_gpus()
        check_output_dir(training_args)
        check_trackers(training_args)
        checkpoint = resume_path(training_args, stage)
        say_processes(stage, training_args)
    dtype = choose_precision(model_args, training_args)
    set_seed(training_args.seed)
    return dtype, checkpoint
