"""What a person sees of stage 3 while it runs: a progress bar with an ETA, and one line an iteration."""

from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from reporting.metrics import OF_PPO


def iteration_line(logs: dict[str, Any], iteration: int, iterations: int) -> str | None:
    """What a person wants to see of a log of stage 3, in one line; None where it holds neither replies nor an evaluation."""
    if "score_mean" in logs:
        start = f"iteration {iteration}/{iterations}"
    elif "eval_score_mean" in logs:
        start = f"evaluation after {iteration}"
    else:
        return None
    return start + "".join(metric.console.format(logs[name]) for name, metric in OF_PPO.items() if name in logs)


class IterationLines(ProgressCallback):
    """The Trainer's progress bar, with `iteration_line` instead of a dictionary of thirty numbers; or lines alone."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, desc="PPO", dynamic_ncols=True, disable=args.disable_tqdm)
            self.training_bar.update(state.global_step)  # of a run that goes on
        self.current_step = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        line = iteration_line(logs, state.global_step, state.max_steps)
        if state.is_world_process_zero and line is not None:
            tqdm.write(line)
