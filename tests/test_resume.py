"""Rule 7 of DESIGN.md: a run that is killed and resumed gives the same numbers as one that was not.

Killed: the whole run's folder is copied, and everything behind checkpoint 2 or 4 is deleted from the copy, except the
lines that the killed run had already written to metrics.jsonl and samples.jsonl.
"""

import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import reward_modeling
import rl_training
import sft_training
from runs import checkpoints
from runs.checkpoints import find_fault, resume_path, seal
from tests.conftest import write_rows
from tests.helpers import PROMPTS, Stages, run_main
from tests.stress import kill_and_resume
from utils.console import InputError
from utils.files import read_jsonl

CLOCK = re.compile("seconds|per_second|runtime")


def ppo_arguments(stages: Stages, prompts: str, output_dir: Path) -> list[str]:
    """6 iterations of 4 out of 10 prompts: two an epoch, so iterations 3 and 5 begin epochs of their own."""
    return [
        *("--model_name_or_path", stages.base, "--sft_model_lora_path", stages.sft),
        *("--reward_model_lora_path", stages.reward, "--dataset", prompts, "--output_dir", str(output_dir)),
        *("--steps", "6", "--save_freq", "2", "--batch_size", "4", "--mini_batch_size", "2", "--ppo_epochs", "2"),
        *("--output_max_length", "8", "--max_length", "64", "--learning_rate", "0.003", "--adap_kl_ctrl", "true"),
        *("--adap_kl_target", "0.1", "--adap_kl_horizon", "20", "--temperature", "0.9", "--warmup_steps", "2"),
        *("--eval_dataset", prompts, "--eval_strategy", "steps", "--eval_steps", "3"),
        *("--allow_weak_reward", "true", "--guard", "warn", "--guard_freq", "2"),
    ]


@pytest.fixture(scope="module")
def whole_run(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp("whole")
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:10]])
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(rl_training, ppo_arguments(stages, prompts, folder / "run"), monkeypatch)
    return ppo_arguments(stages, prompts, folder / "run"), folder / "run"


