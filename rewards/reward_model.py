"""The reward model: one reward adapter with its score head, or an ensemble of them, on the shared base."""

import copy
import os
from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora.adapters import POLICY, REWARD, SavedAdapter, attach_adapter, is_of, load_adapter, read_adapter, use_adapter
from lora.heads import add_hidden_state_fn, add_score_head, score_fn
from lora.lora_layers import new_lora_config
from utils.arguments import LoraArguments

MEMBER = "member"  # further adapters of a reward ensemble: member1, member2 ...


def new_reward_model(
    base: PreTrainedModel, lora: LoraArguments, seed: int, ensemble_size: int = 1, sft: SavedAdapter | None = None
) -> tuple[PeftModel, list[str]]:
    """Base + new reward adapters with a score head each, the only trainable parts; and the names of the adapters.

    sft: the one adapter starts as this one, whose whole layers and tokens stay as they are.
    """
    add_hidden_state_fn(base)
    if sft is not None:
        add_score_head(base, seed)
        model = attach_adapter(base, sft, sft.config, new_head=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_of(name, POLICY) and ("lora_" in name or ".score." in name))
        return model, [POLICY]
    members = [POLICY, *(f"{MEMBER}{number}" for number in range(1, ensemble_size))]
    config = new_lora_config(lora, base, "SEQ_CLS")
    configs = [copy.deepcopy(config) for _ in members]  # PEFT writes into the one that it gets
    add_score_head(base, seed)
    model = PeftModel(base, configs[0])
    for name, config in zip(members[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    for name in members:
        model.set_requires_grad(name, requires_grad=True)
    return model, members


def member_folders(folder: str) -> list[str]:
    """The adapters of a saved reward model: the folder itself, and those of the rest of its ensemble in it."""
    folders = [folder]
    while os.path.isdir(os.path.join(folder, f"{MEMBER}{len(folders)}")):
        folders.append(os.path.join(folder, f"{MEMBER}{len(folders)}"))
    return folders


def member_scores(
    model: nn.Module, inputs: dict[str, Tensor], members: Sequence[str], part_rows: int | None = None
) -> Iterator[Tensor]:
    """Score of each row by each reward adapter, float32 [B] a member.  model: a PeftModel, or one wrapped for DDP.

    inputs: input_ids and attention_mask [B, L], padded on the right.  With `part_rows`, that many rows go through the model
    at a time, the shortest first, without the padding that only the longest ones need: the scores are the same.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    lengths = mask.sum(1)
    parts = lengths.argsort().split(part_rows or len(ids))
    for name in members:
        with use_adapter(getattr(model, "module", model), name):
            scores = []
            for rows in parts:
                own = mask[rows, : int(lengths[rows].max())] if part_rows else mask[rows]
                scores.append(
                    model(input_ids=ids[rows, : own.shape[1]], attention_mask=own, hidden_state_fn=score_fn(own, name))
                )
            yield torch.cat(scores)[torch.cat(parts).argsort()]


def ensemble_score(scores: Sequence[Tensor], penalty: float) -> Tensor:
    """Mean over the members minus `penalty` standard deviations (of the population), [B]; one member: its score.

    What only some of the members like is what a policy would exploit (Coste et al. 2023, arXiv:2310.02743).
    """
    stacked = torch.stack(list(scores))  # [members, B]
    return stacked.mean(0) - penalty * stacked.std(0, unbiased=False)


def load_reward(model: PeftModel, reward: SavedAdapter) -> None:
    """Add a saved reward model, all adapters of it, frozen.  The base needs a `score`, see `add_score_head`."""
    for number, folder in enumerate(member_folders(reward.path)):
        load_adapter(model, read_adapter(folder, "--reward_model_lora_path"), REWARD + (str(number) if number else ""))
    model.get_base_model().score_penalty = reward.run.get("arguments", {}).get("ensemble_penalty", 1.0)


def reward_scores(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Score of each row by the reward model that `load_reward` has added, float32 [B].  inputs: as in `member_scores`."""
    unwrapped = getattr(model, "module", model)
    members = [name for name in unwrapped.peft_config if name.startswith(REWARD)]
    return ensemble_score(list(member_scores(model, inputs, members)), unwrapped.get_base_model().score_penalty)
