"""What the tests of the trainers share: strong adapters on a tiny base, a PPOTrainer around them, scripts run in place."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    TemperatureLogitsWarper,
)

from corpus.tokens import tokenize_prompts
from lora.adapters import read_adapter
from lora.heads import add_hidden_state_fn
from reporting.progress import IterationLines
from rewards.broken_replies import find_broken
from rewards.reward_functions import Notes, RewardFunction, carried_columns
from rewards.reward_model import new_reward_model
from rewards.scores import REWARD_MODEL, ScoreStatistics
from rl_training import PPOArguments, PPOTrainer, Prompts, build_trainer, number_rows
from rollout.batch import Batch
from rollout.distribution import Sampling, first_token_ban
from rollout.experience import Experience
from tests.conftest import make_model, make_tokenizer
from utils.arguments import LoraArguments

PROMPTS = ["你好", "a", "What is the capital of France?", "火锅", "dogs", "the cat sat on the mat", "tea", "apple soup"]
PROMPTS += ["苹果 香蕉", "rice?", "in the park, didn't it?", "熊猫 很可爱"]


class Stages(NamedTuple):
    """Folders of a base and of the adapters of the first two stages."""

    base: str
    sft: str
    reward: str


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Uneven next-token probabilities, with an EOS that is likely at some positions: replies of many lengths."""
    weight = model.get_output_embeddings().weight.data
    weight *= 3
    weight[model.config.eos_token_id] *= 4
    return model


def save_lively_base(folder: Path, **config: Any) -> str:
    model = lively(make_model("llama"))
    model.config.update(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def strengthen(model: nn.Module, seed: int) -> None:
    """Give every LoRA layer a second matrix that is as large as the base's own weights (PEFT starts it at 0)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def load_plain(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False).eval()


def load_with_hidden_state_fn(path: str) -> PreTrainedModel:
    """A plain base that the toolkit's sampler can run."""
    model = load_plain(path)
    add_hidden_state_fn(model)
    return model


def save_sft(base: str, folder: Path, lora_dropout: float = 0.0) -> str:
    """SFT adapter that differs strongly from the base, made and saved by plain PEFT."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=lora_dropout, target_modules="all-linear"
    )
    model = get_peft_model(load_plain(base), config)
    strengthen(model, seed=1)
    model.save_pretrained(folder)
    return str(folder)


def save_reward(base: str, folder: Path) -> str:
    """Reward adapter with a score head, as strong as the SFT adapter and unlike it."""
    model, _ = new_reward_model(load_plain(base), LoraArguments(lora_r=4, lora_alpha=8), seed=2)
    strengthen(model, seed=2)
    model.save_pretrained(folder)
    return str(folder)


def make_stages(base: str, folder: Path, lora_dropout: float = 0.0) -> Stages:
    return Stages(base, save_sft(base, folder / "sft", lora_dropout), save_reward(base, folder / "reward"))


def make_sampling(args: PPOArguments) -> Sampling:
    return Sampling(
        stop_token_ids=(2,),
        pad_token_id=0,
        max_new_tokens=args.output_max_length,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
        begin_suppress_tokens=first_token_ban(args.begin_suppress_tokens, make_tokenizer(), (2,)),
    )


def make_ppo_trainer(
    stages: Stages,
    folder: Path,
    statistics: ScoreStatistics | None = None,
    base: PreTrainedModel | None = None,
    guarded: bool = False,
    gold: RewardFunction | None = None,
    functions: Sequence[RewardFunction] = (),
    rewarded: bool = True,
    stop_ids: tuple[int, ...] = (2,),
    **arguments: Any,
) -> PPOTrainer:
    """A PPOTrainer as rl_training.main() builds it; `base` replaces the model of stages.base.

    guarded: the guard looks at the training prompts; rewarded: whether there is a reward adapter.
    """
    small = {"batch_size": 8, "mini_batch_size": 4, "steps": 2, "ppo_epochs": 2, "output_max_length": 12}
    quiet = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3, "save_strategy": "no", "report_to": "none"}
    args = PPOArguments(output_dir=str(folder), **{**small, **quiet, **arguments})
    args.dataloader_pin_memory = False
    tokenizer = make_tokenizer()
    rows = Dataset.from_list([{"prompt": prompt, "answer": prompt[:2]} for prompt in PROMPTS])
    carried = carried_columns([*functions, *([gold] if gold else [])], rows.column_names)
    prompts = number_rows(tokenize_prompts(rows, "{prompt}=", tokenizer, 64, carried))
    trainer = build_trainer(
        args,
        base or load_plain(stages.base),
        tokenizer,
        stop_ids,
        read_adapter(stages.sft, "--sft_model_lora_path"),
        read_adapter(stages.reward, "--reward_model_lora_path") if rewarded else None,
        Prompts(prompts, guard=prompts if guarded else None),
        statistics or ScoreStatistics(),
        gold,
        functions=functions,
    )
    trainer.pop_callback(IterationLines)
    return trainer


def collect(trainer: PPOTrainer, count: int, seeds: Sequence[int] | None = None) -> Experience:
    """Experience of the first `count` prompts."""
    rows = [trainer.train_dataset[row] for row in range(count)]
    return trainer.collector.collect(trainer.model, rows, seeds or range(count))


def make_experience(
    trainer: PPOTrainer, batch: Batch, scores: Tensor, gold: Tensor | None = None, **parts: Tensor
) -> Experience:
    """Experience of responses that nobody sampled, to the first prompts; what is not given is 0."""
    count = len(scores)
    zeros = dict.fromkeys(("logprobs", "ref_logprobs", "values", "entropy"), torch.zeros(batch.response_mask.shape))
    responses = trainer.processing_class.batch_decode(batch.responses(), skip_special_tokens=True)
    texts = [(PROMPTS[row], responses[row], find_broken(PROMPTS[row], responses[row])) for row in range(count)]
    notes = Notes([{} for _ in range(count)])
    return trainer.collector.gather(batch, texts, {**zeros, **parts}, {REWARD_MODEL: scores}, gold, notes)


def queries_of(trainer: PPOTrainer, count: int) -> list[list[int]]:
    return [trainer.train_dataset[i]["input_ids"] for i in range(count)]


def wake_value_head(trainer: PPOTrainer) -> None:
    """Values that differ from token to token: the head starts at 0, and 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    head = trainer.model.get_base_model().v_head
    head.weight.data.copy_(torch.randn(head.weight.shape, generator=generator) * 0.2)


def move_policy(trainer: PPOTrainer, size: float = 0.1) -> None:
    """A policy that is no longer the SFT model."""
    generator = torch.Generator().manual_seed(4)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * size)


