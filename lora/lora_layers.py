"""Which layers a new adapter is put on, and its configuration."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora.base_model import text_decoder
from utils.arguments import LoraArguments
from utils.console import InputError, one_line, say


@torch.enable_grad()
def text_layers(base: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers that LoRA can train, by their names in the base: those of the decoder that a text goes through.

    Towers for pictures and sound, attention to an encoder that is not there, and what only picks tokens or experts get no
    gradient: DDP fails on them, and others carry them in vain.  So a short text goes through the base, with a 0 added to
    what each layer gives, and the logits tell which of these they depend on.  The kernels of Mamba read the weights of three
    layers past any adapter.
    """
    names = {module: name for name, module in base.named_modules()}
    linear = {names[m]: m for m in text_decoder(base).modules() if isinstance(m, (nn.Linear, Conv1D))}
    embedding = base.get_input_embeddings().weight
    probes: dict[str, Tensor] = {}

    def probe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], Tensor | None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Tensor | None:
            width = getattr(layer, "out_features", None) or layer.nf
            if not isinstance(output, Tensor) or output.shape != (*inputs[0].shape[:-1], width):
                return None  # it has a forward() of its own, such as Llama 4's routers
            probes.setdefault(name, torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True))
            return output + probes[name]

        return hook

    hooks = [layer.register_forward_hook(probe(name)) for name, layer in linear.items()]
    ids = torch.ones(1, 8, dtype=torch.int64, device=embedding.device)
    try:
        logits = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        slopes = torch.autograd.grad(logits.sum(), list(probes.values()), allow_unused=True)
        trained = [name for name, slope in zip(probes, slopes, strict=True) if slope is not None]
    except (NotImplementedError, RuntimeError) as error:
        if not embedding.is_meta:
            raise InputError(f"{type(base).__name__} cannot be trained by LoRA: {one_line(error)}") from error
        inside = set(base.get_decoder().modules())  # a plan has no numbers, and some code looks at them
        trained = [name for name, layer in linear.items() if layer in inside]
    finally:
        for hook in hooks:
            hook.remove()

    def kind(name: str) -> str:
        return re.sub(r"\d+", "0", name)

    trained += [name for name in linear if "expert" in name and kind(name) in set(map(kind, trained))]  # one is enough
    fused = {
        f"{name}.{layer}"
        for name, module in base.named_modules()
        if hasattr(module, "A_log") and hasattr(module, "D")
        for layer in ("x_proj", "dt_proj", "out_proj")
    }
    return {name: layer for name, layer in linear.items() if name in set(trained) - fused}


def short_name(name: str) -> str:
    """The end of a layer's name that tells what it is: its last part, and more where that is a number."""
    return re.search(r"[^.]*(\.\d+)*$", name).group()


def is_named(name: str, target: str) -> bool:
    """Whether PEFT takes the module `name` for `target`, one of a list of names."""
    return name == target or name.endswith(f".{target}")


def split_names(names: str) -> list[str]:
    """Names joined by | or a comma."""
    return [name.strip() for name in names.replace("|", ",").split(",") if name.strip()]


def check_names(
    argument: str, wanted: Sequence[str], found: Collection[str], kind: str, choices: Sequence[str]
) -> None:
    """Raise InputError, which lists the `choices`, unless each of `wanted` is for one of `found`.

    argument: with its value; kind: what it has to name.
    """
    unknown = [target for target in wanted if not any(is_named(name, target) for name in found)]
    if unknown or not wanted:
        raise InputError(
            f"{argument}: {', '.join(unknown) or 'nothing'} is no {kind}; it has {', '.join(choices) or 'none'}"
        )


def resolve_target_modules(names: str, layers: Collection[str]) -> list[str]:
    """Layer names for LoRA: "all-linear", or names joined by | or a comma, checked against `text_layers`.

    W_pack is Baichuan's name for q, k and v in one matrix; on a model with three it means those three.
    Raises InputError that lists the layers there are.
    """
    linear = sorted(set(map(short_name, layers)))
    if names == "all-linear":
        return linear
    wanted = split_names(names)
    split = ["q_proj", "k_proj", "v_proj"]
    if "W_pack" in wanted and "W_pack" not in linear and set(split) <= set(linear):
        say("warning: this model has no W_pack; --lora_target_modules W_pack means q_proj, k_proj and v_proj here")
        wanted = [name for name in wanted if name != "W_pack"] + split
    check_names(f"--lora_target_modules {names}", wanted, layers, "linear layer of this model", linear)
    return wanted


