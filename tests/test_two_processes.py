"""Rule 8 of DESIGN.md: one process with gradient accumulation and two processes without give the same numbers.

All of it in float64 (tests/double.py), where the two are 2e-14 apart: in float32 three iterations at a learning rate of
1e-3 made of the last digit of a matrix product, which depends on the kind of CPU, more than the 1e-5 that was allowed.

The processes are real, and talk through gloo on the CPU: `accelerate launch` starts some, tests/forks.py the others, and
torchrun those of test_preemption.py.  With FSDP2 each of them holds a part of the parameters only (tests/sharded.py);
tests/stress/sharded.py does the same with DeepSpeed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reward_modeling
import rl_training
import sft_training
from tests import sharded
from tests.conftest import write_rows
from tests.double import store_as_float64
from tests.forks import free_port, run_jobs_in_float64, run_one, run_two
from tests.helpers import PROMPTS, Stages
from tests.sharded import launcher_environment
from utils.files import read_jsonl

ROOT = Path(__file__).parent.parent


def two_machines(*words: str) -> None:
    """The command on two machines as configs/accelerate/multi_node.yaml says: two launchers with one process each."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/multi_node.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", str(free_port())]
    machines = [
        subprocess.Popen(
            [*launch, "--machine_rank", rank, "-m", "tests.double", *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        shown = [machine.communicate(timeout=300)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(text[-4000:] for text in shown)


def changed(arguments: list[str], **values: object) -> list[str]:
    """The command line with these arguments set."""
    return [*arguments, *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def make_commands(stages: Stages, data: dict[str, str], folder: Path) -> dict[str, list[str]]:
    """What is the same in all kinds of run, by name of the run."""
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    ppo = [
        *("--model_name_or_path", stages.base, "--sft_model_lora_path", stages.sft, "--max_length", "64"),
        *("--reward_model_lora_path", stages.reward, "--dataset", prompts, "--eval_dataset", prompts),
        *("--steps", "3", "--ppo_epochs", "2", "--output_max_length", "10"),
        *("--learning_rate", "0.001", "--adap_kl_ctrl", "true", "--adap_kl_horizon", "50", "--save_freq", "3"),
        *("--eval_strategy", "steps", "--eval_steps", "3"),
        *("--allow_weak_reward", "true", "--guard", "warn", "--guard_freq", "2"),
        *("--gold_function", "tests.golds:judge"),
    ]
    tune = ["--model_name_or_path", stages.base, "--max_length", "64", "--lora_dropout", "0", "--logging_steps", "1"]
    tune += ["--learning_rate", "0.001", "--max_steps", "3"]
    reward = [*tune, "--dataset", data["preferences"], "--eval_dataset", data["preferences"]]
    sft = [*tune, "--dataset", data["sft"], "--eval_dataset", data["sft"]]
    return {
        "accumulation": ppo,
        "several steps": ppo,
        "critic": [*ppo, "--critic", "adapter"],
        "groups": [
            *(*ppo, "--advantage", "grpo", "--replies_per_prompt", "2"),
            *("--reward_function", "tests.judges:some_lengths,tests.judges:length", "--reward_weights", "1,2,0.5"),
        ],
        "reward": [
            *reward,
            "--dataloader_drop_last",
            "true",
        ],  # accelerate fills a short batch of two processes with copies
        "sft": sft,
        "uneven reward": [*reward, "--max_steps", "5"],
        "uneven sft": [*sft, "--max_steps", "6"],
    }


SCRIPTS = {
    "accumulation": rl_training,
    "several steps": rl_training,
    "critic": rl_training,
    "groups": rl_training,
    "reward": reward_modeling,
    "sft": sft_training,
    "uneven reward": reward_modeling,
    "uneven sft": sft_training,
}
ALONE = {  # what the arguments of one process have to be; the uneven ones are not compared
    "accumulation": {"batch_size": 8, "mini_batch_size": 4, "gradient_accumulation_steps": 2},
    "several steps": {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2},
    "critic": {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2},
    "groups": {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2},
    "reward": {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 8},
    "sft": {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4},
}
EACH_OF_TWO = {
    "accumulation": {"batch_size": 4, "mini_batch_size": 4, "gradient_accumulation_steps": 1},
    "several steps": {"batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 1},
    "critic": {"batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 1},
    "groups": {"batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 1},
    "reward": {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4},  # 16 rows, in two parts
    "sft": {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2},
    # 30 pairs with the broken ones in steps of 14, 12 examples in steps of 10: each epoch ends with a shorter batch
    "uneven reward": {"per_device_train_batch_size": 7, "per_device_eval_batch_size": 5},
    "uneven sft": {"per_device_train_batch_size": 5, "per_device_eval_batch_size": 5},
}
SHARDED = ("critic", "reward", "sft")


def whole_command(name: str, arguments: list[str], sizes: dict[str, int], folder: Path) -> list[str]:
    return [f"{SCRIPTS[name].__name__}.py", *changed(arguments, **sizes, output_dir=folder, disable_tqdm="true")]


def run_alone(commands: dict[str, list[str]], root: Path) -> None:
    """Run these in one process, into root/NAME alone."""
    jobs = root / "alone.json"
    words = [whole_command(name, command, ALONE[name], root / f"{name} alone") for name, command in commands.items()]
    jobs.write_text(json.dumps(words), encoding="utf-8")
    run_one(jobs, run_jobs_in_float64)


def command_of_two(name: str, arguments: list[str], folder: Path) -> list[str]:
    return whole_command(name, arguments, EACH_OF_TWO[name], folder)


def run_sharded(config: str, commands: dict[str, list[str]], root: Path) -> None:
    """Run these in two processes that share the parameters as configs/accelerate/CONFIG.yaml says, into root/NAME CONFIG."""
    jobs = root / f"{config}.json"
    words = [command_of_two(name, command, root / f"{name} {config}") for name, command in commands.items()]
    jobs.write_text(json.dumps(words), encoding="utf-8")
    run_two(jobs, sharded.main, **launcher_environment(config), ACCELERATE_USE_CPU="false")


@pytest.fixture(scope="module")
def outputs(stages: Stages, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the outputs of all runs, each named "NAME alone", "NAME two" or "NAME fsdp2"."""
    root = tmp_path_factory.mktemp("runs")
    commands = make_commands(stages, data, root)
    for folder in map(Path, stages):
        store_as_float64(folder)
    run_alone({name: commands[name] for name in ALONE}, root)
    two_machines(*command_of_two("accumulation", commands["accumulation"], root / "accumulation two"))
    jobs = root / "jobs.json"
    together = [
        command_of_two(name, commands[name], root / f"{name} two") for name in SCRIPTS if name != "accumulation"
    ]
    jobs.write_text(json.dumps(together), encoding="utf-8")
    run_two(jobs, run_jobs_in_float64)
    run_sharded("fsdp2", {name: commands[name] for name in SHARDED}, root)
    return root


def rows_of(folder: Path, key: str) -> list[dict]:
    return [row for row in read_jsonl(str(folder / "metrics.jsonl")) if key in row]


def assert_close(found: list[dict], wanted: list[dict], leave_out: set[str]) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - leave_out:
            assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9), name


def assert_same_weights(one: Path, other: Path, file: str) -> None:
    first, second = load_file(one / file), load_file(other / file)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == torch.float64
        assert (value - second[name]).abs().max() < 1e-9, name


@pytest.mark.parametrize(
    ("name", "kind"),
    [("accumulation", "two"), ("several steps", "two"), ("critic", "two"), ("groups", "two"), ("critic", "fsdp2")],
)
def test_ppo_gives_the_same_numbers_in_one_process_and_in_two(outputs: Path, name: str, kind: str) -> None:
    """Whitening, token means, seeds and the order of rows a process instead of a run have all been seen in the field.

    8 replies an iteration out of 12 prompts, so each epoch of prompts leaves some over, and they have to be the same.
    groups: replies to a prompt stay in one process, and each process calls the reward functions on its own.
    accumulation: one optimizer step an epoch of 4 + 4 rows, on two machines.  several steps: two of 2 + 2.
    fsdp2: what one process saved was its own part of each tensor, and only that process knew, so that the next forward pass
    of the two did not fit together.
    """
    check_ppo(outputs / f"{name} {kind}", outputs / f"{name} alone", optimizer_steps=2 if name == "accumulation" else 4)


def check_ppo(two: Path, alone: Path, optimizer_steps: int) -> None:
    wanted = rows_of(alone, "score_mean")
    assert [row["iteration"] for row in wanted] == [1, 2, 3]
    assert [row["optimizer_steps"] for row in wanted] == [optimizer_steps] * 3
    clocks = {"seconds", "tokens_per_second"}
    assert_close(rows_of(two, "score_mean"), wanted, clocks | {"ratio_first"})
    assert all(abs(row["ratio_first"] - 1) < 1e-9 for row in rows_of(two, "score_mean"))
    assert_close(rows_of(two, "eval_score_mean"), rows_of(alone, "eval_score_mean"), set())
    replies = [
        [(row["prompt"], row["response"]) for row in read_jsonl(str(run / "samples.jsonl"))] for run in (alone, two)
    ]
    assert replies[0] == replies[1]
    assert len(replies[0]) == 3 * 8
    files = [path.relative_to(alone) for path in alone.rglob("*.safetensors")]
    assert {str(file.parent) for file in files} >= {".", "checkpoint-3", "best"}
    for file in files:  # adapter, value head and critic, at the end and in between
        assert_same_weights(two, alone, str(file))


def test_there_were_two_processes(outputs: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` runs one process without a word: then all of this shows nothing."""
    for name in ("several steps", "critic", "groups", "reward", "sft"):
        assert [(outputs / f"{name} two" / f"world_{rank}.txt").read_text() for rank in (0, 1)] == ["2", "2"]
    # on two machines, as a user would start it: the Trainer's state of each process
    assert (outputs / "accumulation two" / "checkpoint-3" / "rng_state_1.pth").is_file()


def test_the_parameters_were_shared(outputs: Path) -> None:
    """accelerate ignores FSDP on the CPU without a word: then all of this shows nothing."""
    for name in SHARDED:
        assert [(outputs / f"{name} fsdp2" / f"ran_{rank}.txt").read_text() for rank in (0, 1)] == ["FSDP 2", "FSDP 2"]


@pytest.mark.parametrize("kind", ["two", "fsdp2"])
def test_the_reward_model_is_the_same_from_one_process_and_from_two(outputs: Path, kind: str) -> None:
    """Evaluation gathers scores of both processes; check_saved_adapter() runs on one while the other must not hang."""
    check_reward(outputs / f"reward {kind}", outputs / "reward alone")


def check_reward(two: Path, alone: Path) -> None:
    assert_close(rows_of(two, "loss"), rows_of(alone, "loss"), set())
    assert_same_weights(two, alone, "adapter_model.safetensors")
    cards = [json.loads((folder / "reward_card.json").read_text(encoding="utf-8")) for folder in (two, alone)]
    numbers = [{key: value for key, value in card.items() if isinstance(value, float)} for card in cards]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, abs=1e-9)
    assert cards[0]["eval_pairs"] == cards[1]["eval_pairs"]


@pytest.mark.parametrize("kind", ["two", "fsdp2"])
def test_the_sft_adapter_is_the_same_from_one_process_and_from_two(outputs: Path, kind: str) -> None:
    """TRL's loss is a mean over the tokens of the whole step, whoever computed them."""
    check_sft(outputs / f"sft {kind}", outputs / "sft alone")


def check_sft(two: Path, alone: Path) -> None:
    for key in ("loss", "eval_loss"):
        found, wanted = ([row[key] for row in rows_of(folder, key)] for folder in (two, alone))
        assert len(wanted) == (3 if key == "loss" else 1)
        assert found == pytest.approx(wanted, rel=1e-9)
    assert_same_weights(two, alone, "adapter_model.safetensors")


def test_uneven_batches_do_not_hang(outputs: Path) -> None:
    """Processes that get different numbers of rows wait for each other for ever, unless somebody fills the rest."""
    assert len(rows_of(outputs / "uneven reward two", "loss")) == 5
    assert len(rows_of(outputs / "uneven sft two", "loss")) == 6
    card = json.loads((outputs / "uneven reward two" / "reward_card.json").read_text(encoding="utf-8"))
    assert card["eval_pairs"] == 24  # and no copy is counted
