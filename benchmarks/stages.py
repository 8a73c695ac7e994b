"""SFT and reward stage beside TRL's own trainers: real tokens a second, and how much of the work is padding.

    python -m benchmarks.stages --output_dir stages

The same random Llama model, LoRA, batches and ragged rows for both sides, in turn (ours, TRL's, ours, TRL's ...), each run
in a process of its own with one thread.  A token counts when it is real; the share of padding is that of all positions that
went through the decoder.  Seconds are the processor's (with one thread the wall clock's, where nothing else runs), and
ratios are of neighbours in time, so that a busy machine does little harm.  Writes stages.md.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import reward_modeling
from benchmarks.runs import ALONE
from rewards.reward_model import new_reward_model
from sft_training import SFTArguments, SortedSFTTrainer
from utils.arguments import LoraArguments
from utils.console import run_script

WARMUP = 1  # optimizer steps before the clock starts
SHAPE = {"vocab_size": 16000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 6, "num_key_value_heads": 2}
SHAPE |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
SETTINGS = {  # stage, rows or pairs in a batch, batches an optimizer step
    "SFT, 8 rows": ("sft", 8, 1),
    "SFT, 4 rows x 8 batches a step": ("sft", 4, 8),
    "SFT, 32 rows": ("sft", 32, 1),
    "reward, 8 pairs": ("reward", 8, 1),
    "reward, 32 pairs": ("reward", 32, 1),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def make_rows(stage: str, count: int) -> Dataset:
    """Ragged rows: prompts of 8 to 64 tokens; replies of 4 to 384, half of them shorter than 60 (log-normal)."""
    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(2, SHAPE["vocab_size"]) for _ in range(length)]

    def reply() -> list[int]:
        return [*ids(min(384, max(4, int(draw.lognormvariate(4.1, 0.9))))), 1]

    rows = []
    for _ in range(count):
        query = ids(draw.randint(8, 64))
        if stage == "sft":
            answer = reply()
            rows.append({"input_ids": query + answer, "labels": [-100] * len(query) + answer})
        else:
            row: dict[str, Any] = {"chosen_ids": query + reply(), "rejected_ids": query + reply()}
            rows.append(row | {"query_length": len(query), "margin": 0.0, "kind": ""})
    return Dataset.from_list(rows)


class Clock(TrainerCallback):
    """Processor seconds after the warm-up, and the positions that went through the decoder in them."""

    def __init__(self, model: nn.Module) -> None:
        self.real = self.positions = 0
        self.started = self.seconds = 0.0
        model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self.positions += (args[0] if args else inputs["input_ids"]).numel()
        self.real += int(inputs["attention_mask"].sum())

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == WARMUP:
            self.real = self.positions = 0
            self.started = time.process_time()
        self.seconds = time.process_time() - self.started


def make_trainer(side: str, stage: str, rows: int, batches: int, steps: int, folder: str) -> tuple[Trainer, nn.Module]:
    """A trainer of either side, and the causal model or classifier under it."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"output_dir": folder, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    shared |= {"max_steps": steps, "save_strategy": "no", "per_device_train_batch_size": rows, "bf16": False}
    shared |= {"gradient_accumulation_steps": batches, "dataloader_pin_memory": False, "logging_steps": 1000}
    shared |= {"learning_rate": 1e-4, "activation_checkpointing": False}
    data = make_rows(stage, rows * batches * steps)
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.0}
    config = LlamaConfig(**SHAPE, max_position_embeddings=1024)
    more: dict[str, Any] = {"train_dataset": data, "processing_class": make_tokenizer()}
    if stage == "sft":
        model = LlamaForCausalLM(config)
        peft = LoraConfig(task_type="CAUSAL_LM", **lora)
        if side == "ours":
            args = SFTArguments(**shared, max_length=512)
            return SortedSFTTrainer(model=model, args=args, peft_config=peft, **more), model
        return SFTTrainer(model=model, args=SFTConfig(**shared, max_length=512), peft_config=peft, **more), model
    if side == "ours":
        model = LlamaForCausalLM(config).requires_grad_(False)
        wrapped, members = new_reward_model(model, LoraArguments(lora_r=8, lora_alpha=16, lora_dropout=0.0), seed=0)
        args = reward_modeling.RewardArguments(**shared, eval_strategy="no")
        return reward_modeling.RewardTrainer(model=wrapped, args=args, members=members, **more), model
    model = LlamaForSequenceClassification(LlamaConfig(**SHAPE, max_position_embeddings=1024, num_labels=1))
    wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **lora))
    args = RewardConfig(**shared, max_length=512, center_rewards_coefficient=0.01)
    more["train_dataset"] = data.select_columns(["chosen_ids", "rejected_ids"])
    return RewardTrainer(model=wrapped, args=args, **more), model


def work(side: str, name: str, steps: int, folder: str) -> None:
    """One run; its figures as JSON on the last line."""
    torch.set_num_threads(1)
    trainer, model = make_trainer(side, *SETTINGS[name], steps + WARMUP, folder)
    clock = Clock(model)
    trainer.add_callback(clock)
    trainer.train()
    rate = clock.real / clock.seconds
    print(json.dumps({"rate": rate, "padding": 1 - clock.real / clock.positions, "positions": clock.positions}))


def measure(side: str, name: str, steps: int, folder: Path) -> dict[str, float]:
    """`work` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.stages", "--output_dir", f"{folder}"]
    command += ["--side", side, "--setting", name, "--steps", f"{steps}"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | ALONE)
    if result.returncode:
        raise RuntimeError(f"{name} ({side}) failed: {result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the table")
    parser.add_argument("--setting", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="all by default")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--side", choices=["ours", "TRL"], help="only this run, here: what the benchmark starts")
    args = parser.parse_args()
    if args.side:
        work(args.side, args.setting[0], args.steps, str(args.output_dir))
        return
    lines = ["| setting | padding: ours | TRL | tokens/s: ours | TRL | ratio (each round) |", "|" + "---|" * 6]
    for name in args.setting:
        pairs = [
            [measure(side, name, args.steps, args.output_dir) for side in ("ours", "TRL")] for _ in range(args.rounds)
        ]
        ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        ratios = [a["rate"] / b["rate"] for a, b in pairs]
        cells = [name, f"{ours[0]['padding']:.2f}", f"{theirs[0]['padding']:.2f}"]
        cells += [f"{median(run['rate'] for run in side):.0f}" for side in (ours, theirs)]
        cells.append(f"{median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "stages.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
