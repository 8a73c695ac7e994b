"""Stage 1: teach the base model to answer, as a LoRA adapter.

    python sft_training.py --config configs/sft_demo.yaml
    accelerate launch --num_processes 3 sft_training.py --config configs/sft_baichuan2_7b.yaml

Prompt and reply are tokenized apart (corpus/tokens.py), the loss is on the reply alone, and the reply ends with EOS unless
it was cut.  TRL's SFTTrainer trains; rows of similar length go through the model together.  Writes adapter_config.json,
adapter_model.safetensors, the tokenizer, run.json, seen_prompts.txt and metrics.jsonl to --output_dir.
"""

import utils.quiet  # isort: skip  # noqa: F401 - before any library

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from corpus.chat_template import stop_token_ids
from corpus.files import train_and_eval_rows
from corpus.tokens import HELD_OUT, check_template, tokenize_sft
from lora.base_model import check_lengths, check_tokenizer, load_base, load_tokenizer
from lora.lora_layers import new_lora_config
from lora.sharding import check_state_dict
from rollout.distribution import check_output_logits
from runs.memory_plan import announce, sft_plan
from runs.resume import check_same_run, identity, settle_date
from runs.run_files import RunFiles, run_record
from runs.start import start_stage
from runs.trainer import ResumableArguments, ResumableTrainer
from utils.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    PlanArguments,
    check_batches,
    check_evaluation,
    default_autocast,
    parse_arguments,
    set_up_ddp,
)
from utils.batching import sft_part_size
from utils.console import InputError, run_script, say
from utils.offered import EVERY_STAGE, FIRST_STAGES

DEFAULT_DATASET = "Hello-SimpleAI/HC3-Chinese"  # the article's


