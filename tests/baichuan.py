"""Tiny Baichuan folders and adapters as one would have them, and what the original computes, with torch alone."""

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from torch import Tensor
from torch.nn.functional import normalize, silu

from scripts.baichuan import convert as converter
from utils.console import run_script

CORPUS = [
    "问：你好吗？\n\n答：我很好，谢谢你！",
    "问：苹果好吃吗？\n\n答：苹果 香蕉 西瓜 火锅 面条 都很好吃，熊猫 很可爱。",
    "What is the capital of France? Paris is the capital of France.",
    "the cat sat on the mat and the dog ran in the park, didn't it?",
    "for i in range(10):\n\treturn  x ** 2",
    "２０２３年１月，“引用”…… 100%",
] * 3
DIGITS = "0123456789０１２３４５６７８９"
# As in the real models: line breaks, digits and full-width punctuation, which nmt_nfkc would change, and reserved names.
SYMBOLS = ["\n", "\t", *DIGITS, *"，！？：", "\n\n", "\t\t", "<reserved_1>", "<reserved_10>", "问：", "\u3000"]


def train_sentencepiece(rule: str, prefix: bool, remove_extra: bool = False, **options: Any) -> bytes:
    """A BPE model with byte fallback: ids 0, 1, 2 are <unk>, <s>, </s>, then the symbols, bytes and pieces."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        normalization_rule_name=rule,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=remove_extra,
        allow_whitespace_only_pieces=True,
        **{"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": SYMBOLS, "vocab_size": 600, **options},
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


CONFIG = {
    "model_type": "baichuan",
    "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"},
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
HIDDEN, HEADS, LAYERS = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["num_hidden_layers"]


def shuffle_ids(content: bytes) -> bytes:
    """The model with the ids of its normal pieces exchanged: in Baichuan2, too, they are not in the order of scores."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    places = [i for i, piece in enumerate(proto.pieces) if piece.type == 1]
    pieces = [(proto.pieces[i].piece, proto.pieces[i].score) for i in places]
    random.Random(0).shuffle(pieces)
    for i, (text, score) in zip(places, pieces, strict=True):
        proto.pieces[i].piece, proto.pieces[i].score = text, score
    return proto.SerializeToString()


def make_config(generation: int, vocabulary: int) -> dict[str, Any]:
    if generation == 1:
        return {**CONFIG, "architectures": ["BaiChuanForCausalLM"], "vocab_size": vocabulary}
    return {**CONFIG, "architectures": ["BaichuanForCausalLM"], "vocab_size": vocabulary, "z_loss_weight": 0}


