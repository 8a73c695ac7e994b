"""What a run leaves behind: run.json, which says how it was made, metrics.jsonl, and the prompts that it trained on."""

import math
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from datasets import Dataset
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lora.base_model import base_fingerprint
from runs.seen_prompts import write_seen_prompts
from utils.arguments import ModelArguments
from utils.files import append_jsonl, drop_rows_after, replace_jsonl, write_json

LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers")


def run_record(
    stage: str,
    base: PreTrainedModel,
    model_args: ModelArguments,
    training_args: TrainingArguments | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Content of run.json: what a later stage checks, and what somebody needs to repeat the run.

    training_args: None where nothing is trained.
    """
    trained = {} if training_args is None else training_args.to_dict()
    trained = {name: value for name, value in trained.items() if not name.endswith("_token")}  # access to the hub
    return {
        "stage": stage,
        "base_model": model_args.model_name_or_path,
        "base_fingerprint": base_fingerprint(base),
        "prompt_template": model_args.prompt_template,
        "seed": trained.get("seed"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "arguments": {**asdict(model_args), **trained},
        **more,
    }


def _git_commit() -> str | None:
    """Commit of this toolkit, None where it is not a git checkout (a downloaded archive)."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


class RunFiles(TrainerCallback):
    """Writes run.json and seen_prompts.txt, and metrics.jsonl while the run goes on.

    A run that is resumed starts with the lines that the checkpoint remembers, whatever the killed one wrote after it.
    train: the rows that are trained on, tokenized; key: what global_step is called in metrics.jsonl, "step" or "iteration".
    """

    def __init__(self, record: dict[str, Any], train: Dataset, key: str = "step") -> None:
        self.record = record
        self.train = train
        self.key = key

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            os.makedirs(args.output_dir, exist_ok=True)
            write_json(self.record, args.output_dir, "run.json")
            write_seen_prompts(self.train, args.output_dir)
            rows = [self.row(logs.pop("step"), logs) for logs in map(dict, state.log_history)]
            replace_jsonl(os.path.join(args.output_dir, "metrics.jsonl"), rows)
            for file in ("samples.jsonl", "nonfinite.jsonl"):
                drop_rows_after(os.path.join(args.output_dir, file), self.key, state.global_step or -1)

    def row(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        """A line of metrics.jsonl.  JSON has no NaN and no infinity, so what is not finite is left out."""
        return {self.key: step} | {k: v for k, v in logs.items() if not isinstance(v, float) or math.isfinite(v)}

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            append_jsonl([self.row(state.global_step, logs)], args.output_dir, "metrics.jsonl")
