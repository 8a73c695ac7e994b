"""One base model, many adapters: load, attach, switch, heads, save.

The base is always loaded as a causal language model and never changed.  SFT, reward and PPO adapters are LoRA weights
beside it; the score head and the value head are linear layers on the decoder's last hidden states.  Everything that
reads hidden states runs inside the model's own forward() (see `enable_jobs`), because DDP, FSDP and DeepSpeed only take
care of parameters that are used there.
"""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from utils.arguments import InputError, LoraArguments, ModelArguments, one_line, say
from utils.sharding import fill_parameters, is_sharded, loading_whole

POLICY, REFERENCE, REWARD = "default", "reference", "reward"  # PEFT saves "default" at the root of a folder
CRITIC = "critic"  # and others in a folder of their name
SMALLEST_PART = 8  # rows that go through the model together on a GPU, whatever their lengths
MEMBER = "member"  # further adapters of a reward ensemble: member1, member2 ...
VALUE_HEAD_FILE = "value_head.safetensors"
# What torch, PEFT, transformers and safetensors raise for files that are cut or damaged, or of another model.
BROKEN_MODEL = (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)
SCORE_KEY = "base_model.model.score.weight"  # where PEFT keeps the head of a sequence classifier


# ---------------------------------------------------------------------------------------------------------------------
# The base
# ---------------------------------------------------------------------------------------------------------------------


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """Tokenizer of the base, with a pad token (its own, else <unk>, else EOS: padding is told by masks, never by id).

    Raises InputError when there is none, or it has no EOS.
    """
    name = model_args.model_name_or_path
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):  # the hub's complaint is about its naming rules
        raise InputError(f"there is no folder {name}; check --model_name_or_path")
    refuse_baichuan(name)
    if model_args.trust_remote_code:
        say(f"warning: --trust_remote_code: {name} may run code of its own: {', '.join(remote_code(name)) or 'none'}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=model_args.trust_remote_code)
    except Exception as error:  # the tokenizers library raises this very class for a file that it cannot read
        raise _cannot_load("a tokenizer from", name, error) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no EOS token, so a reply could never end; set eos_token in it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def refuse_baichuan(name: str) -> None:
    """Raise InputError for Baichuan's own layout, told by config.json alone.

    Its remote code does not run on transformers 5, and asks on the terminal whether it may before it fails.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError):  # no such model: the loading that follows says what is wrong
        return
    if config.get("model_type") == "baichuan":
        raise InputError(
            f"{name} is a Baichuan model, whose own code does not run on this transformers; convert a download of it "
            "once with `python scripts/baichuan/convert.py --model FOLDER --output NEW_FOLDER` and give NEW_FOLDER"
        )


def _cannot_load(what: str, name: str, error: Exception) -> InputError:
    if "trust_remote_code" in str(error):
        code = ", ".join(remote_code(name)) or "not named"
        advice = f"it needs code of its own ({code}); add --trust_remote_code true only if you have read and trust it"
        return InputError(f"cannot load {what} {name}: {advice}")
    return InputError(f"cannot load {what} {name}: {one_line(error)}; give a complete model")


def remote_code(name: str) -> list[str]:
    """The classes, as module.Class, that the configuration of a model names as its own code."""
    classes = set()
    for file in (CONFIG_NAME, "tokenizer_config.json"):
        try:
            auto_map = PreTrainedConfig.get_config_dict(name, _configuration_file=file)[0].get("auto_map") or {}
        except (OSError, ValueError):  # no such file
            continue
        values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
        for value in values:
            classes |= {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)}
    return sorted(classes)


def base_config(model_args: ModelArguments) -> PreTrainedConfig:
    """Configuration of the base.  Raises InputError when it cannot be read."""
    name = model_args.model_name_or_path
    refuse_baichuan(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=model_args.trust_remote_code)
    except (*BROKEN_MODEL, OSError, ImportError) as error:
        raise _cannot_load("the base model", name, error) from error


def load_base(
    model_args: ModelArguments, dtype: torch.dtype | str, device: torch.device | None = None
) -> PreTrainedModel:
    """The base as a causal language model, in eval mode, nothing trainable.  Raises InputError when it cannot be loaded.

    Only safetensors are read: other formats are pickles, which can run code.  dtype: "auto" is the type that the weights
    are stored in.  device: where a base in 4 bit goes, by default the GPU where there is one; any other base is loaded to
    the CPU.
    """
    name = model_args.model_name_or_path
    base_config(model_args)  # a readable complaint before gigabytes are read
    if os.path.isdir(name) and not any(file.endswith(".safetensors") for file in os.listdir(name)):
        raise InputError(
            f"cannot load the base model {name}: there is no .safetensors file in it, and other formats can run code; "
            "download or save it as safetensors"
        )
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model_args.trust_remote_code}
    if model_args.load_in_4bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("--load_in_4bit needs bitsandbytes; run `pip install -r requirements-4bit.txt`")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = None if device is None else {"": device}
    try:
        with loading_whole():
            model, report = AutoModelForCausalLM.from_pretrained(
                name, use_safetensors=True, output_loading_info=True, **options
            )
    except (*BROKEN_MODEL, OSError, ImportError) as error:  # bitsandbytes, too, where it cannot use this machine
        raise _cannot_load("the base model", name, error) from error
    if report["missing_keys"]:  # transformers would train on with random numbers in their place
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"the base model {name} is not complete: it has no weights for {missing[0]} and {len(missing) - 1} more; "
            "download it again"
        )
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weights the first time that no gradient is wanted, and
        # from then on lets no gradient through it, nor float32.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # A model's own generation defaults (Qwen's repetition_penalty, top_p ...) must not change what PPO samples.
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id, eos_token_id=model.generation_config.eos_token_id
    )
    return model.requires_grad_(False).eval()


def base_fingerprint(base: PreTrainedModel) -> str:
    """Short hash that tells two bases apart, whatever folder they lie in and whichever float type they are loaded as.

    Two parts with a dash between: of the embedding, and of all other matrices, which are not the same after a merge.  In
    4 bit only the embedding is as it was, so the second part is missing then, see `same_base`.  Adapters on the base and
    heads do not count.
    """
    embedding = base.get_input_embeddings().weight
    shape = repr((type(base).__name__, tuple(embedding.shape)))
    matrices = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters()
        if parameter.dim() == 2 and parameter is not embedding
        if "lora_" not in name and not name.startswith(("score.", "v_head."))
    }
    parts = [_sample_hash(shape, [embedding])]
    if all(matrix.is_floating_point() for matrix in matrices.values()):
        parts.append(_sample_hash(shape, [matrices[name] for name in sorted(matrices)]))
    return "-".join(parts)


def _sample_hash(shape: str, matrices: Sequence[Tensor]) -> str:
    """Hash of some 64 rows of each matrix, spread over it and rounded to bfloat16."""
    digest = hashlib.sha256(shape.encode())
    for matrix in matrices:
        rows = matrix.detach()[:: max(1, len(matrix) // 64)]
        digest.update(rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints agree in the parts that both have."""
    return all(a == b for a, b in zip(one.split("-"), other.split("-"), strict=False))


def hidden_width(base: PreTrainedModel) -> int:
    """Width of the decoder's last hidden states, which is what the output embedding and the heads read."""
    return base.get_output_embeddings().weight.shape[1]


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0, the ones that are plain numbers in an attention module included.

    PPO compares log-probs of the same tokens over time; with dropout the first ratio would not be 1 (Ziegler 2019).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Jobs: code that runs inside forward() on the last hidden states
# ---------------------------------------------------------------------------------------------------------------------

Job = Callable[[PreTrainedModel, Tensor], Any]  # (base, last hidden states [B, L, H]) -> tensors


def enable_jobs(base: PreTrainedModel) -> None:
    """Teach forward() one more argument: `job`, called with the base and the last hidden states instead of the LM head.

    attention_mask is always given; with past_key_values it covers the cached tokens too.  Without `job`, forward() is what
    it was, so generate() and everything else still work.  Has to be called before PEFT wraps the base.
    """
    plain_forward = base.forward
    decoder = base.base_model
    takes_positions = "position_ids" in inspect.signature(type(decoder).forward).parameters

    @functools.wraps(type(base).forward)  # generate() checks its arguments against this signature
    def forward(self: PreTrainedModel, *args: Any, job: Job | None = None, **inputs: Any) -> Any:
        if job is None:
            return plain_forward(*args, **inputs)
        ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], inputs.get("past_key_values")
        extra = {} if cache is None else {"past_key_values": cache}
        if takes_positions:  # for left padding; with a cache the mask also covers the tokens in it
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        decoder = self.base_model
        output = decoder(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **extra)
        return job(self, output.last_hidden_state)

    base.forward = types.MethodType(forward, base)


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Index of the last real token of each row, int64 [B]; mask [B, L] is 1 on real tokens, padding on either side."""
    return attention_mask.shape[1] - 1 - attention_mask.flip(1).long().argmax(1)


def score_job(attention_mask: Tensor, adapter: str) -> Job:
    """Job that gives one score a row, float32 [B]: the head of `adapter` read at the last real token."""

    def job(base: PreTrainedModel, hidden: Tensor) -> Tensor:
        head = base.score.modules_to_save[adapter]
        rows = torch.arange(len(hidden), device=hidden.device)
        last = hidden[rows, last_token_index(attention_mask)]  # [B, H]
        with torch.autocast(hidden.device.type, enabled=False):  # the head stays float32: scores differ by little
            return nn.functional.linear(last.float(), head.weight.float()).squeeze(-1)

    return job


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


def new_reward_model(
    base: PreTrainedModel, lora: LoraArguments, seed: int, ensemble_size: int = 1
) -> tuple[PeftModel, list[str]]:
    """Base + new reward adapters with a score head each, the only trainable parts; and the names of the adapters."""
    enable_jobs(base)
    members = [POLICY, *(f"{MEMBER}{number}" for number in range(1, ensemble_size))]
    configs = {name: new_lora_config(lora, base, "SEQ_CLS") for name in members}  # before PEFT renames the layers
    add_score_head(base, seed)
    model = PeftModel(base, configs[POLICY])
    for name in members[1:]:
        model.add_adapter(name, configs[name])
    for name in members:
        model.set_requires_grad(name, requires_grad=True)
    return model, members


def member_folders(folder: str) -> list[str]:
    """The adapters of a saved reward model: the folder itself, and those of the rest of its ensemble in it."""
    folders = [folder]
    while os.path.isdir(os.path.join(folder, f"{MEMBER}{len(folders)}")):
        folders.append(os.path.join(folder, f"{MEMBER}{len(folders)}"))
    return folders


def part_size(rows: int, smallest: int = SMALLEST_PART) -> int:
    """So many of `rows` rows are worth a pass of their own, to save the padding that only the longest ones need."""
    return max(smallest, rows // 4)


def sft_part_size(rows: int, device: torch.device) -> int:
    """`part_size` in stage 1, which may be smaller on a CPU: there a pass costs nothing but its tokens."""
    return part_size(rows, 2 if device.type == "cpu" else SMALLEST_PART)


def member_scores(
    model: nn.Module, inputs: dict[str, Tensor], members: Sequence[str], part_rows: int | None = None
) -> Iterator[Tensor]:
    """Score of each row by each reward adapter, float32 [B] a member.  model: a PeftModel, or one wrapped for DDP.

    inputs: input_ids and attention_mask [B, L], padded on the right.  With `part_rows` the rows go through the model so many
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
                scores.append(model(input_ids=ids[rows, : own.shape[1]], attention_mask=own, job=score_job(own, name)))
            yield torch.cat(scores)[torch.cat(parts).argsort()]


