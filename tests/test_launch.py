"""The decision to restart under accelerate's launcher, and that accelerate takes the command as it is meant."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import prepare_simple_launcher_cmd_env
from transformers import TrainingArguments

from runs import start
from utils import launch
from utils.arguments import ModelArguments
from utils.console import InputError

ARGV = ["rl_training.py", "--config", "ppo.yaml", "--steps", "10"]

RESTART = [
    ("two GPUs", [], {}, 2),
    ("eight GPUs", [], {}, 8),
    ("a SLURM allocation is no launcher", [], {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, 2),
    ("a value that says no", [], {"ACCELERATE_USE_CPU": "false"}, 2),
    (
        "settings made by hand",
        [],
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
        2,
    ),
    ("the flag says no", ["--use_cpu", "False"], {}, 2),
    ("the flag says no, one word", ["--use_cpu=false"], {}, 2),
    ("the last flag wins", ["--use_cpu", "--use_cpu=false"], {}, 2),
    ("the flag overrides the environment", ["--use_cpu=false"], {"ACCELERATE_USE_CPU": "true"}, 2),
    ("another flag", ["--use_cpu_offload"], {}, 2),
]

GO_ON = [
    ("no GPU", [], {}, 0),
    ("one GPU", [], {}, 1),
    ("torchrun", [], {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, 2),
    ("local rank alone", [], {"LOCAL_RANK": "1"}, 2),
    ("rank alone", [], {"RANK": "3"}, 2),
    ("world size alone", [], {"WORLD_SIZE": "1"}, 2),
    ("accelerate launch with one process", [], {"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_USE_CPU": "False"}, 2),
    ("Open MPI", [], {"OMPI_COMM_WORLD_RANK": "0"}, 2),
    ("MVAPICH2", [], {"MV2_COMM_WORLD_RANK": "0"}, 2),
    ("Intel MPI, MPICH", [], {"PMI_RANK": "0"}, 2),
    ("CPU by environment", [], {"ACCELERATE_USE_CPU": "true"}, 2),
    ("CPU by environment, as a number", [], {"ACCELERATE_USE_CPU": "1"}, 2),
    ("CPU by flag", ["--use_cpu"], {}, 2),
    ("CPU by flag before another", ["--use_cpu", "--seed", "1"], {}, 2),
    ("CPU by flag with a value", ["--use_cpu", "True"], {}, 2),
    ("CPU by flag, one word", ["--use_cpu=true"], {}, 2),
    ("CPU by flag, with a hyphen", ["--use-cpu"], {}, 2),
]


@pytest.mark.parametrize(
    ("flags", "environ", "gpus"), [case[1:] for case in RESTART], ids=[case[0] for case in RESTART]
)
def test_restarts(flags, environ, gpus):
    argv = [*ARGV, *flags]
    command = launch.launch_command(argv, environ, gpus)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[-len(argv) :] == argv
    assert command[command.index("--num_processes") + 1] == str(gpus)


@pytest.mark.parametrize(("flags", "environ", "gpus"), [case[1:] for case in GO_ON], ids=[case[0] for case in GO_ON])
def test_goes_on(flags, environ, gpus):
    assert launch.launch_command([*ARGV, *flags], environ, gpus) is None


def test_accelerate_parses_the_command():
    """Every value is given: accelerate warns about, or reads from a file, exactly those that are None."""
    command = launch.launch_command([*ARGV, "--num_machines", "7"], {"ACCELERATE_MIXED_PRECISION": "bf16"}, 3)
    args = launch_command_parser().parse_args(command[3:])
    assert args.multi_gpu
    assert (args.num_processes, args.num_machines, args.machine_rank) == (3, 1, 0)
    assert (args.gpu_ids, args.mixed_precision, args.dynamo_backend) == ("all", "bf16", "no")
    assert args.main_process_port == 0
    assert args.training_script == "rl_training.py"
    assert args.training_script_args == [*ARGV[1:], "--num_machines", "7"]


def test_the_command_runs_whatever_the_users_accelerate_config_says(tmp_path):
    """Two processes on the CPU; a forgotten `accelerate config` wants fp16 on GPU 5 of the second of two machines."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "seen = {name: os.environ.get(name) for name in ('WORLD_SIZE', 'ACCELERATE_MIXED_PRECISION',"
        " 'ACCELERATE_DYNAMO_BACKEND', 'CUDA_VISIBLE_DEVICES')}\n"
        "with open(sys.argv[0] + os.environ['RANK'], 'w') as file:\n"
        "    json.dump([seen, sys.argv[1:]], file)\n"
    )
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: fp16\nnum_processes: 8\n"
        "num_machines: 2\nmachine_rank: 1\nmain_process_ip: 203.0.113.1\nmain_process_port: 1\ngpu_ids: '5'\n"
        "dynamo_config: {dynamo_backend: INDUCTOR}\n"
    )
    environ = {name: value for name, value in os.environ.items() if name not in launch.LAUNCHER_SIGNS}
    environ |= {"HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = launch.launch_command([str(script), "--steps", "10"], {}, 2)
    done = subprocess.run(command, check=False, env=environ, capture_output=True, text=True, timeout=90)

    assert done.returncode == 0, done.stderr
    assert "defaults used instead" not in done.stderr
    wanted = {
        "WORLD_SIZE": "2",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for rank in (0, 1):
        assert json.loads((tmp_path / f"script.py{rank}").read_text()) == [wanted, ["--steps", "10"]]


@pytest.mark.parametrize(("processes", "lost"), [("1", False), ("2", True)])
def test_processes_that_accelerate_did_not_start_are_missed(tmp_path, monkeypatch, capsys, processes, lost):
    """`accelerate launch --cpu --num_processes 2` trained in one process, half the batch, without a word."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    words = ["--cpu", "--num_processes", processes, "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "rl_training.py"]
    _, environ = prepare_simple_launcher_cmd_env(launch_command_parser().parse_args(words))
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(sys, "argv", ["rl_training.py"])
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=3)
    start.say_processes("sft", args)
    advice = "torchrun --nproc_per_node NUMBER rl_training.py ... starts several, on a CPU with --use_cpu true"
    assert (advice in capsys.readouterr().err) == lost


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ("sft", "24 rows a step in all (--per_device_train_batch_size 3 x --gradient_accumulation_steps 4 in each)"),
        (
            "reward",
            "24 pairs a step in all (--per_device_train_batch_size 3 x --gradient_accumulation_steps 4 in each)",
        ),
        ("ppo", "24 replies an iteration in all (--batch_size 12 in each)"),
    ],
)
def test_a_stage_says_how_much_a_step_takes(capsys, monkeypatch, stage, line):
    monkeypatch.setattr(os, "environ", {})
    args = SimpleNamespace(batch_size=12, per_device_train_batch_size=3, gradient_accumulation_steps=4, world_size=2)
    start.say_processes(stage, args)
    assert capsys.readouterr().err == f"processes: 2; {line}\n"


def test_started_processes_are_not_missed():
    environ = {"ACCELERATE_DYNAMO_MODE": "default", "MASTER_PORT": "29500"}
    assert launch.lost_processes(environ)
    for rank in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        assert not launch.lost_processes({**environ, rank: "0"})
    assert not launch.lost_processes({"MASTER_PORT": "29500"})


def test_relaunch_replaces_the_process(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sys, "argv", ARGV)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "execv", lambda path, argv: calls.append((path, argv)))
    launch.relaunch_on_all_gpus()
    assert calls == [(sys.executable, launch.launch_command(ARGV, {}, 2))]
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_relaunch_does_nothing_on_one_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "execv", lambda path, argv: pytest.fail("restarted"))
    launch.relaunch_on_all_gpus()
    assert capsys.readouterr().out == ""


def test_what_a_stage_does_before_its_data(tmp_path, monkeypatch):
    """One process a GPU first: what is wrong later is then found in each.  --plan starts none and looks at no folder."""
    steps = []
    monkeypatch.setattr(start, "relaunch_on_all_gpus", lambda: steps.append("relaunch"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    args = TrainingArguments(output_dir=str(tmp_path / "full"), use_cpu=True, report_to="none", seed=5)
    model_args = ModelArguments(model_name_or_path="base", dtype="bfloat16")

    assert start.start_stage("sft", model_args, args, only_plan=True) == (torch.bfloat16, None)
    assert steps == []
    with pytest.raises(InputError, match="full is not empty"):
        start.start_stage("sft", model_args, args, only_plan=False)
    assert steps == ["relaunch"]

    args.output_dir = str(tmp_path / "new")
    assert start.start_stage("sft", model_args, args, only_plan=False) == (torch.bfloat16, None)
    drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    args.report_to = ["nothing"]
    with pytest.raises(InputError, match="--report_to nothing is no tracker"):
        start.start_stage("sft", model_args, args, only_plan=False)
    args.report_to, args.resume_from_checkpoint = [], str(tmp_path / "gone")
    with pytest.raises(InputError, match=r"there is no checkpoint folder .*gone"):
        start.start_stage("sft", model_args, args, only_plan=False)
