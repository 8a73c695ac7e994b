"""Adapters on the shared base: their configurations, what lies in a saved folder, load, attach and switch."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from utils.arguments import LoraArguments
from utils.base_model import BROKEN_MODEL, base_fingerprint, same_base
from utils.console import InputError, one_line, say
from utils.files import read_json_object
from utils.sharding import fill_parameters, is_sharded

POLICY, REFERENCE, REWARD = "default", "reference", "reward"  # PEFT saves "default" at the root of a folder
CRITIC = "critic"  # and others in a folder of their name
SCORE_KEY = "base_model.model.score.weight"  # where PEFT keeps the head of a sequence classifier


# ---------------------------------------------------------------------------------------------------------------------
# New adapters
# ---------------------------------------------------------------------------------------------------------------------


def resolve_target_modules(names: str, base: PreTrainedModel) -> list[str]:
    """Layer names for LoRA: "all-linear", or names joined by | or a comma, checked against the decoder's linear layers.

    W_pack is Baichuan's name for q, k and v in one matrix; on a model with three it means those three.
    Raises InputError that lists the layers there are.
    """
    linear = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in base.base_model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
    )
    if names == "all-linear":
        return linear
    wanted = [name.strip() for name in names.replace("|", ",").split(",") if name.strip()]
    split = ["q_proj", "k_proj", "v_proj"]
    if "W_pack" in wanted and "W_pack" not in linear and set(split) <= set(linear):
        say("warning: this model has no W_pack; --lora_target_modules W_pack means q_proj, k_proj and v_proj here")
        wanted = [name for name in wanted if name != "W_pack"] + split
    unknown = [name for name in wanted if name not in linear]
    if unknown or not wanted:
        raise InputError(
            f"--lora_target_modules {names}: {', '.join(unknown) or 'nothing'} is no linear layer of this model; "
            f"it has {', '.join(linear)}"
        )
    return wanted


def new_lora_config(lora: LoraArguments, base: PreTrainedModel, task_type: str) -> LoraConfig:
    """LoRA configuration of a new adapter; task_type "SEQ_CLS" also trains and saves the score head."""
    return LoraConfig(
        task_type=task_type,
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=resolve_target_modules(lora.lora_target_modules, base),
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


def read_adapter(path: str | None, argument: str) -> SavedAdapter:
    """Look at the adapter folder that `argument` names.  Raises InputError when it is missing, incomplete or no LoRA."""
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
    return SavedAdapter(path, config, keys, run)


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
    """Add a frozen adapter under `name` and make sure that every tensor of its file went in.

    Raises InputError when shapes or names do not fit the base.
    """
    try:
        result = model.load_adapter(adapter.path, name, autocast_adapter_dtype=True)
    except BROKEN_MODEL as error:  # shapes of another base; target modules that it does not have
        raise InputError(f"the adapter {adapter.path} does not fit this base: {one_line(error)}") from error
    _check_loaded(model, result, adapter.path, name)
    model.set_requires_grad(name, requires_grad=False)


def attach_adapter(base: PreTrainedModel, adapter: SavedAdapter, config: LoraConfig) -> PeftModel:
    """Wrap the base with a saved adapter under the name "default".  Raises InputError when it does not fit the base.

    The base needs a `score` before a reward adapter is attached: see `add_score_head`.
    """
    # PEFT's own class for sequence classifiers has another forward(), which takes no job
    wrap = PeftModel if adapter.has_score_head else get_peft_model
    try:
        model = wrap(base, config, adapter_name=POLICY)
    except BROKEN_MODEL as error:  # target modules that this base does not have
        raise InputError(f"the adapter {adapter.path} does not fit this base: {one_line(error)}") from error
    load_weights(model, adapter.path, POLICY)
    return model


def load_weights(model: PeftModel, folder: str, name: str) -> None:
    """Fill the adapter `name`, which exists already, from a folder.  Raises InputError when it does not fit."""
    try:
        tensors = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        if is_sharded(model):
            _fill_adapter(model, tensors, name)
            return
        result = set_peft_model_state_dict(model, tensors, adapter_name=name)
    except (*BROKEN_MODEL, OSError) as error:
        raise InputError(f"the adapter {folder} does not fit this base: {one_line(error)}") from error
    _check_loaded(model, result, folder, name)


def saved_key(parameter: str, name: str) -> str:
    """What PEFT calls a parameter of the adapter `name` in a file."""
    return parameter.replace(f".modules_to_save.{name}.", ".").replace(f".{name}.", ".")


def _fill_adapter(model: PeftModel, tensors: dict[str, Tensor], name: str) -> None:
    """As set_peft_model_state_dict, for a model that is spread over processes.  Raises KeyError for other names."""
    parameters = {saved_key(key, name): key for key, _ in model.named_parameters() if f".{name}." in key}
    if parameters.keys() != tensors.keys():
        raise KeyError(f"{sorted(parameters.keys() ^ tensors.keys())[0]} is not in both the model and the file")
    fill_parameters(model, {parameters[key]: value for key, value in tensors.items()})


def _check_loaded(model: PeftModel, result: Any, path: str, name: str) -> None:
    """Raise InputError unless every tensor of the file has found its place in the adapter, and is finite."""
    missing = [key for key in result.missing_keys if f".{name}." in key]  # not the base's, nor other adapters'
    if result.unexpected_keys or missing:
        raise InputError(
            f"the adapter {path} does not fit this base: {len(result.unexpected_keys)} of its tensors have no place, "
            f"{len(missing)} places stay empty (such as {(result.unexpected_keys + missing)[0]})"
        )
    for key, weight in model.named_parameters():
        if f".{name}." in key and not (weight.is_meta or weight.isfinite().all()):  # --plan has no numbers
            raise InputError(
                f"the adapter {path} holds NaN or infinity in {key}; its training failed, give another one"
            )


@contextlib.contextmanager
def use_adapter(model: PeftModel, *names: str) -> Iterator[None]:
    """Let these adapters act inside the block, none of them for the bare base, and leave requires_grad alone.

    PEFT's set_adapter also flips which parameters train, which breaks an optimizer or DDP that was built on them.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = list(names)
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


# ---------------------------------------------------------------------------------------------------------------------
# The four parts of PPO on one base
# ---------------------------------------------------------------------------------------------------------------------
