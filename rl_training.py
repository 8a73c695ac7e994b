"""Stage 3: PPO on one frozen base, where adapters play the parts.

    python rl_training.py --config configs/ppo_demo.yaml
    CUDA_VISIBLE_DEVICES=0,1,2 python rl_training.py --base_model_name MODEL --sft_model_lora_path SFT \\
        --reward_model_lora_path REWARD --output_dir OUTPUT --batch_size 8 --ppo_epochs 4 --log_with wandb

    policy     base + a trainable copy of the SFT adapter          reward     base + reward adapter and its score head
    reference  base + the SFT adapter, frozen                      value      a linear head on the policy's hidden states,
                                                                              or on those of a critic adapter (--critic)

One step of the Trainer is one iteration: sample a batch of replies, score them, turn scores and KL into advantages, and
make `ppo_epochs` passes over the batch.  So checkpoints, logs, the learning rate and --steps all count iterations, and
a run that is resumed starts at the edge of an iteration.  Everything random in an iteration is drawn from the seed, the
iteration and the row alone, which makes a resumed run, and one on more processes, give the same numbers.

A guard (rewards/guard.py) measures every batch of replies against the SFT model's own, and now and then replies to held-out
prompts.  best/ holds the policy with the highest held-out score within the KL budget and without any sign of a collapse;
when a collapse is certain the run stops, says why, and goes back to best/.  A reward adapter that did not pass its card is
refused at the start.

Departures from Ziegler et al. 2019 / TRL's last PPO: the reference is the SFT adapter and nothing is merged; scores are
normalised with the reward card; EOS is suppressed as a first token, in the log-probs too; the loss is a mean over all
reply tokens of an optimizer step, however they fall into micro-batches and processes; the value head shares the policy's
trunk and is saved.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from reporting.plots import draw_curves
from reporting.progress import IterationLines
from reporting.trackers import check_trackers, use_grouped_names
from rewards.broken_replies import find_broken
from rewards.gold_function import Gold, load_gold, try_gold
from rewards.guard import ALARM, Guard, Limits, floor_scores, measure_replies
from rewards.reward_card import in_short, read_card
from rewards.reward_model import reward_scores
from rollout.batch import Batch, make_batch
from rollout.distribution import Sampling, check_output_logits, first_token_ban
from rollout.logprobs import reply_job, value_job
from rollout.model import assemble_ppo_model, start_critic
from rollout.sampler import draw_replies
from runs.checkpoints import resume_path
from runs.memory_plan import announce, ppo_plan
from runs.run_files import RunFiles, run_record
from runs.trainer import SteadyArguments, SteadyTrainer
from utils import ppo
from utils.adapters import (
    CRITIC,
    POLICY,
    REFERENCE,
    SavedAdapter,
    check_adapter,
    check_kind,
    load_weights,
    read_adapter,
    use_adapter,
)
from utils.arguments import (
    DEFAULT_PREFERENCES,
    DataArguments,
    ModelArguments,
    PlanArguments,
    check_evaluation,
    check_numbers,
    check_output_dir,
    choose_precision,
    default_autocast,
    parse_arguments,
    set_up_ddp,
)
from utils.base_model import load_base, load_tokenizer
from utils.batching import pass_limits, split_by_length
from utils.console import InputError, RunError, run_script, say
from utils.data import check_template, tokenize_prompts, train_and_eval_rows
from utils.files import append_jsonl, saving, write_json
from utils.heads import load_value_head, save_value_head
from utils.launch import relaunch_on_all_gpus
from utils.sharding import whole_parameters

STATE_FILE = "ppo_state.json"
BEST = "best"
# What may be NaN or infinite in a batch of replies, and what to do about it.
OF_POLICY = (
    "lower --learning_rate or raise --init_kl_coef and go on from an earlier checkpoint, or compute in float32 (--bf16 "
    "false --dtype float32)"
)
OF_ADAPTER = "check that adapter, or compute in float32 (--bf16 false --dtype float32)"
TRAINER_NAMES = {  # arguments of the Trainer that PPO has under other names
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "save_steps": "save_freq",
    "per_device_train_batch_size": "batch_size",
}


@dataclass
class PPOArguments(SteadyArguments, TrainingArguments):
    """PPO's own arguments and every argument of the Trainer.  Sizes are per process, as everywhere in the Trainer."""

    output_dir: str | None = field(default="output/ppo", metadata={"help": "Folder for everything that is written."})
    sft_model_lora_path: str | None = field(default=None, metadata={"help": "SFT adapter: policy and reference."})
    reward_model_lora_path: str | None = field(default=None, metadata={"help": "Reward adapter with its score head."})
    merged_sft_model_path: str | None = field(default=None, metadata={"help": "Has no effect: nothing is merged."})

    steps: int = field(default=100, metadata={"help": "Iterations: batches of replies, each with its PPO epochs."})
    save_freq: int = field(default=10, metadata={"help": "Iterations between two checkpoints."})
    batch_size: int = field(default=32, metadata={"help": "Replies an iteration, in each process."})
    mini_batch_size: int = field(
        default=8, metadata={"help": "Replies in one forward and backward pass; at most --batch_size."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Passes in one optimizer step; at most as many as one PPO epoch has."}
    )
    ppo_epochs: int = field(default=4, metadata={"help": "Passes over each batch of replies."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of policy and value head."})
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 autocast; by default on a GPU that has it."})
    adafactor: bool = field(default=False, metadata={"help": "Adafactor instead of AdamW: less optimizer memory."})
    logging_steps: float = field(default=1, metadata={"help": "Has no effect: every iteration is logged."})
    log_with: str | None = field(
        default=None, metadata={"help": "wandb, tensorboard, trackio ...: the same as --report_to."}
    )

    max_length: int = field(
        default=1024, metadata={"help": "Longest prompt + reply, in tokens; longer prompts are dropped."}
    )
    output_max_length: int = field(default=128, metadata={"help": "Longest reply, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampler, and of all log-probs."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Of the sampler, and of all log-probs; 1 is none."}
    )
    begin_suppress_tokens: str = field(
        default="eos",
        metadata={"help": "Tokens that no reply may start with: eos, none, or ids joined by commas."},
    )
    batched_gen: bool | None = field(
        default=None, metadata={"help": "Has no effect: replies are always sampled in batches."}
    )

    init_kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the SFT model, at the start."})
    adap_kl_ctrl: bool = field(default=False, metadata={"help": "Steer that weight towards --adap_kl_target."})
    adap_kl_target: float = field(default=6.0, metadata={"help": "KL a reply to steer to, in nats."})
    adap_kl_horizon: float = field(default=10000.0, metadata={"help": "Replies in which the weight can about double."})
    early_stopping: bool = field(default=False, metadata={"help": "End the PPO epochs when the policy moved too far."})
    target_kl: float = field(
        default=0.1, metadata={"help": "Too far: KL to the rollout policy above 1.5 times this, in nats a token."}
    )
    reward_baseline: float = field(default=0.0, metadata={"help": "Subtracted from every normalised score."})
    normalize_scores: bool = field(
        default=True, metadata={"help": "Subtract the reward card's mean and divide by its standard deviation."}
    )
    score_clip: float = field(default=5.0, metadata={"help": "Normalised scores are clipped to +- this."})
    missing_eos_penalty: float = field(
        default=1.0, metadata={"help": "Subtracted from the normalised score of a reply that was cut by the limit."}
    )
    allow_weak_reward: bool = field(
        default=False, metadata={"help": "Go on with a reward adapter whose card is missing or did not pass."}
    )
    floor_broken_replies: bool = field(
        default=True, metadata={"help": "Score empty, blank, looping and echoing replies below all others."}
    )
    guard: str = field(
        default="stop",
        metadata={
            "help": "Watch for a collapse and keep best/. stop: end a collapsed run and roll back; warn: only say so; off.",
            "choices": ["stop", "warn", "off"],
        },
    )
    guard_freq: int = field(
        default=5,
        metadata={"help": "Iterations between two looks at held-out prompts; the rollouts are always watched."},
    )
    guard_prompts: int = field(
        default=32,
        metadata={"help": "Held-out prompts for that; without held-out rows at most a tenth of the prompts."},
    )
    guard_patience: int = field(
        default=2,
        metadata={
            "help": "So many iterations with an alarm, out of one more, end the run.  Over --kl_budget one alarm about the "
            "replies is enough: nothing from there can become best/."
        },
    )
    kl_budget: float = field(default=10.0, metadata={"help": "Highest KL of best/ to the SFT model, in nats a reply."})
    gold_function: str | None = field(
        default=None,
        metadata={
            "help": "MODULE:NAME of a Python function (prompt, response) -> number of your own, such as a rule or a "
            "verifier.  It is measured and logged beside the score; neither training nor guard see it."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount a token."})
    gae_lambda: float = field(default=0.95, metadata={"help": "GAE's trade of bias for variance."})
    clip_range: float = field(default=0.2, metadata={"help": "Clip of the policy's probability ratio."})
    value_clip_range: float = field(default=0.2, metadata={"help": "Clip of the value's move."})
    critic: str = field(
        default="head",
        metadata={
            "help": "Where values come from. head: a linear head on the policy's hidden states; adapter: that head on an "
            "adapter of its own, which starts as the reward adapter and costs a second forward and backward pass.",
            "choices": ["head", "adapter"],
        },
    )
    value_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})

    def __post_init__(self) -> None:
        check_numbers(
            self,
            above_0="steps save_freq batch_size mini_batch_size gradient_accumulation_steps ppo_epochs max_length "
            "output_max_length temperature repetition_penalty adap_kl_target adap_kl_horizon target_kl score_clip "
            "guard_freq guard_prompts guard_patience kl_budget clip_range value_clip_range",
            from_0="init_kl_coef missing_eos_penalty value_coef",
            shares="gamma gae_lambda",
            finite="reward_baseline",
        )
        self.mini_batch_size = min(self.mini_batch_size, self.batch_size)
        if self.batch_size % self.mini_batch_size:
            raise InputError(
                f"--batch_size {self.batch_size} is no multiple of --mini_batch_size {self.mini_batch_size}; change one"
            )
        passes = self.batch_size // self.mini_batch_size
        self.passes_per_step = min(self.gradient_accumulation_steps, passes)
        if passes % self.passes_per_step:
            raise InputError(
                f"an epoch has {passes} passes (--batch_size {self.batch_size} / --mini_batch_size "
                f"{self.mini_batch_size}), no multiple of --gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}; change one"
            )
        if self.gradient_accumulation_steps > passes:
            say(
                f"warning: --gradient_accumulation_steps {self.gradient_accumulation_steps} is more than the {passes} "
                f"passes of a PPO epoch; an optimizer step takes {passes}"
            )
        if self.merged_sft_model_path is not None:
            say("warning: --merged_sft_model_path has no effect: the SFT adapter is used as it is, nothing is merged")
        if self.batched_gen is not None:
            say("warning: --batched_gen has no effect: replies are always sampled in batches")
        if self.logging_steps != 1:
            say("warning: --logging_steps has no effect: every iteration is logged")
            self.logging_steps = 1
        for name, ours in TRAINER_NAMES.items():  # set below from ours
            if getattr(self, name) != getattr(TrainingArguments, name):
                say(f"warning: --{name} has no effect here; use --{ours}")
        if self.log_with is not None:
            self.report_to = [self.log_with]
        if self.adafactor:
            self.optim = "adafactor"
        # The Trainer sees one step an iteration; the micro-batches inside it are counted here.
        self.gradient_accumulation_steps = 1
        self.per_device_train_batch_size = self.batch_size
        self.max_steps, self.save_steps = self.steps, self.save_freq
        self.remove_unused_columns, self.dataloader_drop_last = False, True
        self.label_names = []
        default_autocast(self)
        set_up_ddp(self)
        super().__post_init__()


class Experience(NamedTuple):
    """A batch of replies with everything that the PPO epochs need; on every process the whole of it, all processes' rows."""

    batch: Batch
    indices: Tensor  # int64 [B], rows of the prompt data set
    logprobs: Tensor  # float32 [B, T], of the policy that sampled
    ref_logprobs: Tensor  # float32 [B, T]
    values: Tensor  # float32 [B, T]
    entropy: Tensor  # float32 [B, T]
    scores: Tensor  # float32 [B], from the reward model, as it gave them
    gold: Tensor | None = None  # float32 [B], of --gold_function, where there is one

    def rows(self, index: Tensor) -> "Experience":
        """The rows `index`, with the padding cut to the longest of them."""
        batch = self.batch.rows(index)
        tokens = (part[index, : batch.response_mask.shape[1]] for part in self[2:6])
        gold = None if self.gold is None else self.gold[index]
        return Experience(batch, self.indices[index], *tokens, self.scores[index], gold)

    def nonfinite(self) -> list[tuple[str, str, Tensor]]:
        """What is NaN or infinite: its name, what to do about it, and the rows, bool [B].  Empty where all is well."""
        parts = [
            ("the policy's log-probs", OF_POLICY, self.logprobs),
            ("the values", OF_POLICY, self.values),
            ("the SFT model's log-probs", OF_ADAPTER, self.ref_logprobs),
            ("the reward model's scores", OF_ADAPTER, self.scores[:, None]),
        ]
        found = [(name, advice, ~part.isfinite().all(1)) for name, advice, part in parts]
        return [one for one in found if one[2].any()]


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of the reward model's scores on held-out replies."""

    mean: float = 0.0
    std: float = 1.0


class PPOTrainer(SteadyTrainer):
    """One frozen base, adapters as policy, reference and reward; `training_step` is one PPO iteration."""

    step_name = "iteration"

    def __init__(
        self,
        *args: Any,
        sampling: Sampling,
        statistics: ScoreStatistics,
        guard_dataset: Dataset | None = None,
        gold: Gold | None = None,
        record: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """guard_dataset: held-out prompts for the guard, None for no guard; gold: what is only measured; record: run.json,
        for the one in best/."""
        super().__init__(*args, data_collator=lambda rows: rows, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.sampling = sampling
        self.statistics = statistics
        self.kl_coef = self.args.init_kl_coef
        self.guard = Guard(Limits(self.args.kl_budget), self.args.guard_patience)
        self.guard_dataset = guard_dataset
        self.gold = gold
        self.has_critic = self.args.critic == "adapter"
        base = self.model.get_base_model()
        # Where the update computes as the sampler does, its log-probs and values are those of the sampler, to rounding.
        self.same_arithmetic = base.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
        # Sharded weights are collected for each pass, so every process has to make the same number of them.
        self.splits = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if self.splits:
            self.pass_overhead, self.pass_tokens = pass_limits(base, self.args.device)
        self.record = record or {}
        self.samples: list[dict[str, Any]] = []  # the rows of samples.jsonl of this iteration, for the trackers

    # ---- One iteration ----

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Roll out, score, estimate advantages, update.  Returns the mean loss of the iteration, for the Trainer's log."""
        started = time.perf_counter()
        # eval() for good: dropout is 0 anyway, but train() is what switches activation checkpointing on
        model.train(self.args.activation_checkpointing)
        iteration = self.state.global_step
        if self.guard_dataset is not None and not self.guard.baselines:
            self.watch(0, {})  # the SFT model, which everything is compared with

        # 1. replies, log-probs, values, scores
        experience = self.roll_out(model, inputs, iteration)
        if experience.nonfinite():
            self.pending_metrics = {
                "kl_coef": self.kl_coef,
                "learning_rate": self._get_learning_rate(),
                "nonfinite_steps": 1,
                **self.lose_iteration(experience),
                "seconds": time.perf_counter() - started,
            }
            return torch.zeros((), device=self.args.device)
        mask = experience.batch.response_mask

        # 2. rewards: the KL penalty on each token, the score on the last one
        scores = self.normalized_scores(experience)
        kl = ppo.kl_penalty(experience.logprobs, experience.ref_logprobs, "k1")
        rewards = ppo.token_rewards(scores, kl, mask, self.kl_coef)

        # 3. advantages, whitened over all reply tokens of all processes
        advantages, returns = ppo.gae(rewards, experience.values, mask, self.args.gamma, self.args.gae_lambda)
        advantages = ppo.masked_whiten(advantages, mask)

        # 4. PPO epochs
        learning_rate = self._get_learning_rate()
        update = self.update(model, experience, advantages, returns, iteration)

        # 5. what happened
        reply_kl = (kl * mask).sum(1)  # [B], nats a reply
        metrics = {
            **self.describe(experience, reply_kl, scores),
            **update,
            "reward_mean": float((rewards * mask).sum(1).mean()),
            "returns_mean": float(ppo.masked_mean(returns, mask)),
            "values_mean": float(ppo.masked_mean(experience.values, mask)),
            "kl_coef": self.kl_coef,
            "learning_rate": learning_rate,
        }
        if iteration == 0 and metrics["kl_max"] > 1e-3:
            raise RuntimeError(f"the policy is not the SFT model before its first update: KL {metrics['kl_max']}")
        if self.args.adap_kl_ctrl:
            self.kl_coef = ppo.adaptive_kl_coef(
                self.kl_coef, metrics["kl"], self.args.adap_kl_target, self.args.adap_kl_horizon, len(scores)
            )
        seconds = time.perf_counter() - started
        metrics |= {"seconds": seconds, "tokens_per_second": int(mask.sum()) / seconds}
        if self.guard_dataset is not None:
            measures = self.measure_for_guard([experience], self.train_dataset)
            metrics |= {f"guard/{name}": value for name, value in measures.items()}
            metrics |= self.watch(iteration + 1, {"rollouts": measures})
        self.pending_metrics = metrics
        self.write_samples(experience, reply_kl, iteration + 1)
        return torch.tensor(metrics.get("loss", 0.0), device=self.args.device)

    def lose_iteration(self, experience: Experience) -> dict[str, float]:
        """Make no update: something in the batch is not finite.  Returns what the guard has to say for the log."""
        name, advice, rows = experience.nonfinite()[0]
        self.lose(name, self.rows_as_text(experience, rows.nonzero().squeeze(1), self.train_dataset), advice)
        return self.watch(self.state.global_step + 1, {}) if self.guard_dataset is not None else {}

    def rows_as_text(self, experience: Experience, rows: Tensor, dataset: Dataset) -> list[tuple[str, str]]:
        """Prompt and reply of some rows."""
        return list(zip(*self.texts(experience.rows(rows), dataset), strict=True))

    def roll_out(self, model: nn.Module, rows: list[dict[str, Any]], iteration: int) -> Experience:
        """Sample a reply to each prompt of this process, judge it, and gather what all processes have."""
        first = self.args.process_index * len(rows)
        seeds = [_seed(self.args.seed, iteration, first + row) for row in range(len(rows))]
        return self.judge(model, [row["input_ids"] for row in rows], seeds, [row["index"] for row in rows])

    @torch.no_grad()
    def judge(
        self,
        model: nn.Module,
        queries: list[list[int]],
        seeds: list[int],
        indices: list[int],
        dataset: Dataset | None = None,
    ) -> Experience:
        """Sample with `seeds`; log-probs of policy and reference, values, scores and gold of the replies.

        indices: of the prompts in `dataset`, by default the training prompts.
        """
        device = self.args.device
        was_training = model.training
        model.eval()
        unwrapped = self.accelerator.unwrap_model(model)
        replies = draw_replies(unwrapped, queries, seeds, self.sampling, with_values=not self.has_critic)
        broken = ~replies.statistics.logprobs.isfinite().all(1)  # sampled from no distribution
        model.train(was_training)
        batch = Batch(*(part.to(device) for part in make_batch(queries, replies.ids, self.sampling.pad_token_id)))
        logprobs, values, entropy = replies.statistics
        if self.has_critic:
            values = torch.zeros_like(logprobs)
        ref_logprobs = torch.zeros_like(logprobs)
        scores = torch.zeros(len(queries), device=device)
        for index in self.passes(batch, torch.arange(len(queries), device=device)):
            rows = batch.rows(index)
            width = rows.response_mask.shape[1]
            inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
            if not self.same_arithmetic:  # the update must start at a ratio of 1
                policy = model(**inputs, job=reply_job(rows, self.sampling, not self.has_critic))
                logprobs[index, :width], entropy[index, :width] = policy.logprobs.float(), policy.entropy.float()
                if not self.has_critic:
                    values[index, :width] = policy.values.float()
            if self.has_critic:
                values[index, :width] = self.critic_values(model, rows)
            with use_adapter(unwrapped, REFERENCE):
                reference = model(**inputs, job=reply_job(rows, self.sampling, with_values=False))
            ref_logprobs[index, :width] = reference.logprobs.float()
            scores[index] = reward_scores(model, inputs)
        logprobs[broken] = torch.nan
        indices = torch.tensor(indices, device=device)
        experience = Experience(batch, indices, logprobs, ref_logprobs, values, entropy, scores)
        if self.gold is not None:
            pairs = zip(*self.texts(experience, dataset or self.train_dataset), strict=True)
            experience = experience._replace(gold=torch.tensor([self.gold(*pair) for pair in pairs], device=device))
        return self.gather_experience(experience)

    def passes(self, batch: Batch, rows: Tensor) -> list[Tensor]:
        """`rows` of the batch in parts that go through the model together: at most `mini_batch_size`, of similar length."""
        if not self.splits:
            return list(rows.split(self.args.mini_batch_size))
        lengths = batch.attention_mask[rows].sum(1).tolist()
        parts = split_by_length(lengths, self.pass_overhead, self.args.mini_batch_size, self.pass_tokens)
        return [rows[part] for part in parts]

    def critic_values(self, model: nn.Module, batch: Batch) -> Tensor:
        """Values [B, T] from the critic's own adapter."""
        with use_adapter(self.accelerator.unwrap_model(model), CRITIC):
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, job=value_job(batch))

    def gather_experience(self, local: Experience) -> Experience:
        """The rows of all processes, in the order of the processes, padded alike."""
        if self.args.world_size == 1:
            return local

        def together(part: Tensor, pad: int = 0) -> Tensor:
            if part.dim() == 2:
                part = self.accelerator.pad_across_processes(part, dim=1, pad_index=pad)
            return self.accelerator.gather(part.contiguous())

        ids = together(local.batch.input_ids, self.sampling.pad_token_id)
        mask = together(local.batch.response_mask.int()).bool()
        batch = Batch(ids, together(local.batch.attention_mask), together(local.batch.query_lengths), mask)
        return Experience(batch, *(part if part is None else together(part) for part in local[1:]))

    def texts(self, experience: Experience, dataset: Dataset) -> tuple[list[str], list[str]]:
        """Prompts and replies as text."""
        prompts = [dataset[index]["prompt"] for index in experience.indices.tolist()]
        replies = self.processing_class.batch_decode(experience.batch.responses(), skip_special_tokens=True)
        return prompts, replies

    def normalized_scores(self, experience: Experience, dataset: Dataset | None = None) -> Tensor:
        """Scores in the reward card's units, broken replies at the floor, minus baseline and missing-EOS penalty, clipped.

        [B].  experience: replies to prompts of `dataset`, by default the training prompts.
        """
        scores = experience.scores
        if self.args.floor_broken_replies:
            prompts, texts = self.texts(experience, dataset or self.train_dataset)
            found = [find_broken(prompt, text) is not None for prompt, text in zip(prompts, texts, strict=True)]
            broken = torch.tensor(found, device=scores.device)
            scores = floor_scores(scores, broken, self.statistics.mean, self.statistics.std)
        scores = (scores - self.statistics.mean) / self.statistics.std - self.args.reward_baseline
        scores = scores - self.args.missing_eos_penalty * (~self.ended(experience.batch)).float()
        return scores.clamp(-self.args.score_clip, self.args.score_clip)

    def ended(self, batch: Batch) -> Tensor:
        """Which replies end with EOS, bool [B].  Only the reply is asked: a prompt may hold EOS too."""
        last = batch.query_lengths + batch.response_mask.sum(1) - 1
        return batch.input_ids.gather(1, last[:, None]).squeeze(1) == self.sampling.eos_token_id

    # ---- PPO epochs ----

    def update(
        self, model: nn.Module, experience: Experience, advantages: Tensor, returns: Tensor, iteration: int
    ) -> dict[str, float]:
        """`ppo_epochs` passes over the batch; returns the metrics of the update.

        Each optimizer step takes the mean over all reply tokens in it, on all processes, so that neither the cut into
        micro-batches nor the number of processes changes the gradient.
        """
        sums: dict[str, float] = {}
        ratio_first, optimizer_steps, stopped = None, 0, False
        lost: list[Tensor] = []  # rows of the optimizer steps that were not made
        for step_rows in self.optimizer_batches(len(advantages), iteration):
            micro_batches = self.micro_batches(experience.batch, step_rows)
            step_tokens = experience.batch.response_mask[step_rows].sum()
            totals = torch.zeros(5, device=self.args.device)
            for number, rows in enumerate(micro_batches):
                last = number == len(micro_batches) - 1
                self.accelerator.gradient_state._set_sync_gradients(last)  # what DeepSpeed's engine looks at
                with self.accelerator.no_sync(model) if not last else contextlib.nullcontext():
                    share, part, ratio = self.micro_batch_loss(
                        model, experience, advantages, returns, rows, step_tokens
                    )
                    # every process adds its share of the step's mean, and DDP divides by their number
                    self.accelerator.backward(share * self.args.world_size)
                totals += part
                if optimizer_steps == 0 and ratio_first is None:
                    ratio_first = ratio
            totals = self.accelerator.reduce(totals, "sum") if self.args.world_size > 1 else totals
            policy_loss, value_loss, clip_fraction, value_clip_fraction, approx_kl = totals.tolist()
            moved = optimizer_steps > 0  # before, a KL is the rounding of the forward pass
            stopped = moved and self.args.early_stopping and approx_kl > 1.5 * self.args.target_kl
            if stopped:
                model.zero_grad()
                break
            clipped = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
            grad_norm = float(self._get_grad_norm(model, clipped))
            nonfinite = self.drop_nonfinite(model, bool(totals.isfinite().all()), grad_norm)
            self.optimizer.step()
            model.zero_grad()
            if nonfinite:
                what = nonfinite
                lost.append(step_rows)
                continue
            optimizer_steps += 1
            step = {
                "loss": policy_loss + self.args.value_coef * value_loss,
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "clip_fraction": clip_fraction,
                "value_clip_fraction": value_clip_fraction,
                "approx_kl": approx_kl,
                "grad_norm": grad_norm,
            }
            sums = {name: sums.get(name, 0.0) + value for name, value in step.items()}
        if lost:
            rows = self.rows_as_text(experience, torch.cat(lost).unique(), self.train_dataset)
            self.lose(what, rows, OF_POLICY, whole_step=not optimizer_steps)
        means = {name: value / optimizer_steps for name, value in sums.items()}
        return {
            **means,
            "ratio_first": ratio_first,
            "optimizer_steps": optimizer_steps,
            "stopped_early": float(stopped),
            "nonfinite_steps": len(lost),
        }

    def optimizer_batches(self, count: int, iteration: int) -> Iterator[Tensor]:
        """Row indices of each optimizer step of the iteration, over all processes, in a new order each epoch."""
        size = self.args.mini_batch_size * self.args.passes_per_step * self.args.world_size
        for epoch in range(self.args.ppo_epochs):
            generator = torch.Generator().manual_seed(_seed(self.args.seed, iteration, epoch, 1))
            yield from torch.randperm(count, generator=generator).to(self.args.device).split(size)

    def micro_batches(self, batch: Batch, step_rows: Tensor) -> list[Tensor]:
        """This process's part of an optimizer step, in `passes`."""
        return self.passes(batch, step_rows.chunk(self.args.world_size)[self.args.process_index])

    def micro_batch_loss(
        self,
        model: nn.Module,
        experience: Experience,
        advantages: Tensor,
        returns: Tensor,
        rows: Tensor,
        step_tokens: Tensor,
    ) -> tuple[Tensor, Tensor, float]:
        """Share of the step's loss that these rows carry, its parts (detached, [5]), and the ratio farthest from 1."""
        batch = experience.batch.rows(rows)
        mask = batch.response_mask
        width = mask.shape[1]
        old_logprobs, old_values, advantages, returns = (
            part[rows, :width] for part in (experience.logprobs, experience.values, advantages, returns)
        )
        with self.compute_loss_context_manager():
            new = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                job=reply_job(batch, self.sampling, not self.has_critic),
            )
            values = self.critic_values(model, batch) if self.has_critic else new.values
        policy = ppo.policy_loss(new.logprobs, old_logprobs, advantages, mask, self.args.clip_range)
        value = ppo.value_loss(values, old_values, returns, mask, self.args.value_clip_range)
        weight = mask.sum() / step_tokens
        parts = torch.stack([policy.loss, value.loss, policy.clip_fraction, value.clip_fraction, policy.approx_kl])
        ratios = (new.logprobs.detach() - old_logprobs)[mask].exp()
        farthest = float(ratios[(ratios - 1).abs().argmax()])
        return (policy.loss + self.args.value_coef * value.loss) * weight, parts.detach() * weight, farthest

    # ---- Measures, samples, evaluation ----

    def describe(self, experience: Experience, reply_kl: Tensor, scores: Tensor) -> dict[str, float]:
        """Measures of a batch of replies, over replies or over real tokens, never over padding."""
        mask = experience.batch.response_mask
        lengths = mask.sum(1).float()
        k3 = ppo.kl_penalty(experience.logprobs, experience.ref_logprobs, "k3") * mask
        texts = self.processing_class.batch_decode(experience.batch.responses(), skip_special_tokens=True)
        return {
            "score_mean": float(experience.scores.mean()),
            "score_std": float(experience.scores.std(unbiased=False)),
            "normalized_score_mean": float(scores.mean()),
            **({} if experience.gold is None else {"gold_mean": float(experience.gold.mean())}),
            "kl": float(reply_kl.mean()),
            "kl_k3": float(k3.sum(1).mean()),
            "kl_max": float(reply_kl.abs().max()),
            "response_length": float(lengths.mean()),
            "response_length_std": float(lengths.std(unbiased=False)),
            "empty_fraction": sum(not text.strip() for text in texts) / len(texts),
            "ended_fraction": float(self.ended(experience.batch).float().mean()),
            "entropy": float(ppo.masked_mean(experience.entropy, mask)),
        }

    def reply_to(self, dataset: Dataset, iteration: int) -> Iterator[Experience]:
        """Judged replies to all prompts of a data set (but for a rest that the processes cannot share), seeds by prompt.

        iteration: after which one this is.  Replies with numbers that are not finite are left out; raises RunError when
        there are no others.
        """
        count, what, whole = len(dataset), None, 0
        share = range(self.args.process_index, count - count % self.args.world_size, self.args.world_size)
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(share), size):
            rows = [dataset[i] for i in share[start : start + size]]
            seeds = [_seed(self.args.seed, row["index"], 0, 2) for row in rows]
            queries, indices = [row["input_ids"] for row in rows], [row["index"] for row in rows]
            experience = self.judge(self.model_wrapped, queries, seeds, indices, dataset)
            found = experience.nonfinite()
            if found:
                what = found[0][0]
                broken = torch.stack([part for _, _, part in found]).any(0)
                self.note_nonfinite(
                    what, self.rows_as_text(experience, broken.nonzero().squeeze(1), dataset), iteration
                )
                experience = None if broken.all() else experience.rows((~broken).nonzero().squeeze(1))
            if experience is not None:
                whole += len(experience.scores)
                yield experience
        if what and not whole:
            raise RunError(
                f"stopped after iteration {iteration}: NaN or infinity in {what} for every held-out prompt; check base "
                "and adapters, or compute in float32 (--bf16 false --dtype float32)"
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Reply to every held-out prompt with fixed seeds, log eval_* measures.  Changes nothing in training."""
        measures: dict[str, float] = {}
        count = 0
        for experience in self.reply_to(self.eval_dataset, self.state.global_step):
            kl = ppo.kl_penalty(experience.logprobs, experience.ref_logprobs, "k1") * experience.batch.response_mask
            scores = self.normalized_scores(experience, self.eval_dataset)
            for name, value in self.describe(experience, kl.sum(1), scores).items():
                if name in ("score_mean", "normalized_score_mean", "kl", "kl_k3", "response_length", "empty_fraction"):
                    measures[f"eval_{name}"] = measures.get(f"eval_{name}", 0.0) + value * len(scores)
            if experience.gold is not None:
                measures["eval_gold"] = measures.get("eval_gold", 0.0) + float(experience.gold.sum())
            count += len(scores)
        measures = {name: value / count for name, value in measures.items()}
        self.log(measures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, measures)
        return measures

    # ---- The guard ----

    def measure_for_guard(self, parts: list[Experience], dataset: Dataset) -> dict[str, float]:
        """What the guard looks at, of replies to prompts of `dataset`."""
        prompts, replies, lengths, kl, scores = [], [], [], [], []
        for part in parts:
            mask = part.batch.response_mask
            of_part = self.texts(part, dataset)
            prompts += of_part[0]
            replies += of_part[1]
            lengths += mask.sum(1).tolist()
            kl.append((ppo.kl_penalty(part.logprobs, part.ref_logprobs, "k1") * mask).sum(1))
            scores.append(self.normalized_scores(part, dataset))
        raw = torch.cat([part.scores for part in parts])
        return {
            **measure_replies(prompts, replies, lengths),
            "kl": float(torch.cat(kl).mean()),
            "score": float(torch.cat(scores).mean()),
            "extreme": float((raw - self.statistics.mean).abs().max() / self.statistics.std),
        }

    def watch(self, iteration: int, measures: dict[str, dict[str, float]]) -> dict[str, float]:
        """Let the guard look at the state after `iteration`; keep best/, or stop the run.  Returns metrics for the log."""
        metrics = {}
        looks = iteration % self.args.guard_freq == 0 or iteration == self.args.steps
        if looks:
            parts = list(self.reply_to(self.guard_dataset, iteration))
            held_out = self.measure_for_guard(parts, self.guard_dataset)
            measures = {**measures, "held-out": held_out}
            metrics = {f"heldout/{name}": value for name, value in held_out.items()}
            if self.gold is not None:  # for the log alone: neither a sign nor best/ may depend on it
                metrics["heldout/gold"] = float(torch.cat([part.gold for part in parts]).mean())
        signs = self.guard.check(iteration, measures)
        for level, sentence in signs:
            say(f"{level}: iteration {iteration}: {sentence}")
        if looks and self.guard.is_best(iteration, held_out, signs):
            self.save_best()
        if self.guard.collapse_at == iteration:
            say(f"collapse: {self.guard.verdict}")
            if self.args.guard == "stop":
                self.roll_back()
        counts = {"signs": len(signs), "alarms": sum(level == ALARM for level, _ in signs)}
        counts["recent_alarms"] = len(self.guard.alarms)
        return metrics | {f"guard/{name}": float(count) for name, count in counts.items()}

    def save_best(self) -> None:
        """Write the policy as it is to best/, which is never half written."""
        state = self.trained_state()
        if self.is_world_process_zero():
            folder = os.path.join(self.args.output_dir, BEST)
            with saving(folder):
                self.write_policy(folder + ".new", state)
                write_json({**self.record, "best": self.guard.best}, folder + ".new", "run.json")
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(folder + ".new", folder)

    def roll_back(self) -> None:
        """Put the policy of best/ in the place of the collapsed one, and end the training."""
        say(f"stopped, and rolled back to {BEST}/: the policy of iteration {self.guard.best['iteration']}")
        self.accelerator.wait_for_everyone()
        self.load_policy(os.path.join(self.args.output_dir, BEST))
        self.control.should_training_stop = True

    def outcome(self) -> dict[str, Any]:
        """What run.json says about the end of the run; None for what did not happen."""
        best = self.guard.best
        stopped = self.guard.verdict is not None and self.args.guard == "stop"
        guard = {"verdict": self.guard.verdict, "collapse_at": self.guard.collapse_at, "stopped": stopped}
        return {"best": best, "guard": {**guard, "rolled_back_to": best["iteration"] if stopped else None}}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the iteration's metrics in the place of the Trainer's own loss and gradient norm, which it cannot know."""
        if "loss" in logs:
            logs = self.pending_metrics
        super().log(logs, start_time)

    def write_samples(self, experience: Experience, reply_kl: Tensor, iteration: int) -> None:
        """Add every reply of the iteration to samples.jsonl."""
        if not self.is_world_process_zero():
            return
        texts = self.processing_class.batch_decode(experience.batch.responses(), skip_special_tokens=True)
        rows = zip(
            experience.indices.tolist(),
            texts,
            experience.scores.tolist(),
            reply_kl.tolist(),
            experience.batch.response_mask.sum(1).tolist(),
            strict=True,
        )
        self.samples[:] = [
            {
                "iteration": iteration,
                "prompt": self.train_dataset[index]["prompt"],
                "response": text,
                "score": score,
                "kl": kl,
                "length": length,
            }
            for index, text, score, kl, length in rows
        ]
        if experience.gold is not None:
            for row, gold in zip(self.samples, experience.gold.tolist(), strict=True):
                row["gold"] = gold
        append_jsonl(self.samples, self.args.output_dir, "samples.jsonl")

    # ---- Saving ----

    def trained_state(self) -> dict[str, Tensor]:
        """Policy, critic and value head as whole tensors on the CPU.  Every process has to call it."""
        parts = (f".{POLICY}.", f".{CRITIC}.", ".v_head.")
        model = self.accelerator.unwrap_model(self.model)
        return whole_parameters(model, lambda name: any(part in name for part in parts))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Gather what is trained from all processes, and let the first one write it."""
        state = self.trained_state()
        if self.args.should_save:
            self.write_policy(output_dir or self.args.output_dir, state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def write_policy(self, folder: str, state: dict[str, Tensor]) -> None:
        """The policy adapter, the critic, the value head, the tokenizer and what PPO itself has to remember.

        state: from `trained_state`.
        """
        os.makedirs(folder, exist_ok=True)
        adapters = [POLICY, CRITIC] if self.has_critic else [POLICY]
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state, selected_adapters=adapters)
        save_value_head(state, folder)
        self.processing_class.save_pretrained(folder)
        write_json({"kl_coef": self.kl_coef, "guard": self.guard.state()}, folder, STATE_FILE)

    def load_policy(self, folder: str) -> None:
        """Fill policy adapter, critic and value head from a folder that `write_policy` wrote."""
        model = self.accelerator.unwrap_model(self.model)
        load_weights(model, folder, POLICY)
        if self.has_critic:
            load_weights(model, os.path.join(folder, CRITIC), CRITIC)
        load_value_head(model.get_base_model(), folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # DeepSpeed fills the parameters by itself, and calls nothing of ours.
        if self.is_deepspeed_enabled and checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Fill policy adapter, critic and value head from a checkpoint."""
        self.load_policy(resume_from_checkpoint)
        with open(os.path.join(resume_from_checkpoint, STATE_FILE), encoding="utf-8") as file:
            state = json.load(file)
        self.kl_coef = state["kl_coef"]
        self.guard.restore(state["guard"])
        if self.is_world_process_zero():  # a later one is of iterations that are now done again
            best = os.path.join(self.args.output_dir, BEST)
            with saving(best):
                shutil.rmtree(best, ignore_errors=True)
                if self.guard.best is not None:
                    shutil.copytree(os.path.join(resume_from_checkpoint, BEST), best)

    def add_to_checkpoint(self, folder: str) -> None:
        super().add_to_checkpoint(folder)
        if self.guard.best is not None:
            shutil.copytree(os.path.join(self.args.output_dir, BEST), os.path.join(folder, BEST))

    def is_finished(self) -> bool:
        return super().is_finished() or (self.args.guard == "stop" and self.guard.verdict is not None)


def _seed(*parts: int) -> int:
    """One number out of several, spread over 63 bits: seed, iteration and row must not fall on each other."""
    state = 0
    for part in parts:
        state = ((state ^ (part + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9) % 2**64
        state ^= state >> 31
    return state % 2**63


def read_statistics(reward: SavedAdapter, allow_weak: bool) -> ScoreStatistics:
    """Mean and standard deviation of the scores out of the reward card; 0 and 1 where there is none.

    Raises InputError when the card is missing or says that the model did not pass, unless `allow_weak` lets it through
    with a warning: PPO finds whatever a reward model likes by mistake.
    """
    card = read_card(reward.path)
    if card is None:
        weak = f"the reward adapter {reward.path} has no reward_card.json, so nothing is known about it"
    elif not card.get("passed"):
        reasons = in_short(card.get("failed", [])) or "it is the card of an older version"
        weak = f"the reward adapter {reward.path} did not pass its reward card: {reasons}"
    else:
        weak = None
    if weak and not allow_weak:
        raise InputError(
            f"{weak}; train it with reward_modeling.py on more data or with a higher --degenerate_ratio, or go on at your "
            "own risk with --allow_weak_reward true"
        )
    if weak:
        say(f"warning: {weak}")
    if card is None:
        return ScoreStatistics()
    return ScoreStatistics(card["score_mean"], card["score_std"] or 1.0)


def split_guard_prompts(rows: Dataset, count: int, needed: int) -> tuple[Dataset, Dataset]:
    """Training prompts, and held-out ones for the guard: at most `count` and a tenth of all, spread over the rows.

    Where that leaves fewer than the `needed` ones of an iteration, the guard looks at training prompts.
    """
    step = max(10, -(-len(rows) // count))
    held_out = range(0, len(rows), step)
    if len(rows) - len(held_out) < needed:
        return rows, rows.select(held_out)
    kept = [i for i in range(len(rows)) if i % step]
    return rows.select(kept), rows.select(held_out)


def longest_prompt(args: PPOArguments) -> int:
    """Tokens that --max_length leaves for a prompt.  Raises InputError when that is none."""
    longest = args.max_length - args.output_max_length
    if longest < 1:
        raise InputError(
            f"--max_length {args.max_length} leaves no room for a prompt beside --output_max_length "
            f"{args.output_max_length}; raise the first or lower the second"
        )
    return longest


def number_rows(prompts: Dataset) -> Dataset:
    """Add the column `index`, by which a reply finds its prompt again."""
    return prompts.add_column("index", list(range(len(prompts))))


def main() -> None:
    # ---- Arguments ----
    model_args, data_args, training_args, plan_args = parse_arguments(
        (ModelArguments, DataArguments, PPOArguments, PlanArguments),
        description="Stage 3: PPO with adapters on one base.",
    )
    if not plan_args.plan:
        relaunch_on_all_gpus()
        check_output_dir(training_args)
        check_trackers(training_args)
    checkpoint = resume_path(training_args, "ppo")
    dtype = choose_precision(model_args, training_args)
    sft = read_adapter(training_args.sft_model_lora_path, "--sft_model_lora_path")
    reward = read_adapter(training_args.reward_model_lora_path, "--reward_model_lora_path")
    check_kind(sft, "--sft_model_lora_path", needs_score_head=False)
    check_kind(reward, "--reward_model_lora_path", needs_score_head=True)
    longest = longest_prompt(training_args)
    gold = None if training_args.gold_function is None else load_gold(training_args.gold_function)
    announce(
        lambda model, args: ppo_plan(model, args, sft, reward, dtype),
        model_args,
        training_args,
        ["mini_batch_size", "activation_checkpointing", "batch_size", "load_in_4bit"],
        plan_args.plan,
    )
    if plan_args.plan:
        return
    set_seed(training_args.seed)

    # ---- Tokenizer and data ----
    tokenizer = load_tokenizer(model_args)
    template = model_args.prompt_template
    check_template(template, tokenizer)
    sampling = Sampling(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=training_args.output_max_length,
        temperature=training_args.temperature,
        repetition_penalty=training_args.repetition_penalty,
        begin_suppress_tokens=first_token_ban(training_args.begin_suppress_tokens, tokenizer),
    )
    train_rows, eval_rows = train_and_eval_rows(data_args, DEFAULT_PREFERENCES)
    check_evaluation(training_args, eval_rows is not None)
    train_dataset = tokenize_prompts(train_rows, template, tokenizer, longest)
    eval_dataset = eval_rows and number_rows(tokenize_prompts(eval_rows, template, tokenizer, longest))
    needed = training_args.batch_size * training_args.world_size
    guard_dataset = None
    if training_args.guard != "off":
        if eval_dataset is not None:
            guard_dataset = eval_dataset.select(range(min(training_args.guard_prompts, len(eval_dataset))))
        else:
            train_dataset, guard_dataset = split_guard_prompts(train_dataset, training_args.guard_prompts, needed)
            guard_dataset = number_rows(guard_dataset)
    train_dataset = number_rows(train_dataset)
    if len(train_dataset) < needed:
        raise InputError(
            f"{len(train_dataset)} prompts are fewer than the {needed} of one iteration (--batch_size in each process); "
            "give more prompts or a smaller batch"
        )
    if gold is not None:
        try_gold(gold, train_dataset[0]["prompt"])

    # ---- Model ----
    base = load_base(model_args, dtype, training_args.device)
    check_adapter(sft, "--sft_model_lora_path", False, template, base)
    check_adapter(reward, "--reward_model_lora_path", True, template, base)
    statistics = read_statistics(reward, training_args.allow_weak_reward)
    record = run_record("ppo", base, model_args, training_args, data=asdict(data_args))
    model = assemble_ppo_model(base, sft, reward, training_args.critic == "adapter")
    if not training_args.normalize_scores:
        statistics = ScoreStatistics()
    if training_args.critic == "adapter":
        start_critic(model, *statistics)
    if training_args.activation_checkpointing:
        model.enable_input_require_grads()  # a frozen embedding gives checkpointed layers nothing to differentiate
    check_output_logits(model)

    # ---- Training ----
    trainer = PPOTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=[RunFiles(record, key="iteration")],
        sampling=sampling,
        statistics=statistics,
        guard_dataset=guard_dataset,
        gold=gold,
        record=record,
    )
    trainer.remove_callback(PrinterCallback if training_args.disable_tqdm else ProgressCallback)
    trainer.add_callback(IterationLines())
    use_grouped_names(trainer, trainer.samples)
    trainer.train(resume_from_checkpoint=checkpoint)

    # ---- Save ----
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_json({**record, **trainer.outcome()}, training_args.output_dir, "run.json")
        draw_curves(training_args.output_dir)
    say(f"PPO adapter: {training_args.output_dir}")
    if trainer.guard.best is not None:
        best = trainer.guard.best
        say(f"best policy: {os.path.join(training_args.output_dir, BEST)}, iteration {best['iteration']}")


if __name__ == "__main__":
    run_script(main)
