"""Stage 2: learn which of two replies people prefer, as a LoRA adapter with a score head.

    python reward_modeling.py --config configs/reward_demo.yaml
    CUDA_VISIBLE_DEVICES=0,1,2 python reward_modeling.py --model_name MODEL --lora_target_models W_pack ...

The loss is -log sigmoid(chosen - rejected) (Bradley-Terry; Ouyang et al. 2022, eq. 1), plus a small term that keeps the
scores around 0 (Eisenstein et al. 2023, eq. 2).  The score is read at the last real token, found by the attention mask;
that token is EOS unless the pair was cut.  Besides the adapter with its head it writes reward_card.json, from which
stage 3 takes the mean and the standard deviation of the scores.
"""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from utils.adapters import (
    POLICY,
    load_adapter,
    load_base,
    load_tokenizer,
    new_reward_model,
    read_adapter,
    score_job,
    use_adapter,
)
from utils.arguments import (
    DEFAULT_PREFERENCES,
    DataArguments,
    InputError,
    LoraArguments,
    ModelArguments,
    check_output_dir,
    choose_precision,
    default_autocast,
    parse_arguments,
    resume_path,
    run_script,
    say,
)
from utils.data import check_template, pad_right, tokenize_preferences, train_and_eval_rows
from utils.launch import relaunch_on_all_gpus
from utils.report import RunFiles, run_record, write_json


