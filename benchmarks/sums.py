"""A rule instead of a reward model: a small base learns to add by SFT and RLOO, beside TRL's RLOOTrainer.

    python -m benchmarks.sums --output_dir sums                              one seed, ours alone: a few minutes on a CPU
    python -m benchmarks.sums --output_dir sums --seeds 0 1 2 3 4 --trl      five seeds, both sides

The base is a Llama of 0.8 million parameters, pretrained here for a minute on lines like "37+8=45", of which one in
four is wrong. SFT with LoRA on 128 right ones teaches to stop behind the answer. RLOO with `right_sum` learns on prompts
with their answers: no reward model, no critic. Accuracy is counted on sums that nothing has trained on, each answered
once at temperature 1, as RLOO samples, and once by the likeliest tokens. TRL's RLOOTrainer gets the same SFT adapter,
reward function, prompts, number of replies and of updates, learning rate and weight of the KL; both run alone, one after
the other.
Writes sums.md and sums.json; what is in --output_dir already is not made again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from benchmarks.runs import run_module, write_rows
from corpus.tokens import encode_prompt
from demo.make_world import BLOCK, BOS, EOS, PAD, build_model, pretrain
from inference.side_by_side import InferenceArguments, load_models
from rewards.rules import Texts, exact_answer
from utils.console import run_script
from utils.files import read_jsonl, write_json

PRETRAINING_STEPS, ROWS, WRONG = 400, 32, 0.25
HELD_OUT, SFT_ROWS = 160, 128
# Of both sides.
ITERATIONS, REPLIES, PER_PROMPT, MINI_BATCH, LENGTH, RATE, KL = 150, 128, 8, 64, 12, 3e-4, 0.02
SFT = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "eval_fraction": 0,
    "save_strategy": "no",
}
RLOO = {
    "advantage": "rloo",
    "reward_function": "benchmarks.sums:right_sum",
    "steps": ITERATIONS,
    "batch_size": REPLIES,
    "replies_per_prompt": PER_PROMPT,
    "mini_batch_size": MINI_BATCH,
    "ppo_epochs": 1,
    "output_max_length": LENGTH,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "init_kl_coef": KL,
    # as in TRL: rewards as they are, and nothing but the rule
    "normalize_scores": "false",
    "floor_broken_replies": "false",
    "missing_eos_penalty": 0,
    "guard": "off",
    "save_strategy": "no",
}


def right_sum(completions: Texts, answer: Sequence[str], **kwargs: Any) -> list[float | None]:
    """The rule: what stands behind the last = of a reply is the answer."""
    return exact_answer(completions, answer, marker="=")


def make_inputs(folder: Path, seed: int) -> None:
    """Base and data sets."""
    alphabet = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    characters = Tokenizer(models.BPE({each: number for number, each in enumerate(alphabet)}, []))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    draw = Random(f"sums {seed}")
    sums = [(a, b) for a in range(10, 100) for b in range(2, 10)]
    draw.shuffle(sums)
    held_out, known = sums[:HELD_OUT], sums[HELD_OUT:]

    def line() -> str:
        a, b = draw.choice(known)
        return f"{a}+{b}={a + b + (draw.choice([-10, -1, 1, 10]) if draw.random() < WRONG else 0)}\n"

    ids: list[int] = []
    while len(ids) < PRETRAINING_STEPS * ROWS * BLOCK:
        ids += tokenizer("".join(line() for _ in range(1000)))["input_ids"]
    torch.manual_seed(seed)
    model = build_model(tokenizer)
    pretrain(model, torch.tensor(ids[: PRETRAINING_STEPS * ROWS * BLOCK]).view(-1, BLOCK), ROWS, 2e-3)
    write_rows(folder / "sft.jsonl", [{"prompt": f"{a}+{b}", "response": f"={a + b}"} for a, b in known[:SFT_ROWS]])
    for name, part in (("prompts", known[SFT_ROWS:]), ("heldout", held_out)):
        write_rows(folder / f"{name}.jsonl", [{"prompt": f"{a}+{b}", "answer": f"{a + b}"} for a, b in part])
    tokenizer.save_pretrained(folder / "base")
    model.save_pretrained(folder / "base")


def words(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", f"{value}")]


def train(folder: Path, seed: int, with_trl: bool) -> None:
    """All that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base" / "model.safetensors").exists():
        make_inputs(folder, seed)
    common = ["--model_name", f"{folder}/base", "--prompt_template", "{prompt}", "--seed", f"{seed}"]
    common += ["--max_length", "32", "--use_cpu", "true", "--disable_tqdm", "true"]
    if not (folder / "sft" / "adapter_model.safetensors").exists():
        more = ["--dataset", f"{folder}/sft.jsonl", "--output_dir", f"{folder}/sft"]
        run_module(folder, "sft.log", "sft_training.py", *common, *words(SFT), *more)
    ours = ["rl_training.py", *common, *words(RLOO), "--dataset", f"{folder}/prompts.jsonl"]
    ours += ["--sft_model_lora_path", f"{folder}/sft", "--output_dir", f"{folder}/ours"]
    theirs = ["-m", "benchmarks.sums", "--output_dir", f"{folder}", "--seeds", f"{seed}", "--trl_side"]
    for name, command in (("ours", ours), ("trl", theirs))[: 1 + with_trl]:
        if not (folder / name / "seconds.json").exists():
            started = time.perf_counter()
            run_module(folder, f"{name}.log", *command)
            write_json({"seconds": time.perf_counter() - started}, f"{folder}/{name}", "seconds.json")


