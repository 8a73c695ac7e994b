"""What a person sees of stage 3 while it runs: a progress bar with an ETA, and one line an iteration."""

from typing import Any

from tqdm.auto import tqdm
from transformers import (
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


def iteration_line(logs: dict[str, Any], iteration: int, iterations: int) -> str | None:
    """What a person wants to see of a log of stage 3, in one line; None where it holds neither replies nor an evaluation."""
    if "score_mean" in logs:
        held_out = f"  held-out score {logs['heldout/score']:.2f}" if "heldout/score" in logs else ""
        held_out += f" gold {logs['heldout/gold']:.2f}" if "heldout/gold" in logs else ""
        gold = f"gold {logs['gold_mean']:.2f}  " if "gold_mean" in logs else ""
        return (
            f"iteration {iteration}/{iterations}  score {logs['score_mean']:.2f} +- {logs['score_std']:.2f}  {gold}"
            f"KL {logs['kl']:.2f}  {logs['response_length']:.1f} tokens a reply  empty {logs['empty_fraction']:.0%}  "
            f"entropy {logs['entropy']:.2f}  {logs['tokens_per_second']:.0f} tokens/s{held_out}"
        )
    if "eval_score_mean" in logs:
        gold = f"gold {logs['eval_gold']:.2f}  " if "eval_gold" in logs else ""
        return (
            f"evaluation after {iteration}  score {logs['eval_score_mean']:.2f}  {gold}KL {logs['eval_kl']:.2f}  "
            f"{logs['eval_response_length']:.1f} tokens a reply  empty {logs['eval_empty_fraction']:.0%}"
        )
    return None


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
