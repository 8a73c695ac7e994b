"""Adapters on the shared base: their configurations, what lies in a saved folder, load, attach and switch."""

import contextlib
import copy
import functools
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from utils.arguments import LoraArguments
from utils.base_model import BROKEN_MODEL, bare_layer, base_fingerprint, same_base, text_decoder
from utils.console import InputError, one_line, say
from utils.files import read_json_object
from utils.sharding import fill_parameters, is_sharded

POLICY, REFERENCE, REWARD = "default", "reference", "reward"  # PEFT saves "default" at the root of a folder
CRITIC = "critic"  # and others in a folder of their name
PREFIX = "base_model.model."  # of every key in an adapter's file
SCORE_KEY = f"{PREFIX}score.weight"  # where PEFT keeps the head of a sequence classifier
LORA, TOKENS, WHOLE = "by LoRA", "token by token", "as a whole"  # how an adapter changes a layer of the base
# Ways to start LoRA that take the first product of its matrices off the base, again each time that PEFT loads it.
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


# ---------------------------------------------------------------------------------------------------------------------
# New adapters
# ---------------------------------------------------------------------------------------------------------------------


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


def resolve_target_modules(names: str, layers: Collection[str]) -> list[str]:
    """Layer names for LoRA: "all-linear", or names joined by | or a comma, checked against `text_layers`.

    W_pack is Baichuan's name for q, k and v in one matrix; on a model with three it means those three.
    Raises InputError that lists the layers there are.
    """
    linear = sorted(set(map(short_name, layers)))
    if names == "all-linear":
        return linear
    wanted = [name.strip() for name in names.replace("|", ",").split(",") if name.strip()]
    split = ["q_proj", "k_proj", "v_proj"]
    if "W_pack" in wanted and "W_pack" not in linear and set(split) <= set(linear):
        say("warning: this model has no W_pack; --lora_target_modules W_pack means q_proj, k_proj and v_proj here")
        wanted = [name for name in wanted if name != "W_pack"] + split
    unknown = [target for target in wanted if not any(is_named(name, target) for name in layers)]
    if unknown or not wanted:
        raise InputError(
            f"--lora_target_modules {names}: {', '.join(unknown) or 'nothing'} is no linear layer of this model; "
            f"it has {', '.join(linear)}"
        )
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
    wanted = [name.strip() for name in names.replace("|", ",").split(",") if name.strip()]
    unknown = [target for target in wanted if not any(is_named(name, target) for name in experts)]
    if unknown or not wanted:
        raise InputError(
            f"--lora_target_parameters {names}: {', '.join(unknown) or 'nothing'} is no weight of this model's experts; "
            f"it has {', '.join(expert_names(experts)) or 'none'}"
        )
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
        modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Saved adapters
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class SavedAdapter:
    """An adapter folder that was looked at, not loaded: `run` is its run.json, empty for adapters trained elsewhere."""

    path: str
    config: LoraConfig
    keys: list[str]
    run: dict[str, Any]

    @property
    def has_score_head(self) -> bool:
        return SCORE_KEY in self.keys

    @property
    def frozen_parts(self) -> list[str]:
        """The layers that the file has as a whole or in single tokens: PPO trains LoRA weights alone."""
        return sorted({layer for layer, way in map(layer_of, self.keys) if way != LORA})

    @property
    def base_changes(self) -> str | None:
        """What of the base itself changes when PEFT loads the adapter: it acts on every model there, and always."""
        start = str(self.config.init_lora_weights)
        layers = {key.removesuffix(".weight") for key in self.keys}
        if any(
            key.endswith(".bias") and ".lora_" not in key and key[: -len(".bias")] not in layers for key in self.keys
        ):
            return f"the base's own biases (bias {self.config.bias})"
        if start.lower().startswith(BASE_CHANGING_STARTS):
            return f"the base's own weights (init_lora_weights {start})"
        return "the base's own weights (kasa_config)" if self.config.kasa_config else None


def layer_of(key: str) -> tuple[str, str]:
    """The layer of the base that a tensor of an adapter's file is for, and how it changes it: LORA, TOKENS or WHOLE."""
    name = key.removeprefix(PREFIX)
    for part, way in ((".lora_", LORA), (".token_adapter.", TOKENS)):
        if part in name:
            return name.split(part)[0], way
    return name.rpartition(".")[0].removesuffix(".base_layer"), WHOLE


