"""What an iteration collects: responses with their texts, log-probs, values, scores, and what they are measured by.

Shapes: B responses, T response tokens; masks bool [B, T], True on real tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments

from corpus.chat_template import reply_text
from lora.adapters import CRITIC, REFERENCE, use_adapter
from rewards.broken_replies import empty_share, find_broken
from rewards.guard import measure_responses
from rewards.reward_functions import Notes, Replies, RewardFunction
from rewards.reward_model import reward_scores
from rewards.scores import REWARD_MODEL, ScoreRules, normalize_scores, standardize, weighted_sum
from rollout.batch import Batch, make_batch, pass_limits
from rollout.distribution import Sampling
from rollout.logprobs import logprobs_fn, values_fn
from rollout.sampler import Generated, generate_responses, seed_of
from utils import ppo
from utils.batching import split_by_length
from utils.console import RunError, say

# What may be NaN or infinite in a batch of responses, and what to do about it.
OF_POLICY = (
    "lower --learning_rate or raise --init_kl_coef and go on from an earlier checkpoint, or compute in float32 (--bf16 "
    "false --dtype float32)"
)
OF_ADAPTER = "check that adapter, or compute in float32 (--bf16 false --dtype float32)"
FEW_END = 0.1  # share of the SFT model's responses that end, below which something is wrong with it or with the limit


class Experience(NamedTuple):
    """A batch of responses with all that PPO, guard and log need; on every process the whole of it, all processes' rows."""

    batch: Batch
    prompts: list[str]  # B texts
    responses: list[str]  # B texts, without special tokens
    faults: list[str | None]  # B results of `find_broken`
    logprobs: Tensor  # float32 [B, T], of the policy that sampled
    ref_logprobs: Tensor  # float32 [B, T]
    kl: Tensor  # float32 [B, T], k1: the difference of the two, 0 on padding
    values: Tensor | None  # float32 [B, T]; None without a critic
    entropy: Tensor  # float32 [B, T]
    parts: dict[str, Tensor]  # float32 [B] each, from reward model and functions; NaN: a function does not apply
    scores: Tensor  # float32 [B], their weighted sum, as they are
    normalized_scores: Tensor  # float32 [B], what is learned from: see `normalize_scores`
    ended: Tensor  # bool [B], whether the response ends with a stop token
    gold: Tensor | None  # float32 [B], of --gold_function, where there is one
    noted: list[dict[str, Any]]  # B rows of what functions gave to log_extra
    metrics: dict[str, float]  # means of what they gave to log_metric

    @property
    def mask(self) -> Tensor:
        """Real response tokens, bool [B, T]."""
        return self.batch.response_mask

    @property
    def has_functions(self) -> bool:
        """Whether the score is more than the reward model's."""
        return list(self.parts) != [REWARD_MODEL]

    @property
    def response_kl(self) -> Tensor:
        """KL to the reference in nats a response, [B]."""
        return self.kl.sum(1)

    def rows(self, index: Tensor) -> "Experience":
        """The rows `index`, with the padding cut to the longest of them."""
        batch = self.batch.rows(index)
        width = batch.response_mask.shape[1]
        chosen = index.tolist()

        def cut(part: Any) -> Any:
            if isinstance(part, list):
                return [part[row] for row in chosen]
            if isinstance(part, dict):
                return {name: cut(each) for name, each in part.items()}
            if not isinstance(part, Tensor):
                return part
            return part[index, :width] if part.dim() == 2 else part[index]

        return Experience(batch, **{name: cut(part) for name, part in self._asdict().items() if name != "batch"})

    def samples(self, iteration: int) -> list[dict[str, Any]]:
        """Rows of samples.jsonl."""
        columns = {
            "prompt": self.prompts,
            "response": self.responses,
            "score": self.scores.tolist(),
            "kl": self.response_kl.tolist(),
            "length": self.mask.sum(1).tolist(),
            "ended": self.ended.tolist(),
        }
        if self.has_functions:
            columns |= {
                f"{name} score": [None if math.isnan(score) else score for score in scores.tolist()]
                for name, scores in self.parts.items()
            }
        if self.gold is not None:
            columns["gold"] = self.gold.tolist()
        if any(self.noted):
            columns["noted"] = self.noted
        columns["response_ids"] = self.batch.responses()  # which not every text gives back
        rows = zip(*columns.values(), strict=True)
        return [{"iteration": iteration, **dict(zip(columns, row, strict=True))} for row in rows]

    def nonfinite(self) -> "Nonfinite | None":
        """The first quantity with NaN or infinity in it, None where all is well; `rows` are those of any quantity."""
        parts = [
            ("the policy's log-probs", OF_POLICY, self.logprobs),
            *([] if self.values is None else [("the values", OF_POLICY, self.values)]),
            ("the SFT model's log-probs", OF_ADAPTER, self.ref_logprobs),
            ("the reward model's scores", OF_ADAPTER, self.scores[:, None]),
        ]
        found = [Nonfinite(name, advice, ~part.isfinite().all(1)) for name, advice, part in parts]
        found = [one for one in found if one.rows.any()]
        return found[0]._replace(rows=torch.stack([one.rows for one in found]).any(0)) if found else None

    def texts(self, index: Tensor) -> list[tuple[str, str]]:
        """Prompt and response of some rows."""
        return [(self.prompts[row], self.responses[row]) for row in index.tolist()]


