"""--load_in_4bit, for real on the CPU: the three stages on a base of bitsandbytes' NF4 layers.

The base is wide enough for layers of several quantisation blocks.  What must hold is what holds with an ordinary base.
"""

import importlib.util
import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

import chat
import merge_lora
import reward_modeling
import rl_training
import sft_training
from lora.adapters import attach_adapter, read_adapter
from lora.base_model import base_fingerprint, load_base, same_base
from lora.heads import add_hidden_state_fn, add_score_head, load_value_head, score_fn
from runs.memory_plan import base_bytes, empty_base
from tests.conftest import make_tokenizer, save_base, write_rows
from tests.helpers import (
    PROMPTS,
    collect,
    make_ppo_trainer,
    make_stages,
    move_policy,
    run_main,
    save_lively_base,
)
from utils.arguments import ModelArguments
from utils.console import InputError
from utils.files import read_jsonl


def load_4bit(path):
    return load_base(ModelArguments(path, load_in_4bit=True), torch.float32)


def packed_weights(model):
    """Everything frozen that a layer in 4 bit consists of, by name."""
    return {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if not parameter.requires_grad
    }


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four_bit")
    return make_stages(save_lively_base(folder / "base"), folder)


def test_the_decoder_is_in_4_bit_and_nothing_else(lively):
    base = load_4bit(lively.base)
    kinds = {name.rsplit(".", 1)[-1]: type(module) for name, module in base.named_modules()}
    assert kinds["q_proj"] is kinds["down_proj"] is bitsandbytes.nn.Linear4bit
    assert kinds["lm_head"] is torch.nn.Linear
    assert base.model.embed_tokens.weight.dtype == base.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom", "glm"])
def test_output_embeddings_stay_whole_in_every_family(tmp_path, family):
    base = load_4bit(save_base(tmp_path, family))
    assert base.get_output_embeddings().weight.is_floating_point()
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in base.modules())


