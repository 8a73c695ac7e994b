"""The four parts of PPO on one base: policy, reference, reward and value as adapters and heads."""

import copy

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lora.adapters import CRITIC, LORA, POLICY, REFERENCE, SavedAdapter, attach_adapter, is_of, layer_of, load_adapter
from lora.base_model import disable_dropout, hidden_width
from lora.heads import add_hidden_state_fn, add_score_head
from rewards.reward_model import load_reward
from utils.console import InputError


def assemble_ppo_model(
    base: PreTrainedModel, sft: SavedAdapter, reward: SavedAdapter | None, critic: bool = False, values: bool = True
) -> PeftModel:
    """Base + policy (a trainable copy of the SFT adapter), reference (the SFT adapter), reward adapter, value head.

    reward: None where only functions judge; values: whether there is a value head, which RLOO and GRPO do without.

    Only the policy's LoRA weights and the value head are trainable; the head starts at 0 (Ziegler et al. 2019).  Whole
    layers and tokens that the SFT adapter brings act for policy and reference alike, and stay as they are.  With `critic`
    there is also a trainable copy of the reward adapter, for the value head to read: see `start_critic`.

    Raises InputError when an adapter does not fit, or the SFT adapter has nothing to train.
    """
    if not any(layer_of(key)[1] == LORA for key in sft.keys):
        raise InputError(
            f"{sft.path} has no LoRA weights, so PPO has nothing to train; give an SFT adapter that has some"
        )
    add_hidden_state_fn(base)
    config = copy.deepcopy(sft.config)
    config.inference_mode = False  # what PEFT saves always says True, and then nothing would train
    config.lora_dropout = 0.0
    model = attach_adapter(base, sft, config)
    load_adapter(model, sft, REFERENCE)
    if reward is not None:
        add_score_head(base)
        load_reward(model, reward)
    if critic:
        load_adapter(model, reward, CRITIC)
    if values:
        base.v_head = nn.Linear(hidden_width(base), 1, device=base.device, dtype=torch.float32)
        nn.init.zeros_(base.v_head.weight)
        nn.init.zeros_(base.v_head.bias)
    disable_dropout(model)
    model.set_adapter(POLICY)
    for name, parameter in model.named_parameters():  # PEFT flips requires_grad in many places: say it once, here
        is_trained = "lora_" in name and (is_of(name, POLICY) or is_of(name, CRITIC))
        parameter.requires_grad_(is_trained or ".v_head." in name)
    return model.eval()


def start_critic(model: PeftModel, mean: float, std: float) -> None:
    """Let the value head start as the reward model's own: the normalised score of a reply as it is so far."""
    base = model.get_base_model()
    base.v_head.weight.data.copy_(base.score.modules_to_save[CRITIC].weight / std)
    base.v_head.bias.data.fill_(-mean / std)
