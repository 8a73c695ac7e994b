"""Rule 8 of DESIGN.md: one process with gradient accumulation and two processes without give the same numbers.

The processes are real: torchrun starts two of the script, which talk through gloo on the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import reward_modeling
import rl_training
import sft_training
from tests.conftest import write_rows
from tests.helpers import PROMPTS, Stages, make_stages, run_main, save_lively_base
from utils.report import read_jsonl

ROOT = Path(__file__).parent.parent

# One start of two processes (seconds of imports) runs several scripts one after the other, as their command lines would.
# Each process leaves a file that says how many there were: `accelerate launch --cpu` once silently ran a single one.
RUNNER = """
import json, runpy, sys, torch
from pathlib import Path
for script, *arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    folder = Path(arguments[arguments.index("--output_dir") + 1])
    rank = torch.distributed.get_rank()
    (folder / f"world_{rank}.txt").write_text(f"{torch.distributed.get_world_size()}", encoding="utf-8")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    folder = tmp_path_factory.mktemp("stages")
    return make_stages(save_lively_base(folder / "base"), folder)


def torchrun(*words: str) -> subprocess.CompletedProcess:
    """Two processes on the CPU, started at the root of the repository."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    result = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result


def changed(arguments: list[str], **values: object) -> list[str]:
    """The command line with these arguments set."""
    return [*arguments, *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def commands(stages: Stages, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is the same in both kinds of run, by name of the run."""
    prompts = write_rows(
        tmp_path_factory.mktemp("prompts") / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS]
    )
    ppo = [
        *("--model_name_or_path", stages.base, "--sft_model_lora_path", stages.sft, "--max_length", "64"),
        *("--reward_model_lora_path", stages.reward, "--dataset", prompts, "--eval_dataset", prompts),
        *("--steps", "3", "--ppo_epochs", "2", "--output_max_length", "10"),
        *("--learning_rate", "0.001", "--adap_kl_ctrl", "true", "--adap_kl_horizon", "50", "--save_freq", "3"),
        *("--eval_strategy", "steps", "--eval_steps", "3"),
        *("--allow_weak_reward", "true", "--guard", "warn", "--guard_freq", "2"),
    ]
    tune = ["--model_name_or_path", stages.base, "--max_length", "64", "--lora_dropout", "0", "--logging_steps", "1"]
    tune += ["--learning_rate", "0.001", "--max_steps", "3"]
    return {
        "accumulation": ppo,
        "several steps": ppo,
        "critic": [*ppo, "--critic", "adapter"],
        "reward": [
            *(*tune, "--dataset", data["preferences"], "--eval_dataset", data["preferences"]),
            *("--dataloader_drop_last", "true"),  # accelerate would fill a short batch of two processes with copies
        ],
        "sft": [*tune, "--dataset", data["sft"], "--eval_dataset", data["sft"]],
    }


