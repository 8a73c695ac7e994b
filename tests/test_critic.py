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
            *("--allow_weak_reward", "true", *more),
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