def other_modules(base: PreTrainedModel, targets: Sequence[str], layers: Collection[str]) -> str | None:
    """A pattern of what PEFT would take for `targets` besides `layers`, for exclude_modules; None where there is nothing."""
    roots = {name[:end] for name in layers for end in (*(dot.start() for dot in re.finditer(r"\.", name)), len(name))}
    others = set()
    for name, _ in base.named_modules():
        if name in layers or not any(is_named(name, target) for target in targets):
            continue
        ends = (*(dot.start() for dot in re.finditer(r"\.", name)), len(name))
        outside = [name[:end] for end in ends if name[:end] not in roots]  # parts of the base that hold no wanted layer
        others.add(re.escape(outside[0]) + r"(\..*)?" if outside else re.escape(name))
    return "|".join(sorted(others)) or None


def expert_parameters(base: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of all experts in one tensor [experts, in, out], which are no linear layers, by name."""
    names = {parameter: name for name, parameter in base.named_parameters()}
    return {
        names[parameter]: parameter
        for module in text_decoder(base).modules()
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }


def resolve_target_parameters(names: str | None, experts: Collection[str]) -> list[str] | None:
    """Names of expert weights for LoRA, joined by | or a comma.  Raises InputError that lists those there are."""
    if names is None:
        return None
    wanted, choices = split_names(names), expert_names(experts)
    check_names(f"--lora_target_parameters {names}", wanted, experts, "weight of this model's experts", choices)
    return wanted


def expert_names(experts: Collection[str]) -> list[str]:
    """The ends of these names, without the number of the layer."""
    return sorted({re.split(r"\.\d+\.", name)[-1] for name in experts})


def new_lora_config(lora: LoraArguments, base: PreTrainedModel, task_type: str) -> LoraConfig:
    """LoRA configuration of a new adapter; task_type "SEQ_CLS" also trains and saves the score head.

    Raises InputError where the arguments do not fit the base.
    """
    layers, experts = text_layers(base), expert_parameters(base)
    targets = resolve_target_modules(lora.lora_target_modules, layers)
    parameters = resolve_target_parameters(lora.lora_target_parameters, experts)
    # In some mixtures PEFT takes the names of shared and dense layers for the experts', which bore them in transformers 4.
    kept = LoraConfig(target_modules=targets)
    convert_peft_config_for_transformers(kept, base, None)
    taken = [target for target in targets if target not in kept.target_modules]
    if lora.lora_target_modules == "all-linear":
        targets = [target for target in targets if target not in taken]
    if (parameters or (taken and taken[0] in targets)) and lora.lora_dropout:
        raise InputError(
            f"an adapter on experts ({', '.join(parameters or taken)}) takes no dropout; add --lora_dropout 0 "
            f"(it is {lora.lora_dropout})"
        )
    if (parameters or (taken and taken[0] in targets)) and lora.use_dora:
        raise InputError(
            f"an adapter on experts ({', '.join(parameters or taken)}) knows no DoRA; leave out --use_dora"
        )
    layers = {name: layer for name, layer in layers.items() if any(is_named(name, target) for target in targets)}
    if experts and not parameters and lora.lora_target_modules == "all-linear":
        adapted = sum(layer.weight.numel() for layer in layers.values())
        share = adapted / (adapted + sum(weight.numel() for weight in experts.values()))
        also = f" (and {', '.join(taken)}, which PEFT takes for them)" if taken else ""
        say(
            f"note: the experts of this model{also} stay frozen: {share:.0%} of its layers' weights get an adapter; "
            f"--lora_target_parameters '{'|'.join(expert_names(experts))}' --lora_dropout 0 gives them one too"
        )
    return LoraConfig(
        task_type=task_type,
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        exclude_modules=other_modules(base, targets, layers),
        target_parameters=parameters,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.init_lora_weights == "true" else lora.init_lora_weights,
        modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
    )
