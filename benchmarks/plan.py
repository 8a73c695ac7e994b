"""What --plan predicts beside what a run takes: five settings, each in a process of its own, on the CPU.

    python -m benchmarks.plan --output_dir plan

Random Llama models, random words, every row as long as --max_length allows (one in four a token shorter, so that there is
padding).  Measured is the peak resident memory of the whole script (VmHWM, so Linux only) over that of a process which has
imported it and done nothing.  glibc keeps freed blocks for later unless they are large, and raises what counts as large
while the program runs; so MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_ARENA_MAX=1 are set, with which freed memory goes back to
the system, and MALLOC_TRIM_THRESHOLD_ to glibc's own default, so that the scripts do not set theirs (`keep_freed_memory`).
--malloc_defaults sets nothing: the scripts keep freed memory, as they do for a user.  Writes plan.md.
"""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import reward_modeling
import rl_training
import sft_training
from benchmarks.runs import ALONE, write_rows
from lora.adapters import read_adapter
from lora.base_model import load_base
from lora.lora_layers import new_lora_config
from rewards.reward_model import new_reward_model
from runs.memory_plan import Plan, gib, ppo_plan, reward_plan, sft_plan
from utils.arguments import DataArguments, LoraArguments, ModelArguments, PlanArguments, parse_arguments
from utils.console import run_script

RUN = ["--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no"]
RUN += ["--prompt_template", "{prompt}"]

# VmHWM, not ru_maxrss: the latter starts with what the parent held when it started the child.
CHILD = """
import importlib, pathlib, re, runpy, sys
_, result, module, script, *words = sys.argv
importlib.import_module(module)
if script:
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
status = pathlib.Path("/proc/self/status").read_text()
pathlib.Path(result).write_text(str(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024))
"""


class Setting(NamedTuple):
    """One row of the table."""

    name: str
    script: str
    hidden: int
    layers: int
    vocabulary: int
    arguments: str  # as on a command line