def read_run(folder: str) -> dict[str, Any]:
    """run.json of an adapter, empty where it has none.  Raises InputError when what later stages need is not in it."""
    path = os.path.join(folder, "run.json")
    run = read_json_object(path)
    arguments = run.get("arguments", {})
    for name in ("base_fingerprint", "base_model", "prompt_template"):
        if run and not isinstance(run.get(name), str):
            raise InputError(f"{path} has no {name}; restore the file, or remove it to let the arguments decide")
    if not isinstance(arguments, dict) or not isinstance(arguments.get("ensemble_penalty", 1.0), (int, float)):
        raise InputError(f"the arguments in {path} are damaged; restore the file, or remove it")
    return run


def read_adapter(path: str | None, argument: str, alone: bool = False) -> SavedAdapter:
    """Look at the adapter folder that `argument` names.

    Raises InputError when it is missing, incomplete or no LoRA; or when it changes the base itself, which is only right when
    it is used `alone`, by nobody who also needs the base as it was.
    """
    if path is None:
        raise InputError(f"no adapter was given; add {argument} FOLDER")
    weights = os.path.join(path, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(weights) and os.path.isfile(os.path.join(path, WEIGHTS_NAME)):
        raise InputError(
            f"{argument} {path} holds its weights as {WEIGHTS_NAME}, a pickle, which can run code and is not read; "
            f"save the adapter as {SAFETENSORS_WEIGHTS_NAME}"
        )
    for file in (os.path.join(path, "adapter_config.json"), weights):
        if not os.path.isfile(file):
            raise InputError(f"{argument} {path}: there is no {os.path.basename(file)} in it; give an adapter's folder")
    settings = read_json_object(os.path.join(path, "adapter_config.json"))
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{argument} {path} is a {settings.get('peft_type')} adapter; give a LORA one")
    run = read_run(path)
    try:
        with safe_open(weights, "pt") as file:
            keys = list(file.keys())
        config = LoraConfig.from_pretrained(path)
    except (*BROKEN_MODEL, OSError) as error:
        raise InputError(f"{argument} {path} cannot be read: {one_line(error)}; is the file complete?") from error
    adapter = SavedAdapter(path, config, keys, run)
    for name in ("layer_replication", "alora_invocation_tokens", "arrow_config"):
        if getattr(config, name):
            raise InputError(
                f"{argument} {path} is a LoRA with {name}, which this toolkit does not know; give a plain one"
            )
    if adapter.base_changes is None:
        config.bias = "none"  # the base has no biases to train then, but PEFT takes only one adapter that wants to
    elif not alone:
        raise InputError(
            f"{argument} {path} changes {adapter.base_changes}, and with it every other model on this base; merge it with "
            "merge_lora.py and give the result as the base of all stages"
        )
    return adapter


def check_kind(adapter: SavedAdapter, argument: str, needs_score_head: bool) -> None:
    """Raise InputError when a reward adapter was given in the place of another one, or the other way round."""
    if needs_score_head and not adapter.has_score_head:
        raise InputError(
            f"{argument} {adapter.path} holds no score head, so it is no reward adapter; "
            "give one that reward_modeling.py wrote"
        )
    if not needs_score_head and adapter.has_score_head:
        raise InputError(f"{argument} {adapter.path} is a reward adapter; give one that sft_training.py wrote")


def check_adapter(
    adapter: SavedAdapter, argument: str, needs_score_head: bool, template: str, base: PreTrainedModel
) -> None:
    """Raise InputError when the adapter is of another kind, base or prompt template than this run's.

    An adapter without run.json was trained elsewhere: then the arguments decide, and one line says so.
    """
    check_kind(adapter, argument, needs_score_head)
    if not adapter.run:
        say(f"warning: {adapter.path} has no run.json, so its base and prompt template are taken from the arguments")
        return
    if not same_base(adapter.run["base_fingerprint"], base_fingerprint(base)):
        raise InputError(
            f"{argument} {adapter.path} was trained on the base {adapter.run['base_model']}, not on "
            f"{base.config._name_or_path}; give the same base in all stages"
        )
    if adapter.run["prompt_template"] != template:
        raise InputError(
            f"{argument} {adapter.path} was trained with the prompt template {adapter.run['prompt_template']!r}, "
            f"not {template!r}; give that one as --prompt_template"
        )


def load_adapter(model: PeftModel, adapter: SavedAdapter, name: str) -> None:
    """Add a frozen adapter under `name` and make sure that every tensor of its file went in; the model is in eval mode then.

    Raises InputError when shapes or names do not fit the base, or the adapters that are on it.
    """
    config, tensors = complete(model.get_base_model(), adapter, adapter.config)
    config.inference_mode = True
    with fitting(adapter.path):
        model.add_adapter(name, config)
        result = set_peft_model_state_dict(model, tensors, adapter_name=name)
    _check_loaded(model, result, adapter.path, name)
    model.set_requires_grad(name, requires_grad=False)
    model.eval()  # a new layer is in train mode, where its dropout acts


def attach_adapter(base: PreTrainedModel, adapter: SavedAdapter, config: LoraConfig, name: str = POLICY) -> PeftModel:
    """Wrap the base with a saved adapter under `name`.  Raises InputError when it does not fit the base.

    The base needs a `score` before a reward adapter is attached: see `add_score_head`.
    """
    # PEFT's own class for sequence classifiers has another forward(), which takes no job
    wrap = PeftModel if adapter.has_score_head else get_peft_model
    config, tensors = complete(base, adapter, config)
    config.base_model_name_or_path = base.config._name_or_path  # else PEFT warns where it has another path now
    with fitting(adapter.path):
        model = wrap(base, config, adapter_name=name)
        result = set_peft_model_state_dict(model, tensors, adapter_name=name)
    _check_loaded(model, result, adapter.path, name)
    return model


@contextlib.contextmanager
def fitting(folder: str) -> Iterator[None]:
    """One line for what PEFT raises where an adapter is of another base: other shapes, layers that are not there."""
    try:
        yield
    except BROKEN_MODEL as error:
        raise InputError(f"the adapter {folder} does not fit this base: {one_line(error)}") from error


def complete(base: PreTrainedModel, adapter: SavedAdapter, config: LoraConfig) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and tensors of an adapter with which PEFT keeps all that it changes beside the base.

    Some files hold a whole layer that the configuration does not name: an embedding (PEFT's save_embedding_layers), or a
    score head (an old PEFT).  PEFT writes the one into the base itself and loses the other.  Here such a layer becomes one
    of the modules_to_save, or is left out where it is the base's own.  Raises InputError for what cannot be.
    """
    config, tensors = copy.deepcopy(config), load_tensors(adapter.path)
    named = tuple(config.modules_to_save or ())
    layers = {name: bare_layer(module) for name, module in base.named_modules()}
    embeddings = [bare_layer(base.get_input_embeddings()), bare_layer(base.get_output_embeddings())]
    output = next(name for name, module in layers.items() if module is embeddings[1])
    changes = {layer_of(key) for key in tensors}
    if config.ensure_weight_tying and (output, LORA) in changes and not isinstance(config.target_modules, str):
        # PEFT finds the output that is tied to the embedding for the first adapter alone, so it is named here
        config.ensure_weight_tying, config.target_modules = False, {*config.target_modules, output}
    tied = embeddings[0].weight is embeddings[1].weight
    for layer in sorted(layer for layer, way in changes if way == WHOLE):
        weights = {key.rpartition(".")[2]: key for key in tensors if layer_of(key) == (layer, WHOLE)}
        module = layers.get(layer)
        rows = len(tensors[weights["weight"]]) if "weight" in weights else None
        if module in embeddings and rows not in (None, len(module.weight)):
            raise InputError(
                f"the adapter {adapter.path} has {rows} tokens in {layer}, this base {len(module.weight)}: it comes from a "
                "resized vocabulary; save the base with that size and give it in all stages"
            )
        if layer.endswith(named) or set(weights) == {"bias"}:  # of biases alone see `base_changes`
            continue
        is_own = all(_equal(getattr(module, name, None), tensors[key]) for name, key in weights.items())
        if (layer, LORA) in changes and not is_own and not module.weight.is_meta:
            raise InputError(
                f"the adapter {adapter.path} has {layer} both by LoRA and as a whole, and not as this base has it; give the "
                "base that it was trained on"
            )
        if is_own or (layer, LORA) in changes:
            for key in weights.values():
                del tensors[key]
            continue
        config.modules_to_save = [*(config.modules_to_save or ()), layer]
        if tied and module is embeddings[0] and (output, WHOLE) not in changes:  # PEFT would write into both
            config.modules_to_save.append(output)
            tensors[f"{PREFIX}{output}.weight"] = tensors[weights["weight"]]
    changes = {layer_of(key) for key in tensors}
    if tied and any(way == TOKENS and layers[layer] is embeddings[0] for layer, way in changes):
        changes.add((output, TOKENS))
    _check_beside(base, adapter.path, changes)
    return config, tensors


def load_tensors(folder: str) -> dict[str, Tensor]:
    """The tensors of an adapter's file.  Raises InputError when it cannot be read."""
    try:
        return load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
    except (*BROKEN_MODEL, OSError) as error:
        raise InputError(f"the adapter {folder} cannot be read: {one_line(error)}; is the file complete?") from error


def _equal(ours: Tensor | None, theirs: Tensor) -> bool:
    """Whether a tensor is the base's own, up to the float type in which it was saved; --plan has no numbers to compare."""
    if ours is None or ours.shape != theirs.shape or ours.is_meta:
        return False
    ours = ours.detach().cpu()
    return torch.equal(ours, theirs.to(ours.dtype)) or torch.equal(ours.to(theirs.dtype), theirs)


def _check_beside(base: PreTrainedModel, folder: str, changes: set[tuple[str, str]]) -> None:
    """Raise InputError where an adapter that is loaded changes the same layer in another way: PEFT cannot hold both."""
    kinds = {TrainableTokensWrapper: TOKENS, ModulesToSaveWrapper: WHOLE}  # all others are LoRA's
    held = {
        name: kinds.get(type(module), LORA)
        for name, module in base.named_modules()
        if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))
    }
    for layer, way in sorted(changes):
        for other, other_way in held.items():
            if way == other_way:
                continue
            inside = other_way == WHOLE and layer.startswith(f"{other}.")
            around = way == WHOLE and other.startswith(f"{layer}.")
            if layer == other or inside or around:
                raise InputError(
                    f"the adapter {folder} changes {layer} {way}, another one here {other} {other_way}; both cannot be on "
                    "one base: merge one of them with merge_lora.py, or train both alike"
                )


