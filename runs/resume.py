"""What a run that goes on may change, and what it may not.

run.json of the checkpoint says what the run was.  What decides the numbers (base, data, template, adapter, batches, seed)
has to be the same, or the run is refused; its length, its saving and the learning rate may change, and are named.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedTokenizerBase, TrainingArguments

from corpus.chat_template import fix_date
from lora.adapters import SavedAdapter, read_run
from lora.base_model import same_base
from utils.arguments import withheld
from utils.console import InputError, say

# Arguments that take effect when the run goes on.
TAKEN = (
    "learning_rate value_learning_rate steps max_steps num_train_epochs save_freq save_steps save_strategy save_total_limit "
    "logging_steps logging_strategy logging_first_step eval_strategy eval_steps eval_delay eval_on_start "
    "per_device_eval_batch_size eval_dataset eval_dataset_split eval_dataset_data_dir eval_subset max_grad_norm "
    "max_nonfinite_steps load_best_model_at_end metric_for_best_model greater_is_better probe_prompts exempt_probes "
    "gold_function reward_server"
)
# Where things lie, who looks on, and what `identity` tells better: files may have moved, and processes may be fewer.
NOT_COMPARED = (
    "output_dir resume_from_checkpoint disable_tqdm log_level report_to log_with run_name project local_rank ddp_timeout "
    "model_name_or_path trust_remote_code prompt_date dataset columns dataset_split dataset_data_dir sft_model_lora_path "
    "reward_model_lora_path reward_model reward_device reward_card merged_sft_model_path batched_gen allow_weak_reward "
    "use_cpu per_device_train_batch_size gradient_accumulation_steps batch_size mini_batch_size"
)


def hash_of_rows(rows: Dataset) -> str:
    """SHA-256 of all token ids of a data set, in their order: data, template, tokenizer and limits have a part in it."""
    digest = hashlib.sha256()
    columns = [name for name in ("input_ids", "chosen_ids", "rejected_ids") if name in rows.column_names]
    for row in rows.select_columns(columns):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:32]


def hash_of_weights(adapter: SavedAdapter) -> str:
    with open(os.path.join(adapter.path, SAFETENSORS_WEIGHTS_NAME), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def identity(
    training_args: TrainingArguments, train: Dataset, adapters: Mapping[str, SavedAdapter] | None = None
) -> dict[str, Any]:
    """Entries for run.json that tell this run from another one, wherever its files lie and on however many processes.

    adapters: what stage 3 starts from, by argument.
    """
    args, processes = training_args, training_args.world_size
    rows = args.per_device_train_batch_size * processes
    if hasattr(args, "passes_per_step"):  # PPO, where a step has several updates
        update = args.mini_batch_size * args.passes_per_step * processes
    else:
        update = rows = rows * args.gradient_accumulation_steps
    hashes = {argument: hash_of_weights(adapter) for argument, adapter in (adapters or {}).items()}
    return {"rows_hash": hash_of_rows(train), "rows_a_step": rows, "rows_an_update": update, "adapters": hashes}


def settle_date(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    given: str | None,
    checkpoint: str | None,
    *adapters: SavedAdapter | None,
) -> str | None:
    """The day that a chat template writes, for run.json; see `fix_date`.

    adapters: what the run starts from; the first one's day counts.  Warns where another one has learnt on another day.
    """
    runs = [] if checkpoint is None else [read_run(checkpoint)]
    of_adapters = [adapter.run for adapter in adapters if adapter is not None]
    day = fix_date(tokenizer, template, given, runs + of_adapters)
    for run in of_adapters if day else ():
        if run.get("prompt_date") not in (None, day):
            learnt = f"the {run['stage']} adapter's were of {run['prompt_date']}"
            say(f"warning: the chat template writes the date {day} into the prompts here; {learnt}")
    return day


def check_same_run(record: dict[str, Any], checkpoint: str | None, *arguments: Any) -> None:
    """Compare run.json of a checkpoint with the one that is to be written.  Names what changed and is taken.

    arguments: the parsed dataclasses.  Raises InputError for the first thing that cannot change.
    """
    if checkpoint is None:
        return
    before = read_run(checkpoint)
    if not before:
        say(f"warning: {checkpoint} has no run.json, so nothing says whether it is of this run")
        return

    def refuse(what: str, old: Any, new: Any) -> None:
        raise InputError(
            f"{what} was {old} in the run of {checkpoint}, and is {new} now, which a run that goes on cannot change; give "
            "the old value, or another --output_dir"
        )

    if not same_base(before["base_fingerprint"], record["base_fingerprint"]):
        refuse("--model_name_or_path", before["base_model"], f"another base, {record['base_model']}")
    old, new = (all_arguments(each) for each in (before, json.loads(json.dumps(record))))
    settled = set(NOT_COMPARED.split()).union(*(withheld(type(part)) for part in arguments))
    changed = [
        each.name
        for part in arguments
        for each in dataclasses.fields(part)
        if each.name not in settled and each.name in old and each.name in new
        if old[each.name] != new[each.name]
    ]
    for name in changed:
        if name not in TAKEN.split():
            refuse(f"--{name}", repr(old[name]), repr(new[name]))
    sizes = {
        "rows_a_step": "the number of rows in a step (batch size x gradient accumulation x processes)",
        "rows_an_update": "the number of replies in an update (mini batch x gradient accumulation x processes)",
    }
    for name, what in sizes.items():
        if before.get(name, record[name]) != record[name]:
            refuse(what, before[name], record[name])
    hashes, hashes_now = before.get("adapters", record["adapters"]), record["adapters"]
    for argument in {**hashes, **hashes_now}:
        what = f"the adapter of --{argument}" if argument.endswith("_lora_path") else f"--{argument}"
        if (argument in hashes) != (argument in hashes_now):
            refuse(what, *(repr(each["arguments"].get(argument)) for each in (before, record)))
        if hashes[argument] != hashes_now[argument]:
            refuse(what, before["arguments"][argument], "one with other weights")
    if before.get("rows_hash", record["rows_hash"]) != record["rows_hash"]:
        refuse(
            "--dataset", before["data"]["dataset"], f"{record['data']['dataset']}, with other rows or in another order"
        )
    for name in changed:
        say(f"going on with --{name} {new[name]}, which was {old[name]}")


def all_arguments(record: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run.json, whichever dataclass they are of."""
    return {**record.get("data", {}), **record.get("lora", {}), **record["arguments"]}