SCRIPTS = {
    "accumulation": rl_training,
    "several steps": rl_training,
    "critic": rl_training,
    "reward": reward_modeling,
    "sft": sft_training,
}
ALONE = {  # what the arguments of one process have to be
    "accumulation": {"batch_size": 8, "mini_batch_size": 4, "gradient_accumulation_steps": 2},
    "several steps": {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2},
    "critic": {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2},
    "reward": {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 8},
    "sft": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
}
EACH_OF_TWO = {
    "accumulation": {"batch_size": 4, "mini_batch_size": 4, "gradient_accumulation_steps": 1},
    "several steps": {"batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 1},
    "critic": {"batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 1},
    "reward": {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4},  # 16 rows, in two parts
    "sft": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
}


@pytest.fixture(scope="module")
def outputs(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Folders of each run: by one process, by two."""
    root = tmp_path_factory.mktemp("runs")
    folders = {name: (root / f"{name} alone", root / f"{name} two") for name in commands}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, (alone, _) in folders.items():
            arguments = changed(commands[name], **ALONE[name], output_dir=alone)
            run_main(SCRIPTS[name], arguments, monkeypatch)

    def of_two(name: str) -> list[str]:
        values = {**EACH_OF_TWO[name], "output_dir": folders[name][1], "disable_tqdm": "true"}
        return [f"{SCRIPTS[name].__name__}.py", *changed(commands[name], **values)]

    torchrun(*of_two("accumulation"))  # the command line that a user would write
    jobs, runner = root / "jobs.json", root / "runner.py"
    jobs.write_text(
        json.dumps([of_two(name) for name in ("several steps", "critic", "reward", "sft")]), encoding="utf-8"
    )
    runner.write_text(RUNNER, encoding="utf-8")
    torchrun(str(runner), str(jobs))
    return folders


def rows_of(folder: Path, key: str) -> list[dict]:
    return [row for row in read_jsonl(str(folder / "metrics.jsonl")) if key in row]


def assert_close(found: list[dict], wanted: list[dict], leave_out: set[str]) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - leave_out:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name


def assert_same_weights(one: Path, other: Path, file: str) -> None:
    first, second = load_file(one / file), load_file(other / file)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (value - second[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("name", ["accumulation", "several steps", "critic"])
def test_ppo_gives_the_same_numbers_in_one_process_and_in_two(outputs: dict[str, tuple[Path, Path]], name: str) -> None:
    """Whitening, token means, seeds and the order of rows a process instead of a run have all been seen in the field.

    8 replies an iteration out of 12 prompts, so each epoch of prompts leaves some over, and they have to be the same.
    accumulation: one optimizer step an epoch of 4 + 4 rows.  several steps: two of 2 + 2.
    """
    alone, two = outputs[name]
    wanted = rows_of(alone, "score_mean")
    assert [row["iteration"] for row in wanted] == [1, 2, 3]
    assert [row["optimizer_steps"] for row in wanted] == [2 if name == "accumulation" else 4] * 3
    clocks = {"seconds", "tokens_per_second"}
    assert_close(rows_of(two, "score_mean"), wanted, clocks | {"ratio_first"})
    assert all(abs(row["ratio_first"] - 1) < 1e-5 for row in rows_of(two, "score_mean"))
    assert_close(rows_of(two, "eval_score_mean"), rows_of(alone, "eval_score_mean"), set())
    replies = [
        [(row["prompt"], row["response"]) for row in read_jsonl(str(run / "samples.jsonl"))] for run in (alone, two)
    ]
    assert replies[0] == replies[1]
    assert len(replies[0]) == 3 * 8
    for folder in ("", "checkpoint-3"):
        assert_same_weights(two / folder, alone / folder, "adapter_model.safetensors")
        assert_same_weights(two / folder, alone / folder, "value_head.safetensors")


def test_there_were_two_processes(outputs: dict[str, tuple[Path, Path]]) -> None:
    """`accelerate launch --cpu --num_processes 2` runs one process without a word: then all of this shows nothing."""
    for name in ("several steps", "reward", "sft"):
        assert [(outputs[name][1] / f"world_{rank}.txt").read_text() for rank in (0, 1)] == ["2", "2"]
    # started as a user would: the Trainer's state of each process
    assert (outputs["accumulation"][1] / "checkpoint-3" / "rng_state_1.pth").is_file()


def test_the_reward_model_is_the_same_from_one_process_and_from_two(outputs: dict[str, tuple[Path, Path]]) -> None:
    """Evaluation gathers scores of both processes; check_saved_adapter() runs on one while the other must not hang."""
    alone, two = outputs["reward"]
    assert_close(rows_of(two, "loss"), rows_of(alone, "loss"), set())
    assert_same_weights(two, alone, "adapter_model.safetensors")
    cards = [json.loads((folder / "reward_card.json").read_text(encoding="utf-8")) for folder in (two, alone)]
    numbers = [{key: value for key, value in card.items() if isinstance(value, float)} for card in cards]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5)
    assert cards[0]["eval_pairs"] == cards[1]["eval_pairs"]


def test_the_sft_adapter_is_the_same_from_one_process_and_from_two(outputs: dict[str, tuple[Path, Path]]) -> None:
    """TRL's loss is a mean over the tokens of the whole step, whoever computed them."""
    alone, two = outputs["sft"]
    assert [row["loss"] for row in rows_of(two, "loss")] == pytest.approx(
        [row["loss"] for row in rows_of(alone, "loss")], rel=1e-4
    )
    assert_same_weights(two, alone, "adapter_model.safetensors")