def load_weights(model: PeftModel, folder: str, name: str) -> None:
    """Fill the adapter `name`, which exists already, from a folder.  Raises InputError when it does not fit."""
    tensors = load_tensors(folder)
    with fitting(folder):
        if is_sharded(model):
            _fill_adapter(model, tensors, name)
            return
        result = set_peft_model_state_dict(model, tensors, adapter_name=name)
    _check_loaded(model, result, folder, name)


def is_of(parameter: str, name: str) -> bool:
    """Whether a parameter belongs to the adapter `name`, which stands inside its name or, for embeddings, at the end."""
    return name in parameter.split(".")


def saved_key(parameter: str, name: str) -> str:
    """What PEFT calls a parameter of the adapter `name` in a file."""
    key = parameter.replace(f".modules_to_save.{name}.", ".")
    key = re.sub(rf"\.{re.escape(name)}(?=\.|$)", "", key)
    return key.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def _fill_adapter(model: PeftModel, tensors: dict[str, Tensor], name: str) -> None:
    """As set_peft_model_state_dict, for a model that is spread over processes.  Raises KeyError for other names."""
    parameters = {saved_key(key, name): key for key, _ in model.named_parameters() if is_of(key, name)}
    if parameters.keys() != tensors.keys():
        raise KeyError(f"{sorted(parameters.keys() ^ tensors.keys())[0]} is not in both the model and the file")
    fill_parameters(model, {parameters[key]: value for key, value in tensors.items()})


