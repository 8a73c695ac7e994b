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
normalised with the reward card; what ends a reply is suppressed as a first token, in the log-probs too; the loss is a mean
over all reply tokens of an optimizer step, however they fall into micro-batches and processes; the value head shares the
policy's trunk and is saved.
"""

import utils.quiet  # isort: skip  # noqa: F401 - before any library

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from corpus.chat_template import check_reply_end, stop_token_ids
from corpus.files import Rows, train_and_eval_rows
from corpus.tokens import HELD_OUT, check_template, tokenize_prompts
from lora.adapters import SavedAdapter, check_adapter, check_kind, read_adapter
from lora.base_model import check_lengths, check_tokenizer, load_base, load_tokenizer
from reporting.metrics import EVALUATED
from reporting.plots import draw_curves
from reporting.progress import IterationLines
from reporting.trackers import use_grouped_names
from rewards.guard import Guard, Limits
from rewards.ready_made import ReadyMade
from rewards.reward_functions import RewardFunction, carried_columns, load_function, load_functions, try_function
from rewards.reward_server import RewardServer
from rewards.scores import (
    REWARD_MODEL,
    ScoreRules,
    ScoreStatistics,
    measure_scores,
    part_weights,
    read_statistics,
)
from rollout.distribution import Sampling, check_output_logits, first_token_ban
from rollout.experience import (
    OF_POLICY,
    Collector,
    Experience,
    describe,
    describe_all,
    describe_functions,
    warn_where_few_end,
)
from rollout.logprobs import logprobs_fn
from rollout.model import assemble_ppo_model, start_critic
from rollout.policy_files import PolicyFiles
from rollout.sampler import seed_of
from rollout.value_learning import OF_VALUES, let_policy_wait, split_groups
from rollout.watch import Watch
from runs.memory_plan import announce, ppo_plan
from runs.resume import check_same_run, identity, settle_date
from runs.run_files import RunFiles, run_record
from runs.seen_prompts import new_prompts, read_seen_prompts, warn_of_seen_prompts
from runs.start import start_stage
from runs.trainer import ResumableArguments, ResumableTrainer
from utils import ppo
from utils.arguments import (
    DEFAULT_PREFERENCES,
    DataArguments,
    ModelArguments,
    PlanArguments,
    check_evaluation,
    check_numbers,
    default_autocast,
    parse_arguments,
    set_up_ddp,
)
from utils.console import InputError, one_line, run_script, say
from utils.files import append_jsonl, write_json
from utils.offered import EVERY_STAGE

FIRST_REPLIES = 64  # of the SFT model, by which the reward functions are normalised


@dataclass
class PPOArguments(ResumableArguments, TrainingArguments):
    """PPO's own arguments and those of the Trainer that it offers.  Sizes are per process, as everywhere in the Trainer."""

    offered = EVERY_STAGE

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
    log_with: str | None = field(
        default=None, metadata={"help": "wandb, tensorboard, trackio ...: the same as --report_to."}
    )

    max_length: int = field(
        default=1024, metadata={"help": "Longest prompt + reply, in tokens; longer prompts are dropped."}
    )
    output_max_length: int = field(default=128, metadata={"help": "Longest reply, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; also applied to log-probs."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Repetition penalty of the sampler; also applied to log-probs; 1 is none."}
    )
    begin_suppress_tokens: str = field(
        default="eos",
        metadata={
            "help": "Tokens that no reply may start with: eos (what ends one, and padding), none, or ids joined by commas."
        },
    )
    batched_gen: bool | None = field(
        default=None, metadata={"help": "Has no effect: replies are always sampled in batches."}
    )

    init_kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the SFT model, at the start."})
    adap_kl_ctrl: bool = field(default=False, metadata={"help": "Steer that weight towards --adap_kl_target."})
    adap_kl_target: float = field(default=6.0, metadata={"help": "KL a reply to steer to, in nats."})
    adap_kl_horizon: float = field(default=10000.0, metadata={"help": "Replies in which the weight can about double."})
    kl_in: str | None = field(
        default=None,
        metadata={
            "help": "Where the KL to the SFT model counts: in the reward (k1, the default), or in the loss (k3, the default "
            "of grpo, whose division by the deviation would blow up small differences of KL).",
            "choices": ["reward", "loss"],
        },
    )
    early_stopping: bool = field(default=False, metadata={"help": "End the PPO epochs when the policy moved too far."})
    target_kl: float = field(
        default=0.1, metadata={"help": "Too far: KL to the rollout policy above 1.5 times this, in nats a token."}
    )
    reward_baseline: float = field(default=0.0, metadata={"help": "Subtracted from every normalised score."})
    reward_model: str | None = field(
        default=None,
        metadata={
            "help": "A ready-made reward model: a sequence classifier with one label, a hub name or a folder, which judges "
            "in its own tokenizer and chat template, beside the reward adapter or without one."
        },
    )
    reward_dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of its weights: auto (float32 on a CPU, else as they are stored), or one of these.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    reward_load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the --reward_model in 4 bit (NF4).  Needs requirements-4bit.txt."}
    )
    reward_device: str | None = field(
        default=None,
        metadata={"help": "Where the --reward_model goes, as cuda:1 or cpu.  Default: the policy's device."},
    )
    reward_card: str | None = field(
        default=None,
        metadata={
            "help": "Folder with the reward card of the --reward_model, written by reward_modeling.py --card_only.  "
            "Default: the model's own folder."
        },
    )
    reward_server: str | None = field(
        default=None,
        metadata={
            "help": "Address of a server that judges: it gets prompts and completions as JSON and answers scores; "
            "docs/reward_models.md has the form."
        },
    )
    reward_function: str | None = field(
        default=None,
        metadata={
            "help": "MODULE:NAME of a Python function of your own that judges replies, beside the reward adapter or without "
            "one; several joined by commas.  docs/reward_functions.md has the forms."
        },
    )
    reward_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights of --reward_model, --reward_server and each --reward_function, joined by commas; one more in "
            "front is the reward adapter's.  Default: 1 each."
        },
    )
    normalize_scores: bool = field(
        default=True,
        metadata={
            "help": "Subtract the mean and divide by the standard deviation: of the reward card, and for the other parts "
            "of a score of the SFT model's own replies."
        },
    )
    score_clip: float = field(default=5.0, metadata={"help": "Normalised scores are clipped to +- this."})
    missing_eos_penalty: float = field(
        default=1.0, metadata={"help": "Subtracted from the normalised score of a reply that was cut by the limit."}
    )
    allow_weak_reward: bool = field(
        default=False,
        metadata={
            "help": "Go on with a reward adapter whose card is missing or did not pass, or such a --reward_model."
        },
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
            "help": "MODULE:NAME of a Python function of your own, such as a rule or a verifier, in the forms of "
            "--reward_function.  It is measured and logged beside the score; neither training nor guard see it."
        },
    )
    advantage: str = field(
        default="gae",
        metadata={
            "help": "What a reply is compared with. gae: the values of a critic; rloo: the mean reward of the other replies "
            "to its prompt; grpo: the mean of all of them, in deviations.  The last two have no value head.",
            "choices": ["gae", "rloo", "grpo"],
        },
    )
    replies_per_prompt: int | None = field(
        default=None, metadata={"help": "Replies to each prompt of a batch.  Default: 1 for gae, else 4."}
    )
    divide_by_std: bool = field(
        default=True, metadata={"help": "grpo: divide by the deviation of the rewards of a prompt's replies."}
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
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of value head and critic.  Default: --learning_rate."}
    )
    value_warmup_iterations: int = field(
        default=0,
        metadata={"help": "Iterations at the start in which the values learn, and the policy stays as it is."},
    )
    value_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})

    def __post_init__(self) -> None:
        check_numbers(
            self,
            above_0="steps save_freq batch_size mini_batch_size gradient_accumulation_steps ppo_epochs max_length "
            "output_max_length temperature repetition_penalty adap_kl_target adap_kl_horizon target_kl score_clip "
            "guard_freq guard_prompts guard_patience kl_budget clip_range value_clip_range replies_per_prompt "
            "value_learning_rate",
            from_0="init_kl_coef missing_eos_penalty value_coef value_warmup_iterations",
            shares="gamma gae_lambda",
            finite="reward_baseline",
        )
        grouped = self.advantage != "gae"
        self.values_from = None if grouped else self.critic
        self.kl_in = self.kl_in or ("loss" if self.advantage == "grpo" else "reward")
        self.replies_per_prompt = self.replies_per_prompt or (4 if grouped else 1)
        if grouped and self.replies_per_prompt == 1:
            raise InputError(
                f"--advantage {self.advantage} compares the replies to a prompt, but --replies_per_prompt is 1; give 2 or "
                "more"
            )
        if self.value_warmup_iterations >= self.steps:
            raise InputError(
                f"--value_warmup_iterations {self.value_warmup_iterations} leaves the policy none of the --steps "
                f"{self.steps}; give fewer"
            )
        if self.batch_size % self.replies_per_prompt:
            raise InputError(
                f"--batch_size {self.batch_size}, which counts replies, is no multiple of --replies_per_prompt "
                f"{self.replies_per_prompt}; change one"
            )
        if self.mini_batch_size > self.batch_size:
            say(
                f"note: --mini_batch_size {self.mini_batch_size} is above --batch_size {self.batch_size}, the replies of a "
                f"process; a pass takes {self.batch_size}"
            )
            self.mini_batch_size = self.batch_size
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
        if self.save_strategy == "best":
            raise InputError("--save_strategy best: the guard keeps the best policy in best/; give steps, epoch or no")
        if self.log_with is not None:
            self.report_to = [self.log_with]
        if self.adafactor:
            self.optim = "adafactor"
        # The Trainer sees one step an iteration; the micro-batches inside it are counted here.
        self.gradient_accumulation_steps = 1
        self.per_device_train_batch_size = self.batch_size // self.replies_per_prompt  # prompts
        self.max_steps, self.save_steps, self.logging_steps = self.steps, self.save_freq, 1
        self.remove_unused_columns, self.dataloader_drop_last = False, True
        self.label_names = []
        default_autocast(self)
        set_up_ddp(self)
        super().__post_init__()