def test_a_plan_knows_how_large_it_is(lively):
    """Matrices in half bytes with the scales of their blocks; bitsandbytes adds tables of 16 and 256 numbers to each."""
    base = load_4bit(lively.base)
    states = [m.weight.quant_state for m in base.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    real = sum(tensor.nbytes for tensor in [*base.parameters(), *base.buffers()]) + scales
    assert base_bytes(empty_base(ModelArguments(lively.base), torch.float32), load_in_4bit=True) == real


def test_the_same_base_in_4_bit(lively):
    """Of which only the embedding can be told; the other matrices have other numbers."""
    whole = base_fingerprint(load_base(ModelArguments(lively.base), torch.float32))
    quantised = base_fingerprint(load_4bit(lively.base))
    assert whole.startswith(f"{quantised}-")
    assert same_base(whole, quantised)
    assert same_base(quantised, whole)
    assert not same_base(f"x{whole[1:]}", quantised)
    assert not same_base(whole[:-1] + "x", whole)


def test_gradients_go_through_after_a_pass_without_them(lively):
    """On a CPU with AVX512-BF16 a pass without gradients repacked every layer, and later ones had a gradient of 0 below it,
    without a word: PPO, which samples first, trained its last layers only.  (Elsewhere this passes either way.)
    """
    base = load_4bit(lively.base)
    ids = torch.arange(5, 15).unsqueeze(0)

    def gradient():
        inputs = base.get_input_embeddings()(ids).requires_grad_()
        base(inputs_embeds=inputs).logits.square().sum().backward()
        return inputs.grad

    before = gradient()
    with torch.no_grad():
        base(input_ids=ids)
    assert before.abs().max() > 0
    assert torch.equal(gradient(), before)


def test_kl_is_0_and_the_ratio_1_and_training_moves_the_policy_alone(lively, tmp_path):
    trainer = make_ppo_trainer(lively, tmp_path, base=load_4bit(lively.base), steps=2, adam_epsilon=1e-3)
    frozen = packed_weights(trainer.model)
    trainable = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(values.dtype == torch.uint8 for values in frozen.values())
    assert all(values.dtype == torch.float32 for values in trainable.values())
    trainer.train()
    metrics = read_jsonl(f"{tmp_path}/metrics.jsonl")
    assert abs(metrics[0]["kl"]) < 1e-5
    assert metrics[0]["ratio_first"] == pytest.approx(1, abs=1e-5)
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert [name for name, value in trainable.items() if torch.equal(after[name], value)] == []


def test_policy_and_value_head_survive(lively, tmp_path):
    trainer = make_ppo_trainer(lively, tmp_path / "run", base=load_4bit(lively.base))
    move_policy(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    experience = collect(trainer, 4, [1, 2, 3, 4])
    fresh = make_ppo_trainer(lively, tmp_path / "fresh", base=load_4bit(lively.base))
    fresh.policy_files.load(str(tmp_path / "saved"))
    again = collect(fresh, 4, [1, 2, 3, 4])
    assert experience.values.abs().max() > 0
    for name in ("logprobs", "ref_logprobs", "values", "entropy", "scores"):
        assert torch.equal(getattr(experience, name), getattr(again, name)), name
    load_value_head(fresh.model.get_base_model(), str(tmp_path / "saved"))


def test_the_three_stages_as_commands(lively, data, tmp_path, monkeypatch, capsys):
    """SFT, reward model and PPO in 4 bit; adapters in float32 that fit each other; the score head reloads; merge says it."""
    base = ["--model_name", lively.base, "--load_in_4bit", "true"]
    small = ["--max_steps", "2", "--per_device_train_batch_size", "4"]
    run_main(
        sft_training,
        [
            *base,
            *small,
            "--dataset",
            data["sft"],
            "--output_dir",
            tmp_path / "sft",
            "--lora_r",
            "2",
            "--logging_steps",
            1,
        ],
        monkeypatch,
    )
    weights = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    rounded = [tensor.bfloat16().float() for name, tensor in weights.items() if "lora_B" in name]
    assert not all(map(torch.equal, rounded, (tensor for name, tensor in weights.items() if "lora_B" in name)))

    quick = [
        "--probe_prompts",
        "2",
        "--eval_fraction",
        "0.3",
        "--eval_strategy",
        "no",
        "--degenerate_ratio",
        "0",
        "--lora_r",
        "2",
    ]
    run_main(
        reward_modeling,
        [*base, *small, *quick, "--dataset", data["preferences"], "--output_dir", tmp_path / "reward"],
        monkeypatch,
    )
    card = json.loads((tmp_path / "reward" / "reward_card.json").read_text(encoding="utf-8"))
    assert card["reload_difference"] < 1e-6
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    run_main(
        rl_training,
        [
            *base,
            "--dataset",
            prompts,
            "--output_dir",
            tmp_path / "ppo",
            "--allow_weak_reward",
            "true",
            "--sft_model_lora_path",
            tmp_path / "sft",
            "--reward_model_lora_path",
            tmp_path / "reward",
            "--steps",
            1,
            "--batch_size",
            4,
            "--mini_batch_size",
            2,
            "--output_max_length",
            6,
            "--guard",
            "off",
        ],
        monkeypatch,
    )
    (metrics, *_) = read_jsonl(f"{tmp_path}/ppo/metrics.jsonl")
    assert abs(metrics["kl"]) < 1e-5
    assert metrics["ratio_first"] == pytest.approx(1, abs=1e-5)
    merge = ["--base_model_name", lively.base, "--adapter_path", str(tmp_path / "ppo"), "--output_dir"]
    monkeypatch.setattr("sys.argv", ["merge_lora.py", *merge, str(tmp_path / "merged")])
    merge_lora.main()
    assert "in 4 bit; it is merged into the base in full precision" in capsys.readouterr().err


def test_a_reloaded_score_head_gives_the_same_scores(lively):
    def scores():
        base = load_4bit(lively.base)
        add_hidden_state_fn(base)
        add_score_head(base)
        adapter = read_adapter(lively.reward, "--reward_model_lora_path")
        model = attach_adapter(base, adapter, adapter.config).eval()
        batch = make_tokenizer()(["What is tea?", "你好"], padding=True, return_tensors="pt")
        with torch.no_grad():
            return model(**batch, hidden_state_fn=score_fn(batch["attention_mask"], "default"))

    first = scores()
    assert first.std() > 0
    assert torch.equal(scores(), first)


def test_chat_takes_it_and_merge_does_not(lively, tmp_path, monkeypatch, capsys):
    adapter = f"SFT={lively.sft}"
    lines = iter(["a", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    words = ["--base_model_name", lively.base, "--adapters", adapter, "--load_in_4bit", "true"]
    monkeypatch.setattr("sys.argv", ["chat.py", *words, "--output_max_length", "4"])
    chat.main()
    words = ["--base_model_name", lively.base, "--adapter_path", lively.sft, "--load_in_4bit", "true"]
    monkeypatch.setattr("sys.argv", ["merge_lora.py", *words, "--output_dir", str(tmp_path / "merged")])
    with pytest.raises(InputError, match="unknown argument --load_in_4bit"):
        merge_lora.main()
    assert not Path(tmp_path / "merged").exists()


def test_without_the_package_one_line_says_what_to_install(lively, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else found(name, *more)
    )
    with pytest.raises(InputError, match="--load_in_4bit needs bitsandbytes; run `pip install -r requirements-4bit"):
        load_4bit(lively.base)


def test_a_machine_that_bitsandbytes_cannot_use_is_one_line(lively, monkeypatch):
    def no_device(*args, **kwargs):
        raise RuntimeError("None of the available devices\nis supported")

    monkeypatch.setattr("transformers.integrations.validate_bnb_backend_availability", no_device)
    with pytest.raises(InputError, match=r"cannot load the base model .*None of the available devices is supported"):
        load_4bit(lively.base)
