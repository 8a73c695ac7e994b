"""The article's two commands with their flags as printed; model, paths and the size of the run aside."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from safetensors.torch import load_file

import reward_modeling
import rl_training
from tests.helpers import save_sft

ROOT = Path(__file__).resolve().parent.parent

REWARD_COMMAND = """
    --model_name /ssd1/share/Baichuan2-7B-Base
    --lora_target_models W_pack
    --num_train_epochs 1
    --eval_steps 200
    --save_steps 100
    --per_device_train_batch_size 10
    --per_device_eval_batch_size 16
    --train_subset -1
    --eval_subset -1
    --max_length 1000
"""
PPO_COMMAND = """
    --base_model_name baichuan-inc/baichuan-7B
    --merged_sft_model_path [your_merged_sft_model_path]
    --sft_model_lora_path [your_sft_lora_path]
    --reward_model_lora_path [your_reward_lora_path]
    --adafactor False
    --save_freq 10
    --output_max_length 256
    --batch_size 8
    --gradient_accumulation_steps 16
    --batched_gen True
    --ppo_epochs 4
    --seed 0
    --learning_rate 1e-5
    --early_stopping True
    --output_dir [your_output_ppo_lora_path]
    --log_with wandb
"""


def filled(printed, **values):
    """The printed flags, with the model and the paths replaced."""
    words = shlex.split(printed)
    for name, value in values.items():
        words[words.index(f"--{name}") + 1] = str(value)
    return words


def start(script, words, monkeypatch):
    """Run the script and return what it printed on stderr."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    with contextlib.redirect_stderr(io.StringIO()) as log:
        script.main()
    return log.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base_path, data):
    """Both commands, one after the other, in an empty folder: (folder, stderr of the reward model, stderr of PPO)."""
    folder = tmp_path_factory.mktemp("article")
    # what the commands leave to defaults that a test cannot have: a data set on the hub, 100 iterations, GPUs
    shared = f"dataset: {data['preferences']}\nuse_cpu: true\ndisable_tqdm: true\n"
    (folder / "reward.yaml").write_text(shared + "eval_fraction: 0.3\n", encoding="utf-8")
    (folder / "ppo.yaml").write_text(shared + "steps: 2\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("WANDB_SILENT", "true")
        words = filled(REWARD_COMMAND, model_name=base_path)
        reward_log = start(reward_modeling, ["--config", "reward.yaml", *words], monkeypatch)
        words = filled(
            PPO_COMMAND,
            base_model_name=base_path,
            merged_sft_model_path="merged",
            sft_model_lora_path=save_sft(base_path, folder / "sft"),
            reward_model_lora_path="output/reward",  # where the first command wrote by default
            output_dir="ppo",
        )
        # two steps make no reward model that passes its card
        # wandb reads WANDB_DIR once in a process, so the run is opened here; the trainer takes the one that is there
        with wandb.init(project="tests", dir=folder):
            ppo_log = start(rl_training, ["--config", "ppo.yaml", *words, "--allow_weak_reward", "true"], monkeypatch)
    return folder, reward_log, ppo_log


def warnings_of(log):
    return [line for line in log.splitlines() if line.startswith("warning:")]


def test_the_reward_command(trained):
    folder, log, _ = trained
    lines = [line for line in warnings_of(log) if "W_pack" in line]
    assert len(lines) == 1
    assert "q_proj, k_proj and v_proj" in lines[0]
    config = json.loads((folder / "output/reward/adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["k_proj", "q_proj", "v_proj"]
    weights = load_file(folder / "output/reward/adapter_model.safetensors")
    layers = {name.split(".")[-3] for name in weights if "lora_" in name}
    assert layers == {"q_proj", "k_proj", "v_proj"}
    assert any(name.endswith("score.weight") for name in weights)
    run = json.loads((folder / "output/reward/run.json").read_text())
    assert (run["arguments"]["per_device_train_batch_size"], run["data"]["max_length"]) == (10, 1000)
    assert (run["data"]["train_subset"], run["data"]["eval_subset"]) == (-1, -1)
    assert (folder / "output/reward/reward_card.json").exists()


def test_the_ppo_command(trained):
    folder, _, log = trained
    lines = [json.loads(line) for line in (folder / "ppo/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "score_mean" in line] == [1, 2]
    run = json.loads((folder / "ppo/run.json").read_text())["arguments"]
    assert (run["batch_size"], run["ppo_epochs"], run["output_max_length"], run["seed"]) == (8, 4, 256, 0)
    assert (run["learning_rate"], run["early_stopping"], run["adafactor"]) == (1e-5, True, False)
    samples = (folder / "ppo/samples.jsonl").read_text().splitlines()
    assert len(samples) == 2 * 8
    assert (folder / "ppo/adapter_model.safetensors").exists()
    assert "what to take: " in log.splitlines()[-1]


def test_arguments_that_lost_their_point_say_so_once(trained):
    _, _, log = trained
    lines = warnings_of(log)
    for name in ("merged_sft_model_path", "batched_gen"):
        assert len([line for line in lines if f"--{name} has no effect" in line]) == 1
    assert len([line for line in lines if "--gradient_accumulation_steps 16 is more than the 1 passes" in line]) == 1


def test_wandb_is_written_offline(trained):
    folder, _, _ = trained
    runs = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 1000
    assert b"score_mean" in runs[0].read_bytes()


# ---- The launch scripts ----


def launched(tmp_path, script, environ, *words):
    """What scripts/`script` would run, started from another folder with a stand-in for python that prints its words."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES"\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environ = {"PATH": os.environ["PATH"], "PYTHON": str(fake), **environ}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *words],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "file", "printed", "left_out"),
    [
        ("train_rm.sh", "reward_modeling.py", REWARD_COMMAND, set()),
        (
            "train_ppo.sh",
            "rl_training.py",
            PPO_COMMAND,
            {"--merged_sft_model_path", "--batched_gen", "--gradient_accumulation_steps"},
        ),
        ("train_sft.sh", "sft_training.py", "", set()),
    ],
)
def test_launch_scripts(tmp_path, script, file, printed, left_out):
    environ = {"MODEL": "my model", "SFT": "my sft", "REWARD": "my reward", "OUTPUT": "my output"}
    done = launched(tmp_path, script, environ, "--prompt_template", "Q: {prompt}\\n\\nA:", "--seed", "7")
    assert done.returncode == 0, done.stderr
    gpus, path, *words = done.stdout.splitlines()
    assert gpus == "0,1,2"
    assert Path(path) == ROOT / file
    assert words[-4:] == ["--prompt_template", "Q: {prompt}\\n\\nA:", "--seed", "7"]
    assert re.search(r"--\S*model_name\nmy model\n", done.stdout)
    assert "--output_dir\nmy output\n" in done.stdout
    article = shlex.split(printed)
    flags = dict(zip(article[::2], article[1::2], strict=True))
    given = dict(zip(words[:-4:2], words[1:-4:2], strict=True))
    assert set(flags) - set(given) == left_out
    for flag, value in given.items():
        if flag in flags and not value.startswith("my "):
            assert value == flags[flag]


def test_launch_scripts_leave_the_choice_of_gpus(tmp_path):
    done = launched(tmp_path, "train_rm.sh", {"MODEL": "m", "CUDA_VISIBLE_DEVICES": "5"})
    assert done.stdout.splitlines()[0] == "5"


@pytest.mark.parametrize("script", ["train_sft.sh", "train_rm.sh", "train_ppo.sh"])
def test_launch_scripts_without_a_model_say_how(tmp_path, script):
    done = launched(tmp_path, script, {})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*MODEL=NAME_OR_FOLDER.*\n", done.stderr)


# ---- Nothing heavy at import ----

WATCH = """
import importlib, sys
opened = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        if arguments[0].endswith((".safetensors", ".jsonl", ".parquet", ".arrow", ".csv", "tokenizer.json")):
            opened.append(arguments[0])
    if event == "socket.connect":
        opened.append(event)
sys.addaudithook(watch)
for script in ("sft_training", "reward_modeling", "rl_training"):
    module = importlib.import_module(script)
    sys.argv = [script, "--help"]
    try:
        module.main()
    except SystemExit as stopped:
        assert stopped.code == 0, stopped.code
import torch
assert not torch.cuda.is_initialized()
print("OPENED", opened)
"""


def test_import_and_help_load_no_model_and_read_no_data():
    done = subprocess.run(
        [sys.executable, "-c", WATCH], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "OPENED []"
    assert "WANDB" not in done.stdout  # the tests say WANDB_MODE=offline, and transformers printed so at every start
    assert done.stdout.count("--model_name_or_path") >= 3
