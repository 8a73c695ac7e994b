"""The base model and its tokenizer: load, refuse what cannot work, tell two bases apart.

The base is always loaded as a causal language model, and never changed.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
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
from transformers.utils import CONFIG_NAME

from lora.sharding import loading_whole
from utils.arguments import ModelArguments
from utils.console import InputError, one_line, say

# What torch, PEFT, transformers and safetensors raise for files that are cut or damaged, or of another model.
BROKEN_MODEL = (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """Tokenizer of the base, with a pad token (its own, else <unk>, else EOS: padding is told by masks, never by id).

    Raises InputError when there is none, or it has no EOS.
    """
    name = model_args.model_name_or_path
    if is_missing_folder(name):
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


def is_missing_folder(name: str) -> bool:
    """Whether a name is that of a folder which is not there; the hub's complaint would be about its naming rules."""
    return name.startswith((".", "/", "~")) and not os.path.isdir(name)


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
            "once with `python scripts/convert_baichuan.py --model FOLDER --output NEW_FOLDER` and give NEW_FOLDER"
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


def base_config(model_args: ModelArguments, what: str = "the base model") -> PreTrainedConfig:
    """Configuration of the base, or of `what` else.  Raises InputError when it cannot be read."""
    name = model_args.model_name_or_path
    refuse_baichuan(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=model_args.trust_remote_code)
    except (*BROKEN_MODEL, OSError, ImportError) as error:
        raise _cannot_load(what, name, error) from error


def load_safetensors(
    kind: type,
    what: str,
    model_args: ModelArguments,
    dtype: torch.dtype | str,
    device: torch.device | None = None,
    heads: Sequence[str] | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """A model of an Auto class, as it is stored, and the names of the weights that its files do not have.

    Only safetensors are read: other formats are pickles, which can run code.  what: the model in words; dtype: "auto" is the
    type that the weights are stored in.  device: where a model in 4 bit goes, by default the GPU where there is one; any
    other one is loaded to the CPU.  heads: what 4 bit leaves whole, by default the output embedding.  Raises InputError when
    it cannot be loaded.
    """
    name = model_args.model_name_or_path
    base_config(model_args, what)  # a readable complaint before gigabytes are read
    if os.path.isdir(name) and not any(file.endswith(".safetensors") for file in os.listdir(name)):
        raise InputError(
            f"cannot load {what} {name}: there is no .safetensors file in it, and other formats can run code; "
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
            llm_int8_skip_modules=heads,
        )
        options["device_map"] = None if device is None else {"": device}
    try:
        with loading_whole():
            model, report = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    except (*BROKEN_MODEL, OSError, ImportError) as error:  # bitsandbytes, too, where it cannot use this machine
        raise _cannot_load(what, name, error) from error
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weights the first time that no gradient is wanted, and
        # from then on lets no gradient through it, nor float32.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, sorted(report["missing_keys"])


def load_base(
    model_args: ModelArguments, dtype: torch.dtype | str, device: torch.device | None = None
) -> PreTrainedModel:
    """The base as a causal language model, in eval mode, nothing trainable.  Raises InputError when it cannot be loaded.

    dtype, device: as in `load_safetensors`.
    """
    model, missing = load_safetensors(AutoModelForCausalLM, "the base model", model_args, dtype, device)
    if missing:  # transformers would train on with random numbers in their place
        raise InputError(
            f"the base model {model_args.model_name_or_path} is not complete: it has no weights for {missing[0]} and "
            f"{len(missing) - 1} more; download it again"
        )
    # A model's own generation defaults (Qwen's repetition_penalty, top_p ...) must not change what PPO samples.
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id, eos_token_id=model.generation_config.eos_token_id
    )
    model.requires_grad_(False).eval()
    check_causal(model)
    return model


def text_decoder(base: PreTrainedModel) -> nn.Module:
    """The part that makes hidden states of token ids, without the output embedding."""
    decoder = base.base_model
    return base.model if decoder is base else decoder  # Llama 4 has it under another name than it says