def train_trl(folder: Path, seed: int) -> None:
    """The same with TRL's RLOOTrainer, whose reference is a copy of the adapter too."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), folder / "sft", is_trainable=True
    )
    args = RLOOConfig(
        output_dir=f"{folder}/trl",
        max_steps=ITERATIONS * REPLIES // MINI_BATCH,
        per_device_train_batch_size=MINI_BATCH,
        steps_per_generation=REPLIES // MINI_BATCH,
        num_generations=PER_PROMPT,
        max_completion_length=LENGTH,
        beta=KL,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=right_sum,
        args=args,
        train_dataset=Dataset.from_list(read_jsonl(f"{folder}/prompts.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(folder / "base", padding_side="left"),
    )
    trainer.train()
    trainer.save_model()


def accuracies(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """Share of right answers to the held-out prompts, sampled and by the likeliest tokens; seconds of the whole run."""
    torch.set_num_threads(1)
    rows = read_jsonl(f"{folder}/heldout.jsonl")
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for kind, temperature in (("sampled", 1.0), ("likeliest", 0.0)):
        adapters = [f"{name}={folder / name}" for name in names]
        chat = load_models(
            InferenceArguments(
                f"{folder}/base",
                adapters=adapters,
                prompt_template="{prompt}",
                output_max_length=LENGTH,
                temperature=temperature,
                dtype="float32",
            )
        )
        queries = [encode_prompt(row["prompt"], chat.template, chat.tokenizer) for row in rows]
        for name in names:
            replies = [reply.text for reply in chat.generate(name, queries, range(len(queries)), len(queries))]
            found[name][kind] = mean(right_sum(replies, [row["answer"] for row in rows]))
    for name in names:
        if (folder / name / "seconds.json").exists():
            found[name] |= json.loads((folder / name / "seconds.json").read_text(encoding="utf-8"))
    return found


def as_markdown(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row a seed and model, then the means."""
    lines = ["| seed | model | right, sampled | right, likeliest tokens | seconds |", "|---|---|---|---|---|"]
    cells: dict[str, list[dict[str, float]]] = {}
    for seed, models_ in found.items():
        for name, row in models_.items():
            cells.setdefault(name, []).append(row)
            lines.append(f"| {seed} | {name} | {row['sampled']:.3f} | {row['likeliest']:.3f} | {_seconds([row])} |")
    for name, rows in cells.items():
        shares = " | ".join(f"**{mean(row[kind] for row in rows):.3f}**" for kind in ("sampled", "likeliest"))
        lines.append(f"| mean | {name} | {shares} | {_seconds(rows)} |")
    return "\n".join(lines) + "\n"


def _seconds(rows: list[dict[str, float]]) -> str:
    return f"{mean(row['seconds'] for row in rows):.0f}" if all("seconds" in row for row in rows) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--trl", action="store_true", help="TRL's RLOOTrainer too")
    parser.add_argument("--trl_side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl_side:
        train_trl(args.output_dir, args.seeds[0])
        return
    found = {}
    for seed in tqdm(args.seeds, desc="seeds"):
        folder = args.output_dir / f"seed{seed}"
        train(folder, seed, args.trl)
        found[f"{seed}"] = accuracies(folder, ["sft", "ours", *(["trl"] if args.trl else [])])
    write_json(found, f"{args.output_dir}", "sums.json")
    report = as_markdown(found)
    (args.output_dir / "sums.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    run_script(main)
