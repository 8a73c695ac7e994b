"""The Trainer of all three stages: a run that is interrupted loses nothing.

What transformers.Trainer does not do and ResumableTrainer adds: checkpoints appear whole or not at all (runs/checkpoints.py)
and hold all that the log has to remember; SIGTERM and SIGINT let the step finish, save and end the run; a step whose loss
or gradients are not finite changes nothing, and too many of them in a row end the run with a diagnosis.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from reporting.model_card import write_model_card
from runs.checkpoints import UNFINISHED, flush, seal
from utils.console import InputError, Preempted, RunError, is_main_process, say
from utils.files import append_jsonl, read_json_object, saving

NONFINITE_FILE = "nonfinite.jsonl"
LOWER_THE_RATE = (
    "lower --learning_rate, clip harder with --max_grad_norm, or compute in float32 (--bf16 false --dtype float32)"
)


@dataclass
class ResumableArguments:
    """Arguments of a ResumableTrainer, to be put in front of the Trainer's own."""

    max_nonfinite_steps: int = field(
        default=5,
        metadata={"help": "End the run after so many steps in a row that NaN or infinity made impossible."},
    )

    def __post_init__(self) -> None:
        if self.max_nonfinite_steps < 1:
            raise InputError(f"--max_nonfinite_steps is {self.max_nonfinite_steps}; give a number above 0")
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        super().__post_init__()