def same_numbers(found: Tensor, expected: Tensor, base: nn.Module) -> bool:
    """Whether two computations of the same vectors [N, H] agree, but for rounding.

    In 16 bits, and on a GPU, rounding may send a token to other experts, which changes everything about it: then most of the
    vectors have to agree, and to fewer digits.
    """
    differences = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    if base.dtype == torch.float32 and found.device.type == "cpu":
        return bool(differences.max() < 1e-3)  # NaN is not the same
    return bool(differences.median() < 5e-2)


@torch.no_grad()
def check_causal(base: PreTrainedModel) -> None:
    """Make sure that what the base says of a token depends on the tokens in front of it alone.  Raises InputError."""
    device = next(base.parameters()).device
    count = base.get_input_embeddings().num_embeddings
    rows = torch.randint(count, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(rows)
    mask[1, 7:] = 0  # the first row goes on behind its 7th token, the second has padding there
    found = base(input_ids=rows, attention_mask=mask).logits[:, :7]
    expected = base(input_ids=rows[:, :7], attention_mask=mask[:, :7]).logits
    for row, what in enumerate(("later tokens", "the padding behind a row")):
        if not same_numbers(found[row].float(), expected[row].float(), base):
            raise InputError(
                f"{type(base).__name__} is no causal language model as it stands: what it says of a token depends on "
                f"{what}; give another base (or set is_decoder in its config.json, if it was trained as a decoder)"
            )


def check_tokenizer(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError where the base has no embedding for a token that every batch or every reply holds."""
    rows = base.get_input_embeddings().num_embeddings
    for what, token in (("pad", tokenizer.pad_token_id), ("EOS", tokenizer.eos_token_id)):
        if token >= rows:
            raise InputError(
                f"the tokenizer's {what} token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, and the base "
                f"has embeddings for {rows} tokens; give the tokenizer another {what} token, or resize the base once"
            )


def check_lengths(base: PreTrainedModel, longest: int, what: str, argument: str) -> None:
    """Raise InputError where rows of `longest` tokens are more than a base with a table of positions can read."""
    limit = position_limit(base)
    if limit is not None and longest > limit:
        raise InputError(f"{what} has {longest} tokens, and this base has {limit} positions; lower {argument}")


def position_limit(base: PreTrainedModel) -> int | None:
    """Tokens that a row may have where positions are looked up in a table, as in GPT-2; None where they are computed."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    for name, module in text_decoder(base).named_modules():
        if hasattr(module, "make_weights"):  # a table that grows
            continue
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            is_position = "pos" in f"{name}.{own}".lower() or name.endswith("wpe")
            # a few families keep some rows in front for themselves
            if is_position and tensor.dim() > 1 and limit <= tensor.shape[-2] <= limit + 4:
                return limit
    return None


def bare_layer(module: nn.Module) -> nn.Module:
    """The base's own layer, under whatever PEFT has put around it."""
    while isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module


def base_fingerprint(base: PreTrainedModel) -> str:
    """Short hash that tells two bases apart, whatever folder they lie in and whichever float type they are loaded as.

    Two parts with a dash between: of the embedding, and of all other matrices, which are not the same after a merge.  In
    4 bit only the embedding is as it was, so the second part is missing then, see `same_base`.  Adapters on the base and
    heads do not count.
    """
    embedding = bare_layer(base.get_input_embeddings()).weight
    shape = repr((type(base).__name__, tuple(embedding.shape)))
    matrices = {
        re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name): parameter
        for name, parameter in base.named_parameters()
        if parameter.dim() == 2 and parameter is not embedding
        if not re.search(r"^(score|v_head)\.|lora_|\.modules_to_save\.|\.trainable_tokens_", name)
    }
    parts = [sample_hash(shape, [embedding])]
    if all(matrix.is_floating_point() for matrix in matrices.values()):
        parts.append(sample_hash(shape, [matrices[name] for name in sorted(matrices)]))
    return "-".join(parts)


def sample_hash(shape: str, matrices: Sequence[Tensor]) -> str:
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
    return bare_layer(base.get_output_embeddings()).weight.shape[1]


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
