"""--critic adapter: a fifth adapter on the one base, which starts as the reward model and gives the values."""

import json
from pathlib import Path

import pytest
import torch

import rl_training
from lora.adapters import POLICY, REWARD, attach_adapter, read_adapter
from lora.heads import add_hidden_state_fn, add_score_head, score_fn
from rewards.scores import ScoreStatistics
from rl_training import Targets
from rollout.batch import make_batch
from tests.conftest import write_rows
from tests.helpers import (
    PROMPTS,
    Stages,
    collect,
    load_plain,
    make_ppo_trainer,
    queries_of,
    run_main,
)
from utils.files import read_jsonl


def tensors(trainer: rl_training.PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_values_start_as_the_normalised_score_of_the_reply_so_far(stages: Stages, tmp_path: Path) -> None:
    """By the reward model alone, on each prefix by itself: mean 0.5, standard deviation 2."""
    trainer = make_ppo_trainer(stages, tmp_path, critic="adapter", statistics=ScoreStatistics(0.5, 2.0))
    queries, replies = queries_of(trainer, 3), [[40, 41, 2], [50], [60, 61]]
    batch = make_batch(queries, replies, 0)
    with torch.no_grad():
        values = trainer.collector.critic_values(trainer.model, batch)

    model = load_plain(stages.base)
    add_hidden_state_fn(model)
    add_score_head(model)
    saved = read_adapter(stages.reward, "--reward")
    model = attach_adapter(model, saved, saved.config).eval()
    for row, (query, reply) in enumerate(zip(queries, replies, strict=True)):
        for t in range(len(reply)):
            prefix = torch.tensor([[*query, *reply[:t]]])
            mask = torch.ones_like(prefix)
            with torch.no_grad():
                score = model(input_ids=prefix, attention_mask=mask, hidden_state_fn=score_fn(mask, POLICY))
            assert float(values[row, t]) == pytest.approx((float(score) - 0.5) / 2.0, abs=1e-4)
        assert not values[row, len(reply) :].any()


def test_policy_critic_and_head_are_what_trains(stages: Stages, tmp_path: Path) -> None:
    trainer = make_ppo_trainer(stages, tmp_path, critic="adapter")
    before = tensors(trainer)
    trainer.train()
    changed = {name for name, value in tensors(trainer).items() if not torch.equal(value, before[name])}
    assert changed == {
        name
        for name in before
        if ".default." in name or ".v_head." in name or (".critic." in name and ".lora_" in name)
    }
    assert not any(f".{REWARD}." in name for name in changed)


def test_the_policy_learns_nothing_from_the_value_loss(stages: Stages, tmp_path: Path) -> None:
    """With a head on the policy's trunk the value loss pulls at the policy; a critic of its own leaves it alone."""
    gradients = {}
    for critic in ("head", "adapter"):
        trainer = make_ppo_trainer(stages, tmp_path / critic, critic=critic)
        head = trainer.model.get_base_model().v_head
        head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        trainer.create_optimizer()
        model = trainer.model
        experience = collect(trainer, 4, [1, 2, 3, 4])
        zeros = torch.zeros_like(experience.logprobs)
        targets = Targets(zeros, experience.values + 1)  # advantages of 0: nothing but the value loss is left
        part = trainer.micro_batch_loss(model, experience, targets, torch.arange(4), experience.mask.sum())
        part.loss.backward()
        gradients[critic] = max(
            float(p.grad.abs().max()) for n, p in model.named_parameters() if ".default." in n and p.grad is not None
        )
    assert gradients["head"] > 1e-4
    assert gradients["adapter"] < 1e-9


def rates_of(trainer: rl_training.PPOTrainer) -> dict[bool, float]:
    """Whether it belongs to the values -> the learning rate of its weights."""
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    rates: dict[bool, set[float]] = {True: set(), False: set()}
    for group in trainer.optimizer.param_groups:
        for weight in group["params"]:
            rates[".v_head." in names[id(weight)] or ".critic." in names[id(weight)]].add(group["lr"])
    return {of_values: rate for of_values, (rate,) in rates.items()}


def rates_over(trainer: rl_training.PPOTrainer, iterations: int) -> list[dict[bool, float]]:
    trainer.create_optimizer_and_scheduler(iterations)
    seen = []
    for _ in range(iterations):
        seen.append(rates_of(trainer))
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return seen


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_values_have_a_learning_rate_of_their_own(stages: Stages, tmp_path: Path, critic: str) -> None:
    """Four iterations of a linear schedule, the policy's held back in the first two."""
    rates = {"learning_rate": 0.001, "value_learning_rate": 0.1}
    trainer = make_ppo_trainer(stages, tmp_path, critic=critic, steps=4, value_warmup_iterations=2, **rates)
    seen = rates_over(trainer, 4)
    assert [step[True] for step in seen] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert [step[False] for step in seen] == pytest.approx([0, 0, 0.0005, 0.00025])


def test_without_a_rate_of_their_own_all_learn_alike(stages: Stages, tmp_path: Path) -> None:
    trainer = make_ppo_trainer(stages, tmp_path, steps=2, learning_rate=0.001, value_warmup_iterations=1)
    seen = rates_over(trainer, 2)
    assert [step[True] for step in seen] == pytest.approx([0.001, 0.0005])
    assert [step[False] for step in seen] == pytest.approx([0, 0.0005])


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_the_policy_waits_while_the_values_warm_up(stages: Stages, tmp_path: Path, critic: str) -> None:
    """The value loss pulls at the policy through the trunk that they share, and weight decay at every weight."""
    policies, heads, noted = [], [], []
    more = {"value_warmup_iterations": 2, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    trainer = make_ppo_trainer(stages, tmp_path, critic=critic, steps=3, **more)
    step = trainer.training_step

    def watched(*args: object) -> torch.Tensor:
        result = step(*args)
        state = tensors(trainer)
        policies.append([value for name, value in state.items() if ".lora_" in name and ".default." in name])
        heads.append([value for name, value in state.items() if ".v_head." in name])
        noted.append(
            {name: trainer.pending_metrics[name] for name in ("kl_max", "learning_rate", "loss", "value_loss")}
        )
        return result

    def differ(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))

    trainer.training_step = watched
    trainer.train()
    assert not differ(policies[0], policies[1])
    assert differ(policies[1], policies[2])
    assert differ(heads[0], heads[1])
    assert [row["learning_rate"] for row in noted] == [0, 0, 1e-3]
    assert max(row["kl_max"] for row in noted) < 1e-3  # that of the third iteration is from before its update
    weight = trainer.args.value_coef
    assert [row["loss"] for row in noted[:2]] == pytest.approx([weight * row["value_loss"] for row in noted[:2]])
    assert noted[2]["loss"] != pytest.approx(weight * noted[2]["value_loss"], rel=1e-3)  # then the policy's is in it


def test_a_resumed_run_with_a_critic_is_the_run(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The critic is in the checkpoint, its optimizer state too; best/ has it as well."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])

    def run(output: Path, *more: str) -> None:
        words = [
            *("--model_name_or_path", stages.base, "--sft_model_lora_path", stages.sft, "--dataset", prompts),
            *("--reward_model_lora_path", stages.reward, "--output_dir", str(output), "--critic", "adapter"),
            *("--steps", "4", "--save_freq", "2", "--batch_size", "4", "--mini_batch_size", "2", "--ppo_epochs", "2"),
            *("--output_max_length", "8", "--max_length", "64", "--learning_rate", "0.003", "--guard", "warn"),
            *("--allow_weak_reward", "true", "--value_learning_rate", "0.01", "--value_warmup_iterations", "3", *more),
        ]
        run_main(rl_training, words, monkeypatch)

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(whole)
    run(resumed)
    for name in ("checkpoint-4", "best"):
        assert (resumed / name / "critic" / "adapter_model.safetensors").exists()
        for file in sorted((resumed / name).rglob("*")):
            if file.is_file() and name == "checkpoint-4":
                file.unlink()
    run(resumed, "--resume_from_checkpoint", str(resumed / "checkpoint-2"))
    for file in ("adapter_model.safetensors", "critic/adapter_model.safetensors", "value_head.safetensors"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file
    logs = [read_jsonl(str(folder / "metrics.jsonl")) for folder in (whole, resumed)]
    losses = [[row["value_loss"] for row in log if "value_loss" in row] for log in logs]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    assert json.loads((whole / "run.json").read_text(encoding="utf-8"))["arguments"]["critic"] == "adapter"
