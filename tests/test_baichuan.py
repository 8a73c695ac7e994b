"""scripts/convert_baichuan.py: downloaded folders of both 7B generations become Llama folders with the same outputs.

The original is written out in tests/baichuan.py with torch alone.  The result is loaded with plain
transformers, as anybody would; tests/test_baichuan_errors.py has what is refused.
"""

import json
import os
import weakref
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import reward_modeling
import rl_training
import sft_training
from lora.adapters import attach_adapter, read_adapter
from lora.base_model import load_base, load_tokenizer
from scripts.baichuan import convert as converter
from tests.baichuan import (
    HIDDEN,
    LAYERS,
    convert,
    make_config,
    make_weights,
    reference_logits,
    train_sentencepiece,
    write_adapter,
    write_baichuan,
    write_shards,
)
from tests.test_article import PPO_COMMAND, REWARD_COMMAND, filled, start, warnings_of
from utils.arguments import ModelArguments
from utils.console import InputError

TOKENIZERS = {1: ("nmt_nfkc", True), 2: ("identity", False)}


class Converted(NamedTuple):
    generation: int
    source: Path
    folder: Path
    weights: dict[str, Tensor]  # of the source

    def load(self) -> LlamaForCausalLM:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def expected(self, ids: Tensor, mask: Tensor) -> Tensor:
        return reference_logits(self.weights, ids, mask, self.generation)


@pytest.fixture(scope="module")
def tokenizer_files():
    return {generation: train_sentencepiece(*kind) for generation, kind in TOKENIZERS.items()}


@pytest.fixture(scope="module", params=[1, 2])
def converted(request, tmp_path_factory, tokenizer_files):
    """A tiny model of each generation, converted: the first from one .bin, the second from three .bin and an index."""
    folder = tmp_path_factory.mktemp("baichuan")
    content = tokenizer_files[request.param]
    size = SentencePieceProcessor(model_proto=content).get_piece_size()
    count = {1: 1, 2: 3}[request.param]
    weights = write_baichuan(folder / "source", request.param, content, size, "bin", count)
    with pytest.MonkeyPatch.context() as monkeypatch:
        convert(monkeypatch, "--model", folder / "source", "--output", folder / "llama")
    return Converted(request.param, folder / "source", folder / "llama", weights)


def random_ids(rows, length, vocabulary, seed=0):
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded_mask(side, lengths, width):
    columns = torch.arange(width)
    lengths = torch.tensor(lengths)[:, None]
    return ((columns < lengths) if side == "right" else (columns >= width - lengths)).long()


def relative_difference(expected, found):
    return float((expected - found).abs().max() / expected.abs().max())


# ---- The same outputs ----


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_with_padding(converted, side):
    model = converted.load()
    mask = padded_mask(side, [40, 23, 1], 40)
    ids = random_ids(3, 40, model.config.vocab_size).where(mask.bool(), 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    assert relative_difference(converted.expected(ids, mask)[real], found[real]) < 1e-5


@torch.no_grad()
def test_logits_of_1500_tokens(converted):
    model = converted.load()
    ids = random_ids(1, 1500, model.config.vocab_size)
    mask = torch.ones_like(ids)
    assert relative_difference(converted.expected(ids, mask), model(input_ids=ids).logits) < 1e-5


@torch.no_grad()
def test_greedy_generation_with_a_cache(converted):
    """The original has no working cache on transformers 5: the reference computes each token from all before it."""
    model = converted.load()
    model.generation_config.eos_token_id = None  # twenty tokens, whatever they are
    mask = padded_mask("left", [12, 5], 12)
    ids = random_ids(2, 12, model.config.vocab_size).where(mask.bool(), 0)
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, use_cache=True)
    for _ in range(20):
        last = converted.expected(ids, mask)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, last], dim=1), torch.cat([mask, torch.ones_like(last)], dim=1)
    assert found.tolist() == ids.tolist()


@torch.no_grad()
def test_the_reference_tells_the_mistakes_apart(converted):
    """A head that is not normalised (or is, in the first generation), and q and k exchanged, are far above 1e-5."""
    ids = random_ids(1, 40, len(converted.weights["lm_head.weight"]))
    mask = torch.ones_like(ids)
    found = converted.load()(input_ids=ids).logits
    other_head = reference_logits(converted.weights, ids, mask, 3 - converted.generation)
    assert relative_difference(other_head, found) > 0.1
    q_rows, k_rows, v_rows = torch.arange(3 * HIDDEN).split(HIDDEN)
    swapped = {
        name: tensor[torch.cat([k_rows, q_rows, v_rows])] if "W_pack" in name else tensor
        for name, tensor in converted.weights.items()
    }
    assert relative_difference(reference_logits(swapped, ids, mask, converted.generation), found) > 0.01