def killed_copy(run: Path, copy: Path, checkpoint: int) -> Path:
    """`run` as a kill behind `checkpoint` would have left it."""
    shutil.copytree(run, copy)
    for path in copy.iterdir():
        number = int(path.name.partition("-")[2]) if path.name.startswith("checkpoint-") else None
        if number is None and path.name not in ("run.json", "metrics.jsonl", "samples.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif number is not None and number > checkpoint:
            shutil.rmtree(path)
    return copy


def metrics(folder: Path) -> list[dict]:
    """All lines of metrics.jsonl, without what a clock says."""
    rows = read_jsonl(str(folder / "metrics.jsonl"))
    return [{key: value for key, value in row.items() if not CLOCK.search(key)} for row in rows]


def iterations(folder: Path) -> list[dict]:
    return [row for row in metrics(folder) if "score_mean" in row]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def evaluations(folder: Path) -> list[dict]:
    return [row for row in metrics(folder) if "eval_score_mean" in row]


def resume(arguments: list[str], copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = arguments.index("--output_dir") + 1
    arguments = [*arguments[:place], str(copy), *arguments[place + 1 :], "--resume_from_checkpoint", "true"]
    run_main(rl_training, arguments, monkeypatch)


def assert_same_run(run: Path, copy: Path) -> None:
    for file in ("adapter_model.safetensors", "value_head.safetensors", "samples.jsonl", "ppo_state.json"):
        assert (run / file).read_bytes() == (copy / file).read_bytes(), file
    assert metrics(copy) == metrics(run)


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_a_resumed_ppo_run_is_the_run(
    whole_run: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: int
) -> None:
    """Adam's moments, the KL coefficient, the order of prompts and the random numbers have each been lost by somebody.

    Byte for byte: weights, value head, samples, every metric that is no clock.
    """
    arguments, run = whole_run
    rows = iterations(run)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["iteration"] for row in evaluations(run)] == [3, 6]
    assert len({row["kl_coef"] for row in rows}) == 6  # the controller moved each time: its state counts
    assert rows[-1]["epoch"] > 2  # prompts came around again
    copy = killed_copy(run, tmp_path / "copy", checkpoint)
    assert len(iterations(copy)) == 6  # lines behind the checkpoint, which have to go
    resume(arguments, copy, monkeypatch)
    assert_same_run(run, copy)


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "ppo_state.json", "value_head.safetensors"])
def test_a_run_that_lost_a_part_of_its_state_is_another_run(
    whole_run: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Negative control: the comparison above sees each part of the state.  Checkpoint 2's part is put into number 4."""
    arguments, run = whole_run
    copy = killed_copy(run, tmp_path / "copy", 4)
    shutil.copy(run / "checkpoint-2" / lost, copy / "checkpoint-4" / lost)
    seal(copy / "checkpoint-4")
    resume(arguments, copy, monkeypatch)
    assert iterations(copy)[:4] == iterations(run)[:4]
    assert iterations(copy)[4:] != iterations(run)[4:]
    with pytest.raises(AssertionError):
        assert_same_run(run, copy)


def test_a_line_that_the_kill_cut_in_two_does_not_stop_the_resume(
    whole_run: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies while it writes leaves half a line, and the resumed run could not read its own metrics."""
    arguments, run = whole_run
    copy = killed_copy(run, tmp_path / "copy", 4)
    for file in ("metrics.jsonl", "samples.jsonl"):
        text = (copy / file).read_text(encoding="utf-8")
        (copy / file).write_text(text[:-20], encoding="utf-8")
    resume(arguments, copy, monkeypatch)
    assert_same_run(run, copy)


def test_a_checkpoint_that_the_kill_cut_in_two_is_left_out(
    whole_run: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A run that was killed while it saved leaves a half checkpoint: it is named, and the one before counts.

    best/ was replaced since, by a policy that the resumed run has yet to make.
    """
    arguments, run = whole_run
    copy = killed_copy(run, tmp_path / "copy", 4)
    shutil.copytree(copy / "checkpoint-4", copy / "unfinished" / "checkpoint-6")
    with open(copy / "checkpoint-4" / "optimizer.pt", "r+b") as file:
        file.truncate(1000)
    shutil.copytree(run / "checkpoint-6", copy / "best")
    resume(arguments, copy, monkeypatch)
    lines = capsys.readouterr().err
    assert lines.count("unfinished/checkpoint-6 is not whole") == 1
    assert lines.count("checkpoint-4 is not whole: optimizer.pt has 1000 of ") == 1
    assert lines.count("going on from") == lines.count("checkpoint-2\n") == 1
    assert_same_run(run, copy)
    assert files_of(copy / "best") == files_of(run / "best")
    assert not (copy / "unfinished").exists()


def test_a_run_that_had_come_to_its_end_is_only_wound_up(
    whole_run: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the last checkpoint: the Trainer would have trained one step too many, and logged its summary twice."""
    arguments, run = whole_run
    copy = killed_copy(run, tmp_path / "copy", 6)
    resume(arguments, copy, monkeypatch)
    assert_same_run(run, copy)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("no list of files", "there is no complete.json in it"),
        ("half a list of files", "there is no complete.json in it"),
        ("half a file", "adapter_model.safetensors has 10 of "),
        ("no file", "trainer_state.json is missing"),
        ("nothing", "there is no complete.json in it"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_recognised(
    whole_run: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture, fault: str, named: str
) -> None:
    """`true` goes back to the one before; a folder that was named itself is an error."""
    _, run = whole_run
    copy = killed_copy(run, tmp_path / "copy", 4)
    broken = copy / "checkpoint-4"
    if fault == "no list of files":
        (broken / "complete.json").unlink()
    elif fault == "half a list of files":
        os.truncate(broken / "complete.json", 40)
    elif fault == "half a file":
        os.truncate(broken / "adapter_model.safetensors", 10)
    elif fault == "no file":
        (broken / "trainer_state.json").unlink()
    else:
        shutil.rmtree(broken)
        broken.mkdir()

    def wanted(checkpoint: str) -> TrainingArguments:
        return TrainingArguments(output_dir=str(copy), resume_from_checkpoint=checkpoint, use_cpu=True)

    of_ppo = functools.partial(resume_path, stage="ppo")
    assert of_ppo(wanted("true")) == str(copy / "checkpoint-2")
    assert f"checkpoint-4 is not whole: {named}" in capsys.readouterr().err
    assert of_ppo(wanted(str(copy / "checkpoint-2"))) == str(copy / "checkpoint-2")
    with pytest.raises(InputError, match=f"checkpoint-4 is not whole: {named}"):
        of_ppo(wanted(str(broken)))
    shutil.rmtree(copy / "checkpoint-2")
    assert of_ppo(wanted("true")) is None  # a run, but without a checkpoint: from the beginning
    assert "the run starts from the beginning" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds a run of stage ppo, not sft"):
        resume_path(wanted("true"), "sft")
    (copy / "run.json").write_text("[1]")
    with pytest.raises(InputError, match="is not empty"):  # no run: hands off
        of_ppo(wanted("true"))


def test_the_newest_checkpoint_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    for number in (9, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
        seal(tmp_path / f"checkpoint-{number}")
    args = TrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="true", use_cpu=True)
    assert resume_path(args, "ppo") == str(tmp_path / "checkpoint-10")


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses its power forgets what was written and not flushed; each file and each folder's names count."""
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "adapter").write_text("weights")
    flushed = []
    monkeypatch.setattr(checkpoints, "flush", lambda path: flushed.append((path, find_fault(tmp_path))))
    seal(tmp_path)
    files = [tmp_path / "best", tmp_path / "best" / "adapter", tmp_path / "complete.json", tmp_path]
    assert flushed == [(path, None) for path in files]  # whole already


def test_every_checkpoint_of_ppo_can_be_used_as_it_is(whole_run: tuple[list[str], Path]) -> None:
    """RLHF(2), RLHF(4) of the article are adapters to load, not only states to resume from."""
    _, run = whole_run
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for number in (2, 4, 6):
        names = {path.name for path in (run / f"checkpoint-{number}").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "run.json"} <= names
        assert "tokenizer_config.json" in names
    final, last = run / "adapter_model.safetensors", run / "checkpoint-6" / "adapter_model.safetensors"
    assert final.read_bytes() == last.read_bytes()
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["stage"] == "ppo"


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_resumed_stage_1_or_2_run_is_the_run(
    base_path: str, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """LoRA dropout is on, so the random state has to come back with the weights; 6 steps cross an epoch.

    The checkpoint lies between two lines of the log.  The Trainer's mean loss of the line after it was of the steps since
    the resume alone, and TRL counted its tokens from 0 again.
    """
    script, rows = (sft_training, data["sft"]) if stage == "sft" else (reward_modeling, data["preferences"])
    size = "3" if stage == "sft" else "8"
    arguments = [
        *("--model_name_or_path", base_path, "--dataset", rows, "--max_steps", "6", "--save_steps", "3"),
        *("--learning_rate", "0.01", "--lora_dropout", "0.3", "--per_device_train_batch_size", size),
        *("--logging_steps", "2", "--max_length", "64", "--warmup_steps", "2", "--eval_fraction", "0.2"),
    ]
    run = tmp_path / "run"
    run_main(script, [*arguments, "--output_dir", str(run)], monkeypatch)
    losses = [row for row in metrics(run) if "loss" in row]
    assert [row["step"] for row in losses] == [2, 4, 6]
    assert losses[-1]["epoch"] > 1

    def final_weights(folder: Path) -> bytes:
        return (folder / "adapter_model.safetensors").read_bytes()

    copy = killed_copy(run, tmp_path / "copy", 3)
    resuming = ["--output_dir", str(copy), "--resume_from_checkpoint", "true"]
    torch.manual_seed(99)  # the process is not the one that was killed
    run_main(script, [*arguments, *resuming], monkeypatch)
    assert final_weights(copy) == final_weights(run)
    assert metrics(copy) == metrics(run)
    if stage == "reward":
        cards = [json.loads((folder / "reward_card.json").read_text(encoding="utf-8")) for folder in (run, copy)]
        assert cards[0] == cards[1]

    broken = killed_copy(run, tmp_path / "broken", 3)  # negative control
    (broken / "checkpoint-3" / "rng_state.pth").unlink()
    seal(broken / "checkpoint-3")
    run_main(script, [*arguments, "--output_dir", str(broken), "--resume_from_checkpoint", "true"], monkeypatch)
    assert final_weights(broken) != final_weights(run)


def test_killed_for_real(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """SIGKILL while best/ is written, at any moment, and behind the last step; the long version is run by hand.

    The command is the one of docs/reliability.md.
    """
    words = ["--stage", "ppo", "--kills", "3", "--steps", "8"]
    monkeypatch.setattr(sys, "argv", ["kill_and_resume", *words])
    with pytest.raises(SystemExit) as end:
        kill_and_resume.main()
    shown = capsys.readouterr().out
    assert not end.value.code, end.value.code if isinstance(end.value.code, str) else shown
    assert "ppo: 3 kills" in shown
    assert "files, byte for byte" in shown
