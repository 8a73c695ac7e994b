"""--advantage rloo and grpo: several replies to a prompt are compared with each other, and there is no critic."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import rl_training
from lora.adapters import read_adapter
from rl_training import PPOArguments, Targets
from runs.memory_plan import ppo_plan
from tests.conftest import write_rows
from tests.helpers import PROMPTS, Stages, collect, make_ppo_trainer, move_policy, run_main
from utils.arguments import ModelArguments
from utils.console import InputError
from utils.files import read_jsonl

OF_VALUES = {"value_loss", "value_clip_fraction", "values_mean", "returns_mean"}


@pytest.fixture(scope="module")
def runs(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], Path]]:
    """Command and output folder of a run of each kind, 3 iterations of two prompts with 3 replies each."""
    folder = tmp_path_factory.mktemp("groups")
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    words = ["--model_name", stages.base, "--sft_model_lora_path", stages.sft, "--prompt_template", "{prompt}="]
    words += ["--reward_model_lora_path", stages.reward, "--dataset", prompts, "--steps", "3", "--save_freq", "2"]
    words += ["--batch_size", "6", "--replies_per_prompt", "3", "--mini_batch_size", "2", "--ppo_epochs", "2"]
    words += ["--output_max_length", "8", "--max_length", "64", "--learning_rate", "0.01", "--guard", "warn"]
    words += ["--allow_weak_reward", "true", "--guard_freq", "2", "--adap_kl_ctrl", "true", "--adap_kl_horizon", "50"]
    made = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for kind in ("rloo", "grpo"):
            made[kind] = ([*words, "--advantage", kind, "--output_dir", str(folder / kind)], folder / kind)
            run_main(rl_training, made[kind][0], monkeypatch)
    return made


def iterations(folder: Path) -> list[dict]:
    return [row for row in read_jsonl(str(folder / "metrics.jsonl")) if "score_mean" in row]


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_run_without_a_critic(runs: dict[str, tuple[list[str], Path]], kind: str) -> None:
    """It starts as the SFT model, and has no value in metrics, checkpoint, best/ or output."""
    folder = runs[kind][1]
    lines = iterations(folder)
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert abs(lines[0]["kl"]) < 1e-5
    assert lines[0]["kl_max"] < 1e-5
    assert all(line["ratio_first"] == pytest.approx(1, abs=1e-4) for line in lines)
    assert lines[1]["kl"] != 0
    assert not OF_VALUES & set().union(*lines)
    assert ("kl_loss" in lines[0]) == (kind == "grpo")
    assert list(folder.rglob("value_head*")) == []
    assert (folder / "best" / "adapter_model.safetensors").exists()
    assert not any("v_head" in str(path.read_bytes()) for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_replies_to_a_prompt_are_neighbours(runs: dict[str, tuple[list[str], Path]], kind: str) -> None:
    samples = read_jsonl(str(runs[kind][1] / "samples.jsonl"))
    for iteration in (1, 2, 3):
        prompts = [row["prompt"] for row in samples if row["iteration"] == iteration]
        assert prompts == [prompts[0]] * 3 + [prompts[3]] * 3
        assert prompts[0] != prompts[3]
    assert len({row["response"] for row in samples[:3]}) > 1


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_resumed_run_is_the_run(
    runs: dict[str, tuple[list[str], Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    words, whole = runs[kind]
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    run_main(rl_training, [*words[:-1], str(tmp_path / "run"), "--resume_from_checkpoint", "true"], monkeypatch)
    for file in ("adapter_model.safetensors", "samples.jsonl", "ppo_state.json"):
        assert (whole / file).read_bytes() == (tmp_path / "run" / file).read_bytes(), file
    settings = json.loads((whole / "run.json").read_text(encoding="utf-8"))["arguments"]
    assert settings["kl_in"] == ("loss" if kind == "grpo" else "reward")


def test_advantages_by_hand(stages: Stages, tmp_path: Path) -> None:
    """What the trainer makes of normalised scores and KL, of a policy that has moved.

    rloo: the whole reply's reward is its score minus the KL of all its tokens.  grpo: its score alone.
    """
    trainer = make_ppo_trainer(stages, tmp_path, advantage="rloo", replies_per_prompt=2, init_kl_coef=0.3)
    move_policy(trainer)
    rows = [trainer.train_dataset[row] for row in range(2)]
    experience = trainer.collector.collect(trainer.model, rows, range(4))
    assert experience.values is None
    assert experience.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    scores, kl = experience.normalized_scores.tolist(), (experience.logprobs - experience.ref_logprobs).tolist()
    lengths = experience.mask.sum(1).tolist()
    whole = [score - 0.3 * sum(row[:count]) for score, row, count in zip(scores, kl, lengths, strict=True)]
    assert max(abs(a - b) for a, b in zip(scores, whole, strict=True)) > 0.01
    rewards = rl_training.ppo.token_rewards(experience.normalized_scores, experience.kl, experience.mask, 0.3)
    targets = trainer.targets(experience, rewards)
    assert targets.returns is None
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        assert targets.advantages[row, : lengths[row]].tolist() == pytest.approx(
            [whole[row] - whole[other]] * lengths[row]
        )
        assert not targets.advantages[row, lengths[row] :].any()


def test_kl_in_the_loss_by_hand(stages: Stages, tmp_path: Path) -> None:
    """Advantages of 0, so that nothing but the KL is left: the mean of exp(-d) - 1 + d over all tokens, times its weight."""
    trainer = make_ppo_trainer(stages, tmp_path, advantage="grpo", replies_per_prompt=2, init_kl_coef=0.3)
    move_policy(trainer, 0.03)
    experience = collect(trainer, 4)
    d = (experience.logprobs - experience.ref_logprobs)[experience.mask]
    wanted = float((torch.exp(-d) - 1 + d).mean())
    assert wanted > 1e-3
    targets = Targets(torch.zeros_like(experience.logprobs), None)
    part = trainer.micro_batch_loss(trainer.model, experience, targets, torch.arange(4), experience.mask.sum())
    assert float(part.loss) == pytest.approx(0.3 * wanted, rel=1e-4)
    part.loss.backward()
    moved = [p.grad.abs().max() for n, p in trainer.model.named_parameters() if p.requires_grad and p.grad is not None]
    assert max(moved) > 1e-5


def test_the_kl_counts_once(stages: Stages, tmp_path: Path) -> None:
    """In the loss and not in the reward: the mean reward is the score then."""
    for place in ("loss", "reward"):
        trainer = make_ppo_trainer(stages, tmp_path / place, kl_in=place, steps=2, learning_rate=0.02, init_kl_coef=1.0)
        trainer.train()
        line = iterations(tmp_path / place)[1]
        assert abs(line["kl"]) > 1e-3
        penalty = line["kl"] if place == "reward" else 0.0
        assert line["reward_mean"] == pytest.approx(line["normalized_score_mean"] - penalty, abs=1e-4)
        assert ("kl_loss" in line) == (place == "loss")
        assert line["loss"] == pytest.approx(
            line["policy_loss"] + 0.1 * line["value_loss"] + line.get("kl_loss", 0.0), abs=1e-5
        )


def test_several_replies_with_a_critic(stages: Stages, tmp_path: Path) -> None:
    trainer = make_ppo_trainer(stages, tmp_path, replies_per_prompt=4, steps=1)
    trainer.train()
    assert [row["prompt"] for row in trainer.samples] == [trainer.samples[0]["prompt"]] * 4 + [
        trainer.samples[4]["prompt"]
    ] * 4
    assert iterations(tmp_path)[0]["value_loss"] > 0


def test_what_a_plan_leaves_out(stages: Stages) -> None:
    """The value head of 32 + 1 numbers, with gradient and two moments; and each prompt is read once."""
    plans = {}
    for kind in ("gae", "rloo"):
        args = PPOArguments(
            output_dir="unused", use_cpu=True, max_length=48, output_max_length=16, advantage=kind, guard="off"
        )
        adapters = [read_adapter(path, "--adapter") for path in (stages.sft, stages.reward)]
        plans[kind] = ppo_plan(ModelArguments(stages.base), args, *adapters, torch.float32)
    held = [plan.held for plan in plans.values()]
    assert held[0]["adapters and heads"] - held[1]["adapters and heads"] == 33 * 4
    assert held[0]["gradients"] - held[1]["gradients"] == 33 * 4
    assert held[0]["optimizer"] - held[1]["optimizer"] == 33 * 8
    caches = [plan.phases["reading prompts"]["KV cache"] for plan in plans.values()]
    assert caches[0] == 4 * caches[1]
    assert plans["gae"].phases["sampling"] == plans["rloo"].phases["sampling"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"advantage": "grpo", "replies_per_prompt": 1},
            "--advantage grpo compares the replies to a prompt, but --replies_per_prompt is 1; give 2 or more",
        ),
        (
            {"advantage": "rloo", "batch_size": 6},
            "--batch_size 6, which counts replies, is no multiple of --replies_per_prompt 4; change one",
        ),
        ({"replies_per_prompt": 0}, "--replies_per_prompt is 0; give a number above 0"),
    ],
)
def test_groups_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PPOArguments(output_dir="unused", use_cpu=True, **arguments)
