"""The gate, the floor, best/ and the rollback, in whole PPO runs of a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import rl_training
from lora.adapters import POLICY, REFERENCE, read_adapter
from rewards.guard import Guard, Limits
from rewards.scores import ScoreStatistics
from rl_training import split_guard_prompts
from rollout.batch import make_batch
from rollout.watch import Watch
from tests.conftest import write_rows
from tests.helpers import (
    PROMPTS,
    Stages,
    make_experience,
    make_ppo_trainer,
    move_policy,
    run_main,
)
from utils.console import InputError
from utils.files import read_jsonl

PAD, EOS = 0, 2
CARD = {"score_mean": 0.0, "score_std": 1.0, "passed": True, "failed": []}


@pytest.fixture
def start(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function (arguments) -> output folder of a run of rl_training.main(); the reward adapter has a card that passed."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    write_card(stages, **CARD)

    def run(**arguments: object) -> Path:
        settings = {
            "model_name_or_path": stages.base,
            "sft_model_lora_path": stages.sft,
            "reward_model_lora_path": stages.reward,
            "dataset": prompts,
            "output_dir": tmp_path / "ppo",
            "prompt_template": "{prompt}=",
            "steps": 4,
            "batch_size": 4,
            "mini_batch_size": 4,
            "ppo_epochs": 2,
            "output_max_length": 8,
            "max_length": 64,
            "learning_rate": 0.01,
            **arguments,
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        run_main(rl_training, words, monkeypatch)
        return tmp_path / "ppo"

    return run


def write_card(stages: Stages, **card: object) -> None:
    Path(stages.reward, "reward_card.json").write_text(json.dumps(card), encoding="utf-8")


def policy_of(trainer: rl_training.PPOTrainer, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one adapter, by their name without the adapter's."""
    state = trainer.model.state_dict()
    return {key.replace(f".{name}.", "."): value.clone() for key, value in state.items() if f".{name}." in key}


# ---- The gate ----


def test_a_reward_model_that_failed_its_card_is_refused(start, stages: Stages, tmp_path: Path) -> None:
    write_card(stages, **{**CARD, "passed": False, "failed": ["probe empty 0.183 (wanted 0.95)"]})
    with pytest.raises(InputError) as refused:
        start()
    message = str(refused.value)
    assert "did not pass its reward card: probe empty 0.183 (wanted 0.95)" in message
    assert "the same rl_training.py command with --allow_weak_reward true" in message
    assert "exempt_probes" not in message  # an argument of reward_modeling.py alone
    assert not (tmp_path / "ppo").exists()


def test_a_reward_model_without_a_card_is_refused(start, stages: Stages, tmp_path: Path) -> None:
    Path(stages.reward, "reward_card.json").unlink()
    with pytest.raises(InputError, match=r"has no reward_card\.json, .* --allow_weak_reward true"):
        start()
    assert not (tmp_path / "ppo").exists()


def test_a_weak_reward_model_can_be_allowed(start, stages: Stages, capsys: pytest.CaptureFixture) -> None:
    write_card(stages, **{**CARD, "passed": False, "failed": ["probe empty 0.183 (wanted 0.95)"]})
    folder = start(allow_weak_reward="true", steps=1, guard="off")
    assert "warning: the reward adapter" in capsys.readouterr().err
    assert (folder / "adapter_model.safetensors").exists()


# ---- The floor ----


def test_a_broken_reply_is_scored_at_the_floor(stages: Stages, tmp_path: Path) -> None:
    """The reward model gives the empty reply 20, the others 1 and 2: it gets -3 deviations, behind penalty and clip."""
    trainer = make_ppo_trainer(stages, tmp_path, statistics=ScoreStatistics(1.0, 2.0))
    batch = make_batch([[5], [6], [8]], [[40, EOS], [41, EOS], [EOS]], PAD)
    scores = torch.tensor([1.0, 2.0, 20.0])
    assert make_experience(trainer, batch, scores).normalized_scores.tolist() == [0.0, 0.5, -3.0]
    trainer.collector.score_rules = replace(trainer.collector.score_rules, floor_broken=False)
    assert make_experience(trainer, batch, scores).normalized_scores.tolist() == [0.0, 0.5, 5.0]  # 9.5, clipped


# ---- Rollback ----


def certain_collapse(trainer: rl_training.PPOTrainer) -> None:
    """A guard for which any move away from the SFT model is a collapse."""
    trainer.watch.guard.limits, trainer.watch.guard.patience = Limits(kl_budget=1e-6), 1