def _check_loaded(model: PeftModel, result: Any, path: str, name: str) -> None:
    """Raise InputError unless every tensor of the file has found its place in the adapter, and is finite."""
    places = {key for key, _ in model.named_parameters() if is_of(key, name)}  # each once, under its first name
    missing = [key for key in result.missing_keys if key in places]  # not the base's, nor other adapters'
    if result.unexpected_keys or missing:
        raise InputError(
            f"the adapter {path} does not fit this base: {len(result.unexpected_keys)} of its tensors have no place, "
            f"{len(missing)} places stay empty (such as {(result.unexpected_keys + missing)[0]})"
        )
    for key, weight in model.named_parameters():
        if is_of(key, name) and not (weight.is_meta or weight.isfinite().all()):  # --plan has no numbers
            raise InputError(
                f"the adapter {path} holds NaN or infinity in {key}; its training failed, give another one"
            )


@contextlib.contextmanager
def use_adapter(model: PeftModel, *names: str) -> Iterator[None]:
    """Let these adapters act inside the block, none of them for the bare base, and leave requires_grad alone.

    PEFT's set_adapter also flips which parameters train, which breaks an optimizer or DDP that was built on them.
    """
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:  # each knows which adapters it has; what is saved whole is the base's own without one
            there = layer._get_available_adapters()
            layer._active_adapter = [name for name in names if name in there]
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def _for_own_adapters(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(method)
    def answer(self: TrainableTokensWrapper, adapter_name: str, *args: Any) -> dict[str, Any]:
        return method(self, adapter_name, *args) if adapter_name in self._adapters else {}

    return answer


# PEFT asks each layer with trained tokens for the tensors of every adapter that it loads or saves.  Of one that has none
# there, the answer of PEFT 0.21 is a KeyError.
for _method in ("adapter_state_dict", "adapter_state_dict_load_map"):
    setattr(TrainableTokensWrapper, _method, _for_own_adapters(getattr(TrainableTokensWrapper, _method)))
