"""Put a downloaded Baichuan-7B or Baichuan2-7B folder into Llama's layout, which transformers runs without remote code.

    pip install -r requirements-baichuan.txt
    python scripts/convert_baichuan.py --model DOWNLOADED --output models/baichuan2-7b [--adapter W_PACK_ADAPTER ...]

Both generations are Llama with the attention's q, k and v in one matrix, `W_pack`: its rows are split in three, and
nothing else changes.  Baichuan2 also normalises the rows of its output head in each forward pass; they are written
normalised.  The 13B models have ALiBi instead of rotary positions and cannot be converted.

An adapter that was trained on W_pack becomes one on q_proj, k_proj and v_proj with the same outputs: the three share
the first LoRA matrix, and the second is split like W_pack.  It is written to OUTPUT/adapters/NAME.

No code of the downloaded folder is run, and its .bin files are read as plain tensors (torch's weights_only).  One file
of weights is in memory at a time.  Names, shapes and checksums of all that was written, and the ids of the tokenizer,
are checked before the folder gets its name; a run that fails leaves nothing behind.
"""

import json
import os
import pickle
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from scripts.baichuan.bpe import check_tokenizer, fast_tokenizer, read_sentencepiece
from utils.arguments import check_new_folder, parse_arguments
from utils.console import InputError, one_line, say
from utils.files import folder_when_done, write_json

BAICHUAN2_VOCABULARY = 125696
SPLIT = ("q_proj", "k_proj", "v_proj")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("max_position_embeddings",)
HEAD = "lm_head.weight"
HEAD_ROWS = 4096  # rows of the head that are normalised at a time, in float32
# One file of weights, or an index of several: safetensors first, where a folder has both.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


Shapes = dict[str, torch.Size]


class Checksum(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size
    crc: int  # of the bytes


@dataclass
class ConvertArguments:
    """What to convert, and where to."""

    model: str = field(metadata={"help": "Downloaded folder of Baichuan-7B or Baichuan2-7B, Base or Chat."})
    output: str = field(metadata={"help": "Folder to write, missing or empty."})
    adapter: list[str] | None = field(
        default=None,
        metadata={"help": "LoRA adapters on W_pack of this model, to be converted to OUTPUT/adapters/NAME."},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_json(*path: str) -> dict[str, Any]:
    """The JSON object in a file.  Raises InputError when there is none."""
    name = os.path.join(*path)
    try:
        with open(name, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {name}: {one_line(error)}; give a folder that was downloaded whole") from error
    if not isinstance(content, dict):
        raise InputError(f"{name} holds a {type(content).__name__}, not an object; download it again")
    return content


def read_config(folder: str) -> dict[str, Any]:
    """config.json of a Baichuan 7B.  Raises InputError for every other model."""
    config = read_json(folder, "config.json")
    kind = config.get("model_type")
    if kind != "baichuan":
        raise InputError(f"--model {folder} is of type {kind}, not baichuan; only Baichuan models need this conversion")
    if "max_position_embeddings" not in config or config.get("hidden_size") == 5120:
        raise InputError(
            f"--model {folder} is a Baichuan 13B, which has ALiBi instead of rotary positions and no counterpart in "
            "transformers; give a 7B"
        )
    if "quantization_config" in config:
        raise InputError(f"--model {folder} is quantized; give the folder with the 16-bit weights")
    missing = [name for name in SIZES if not isinstance(config.get(name), int) or config[name] < 1]
    if missing:
        raise InputError(f"the config.json of {folder} has no number for {', '.join(missing)}; download it again")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"--model {folder} uses {config['hidden_act']}, where Baichuan has silu; give a Baichuan folder"
        )
    return config


def normalises_head(folder: str, config: dict[str, Any]) -> bool:
    """Whether this is the second generation, whose head is normalised: told by its code, read as text, or its config."""
    code = os.path.join(folder, "modeling_baichuan.py")
    if os.path.isfile(code):
        with open(code, encoding="utf-8", errors="replace") as file:
            if "class NormHead" in file.read():
                return True
    return config["vocab_size"] == BAICHUAN2_VOCABULARY or "z_loss_weight" in config


def weight_files(folder: str) -> list[str]:
    """Paths of the files of weights.  Raises InputError when there are none, or some are missing."""
    for name in WEIGHTS:
        index = os.path.join(folder, f"{name}.index.json")
        if os.path.isfile(index):
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
        elif os.path.isfile(os.path.join(folder, name)):
            names = [name]
        else:
            continue
        missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
        if missing or not names:
            raise InputError(
                f"{folder} lacks {', '.join(missing) or 'all files of weights'}, which {os.path.basename(index)} "
                "lists; download the rest"
            )
        return [os.path.join(folder, name) for name in names]
    raise InputError(f"there is no {' or '.join(WEIGHTS)} in {folder}, nor a list of parts; give a downloaded folder")


def read_tensors(path: str) -> dict[str, Tensor]:
    """All tensors of a .safetensors or .bin file; nothing that a .bin file says is run.

    Raises InputError when the file is damaged, or holds anything but tensors.
    """
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # also what weights_only raises on a pickle that calls a function
        raise InputError(
            f"{path} is damaged, or holds other things than tensors, which are not loaded; download it again"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}; download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{path} does not hold tensors by name; give a downloaded folder")
    return {name: tensor.detach() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Converting
# ---------------------------------------------------------------------------------------------------------------------


def llama_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The same shape in Llama's terms.  Raises InputError when it is no model, or too small for the tokenizer."""
    if len(tokenizer) > config["vocab_size"]:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} pieces, but the model only {config['vocab_size']}; download both again"
        )
    optional = ("initializer_range", "rms_norm_eps")
    try:
        return LlamaConfig(
            **{name: config[name] for name in SIZES},
            **{name: config[name] for name in optional if name in config},
            num_key_value_heads=config["num_attention_heads"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},  # a constant in Baichuan's code
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            architectures=["LlamaForCausalLM"],
        )
    except StrictDataclassError as error:  # numbers that do not fit together, or text for a number
        raise InputError(f"config.json makes no model: {one_line(error)}; download it again") from error


def normalise_rows(weight: Tensor) -> None:
    """Give each row [V, H] length 1, in place: computed in float32, rounded once to the type of `weight`.

    The head is a large part of a file of weights: a second one would not fit into the memory that we promise.
    """
    for rows in weight.split(HEAD_ROWS):
        rows.copy_(torch.nn.functional.normalize(rows.float(), dim=1))


def split_rows(name: str, tensor: Tensor, hidden_size: int) -> Iterator[tuple[str, Tensor]]:
    """A tensor whose rows belong to q, k and v, as three with their names.  Raises InputError when its size is wrong."""
    if tensor.shape[0] != len(SPLIT) * hidden_size:
        raise InputError(
            f"{name} has {tensor.shape[0]} rows, not the {len(SPLIT)} x {hidden_size} of this model; "
            "give the model and the adapters that belong together"
        )
    for projection, part in zip(SPLIT, tensor.split(hidden_size), strict=True):
        yield name.replace("W_pack", projection), part.contiguous()


def convert_weights(tensors: dict[str, Tensor], hidden_size: int, normalise: bool) -> Iterator[tuple[str, Tensor]]:
    """Llama's names and tensors for the tensors of one file."""
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):  # a constant, which Llama computes
            continue
        if not tensor.is_floating_point():
            raise InputError(f"{name} holds {tensor.dtype}: these weights are quantized; give the 16-bit ones")
        if name.endswith(".W_pack.weight"):
            yield from split_rows(name, tensor, hidden_size)
        else:
            if name == HEAD and normalise:
                normalise_rows(tensor)
            yield name, tensor.contiguous()


