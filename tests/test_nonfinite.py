"""NaN and infinity: no update, the model and the optimizer as they were, prompt and reply in a file, one line to the user.

The base of most tests has NaN in the embedding of a single token, so that just the rows with that token are broken.
"""

import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import reward_modeling
import rl_training
import sft_training
from rl_training import Losses, MicroBatchLoss, PPOTrainer
from rollout.sampler import generate_ids, generate_responses
from tests.conftest import make_tokenizer, write_rows
from tests.forks import run_jobs, run_two
from tests.helpers import (
    PROMPTS,
    Stages,
    load_with_hidden_state_fn,
    make_ppo_trainer,
    make_sampling,
    queries_of,
    run_main,
)
from utils.console import RunError
from utils.files import read_jsonl

POISON = "熊"  # whose tokens only the prompts with it hold


@pytest.fixture(scope="module")
def poisoned(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base, with NaN for the last token of POISON."""
    folder = tmp_path_factory.mktemp("poisoned")
    tokenizer = make_tokenizer()
    token = tokenizer(POISON)["input_ids"][-1]
    assert not any(token in tokenizer(prompt)["input_ids"] for prompt in PROMPTS if POISON not in prompt)
    model = AutoModelForCausalLM.from_pretrained(stages.base)
    model.get_input_embeddings().weight.data[token] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def weights_of(checkpoint: Path) -> list[bytes]:
    files = sorted(checkpoint.glob("*.safetensors"))
    assert files
    return [file.read_bytes() for file in files]


def moments_of(checkpoint: Path) -> list[Tensor]:
    """What the optimizer remembers of each parameter; the learning rate goes on, as the steps do."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return [value for of in state.values() for value in of.values()]


def changed(run: Path, step: int) -> tuple[bool, bool]:
    """Whether weights and optimizer are others than one step before."""
    before, after = run / f"checkpoint-{step - 1}", run / f"checkpoint-{step}"
    moments = moments_of(before), moments_of(after)
    same = len(moments[0]) == len(moments[1]) and all(map(torch.equal, *moments))
    return weights_of(before) != weights_of(after), not same


def tune(stage: str, base: str, folder: Path, words: list[str], **more: Any) -> tuple[ModuleType, list[str]]:
    """Script and arguments of 4 steps of stage 1 or 2, one row each in the order of the file, a checkpoint a step."""
    rows = [{"prompt": f"{word}?", "response": "yes " + word, "chosen": word + "!", "rejected": "no"} for word in words]
    if stage == "sft":
        rows = [{name: row[name] for name in ("prompt", "response")} for row in rows]
    else:
        rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    data = write_rows(folder / "rows.jsonl", rows)
    held_out = write_rows(
        folder / "held_out.jsonl", [{name: text.replace(POISON, "x") for name, text in rows[0].items()}]
    )
    values = {"max_steps": 4, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 1, "max_length": 64}
    values |= {"model_name": base, "dataset": data, "output_dir": folder / "run", "learning_rate": 0.01, "seed": 3}
    values |= {
        "eval_dataset": held_out,
        "eval_strategy": "no",
        "weight_decay": 0.1,
        "train_sampling_strategy": "sequential",
    }
    if stage == "reward":
        values |= {"degenerate_ratio": 0}
    arguments = [str(word) for name, value in {**values, **more}.items() for word in (f"--{name}", value)]
    return sft_training if stage == "sft" else reward_modeling, arguments


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_step_with_a_loss_that_is_not_finite_changes_nothing(
    poisoned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stage: str
) -> None:
    """The stock Trainer makes the step, and from then on every number of the model is NaN."""
    script, arguments = tune(stage, poisoned, tmp_path, ["tea", "dogs", POISON, "rice"])
    run_main(script, arguments, monkeypatch)
    run = tmp_path / "run"
    assert [changed(run, step) for step in (2, 3, 4)] == [(True, True), (False, False), (True, True)]
    rows = [row for row in read_jsonl(str(run / "metrics.jsonl")) if "learning_rate" in row]
    assert [row["nonfinite_steps"] for row in rows] == [0, 0, 1, 0]
    assert ["loss" in row and "grad_norm" in row for row in rows] == [True, True, False, True]
    lost = read_jsonl(str(run / "nonfinite.jsonl"))
    replies = ["yes " + POISON] if stage == "sft" else [POISON + "!", "no"]
    assert [(row["step"], row["quantity"], row["response"]) for row in lost] == [
        (3, "the loss", text) for text in replies
    ]
    assert all(f"{POISON}?" in row["prompt"] for row in lost)
    assert capsys.readouterr().err.count("warning: step 3: NaN or infinity in the loss") == 1


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_gradients_that_are_not_finite_change_nothing(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Clipping makes it worse: one infinite gradient turns all others into 0, or NaN, and Adam remembers them."""
    script, arguments = tune(stage, stages.base, tmp_path, ["tea", "dogs", "soup", "rice"])
    trainer_class = script.SortedSFTTrainer if stage == "sft" else script.RewardTrainer
    compute_loss = trainer_class.compute_loss

    def with_infinite_gradient(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        if self.state.global_step == 2 and self.model.training:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    monkeypatch.setattr(trainer_class, "compute_loss", with_infinite_gradient)
    run_main(script, arguments, monkeypatch)
    run = tmp_path / "run"
    assert [changed(run, step) for step in (2, 3, 4)] == [(True, True), (False, False), (True, True)]
    assert {row["quantity"] for row in read_jsonl(str(run / "nonfinite.jsonl"))} == {"the gradients"}


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_too_many_in_a_row_end_the_run_with_a_diagnosis(
    poisoned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The count goes on through a resume, and a good step in between sets it back to 0."""
    words = [POISON, "tea", POISON, POISON]
    script, arguments = tune(stage, poisoned, tmp_path, words, max_nonfinite_steps=2)
    message = r"stopped at step 4: .* in 2 steps in a row, because of NaN or infinity in the loss.*--learning_rate"
    with pytest.raises(RunError, match=message):
        run_main(script, arguments, monkeypatch)
    with pytest.raises(RunError, match=message):
        run_main(script, [*arguments, "--resume_from_checkpoint", "true"], monkeypatch)


def test_the_sampler_names_the_broken_rows_and_leaves_the_others(stages: Stages, poisoned: str, tmp_path: Path) -> None:
    """The article's run ended in `probability tensor contains either inf, nan or element < 0`.

    Without a check this sampler would draw the last token of the vocabulary, and say nothing.
    """
    trainer = make_ppo_trainer(stages, tmp_path)
    queries = queries_of(trainer, len(PROMPTS))
    sampling = make_sampling(trainer.args)
    wanted = generate_ids(load_with_hidden_state_fn(stages.base), queries, range(len(queries)), sampling)
    model = load_with_hidden_state_fn(poisoned)
    with pytest.raises(RunError, match="NaN or infinity in the model's logits for 1 of 12 prompts"):
        generate_ids(model, queries, range(len(queries)), sampling)
    drawn = generate_responses(model, queries, range(len(queries)), sampling)
    broken = [POISON in prompt for prompt in PROMPTS]
    assert (~drawn.statistics.logprobs.isfinite().all(1)).tolist() == broken
    whole = [number for number, is_broken in enumerate(broken) if not is_broken]
    assert [drawn.ids[number] for number in whole] == [wanted[number] for number in whole]


def ppo_arguments(stages: Stages, base: str, folder: Path, **more: Any) -> list[str]:
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    values = {"model_name": base, "sft_model_lora_path": stages.sft, "reward_model_lora_path": stages.reward}
    values |= {"dataset": prompts, "output_dir": folder / "run", "steps": 6, "save_freq": 1, "batch_size": 4}
    values |= {"mini_batch_size": 2, "ppo_epochs": 2, "output_max_length": 8, "max_length": 64, "learning_rate": 0.003}
    values |= {"allow_weak_reward": "true", "guard": "warn", "guard_freq": 2, "eval_dataset": prompts, "seed": 1}
    values |= {"eval_strategy": "steps", "eval_steps": 3}
    return [str(word) for name, value in {**values, **more}.items() for word in (f"--{name}", value)]


def test_an_iteration_with_a_broken_reply_changes_nothing(
    stages: Stages, poisoned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """12 prompts, 4 an iteration: the broken one comes once in 3 iterations, and in each look of the guard."""
    run_main(rl_training, ppo_arguments(stages, poisoned, tmp_path), monkeypatch)
    run = tmp_path / "run"
    rows = [row for row in read_jsonl(str(run / "metrics.jsonl")) if "kl_coef" in row]
    lost = [row["iteration"] for row in rows if row["nonfinite_steps"]]
    assert len(lost) == 2
    assert lost[0] <= 3 < lost[1]
    assert ["score_mean" not in row for row in rows] == [row["iteration"] in lost for row in rows]
    for iteration in range(2, 7):
        assert changed(run, iteration) == (iteration not in lost, iteration not in lost)
    broken = read_jsonl(str(run / "nonfinite.jsonl"))
    assert {row["prompt"] for row in broken} == {prompt for prompt in PROMPTS if POISON in prompt}
    assert set(lost) <= {row["iteration"] for row in broken}
    assert f"warning: iteration {lost[1]}: NaN or infinity in the policy's log-probs" in capsys.readouterr().err
    evaluations = [row for row in read_jsonl(str(run / "metrics.jsonl")) if "eval_score_mean" in row]
    assert len(evaluations) == 2  # of the other prompts
    assert (run / "plots" / "value_loss.png").is_file()
    json.loads((run / "run.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def break_scores(trainer: PPOTrainer) -> None:
    trainer.model.get_base_model().score.modules_to_save["reward"].weight.data[:] = torch.nan


def break_values(trainer: PPOTrainer) -> None:
    trainer.model.get_base_model().v_head.bias.data[:] = torch.inf


def break_reference(trainer: PPOTrainer) -> None:
    for name, parameter in trainer.model.named_parameters():
        if ".reference." in name and "lora_B" in name:
            parameter.data[:] = torch.nan


@pytest.mark.parametrize(
    ("breaking", "named"),
    [
        (break_scores, "the reward model's scores"),
        (break_values, "the values"),
        (break_reference, "the SFT model's log-probs"),
    ],
)
@pytest.mark.parametrize("guarded", [False, True])
def test_what_is_broken_is_named(stages: Stages, tmp_path: Path, breaking: Any, named: str, guarded: bool) -> None:
    """With a guard the run ends at its first look at held-out prompts, before the first iteration."""
    trainer = make_ppo_trainer(stages, tmp_path, guarded=guarded, steps=5, max_nonfinite_steps=3)
    breaking(trainer)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    when = "after iteration 0" if guarded else "at iteration 3: .* in 3 iterations in a row, because of"
    with pytest.raises(RunError, match=f"stopped {when}:? NaN or infinity in {named}"):
        trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


@pytest.mark.parametrize("quantity", ["the loss", "the gradients"])
def test_an_optimizer_step_that_is_not_finite_is_left_out(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantity: str
) -> None:
    """Iteration 1 as ever; in iteration 2 the first of four optimizer steps is broken, in iteration 3 all are."""
    trainer = make_ppo_trainer(stages, tmp_path, steps=3, weight_decay=0.1)
    micro_batch_loss, drop_nonfinite = trainer.micro_batch_loss, trainer.drop_nonfinite
    states: list[tuple[int, list[Tensor], bool]] = []

    def state() -> list[Tensor]:
        moments = [value for of in trainer.optimizer.state.values() for value in of.values()]
        return [value.detach().clone() for value in (*trainer.model.parameters(), *moments)]

    def breaking(*args: Any) -> MicroBatchLoss:
        part = micro_batch_loss(*args)
        done = sum(iteration == trainer.state.global_step for iteration, _, _ in states)
        if trainer.state.global_step == 2 or (trainer.state.global_step == 1 and done == 0):
            if quantity == "the loss":
                return part._replace(loss=part.loss * torch.nan, losses=Losses(*(x * torch.nan for x in part.losses)))
            part.loss.register_hook(lambda gradient: gradient * torch.inf)
        return part

    def watching(*args: Any) -> str | None:
        what = drop_nonfinite(*args)
        assert what in (None, quantity)
        states.append((trainer.state.global_step, state(), what is not None))
        return what

    monkeypatch.setattr(trainer, "micro_batch_loss", breaking)
    monkeypatch.setattr(trainer, "drop_nonfinite", watching)
    trainer.train()
    states.append((3, state(), False))
    assert [lost for _, _, lost in states[:-1]] == [False] * 4 + [True] + [False] * 3 + [True] * 4
    for (_, before, lost), (_, after, _) in pairwise(states[1:]):  # the first step makes Adam's state
        assert all(map(torch.equal, before, after)) == lost
    rows = [row for row in read_jsonl(str(tmp_path / "metrics.jsonl")) if "kl_coef" in row]
    assert [row["nonfinite_steps"] for row in rows] == [0, 1, 4]
    assert [row["optimizer_steps"] for row in rows] == [4, 3, 0]
    assert "policy_loss" not in rows[2]
    assert {row["iteration"] for row in read_jsonl(str(tmp_path / "nonfinite.jsonl"))} == {2, 3}


def test_the_number_of_steps_is_checked(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, arguments = tune("sft", stages.base, tmp_path, ["tea"], max_nonfinite_steps=0)
    with pytest.raises(Exception, match="--max_nonfinite_steps is 0; give a number above 0"):
        run_main(script, arguments, monkeypatch)


def test_all_processes_leave_a_step_out_when_one_of_them_has_to(stages: Stages, poisoned: str, tmp_path: Path) -> None:
    """The first process's own loss is finite; it has to leave the step out all the same, and knows the other's reply."""
    folders = {name: tmp_path / name for name in ("sft", "ppo")}
    for folder in folders.values():
        folder.mkdir()
    _, sft = tune("sft", poisoned, folders["sft"], ["tea", "dogs", "rice", POISON, "soup", "cats"], max_steps=3)
    ppo = ppo_arguments(stages, poisoned, folders["ppo"], batch_size=2, mini_batch_size=1, steps=3)
    jobs = tmp_path / "jobs.json"
    quiet = ["--disable_tqdm", "true"]
    jobs.write_text(json.dumps([["sft_training.py", *sft, *quiet], ["rl_training.py", *ppo, *quiet]]), encoding="utf-8")
    run_two(jobs, run_jobs)
    run = folders["sft"] / "run"
    assert (run / "world_1.txt").read_text() == "2"
    assert [changed(run, step) for step in (2, 3)] == [(False, False), (True, True)]
    lost = read_jsonl(str(run / "nonfinite.jsonl"))
    assert [(row["step"], row["response"]) for row in lost] == [(2, "yes " + POISON)]
    run = folders["ppo"] / "run"
    rows = [row for row in read_jsonl(str(run / "metrics.jsonl")) if "kl_coef" in row]
    lost = [row["iteration"] for row in rows if row["nonfinite_steps"]]
    assert len(lost) == 1  # in one of the three iterations, as with one process
    assert [changed(run, step)[0] for step in (2, 3)] == [step not in lost for step in (2, 3)]
    assert {row["prompt"] for row in read_jsonl(str(run / "nonfinite.jsonl"))} == {p for p in PROMPTS if POISON in p}