class Targets(NamedTuple):
    """What the PPO epochs learn from."""

    advantages: Tensor  # float32 [B, T]
    returns: Tensor | None  # float32 [B, T]; None without a critic

    def rows(self, index: Tensor, width: int) -> "Targets":
        return Targets(*(part if part is None else part[index, :width] for part in self))


class Losses(NamedTuple):
    """Means over the response tokens of an optimizer step, or the share of such a mean that a micro-batch carries; [].

    0 for what there is not.
    """

    policy_loss: Tensor
    value_loss: Tensor
    kl_loss: Tensor
    clip_fraction: Tensor
    value_clip_fraction: Tensor
    approx_kl: Tensor


class MicroBatchLoss(NamedTuple):
    loss: Tensor  # [], the share of the step's loss that these rows carry, with its gradient
    losses: Losses  # detached
    farthest_ratio: float  # the ratio that is farthest from 1


class OptimizerStep(NamedTuple):
    """What came of one optimizer step."""

    losses: dict[str, float]  # of `Losses`, and the loss itself
    first_ratio: float  # of its first micro-batch
    grad_norm: float | None = None  # None where the policy had moved too far: then no step was made
    nonfinite: str | None = None  # what was NaN or infinite: then nothing was changed


class PPOTrainer(ResumableTrainer):
    """One frozen base, adapters as policy, reference and reward; `training_step` is one PPO iteration."""

    step_name = "iteration"

    def __init__(
        self,
        *args: Any,
        sampling: Sampling,
        rules: ScoreRules,
        functions: Sequence[RewardFunction] = (),
        guard_dataset: Dataset | None = None,
        gold: RewardFunction | None = None,
        record: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """rules: without statistics of a function, these are measured at the start; guard_dataset: held-out prompts for the
        guard, None for no guard; gold: what is only measured; record: run.json, for the one in best/."""
        super().__init__(*args, data_collator=lambda rows: rows, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.kl_coef = self.args.init_kl_coef
        self.no_losses = {"kl_loss"} if self.args.kl_in == "reward" else set()  # what there is nothing of to log
        if self.args.values_from is None:
            self.no_losses |= {"value_loss", "value_clip_fraction"}
        self.score_rules = rules
        self.collector = Collector(
            self.accelerator,
            self.args,
            self.model,
            self.processing_class,
            sampling,
            rules,
            functions,
            gold,
            lambda: self.state,
        )
        guard = Guard(Limits(self.args.kl_budget), self.args.guard_patience)
        self.policy_files = PolicyFiles(
            lambda: self.accelerator.unwrap_model(self.model),
            self.processing_class,
            lambda: {"kl_coef": self.kl_coef, "guard": guard.state(), "score_statistics": rules.statistics},
        )
        self.watch = Watch(
            guard,
            rules,
            None if guard_dataset is None else lambda at: list(self.respond_to_all(guard_dataset, at)),
            every=self.args.guard_freq,
            last=self.args.steps,
            may_stop=self.args.guard == "stop",
            policy_files=self.policy_files,
            accelerator=self.accelerator,
            output_dir=self.args.output_dir,
            record=record or {},
            prompts=len(guard_dataset or ()),
        )
        self.samples: list[dict[str, Any]] = []  # the rows of samples.jsonl of this iteration, for the trackers
        self.pending_metrics: dict[str, float] = {}  # of this iteration, for the log

    # ---- One iteration ----

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Collect, rewards, advantages, update, finish.  Returns the mean loss of the iteration, for the Trainer's log."""
        started = time.perf_counter()
        # eval() for good: dropout is 0 anyway, but train() is what switches activation checkpointing on
        model.train(self.args.activation_checkpointing)
        self.measure_functions()
        if self.watch.is_on and not self.watch.guard.baselines:
            self.watch.look(0)  # the SFT model, which everything is compared with

        # 1. responses, log-probs, values, scores
        experience = self.collect(model, inputs)
        if experience.nonfinite() is not None:
            return self.skip_iteration(experience, started)
        if self.state.global_step == 0:
            warn_where_few_end(experience, self.collector.sampling, self.processing_class)

        # 2. rewards: the KL penalty on each token unless it is in the loss, the score on the last one
        penalty = self.kl_coef if self.args.kl_in == "reward" else 0.0
        rewards = ppo.token_rewards(experience.normalized_scores, experience.kl, experience.mask, penalty)

        # 3. advantages
        targets = self.targets(experience, rewards)

        # 4. PPO epochs
        update = self.update(model, experience, targets)

        # 5. metrics, KL weight, guard, samples
        return self.finish(experience, rewards, targets.returns, update, started)

    def measure_functions(self) -> None:
        """Mean and deviation of each reward function that has none yet, on the SFT model's replies to some prompts."""
        names = [name for name in self.score_rules.weights if name not in self.score_rules.statistics]
        if names:
            self.score_rules.statistics |= dict.fromkeys(names, ScoreStatistics())
            prompts = self.train_dataset.select(range(min(FIRST_REPLIES, len(self.train_dataset))))
            found = list(self.respond_to_all(prompts, 0))
            for name in names:
                scores = torch.cat([experience.parts[name] for experience in found])
                self.score_rules.statistics[name] = measure_scores(scores)

    def collect(self, model: nn.Module, rows: list[dict[str, Any]]) -> Experience:
        """Responses to each prompt of this process, with seeds from iteration and row; gathered from all processes."""
        count = len(rows) * self.args.replies_per_prompt
        first = self.args.process_index * count
        seeds = [seed_of(self.args.seed, self.state.global_step, first + row) for row in range(count)]
        return self.collector.collect(model, rows, seeds)

    def targets(self, experience: Experience, rewards: Tensor) -> Targets:
        """Advantages out of rewards [B, T]; those of GAE whitened over all response tokens of all processes."""
        args, mask = self.args, experience.mask
        if args.advantage == "rloo":
            return Targets(ppo.rloo(rewards, mask, args.replies_per_prompt), None)
        if args.advantage == "grpo":
            return Targets(ppo.grpo(rewards, mask, args.replies_per_prompt, args.divide_by_std), None)
        advantages, returns = ppo.gae(rewards, experience.values, mask, args.gamma, args.gae_lambda)
        return Targets(ppo.masked_whiten(advantages, mask), returns)

    def update(self, model: nn.Module, experience: Experience, targets: Targets) -> dict[str, float]:
        """`ppo_epochs` passes over the batch; returns the metrics of the update, means over its optimizer steps."""
        learning_rate = self._get_learning_rate()
        steps: list[OptimizerStep] = []
        skipped: list[Tensor] = []  # rows of the optimizer steps that changed nothing
        first_ratio, stopped, quantity = None, False, ""
        for rows in self.optimizer_batches(len(experience.scores)):
            step = self.optimizer_step(model, experience, targets, rows, may_stop=bool(steps))
            first_ratio = step.first_ratio if first_ratio is None else first_ratio
            if step.nonfinite:
                quantity = step.nonfinite
                skipped.append(rows)
            elif step.grad_norm is None:
                stopped = True
                break
            else:
                steps.append(step)
        if skipped:
            self.skip_step(quantity, experience.texts(torch.cat(skipped).unique()), OF_POLICY, whole_step=not steps)
        made = [{**step.losses, "grad_norm": step.grad_norm} for step in steps]
        return {
            **({name: sum(step[name] for step in made) / len(made) for name in made[0]} if made else {}),
            "ratio_first": first_ratio,
            "optimizer_steps": len(made),
            "stopped_early": float(stopped),
            "nonfinite_steps": len(skipped),
            "learning_rate": learning_rate,
        }

    def optimizer_batches(self, count: int) -> Iterator[Tensor]:
        """Row indices of each optimizer step of the iteration, over all processes, in a new order each epoch."""
        size = self.args.mini_batch_size * self.args.passes_per_step * self.args.world_size
        for epoch in range(self.args.ppo_epochs):
            seed = seed_of(self.args.seed, self.state.global_step, epoch, 1)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            yield from order.to(self.args.device).split(size)

    def optimizer_step(
        self, model: nn.Module, experience: Experience, targets: Targets, rows: Tensor, may_stop: bool
    ) -> OptimizerStep:
        """One step on these rows of all processes: the mean over all their response tokens, wherever they are computed.

        So neither the cut into micro-batches nor the number of processes changes the gradient.  may_stop: whether a policy
        that moved too far ends the update; before the first step a KL is the rounding of the forward pass.
        """
        own_rows = rows.chunk(self.args.world_size)[self.args.process_index]
        micro_batches = self.collector.micro_batches(experience.batch, own_rows)
        step_tokens = experience.mask[rows].sum()
        parts: list[MicroBatchLoss] = []
        for number, micro_rows in enumerate(micro_batches, 1):
            last = number == len(micro_batches)
            self.accelerator.gradient_state._set_sync_gradients(last)  # what DeepSpeed's engine looks at
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                part = self.micro_batch_loss(model, experience.rows(micro_rows), targets, micro_rows, step_tokens)
                # every process adds its share of the step's mean, and DDP divides by their number
                self.accelerator.backward(part.loss * self.args.world_size)
            parts.append(part._replace(loss=part.loss.detach()))
        shares = sum(torch.stack(part.losses) for part in parts)
        totals = Losses(*(self.accelerator.reduce(shares, "sum") if self.args.world_size > 1 else shares))
        losses = {name: float(value) for name, value in totals._asdict().items() if name not in self.no_losses}
        losses = {"loss": float(self.whole_loss(totals)), **losses}
        step = OptimizerStep(losses, parts[0].farthest_ratio)
        if may_stop and self.args.early_stopping and losses["approx_kl"] > 1.5 * self.args.target_kl:
            model.zero_grad()
            return step
        clipped = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        grad_norm = float(self._get_grad_norm(model, clipped))
        nonfinite = self.drop_nonfinite(model, all(map(math.isfinite, losses.values())), grad_norm)
        self.optimizer.step()
        model.zero_grad()
        return step._replace(grad_norm=grad_norm, nonfinite=nonfinite)

    def micro_batch_loss(
        self, model: nn.Module, experience: Experience, targets: Targets, rows: Tensor, step_tokens: Tensor
    ) -> MicroBatchLoss:
        """Loss of some rows.  experience: of these rows alone; targets: of all; step_tokens: of the optimizer step, []."""
        mask = experience.mask
        advantages, returns = targets.rows(rows, mask.shape[1])
        inputs = {"input_ids": experience.batch.input_ids, "attention_mask": experience.batch.attention_mask}
        collector = self.collector
        with self.compute_loss_context_manager():
            new = model(
                **inputs, hidden_state_fn=logprobs_fn(experience.batch, collector.sampling, collector.head_values)
            )
            values = collector.critic_values(model, experience.batch) if collector.has_critic else new.values
        policy = ppo.policy_loss(new.logprobs, experience.logprobs, advantages, mask, self.args.clip_range)
        zero = new.logprobs.new_zeros(())
        value, kl = ppo.ValueLoss(zero, zero), zero
        if values is not None:
            value = ppo.value_loss(values, experience.values, returns, mask, self.args.value_clip_range)
        if self.args.kl_in == "loss":
            kl = ppo.kl_loss(new.logprobs, experience.ref_logprobs, mask)
        weight = mask.sum() / step_tokens
        losses = Losses(policy.loss, value.loss, kl, policy.clip_fraction, value.clip_fraction, policy.approx_kl)
        ratios = (new.logprobs.detach() - experience.logprobs)[mask].exp()
        return MicroBatchLoss(
            self.whole_loss(losses) * weight,
            Losses(*(part.detach() * weight for part in losses)),
            float(ratios[(ratios - 1).abs().argmax()]),
        )

    def whole_loss(self, losses: Losses) -> Tensor:
        """What is minimised, []."""
        policy = losses.policy_loss + self.kl_coef * losses.kl_loss
        if self.state.global_step < self.args.value_warmup_iterations:
            policy = 0 * policy  # not left out: DDP wants a gradient of every parameter
        return policy + self.args.value_coef * losses.value_loss

    def finish(
        self, experience: Experience, rewards: Tensor, returns: Tensor | None, update: dict[str, float], started: float
    ) -> Tensor:
        """Put down what happened, steer the KL weight, let the guard look.  Returns the mean loss."""
        mask, iteration = experience.mask, self.state.global_step
        metrics = {
            **describe(experience),
            **describe_functions([experience]),
            **update,
            "reward_mean": float((rewards * mask).sum(1).mean()),
            "kl_coef": self.kl_coef,
        }
        if returns is not None:
            metrics["returns_mean"] = float(ppo.masked_mean(returns, mask))
            metrics["values_mean"] = float(ppo.masked_mean(experience.values, mask))
        if iteration == 0 and metrics["kl_max"] > 1e-3:
            raise RuntimeError(f"the policy is not the SFT model before its first update: KL {metrics['kl_max']}")
        if self.args.adap_kl_ctrl:
            self.kl_coef = ppo.adaptive_kl_coef(
                self.kl_coef, metrics["kl"], self.args.adap_kl_target, self.args.adap_kl_horizon, len(mask)
            )
        seconds = time.perf_counter() - started
        metrics |= {"seconds": seconds, "tokens_per_second": int(mask.sum()) / seconds}
        if self.watch.is_on:
            metrics |= self.look(iteration + 1, experience)
        self.pending_metrics = metrics
        self.samples = experience.samples(iteration + 1)
        if self.is_world_process_zero():
            append_jsonl(self.samples, self.args.output_dir, "samples.jsonl")
        return torch.tensor(metrics.get("loss", 0.0), device=self.args.device)

    def skip_iteration(self, experience: Experience, started: float) -> Tensor:
        """Make no update: something in the batch is not finite."""
        found = experience.nonfinite()
        self.skip_step(found.quantity, experience.texts(found.rows.nonzero().squeeze(1)), found.advice)
        self.pending_metrics = {
            "kl_coef": self.kl_coef,
            "learning_rate": self._get_learning_rate(),
            "nonfinite_steps": 1,
            **(self.look(self.state.global_step + 1, None) if self.watch.is_on else {}),
            "seconds": time.perf_counter() - started,
        }
        return torch.zeros((), device=self.args.device)

    # ---- Held-out prompts ----

    def look(self, iteration: int, experience: Experience | None) -> dict[str, float]:
        """Let the watch look, and end the training where it went back to best/.  Returns metrics for the log."""
        metrics = self.watch.look(iteration, experience)
        if self.watch.stopped:
            self.control.should_training_stop = True
        return metrics

    def respond_to_all(self, dataset: Dataset, iteration: int) -> Iterator[Experience]:
        """Experience of all prompts of a data set, seeds by prompt.  iteration: after which one this is."""
        self.measure_functions()
        return self.collector.respond_to_all(self.model_wrapped, dataset, iteration, self.note_nonfinite)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Respond to every held-out prompt with fixed seeds, log eval_* measures.  Changes nothing in training."""
        measures = describe_all(list(self.respond_to_all(self.eval_dataset, self.state.global_step)))
        wanted = {name for name in measures if name in EVALUATED or name.startswith("reward/")}
        metrics = {f"eval_{name}": value for name, value in measures.items() if name in wanted}
        if "gold_mean" in measures:
            metrics["eval_gold"] = measures["gold_mean"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Logs and files ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the iteration's metrics in the place of the Trainer's own loss and gradient norm, which it cannot know."""
        if "loss" in logs:
            logs = self.pending_metrics
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Gather what is trained from all processes, and let the first one write it."""
        state = self.policy_files.gather()
        if self.args.should_save:
            self.policy_files.write(output_dir or self.args.output_dir, state)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and (self.args.value_learning_rate or self.args.value_warmup_iterations):
            rate = self.args.value_learning_rate or self.args.learning_rate
            split_groups(optimizer, self.model if model is None else model, rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        is_new = self.lr_scheduler is None
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if is_new and self.args.value_warmup_iterations:
            self.lr_scheduler = let_policy_wait(schedule, self.args.value_warmup_iterations)
        return self.lr_scheduler

    def peak_rate(self, group: dict[str, Any]) -> float:
        of_values = group.get(OF_VALUES) and self.args.value_learning_rate
        return of_values or super().peak_rate(group)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # DeepSpeed fills the parameters by itself, and calls nothing of ours.
        if self.is_deepspeed_enabled and checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Fill policy adapter, critic and value head from a checkpoint."""
        state = self.policy_files.load(resume_from_checkpoint)
        self.kl_coef = state["kl_coef"]
        measured = state.get("score_statistics", {})  # of the run's first replies
        self.score_rules.statistics |= {name: ScoreStatistics(*measured[name]) for name in measured}
        self.watch.restore(state["guard"], resume_from_checkpoint)

    def add_to_checkpoint(self, folder: str) -> None:
        super().add_to_checkpoint(folder)
        self.watch.add_to_checkpoint(folder)

    def is_finished(self) -> bool:
        return super().is_finished() or self.watch.stopped


def split_guard_prompts(rows: Dataset, count: int, needed: int, new: list[int]) -> tuple[Dataset, Dataset]:
    """Training prompts, and held-out ones for the guard: at most `count` and a tenth of all, spread over the rows.

    new: rows that no earlier stage has trained on; the guard gets these where they are enough.  Where too few prompts are
    left for the `needed` ones of an iteration, the guard looks at training prompts.
    """
    wanted = min(count, -(-len(rows) // 10))
    pool = new if len(new) >= wanted else range(len(rows))
    held_out = [pool[i * len(pool) // wanted] for i in range(wanted)]
    if len(rows) - len(held_out) < needed:
        return rows, rows.select(held_out)
    return rows.select(sorted({*range(len(rows))} - {*held_out})), rows.select(held_out)


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
    """Add the column `index`, from which the seeds of an evaluation come."""
    return prompts.add_column("index", list(range(len(prompts))))


class Prompts(NamedTuple):
    """Tokenized prompts, numbered."""

    train: Dataset
    evaluation: Dataset | None = None
    guard: Dataset | None = None  # held out for the guard; None: no guard


def read_prompts(
    data_args: DataArguments,
    args: PPOArguments,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Sequence[SavedAdapter] = (),
    functions: Sequence[RewardFunction] = (),
) -> Prompts:
    """Prompts for training, evaluation and guard, with the columns that the functions get.

    adapters: what the run starts from, whose own training prompts are no good for the guard.  Raises InputError where there
    are too few for an iteration.
    """
    longest = longest_prompt(args)
    train_rows, eval_rows = train_and_eval_rows(data_args, DEFAULT_PREFERENCES, all_columns=bool(functions))
    check_evaluation(args, eval_rows is not None)

    def tokenized(rows: Rows, split: str) -> Dataset:
        carried = carried_columns(functions, rows.column_names)
        return tokenize_prompts(rows, template, tokenizer, longest, carried, split)

    train = tokenized(train_rows, "training")
    evaluation = eval_rows and number_rows(tokenized(eval_rows, HELD_OUT))
    needed = args.per_device_train_batch_size * args.world_size
    guard = None
    if args.guard != "off":
        seen = {adapter.path: read_seen_prompts(adapter) for adapter in adapters}
        if evaluation is not None:
            guard = evaluation.select(range(min(args.guard_prompts, len(evaluation))))
        else:
            count = len(train)
            train, guard = split_guard_prompts(train, args.guard_prompts, needed, new_prompts(train, seen))
            guard = number_rows(guard)
            of_these = f"held out, {len(train)} are left" if len(train) < count else "taken without holding them out"
            say(f"guard: of the {count} training prompts {len(guard)} are {of_these}")
        warn_of_seen_prompts(guard, seen)
    if len(train) < needed:
        raise InputError(
            f"{len(train)} prompts are fewer than the {needed} of one iteration (--batch_size in each process, by "
            "--replies_per_prompt); give more prompts or a smaller batch"
        )
    return Prompts(number_rows(train), evaluation, guard)


def read_ready_made(args: PPOArguments, template: str) -> ReadyMade | None:
    """The --reward_model, still without weights.  template: of the run.  Raises InputError for what cannot be one."""
    if args.reward_model is None:
        return None
    device = args.device
    if args.reward_device is not None:
        try:
            probe = torch.zeros(1, device=args.reward_device)
            device, _ = probe.device, float(probe)  # "meta" has no numbers
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
            raise InputError(f"--reward_device {args.reward_device} cannot be used: {one_line(error)}") from error
    model_args = ModelArguments(args.reward_model, template, args.reward_dtype, args.reward_load_in_4bit)
    return ReadyMade(model_args, args.mini_batch_size, device)


def read_functions(
    args: PPOArguments, ready_made: ReadyMade | None = None
) -> tuple[list[RewardFunction], RewardFunction | None]:
    """What judges beside the reward adapter (ready-made model, server, functions), and gold.

    Raises InputError where nothing would give a score.
    """
    functions = [] if args.reward_function is None else load_functions("--reward_function", args.reward_function)
    ours = [] if ready_made is None else [ready_made.as_function()]
    if args.reward_server is not None:
        ours.append(RewardServer(args.reward_server).as_function())
    for function in functions:
        if function.name in [each.name for each in ours]:
            function.name = function.where
    functions = [*ours, *functions]
    if not functions and args.reward_model_lora_path is None:
        raise InputError(
            "nothing says what a good reply is; add --reward_model_lora_path FOLDER, --reward_function MODULE:NAME, "
            "--reward_model NAME, --reward_server URL or several of them"
        )
    if args.values_from == "adapter" and args.reward_model_lora_path is None:
        raise InputError(
            "--critic adapter starts as the reward adapter, and there is none; give --reward_model_lora_path, or --critic "
            "head"
        )
    part_weights(
        args.reward_weights, [function.name for function in functions], args.reward_model_lora_path is not None
    )
    return functions, None if args.gold_function is None else load_function("--gold_function", args.gold_function)


def build_trainer(
    args: PPOArguments,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: tuple[int, ...],
    sft: SavedAdapter,
    reward: SavedAdapter | None,
    prompts: Prompts,
    statistics: ScoreStatistics,
    gold: RewardFunction | None = None,
    record: dict[str, Any] | None = None,
    functions: Sequence[RewardFunction] = (),
) -> PPOTrainer:
    """The learner with everything around it, ready to train.  Changes `base`, which gets adapters and heads.

    stop_ids: of `stop_token_ids`; statistics: of the reward model's scores; gold: what is only measured; record: content of
    run.json; functions: parts of the score.
    """
    weights = part_weights(args.reward_weights, [function.name for function in functions], reward is not None)
    rules = ScoreRules(
        statistics={name: statistics for name in weights if name == REWARD_MODEL or not args.normalize_scores},
        weights=weights,
        baseline=args.reward_baseline,
        missing_eos_penalty=args.missing_eos_penalty,
        clip=args.score_clip,
        floor_broken=args.floor_broken_replies,
    )
    sampling = Sampling(
        stop_token_ids=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=args.output_max_length,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
        begin_suppress_tokens=first_token_ban(args.begin_suppress_tokens, tokenizer, stop_ids),
    )
    model = assemble_ppo_model(base, sft, reward, args.values_from == "adapter", args.values_from is not None)
    if args.values_from == "adapter":
        start_critic(model, *statistics)
    if args.activation_checkpointing:
        model.enable_input_require_grads()  # a frozen embedding gives checkpointed layers nothing to differentiate
    check_output_logits(model)
    trainer = PPOTrainer(
        model=model,
        args=args,
        train_dataset=prompts.train,
        eval_dataset=prompts.evaluation,
        processing_class=tokenizer,
        callbacks=[RunFiles(record or {}, prompts.train, key="iteration")],
        sampling=sampling,
        rules=rules,
        functions=functions,
        guard_dataset=prompts.guard,
        gold=gold,
        record=record,
    )
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    trainer.add_callback(IterationLines())
    use_grouped_names(trainer)
    return trainer


def main() -> None:
    # ---- Arguments ----
    model_args, data_args, training_args, plan_args = parse_arguments(
        (ModelArguments, DataArguments, PPOArguments, PlanArguments),
        description="Stage 3: PPO with adapters on one base.",
    )
    dtype, checkpoint = start_stage("ppo", model_args, training_args, plan_args.plan)
    sft = read_adapter(training_args.sft_model_lora_path, "--sft_model_lora_path")
    check_kind(sft, "--sft_model_lora_path", needs_score_head=False)
    ready_made = read_ready_made(training_args, model_args.prompt_template)
    functions, gold = read_functions(training_args, ready_made)
    reward = None
    if training_args.reward_model_lora_path is not None:
        reward = read_adapter(training_args.reward_model_lora_path, "--reward_model_lora_path")
        check_kind(reward, "--reward_model_lora_path", needs_score_head=True)
    longest_prompt(training_args)
    announce(
        lambda: ppo_plan(model_args, training_args, sft, reward, dtype, ready_made),
        model_args,
        training_args,
        plan_args.plan,
    )
    if plan_args.plan:
        return

    # ---- Tokenizer and data ----
    tokenizer = load_tokenizer(model_args)
    template = model_args.prompt_template
    check_template(template, tokenizer)
    day = settle_date(tokenizer, template, data_args.prompt_date, checkpoint, sft, reward)
    first_token_ban(training_args.begin_suppress_tokens, tokenizer, ())  # before anything large is read
    adapters = {"sft_model_lora_path": sft} | ({} if reward is None else {"reward_model_lora_path": reward})
    judges = [*functions, *([] if gold is None else [gold])]
    prompts = read_prompts(data_args, training_args, template, tokenizer, list(adapters.values()), judges)
    if ready_made is not None:
        if ready_made.writes_date:
            day = settle_date(ready_made.tokenizer, "chat", day or data_args.prompt_date, checkpoint)
        for rows in prompts:
            ready_made.check_prompts([] if rows is None else rows["turns"])
        ready_made.load()
        ready_made.check_card(training_args.reward_card, training_args.allow_weak_reward)
    for function in judges:
        try_function(function, prompts.train[0], tokenizer.eos_token_id)

    # ---- Model ----
    base = load_base(model_args, dtype, training_args.device)
    check_tokenizer(base, tokenizer)
    queries = [ids for rows in prompts if rows is not None for ids in rows["input_ids"]]
    longest = max(map(len, queries)) + training_args.output_max_length
    check_lengths(base, longest, "the longest prompt with its reply", "--max_length or --output_max_length")
    check_adapter(sft, "--sft_model_lora_path", False, template, base)
    if reward is not None:
        check_adapter(reward, "--reward_model_lora_path", True, template, base)
    if sft.frozen_parts:
        say(
            f"note: {sft.path} has its own {', '.join(sft.frozen_parts)}; the policy keeps them, PPO trains LoRA weights"
        )
    stop_ids = stop_token_ids(tokenizer, template, base.generation_config)
    for adapter in filter(None, (sft, reward)):
        check_reply_end(adapter.path, adapter.run, stop_ids, tokenizer)
    statistics = ScoreStatistics()
    if reward is not None:
        of_card = read_statistics(reward, training_args.allow_weak_reward)
        statistics = of_card if training_args.normalize_scores else statistics

    # ---- Training ----
    same = {**identity(training_args, prompts.train, adapters), "prompt_date": day, "stop_token_ids": stop_ids}
    if ready_made is not None:
        same["adapters"]["reward_model"] = ready_made.fingerprint()
    if training_args.reward_server is not None:
        same["adapters"]["reward_server"] = "out of sight"
    record = run_record("ppo", base, model_args, training_args, data=asdict(data_args), **same)
    check_same_run(record, checkpoint, model_args, data_args, training_args)
    trainer = build_trainer(
        training_args, base, tokenizer, stop_ids, sft, reward, prompts, statistics, gold, record, functions
    )
    trainer.train(resume_from_checkpoint=checkpoint)

    # ---- Save ----
    trainer.save_model()
    if trainer.is_world_process_zero():
        measured = {"score_statistics": trainer.score_rules.statistics} if functions else {}
        write_json({**record, **measured, **trainer.watch.outcome()}, training_args.output_dir, "run.json")
        draw_curves(training_args.output_dir)
    say(trainer.watch.what_to_take())


if __name__ == "__main__":
    run_script(main)