def checksum(tensor: Tensor) -> Checksum:
    """What a tensor has to be when it is read back."""
    return Checksum(tensor.dtype, tensor.shape, zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy()))


def write_file(source: str, target: str, config: LlamaConfig, normalise: bool, shapes: Shapes) -> dict[str, Checksum]:
    """Convert one file of weights; returns the checksum of each tensor.

    Raises InputError when a tensor does not belong to the model, whose tensors `shapes` gives.
    """
    part = dict(convert_weights(read_tensors(source), config.hidden_size, normalise))
    for name, tensor in part.items():
        if shapes.get(name) != tensor.shape:
            wanted = f"expected {list(shapes[name])}" if name in shapes else "this model has no such tensor"
            raise InputError(
                f"{source} holds {name} {list(tensor.shape)}, but {wanted}; give a folder of Baichuan-7B or Baichuan2-7B "
                "as it was downloaded"
            )
    save_file(part, target, metadata={"format": "pt"})
    return {name: checksum(tensor) for name, tensor in part.items()}


def write_weights(files: list[str], config: LlamaConfig, normalise: bool, folder: str) -> dict[str, Checksum]:
    """Convert file by file, with an index where they are several, then read everything back.

    Returns the checksum of each tensor.  Raises InputError when the tensors are not all those of the model.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    places: dict[str, str] = {}
    sums: dict[str, Checksum] = {}
    for number, source in enumerate(files, start=1):
        say(f"converting {source}")
        target = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else WEIGHTS[0]
        found = write_file(source, os.path.join(folder, target), config, normalise, shapes)
        sums |= found
        places |= dict.fromkeys(found, target)
    missing = sorted(set(shapes) - set(sums))
    if missing:
        raise InputError(
            f"{os.path.dirname(files[0])} lacks {len(missing)} tensors, such as {missing[0]}; download it again"
        )
    if len(files) > 1:
        size = sum(one.shape.numel() * one.dtype.itemsize for one in sums.values())
        write_json({"metadata": {"total_size": size}, "weight_map": places}, folder, f"{WEIGHTS[0]}.index.json")
    for target in sorted(set(places.values())):
        with safe_open(os.path.join(folder, target), "pt") as file:
            for name, place in places.items():
                if place == target and checksum(file.get_tensor(name)) != sums[name]:
                    raise InputError(f"{name} is read back otherwise than it was written; check the disk and try again")
    return sums


def write_configs(source: str, config: LlamaConfig, folder: str) -> None:
    """config.json and generation_config.json, with the generation defaults of the source where it has some."""
    config.save_pretrained(folder)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    has_defaults = os.path.isfile(os.path.join(source, "generation_config.json"))
    try:
        generation = GenerationConfig.from_pretrained(source) if has_defaults else GenerationConfig()
        generation.update(**ids)
        generation.save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot use the generation_config.json of {source}: {one_line(error)}; download it again, or remove it"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


def convert_adapter(source: str, model: str, hidden_size: int, normalise: bool, folder: str) -> None:
    """Write the W_pack adapter in `source` as one for the converted model `model` to `folder`.

    Raises InputError when it is no LoRA adapter on W_pack, or of a kind whose conversion would not be exact.
    """
    config = read_json(source, CONFIG_NAME)
    files = [os.path.join(source, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    path = next((file for file in files if os.path.isfile(file)), None)
    if path is None:
        raise InputError(f"--adapter {source}: there is no {SAFETENSORS_WEIGHTS_NAME} in it; give an adapter's folder")
    tensors = read_tensors(path)
    if config.get("peft_type") != "LORA" or not any(".W_pack." in name for name in tensors):
        raise InputError(f"--adapter {source} is no LoRA adapter on W_pack, so there is nothing to convert in it")
    if normalise and any("lm_head" in name for name in tensors):
        raise InputError(f"--adapter {source} changes the output head, which Baichuan2 normalises after the change")
    if any("W_pack" in pattern for name in ("rank_pattern", "alpha_pattern") for pattern in config.get(name) or {}):
        raise InputError(
            f"--adapter {source} gives W_pack a rank of its own; only one rank for all layers is converted"
        )

    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".W_pack.lora_A.weight"):
            converted.update({name.replace("W_pack", projection): tensor.clone() for projection in SPLIT})
        elif name.endswith(".W_pack.lora_B.weight"):
            converted.update(split_rows(name, tensor, hidden_size))
        elif ".W_pack." in name:
            raise InputError(f"--adapter {source} holds {name}; only plain LoRA matrices can be converted")
        else:
            converted[name] = tensor.contiguous()
    config["target_modules"] = sorted(
        {name.split(".lora_")[0].split(".")[-1] for name in converted if ".lora_" in name}
    )
    config["base_model_name_or_path"] = model
    config["auto_mapping"] = None  # it names the class of the remote code
    os.makedirs(folder)
    write_json(config, folder, CONFIG_NAME)
    save_file(converted, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})


def adapter_names(paths: list[str]) -> dict[str, str]:
    """Name of the folder to write -> adapter.  Raises InputError where two have the same name."""
    names = {os.path.basename(os.path.realpath(path)): path for path in paths}
    if len(names) < len(paths):
        raise InputError(f"two of --adapter {' '.join(paths)} have the same name; rename one")
    return names


def main() -> None:
    # ---- Arguments ----
    (args,) = parse_arguments((ConvertArguments,), description="Baichuan-7B or Baichuan2-7B -> Llama's layout.")
    target = os.path.realpath(args.output)
    check_new_folder(args.output, argument="--output")
    config = read_config(args.model)
    normalise = normalises_head(args.model, config)
    files = weight_files(args.model)
    adapters = adapter_names(args.adapter or [])
    say(f"{args.model} is a Baichuan{'2' if normalise else ''}-7B")

    with folder_when_done(target) as folder:
        # ---- Configuration and tokenizer ----
        proto, processor = read_sentencepiece(os.path.join(args.model, "tokenizer.model"))
        tokenizer = fast_tokenizer(proto)
        llama = llama_config(config, tokenizer)
        tokenizer.save_pretrained(folder)
        write_configs(args.model, llama, folder)
        others = check_tokenizer(AutoTokenizer.from_pretrained(folder), proto, processor)
        if others:
            say(f"warning: {others} texts made of the whole vocabulary get other ids than from sentencepiece")

        # ---- Adapters and weights ----
        for name, path in adapters.items():
            place = os.path.join(folder, "adapters", name)
            convert_adapter(path, target, llama.hidden_size, normalise, place)
        sums = write_weights(files, llama, normalise, folder)
        llama.dtype = sums[HEAD].dtype
        llama.save_pretrained(folder)
    say(f"converted model: {args.output} ({len(sums)} tensors, {llama.dtype})")
    for name in adapters:
        say(f"converted adapter: {os.path.join(args.output, 'adapters', name)}")
