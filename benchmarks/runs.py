"""What the benchmarks in the demo's world share: run a script, judge what it made, do several in parallel."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from demo.table import Row, judge
from inference.side_by_side import InferenceArguments, load_models
from utils.files import read_jsonl

OUTPUT_MAX_LENGTH = 48  # tokens, as in configs/ppo_demo.yaml
# A process of its own on a core of its own, which asks nobody anything.
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_module(folder: Path, log: str, *words: str) -> None:
    """Run a script of the toolkit in a process of its own with one thread, its output in folder/log."""
    with open(folder / log, "w", encoding="utf-8") as file:
        command = [sys.executable, *words]
        result = subprocess.run(command, check=False, stdout=file, stderr=file, env=os.environ | ALONE)
    if result.returncode:
        tail = (folder / log).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise RuntimeError(f"{' '.join(words[:2])} failed, see {folder / log}: {tail}")


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> str:
    """Rows as a .jsonl file; returns its path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_world_and_sft(folder: Path, seed: int) -> None:
    """The demo's world of a seed in folder/world, with the SFT adapter in folder/sft, unless they are there."""
    if (folder / "sft" / "adapter_model.safetensors").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run_module(folder, "world.log", "-m", "demo.make_world", "--output_dir", f"{folder}/world", "--seed", f"{seed}")
    data = ["--dataset", f"{folder}/world/sft.jsonl", "--output_dir", f"{folder}/sft"]
    run_module(folder, "sft.log", "sft_training.py", "--config", "configs/sft_demo.yaml", *common(folder, seed), *data)


def common(folder: Path, seed: int) -> list[str]:
    """Arguments that all three scripts take here."""
    return ["--model_name", f"{folder}/world/base", "--seed", f"{seed}", "--disable_tqdm", "true"]


def train_reward(folder: Path, seed: int, name: str, pairs: str, held_out: str, *more: str) -> None:
    """A reward model in folder/name, unless it is there."""
    if (folder / name / "reward_card.json").exists():
        return
    shutil.rmtree(folder / name, ignore_errors=True)
    words = ["reward_modeling.py", "--config", "configs/reward_demo.yaml", *common(folder, seed), "--dataset", pairs]
    words += ["--eval_dataset", held_out, "--sft_model_lora_path", f"{folder}/sft", "--output_dir", f"{folder}/{name}"]
    run_module(folder, f"{name}.log", *words, *more)


def train_ppo(folder: Path, seed: int, name: str, reward: str, prompts: str, *more: str) -> None:
    """A PPO run in folder/name, unless it is there; reward: the name of the reward model beside it."""
    if (folder / name / "adapter_model.safetensors").exists():
        return
    shutil.rmtree(folder / name, ignore_errors=True)
    words = ["rl_training.py", "--config", "configs/ppo_demo.yaml", *common(folder, seed), "--dataset", prompts]
    words += ["--sft_model_lora_path", f"{folder}/sft", "--reward_model_lora_path", f"{folder}/{reward}"]
    words += ["--eval_dataset", f"{folder}/world/guard_prompts.jsonl"]
    run_module(folder, f"{name}.log", *words, "--output_dir", f"{folder}/{name}", *more)


def in_parallel(work: Callable[[Any], None], tasks: Sequence[Any], jobs: int) -> None:
    """Do the tasks, `jobs` of them at once, with a progress bar."""
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(tasks), desc="tasks") as progress:
        for _ in pool.map(work, tasks):
            progress.update()


def judge_adapters(folder: Path, reward: str, adapters: dict[str, Path]) -> list[Row]:
    """Gold, score and length of base, SFT and the adapters on the world's held-out prompts.

    Each is sampled as its PPO run did: a policy that learned to say nothing looks better where it has to say something.
    """
    torch.set_num_threads(1)  # the demo's model is so small that threads cost more than they bring: ten times as long
    folders = {"SFT": folder / "sft", **adapters}
    models = load_models(
        InferenceArguments(
            f"{folder}/world/base",
            adapters=[f"{name}={path}" for name, path in folders.items()],
            reward_model_lora_path=f"{folder}/{reward}",
            output_max_length=OUTPUT_MAX_LENGTH,
            dtype="float32",
        )
    )
    prompts = [row["prompt"] for row in read_jsonl(f"{folder}/world/heldout_prompts.jsonl")]
    return [judge(models, name, prompts) for name in models.adapters]