@dataclass
class SFTArguments(ResumableArguments, SFTConfig):
    """TRL's configuration with this toolkit's defaults."""

    offered = f"{EVERY_STAGE} {FIRST_STAGES} neftune_noise_alpha"
    eval_metrics = "loss mean_token_accuracy entropy"

    output_dir: str | None = field(default="output/sft", metadata={"help": "Folder for everything that is written."})
    max_length: int = field(
        default=1024, metadata={"help": "Longest prompt + reply, in tokens; longer replies are cut."}
    )
    train_on_turns: str = field(
        default="all",
        metadata={"help": "Turns of the assistant in a dialogue that are trained.", "choices": ["all", "last"]},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    trust_remote_code: bool = field(default=False, init=False)  # ModelArguments has it, and the base is loaded here
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 autocast; by default on a GPU that has it."})
    activation_checkpointing: bool | None = field(
        default=False, metadata={"help": "Compute activations again in the backward pass: less memory, a third slower."}
    )

    # The loss is over response tokens and nothing else; TRL would add the experts' balance, once for each part of a step.
    router_aux_loss_coef: float | None = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        default_autocast(self)
        set_up_ddp(self)
        # TRL would look through the rows once more, for what `tokenize_sft` has cut and dropped
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()


class SortedSFTTrainer(ResumableTrainer, SFTTrainer):
    """TRL's trainer with less padding: the rows that go through the model together are of similar length.

    The loss of an optimizer step is the sum over all its response tokens, divided by their number.  So which rows go through
    the model together changes the padding, and not the loss.
    """

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        """The batches of an optimizer step, with their rows sorted by length over all of them."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        return sort_rows(batches, self.processing_class.pad_token_id), tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        if num_items_in_batch is None:  # an evaluation
            share = self.evaluation_tokens * len(inputs["input_ids"])
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=share)
        lengths = inputs["attention_mask"].sum(1)
        loss = torch.zeros((), device=lengths.device)
        for rows in lengths.argsort().split(sft_part_size(len(lengths), lengths.device)):
            longest = int(lengths[rows].max())
            part = {name: values[rows, :longest] for name, values in inputs.items()}
            loss = loss + super().compute_loss(model, part, num_items_in_batch=num_items_in_batch)
        return loss

    @functools.cached_property
    def evaluation_tokens(self) -> float:
        """Response tokens of a held-out row, on average: what TRL has to divide the loss of a row by.

        The Trainer takes the mean over rows of the losses of their batches.  With each loss divided by this number and the
        rows of its batch, that is the mean over all response tokens, whatever --per_device_eval_batch_size is.
        """
        labels = self.eval_dataset["labels"]
        tokens = sum(label != -100 for row in labels for label in row[1:])  # nothing predicts the first
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return tokens / len(labels) * processes  # TRL multiplies by their number

    def loop_state(self) -> dict[str, Any]:
        """What TRL counts between two lines of the log is part of a checkpoint."""
        return {**super().loop_state(), "metrics": self._metrics["train"], "tokens": self._total_train_tokens}

    def load_loop_state(self, state: dict[str, Any]) -> None:
        super().load_loop_state(state)
        self._metrics["train"].update(state["metrics"])
        self._total_train_tokens = state["tokens"]


def sort_rows(batches: list[dict[str, Tensor]], pad_id: int) -> list[dict[str, Tensor]]:
    """The same rows in as many batches of the same sizes, the shortest first, each padded to its own longest row.

    batches: tensors [B, L], padded on the right, with attention_mask among them.
    """
    if len(batches) < 2:
        return batches
    padding = {"input_ids": pad_id, "attention_mask": 0, "labels": -100}
    width = max(batch["input_ids"].shape[1] for batch in batches)
    joined = {
        name: torch.cat([nn.functional.pad(b[name], (0, width - b[name].shape[1]), value=value) for b in batches])
        for name, value in padding.items()
    }
    lengths = joined["attention_mask"].sum(1)
    parts = lengths.argsort().split([len(batch["input_ids"]) for batch in batches])
    return [{name: values[rows, : int(lengths[rows].max())] for name, values in joined.items()} for rows in parts]


def build_trainer(
    args: SFTArguments,
    lora_args: LoraArguments,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    evaluation: Dataset | None = None,
    record: dict[str, Any] | None = None,
) -> SortedSFTTrainer:
    """The trainer, ready to train.  Changes `base`, which gets an adapter.

    train, evaluation: from `tokenize_sft`; record: content of run.json.
    """
    if base.base_model is base:  # Llama 4 has its decoder under another name than it says, where TRL looks for it
        base.base_model_prefix = "model"
    trainer = SortedSFTTrainer(
        model=base,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=new_lora_config(lora_args, base, "CAUSAL_LM"),
        callbacks=[RunFiles(record or {}, train)],
    )
    for parameter in trainer.model.parameters():  # TRL makes a 4-bit base's adapter bfloat16, where small steps vanish
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # TRL's forward pass takes the number of tokens, whatever the base's own does.
    trainer.model_accepts_loss_kwargs = True
    check_state_dict(trainer)
    check_loss(trainer, train[0])
    return trainer


@torch.no_grad()
def check_loss(trainer: SortedSFTTrainer, row: dict[str, list[int]]) -> None:
    """Make sure that the loss of a row, for which TRL makes logits of its own, is that of the model's logits.

    Raises InputError if it is not: TRL does not know every family's scale and soft cap.
    """
    model, args = trainer.model, trainer.args
    device = next(model.parameters()).device  # not yet that of the training, where FSDP will spread it
    inputs = {name: torch.tensor([row[name]], device=device) for name in ("input_ids", "labels")}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    was_training = model.training
    model.eval()
    with trainer.compute_loss_context_manager():
        theirs = float(model(**inputs, fused_lm_head=True).loss)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    model.train(was_training)
    own = float(nn.functional.cross_entropy(logits[0, :-1].float(), inputs["labels"][0, 1:]))
    exact = next(model.parameters()).dtype == torch.float32 and not (args.bf16 or args.fp16)
    # Where the model's own logits are not finite, the training says so, for the rows that it is about.
    if math.isfinite(own) and not abs(theirs - own) <= (1e-3 if exact else 3e-2) * max(1.0, own):
        raise InputError(
            f"TRL's loss does not fit {type(model.get_base_model()).__name__}: {theirs:.4f} on the first row, where its "
            f"own logits give {own:.4f}; give another base, or an SFT adapter that was trained by another tool"
        )


def main() -> None:
    # ---- Arguments ----
    model_args, data_args, lora_args, training_args, plan_args = parse_arguments(
        (ModelArguments, DataArguments, LoraArguments, SFTArguments, PlanArguments), description="Stage 1: LoRA SFT."
    )
    dtype, checkpoint = start_stage("sft", model_args, training_args, plan_args.plan)
    if plan_args.plan:
        evaluates = data_args.eval_dataset is not None or data_args.eval_fraction > 0
        announce(
            lambda: sft_plan(model_args, lora_args, training_args, dtype, evaluates), model_args, training_args, True
        )
        return

    # ---- Tokenizer and data ----
    tokenizer = load_tokenizer(model_args)
    template = model_args.prompt_template
    check_template(template, tokenizer)
    day = settle_date(tokenizer, template, data_args.prompt_date, checkpoint)
    train_rows, eval_rows = train_and_eval_rows(data_args, DEFAULT_DATASET)
    check_evaluation(training_args, eval_rows is not None)
    limits = template, tokenizer, training_args.max_length, training_args.train_on_turns
    train = tokenize_sft(train_rows, *limits)
    check_batches(training_args, len(train))
    evaluation = eval_rows and tokenize_sft(eval_rows, *limits, HELD_OUT)

    # ---- Model ----
    base = load_base(model_args, dtype, training_args.device)
    check_tokenizer(base, tokenizer)
    check_output_logits(base)  # the later stages make them so; `check_loss` looks at those that TRL makes
    longest = max(len(row["input_ids"]) for rows in (train, evaluation or []) for row in rows)
    check_lengths(base, longest, "the longest row", "--max_length")
    stop_ids = stop_token_ids(tokenizer, template, base.generation_config)
    parts = {"data": asdict(data_args), "lora": asdict(lora_args), "prompt_date": day, "stop_token_ids": stop_ids}
    parts |= identity(training_args, train)
    record = run_record("sft", base, model_args, training_args, **parts)
    check_same_run(record, checkpoint, model_args, data_args, lora_args, training_args)

    # ---- Training ----
    trainer = build_trainer(training_args, lora_args, base, tokenizer, train, evaluation, record)
    trainer.train(resume_from_checkpoint=checkpoint)
    if evaluation is not None:
        trainer.evaluate()

    # ---- Save ----
    trainer.save_model()
    say(f"SFT adapter: {training_args.output_dir}")


if __name__ == "__main__":
    run_script(main)