class Nonfinite(NamedTuple):
    """A quantity with NaN or infinity in it, what to do about it, and the rows with any such quantity, bool [B]."""

    quantity: str
    advice: str
    rows: Tensor


class Collector:
    """Samples responses and judges them, each thing once: texts, faults, log-probs, values, scores, gold."""

    def __init__(
        self,
        accelerator: Accelerator,
        args: TrainingArguments,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        score_rules: ScoreRules,
        functions: Sequence[RewardFunction],
        gold: RewardFunction | None,
        trainer_state: Callable[[], TrainerState],
    ) -> None:
        """args: PPOArguments; model: from `assemble_ppo_model`, not yet wrapped; functions: parts of the score; gold: only
        measured; trainer_state: for functions that ask how far the run is."""
        self.accelerator = accelerator
        self.args = args
        self.device = args.device
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.score_rules = score_rules
        self.functions = functions
        self.gold = gold
        self.trainer_state = trainer_state
        self.has_reward_model = REWARD_MODEL in score_rules.weights
        self.head_values = args.values_from == "head"
        self.has_critic = args.values_from == "adapter"
        base = model.get_base_model()
        # Where the update computes as the sampler does, its log-probs and values are those of the sampler, to rounding.
        self.same_arithmetic = base.dtype == torch.float32 and not (args.bf16 or args.fp16)
        # Sharded weights are collected for each pass, so every process has to make the same number of them.
        sharded = accelerator.distributed_type in ("FSDP", "DEEPSPEED")
        self.pass_limits = None if sharded else pass_limits(base, args.device)

    @torch.no_grad()
    def collect(self, model: nn.Module, rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> Experience:
        """A response for each of `seeds` to this process's `rows` (of `tokenize_prompts`), and what all processes have.

        Several to a row are neighbours.
        """
        was_training = model.training
        model.eval()
        unwrapped = self.accelerator.unwrap_model(model)
        queries = [row["input_ids"] for row in rows]
        replies = self.generate(unwrapped, queries, seeds)
        rows = [row for row in rows for _ in range(len(seeds) // len(rows))]
        queries = [row["input_ids"] for row in rows]
        sampled_from_nothing = ~replies.statistics.logprobs.isfinite().all(1)
        model.train(was_training)
        batch = Batch(*(part.to(self.device) for part in make_batch(queries, replies.ids, self.sampling.pad_token_id)))
        logprobs, values, entropy = replies.statistics
        if self.has_critic:
            values = torch.zeros_like(logprobs)
        ref_logprobs = torch.zeros_like(logprobs)
        scores = torch.zeros(len(queries), device=self.device)
        for index in self.micro_batches(batch, torch.arange(len(queries), device=self.device)):
            part = batch.rows(index)
            width = part.response_mask.shape[1]
            inputs = {"input_ids": part.input_ids, "attention_mask": part.attention_mask}
            if not self.same_arithmetic:  # the update must start at a ratio of 1
                policy = model(**inputs, hidden_state_fn=logprobs_fn(part, self.sampling, self.head_values))
                logprobs[index, :width], entropy[index, :width] = policy.logprobs.float(), policy.entropy.float()
                if self.head_values:
                    values[index, :width] = policy.values.float()
            if self.has_critic:
                values[index, :width] = self.critic_values(model, part)
            with use_adapter(unwrapped, REFERENCE):
                reference = model(**inputs, hidden_state_fn=logprobs_fn(part, self.sampling, with_values=False))
            ref_logprobs[index, :width] = reference.logprobs.float()
            if self.has_reward_model:
                scores[index] = reward_scores(model, inputs)
        logprobs[sampled_from_nothing] = torch.nan
        prompts = [row["prompt"] for row in rows]
        responses = [reply_text(ids, self.tokenizer, self.sampling.stop_token_ids) for ids in replies.ids]
        parts = {REWARD_MODEL: scores} if self.has_reward_model else {}
        notes = Notes([{} for _ in rows])
        texts = Replies(rows, responses, replies.ids)
        parts |= {function.name: self.judge(function, texts, notes) for function in self.functions}
        gold = None if self.gold is None else self.judge(self.gold, texts, notes)
        faults = [find_broken(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        tokens = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "entropy": entropy}
        return self.gather(batch, list(zip(prompts, responses, faults, strict=True)), tokens, parts, gold, notes)

    def judge(self, function: RewardFunction, replies: Replies, notes: Notes) -> Tensor:
        """The function's number for each of this process's replies, float32 [B]; NaN where it does not apply."""
        numbers = function.judge(replies, self.trainer_state(), notes)
        return torch.tensor([math.nan if number is None else number for number in numbers], device=self.device)

    def generate(self, model: PeftModel, queries: Sequence[Sequence[int]], seeds: Sequence[int]) -> Generated:
        """A response for each seed, with what the policy said of it."""
        return generate_responses(model, queries, seeds, self.sampling, with_values=self.head_values)

    def gather(
        self,
        batch: Batch,
        texts: list[tuple[str, str, str | None]],
        tokens: dict[str, Tensor | None],
        parts: dict[str, Tensor],
        gold: Tensor | None,
        notes: Notes,
    ) -> Experience:
        """The rows of all processes, in the order of the processes, padded alike, with what follows from all of them.

        texts: prompt, response and fault of each row of this process; tokens: tensors [B, T] of `Experience` by name.
        """

        def together(part: Tensor | None, pad: int = 0) -> Tensor | None:
            if self.args.world_size == 1 or part is None:
                return part
            if part.dim() == 2:
                part = self.accelerator.pad_across_processes(part, dim=1, pad_index=pad)
            return self.accelerator.gather(part.contiguous())

        batch = Batch(
            input_ids=together(batch.input_ids, self.sampling.pad_token_id),
            attention_mask=together(batch.attention_mask),
            query_lengths=together(batch.query_lengths),
            response_mask=together(batch.response_mask.int()).bool(),
        )
        noted, metrics = notes.extra, [notes.metrics]
        if self.args.world_size > 1:
            texts, noted, metrics = gather_object(texts), gather_object(noted), gather_object(metrics)
        prompts, responses, faults = map(list, zip(*texts, strict=True))
        tokens = {name: together(part) for name, part in tokens.items()}
        parts = {name: together(part) for name, part in parts.items()}
        ended = response_ends(batch, self.sampling.stop_token_ids)
        broken = torch.tensor([fault is not None for fault in faults], device=self.device)
        kl = ppo.kl_penalty(tokens["logprobs"], tokens["ref_logprobs"], "k1")
        return Experience(
            batch,
            prompts,
            responses,
            faults,
            kl=kl.masked_fill(~batch.response_mask, 0.0),
            parts=parts,
            scores=weighted_sum(parts, self.score_rules.weights),
            normalized_scores=normalize_scores(parts, broken, ended, self.score_rules),
            ended=ended,
            gold=together(gold),
            noted=noted,
            metrics=mean_metrics(metrics),
            **tokens,
        )

    def respond_to_all(
        self,
        model: nn.Module,
        dataset: Dataset,
        iteration: int,
        note: Callable[[str, list[tuple[str, str]], int], None],
    ) -> Iterator[Experience]:
        """Experience of all prompts of a data set, in evaluation batches, with seeds by prompt.

        Drops the remainder that does not divide by the number of processes.  Rows with numbers that are not finite are
        left out and given to `note`; raises RunError when there are no others.  iteration: after which one this is.
        """
        quantity, whole = None, 0
        count, size = len(dataset), self.args.per_device_eval_batch_size
        share = range(self.args.process_index, count - count % self.args.world_size, self.args.world_size)
        for start in range(0, len(share), size):
            rows = [dataset[row] for row in share[start : start + size]]
            experience = self.collect(model, rows, [seed_of(self.args.seed, row["index"], 0, 2) for row in rows])
            found = experience.nonfinite()
            if found is not None:
                quantity = found.quantity
                note(quantity, experience.texts(found.rows.nonzero().squeeze(1)), iteration)
                if found.rows.all():
                    continue
                experience = experience.rows((~found.rows).nonzero().squeeze(1))
            whole += len(experience.scores)
            yield experience
        if quantity and not whole:
            raise RunError(
                f"stopped after iteration {iteration}: NaN or infinity in {quantity} for every held-out prompt; check base "
                "and adapters, or compute in float32 (--bf16 false --dtype float32)"
            )

    def micro_batches(self, batch: Batch, rows: Tensor) -> list[Tensor]:
        """`rows` of the batch in parts that go through the model together: at most --mini_batch_size, of similar length."""
        if self.pass_limits is None:
            return list(rows.split(self.args.mini_batch_size))
        overhead, most_tokens = self.pass_limits
        lengths = batch.attention_mask[rows].sum(1).tolist()
        return [rows[part] for part in split_by_length(lengths, overhead, self.args.mini_batch_size, most_tokens)]

    def critic_values(self, model: nn.Module, batch: Batch) -> Tensor:
        """Values [B, T] from the critic's own adapter."""
        with use_adapter(self.accelerator.unwrap_model(model), CRITIC):
            return model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, hidden_state_fn=values_fn(batch)
            )


def mean_metrics(noted: Iterable[dict[str, list[float]]]) -> dict[str, float]:
    """Mean of all that was given to log_metric under a name, by any process."""
    values: dict[str, list[float]] = {}
    for metrics in noted:
        for name, each in metrics.items():
            values.setdefault(name, []).extend(each)
    return {name: sum(each) / len(each) for name, each in values.items()}


def response_ends(batch: Batch, stop_ids: Sequence[int]) -> Tensor:
    """Which responses end with a stop token, bool [B].  Only the response is asked: a prompt may hold one too."""
    last = batch.query_lengths + batch.response_mask.sum(1) - 1
    last_tokens = batch.input_ids.gather(1, last[:, None]).squeeze(1)
    return torch.isin(last_tokens, torch.tensor(stop_ids, device=last_tokens.device))


def warn_where_few_end(experience: Experience, sampling: Sampling, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say so where hardly any response of the SFT model ends: every score is then one of a text that was cut."""
    ended, count = int(experience.ended.sum()), len(experience.ended)
    if ended < FEW_END * count:
        stops = ", ".join(map(str, tokenizer.convert_ids_to_tokens(list(sampling.stop_token_ids))))
        say(
            f"warning: {ended} of the SFT model's first {count} responses end (a response ends with {stops}), the others "
            f"were cut at --output_max_length {sampling.max_new_tokens} and are scored as they are; raise it, or train the "
            "SFT model on whole replies, with the --prompt_template of this run"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def describe(experience: Experience) -> dict[str, float]:
    """Measures of a batch of responses, over responses or over real tokens, never over padding."""
    mask = experience.mask
    lengths = mask.sum(1).float()
    k3 = ppo.kl_penalty(experience.logprobs, experience.ref_logprobs, "k3").masked_fill(~mask, 0.0)
    return {
        "score_mean": float(experience.scores.mean()),
        "score_std": float(experience.scores.std(unbiased=False)),
        "normalized_score_mean": float(experience.normalized_scores.mean()),
        **experience.metrics,
        **({} if experience.gold is None else {"gold_mean": float(experience.gold.mean())}),
        "kl": float(experience.response_kl.mean()),
        "kl_k3": float(k3.sum(1).mean()),
        "kl_max": float(experience.response_kl.abs().max()),
        "response_length": float(lengths.mean()),
        "response_length_std": float(lengths.std(unbiased=False)),
        "empty_fraction": empty_share(experience.faults),
        "ended_fraction": float(experience.ended.float().mean()),
        "entropy": float(ppo.masked_mean(experience.entropy, mask)),
    }


def describe_functions(batches: Sequence[Experience]) -> dict[str, float]:
    """What each part of the score is over several batches, where there is another than the reward model.

    Of a part that applies to no response at all there is only the share of those.
    """
    if not batches[0].has_functions:
        return {}
    measures = {}
    for name in batches[0].parts:
        scores = torch.cat([batch.parts[name] for batch in batches])
        found = scores[~scores.isnan()]
        if len(found):
            measures |= {f"reward/{name}/mean": float(found.mean())}
            measures |= {f"reward/{name}/std": float(found.std(unbiased=False))}
        measures[f"reward/{name}/none"] = 1 - len(found) / len(scores)
    return measures


def describe_all(batches: Sequence[Experience]) -> dict[str, float]:
    """Means of `describe` over all responses of several batches, with `describe_functions`."""
    sums: dict[str, float] = {}
    count = sum(len(batch.scores) for batch in batches)
    for batch in batches:
        for name, value in describe(batch).items():
            sums[name] = sums.get(name, 0.0) + value * len(batch.scores) / count
    return sums | describe_functions(batches)


def measure_for_guard(parts: Sequence[Experience], rules: ScoreRules) -> dict[str, float]:
    """What the guard looks at, over several batches of responses."""
    texts = [text for part in parts for text in zip(part.prompts, part.responses, part.faults, strict=True)]
    lengths = [length for part in parts for length in part.mask.sum(1).tolist()]
    farthest = [scores.abs() for part in parts for scores in standardize(part.parts, rules).values()]
    return {
        **measure_responses(*zip(*texts, strict=True), lengths),
        "kl": float(torch.cat([part.response_kl for part in parts]).mean()),
        "score": float(torch.cat([part.normalized_scores for part in parts]).mean()),
        "extreme": float(torch.cat(farthest).nan_to_num(0.0).max()),
    }
