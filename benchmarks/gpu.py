"""Stage 3 on a GPU: seconds by phase, memory beside the plan, share of the limits of the card, and whether it is right.

    python -m benchmarks.gpu --output_dir gpu                         all models that fit: about ten minutes on an H100
    python -m benchmarks.gpu --output_dir gpu --models Qwen2.5-0.5B   one of them

Random weights in the shapes of known models (no hub is needed), bfloat16 and 4 bit, LoRA on q, k and v.  Every reply is as
long as it may be.  Each row is a process of its own (benchmarks/ppo_sides.py), of which the median iteration counts, without
the first.  TRL 1.12.0 runs beside it, tuned as in benchmarks/ppo_iteration.py, where OUTPUT_DIR/trl holds it (`pip install
--no-deps --target OUTPUT_DIR/trl trl==1.12.0`).  The rate of matrix products and the bandwidth are measured in the same run.
Then a small model is trained on the card with a stop and without one, and the weights are compared.
Writes gpu.md and gpu.json.  Without a GPU a tiny model shows that the program runs, and nothing else.
"""

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.ppo_iteration import PHASES, operations, run_side
from benchmarks.ppo_sides import DEVICE, Shapes, make_inputs
from benchmarks.runs import run_module
from utils.console import run_script
from utils.files import write_json

BATCH = {"prompts": (256, 256), "replies": (128, 128), "lora_r": 16}
MODELS = {
    "Qwen2.5-0.5B": Shapes(896, 24, 14, 2, 4864, 151936, rows=64, mini_batch=16, **BATCH),
    "Qwen2.5-7B": Shapes(3584, 28, 28, 4, 18944, 152064, rows=32, mini_batch=8, tied=False, **BATCH),
    "Llama-3-8B": Shapes(4096, 32, 32, 8, 14336, 128256, rows=32, mini_batch=8, tied=False, **BATCH),
}
TINY = Shapes(64, 2, 4, 2, 128, 500, rows=4, mini_batch=2, prompts=(8, 8), replies=(8, 8))  # where there is no GPU
ARMS = {
    "16 bit": [],
    "16 bit, activation checkpointing": ["--activation_checkpointing", "true"],
    "4 bit": ["--load_in_4bit", "true"],
}
TITLES = ["model", "", *(f"{phase}, s" for phase in PHASES), "**iteration, s**", "reply tokens/s", "of the matrix rate"]
TITLES += ["generate: of the bandwidth", "peak, GiB", "planned, GiB", "first KL", "first ratio"]


def weight_count(shapes: Shapes) -> int:
    """Weights of the frozen base; norms, which are few, are left out."""
    keys = shapes.hidden // shapes.heads * shapes.kv_heads
    layer = 2 * shapes.hidden * (shapes.hidden + keys) + 3 * shapes.hidden * shapes.feed_forward
    return shapes.layers * layer + (2 - shapes.tied) * shapes.vocabulary * shapes.hidden


def measure(name: str, shapes: Shapes, args: argparse.Namespace, found: dict[str, Any], progress: tqdm) -> None:
    """Put everything that is seen of one model into `found`, which is saved after each run; what failed is there as text."""
    folder = args.output_dir / name
    if not folder.exists():
        make_inputs(folder, shapes)
        torch.cuda.empty_cache()  # else this process holds what a run needs
    sides = {"rate": ("rate", []), **{arm: ("ours", ARMS[arm]) for arm in args.settings}}
    if (args.output_dir / "trl").is_dir():
        sides["TRL 1.12.0, tuned"] = ("trl_tuned", [])
    for setting, (side, more) in sides.items():
        progress.set_postfix_str(f"{name}, {setting}")
        try:
            found[name][setting] = run_side(side, folder, args, more)
        except RuntimeError as error:
            found[name][setting] = str(error)
        write_json(found, f"{args.output_dir}", "gpu.json")
        progress.update()
    shutil.rmtree(folder / "base")  # up to 16 GB