class StopSignals:
    """Inside `with`, SIGTERM and SIGINT only leave their number in `number`; one that comes again acts as it always does."""

    def __init__(self) -> None:
        self.number = 0
        self.first = 0.0
        # torchrun passes on what it gets, so its processes may get the same signal twice, a moment apart
        self.echo_seconds = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self.first = number, time.monotonic()
            name = signal.Signals(number).name
            if is_main_process():  # not print(): the signal may have come in the middle of one
                os.write(2, f"{name}: this step, a checkpoint, then the end; a second {name} ends at once\n".encode())
        elif time.monotonic() - self.first > self.echo_seconds:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class _StepEnds(TrainerCallback):
    """Calls a ResumableTrainer where the Trainer has a callback and no method."""

    def __init__(self, trainer: "ResumableTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.restore_loop()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.end_step(control)


def _write_card(output_dir: str, folder: str) -> None:
    write_model_card(folder, read_json_object(os.path.join(output_dir, "run.json")), output_dir)


class ResumableTrainer(Trainer):
    """A Trainer that can be killed, stopped and resumed at any moment.  To be put in front of another Trainer's class."""

    step_name = "step"  # what one step is called in the files that the run leaves behind

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_StepEnds(self))
        # PEFT writes an empty card into each folder that it saves
        self.model.create_or_update_model_card = functools.partial(_write_card, self.args.output_dir)
        self.stop_signals = StopSignals()
        self.stopped_by = 0  # number of the signal, once all processes know it
        self.resumed_from: str | None = None
        self.writes_aside = False
        # the micro-batches of this step, and whether the loss of each is finite
        self.step_batches: list[tuple[dict[str, Any], bool]] = []
        self.skipped: tuple[str, str] | None = None  # what made this step impossible, and what to do about it
        self.skipped_in_a_row = 0
        self.skipped_since_log = 0
        self.steps_since_log = 0

    # ---- Resume ----

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As Trainer.train.  Raises Preempted after SIGTERM or SIGINT, RunError when the disk or the numbers fail."""
        self.resumed_from = resume_from_checkpoint
        if self.args.should_save:
            shutil.rmtree(os.path.join(self.args.output_dir, UNFINISHED), ignore_errors=True)
        with self.stop_signals:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.stopped_by:
            name = signal.Signals(self.stopped_by).name
            raise Preempted(
                f"stopped by {name} after {self.step_name} {self.state.global_step} of {self.state.max_steps}, which is "
                "saved; go on with --resume_from_checkpoint true",
                self.stopped_by,
            )
        return result

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What is restored holds the old --learning_rate: the one that was given now takes its place."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is None or not isinstance(schedule, LambdaLR):  # DeepSpeed has one of its own
            return
        base = [self.peak_rate(group) for group in self.optimizer.param_groups]
        rates = [rate * factor(schedule.last_epoch) for rate, factor in zip(base, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict({**schedule.state_dict(), "base_lrs": base, "_last_lr": rates})
        for group, peak, rate in zip(self.optimizer.param_groups, base, rates, strict=True):
            group["initial_lr"], group["lr"] = peak, rate

    def peak_rate(self, group: dict[str, Any]) -> float:
        """The learning rate from which the schedule makes that of a group of the optimizer's."""
        return self.args.learning_rate

    def is_finished(self) -> bool:
        """Whether there is nothing left to train: a run that was killed after its last step has only to be wound up."""
        return self.state.global_step >= self.state.max_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.is_finished():  # the Trainer would train one step too many
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def loop_state(self) -> dict[str, Any]:
        """What the lines of the log are made of, in this process; JSON."""
        return {
            "loss_since_log": self._tr_loss.item(),
            "loss_before": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "lost_in_a_row": self.skipped_in_a_row,
            "lost_since_log": self.skipped_since_log,
            "steps_since_log": self.steps_since_log,
        }

    def restore_loop(self) -> None:
        """Go on from the loop_state() of the checkpoint.  One that other processes wrote has none for this process."""
        path = self._loop_file(self.resumed_from) if self.resumed_from else ""
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                self.load_loop_state(json.load(file))

    def load_loop_state(self, state: dict[str, Any]) -> None:
        self._tr_loss.fill_(state["loss_since_log"])
        self._total_loss_scalar = state["loss_before"]
        self._globalstep_last_logged = state["last_logged"]
        self.skipped_in_a_row = state["lost_in_a_row"]
        self.skipped_since_log = state["lost_since_log"]
        self.steps_since_log = state["steps_since_log"]

    def _loop_file(self, folder: str) -> str:
        return os.path.join(folder, f"loop_state_{self.args.process_index}.json")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs and "nonfinite_steps" not in logs:  # a row of training, not of an evaluation
            logs["nonfinite_steps"] = self.skipped_since_log
            if self.skipped_since_log == self.steps_since_log:
                del logs["loss"]  # the Trainer's is 0 where there was none
            self.skipped_since_log = self.steps_since_log = 0
        if "train_loss" in logs:  # the Trainer's is of the steps since the last resume
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """--dataloader_drop_last is about training: an evaluation without its last rows is another one, or none at all."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    # ---- Checkpoints ----

    def add_to_checkpoint(self, folder: str) -> None:
        """Write into a checkpoint what is this trainer's own; called in the process that saves."""
        record = os.path.join(self.args.output_dir, "run.json")
        if os.path.isfile(record):  # each checkpoint can be used as it is
            shutil.copy(record, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint aside, flush it, and let it appear under its name.  Raises RunError where the disk fails."""
        step, best = self.state.global_step, self.state.best_global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        final, aside = os.path.join(self.args.output_dir, name), os.path.join(self.args.output_dir, UNFINISHED)
        with saving(final), self.aside(aside):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process has written its own files
            if best:
                path = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{best}")
                if best == step or os.path.isdir(path):
                    self.state.best_model_checkpoint = path
            if self.args.should_save:
                folder = os.path.join(aside, name)
                self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))  # with the right path of the best
                self.add_to_checkpoint(folder)
                seal(folder)
                if os.path.isdir(final):  # of an earlier run, which went on from further back
                    os.replace(final, os.path.join(aside, "replaced"))
                os.replace(folder, final)
                flush(self.args.output_dir)
                self.remove_old_checkpoints(aside)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def aside(self, folder: str) -> Iterator[None]:
        """Let the Trainer write its checkpoint into `folder`, which is gone afterwards."""
        if self.args.should_save:
            os.mkdir(folder)  # raises where the output folder is gone; the Trainer would make another one
        self.accelerator.wait_for_everyone()
        self.writes_aside = True
        try:
            yield
        finally:
            self.writes_aside = False
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self.writes_aside else folder

    def remove_old_checkpoints(self, aside: str) -> None:
        """Keep --save_total_limit checkpoints, the newest and the best among them; each one goes at once, too."""
        limit = self.args.save_total_limit or 0
        if limit <= 0:
            return
        checkpoints = sort_checkpoints(self.args.output_dir, use_mtime=True)
        best = self.state.best_model_checkpoint
        kept = {checkpoints[-1], str(Path(best)) if best else None}
        old = [checkpoint for checkpoint in checkpoints if checkpoint not in kept]
        for checkpoint in old[: max(0, len(checkpoints) - limit)]:
            os.replace(checkpoint, os.path.join(aside, os.path.basename(checkpoint)))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        with open(self._loop_file(output_dir), "w", encoding="utf-8") as file:
            json.dump(self.loop_state(), file)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would write a card of its own into the output folder with each checkpoint."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with saving(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    # ---- Numbers that are not finite ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_batches.append((inputs, bool(loss.isfinite())))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer asks for it between the backward pass and the optimizer step: the moment to look at both."""
        norm = super()._get_grad_norm(model, grad_norm)
        batches, self.step_batches = self.step_batches, []
        if not batches:  # stage 3 makes its optimizer steps itself
            return norm
        loss_is_finite = not self.of_all_processes(int(not all(finite for _, finite in batches)))
        what = self.drop_nonfinite(model, loss_is_finite, norm)
        if what is None:
            return norm
        rows = [row for inputs, finite in batches if loss_is_finite or not finite for row in self.as_text(inputs)]
        self.skip_step(what, gather_object(rows) if self.args.world_size > 1 else rows, LOWER_THE_RATE)
        return None  # there is none for the log

    def drop_nonfinite(self, model: nn.Module, loss_is_finite: bool, grad_norm: Any) -> str | None:
        """Take the gradients away if they or the loss are not finite; the optimizer then changes nothing, itself included.

        Returns what was not finite.  Decided alike in all processes, which hold the same gradients.  The loss scaler of
        fp16 meets infinite gradients all the time and skips those steps itself.
        """
        scaler = self.accelerator.scaler
        if loss_is_finite and (scaler is not None or grad_norm is None or math.isfinite(grad_norm)):
            return None
        what = "the gradients" if loss_is_finite else "the loss"
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise RunError(
                f"stopped at {self.step_name} {self.state.global_step + 1}: NaN or infinity in {what}, and DeepSpeed has "
                f"made the update already; go on from a checkpoint, and {LOWER_THE_RATE}"
            )
        if scaler is None:
            model.zero_grad()
        return what

    def skip_step(self, what: str, rows: list[tuple[str, str]], advice: str, whole_step: bool = True) -> None:
        """Say that `what` was not finite; with `whole_step` there was no update at all in this step."""
        if whole_step:
            self.skipped = (what, advice)
        self.note_nonfinite(what, rows, self.state.global_step + 1)

    def note_nonfinite(self, what: str, rows: list[tuple[str, str]], step: int) -> None:
        """One warning line, and prompts and replies into nonfinite.jsonl."""
        say(f"warning: {self.step_name} {step}: NaN or infinity in {what}; {NONFINITE_FILE} has the replies")
        if self.is_world_process_zero():
            lines = [
                {self.step_name: step, "quantity": what, "prompt": prompt, "response": text} for prompt, text in rows
            ]
            append_jsonl(lines, self.args.output_dir, NONFINITE_FILE)

    def as_text(self, inputs: dict[str, Tensor]) -> list[tuple[str, str]]:
        """Prompt and reply of each row of a micro-batch; -100 among the labels stands for the prompt."""
        parts = []
        masks = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        for ids, labels, real in zip(inputs["input_ids"], inputs["labels"], masks, strict=True):
            parts += [ids[real & (labels == -100)].tolist(), ids[real & (labels != -100)].tolist()]
        texts = self.processing_class.batch_decode(parts, skip_special_tokens=True)
        return list(zip(texts[::2], texts[1::2], strict=True))

    # ---- The end of a step ----

    def end_step(self, control: TrainerControl) -> None:
        """Count a step that was lost, and stop the run on too many in a row or on a signal."""
        self.steps_since_log += 1
        self.skipped_since_log += self.skipped is not None
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.skipped else 0
        if self.skipped and self.skipped_in_a_row >= self.args.max_nonfinite_steps:
            what, advice = self.skipped
            raise RunError(
                f"stopped at {self.step_name} {self.state.global_step}: no update was possible in {self.skipped_in_a_row} "
                f"{self.step_name}s in a row, because of NaN or infinity in {what}; "
                f"{os.path.join(self.args.output_dir, NONFINITE_FILE)} has prompts and replies; {advice}"
            )
        self.skipped = None
        self.stopped_by = self.of_all_processes(self.stop_signals.number)
        if self.stopped_by:
            control.should_save = control.should_training_stop = True

    def of_all_processes(self, number: int) -> int:
        """The largest of the numbers that the processes hold, so that all of them decide alike."""
        if self.args.world_size == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.args.device)).max())

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # with --save_strategy best the answer decides whether there is a checkpoint
        return super()._determine_best_metric(metrics, trial) or bool(self.stopped_by)
