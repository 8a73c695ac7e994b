"""Stage 2: learn which of two replies people prefer, as a LoRA adapter with a score head.

    python reward_modeling.py --config configs/reward_demo.yaml
    CUDA_VISIBLE_DEVICES=0,1,2 python reward_modeling.py --model_name MODEL --lora_target_models W_pack ...

The loss is -log sigmoid(chosen - rejected) (Bradley-Terry; Ouyang et al. 2022, eq. 1), plus a small term that keeps the
scores around 0 (Eisenstein et al. 2023, eq. 2).  The score is read at the last real token, found by the attention mask;
that token is what ends a reply (see `reply_end_id`) unless the pair was cut.

People's pairs hold no empty, cut or looping replies, so a model trained on them alone may score those high, and PPO would
exploit it.  Therefore a share of the training pairs (--degenerate_ratio) has a broken reply as the rejected one
(rewards/broken_replies.py), and the finished model is probed with broken replies to held-out prompts.  The results are in
reward_card.json: stage 3 takes the mean and the standard deviation of the scores from it, and refuses a model that failed.
"""

import utils.quiet  # isort: skip  # noqa: F401 - before any library

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from corpus.chat_template import check_reply_end, reply_end_id, stop_token_ids
from corpus.files import Rows, train_and_eval_rows
from corpus.tokens import HELD_OUT, Preferences, Source, check_template, tokenize_preferences
from lora.adapters import (
    SCORE_KEY,
    SavedAdapter,
    check_adapter,
    complete,
    is_of,
    load_adapter,
    read_adapter,
    saved_key,
    use_adapter,
)
from lora.base_model import check_lengths, check_tokenizer, load_base, load_tokenizer
from lora.sharding import check_state_dict, is_sharded, whole_parameters
from reporting.plots import draw_card
from reporting.trackers import show_card
from rewards.broken_replies import KINDS, TRAIN_WEIGHT, broken_pairs
from rewards.ready_made import ReadyMade
from rewards.reward_card import (
    CARD_FILE,
    card_table,
    hardly_learned,
    in_short,
    make_card,
    pair_measures,
    pairs_table,
    probe,
)
from rewards.reward_model import ensemble_score, member_folders, member_scores, new_reward_model
from rollout.distribution import check_output_logits, default_sampling
from rollout.sampler import generate_ids
from runs.memory_plan import announce, reward_plan
from runs.resume import check_same_run, identity, settle_date
from runs.run_files import RunFiles, run_record
from runs.start import start_stage
from runs.trainer import ResumableArguments, ResumableTrainer
from utils.arguments import (
    DEFAULT_PREFERENCES,
    DataArguments,
    LoraArguments,
    ModelArguments,
    PlanArguments,
    check_batches,
    check_numbers,
    default_autocast,
    parse_arguments,
    set_up_ddp,
)
from utils.batching import pad_right, part_size
from utils.console import InputError, is_main_process, run_script, say
from utils.files import write_json
from utils.offered import EVERY_STAGE, FIRST_STAGES


@dataclass
class RewardModelArguments(ModelArguments):
    """The base, or with --card_only a ready-made reward model in its place."""

    reward_model: str | None = field(
        default=None,
        metadata={"help": "With --card_only: a ready-made reward model, a hub name or a folder, as stage 3 takes it."},
    )
    card_only: bool = field(
        default=False, metadata={"help": "Train nothing: measure the --reward_model, and write its reward card."}
    )

    def __post_init__(self) -> None:
        if self.card_only != (self.reward_model is not None):
            raise InputError(
                "--card_only true and --reward_model NAME go together: a ready-made model is measured, and nothing trained; "
                "give both or neither"
            )
        if self.card_only and self.model_name_or_path is not None:
            raise InputError(
                f"--card_only measures the --reward_model {self.reward_model}, and needs no base; leave out "
                "--model_name_or_path"
            )
        self.model_name_or_path = self.reward_model or self.model_name_or_path
        super().__post_init__()


