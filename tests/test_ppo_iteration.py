"""The operations that benchmarks/ppo_iteration.py counts, and the inputs that both sides get."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.ppo_iteration import operations, profile_table
from benchmarks.ppo_sides import KINDS, Shapes, kind_of, make_inputs, read_inputs, reply_lengths
from lora.adapters import read_adapter

TINY = Shapes(
    hidden=12,
    layers=2,
    heads=3,
    kv_heads=1,
    feed_forward=32,
    vocabulary=50,
    rows=3,
    mini_batch=3,
    ppo_epochs=1,
    lora_r=2,
    prompts=(2, 6),
    replies=(1, 5),
)


def test_operations_worked_by_hand() -> None:
    """One layer: q and o 4 x 4, k and v 4 x 2, three of 4 x 8: 144 weights, and 16 + 4 of LoRA.  Output embedding: 40.

    Prompt 3, reply 2: 4 positions, each 2 * 164; attention 2 * 4 * (1 + 2 + 3 + 4) * 2 = 160; 2 positions with logits.
    """
    shapes = Shapes(4, 1, 2, 1, 8, 10, rows=1, mini_batch=1, ppo_epochs=1, lora_r=1, prompts=(3, 3), replies=(2, 2))
    forward, logits = 4 * 2 * 164 + 160, 2 * 2 * 40
    assert operations(shapes) == {
        "generate": forward + logits,
        "score": forward + logits + forward + 2 * 164,
        "train": 2 * forward + 160 + 4 * 2 * 20 + 2 * logits,
    }


def test_operations_are_those_of_the_model(tmp_path: Path) -> None:
    """Against torch's own counter, without LoRA.  Its attention is the whole square, ours the triangle."""
    make_inputs(tmp_path / "inputs", TINY)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "inputs" / "base", attn_implementation="eager")
    counted = 0.0
    for prompt, reply in TINY.lengths():
        length = prompt + reply - 1
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.full((1, length), 5), logits_to_keep=reply)
        triangle = 2 * TINY.layers * TINY.hidden * length * (length - 1)
        counted += counter.get_total_flops() - triangle
    positions = sum(prompt + reply - 1 for prompt, reply in TINY.lengths())
    lora = 2 * positions * 2 * 2 * (4 * 12 + 2 * 4)
    assert operations(TINY)["generate"] == pytest.approx(counted + lora)


def test_both_sides_read_what_was_written(tmp_path: Path) -> None:
    """Prompts have the tokens that the shapes say, in the tokenizer's own ids."""
    folder = tmp_path / "inputs"
    make_inputs(folder, TINY)
    shapes, rows = read_inputs(folder)
    assert shapes == TINY
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    lengths = reply_lengths(rows)
    for (prompt, reply), row in zip(TINY.lengths(), rows, strict=True):
        ids = tokenizer(row["prompt"])["input_ids"]
        assert len(ids) == prompt
        assert lengths[tuple(ids)] == reply
    assert not read_adapter(str(folder / "sft"), "--sft").has_score_head
    assert read_adapter(str(folder / "reward"), "--reward").has_score_head
    assert json.loads((folder / "shapes.json").read_text())["hidden"] == 12


def test_a_profile_is_told_by_kind_of_operation() -> None:
    names = ["aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "aten::mul"]
    assert [kind_of(name) for name in names] == list(KINDS)
    shapes = Shapes(4, 1, 2, 1, 8, 10, rows=1, mini_batch=1, ppo_epochs=1, lora_r=1, prompts=(3, 3), replies=(2, 2))
    seconds = dict(zip(KINDS, (1e-6, 0.0, 3e-6), strict=True))
    lines = profile_table("hand", shapes, dict.fromkeys(("generate", "score", "train"), seconds), 2e9).splitlines()
    generated = 4 * 2 * 164 + 160 + 2 * 2 * 40  # see above
    assert lines[0] == "**hand** (2 GFLOP/s in matrix products alone)"
    assert lines[4] == f"| generate | 0.0 (25%) | 0.0 (0%) | 0.0 (75%) | {generated / 1e-6 / 1e9:.0f} |"