def make_weights(vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights, large enough that attention is uneven, with head rows of very different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    wide = CONFIG["intermediate_size"]
    weights = {"model.embed_tokens.weight": draw(vocabulary, HIDDEN, scale=1.0)}
    for layer in range(LAYERS):
        parts = {
            "self_attn.W_pack.weight": draw(3 * HIDDEN, HIDDEN, scale=0.2),
            "self_attn.o_proj.weight": draw(HIDDEN, HIDDEN, scale=0.2),
            "self_attn.rotary_emb.inv_freq": torch.rand(HIDDEN // HEADS // 2, generator=generator),
            "mlp.gate_proj.weight": draw(wide, HIDDEN, scale=0.2),
            "mlp.up_proj.weight": draw(wide, HIDDEN, scale=0.2),
            "mlp.down_proj.weight": draw(HIDDEN, wide, scale=0.2),
            "input_layernorm.weight": 1 + draw(HIDDEN, scale=0.3),
            "post_attention_layernorm.weight": 1 + draw(HIDDEN, scale=0.3),
        }
        weights |= {f"model.layers.{layer}.{name}": tensor for name, tensor in parts.items()}
    weights["model.norm.weight"] = 1 + draw(HIDDEN, scale=0.3)
    lengths = torch.rand(vocabulary, 1, generator=generator) * 4 + 0.2
    weights["lm_head.weight"] = draw(vocabulary, HIDDEN, scale=0.3) * lengths
    return weights


def write_shards(folder: Path, weights: dict[str, Tensor], kind: str, count: int = 1) -> list[Path]:
    """Weights as .bin or .safetensors, in one file or in `count` with the usual index."""
    stem = {"bin": "pytorch_model", "safetensors": "model"}[kind]
    save = torch.save if kind == "bin" else save_file
    if count == 1:
        save(weights, folder / f"{stem}.{kind}")
        return [folder / f"{stem}.{kind}"]
    names = list(weights)
    places = {name: f"{stem}-{1 + i * count // len(names):05}-of-{count:05}.{kind}" for i, name in enumerate(names)}
    for place in sorted(set(places.values())):
        save({name: weights[name] for name in names if places[name] == place}, folder / place)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return [folder / place for place in sorted(set(places.values()))]


def write_baichuan(
    folder: Path, generation: int, tokenizer: bytes, vocabulary: int, kind: str = "bin", count: int = 1
) -> dict[str, Tensor]:
    """A whole downloaded folder; returns its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(make_config(generation, vocabulary)))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    weights = make_weights(vocabulary)
    write_shards(folder, weights, kind, count)
    return weights


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).rsqrt()


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions as Baichuan has them: x [B, heads, L, D], positions [B, L]; the halves of D are the pairs."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 2 * half, 2).float() / (2 * half))  # rounded as the original does
    angles = positions[:, None, :, None] * frequencies  # [B, 1, L, D/2]
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], dim=-1)


def reference_logits(weights: dict[str, Tensor], ids: Tensor, mask: Tensor, generation: int) -> Tensor:
    """Logits [B, L, V] of the original; ids and mask [B, L], mask is 1 on real tokens, on either side of the padding."""
    rows, length = ids.shape
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None]  # [B, 1, L, L]
    allowed = allowed | torch.eye(length, dtype=torch.bool)  # padding looks at itself, so that nothing is nan
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        part = {name.split(f"layers.{layer}.")[-1]: w for name, w in weights.items() if f"layers.{layer}." in name}
        y = rms_norm(x, part["input_layernorm.weight"]) @ part["self_attn.W_pack.weight"].T  # [B, L, 3H]
        q, k, v = (one.view(rows, length, HEADS, -1).transpose(1, 2) for one in y.split(HIDDEN, dim=-1))
        q, k = rotate(q, positions), rotate(k, positions)
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, HIDDEN)
        x = x + y @ part["self_attn.o_proj.weight"].T
        y = rms_norm(x, part["post_attention_layernorm.weight"])
        gated = silu(y @ part["mlp.gate_proj.weight"].T) * (y @ part["mlp.up_proj.weight"].T)
        x = x + gated @ part["mlp.down_proj.weight"].T
    head = weights["lm_head.weight"]
    return rms_norm(x, weights["model.norm.weight"]) @ (normalize(head) if generation == 2 else head).T


def write_adapter(folder: Path, kind: str = "safetensors", **config) -> dict[str, Tensor]:
    """A LoRA adapter on W_pack and o_proj with random weights, as PEFT has saved it beside the original's code."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(LAYERS):
        for name, rows in (("W_pack", 3 * HIDDEN), ("o_proj", HIDDEN)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, HIDDEN, generator=generator) * 0.2
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "baichuan-inc/Baichuan2-7B-Base",
        "auto_mapping": {"base_model_class": "BaichuanForCausalLM", "parent_library": "transformers_modules"},
        "r": 4,
        "lora_alpha": 12,
        "lora_dropout": 0.05,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": ["W_pack", "o_proj"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if kind == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    """Run the converter in this process, as its command line would."""
    monkeypatch.setattr(sys, "argv", ["convert_baichuan.py", *map(str, arguments)])
    run_script(converter.main)