def independent_logits(
    model: PreTrainedModel | PeftModel, query: Sequence[int], reply: Sequence[int], sampling: Sampling
) -> Tensor:
    """Logits [T, V] of the distribution of each reply token, by transformers alone: one row, no padding, its processors."""
    ids = torch.tensor([[*query, *reply]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.begin_suppress_tokens:
        processors.append(SuppressTokensAtBeginLogitsProcessor(list(sampling.begin_suppress_tokens), len(query)))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    ends = range(len(query), len(query) + len(reply))
    return torch.cat([processors(ids[:, :end], logits[end - 1 : end].clone()) for end in ends])


def independent_logprobs(
    model: PreTrainedModel | PeftModel, query: Sequence[int], reply: Sequence[int], sampling: Sampling
) -> Tensor:
    """Log-probs [T] of the reply, by `independent_logits`."""
    logprobs = independent_logits(model, query, reply, sampling).log_softmax(-1)
    return logprobs[torch.arange(len(reply)), torch.tensor(reply)]


def longer(sampling: Sampling, max_new_tokens: int) -> Sampling:
    return replace(sampling, max_new_tokens=max_new_tokens)


def own_lines(stderr: str) -> str:
    """What a command wrote on stderr, without the line that bitsandbytes adds where it is installed and has no GPU."""
    return "".join(line for line in stderr.splitlines(True) if not line.startswith("Failed to load CPU gemm_4bit"))


def run_main(script: ModuleType, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script's main() in this process, as its command line would."""
    quiet = ["--use_cpu", "true", "--disable_tqdm", "true"]
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments), *quiet])
    script.main()