def row(model: str, name: str, shapes: Shapes, run: dict[str, Any], rate: dict[str, float]) -> str:
    """One row of the table."""
    iterations = run["iterations"][1:] or run["iterations"]
    seconds = {phase: median(one[phase] for one in iterations) for phase in PHASES}
    whole = sum(seconds.values())
    cells = [model, name, *(f"{seconds[phase]:.2f}" for phase in PHASES), f"**{whole:.2f}**"]
    cells += [f"{sum(reply for _, reply in shapes.lengths()) / whole:.0f}"]
    cells += [f"{sum(operations(shapes).values()) / whole / rate['rate']:.0%}"]
    read = shapes.replies[1] * 2 * weight_count(shapes)  # each token step reads all weights once, of 16 bit
    at_16_bit = "bandwidth" in rate and not name.startswith("4 bit")
    cells += [f"{read / seconds['generate'] / rate['bandwidth']:.0%}" if at_16_bit else ""]
    cells += [f"{run['peak_bytes'] / 2**30:.2f}"]
    first = run.get("first")
    if first:
        cells += [f"{run['planned_bytes'] / 2**30:.2f}", f"{first['kl']:.2g}", f"{first['ratio_first']:.5f}"]
    cells += [""] * (len(TITLES) - len(cells))
    return "| " + " | ".join(cells) + " |"


def stopped_and_whole(folder: Path) -> float:
    """Largest difference of the trained weights of a run of four iterations and of one that went on after two."""
    make_inputs(folder, replace(TINY, vocabulary=1000, hidden=256, rows=8))
    settings = {
        "model_name": folder / "base",
        "dataset": folder / "prompts.jsonl",
        "prompt_template": "{prompt}",
        "sft_model_lora_path": folder / "sft",
        "reward_model_lora_path": folder / "reward",
        "allow_weak_reward": "true",
        "guard": "off",
        "steps": 4,
        "save_freq": 2,
        "batch_size": 8,
        "mini_batch_size": 4,
        "max_length": 64,
        "output_max_length": 16,
        "learning_rate": 1e-3,
        "disable_tqdm": "true",
    }
    words = ["rl_training.py", *(word for name, value in settings.items() for word in (f"--{name}", f"{value}"))]
    run_module(folder, "whole.log", *words, "--output_dir", f"{folder}/whole")
    stopped = folder / "stopped"
    shutil.copytree(folder / "whole" / "checkpoint-2", stopped / "checkpoint-2")
    run_module(folder, "stopped.log", *words, "--output_dir", f"{stopped}", "--resume_from_checkpoint", "true")
    weights = [load_file(path / "adapter_model.safetensors") for path in (folder / "whole", stopped)]
    return max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])


def report(found: dict[str, dict[str, Any]], difference: float, models: dict[str, Shapes]) -> str:
    """The page."""
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU: tiny models on the CPU, nothing is measured"
    lines = [f"{card}, torch {torch.__version__}", ""]
    for model, runs in found.items():
        rate = runs["rate"]
        reached = f"{model}: {weight_count(models[model]) / 1e9:.2f} billion weights; "
        reached += f"matrix products {rate['rate'] / 1e12:.1f} TFLOP/s"
        if "bandwidth" in rate:
            reached += f", copies {rate['bandwidth'] / 1e12:.2f} TB/s"
        lines.append(reached + "\n")
    lines += ["| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES)]
    for model, runs in found.items():
        for name, run in runs.items():
            if isinstance(run, str):
                lines.append(
                    f"| {model} | {name} | failed: {run.strip().splitlines()[-1]} |" + " |" * (len(TITLES) - 3)
                )
            elif name != "rate":
                lines.append(row(model, name, models[model], run, runs["rate"]))
    lines += [
        "",
        f"Resumed from a checkpoint, the weights differ by at most {difference:.1g} from those of a run without a stop.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for inputs and the report")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--settings", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--iterations", type=int, default=3, help="of each run; the first is not counted")
    args = parser.parse_args()
    args.threads = os.cpu_count() or 1
    args.output_dir.mkdir(parents=True, exist_ok=True)
    models = {"tiny": TINY}
    if DEVICE == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        models = {name: MODELS[name] for name in args.models if 2 * weight_count(MODELS[name]) < 0.6 * memory}
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    count = 1 + len(args.settings) + (args.output_dir / "trl").is_dir()
    with tqdm(total=len(models) * count, desc="runs") as progress:
        for name, shapes in models.items():
            measure(name, shapes, args, found, progress)
    page = report(found, stopped_and_whole(args.output_dir / "resume"), models)
    (args.output_dir / "gpu.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    run_script(main)