def test_the_tokenizer_needs_no_code_and_pads_without_eos(converted):
    original = SentencePieceProcessor(model_file=str(converted.source / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(converted.folder)
    for text in ("问：苹果好吃吗？\n\n答：", " 你好  2023年…\tParis!", "👩‍👧龘"):
        assert tokenizer(text)["input_ids"] == original.encode(text)
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(converted.folder)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_what_is_written(converted):
    files = {path.name for path in converted.folder.iterdir()}
    parts = {1: {"model.safetensors"}, 2: {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}}
    parts[2].add("model.safetensors.index.json")
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == wanted | parts[converted.generation]
    assert sorted(os.listdir(converted.folder.parent)) == ["llama", "source"]
    model = converted.load()
    assert type(model) is LlamaForCausalLM
    assert (model.config.rope_parameters["rope_theta"], model.config.rms_norm_eps) == (10000.0, 1e-6)
    assert model.config.max_position_embeddings == 4096
    ids = (model.generation_config.bos_token_id, model.generation_config.eos_token_id)
    assert (*ids, model.generation_config.pad_token_id) == (1, 2, 0)


# ---- Files, types and generations ----


def expected_tensors(weights, normalised, dtype):
    """By hand: q, k, v are the thirds of W_pack, the head is normalised in float32 and rounded once."""
    tensors = {name: tensor for name, tensor in weights.items() if "W_pack" not in name and "inv_freq" not in name}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn."
        packed = weights[f"{prefix}W_pack.weight"]
        tensors |= {f"{prefix}{p}_proj.weight": packed[i * HIDDEN : (i + 1) * HIDDEN] for i, p in enumerate("qkv")}
    if normalised:
        tensors["lm_head.weight"] = normalize(weights["lm_head.weight"].float()).to(dtype)
    return tensors


@pytest.mark.parametrize(
    ("kind", "count", "dtype"),
    [
        ("bin", 1, torch.bfloat16),
        ("bin", 2, torch.float16),
        ("safetensors", 1, torch.float16),
        ("safetensors", 4, torch.bfloat16),
        ("safetensors", 1, torch.float32),
    ],
)
def test_any_file_format_and_type(tmp_path, monkeypatch, tokenizer_files, kind, count, dtype):
    source, folder = tmp_path / "source", tmp_path / "llama"
    source.mkdir()
    vocabulary = 600  # more than pieces, as where it was rounded up
    (source / "config.json").write_text(json.dumps(make_config(2, vocabulary)))
    (source / "tokenizer.model").write_bytes(tokenizer_files[2])
    weights = {name: tensor.to(dtype) for name, tensor in make_weights(vocabulary).items()}
    write_shards(source, weights, kind, count)
    convert(monkeypatch, "--model", source, "--output", folder)
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    expected = expected_tensors(weights, normalised=True, dtype=dtype)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == dtype


def test_the_old_format_of_torch(tmp_path, monkeypatch, tokenizer_files):
    """A pickle without a zip file around it, and parameters instead of tensors."""
    weights = write_baichuan(tmp_path / "source", 1, tokenizer_files[1], 600)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}
    torch.save(parameters, tmp_path / "source/pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(monkeypatch, "--model", tmp_path / "source", "--output", tmp_path / "llama")
    found = load_file(tmp_path / "llama/model.safetensors")
    assert torch.equal(found["lm_head.weight"], weights["lm_head.weight"])


@pytest.mark.parametrize(
    ("change", "code", "normalised"),
    [
        ({}, None, False),
        ({}, "class NormHead(nn.Module):", True),
        ({"z_loss_weight": 0}, None, True),
        ({"vocab_size": 125696}, None, True),
        ({}, "class BaiChuanForCausalLM(PreTrainedModel):", False),
    ],
)
def test_generations_are_told_apart(tmp_path, change, code, normalised):
    if code is not None:
        (tmp_path / "modeling_baichuan.py").write_text(f"raise SystemExit('it was run')\n{code}\n")
    assert converter.normalises_head(str(tmp_path), {**make_config(1, 600), **change}) is normalised


def test_one_file_of_weights_in_memory_at_a_time(tmp_path, monkeypatch, tokenizer_files):
    write_baichuan(tmp_path / "source", 2, tokenizer_files[2], 600, "bin", 5)
    read, alive = converter.read_tensors, []

    def watched(path):
        assert not [reference for reference in alive if reference() is not None]
        tensors = read(path)
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    monkeypatch.setattr(converter, "read_tensors", watched)
    convert(monkeypatch, "--model", tmp_path / "source", "--output", tmp_path / "llama")
    assert len(alive) == len(make_weights(600))


# ---- Adapters ----


def with_adapter(weights, adapter, scale):
    """The base with B @ A * alpha / r added, in the original's layout."""
    changed = dict(weights)
    for name in weights:
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in adapter:
            changed[name] = (
                weights[name] + scale * adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
            )
    return changed


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@torch.no_grad()
def test_a_w_pack_adapter_keeps_its_outputs(converted, tmp_path, monkeypatch, kind):
    adapter = write_adapter(tmp_path / "sft", kind)
    write_adapter(tmp_path / "elsewhere/reward")
    output = tmp_path / "llama"
    adapters = [tmp_path / "sft", f"{tmp_path}/elsewhere/reward/"]
    convert(monkeypatch, "--model", converted.source, "--output", output, "--adapter", *adapters)
    assert sorted(os.listdir(output / "adapters")) == ["reward", "sft"]

    ids = random_ids(2, 30, len(converted.weights["lm_head.weight"]))
    mask = torch.ones_like(ids)
    expected = reference_logits(with_adapter(converted.weights, adapter, 12 / 4), ids, mask, converted.generation)
    assert relative_difference(expected, converted.expected(ids, mask)) > 0.1  # it does something

    base = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, output / "adapters/sft").eval()
    assert relative_difference(expected, model(input_ids=ids).logits) < 1e-5
    assert sorted(model.peft_config["default"].target_modules) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert model.peft_config["default"].base_model_name_or_path == str(output)

    saved = read_adapter(str(output / "adapters/sft"), "--sft_model_lora_path")
    base = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ours = attach_adapter(base, saved, saved.config).eval()
    assert torch.equal(ours(input_ids=ids).logits, model(input_ids=ids).logits)


# ---- All three stages ----


def test_three_stages_with_the_articles_flags(tmp_path, monkeypatch, tokenizer_files, data):
    source, base = tmp_path / "Baichuan2-7B-Base", tmp_path / "baichuan2-7b"
    write_baichuan(source, 2, tokenizer_files[2], 600, "safetensors", 2)
    convert(monkeypatch, "--model", source, "--output", base)
    monkeypatch.chdir(tmp_path)
    small = "use_cpu: true\ndisable_tqdm: true\n"
    (tmp_path / "sft.yaml").write_text(f"dataset: {data['sft']}\n{small}")
    (tmp_path / "reward.yaml").write_text(f"dataset: {data['preferences']}\neval_fraction: 0.3\n{small}")
    (tmp_path / "ppo.yaml").write_text(f"dataset: {data['preferences']}\nsteps: 1\n{small}")

    words = ["--model_name", base, "--lora_target_modules", "W_pack", "--max_steps", "2", "--output_dir", "sft"]
    log = start(sft_training, ["--config", "sft.yaml", *map(str, words)], monkeypatch)
    assert len([line for line in warnings_of(log) if "W_pack" in line]) == 1

    words = [*filled(REWARD_COMMAND, model_name=base), "--output_dir", "reward"]
    log = start(reward_modeling, ["--config", "reward.yaml", *words], monkeypatch)
    assert len([line for line in warnings_of(log) if "W_pack" in line]) == 1

    words = filled(
        PPO_COMMAND,
        base_model_name=base,
        merged_sft_model_path="merged",
        sft_model_lora_path="sft",
        reward_model_lora_path="reward",
        output_dir="ppo",
        output_max_length=24,
        log_with="none",  # tests/test_article.py has a run with wandb
    )
    start(rl_training, ["--config", "ppo.yaml", *words, "--allow_weak_reward", "true"], monkeypatch)
    for stage in ("sft", "reward", "ppo"):
        layers = {name.split(".")[-3] for name in load_file(f"{stage}/adapter_model.safetensors") if "lora_" in name}
        assert layers == {"q_proj", "k_proj", "v_proj"}, stage
    samples = Path("ppo/samples.jsonl").read_text().splitlines()
    assert len(samples) == 8


# ---- The training scripts ----


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("load", [load_tokenizer, lambda args: load_base(args, "auto")], ids=["tokenizer", "base"])
def test_a_base_that_was_not_converted_names_the_converter(tmp_path, tokenizer_files, load, trust):
    """transformers would ask on the terminal whether it may run the folder's code, which does not work anyway."""
    write_baichuan(tmp_path / "source", 1, tokenizer_files[1], 600)
    args = ModelArguments(model_name_or_path=str(tmp_path / "source"), trust_remote_code=trust)
    with pytest.raises(InputError, match=r"is a Baichuan model.*scripts/convert_baichuan.py --model FOLDER --output"):
        load(args)