SETTINGS = [
    Setting(
        "SFT, 8 x 256 tokens",
        *("sft_training.py", 512, 8, 8000),
        "--max_length 256 --per_device_train_batch_size 8 --max_steps 2 --lora_r 8",
    ),
    Setting(
        "SFT, 16 x 256 tokens, large vocabulary, activation checkpointing, no LoRA dropout",
        *("sft_training.py", 256, 12, 49152),
        "--max_length 256 --per_device_train_batch_size 16 --max_steps 2 --lora_dropout 0 --activation_checkpointing true "
        "--lora_target_modules q_proj,v_proj",
    ),
    Setting(
        "reward, 8 pairs x 2 x 192 tokens",
        *("reward_modeling.py", 448, 8, 16000),
        "--max_length 192 --per_device_train_batch_size 8 --max_steps 2 --degenerate_ratio 0 --probe_prompts 4 "
        "--eval_strategy no",
    ),
    Setting(
        "PPO, batch 16, mini-batch 8, 64 + 64 tokens",
        *("rl_training.py", 576, 12, 49152),
        "--batch_size 16 --mini_batch_size 8 --max_length 128 --output_max_length 64",
    ),
    Setting(
        "PPO, batch 16, mini-batch 16, 448 + 64 tokens, critic with an adapter, activation checkpointing",
        *("rl_training.py", 512, 8, 32000),
        "--batch_size 16 --mini_batch_size 16 --max_length 512 --output_max_length 64 --critic adapter "
        "--activation_checkpointing true",
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts need
# ---------------------------------------------------------------------------------------------------------------------


def make_base(folder: Path, setting: Setting) -> str:
    """Random Llama model and a tokenizer of words w0, w1 ... of its vocabulary."""
    torch.manual_seed(0)
    heads = setting.hidden // 64
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=setting.vocabulary,
            hidden_size=setting.hidden,
            intermediate_size=setting.hidden * 8 // 3,
            num_hidden_layers=setting.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    ).save_pretrained(folder)
    words = ["<pad>", "</s>", *(f"w{number}" for number in range(setting.vocabulary - 2))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


def make_adapters(base: str, folder: Path) -> dict[str, str]:
    """New SFT and reward adapters, all linear layers."""
    lora = LoraArguments(lora_r=8)
    for stage in ("sft", "reward"):
        model = load_base(ModelArguments(base), torch.float32)
        if stage == "sft":
            model = get_peft_model(model, new_lora_config(lora, model, "CAUSAL_LM"))
        else:
            model, _ = new_reward_model(model, lora, seed=0)
        model.save_pretrained(folder / stage)
    return {"--sft_model_lora_path": f"{folder}/sft", "--reward_model_lora_path": f"{folder}/reward"}


def make_data(folder: Path, setting: Setting, prompt: int, reply: int) -> list[str]:
    """Rows of `prompt` and `reply` tokens, EOS not counted, the first of each four one token shorter."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(setting.vocabulary - 2)}" for _ in range(length))

    def rows(count: int) -> list[dict[str, str]]:
        lengths = [prompt - (number % 4 == 0) for number in range(count)]
        if setting.script == "reward_modeling.py":
            return [{"prompt": text(n), "chosen": text(reply), "rejected": text(reply)} for n in lengths]
        return [{"prompt": text(n), "response": text(reply)} for n in lengths]

    words = ["--dataset", write_rows(folder / "rows.jsonl", rows(64))]
    if setting.script == "reward_modeling.py":
        words += ["--eval_dataset", write_rows(folder / "heldout.jsonl", rows(16))]
    return words


def command(folder: Path, setting: Setting) -> list[str]:
    """Arguments of the run, after everything that they point at was made."""
    arguments = setting.arguments.split()
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    longest = int(given["--max_length"])
    base = make_base(folder / "base", setting)
    words = ["--model_name_or_path", base, "--output_dir", f"{folder}/out", *arguments, *RUN]
    if setting.script == "rl_training.py":
        for name, path in make_adapters(base, folder).items():
            words += [name, path]
        words += ["--allow_weak_reward", "true", "--steps", "2", "--ppo_epochs", "1", "--guard", "off"]
        words += ["--begin_suppress_tokens", "0,1"]
        reply = int(given["--output_max_length"])
    else:
        reply = longest // 4
    # EOS takes one place of an SFT row or a pair; in stage 3 the prompt has its own share
    prompt = longest - reply if setting.script == "rl_training.py" else longest - reply - 1
    return words + make_data(folder, setting, prompt, reply)


# ---------------------------------------------------------------------------------------------------------------------
# Predicted and measured
# ---------------------------------------------------------------------------------------------------------------------


def predict(setting: Setting, words: list[str]) -> Plan:
    """The plan that the script makes of these arguments."""
    kinds: dict[str, list[type]] = {
        "sft_training.py": [ModelArguments, DataArguments, LoraArguments, sft_training.SFTArguments],
        "reward_modeling.py": [
            ModelArguments,
            reward_modeling.RewardDataArguments,
            LoraArguments,
            reward_modeling.RewardArguments,
        ],
        "rl_training.py": [ModelArguments, DataArguments, rl_training.PPOArguments],
    }
    parsed: tuple[Any, ...] = parse_arguments([*kinds[setting.script], PlanArguments], words)
    if setting.script == "sft_training.py":
        model, _, lora, args, _ = parsed
        return sft_plan(model, lora, args, torch.float32, evaluates=False)
    if setting.script == "reward_modeling.py":
        model, data, lora, args, _ = parsed
        return reward_plan(model, data.max_length, lora, args, torch.float32)
    model, _, args, _ = parsed
    sft = read_adapter(args.sft_model_lora_path, "--sft_model_lora_path")
    reward = read_adapter(args.reward_model_lora_path, "--reward_model_lora_path")
    return ppo_plan(model, args, sft, reward, torch.float32)


def peak_of(script: str | None, module: str, words: list[str], log: Path, malloc_defaults: bool) -> int:
    """Peak resident bytes of a process that imports `module`, and runs the script where there is one.

    Raises RuntimeError when it fails.
    """
    environment = os.environ | ALONE
    if not malloc_defaults:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    result = log.with_suffix(".peak")
    with open(log, "w", encoding="utf-8") as file:
        command = [sys.executable, "-c", CHILD, str(result), module, script or "", *words]
        done = subprocess.run(command, check=False, stdout=file, stderr=file, env=environment)
    if done.returncode:
        raise RuntimeError(f"{script} failed, see {log}")
    return int(result.read_text())


def row(folder: Path, setting: Setting, malloc_defaults: bool) -> str:
    """One row of the table, after what it is made of has been printed."""
    folder.mkdir(parents=True)
    words = command(folder, setting)
    plan = predict(setting, words)
    predicted = plan.peak - plan.held.get("Python and libraries (measured)", 0)
    module = setting.script.removesuffix(".py")
    before = peak_of(None, module, [], folder / "import.log", malloc_defaults)
    measured = peak_of(setting.script, module, words, folder / "run.log", malloc_defaults) - before
    text = f"| {setting.name} | {setting.hidden} x {setting.layers}, {setting.vocabulary} | {plan.fullest} | "
    text += f"{gib(before)} | {gib(predicted)} | {gib(measured)} | {predicted / measured:.2f} |"
    print(text)
    for name, size in {**plan.held, **plan.phases[plan.fullest]}.items():
        print(f"    {name}: {gib(size)}")
    print("    " + ", ".join(f"{name}: {gib(sum(parts.values()))}" for name, parts in plan.phases.items()))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for all runs and the table")
    parser.add_argument("--malloc_defaults", action="store_true", help="leave glibc's memory allocation to the scripts")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings, from 0; all by default")
    args = parser.parse_args()
    numbers = range(len(SETTINGS)) if args.only is None else args.only
    rows = [row(args.output_dir / f"setting{n}", SETTINGS[n], args.malloc_defaults) for n in numbers]
    lines = ["| setting | hidden x layers, vocabulary | fullest phase | Python | predicted | measured | ratio |"]
    text = "\n".join([*lines, "|" + "---|" * 7, *rows]) + "\n"
    (args.output_dir / "plan.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_script(main)