@dataclass
class RewardDataArguments(DataArguments):
    """Preference pairs, and how many of them."""

    eval_fraction: float = field(
        default=0.1,
        metadata={"help": "Without --eval_dataset: hold out this share of the prompts with all their pairs."},
    )
    train_subset: int = field(default=-1, metadata={"help": "Train on the first so many rows of the data; -1: on all."})
    eval_subset: int = field(default=-1, metadata={"help": "Evaluate on the first so many held-out rows; -1: on all."})
    max_length: int = field(default=1024, metadata={"help": "Longest prompt + reply, in tokens."})
    overlong_pairs: str = field(
        default="drop",
        metadata={
            "help": "Pairs with a side above --max_length: drop them, or cut both replies to the same length.",
            "choices": ["drop", "cut"],
        },
    )
    degenerate_ratio: float = field(
        default=0.25,
        metadata={"help": "Share of the training pairs whose rejected reply is a broken one; 0: none."},
    )
    degenerate_kinds: str = field(
        default="all",
        metadata={"help": f"Broken replies to train on: all, or kinds joined by commas out of {', '.join(KINDS)}."},
    )
    exempt_probes: str = field(
        default="",
        metadata={"help": "Kinds, joined by commas, that are probed but do not decide whether the model passes."},
    )
    probe_prompts: int = field(
        default=200,
        metadata={"help": "Held-out prompts for each kind of broken reply, and for SFT replies, in the card."},
    )
    sft_model_lora_path: str | None = field(
        default=None, metadata={"help": "SFT adapter: the card then also says how its replies score."}
    )
    output_max_length: int = field(default=128, metadata={"help": "Longest sampled SFT reply, in tokens."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.degenerate_ratio < 1:
            raise InputError(
                f"--degenerate_ratio is {self.degenerate_ratio}; give a share from 0 up to, not including, 1"
            )
        self.kinds = KINDS if self.degenerate_kinds == "all" else split_kinds("degenerate_kinds", self.degenerate_kinds)
        self.exempt = split_kinds("exempt_probes", self.exempt_probes)
        check_numbers(self, above_0="max_length probe_prompts output_max_length")
        for name in ("train_subset", "eval_subset"):
            if getattr(self, name) < -1 or getattr(self, name) == 0:
                raise InputError(f"--{name} is {getattr(self, name)}; give a number of pairs, or -1 for all")


def split_kinds(argument: str, names: str) -> tuple[str, ...]:
    """Kinds of broken replies, given as names joined by commas.  Raises InputError for an unknown one."""
    kinds = tuple(name.strip() for name in names.split(",") if name.strip())
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InputError(f"--{argument}: {unknown[0]!r} is no kind; there are {', '.join(KINDS)}")
    return kinds


@dataclass
class RewardArguments(ResumableArguments, TrainingArguments):
    """The Trainer's arguments with this toolkit's defaults."""

    offered = f"{EVERY_STAGE} {FIRST_STAGES}"
    eval_metrics = "loss accuracy accuracy_low margin"

    output_dir: str | None = field(default="output/reward", metadata={"help": "Folder for everything that is written."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Passes over the data; more than one soon overfits."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of metrics.jsonl."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(default=200, metadata={"help": "Steps between two evaluations."})
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 autocast; by default on a GPU that has it."})
    center_rewards_coefficient: float = field(
        default=0.01, metadata={"help": "Weight of mean((chosen + rejected)^2), which keeps the scores around 0."}
    )
    length_penalty_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the squared correlation of score and reply length in a batch."}
    )
    init_from_sft: bool = field(
        default=False,
        metadata={
            "help": "Let the reward adapter start as that of --sft_model_lora_path, in its shape, with a new head."
        },
    )
    ensemble_size: int = field(
        default=1,
        metadata={
            "help": "Number of adapters, each with a head; a score is their mean minus a penalty for disagreement."
        },
    )
    ensemble_penalty: float = field(
        default=1.0, metadata={"help": "Penalty for disagreement, in standard deviations over the ensemble."}
    )

    def __post_init__(self) -> None:
        coefficients = "center_rewards_coefficient length_penalty_coefficient ensemble_penalty"
        check_numbers(self, above_0="ensemble_size", from_0=coefficients)
        if self.init_from_sft and self.ensemble_size > 1:
            raise InputError(
                f"an ensemble of {self.ensemble_size} that all start as the SFT adapter is one model; leave out "
                "--init_from_sft or --ensemble_size"
            )
        self.remove_unused_columns = False  # the collator reads them all
        default_autocast(self)
        set_up_ddp(self)
        super().__post_init__()


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def pairwise_loss(chosen: Tensor, rejected: Tensor, center_coefficient: float, margins: Tensor | float = 0.0) -> Tensor:
    """Bradley-Terry loss with centering, a scalar: mean of -log sigmoid(c - r - m) + coefficient * (c + r)^2.

    chosen, rejected: scores [B]; margins: how much better the chosen one has to be [B].  Sources: Ouyang et al. 2022
    (arXiv:2203.02155) eq. 1; Eisenstein et al. 2023 (arXiv:2312.09244) eq. 2; Touvron et al. 2023 (arXiv:2307.09288) eq. 2.
    """
    return (-logsigmoid(chosen - rejected - margins) + center_coefficient * (chosen + rejected) ** 2).mean()


def length_penalty(scores: Tensor, lengths: Tensor) -> Tensor:
    """Squared Pearson correlation of score and response length over a batch, a scalar; 0 where either does not vary.

    scores, lengths: float [N].
    """
    scores, lengths = scores - scores.mean(), lengths.float() - lengths.float().mean()
    return (scores * lengths).sum() ** 2 / (scores.square().sum() * lengths.square().sum()).clamp(min=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class RewardTrainer(ResumableTrainer):
    """Trainer for pairs: chosen and rejected go through the model in one batch, chosen first."""

    def __init__(self, *args: Any, members: list[str], **kwargs: Any) -> None:
        super().__init__(
            *args,
            data_collator=self.collate,
            compute_metrics=lambda found: pair_measures(found.predictions, found.label_ids),  # as of prediction_step
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: let the Trainer average micro-batches
        self.members = members

    def collate(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows of `tokenize_preferences` -> ids and mask [2B, L], chosen first; lengths [B, 2]; margins and broken [B].

        lengths are of the responses; broken: whether the rejected one was made by rewards/broken_replies.py.
        """
        sequences = [pair["chosen_ids"] for pair in pairs] + [pair["rejected_ids"] for pair in pairs]
        ids, mask = pad_right(sequences, self.processing_class.pad_token_id)
        lengths = [
            [len(pair[side]) - pair["query_length"] for side in ("chosen_ids", "rejected_ids")] for pair in pairs
        ]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "lengths": torch.tensor(lengths),
            "margins": torch.tensor([pair["margin"] for pair in pairs]),
            "broken": torch.tensor([pair["kind"] != "" for pair in pairs]),
        }

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        sequences = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        ordinary = ~inputs["broken"]
        losses, scores = [], []
        size = part_size(len(sequences["input_ids"]))
        for member in member_scores(model, sequences, self.members, size):  # [2B]
            chosen, rejected = member.chunk(2)
            loss = pairwise_loss(chosen, rejected, self.args.center_rewards_coefficient, inputs["margins"])
            if self.args.length_penalty_coefficient:  # a broken response is short or long for a reason
                pair = torch.stack([chosen, rejected], dim=1)[ordinary].flatten()
                penalty = length_penalty(pair, inputs["lengths"][ordinary].flatten())
                loss = loss + self.args.length_penalty_coefficient * penalty
            losses.append(loss)
            scores.append(member)
        loss = torch.stack(losses).mean()
        if not return_outputs:
            return loss
        return loss, torch.stack(ensemble_score(scores, self.args.ensemble_penalty).chunk(2), dim=1)

    def as_text(self, inputs: dict[str, Tensor]) -> list[tuple[str, str]]:
        parts = []
        lengths = inputs["lengths"].T.flatten().tolist()  # [2B], chosen first
        for ids, mask, length in zip(inputs["input_ids"], inputs["attention_mask"].bool(), lengths, strict=True):
            real = ids[mask].tolist()
            parts += [real[: len(real) - length], real[len(real) - length :]]
        texts = self.processing_class.batch_decode(parts, skip_special_tokens=True)
        return list(zip(texts[::2], texts[1::2], strict=True))

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, scores [B, 2] and, where the Trainer expects labels, response lengths [B, 2]."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        return loss, scores, inputs["lengths"]

    @torch.no_grad()
    def score(self, sequences: list[list[int]], description: str) -> np.ndarray:
        """Scores [N] of whole sequences, computed as in an evaluation.  Every process computes all of them."""
        self.model.eval()
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # little padding
        size = 2 * self.args.per_device_eval_batch_size
        scores = np.zeros(len(sequences))
        starts = range(0, len(order), size)
        for start in tqdm(starts, desc=description, disable=self.args.disable_tqdm or not is_main_process()):
            part = order[start : start + size]
            ids, mask = pad_right([sequences[i] for i in part], self.processing_class.pad_token_id)
            inputs = self._prepare_inputs({"input_ids": ids, "attention_mask": mask})
            with self.compute_loss_context_manager():
                members = list(member_scores(self.model, inputs, self.members))
            scores[part] = ensemble_score(members, self.args.ensemble_penalty).float().cpu().numpy()
        return scores


def check_saved_adapter(model: PeftModel, folder: str, batch: dict[str, Tensor], members: list[str]) -> float:
    """Load what was just saved a second time and compare scores; returns the largest difference.

    Score heads have been lost between training and use more than once in this field: this makes sure of ours.
    Raises RuntimeError when the scores differ.
    """
    model.eval()
    device = model.device
    inputs = {"input_ids": batch["input_ids"].to(device), "attention_mask": batch["attention_mask"].to(device)}
    difference = 0.0
    for member, path in zip(members, member_folders(folder), strict=True):
        saved = read_adapter(path, "--output_dir")
        if not saved.has_score_head:
            raise RuntimeError(f"the adapter in {path} was saved without its score head")
        load_adapter(model, saved, "reloaded")
        with torch.no_grad():
            ours, reloaded = member_scores(model, inputs, [member, "reloaded"])
        model.delete_adapter("reloaded")
        difference = max(difference, float((ours - reloaded).abs().max()))
        if difference > 1e-4 * max(1.0, float(ours.abs().max())):
            raise RuntimeError(f"the adapter in {path} gives other scores than the one it was saved from: {difference}")
    return difference


def check_saved_tensors(whole: dict[str, Tensor], folder: str, members: list[str]) -> float:
    """As `check_saved_adapter`, for a model that is spread over processes: one alone cannot score, so compare tensors.

    whole: the adapters' parameters by name, see lora/sharding.py.
    """
    difference = 0.0
    for member, path in zip(members, member_folders(folder), strict=True):
        saved = load_file(os.path.join(path, SAFETENSORS_WEIGHTS_NAME))
        ours = {saved_key(name, member): value for name, value in whole.items() if is_of(name, member)}
        if SCORE_KEY not in saved or saved.keys() != ours.keys():
            raise RuntimeError(f"the adapter in {path} was not saved whole: {sorted(saved.keys() ^ ours.keys())[:3]}")
        difference = max(difference, *(float((ours[key] - saved[key]).abs().max()) for key in ours))
    if difference > 1e-6:
        raise RuntimeError(f"the adapter in {folder} differs from the one it was saved from by {difference}")
    return difference


def check_saved(trainer: RewardTrainer) -> float:
    """The largest difference between the model and what was saved of it, measured by the first process: 0 in others.

    Every process has to call it.  Raises RuntimeError when they differ.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    folder, members = trainer.args.output_dir, trainer.members
    whole = None
    if is_sharded(model):
        whole = whole_parameters(model, lambda name: any(is_of(name, member) for member in members))
    if not trainer.is_world_process_zero():
        return 0.0
    if whole is not None:
        return check_saved_tensors(whole, folder, members)
    pairs = trainer.eval_dataset
    return check_saved_adapter(model, folder, trainer.collate(list(pairs.take(min(8, len(pairs))))), members)


# ---------------------------------------------------------------------------------------------------------------------
# Data and reward card
# ---------------------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """What stage 2 learns from and is measured on."""

    train: Dataset  # columns of `tokenize_preferences`; people's pairs first, then those with a broken response
    train_lengths: np.ndarray  # response tokens of people's training pairs, int [N, 2]
    evaluation: Dataset  # people's pairs
    probes: list[dict[str, Any]]  # held-out pairs with a broken response, from `broken_pairs`
    sources: Sequence[Source] = ()  # of the held-out pairs


def add_broken_pairs(
    preferences: Preferences, data: RewardDataArguments, tokenizer: PreTrainedTokenizerBase, end_id: int, seed: int
) -> Dataset:
    """The training pairs, and as many broken ones as make up the share `degenerate_ratio` of all."""
    ordinary = preferences.pairs
    wanted = len(ordinary) * data.degenerate_ratio / (1 - data.degenerate_ratio)
    if not wanted:
        return ordinary
    weights = {kind: TRAIN_WEIGHT.get(kind, 1) for kind in data.kinds}
    counts = {kind: math.ceil(wanted * weight / sum(weights.values())) for kind, weight in weights.items()}
    broken = broken_pairs(preferences.sources, counts, tokenizer, end_id, data.max_length, seed)
    say(f"training pairs with a broken reply: {len(broken)}, beside {len(ordinary)} ordinary ones")
    return concatenate_datasets([ordinary, Dataset.from_list(broken, features=ordinary.features)])


def response_lengths(pairs: Dataset) -> np.ndarray:
    """Tokens of the chosen and the rejected response of each pair, int [N, 2]."""
    sides = [np.array([len(ids) for ids in pairs[side]]) for side in ("chosen_ids", "rejected_ids")]
    return np.stack(sides, axis=1) - np.array(pairs["query_length"])[:, None]


def first_rows(rows: Rows, count: int) -> Rows:
    """The first `count` rows, all of them for -1."""
    return rows if count == -1 else rows.select(range(min(count, len(rows))))


def read_pairs(data: RewardDataArguments, template: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> Pairs:
    """The pairs for training, evaluation and the card.  Raises InputError when none are held out, or none is usable."""
    train_rows, eval_rows = train_and_eval_rows(data, DEFAULT_PREFERENCES)
    if eval_rows is None:
        raise InputError("a reward model needs held-out pairs; give --eval_dataset or an --eval_fraction above 0")
    limits = (template, tokenizer, data.max_length, data.overlong_pairs)
    ordinary = tokenize_preferences(first_rows(train_rows, data.train_subset), *limits)
    end_id = reply_end_id(tokenizer, template)
    train = add_broken_pairs(ordinary, data, tokenizer, end_id, seed)
    held_out = tokenize_preferences(first_rows(eval_rows, data.eval_subset), *limits, HELD_OUT)
    counts = dict.fromkeys(KINDS, data.probe_prompts)
    probes = broken_pairs(held_out.sources, counts, tokenizer, end_id, data.max_length, seed, held_out=True)
    return Pairs(train, response_lengths(ordinary.pairs), held_out.pairs, probes, held_out.sources)


def sample_sft_responses(
    trainer: RewardTrainer,
    sft: SavedAdapter,
    probes: list[dict[str, Any]],
    data: RewardDataArguments,
    stop_ids: tuple[int, ...],
) -> list[list[int]]:
    """Query + response of the SFT adapter, as token ids, for each query that leaves room for one; none is empty.

    The queries are those of the probes, at most `probe_prompts`.
    """
    queries = {tuple(pair["chosen_ids"][: pair["query_length"]]) for pair in probes}
    queries = [list(query) for query in sorted(queries)[: data.probe_prompts]]
    queries = [query for query in queries if len(query) + data.output_max_length <= data.max_length]
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    load_adapter(model, sft, "sft")
    model.eval()
    sampling = default_sampling(tokenizer, stop_ids, data.output_max_length)
    size = trainer.args.per_device_eval_batch_size
    responses: list[list[int]] = []
    with use_adapter(model, "sft"):
        for start in range(0, len(queries), size):
            batch = queries[start : start + size]
            responses += generate_ids(model, batch, range(start, start + len(batch)), sampling)
    model.delete_adapter("sft")
    return [query + response for query, response in zip(queries, responses, strict=True)]


def write_card(
    trainer: RewardTrainer,
    pairs: Pairs,
    sft: SavedAdapter | None,
    data: RewardDataArguments,
    lora_r: int,
    stop_ids: tuple[int, ...],
) -> None:
    """Measure the model that was trained and saved; the first process writes, draws and prints its reward card.

    sft: adapter whose responses are scored too; lora_r: the rank; stop_ids: of `stop_token_ids`, what ends those responses.
    """
    args = trainer.args
    prediction = trainer.predict(pairs.evaluation, metric_key_prefix="eval")
    trainer.log(prediction.metrics)
    sft_sequences = [] if sft is None else sample_sft_responses(trainer, sft, pairs.probes, data, stop_ids)
    probed, scores = probe(trainer.score, pairs.probes, sft_sequences)
    probed["reload_difference"] = check_saved(trainer)
    if not trainer.is_world_process_zero():
        return
    probed |= {"ensemble_size": args.ensemble_size, "ensemble_penalty": args.ensemble_penalty}
    evaluated = prediction.predictions, prediction.label_ids, pairs.train_lengths
    trained = (
        f"after {trainer.state.global_step} optimizer steps at learning rate {args.learning_rate:g}, rank {lora_r}"
    )
    card = make_card(prediction.metrics, *evaluated, probed, data.exempt, trained)
    keep_card(card, scores, prediction.predictions, args.output_dir)
    trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(args.output_dir)
    for callback in trainer.callback_handler.callbacks:
        show_card(callback, card, args.output_dir, trainer.state.global_step)
    # a model that has not learned fails most probes, and a wall of those would hide why
    say_card(card, short=hardly_learned(card) and not card["passed"])


def keep_card(card: dict[str, Any], scores: dict[str, np.ndarray], of_pairs: np.ndarray, folder: str) -> None:
    """Write and draw it.  scores: of `probe`; of_pairs: those of the held-out pairs, [N, 2]."""
    write_json(card, folder, CARD_FILE)
    draw_card(card, {**scores, "chosen": of_pairs[:, 0], "rejected": of_pairs[:, 1]}, folder)


def say_card(card: dict[str, Any], short: bool = False) -> None:
    """Print it with its verdict; short: without the probes."""
    say(pairs_table(card) if short else card_table(card))
    say("the reward model " + ("passed" if card["passed"] else "FAILED: " + in_short(card["failed"])))
    if card["not_shown"] and not short:
        say("too few prompts to tell, which fails nothing: " + in_short(card["not_shown"]))


def write_ready_made_card(model_args: RewardModelArguments, data: RewardDataArguments, args: RewardArguments) -> None:
    """Measure a ready-made reward model on held-out pairs and broken replies, in its own form; write and print its card.

    Raises InputError for what is no such model.
    """
    model = ReadyMade(model_args, 2 * args.per_device_eval_batch_size, args.device)
    tokenizer = model.tokenizer_of_pairs()
    data.degenerate_ratio = 0.0
    pairs = read_pairs(data, "{prompt}", tokenizer, args.seed)
    model.check_prompts(source.whole for source in pairs.sources if not isinstance(source.whole, str))
    model.load()
    asked = {tuple(source.query): source.whole for source in pairs.sources}
    texts = {
        tuple(ids := pair[side]): (
            asked[tuple(ids[: pair["query_length"]])],
            tokenizer.decode(ids[pair["query_length"] :], skip_special_tokens=True),
        )
        for pair in pairs.probes
        for side in ("chosen_ids", "rejected_ids")
    }

    def score(sequences: list[list[int]], description: str) -> np.ndarray:
        say(f"{description}: {len(sequences)}")
        return np.array(model(*zip(*(texts[tuple(ids)] for ids in sequences), strict=True)))

    prompts = [source.whole for source in pairs.sources]
    sides = [[source.chosen for source in pairs.sources], [source.rejected for source in pairs.sources]]
    scores = np.stack([model(prompts, side) for side in sides], axis=1)
    lengths = np.array([[len(source.chosen_ids), len(source.rejected_ids)] for source in pairs.sources]) + 1
    measures = {f"eval_{name}": value for name, value in pair_measures(scores, lengths).items()}
    measures["eval_loss"] = float(pairwise_loss(*torch.tensor(scores).T, center_coefficient=0.0))
    probed, of_probes = probe(score, pairs.probes, [])
    probed |= {"reward_model": model.where, "fingerprint": model.fingerprint()}
    card = make_card(measures, scores, lengths, pairs.train_lengths, probed, data.exempt, trained="")
    if is_main_process():
        os.makedirs(args.output_dir, exist_ok=True)
        keep_card(card, of_probes, scores, args.output_dir)
    say_card(card)
    say(f"reward card: {args.output_dir}")


# ---------------------------------------------------------------------------------------------------------------------
# The stage
# ---------------------------------------------------------------------------------------------------------------------


def build_trainer(
    args: RewardArguments,
    lora_args: LoraArguments,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    record: dict[str, Any] | None = None,
    sft: SavedAdapter | None = None,
) -> RewardTrainer:
    """The trainer, ready to train.  Changes `base`, which gets adapters and heads.

    record: content of run.json; sft: what --init_from_sft starts from.
    """
    model, members = new_reward_model(
        base, lora_args, args.seed, args.ensemble_size, sft if args.init_from_sft else None
    )
    check_output_logits(model)  # for the responses of an SFT model in the card
    if args.activation_checkpointing:
        model.enable_input_require_grads()  # a frozen embedding gives checkpointed layers nothing to differentiate
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=pairs.train,
        eval_dataset=pairs.evaluation,
        processing_class=tokenizer,
        callbacks=[RunFiles(record or {}, pairs.train)],
        members=members,
    )
    check_state_dict(trainer)
    return trainer


def main() -> None:
    # ---- Arguments ----
    model_args, data_args, lora_args, training_args, plan_args = parse_arguments(
        (RewardModelArguments, RewardDataArguments, LoraArguments, RewardArguments, PlanArguments),
        description="Stage 2: LoRA reward model.",
    )
    dtype, checkpoint = start_stage("reward", model_args, training_args, plan_args.plan)
    if model_args.card_only:
        write_ready_made_card(model_args, data_args, training_args)
        return
    sft = None
    if data_args.sft_model_lora_path is not None or training_args.init_from_sft:
        sft = read_adapter(data_args.sft_model_lora_path, "--sft_model_lora_path")
    if plan_args.plan:
        start = sft if training_args.init_from_sft else None
        announce(
            lambda: reward_plan(model_args, data_args.max_length, lora_args, training_args, dtype, start),
            model_args,
            training_args,
            only_plan=True,
        )
        return

    # ---- Tokenizer and data ----
    tokenizer = load_tokenizer(model_args)
    template = model_args.prompt_template
    check_template(template, tokenizer)
    day = settle_date(tokenizer, template, data_args.prompt_date, checkpoint, sft)
    pairs = read_pairs(data_args, template, tokenizer, training_args.seed)
    check_batches(training_args, len(pairs.train))

    # ---- Model ----
    base = load_base(model_args, dtype, training_args.device)
    check_tokenizer(base, tokenizer)
    sides = [
        pair[side]
        for rows in (pairs.train, pairs.evaluation, pairs.probes)
        for pair in rows
        for side in ("chosen_ids", "rejected_ids")
    ]
    check_lengths(base, max(map(len, sides)), "the longest pair", "--max_length")
    stop_ids = stop_token_ids(tokenizer, template, base.generation_config)
    if sft is not None:
        check_adapter(sft, "--sft_model_lora_path", False, template, base)
        complete(base, sft, sft.config)  # what does not fit the base is told now, and not behind the training
        check_reply_end(sft.path, sft.run, stop_ids, tokenizer)
    parts = {
        "data": asdict(data_args),
        "lora": asdict(lora_args),
        **identity(training_args, pairs.train),
        "prompt_date": day,
        "stop_token_ids": stop_ids,
    }
    record = run_record("reward", base, model_args, training_args, **parts)
    check_same_run(record, checkpoint, model_args, data_args, lora_args, training_args)

    # ---- Training ----
    trainer = build_trainer(training_args, lora_args, base, tokenizer, pairs, record, sft)
    trainer.train(resume_from_checkpoint=checkpoint)

    # ---- Save ----
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    write_card(trainer, pairs, sft, data_args, lora_args.lora_r, stop_ids)
    say(f"reward adapter: {training_args.output_dir}")


if __name__ == "__main__":
    run_script(main)
