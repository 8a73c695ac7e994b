"""The page of benchmarks/gpu.py: what is counted, and what a row says."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import MODELS, report, weight_count
from benchmarks.ppo_sides import Shapes

SMALL = Shapes(
    hidden=8, layers=1, heads=2, kv_heads=1, feed_forward=16, vocabulary=10, rows=2, mini_batch=1, replies=(4, 4)
)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_model(name: str) -> None:
    shapes = MODELS[name]
    config = LlamaConfig(
        hidden_size=shapes.hidden,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        intermediate_size=shapes.feed_forward,
        vocab_size=shapes.vocabulary,
        tie_word_embeddings=shapes.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    matrices = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
    assert weight_count(shapes) == matrices


def test_a_page_by_hand() -> None:
    """Attention 2 * 8 * 8 + 2 * 8 * 4, feed-forward 3 * 8 * 16, one embedding of 80: 656 weights.

    Four token steps read 2 * 656 bytes each: 5248 in 2 s, a tenth of 26240 a second.
    """
    assert weight_count(SMALL) == 656
    rate = {"rate": 1e6, "bandwidth": 26240.0}
    first, second = ({"generate": seconds, "score": 1.0, "train": 1.0} for seconds in (50.0, 2.0))
    run = {"iterations": [first, second], "planned_bytes": 2**30, "peak_bytes": 2**29}
    run["first"] = {"kl": 0.0, "ratio_first": 1.0}
    found = {"small": {"rate": rate, "16 bit": run, "4 bit": "Traceback\nout of memory\n"}}
    page = report(found, 0.0, {"small": SMALL}).splitlines()
    row = next(line for line in page if "16 bit" in line).strip("| ").split(" | ")
    assert row[:7] == ["small", "16 bit", "2.00", "1.00", "1.00", "**4.00**", "2"]  # 8 reply tokens in 4 s
    assert row[8:] == ["10%", "0.50", "1.00", "0", "1.00000"]
    failed = next(line for line in page if "4 bit" in line)
    assert "failed: out of memory" in failed
    assert failed.count("|") == page[page.index(failed) - 1].count("|")
