"""Stage 1 puts rows of similar length together: less padding, and the loss and gradients of TRL's own trainer."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from sft_training import SFTArguments, SortedSFTTrainer, sort_rows
from tests.conftest import make_model, make_tokenizer

LENGTHS = [5, 40, 9, 12, 30, 7, 22, 6]


def make_rows():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 320, (length,), generator=generator).tolist() for length in LENGTHS]
    return Dataset.from_list([{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows])


def one_step(kind, arguments, folder, rows, batches):
    """Gradients of one optimizer step, by name, its logged loss, and the positions that the decoder computed."""
    args = arguments(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=batches,
        report_to="none",
        save_strategy="no",
        max_grad_norm=0.0,
        learning_rate=0.0,
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = make_model("llama")
    torch.manual_seed(1)  # the adapter's own numbers
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = kind(
        model=model, args=args, train_dataset=make_rows(), processing_class=make_tokenizer(), peft_config=lora
    )
    gradients, positions = {}, []
    model.base_model.register_forward_pre_hook(
        lambda module, given, inputs: positions.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    optimizer = trainer.create_optimizer()
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    trainer.train()
    return gradients, trainer.state.log_history[0]["loss"], sum(positions)


@pytest.mark.parametrize(("rows", "batches"), [(8, 1), (2, 4), (4, 2), (3, 2)])
def test_loss_and_gradients_are_those_of_trls_own_trainer(tmp_path, rows, batches):
    ours, loss, positions = one_step(SortedSFTTrainer, SFTArguments, tmp_path / "ours", rows, batches)
    theirs, expected, padded = one_step(SFTTrainer, SFTConfig, tmp_path / "theirs", rows, batches)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert ours.keys() == theirs.keys()
    assert max(float(value.abs().max()) for value in theirs.values()) > 0.01
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
    assert positions < 0.85 * padded


def test_sorted_rows_by_hand():
    def batch(*rows):
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    first, second = sort_rows([batch([1, 2, 3], [4]), batch([5, 6])], pad_id=9)
    assert first["input_ids"].tolist() == [[4, 0], [5, 6]]
    assert first["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert first["labels"].tolist() == [[4, -100], [5, 6]]
    assert second["input_ids"].tolist() == [[1, 2, 3]]
    assert second["labels"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_held_out_loss_is_a_mean_over_response_tokens(tmp_path, size):
    """It was a mean of the batches' means: 1.421, 1.354 and 1.347 for the same model at batches of 1, 8 and 64 rows."""
    rows = make_rows()
    model = make_model("llama").eval()
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    args = SFTArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=size, report_to="none", disable_tqdm=True
    )
    args.dataloader_pin_memory = False
    trainer = SortedSFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
        peft_config=lora,
    )
    losses = []  # of each response token, row by row, by the model alone
    with torch.no_grad():
        for row in rows:
            logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            losses.append(
                torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
            )
    means = torch.stack([each.mean() for each in losses])
    expected = torch.cat(losses).mean()
    assert abs(means.mean() - expected) > 1e-3  # else both rules give the same here
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
