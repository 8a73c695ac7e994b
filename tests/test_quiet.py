"""What a run prints is the toolkit's own: no warning or traceback of a library that a user can do nothing about."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import make_tokenizer
from tests.forks import ROOT, run_command
from tests.tiny import tiny_model

SCRIPTS = ("sft_training", "reward_modeling", "rl_training", "merge_lora", "compare", "chat")


@pytest.fixture(scope="module")
def printed(tmp_path_factory, data):
    """What each stage prints, on a mixture of experts, each with the adapters of the ones before it."""
    folder = tmp_path_factory.mktemp("quiet")
    tiny_model("mixtral").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    common = ["--model_name", folder / "base", "--prompt_template", "{prompt}=", "--eval_fraction", "0.3"]
    common += ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no"]
    adapters = ["--sft_model_lora_path", folder / "sft", "--reward_model_lora_path", folder / "reward"]
    sizes = ["--steps", "1", "--batch_size", "2", "--output_max_length", "4", "--allow_weak_reward", "true"]
    stages = {
        "sft": ("sft_training.py", "--dataset", data["sft"], "--max_steps", "1"),
        "reward": ("reward_modeling.py", "--dataset", data["preferences"], "--max_steps", "1"),
        "ppo": ("rl_training.py", "--dataset", data["preferences"], *adapters, *sizes),
    }
    printed = {}
    for name, (script, *words) in stages.items():
        done = run_command([ROOT / script, *common, *words, "--output_dir", folder / name], folder)
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout + done.stderr
    return printed


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_prints_no_message_of_a_library(printed, stage):
    """Every stage warned of is_gradient_checkpointing and PAD/BOS; with Mixtral stage 3 printed a traceback and went on.

    --disable_tqdm left the bars of weights, tokenizing and TRL's look through the rows.
    """
    for noise in (
        "Warning",
        "Traceback",
        "[transformers]",
        "is_gradient_checkpointing",
        "no plan",
        "it/s",
        "examples/s",
    ):
        assert noise not in printed[stage]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_counts_name_the_split_that_they_are_of(printed, stage):
    counts = [line for line in printed[stage].splitlines() if re.search(r"\d+ kept|ordinary ones", line)]
    assert len(counts) > 1
    assert [line for line in counts if not re.match(r"(training|held-out) ", line)] == []


@pytest.mark.parametrize(("stage", "what"), [("sft", "8 rows"), ("reward", "8 pairs"), ("ppo", "2 replies")])
def test_the_start_of_a_stage_says_how_many_processes_there_are(printed, stage, what):
    """`accelerate launch --cpu --num_processes 2` ran one, and nothing printed said so."""
    assert f"processes: 1; {what} a" in printed[stage]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_quiet_before_it_imports_a_library(script):
    """transformers prints a line about WANDB_MODE while it is imported: tests/test_article.py sees that it does not."""
    nodes = ast.parse(Path(ROOT, f"{script}.py").read_text(encoding="utf-8")).body
    imports = [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports[0] == "import utils.quiet"
