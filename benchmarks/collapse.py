"""The collapse that PPO is known for, reproduced and cured, in the demo's world.

    python -m benchmarks.collapse --output_dir collapse --seeds 0 1 2 3 4 5 6 7 8 9 --jobs 2
    python -m benchmarks.collapse --output_dir collapse --ablation --seeds 0 1 2 3 4

Preference data with the usual gap (demo/world.py, gapped_preference_rows): the better reply is mostly the shorter one, and
no reply is broken, so nothing says what an empty one is worth.  For each seed a base, SFT, a plain reward model and one
with broken replies are trained once, and every arm starts from them, with the same prompts, iterations and learning rate:

    A  plain reward model, EOS allowed as a first token, no floor, guard only watching
    B  the same with EOS suppressed as a first token
    C  reward model trained with broken replies, EOS suppressed, floor, guard that stops; its result is best/

Gold is the world's own judgement by rules (demo/gold.py), which no part of the training sees.  The curves are of the
rollouts, 64 replies each; the tables are of 240 held-out prompts.  Work that is already in --output_dir is not repeated.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from demo import world
from demo.gold import gold_score
from utils.arguments import run_script
from utils.report import read_jsonl

GUARD_PROMPTS = 64
PLAIN, ROBUST = "reward_plain", "reward_robust"
NO_CURE = ["--floor_broken_replies", "false", "--guard", "warn", "--allow_weak_reward", "true"]
ARMS = {  # name -> (reward model, arguments of rl_training.py)
    "A": (PLAIN, ["--begin_suppress_tokens", "none", *NO_CURE]),
    "B": (PLAIN, ["--begin_suppress_tokens", "eos", *NO_CURE]),
    "C": (ROBUST, ["--allow_weak_reward", "true"]),
}
ABLATION = {
    "only the reward model": (ROBUST, ["--begin_suppress_tokens", "none", *NO_CURE]),
    "only the floor": (PLAIN, ["--begin_suppress_tokens", "none", *NO_CURE, "--floor_broken_replies", "true"]),
    "only the guard": (PLAIN, ["--begin_suppress_tokens", "none", *NO_CURE, "--guard", "stop"]),
    "all but the reward model": (PLAIN, ["--allow_weak_reward", "true"]),
    "all but the guard": (ROBUST, ["--allow_weak_reward", "true", "--guard", "warn"]),
}
TITLES = {"score": "score (reward model)", "gold": "gold score (rules)", "length": "reply length (tokens)"}


def run_module(folder: Path, log: str, *words: str) -> None:
    """Run a script of the toolkit in a process of its own, its output in folder/log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(folder / log, "w", encoding="utf-8") as file:
        result = subprocess.run([sys.executable, *words], check=False, stdout=file, stderr=file, env=environment)
    if result.returncode:
        tail = (folder / log).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise RuntimeError(f"{' '.join(words[:2])} failed, see {folder / log}: {tail}")


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepare(folder: Path, seed: int) -> None:
    """World, SFT and both reward models of one seed."""
    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run_module(folder, "world.log", "-m", "demo.make_world", "--output_dir", f"{folder}/world", "--seed", f"{seed}")
    pairs = write_rows(folder / "pairs.jsonl", world.gapped_preference_rows(seed, 3200))
    held_out = write_rows(folder / "pairs_heldout.jsonl", world.gapped_preference_rows(seed, 400, held_out=True))
    prompts = world.prompts(seed, 960)
    write_rows(folder / "guard_prompts.jsonl", prompts[:GUARD_PROMPTS])
    write_rows(folder / "prompts.jsonl", prompts[GUARD_PROMPTS:])
    common = ["--model_name", f"{folder}/world/base", "--seed", f"{seed}", "--disable_tqdm", "true"]
    sft = ["--dataset", f"{folder}/world/sft.jsonl", "--output_dir", f"{folder}/sft"]
    run_module(folder, "sft.log", "sft_training.py", "--config", "configs/sft_demo.yaml", *common, *sft)
    for name, ratio in ((PLAIN, "0"), (ROBUST, "0.25")):
        data = ["--dataset", pairs, "--eval_dataset", held_out, "--degenerate_ratio", ratio]
        more = [
            "--output_dir",
            f"{folder}/{name}",
            "--sft_model_lora_path",
            f"{folder}/sft",
            "--output_max_length",
            "48",
        ]
        config = ["reward_modeling.py", "--config", "configs/reward_demo.yaml"]
        run_module(folder, f"{name}.log", *config, *common, *data, *more)
    (folder / "ready").touch()


def run_arm(folder: Path, seed: int, arm: str, iterations: int) -> None:
    """PPO of one seed and arm."""
    output = folder / arm.replace(" ", "_")
    if (output / "adapter_model.safetensors").exists():
        return
    shutil.rmtree(output, ignore_errors=True)
    reward, arguments = {**ARMS, **ABLATION}[arm]
    data = ["--dataset", f"{folder}/prompts.jsonl", "--eval_dataset", f"{folder}/guard_prompts.jsonl"]
    adapters = ["--sft_model_lora_path", f"{folder}/sft", "--reward_model_lora_path", f"{folder}/{reward}"]
    length = ["--steps", f"{iterations}", "--save_freq", f"{iterations}", "--lr_scheduler_type", "constant"]
    run_module(
        folder,
        f"{output.name}.log",
        *["rl_training.py", "--config", "configs/ppo_demo.yaml", "--model_name", f"{folder}/world/base"],
        *["--seed", f"{seed}", "--disable_tqdm", "true", "--output_dir", f"{output}", *data, *adapters, *length],
        *arguments,
    )


def read_arm(folder: Path, seed: int, arm: str) -> dict:
    """Curves of a run over its iterations, and what the guard said."""
    output = folder / arm.replace(" ", "_")
    curves: dict[str, list[float]] = {name: [] for name in ("score", "gold", "length", "empty")}
    rows = read_jsonl(str(output / "samples.jsonl"))
    for iteration in range(1, rows[-1]["iteration"] + 1):
        replies = [row for row in rows if row["iteration"] == iteration]
        curves["score"].append(mean(row["score"] for row in replies))
        curves["length"].append(mean(row["length"] for row in replies))
        curves["gold"].append(mean(gold_score(row["prompt"], row["response"]) for row in replies))
        curves["empty"].append(mean(not row["response"].strip() for row in replies))
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return {"seed": seed, "arm": arm, "curves": curves, "best": run["best"], **run["guard"]}


def summarise(runs: list[dict], final: dict) -> str:
    """The tables, in Markdown; final: arm -> seed -> held-out measures of SFT, last and best."""
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for all runs and the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--iterations", type=int, default=80, help="of PPO")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at once, a core each")
    parser.add_argument("--ablation", action="store_true", help="the arms of the ablation too")
    args = parser.parse_args()
    arms = [*ARMS, *(ABLATION if args.ablation else ())]

    # ---- Training ----
    progress = tqdm(total=len(args.seeds) * (len(arms) + 1), desc="runs")

    def train(seed: int) -> None:
        folder = args.output_dir / f"seed{seed}"
        prepare(folder, seed)
        progress.update()
        for arm in arms:
            run_arm(folder, seed, arm, args.iterations)
            progress.update()

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train, args.seeds))
    progress.close()


if __name__ == "__main__":
    run_script(main)
