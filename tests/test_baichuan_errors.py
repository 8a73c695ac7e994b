"""scripts/convert_baichuan.py where it has to refuse: one line that says what is wrong, exit code 2, no folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.baichuan import convert as converter
from tests.baichuan import convert, train_sentencepiece, write_adapter, write_baichuan, write_shards
from tests.forks import run_command
from tests.helpers import own_lines

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer_file():
    return train_sentencepiece("identity", prefix=False)


@pytest.fixture
def source(tmp_path, tokenizer_file):
    """A downloaded folder that could be converted, the only thing in tmp_path."""
    write_baichuan(tmp_path / "source", 2, tokenizer_file, 600)
    return tmp_path / "source"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_config(folder, drop=(), **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in drop}))


def edit_weights(folder, change):
    path = folder / "pytorch_model.bin"
    weights = torch.load(path)
    change(weights)
    torch.save(weights, path)


class RunsCode:
    """A pickle of it makes a file when it is loaded without care."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def truncated_bin(folder):
    truncate(folder / "pytorch_model.bin")


def truncated_old_bin(folder):
    path = folder / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    truncate(path)


def truncated_shard(folder):
    weights = torch.load(folder / "pytorch_model.bin")
    truncate(write_shards(folder, weights, "safetensors", 3)[1])


def missing_shard(folder):
    weights = torch.load(folder / "pytorch_model.bin")
    write_shards(folder, weights, "bin", 3)[1].unlink()


def runs_code(folder):
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": RunsCode(folder / "it_was_run")}))


def runs_code_old(folder):
    torch.save(RunsCode(folder / "it_was_run"), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def no_weights(folder):
    (folder / "pytorch_model.bin").unlink()


def large(folder):  # as in Baichuan2-13B
    edit_config(folder, drop=["max_position_embeddings"], model_max_length=4096, hidden_size=5120)


def large_by_size(folder):
    edit_config(folder, hidden_size=5120, num_hidden_layers=40)


def tokenizer_of_another_kind(folder):
    (folder / "tokenizer.model").write_bytes(train_sentencepiece("identity", False, model_type="unigram"))


def changed_config(**changes):
    return lambda folder: edit_config(folder, **changes)


def changed_weights(change):
    return lambda folder: edit_weights(folder, change)


CASES = {
    "truncated file": (truncated_bin, r"cannot read \S+pytorch_model.bin: .*; download it again"),
    "truncated old file": (truncated_old_bin, r"pytorch_model.bin.*; download it again"),
    "truncated shard": (truncated_shard, r"cannot read \S+model-00002-of-00003.safetensors: .*; download it again"),
    "missing shard": (
        missing_shard,
        r"lacks pytorch_model-00002-of-00003.bin, which pytorch_model.bin.index.json lists",
    ),
    "runs code": (runs_code, r"pytorch_model.bin is damaged, or holds other things than tensors"),
    "runs code, old format": (runs_code_old, r"pytorch_model.bin is damaged, or holds other things than tensors"),
    "no weights": (no_weights, r"there is no model.safetensors or pytorch_model.bin in"),
    "13B": (large, r"is a Baichuan 13B, which has ALiBi"),
    "13B, by its size": (large_by_size, r"is a Baichuan 13B, which has ALiBi"),
    "Llama": (changed_config(model_type="llama"), r"is of type llama, not baichuan"),
    "quantized": (changed_config(quantization_config={"bits": 4}), r"is quantized; give the folder with the 16-bit"),
    "quantized, silently": (
        changed_weights(lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.int8)})),
        r"lm_head.weight holds torch.int8",
    ),
    "no size": (changed_config(num_hidden_layers=None), r"has no number for num_hidden_layers"),
    "no heads": (changed_config(num_attention_heads=0), r"has no number for num_attention_heads"),
    "odd heads": (changed_config(num_attention_heads=5), r"config.json makes no model: .*not a multiple"),
    "another activation": (changed_config(hidden_act="gelu"), r"uses gelu, where Baichuan has silu"),
    "wrong size": (changed_config(intermediate_size=97), r"gate_proj.weight \[96, 64\], but expected \[97, 64\]"),
    "wrong width": (changed_config(hidden_size=32), r"W_pack.weight has 192 rows, not the 3 x 32 of this model"),
    "small vocabulary": (changed_config(vocab_size=100), r"the tokenizer has \d+ pieces, but the model only 100"),
    "a tensor too many": (
        changed_weights(lambda w: w.update({"model.extra": torch.ones(3)})),
        r"model.extra \[3\], but this model has no such tensor",
    ),
    "a tensor too few": (changed_weights(lambda w: w.pop("model.norm.weight")), r"lacks 1 tensors, such as model.norm"),
    "a list": (
        lambda folder: torch.save([torch.ones(2)], folder / "pytorch_model.bin"),
        r"does not hold tensors by name",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"cannot read \S+config.json: .*No such file"),
    "cut config": (lambda folder: truncate(folder / "config.json"), r"cannot read \S+config.json"),
    "cut generation config": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        r"cannot use the generation_config.json",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), r"cannot read the tokenizer"),
    "cut tokenizer": (lambda folder: truncate(folder / "tokenizer.model"), r"cannot read the tokenizer"),
    "unigram tokenizer": (tokenizer_of_another_kind, r"is no BPE model with byte fallback"),
}