def test_a_collapse_stops_the_run_and_brings_the_best_policy_back(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trainer = make_ppo_trainer(stages, tmp_path, steps=6, guarded=True)
    certain_collapse(trainer)
    trainer.train()
    assert trainer.state.global_step == 2  # iteration 1 still sampled from the SFT model
    ours, reference = policy_of(trainer, POLICY), policy_of(trainer, REFERENCE)
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[name], reference[name]) for name in ours)
    assert not trainer.model.get_base_model().v_head.weight.any()  # as it was at the start, too
    printed = capsys.readouterr().err
    assert "collapse: iteration 2, rollouts: " in printed
    assert "KL to the SFT model is" in printed
    assert "stopped, and rolled back to best/: the policy of iteration 0" in printed
    outcome = trainer.watch.outcome()
    assert outcome["best"]["iteration"] == 0
    assert outcome["guard"]["stopped"] is True
    assert (outcome["guard"]["collapse_at"], outcome["guard"]["rolled_back_to"]) == (2, 0)


def test_a_guard_that_warns_lets_the_run_go_on(stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = make_ppo_trainer(stages, tmp_path, steps=4, guarded=True, guard="warn")
    certain_collapse(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    ours, reference = policy_of(trainer, POLICY), policy_of(trainer, REFERENCE)
    assert not all(torch.equal(ours[name], reference[name]) for name in ours)
    assert trainer.watch.outcome()["guard"] == {
        "verdict": trainer.watch.guard.verdict,
        "collapse_at": 2,
        "stopped": False,
        "rolled_back_to": None,
    }
    said = capsys.readouterr().err
    rows = [row for row in trainer.state.log_history if "guard/signs" in row]
    for iteration, row in enumerate(rows, 1):
        alarms, warnings = (said.count(f"{level}: iteration {iteration}: ") for level in ("alarm", "warning"))
        assert (row["guard/alarms"], row["guard/signs"]) == (alarms, alarms + warnings)
    assert [row["guard/alarms"] > 0 for row in rows] == [False, True, True, True]


def test_the_watch_changes_nothing_in_a_run_that_it_does_not_stop(stages: Stages, tmp_path: Path) -> None:
    weights = []
    for name, guarded in (("with", True), ("without", False)):
        trainer = make_ppo_trainer(stages, tmp_path / name, steps=3, guarded=guarded, guard="warn", guard_freq=1)
        trainer.train()
        weights.append(policy_of(trainer, POLICY))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_stopped_run_ends_in_order(start, capsys: pytest.CaptureFixture) -> None:
    """run.json tells what happened, the adapter in the output folder is the one of best/, and the pictures are there."""
    folder = start(kl_budget=1e-4, guard_patience=1)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run["guard"]["stopped"] is True
    assert run["guard"]["verdict"].startswith("iteration 2, rollouts: ")
    assert "the budget 0.0001" in run["guard"]["verdict"]
    ours, best = (load_file(path / "adapter_model.safetensors") for path in (folder, folder / "best"))
    assert all(torch.equal(ours[name], best[name]) for name in ours)
    assert (folder / "plots" / "kl.png").exists()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == run["what_to_take"]
    assert "the SFT adapter, which nothing beat: on 2 held-out prompts" in said
    assert f"{folder} and {folder / 'best'} hold the SFT policy" in said


# ---- best/ ----


@pytest.mark.parametrize(
    ("best", "may_stop", "verdict", "sentence"),
    [
        (
            {"iteration": 7, "score": 0.5, "kl": 3.0},
            True,
            None,
            "ppo/best, the policy of iteration 7: on 64 held-out prompts its normalised score is 0.500, the SFT model's "
            "0.125, a gain of 0.375",
        ),
        (
            {"iteration": 0, "score": 0.125, "kl": 0.0},
            True,
            None,
            "the SFT adapter, which nothing beat: on 64 held-out prompts no iteration had a higher normalised score than "
            "its 0.125 without a warning of the guard; ppo/best holds the SFT policy, from before the first update "
            "(iteration 0), and ppo the one of the last iteration",
        ),
        (
            {"iteration": 0, "score": 0.125, "kl": 0.0},
            True,
            "iteration 3, replies shrink",
            "the SFT adapter, which nothing beat: on 64 held-out prompts no iteration had a higher normalised score than "
            "its 0.125 without a warning of the guard; ppo and ppo/best hold the SFT policy, from before the first update "
            "(iteration 0)",
        ),
        (
            None,
            False,
            None,
            "ppo, the policy of the last iteration; whether it is better than the SFT model was not measured (--guard off)",
        ),
    ],
    ids=["a gain", "no gain", "rolled back to the SFT model", "no guard"],
)
def test_a_run_says_what_to_take(best: dict | None, may_stop: bool, verdict: str | None, sentence: str) -> None:
    """The last line named best/ with its iteration 0, and nobody knew that this is the SFT model."""
    guard = Guard(Limits(8.0), 3, {"held-out": {"score": 0.125}}, best=best, verdict=verdict)
    held_out = None if best is None else list
    watch = Watch(guard, None, held_out, 1, 9, may_stop, None, None, "ppo", {}, prompts=64)
    assert watch.what_to_take() == f"what to take: {sentence}"


def test_best_is_the_checkpoint_with_the_highest_held_out_score(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found again from what the run wrote.  Nothing counts as a sign here: random replies of a random model have many."""
    anything = Limits(
        1e9, length_low=(0, 0), length_high=(1e9, 1e9), broken=(2, 2), same=(2, 2), distinct=(-1, -1), asked=(-1, -1)
    )
    monkeypatch.setattr(rl_training, "Limits", lambda kl_budget: anything)
    folder = start(steps=5, save_freq=1, guard_freq=1, learning_rate=0.0005)
    rows = [row for row in read_jsonl(str(folder / "metrics.jsonl")) if "heldout/score" in row]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]
    assert not any(row["guard/signs"] for row in rows)
    state = json.loads((folder / "ppo_state.json").read_text(encoding="utf-8"))
    scores = [state["guard"]["baselines"]["held-out"]["score"], *(row["heldout/score"] for row in rows)]
    iteration = scores.index(max(scores))
    assert 0 < iteration < 5  # else this test says nothing
    run = json.loads((folder / "best" / "run.json").read_text(encoding="utf-8"))
    assert run["best"] == {"iteration": iteration, "score": max(scores), "kl": rows[iteration - 1]["heldout/kl"]}
    best = load_file(folder / "best" / "adapter_model.safetensors")
    then = load_file(folder / f"checkpoint-{iteration}" / "adapter_model.safetensors")
    assert all(torch.equal(best[name], then[name]) for name in best)
    assert (folder / "best" / "value_head.safetensors").exists()
    assert not (folder / "best.new").exists()
    read_adapter(str(folder / "best"), "--adapter_path")


def test_the_first_look_is_at_the_sft_model(stages: Stages, tmp_path: Path) -> None:
    """Replies are compared with the SFT model's own: also where the policy has moved before the first look of a resumed
    run, whose baselines come from the checkpoint."""
    trainer = make_ppo_trainer(stages, tmp_path, guarded=True)
    trainer.watch.look(0)
    baseline = dict(trainer.watch.guard.baselines["held-out"])
    assert baseline["kl"] == pytest.approx(0, abs=1e-4)
    move_policy(trainer)
    trainer.watch.look(5)
    assert trainer.watch.guard.baselines["held-out"] == baseline


def test_guard_prompts_are_held_out_of_training() -> None:
    rows, every = Dataset.from_list([{"prompt": str(i)} for i in range(100)]), list(range(100))
    train, guard = split_guard_prompts(rows, 64, 32, every)
    assert len(guard) == 10
    assert sorted([*train["prompt"], *guard["prompt"]]) == sorted(rows["prompt"])
    train, guard = split_guard_prompts(rows, 5, 32, every)
    assert (len(train), guard["prompt"]) == (95, ["0", "20", "40", "60", "80"])
    train, guard = split_guard_prompts(rows, 64, 95, every)  # 90 would be too few for an iteration
    assert (len(train), len(guard)) == (100, 10)


def test_the_guard_gets_prompts_that_no_stage_has_trained_on() -> None:
    """best/ was chosen on prompts that SFT and the reward model had trained on: in the demo on 64 of 64."""
    rows = Dataset.from_list([{"prompt": str(i)} for i in range(100)])
    train, guard = split_guard_prompts(rows, 4, 32, [3, 10, 50, 51, 97, 98, 99])
    assert guard["prompt"] == ["3", "10", "51", "98"]
    assert sorted([*train["prompt"], *guard["prompt"]]) == sorted(rows["prompt"])
    too_few = split_guard_prompts(rows, 4, 32, [3, 10, 50])[1]
    assert too_few["prompt"] == ["0", "25", "50", "75"]
