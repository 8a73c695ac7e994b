"""Models whose parameters are spread over processes (FSDP2, DeepSpeed ZeRO-3): whole tensors out of them, and back in.

On a model that lies whole in every process the functions do what their names say, and nothing else.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.integrations import deepspeed as deepspeed_integration

from utils.console import InputError


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the parameters only, so that a forward pass needs all processes."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def _gathered(parameter: nn.Parameter, writer: int | None = None) -> contextlib.AbstractContextManager[Any]:
    """ZeRO-3: the whole parameter in every process inside the block; with `writer` that process's change is kept."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed  # installed where such parameters come from

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=writer)


def _reshard(model: nn.Module) -> None:
    """FSDP2 leaves some layers whole after a forward pass.  One process that saves alone would shard them again, alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_state_dict(trainer: Trainer) -> None:
    """Raise InputError where FSDP would save parts that only FSDP can read: the Trainer then writes no adapter at all."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and "FULL" not in str(plugin.state_dict_type):
        raise InputError(
            f"with fsdp_state_dict_type {plugin.state_dict_type.name} no adapter would be written; set it to "
            "FULL_STATE_DICT, as in configs/accelerate/fsdp2.yaml"
        )


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """ZeRO-3: let from_pretrained load whole weights inside the block, instead of spreading them over the processes at once.

    Heads and adapters are put on a whole model, and the base's fingerprint is read from one; the Trainer spreads it later.
    """
    config = deepspeed_integration._hf_deepspeed_config_weak_ref  # there is no public way to read it
    config = None if config is None else config()
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed_integration.set_hf_deepspeed_config(config)


@torch.no_grad()
def whole_parameters(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Copies of the wanted parameters on the CPU, by name.  Every process has to call it, and gets all of them."""
    _reshard(model)
    whole = {}
    for name, parameter in model.named_parameters():
        if wanted(name):
            with _gathered(parameter):
                full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                whole[name] = full.detach().to("cpu", copy=True)
    return whole


@torch.no_grad()
def fill_parameters(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Give the parameters named in `whole` these values.  Every process has to call it, with the same tensors."""
    _reshard(model)
    for name, parameter in model.named_parameters():
        if name not in whole:
            continue
        value = whole[name].to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
        else:
            with _gathered(parameter, writer=0):
                parameter.copy_(value)
