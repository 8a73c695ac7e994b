"""One RLOO iteration with a rule as the reward, beside one of TRL's RLOOTrainer: seconds and peak memory.

    python -m benchmarks.rloo_iteration --output_dir rloo --rounds 3

The Llama of benchmarks/ppo_iteration.py (70 million random weights), float32, LoRA r=4 on q, k and v in an SFT adapter that
both start from and take for the reference.  16 replies an iteration, four to a prompt, prompts and replies of 64 tokens,
mini-batches of 8, one pass.  Both sides run in turn, each in a process of its own with one thread; the first iteration is
not counted.  TRL runs without activation checkpointing, which is slower.  Writes rloo_iteration.md.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.plan import peak_of
from benchmarks.ppo_sides import Shapes, make_inputs
from utils.console import run_script
from utils.files import read_jsonl, write_json

SHAPES = Shapes()
PER_PROMPT, ITERATIONS, RATE, KL = 4, 4, 1e-5, 0.05


def even(completions: list[str], **kwargs: Any) -> list[float]:
    """Share of words with an even number: a rule that costs nothing."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(1, len(text.split())) for text in completions]


def ours(folder: Path, output: Path) -> list[str]:
    """Arguments of rl_training.py."""
    settings = {
        "model_name": folder / "base",
        "dataset": folder / "prompts.jsonl",
        "prompt_template": "{prompt}",
        "sft_model_lora_path": folder / "sft",
        "advantage": "rloo",
        "replies_per_prompt": PER_PROMPT,
        "reward_function": "benchmarks.rloo_iteration:even",
        "normalize_scores": "false",
        "floor_broken_replies": "false",
        "batch_size": SHAPES.rows,
        "mini_batch_size": SHAPES.mini_batch,
        "ppo_epochs": 1,
        "steps": ITERATIONS,
        "max_length": SHAPES.prompts[1] + SHAPES.replies[1],
        "output_max_length": SHAPES.replies[1],
        "learning_rate": RATE,
        "init_kl_coef": KL,
        "guard": "off",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "use_cpu": "true",
        "output_dir": output,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", f"{value}")]


def trl_side(folder: Path, output: Path) -> None:
    """TRL's RLOOTrainer on the same; writes the seconds of each iteration."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    updates = SHAPES.rows // SHAPES.mini_batch  # optimizer steps an iteration
    ends = [time.perf_counter()]

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ends[0] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step % updates == 0:
                ends.append(time.perf_counter())

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    trainer = RLOOTrainer(
        model=PeftModel.from_pretrained(base, folder / "sft", is_trainable=True),
        reward_funcs=even,
        args=RLOOConfig(
            output_dir=str(output),
            max_steps=ITERATIONS * updates,
            per_device_train_batch_size=SHAPES.mini_batch,
            steps_per_generation=updates,
            num_generations=PER_PROMPT,
            max_completion_length=SHAPES.replies[1],
            beta=KL,
            learning_rate=RATE,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(read_jsonl(f"{folder}/prompts.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(folder / "base", padding_side="left"),
        callbacks=[Clock()],
    )
    trainer.train()
    write_json({"seconds": [end - start for start, end in pairwise(ends)]}, str(output), "seconds.json")


def measure(side: str, folder: Path, output: Path) -> tuple[float, float]:
    """Median seconds of an iteration, and GiB at the peak."""
    log = output.with_suffix(".log")
    if side == "ours":
        peak = peak_of("rl_training.py", "rl_training", ours(folder, output), log, malloc_defaults=True)
        seconds = [row["seconds"] for row in read_jsonl(f"{output}/metrics.jsonl") if "kl" in row]
    else:
        words = ["--output_dir", f"{output}", "--trl_side", f"{folder}"]
        peak = peak_of("benchmarks/rloo_iteration.py", "trl", words, log, malloc_defaults=True)
        seconds = json.loads((output / "seconds.json").read_text(encoding="utf-8"))["seconds"]
    return median(seconds[1:]), peak / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs")
    parser.add_argument("--trl_side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl_side:
        trl_side(args.trl_side, args.output_dir)
        return
    make_inputs(args.output_dir / "inputs", SHAPES)
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "trl": []}
    for number in range(args.rounds):
        for side, runs in found.items():
            runs.append(measure(side, args.output_dir / "inputs", args.output_dir / f"{side}{number}"))
    (seconds, memory), (other_seconds, other_memory) = (
        (median(run[0] for run in runs), median(run[1] for run in runs)) for runs in found.values()
    )
    lines = ["| | ours | TRL's RLOOTrainer | ratio |", "|---|---|---|---|"]
    lines += [f"| iteration, s | {seconds:.1f} | {other_seconds:.1f} | {seconds / other_seconds:.2f} |"]
    lines += [f"| peak memory, GiB | {memory:.2f} | {other_memory:.2f} | {memory / other_memory:.2f} |"]
    text = "\n".join(lines) + "\n"
    (args.output_dir / "rloo_iteration.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_script(main)
