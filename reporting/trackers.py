"""What Weights & Biases, TensorBoard and trackio show of a run: grouped metrics, histograms, samples, the reward card.

metrics.jsonl has flat names; `reporting.metrics` says what a tracker calls each of stage 3.  The first two stages keep the
Trainer's own train/... and eval/....
"""

import os
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from reporting.html import markdown_table
from reporting.metrics import metric_of
from rewards.reward_card import card_table, read_card
from utils.console import InputError, is_main_process, one_line

SAMPLES = 16  # replies in a table: enough to see what the policy does, few enough to send
HISTOGRAMS = {"objective/scores": "score", "reply/lengths": "length"}  # name -> column of samples.jsonl
STEP = "train/global_step"  # what the callbacks of transformers draw everything over, and what they call it


def check_trackers(training_args: TrainingArguments) -> None:
    """Refuse a tracker that is unknown, not installed or out of reach, before anything is loaded.  Raises InputError."""
    for name in training_args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(
                f"--report_to {name} is no tracker; there are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:  # what transformers raises where the package is missing
            raise InputError(f"--report_to {name} cannot be used: {one_line(error)}") from error
    if "wandb" in training_args.report_to and is_main_process():
        import wandb

        try:
            if wandb.setup().settings.mode not in ("offline", "dryrun", "disabled"):
                wandb.login(verify=True)
        except wandb.Error as error:
            raise InputError(
                f"wandb cannot be used: {one_line(error).rstrip('.')}; log in with `wandb login`, or set "
                "WANDB_MODE=offline, or leave it out of --report_to and --log_with"
            ) from error


# ---------------------------------------------------------------------------------------------------------------------
# The reward card, of stage 2 and 3
# ---------------------------------------------------------------------------------------------------------------------


def show_card(callback: TrainerCallback, card: dict[str, Any] | None, folder: str, step: int) -> None:
    """Show a reward card and its picture in `folder`, where there are any, in the tracker of a callback that has begun."""
    if card is None or "probes" not in card:  # one from before there were probes
        return
    path = os.path.join(folder, "reward_card.png")
    picture = path if os.path.isfile(path) else None
    if isinstance(callback, TensorBoardCallback):
        callback.tb_writer.add_text("card/table", card_table(card), step)
        if picture:
            callback.tb_writer.add_image("card/picture", read_picture(picture), step, dataformats="HWC")
        callback.tb_writer.flush()
    for tracker in (getattr(callback, "_wandb", None), getattr(callback, "_trackio", None)):
        if tracker is not None:
            rows = [[kind, share, card["probe_counts"][kind]] for kind, share in card["probes"].items()]
            table = tracker.Table(columns=["broken reply", "the good one wins", "prompts"], data=rows)
            images = {"card/picture": tracker.Image(picture)} if picture else {}
            tracker.log({"card/probes": table, **images, STEP: step})


def read_picture(path: str) -> np.ndarray:
    """A picture as uint8 [height, width, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3
# ---------------------------------------------------------------------------------------------------------------------


class Grouped:
    """Mixed into a tracker's callback of transformers: what stage 3 shows, instead of the Trainer's names."""

    def __init__(self, trainer: Trainer) -> None:
        """trainer: that of stage 3, whose `samples` are the rows of samples.jsonl of the iteration."""
        super().__init__()
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            show_card(self, read_card(args.reward_model_lora_path), args.reward_model_lora_path, state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        metrics = {metric_of(name).tracker: value for name, value in logs.items()}
        replies = self.trainer.samples if "score_mean" in logs else []  # an evaluation has none to show
        step = state.global_step
        # the SFT model's replies, and those of every checkpoint
        shown = step in (1, state.max_steps) or step % args.save_steps == 0
        rows = [
            {name: value for name, value in row.items() if name not in ("response_ids", "noted")}
            for row in replies[:SAMPLES]
        ]
        self.send(step, metrics, replies, rows if shown else [])


class TensorBoardTracker(Grouped, TensorBoardCallback):
    """TensorBoard, which takes tables as Markdown."""

    def send(self, step: int, metrics: dict[str, float], replies: list[dict], shown: list[dict]) -> None:
        for name, value in metrics.items():
            self.tb_writer.add_scalar(name, value, step)
        for name, column in HISTOGRAMS.items() if replies else ():
            self.tb_writer.add_histogram(name, np.array([row[column] for row in replies]), step)
        if shown:
            rows = [list(map(_rounded, row.values())) for row in shown]
            self.tb_writer.add_text("reply/samples", "\n".join(markdown_table(list(shown[0]), rows)), step)
        self.tb_writer.flush()


def _rounded(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def send(tracker: ModuleType, step: int, metrics: dict[str, float], replies: list[dict], shown: list[dict]) -> None:
    """A log of stage 3 for wandb or trackio, which have one interface."""
    entries: dict[str, Any] = {**metrics, STEP: step}
    for name, column in HISTOGRAMS.items() if replies else ():
        entries[name] = tracker.Histogram([row[column] for row in replies])
    if shown:
        rows = [list(row.values()) for row in shown]
        entries["reply/samples"] = tracker.Table(columns=list(shown[0]), data=rows)
    tracker.log(entries)


class WandbTracker(Grouped, WandbCallback):
    """Weights & Biases."""

    def send(self, *log: Any) -> None:
        send(self._wandb, *log)


class TrackioTracker(Grouped, TrackioCallback):
    """trackio."""

    def send(self, *log: Any) -> None:
        send(self._trackio, *log)


def use_grouped_names(trainer: Trainer) -> None:
    """Replace the Trainer's own trackers by ours.  trainer: as `Grouped` takes it."""
    ours = {WandbCallback: WandbTracker, TensorBoardCallback: TensorBoardTracker, TrackioCallback: TrackioTracker}
    for stock, tracker in ours.items():
        if trainer.pop_callback(stock) is not None:
            trainer.add_callback(tracker(trainer))