def ensemble_score(scores: Sequence[Tensor], penalty: float) -> Tensor:
    """Mean over the members minus `penalty` standard deviations (of the population), [B]; one member: its score.

    What only some of the members like is what a policy would exploit (Coste et al. 2023, arXiv:2310.02743).
    """
    stacked = torch.stack(list(scores))  # [members, B]
    return stacked.mean(0) - penalty * stacked.std(0, unbiased=False)


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


def read_json_object(path: str) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file.  Raises InputError when the file is something else."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {one_line(error)}; is the file complete?") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object; restore the file or remove it")
    return content


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


# ---------------------------------------------------------------------------------------------------------------------
# The four parts of PPO on one base
# ---------------------------------------------------------------------------------------------------------------------


def assemble_ppo_model(
    base: PreTrainedModel, sft: SavedAdapter, reward: SavedAdapter, critic: bool = False
) -> PeftModel:
    """Base + policy (a trainable copy of the SFT adapter), reference (the SFT adapter), reward adapter, value head.

    Only the policy adapter and the value head are trainable; the head starts at 0 (Ziegler et al. 2019).  With `critic`
    there is also a trainable copy of the reward adapter, for the value head to read: see `start_critic`.
    """
    enable_jobs(base)
    config = LoraConfig.from_pretrained(sft.path)
    config.inference_mode = False  # what PEFT saves always says True, and then nothing would train
    config.lora_dropout = 0.0
    model = attach_adapter(base, sft, config)
    load_adapter(model, sft, REFERENCE)
    add_score_head(base)
    load_reward(model, reward)
    if critic:
        load_adapter(model, reward, CRITIC)
    base.v_head = nn.Linear(hidden_width(base), 1, device=base.device, dtype=torch.float32)
    nn.init.zeros_(base.v_head.weight)
    nn.init.zeros_(base.v_head.bias)
    disable_dropout(model)
    model.set_adapter(POLICY)
    for name, parameter in model.named_parameters():  # PEFT flips requires_grad in many places: say it once, here
        trains = f".{POLICY}." in name or ".v_head." in name or (f".{CRITIC}." in name and "lora_" in name)
        parameter.requires_grad_(trains)
    return model.eval()


def start_critic(model: PeftModel, mean: float, std: float) -> None:
    """Let the value head start as the reward model's own: the normalised score of a reply as it is so far."""
    base = model.get_base_model()
    base.v_head.weight.data.copy_(base.score.modules_to_save[CRITIC].weight / std)
    base.v_head.bias.data.fill_(-mean / std)


def save_value_head(state_dict: dict[str, Tensor], folder: str) -> None:
    """Write the value head out of a model's state dict to `folder`."""
    head = {name.rsplit(".", 1)[-1]: value for name, value in state_dict.items() if ".v_head." in name}
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in head.items()}, os.path.join(folder, VALUE_HEAD_FILE)
    )


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
