"""Saved adapters on the shared base: what lies in a folder, load, attach, switch."""

import contextlib
import copy
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lora.base_model import BROKEN_MODEL, bare_layer, base_fingerprint, same_base
from lora.sharding import fill_parameters, is_sharded
from utils.console import InputError, one_line, say
from utils.files import read_json_object

POLICY, REFERENCE, REWARD = "default", "reference", "reward"  # PEFT saves "default" at the root of a folder
CRITIC = "critic"  # and others in a folder of their name
PREFIX = "base_model.model."  # of every key in an adapter's file
SCORE_KEY = f"{PREFIX}score.weight"  # where PEFT keeps the head of a sequence classifier
LORA, TOKENS, WHOLE = "by LoRA", "token by token", "as a whole"  # how an adapter changes a layer of the base
# Ways to start LoRA that take the first product of its matrices off the base, again each time that PEFT loads it.
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    whole = config.modules_to_save or []
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        raise InputError(
            f"{argument} {path}: modules_to_save in its adapter_config.json is {json.dumps(whole)[:60]}, not a list of "
            'names; give the layers that the adapter has as a whole, as ["lm_head"], or null'
        )
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


def attach_adapter(
    base: PreTrainedModel, adapter: SavedAdapter, config: LoraConfig, name: str = POLICY, new_head: bool = False
) -> PeftModel:
    """Wrap the base with a saved adapter under `name`.  Raises InputError when it does not fit the base.

    The base needs a `score` before a reward adapter is attached: see `add_score_head`.  new_head: an adapter without a head
    of its own gets the base's.
    """
    # PEFT's own class for sequence classifiers has another forward(), which takes no job
    wrap = PeftModel if adapter.has_score_head or new_head else get_peft_model
    config, tensors = complete(base, adapter, config)
    if new_head:
        config.task_type, config.modules_to_save = "SEQ_CLS", [*(config.modules_to_save or ()), "score"]
        tensors[SCORE_KEY] = base.score.weight.detach()
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
    except (*BROKEN_MODEL, ImportError, IndexError) as error:  # Megatron's layers; a token's number that is none
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