@pytest.fixture
def refused(source, monkeypatch, capfd):
    """Convert `source`, and check that this ends in one line with the message, exit code 2, and nothing beside it."""

    def run(message, *arguments):
        before = sorted(source.parent.iterdir())
        with pytest.raises(SystemExit) as stopped:
            convert(monkeypatch, "--model", source, "--output", source.parent / "llama", *arguments)
        assert stopped.value.code == 2
        lines = capfd.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        assert "Traceback" not in "".join(lines)
        assert re.search(message, lines[-1]), lines[-1]
        assert sorted(source.parent.iterdir()) == before

    return run


@pytest.mark.parametrize("case", CASES)
def test_models_that_cannot_be_converted(source, refused, case):
    change, message = CASES[case]
    change(source)
    refused(message)
    assert not (source / "it_was_run").exists()


ADAPTER_CASES = {
    "no adapter": (lambda folder: (folder / "adapter_config.json").unlink(), r"cannot read \S+adapter_config.json"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"there is no adapter_model.safetensors",
    ),
    "truncated": (lambda folder: truncate(folder / "adapter_model.safetensors"), r"cannot read \S+adapter_model"),
    "not on W_pack": (lambda folder: rewrite(folder, lambda t: drop(t, "W_pack")), r"is no LoRA adapter on W_pack"),
    "another kind": (lambda folder: configure(folder, peft_type="IA3"), r"is no LoRA adapter on W_pack"),
    "rank of its own": (
        lambda folder: configure(folder, rank_pattern={"W_pack": 8}),
        r"gives W_pack a rank of its own",
    ),
    "another size": (
        lambda folder: rewrite(folder, lambda t: {k: v[:96] if "W_pack.lora_B" in k else v for k, v in t.items()}),
        r"has 96 rows, not the 3 x 64",
    ),
    "more than LoRA": (
        lambda folder: rewrite(
            folder, lambda t: {**t, "base_model.model.x.W_pack.lora_magnitude_vector": torch.ones(3)}
        ),
        r"lora_magnitude_vector; only plain LoRA matrices",
    ),
    "the head": (
        lambda folder: rewrite(folder, lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(3)}),
        r"changes the output head, which Baichuan2 normalises",
    ),
}


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def drop(tensors, text):
    return {name: tensor for name, tensor in tensors.items() if text not in name}


def configure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("case", ADAPTER_CASES)
def test_adapters_that_cannot_be_converted(tmp_path, refused, case):
    change, message = ADAPTER_CASES[case]
    write_adapter(tmp_path / "sft")
    change(tmp_path / "sft")
    refused(message, "--adapter", tmp_path / "sft")


def test_two_adapters_of_one_name(tmp_path, refused):
    refused("have the same name; rename one", "--adapter", tmp_path / "a/sft", f"{tmp_path}/b/sft/")


def test_an_output_folder_in_use_is_left_alone(tmp_path, refused):
    (tmp_path / "used").mkdir()
    file = tmp_path / "used/mine.txt"
    file.write_text("precious")
    refused("used is not empty; give another --output$", "--output", tmp_path / "used")
    refused("mine.txt is a file; give another --output$", "--output", file)
    assert file.read_text() == "precious"
    assert os.listdir(tmp_path / "used") == ["mine.txt"]


def test_without_sentencepiece(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as if it were not installed
    refused("is not installed; pip install -r requirements-baichuan.txt")


def test_weights_that_the_disk_changed(refused, monkeypatch):
    """What was written is read back: a bit that changed on the way is seen."""

    def careless(tensors, path, metadata):
        save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1e-3}, path, metadata)

    monkeypatch.setattr(converter, "save_file", careless)
    refused("model.norm.weight is read back otherwise than it was written")


def test_ids_that_only_rare_texts_get_wrong_are_a_warning(source, monkeypatch, capfd):
    monkeypatch.setattr(converter, "check_tokenizer", lambda *_: 3)
    convert(monkeypatch, "--model", source, "--output", source.parent / "llama")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning:")]
    assert lines == ["warning: 3 texts made of the whole vocabulary get other ids than from sentencepiece"]


def test_as_a_command(source):
    """From another folder, with code in the model's folder that must not run: success, then a refusal."""
    for name in ("modeling_baichuan", "configuration_baichuan", "tokenization_baichuan", "sentencepiece", "torch"):
        (source / f"{name}.py").write_text("raise SystemExit('it was run')\n")

    words = [ROOT / "scripts/convert_baichuan.py", "--model", "source", "--output", "llama"]
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "source is a Baichuan2-7B" in done.stderr
    assert sorted(os.listdir(source.parent)) == ["llama", "source"]
    done = run_command(words, source.parent)
    assert done.returncode == 2
    assert re.fullmatch(r"error: the output folder llama is not empty.*\n", own_lines(done.stderr))
