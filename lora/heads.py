"""Score head and value head: linear layers on the decoder's last hidden states.

Everything that reads hidden states runs inside the model's own forward() (see `add_hidden_state_fn`), because DDP, FSDP and
DeepSpeed only take care of parameters that are used there.
"""

import functools
import inspect
import os
import types
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora.base_model import BROKEN_MODEL, hidden_width, text_decoder
from lora.sharding import fill_parameters, is_sharded
from utils.console import InputError, one_line

VALUE_HEAD_FILE = "value_head.safetensors"


HiddenStateFn = Callable[[PreTrainedModel, Tensor], Any]  # (base, last hidden states [B, L, H]) -> tensors


def add_hidden_state_fn(base: PreTrainedModel) -> None:
    """Teach forward() one more argument: `hidden_state_fn`, called with base and last hidden states instead of the LM head.

    attention_mask is always given; with past_key_values it covers the cached tokens too.  Without `hidden_state_fn`,
    forward() is what it was, so generate() and everything else still work.  Call it before PEFT wraps the base.
    """
    plain_forward = base.forward
    takes = inspect.signature(type(text_decoder(base)).forward).parameters
    takes_positions = "position_ids" in takes
    is_mamba = "cache_params" in takes  # its word for a cache, beside which it wants the mask of the new tokens alone

    @functools.wraps(type(base).forward)  # generate() checks its arguments against this signature
    def forward(self: PreTrainedModel, *args: Any, hidden_state_fn: HiddenStateFn | None = None, **inputs: Any) -> Any:
        if hidden_state_fn is None:
            return plain_forward(*args, **inputs)
        ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], inputs.get("past_key_values")
        extra = {} if cache is None else {"cache_params" if is_mamba else "past_key_values": cache}
        if takes_positions:  # for left padding; with a cache the mask also covers the tokens in it
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if is_mamba:
            mask = mask[:, -ids.shape[1] :]
        output = text_decoder(self)(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **extra)
        return hidden_state_fn(self, output.last_hidden_state)

    base.forward = types.MethodType(forward, base)


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Index of the last real token of each row, int64 [B]; mask [B, L] is 1 on real tokens, padding on either side."""
    return attention_mask.shape[1] - 1 - attention_mask.flip(1).long().argmax(1)


def score_fn(attention_mask: Tensor, adapter: str) -> HiddenStateFn:
    """Function that gives one score a row, float32 [B]: the head of `adapter` read at the last real token."""

    def function(base: PreTrainedModel, hidden: Tensor) -> Tensor:
        head = base.score.modules_to_save[adapter]
        rows = torch.arange(len(hidden), device=hidden.device)
        last = hidden[rows, last_token_index(attention_mask)]  # [B, H]
        with torch.autocast(hidden.device.type, enabled=False):  # the head stays float32: scores differ by little
            return nn.functional.linear(last.float(), head.weight.float()).squeeze(-1)

    return function


def add_score_head(base: PreTrainedModel, seed: int | None = None) -> None:
    """Give the base a one-label head without bias, float32; with a seed it is drawn, else it waits for saved weights.

    Its standard deviation is a tenth of 1/sqrt(H+1) (Stiennon et al. 2020): so the loss starts at log 2, and a few
    hundred pairs do not have to undo a random direction first.
    """
    width = hidden_width(base)
    head = nn.Linear(width, 1, bias=False, device=base.device, dtype=torch.float32)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        head.weight.data.copy_(torch.randn(1, width, generator=generator) * 0.1 * (width + 1) ** -0.5)
    base.score = head


def save_value_head(state_dict: dict[str, Tensor], folder: str) -> None:
    """Write the value head out of a model's state dict to `folder`, where there is one."""
    head = {name.rsplit(".", 1)[-1]: value for name, value in state_dict.items() if ".v_head." in name}
    if head:
        tensors = {name: value.detach().cpu().contiguous() for name, value in head.items()}
        save_file(tensors, os.path.join(folder, VALUE_HEAD_FILE))


def load_value_head(base: PreTrainedModel, folder: str) -> None:
    """Fill the value head from the file that `save_value_head` wrote.  Raises InputError when there is none."""
    path = os.path.join(folder, VALUE_HEAD_FILE)
    if not os.path.isfile(path):
        raise InputError(f"there is no {VALUE_HEAD_FILE} in {folder}; give a folder that rl_training.py wrote")
    try:
        if is_sharded(base.v_head):
            fill_parameters(base.v_head, load_file(path))
        else:
            base.v_head.load_state_dict(load_file(path))
    except BROKEN_MODEL as error:
        raise InputError(f"the value head {path} cannot be used: {one_line(error)}; is the file complete?") from error


def state_values(base: PreTrainedModel, states: Tensor) -> Tensor:
    """The value head on hidden states [N, H], float32 [N], outside autocast: values differ by little."""
    with torch.autocast(states.device.type, enabled=False):
        return nn.functional.linear(states.float(), base.v_head.weight, base.v_head.bias).squeeze(-1)
