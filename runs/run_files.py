"""What a run leaves behind for people: run.json, metrics.jsonl, pictures, and a page with all of it.

python -m runs.run_files output/ppo                     writes output/ppo/report.html
python -m runs.run_files output/ppo other/ppo --output both.html
"""

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from utils.adapters import base_fingerprint
from utils.arguments import InputError, ModelArguments, run_script, say
from runs.checkpoints import saving
from reporting.html_report import report_page
from reporting.html import write_page

LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers")
CURVES = {  # metrics of stage 3 -> title of the picture
    "score_mean": "score (reward model)",
    "gold_mean": "gold (your own measure)",
    "response_length": "reply length (tokens)",
    "kl": "KL to the SFT model (nats a reply)",
    "entropy": "entropy (nats a token)",
    "policy_loss": "policy loss",
    "value_loss": "value loss",
    "clip_fraction": "share of clipped ratios",
}


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


class RunFiles(TrainerCallback):
    """Writes run.json, and metrics.jsonl while the run goes on.

    A run that is resumed starts with the lines that the checkpoint remembers, whatever the killed one wrote after it.
    key: what global_step is called in metrics.jsonl, "step" or "iteration".
    """

    def __init__(self, record: dict[str, Any], key: str = "step") -> None:
        self.record = record
        self.key = key

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            os.makedirs(args.output_dir, exist_ok=True)
            write_json(self.record, args.output_dir, "run.json")
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


def draw_curves(folder: str) -> None:
    """Draw folder/metrics.jsonl of stage 3 as folder/plots/*.png, one picture a metric, over iterations."""
    import matplotlib  # a second of import time that --help should not pay

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in read_jsonl(os.path.join(folder, "metrics.jsonl")) if "score_mean" in row]
    with open(os.path.join(folder, "run.json"), encoding="utf-8") as file:
        run = json.load(file)
    best, collapse = (run.get("best") or {}).get("iteration"), run.get("guard", {}).get("collapse_at")
    marks = [(best, "best", "#009e73", "--"), (collapse, "collapse", "#d55e00", "-")]
    alarms = [row["iteration"] for row in rows if row.get("guard/alarms", 0) > 0]
    os.makedirs(os.path.join(folder, "plots"), exist_ok=True)
    for metric, title in CURVES.items():
        if not any(metric in row for row in rows):  # gold, where there is none
            continue
        figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
        axes.plot([row["iteration"] for row in rows], [row.get(metric) for row in rows], linewidth=1.8)
        if metric == "score_mean":
            low = [row["score_mean"] - row["score_std"] for row in rows]
            high = [row["score_mean"] + row["score_std"] for row in rows]
            axes.fill_between([row["iteration"] for row in rows], low, high, alpha=0.15, label="one standard deviation")
        for iteration, label, colour, style in marks:
            if iteration is not None:
                axes.axvline(iteration, linestyle=style, linewidth=1.2, color=colour, label=label)
        if alarms:  # along the lower edge, whatever the numbers are
            place = axes.get_xaxis_transform()
            axes.scatter(alarms, [0.03] * len(alarms), marker="^", color="#d55e00", transform=place, label="alarm")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        axes.set(xlabel="iteration", title=title)
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(os.path.join(folder, "plots", f"{metric}.png"))
        pyplot.close(figure)


def write_report(folders: Sequence[str], output: str, max_samples: int = 20000) -> None:
    """Write these runs as one HTML page, with about `max_samples` replies of each.  Raises InputError."""
    page = report_page(folders, CURVES, max_samples)
    try:
        write_page(page, output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}; give another --output") from error
    say(f"report: {output}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m runs.run_files",
        description="Write report.html: curves, samples, reward card and run.json of one or several runs on one page.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training script")
    parser.add_argument("--output", help="file to write; by default report.html in the first RUN")
    parser.add_argument("--max_samples", type=int, default=20000, help="show about so many replies of each run")
    args = parser.parse_args()
    write_report(args.runs, args.output or os.path.join(args.runs[0], "report.html"), args.max_samples)


if __name__ == "__main__":
    run_script(main)