@dataclass
class RewardDataArguments(DataArguments):
    """Preference pairs, and how many of them."""

    eval_fraction: float = field(
        default=0.1,
        metadata={"help": "Without --eval_dataset: hold out this share of the prompts with all their pairs."},
    )
    train_subset: int = field(default=-1, metadata={"help": "Train on the first so many pairs; -1: on all."})
    eval_subset: int = field(default=-1, metadata={"help": "Evaluate on the first so many pairs; -1: on all."})
    max_length: int = field(default=1024, metadata={"help": "Longest prompt + reply, in tokens."})
    overlong_pairs: str = field(
        default="drop",
        metadata={
            "help": "Pairs with a side above --max_length: drop them, or cut both replies to the same length.",
            "choices": ["drop", "cut"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_subset", "eval_subset"):
            if getattr(self, name) < -1 or getattr(self, name) == 0:
                raise InputError(f"--{name} is {getattr(self, name)}; give a number of pairs, or -1 for all")


@dataclass
class RewardArguments(TrainingArguments):
    """The Trainer's arguments with this toolkit's defaults."""

    output_dir: str | None = field(default="output/reward", metadata={"help": "Folder for everything that is written."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "More than one pass soon overfits a reward model."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of metrics.jsonl."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(default=200, metadata={"help": "Steps between two evaluations."})
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 autocast; by default on a GPU that has it."})
    center_rewards_coefficient: float = field(
        default=0.01, metadata={"help": "Weight of mean((chosen + rejected)^2), which keeps the scores around 0."}
    )

    def __post_init__(self) -> None:
        default_autocast(self)
        super().__post_init__()


# ---------------------------------------------------------------------------------------------------------------------
# Loss and measures
# ---------------------------------------------------------------------------------------------------------------------


def pairwise_loss(chosen: Tensor, rejected: Tensor, center_coefficient: float) -> Tensor:
    """Bradley-Terry loss with centering, a scalar: mean of -log sigmoid(c - r) + coefficient * (c + r)^2.

    chosen, rejected: scores [B].  Sources: Ouyang et al. 2022 (arXiv:2203.02155) eq. 1; Eisenstein et al. 2023
    (arXiv:2312.09244) eq. 2.
    """
    return (-logsigmoid(chosen - rejected) + center_coefficient * (chosen + rejected) ** 2).mean()


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share seen in `count` independent trials (Wilson 1927); stays inside [0, 1]."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def measure_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Measures of held-out pairs; predictions: scores [N, 2] (chosen, rejected), label_ids: reply tokens [N, 2].

    accuracy counts a tie as half.  length_correlation is Pearson's, over all replies; 0 where either does not vary.
    """
    scores, lengths = prediction.predictions, prediction.label_ids
    margin = scores[:, 0] - scores[:, 1]
    accuracy = float((margin > 0).mean() + 0.5 * (margin == 0).mean())
    low, high = wilson_interval(accuracy, len(scores))
    varies = scores.std() > 0 and lengths.std() > 0
    return {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": float(margin.mean()),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "length_correlation": float(np.corrcoef(scores.ravel(), lengths.ravel())[0, 1]) if varies else 0.0,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class RewardTrainer(Trainer):
    """Trainer for pairs: chosen and rejected go through the model in one batch, chosen first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=self.collate, compute_metrics=measure_scores, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: let the Trainer average micro-batches

    def collate(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows of `tokenize_preferences` -> ids and mask [2B, L], chosen first, and reply lengths [B, 2]."""
        sequences = [pair["chosen_ids"] for pair in pairs] + [pair["rejected_ids"] for pair in pairs]
        ids, mask = pad_right(sequences, self.processing_class.pad_token_id)
        lengths = [
            [len(pair[side]) - pair["query_length"] for side in ("chosen_ids", "rejected_ids")] for pair in pairs
        ]
        return {"input_ids": ids, "attention_mask": mask, "lengths": torch.tensor(lengths)}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        mask = inputs["attention_mask"]
        scores = model(input_ids=inputs["input_ids"], attention_mask=mask, job=score_job(mask, POLICY))  # [2B]
        chosen, rejected = scores.chunk(2)
        loss = pairwise_loss(chosen, rejected, self.args.center_rewards_coefficient)
        return (loss, torch.stack([chosen, rejected], dim=1)) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        return loss, scores, inputs["lengths"]


def check_saved_adapter(model: PeftModel, folder: str, batch: dict[str, Tensor]) -> float:
    """Load the adapter that was just saved a second time and compare scores; returns the largest difference.

    Score heads have been lost between training and use more than once in this field: this makes sure of ours.
    Raises RuntimeError when the scores differ.
    """
    saved = read_adapter(folder, "--output_dir")
    if not saved.has_score_head:
        raise RuntimeError(f"the adapter in {folder} was saved without its score head")
    load_adapter(model, saved, "reloaded")
    model.eval()
    device = model.device
    inputs = {"input_ids": batch["input_ids"].to(device), "attention_mask": batch["attention_mask"].to(device)}
    scores = {}
    with torch.no_grad():
        for name in (POLICY, "reloaded"):
            with use_adapter(model, name):
                scores[name] = model(**inputs, job=score_job(inputs["attention_mask"], name))
    model.delete_adapter("reloaded")
    difference = float((scores[POLICY] - scores["reloaded"]).abs().max())
    if difference > 1e-4 * max(1.0, float(scores[POLICY].abs().max())):
        raise RuntimeError(f"the adapter in {folder} gives other scores than the model it was saved from: {difference}")
    return difference


def reward_card(evaluation: dict[str, float], pairs: int, reload_difference: float) -> dict[str, Any]:
    """Content of reward_card.json, from the measures of the held-out pairs."""
    measures = {key.removeprefix("eval_"): value for key, value in evaluation.items()}
    return {
        "accuracy": measures["accuracy"],
        "accuracy_ci95": [measures["accuracy_low"], measures["accuracy_high"]],
        "loss": measures["loss"],
        "score_mean": measures["score_mean"],
        "score_std": measures["score_std"],
        "length_correlation": measures["length_correlation"],
        "eval_pairs": pairs,
        "reload_difference": reload_difference,
    }


def first_rows(rows: Dataset, count: int) -> Dataset:
    """The first `count` rows, all of them for -1."""
    return rows if count == -1 else rows.select(range(min(count, len(rows))))


def main() -> None:
    # ---- Arguments ----
    model_args, data_args, lora_args, training_args = parse_arguments(
        (ModelArguments, RewardDataArguments, LoraArguments, RewardArguments), description="Stage 2: LoRA reward model."
    )
    relaunch_on_all_gpus()
    check_output_dir(training_args)
    checkpoint = resume_path(training_args)
    dtype = choose_precision(model_args, training_args)
    training_args.remove_unused_columns = False
    set_seed(training_args.seed)

    # ---- Tokenizer and data ----
    tokenizer = load_tokenizer(model_args)
    template = model_args.prompt_template
    check_template(template, tokenizer)
    train_rows, eval_rows = train_and_eval_rows(data_args, DEFAULT_PREFERENCES)
    if eval_rows is None:
        raise InputError("a reward model needs held-out pairs; give --eval_dataset or an --eval_fraction above 0")
    limits = (template, tokenizer, data_args.max_length, data_args.overlong_pairs)
    train_dataset = tokenize_preferences(first_rows(train_rows, data_args.train_subset), *limits)
    eval_dataset = tokenize_preferences(first_rows(eval_rows, data_args.eval_subset), *limits)

    # ---- Model ----
    base = load_base(model_args, dtype)
    record = run_record("reward", base, model_args, training_args, data=asdict(data_args), lora=asdict(lora_args))
    model = new_reward_model(base, lora_args, training_args.seed)
    if training_args.activation_checkpointing:
        model.enable_input_require_grads()  # a frozen embedding gives checkpointed layers nothing to differentiate

    # ---- Training ----
    trainer = RewardTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=[RunFiles(record)],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    evaluation = trainer.evaluate()

    # ---- Save ----
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        sample = trainer.collate([eval_dataset[i] for i in range(min(8, len(eval_dataset)))])
        difference = check_saved_adapter(
            trainer.accelerator.unwrap_model(trainer.model), training_args.output_dir, sample
        )
        card = reward_card(evaluation, len(eval_dataset), difference)
        write_json(card, os.path.join(training_args.output_dir, "reward_card.json"))
        low, high = card["accuracy_ci95"]
        say(
            f"held-out accuracy {card['accuracy']:.3f} (95% interval {low:.3f} to {high:.3f}, {len(eval_dataset)} pairs), "
            f"correlation of score and length {card['length_correlation']:.2f}\nreward adapter: {training_args.output_dir}"
        )


if __name__ == "__main__":
    run_script(main)
