"""Adapters that another tool made: whatever one changes is switched with it, or it is refused in one line.

The right values are those of plain PEFT with one adapter on a base that holds nothing else.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import compare
import merge_lora
import reward_modeling
import rl_training
from inference.side_by_side import ChatModels, InferenceArguments, load_models
from lora.adapters import POLICY, REFERENCE, attach_adapter, load_adapter, read_adapter, use_adapter
from lora.base_model import base_fingerprint, load_base
from rewards.reward_model import member_scores, new_reward_model, reward_scores
from rollout.batch import make_batch
from rollout.distribution import output_logits
from rollout.logprobs import logprobs_fn
from rollout.model import assemble_ppo_model
from runs.memory_plan import empty_base, tensor_bytes
from tests.conftest import make_tokenizer
from tests.helpers import (
    Stages,
    independent_logprobs,
    lively,
    load_plain,
    make_ppo_trainer,
    move_policy,
    queries_of,
    run_main,
    save_reward,
    strengthen,
)
from utils.arguments import LoraArguments, ModelArguments
from utils.console import InputError

LINEAR = ["q_proj", "v_proj", "up_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "both tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "whole embedding": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
    "whole output": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    "both whole": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
    "both whole, tied": {
        "target_modules": LINEAR,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "whole norm": {"target_modules": LINEAR, "modules_to_save": ["norm"]},
    "tokens": {"target_modules": LINEAR, "trainable_token_indices": [3, 5, 9]},
    "tokens apart": {
        "target_modules": LINEAR,
        "trainable_token_indices": {"embed_tokens": [3, 5, 9], "lm_head": [5, 7]},
    },
    "embedding in the file": {"target_modules": LINEAR},
    "biases": {"target_modules": LINEAR, "bias": "lora_only"},
    "all biases": {"target_modules": LINEAR, "bias": "all"},
    "LoRA bias": {"target_modules": LINEAR, "lora_bias": True},
    "DoRA": {"target_modules": [*LINEAR, "embed_tokens"], "use_dora": True},
    "rsLoRA": {"target_modules": LINEAR, "use_rslora": True},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["k_proj.weight"]},
}
ON_TIED = {"embedding", "output", "both tied", "whole embedding", "whole output", "both whole", "both whole, tied"}
ON_TIED |= {"tokens", "tokens apart", "embedding in the file", "biases", "all biases"}
IDS = torch.tensor([[5, 9, 33, 7, 41, 3]])


def save_base_model(folder: Path, tied: bool) -> str:
    """Llama, of two matrices for the tokens and no bias, or of one and biases everywhere (tied)."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    config = LlamaConfig(vocab_size=320, **shape, **ids, tie_word_embeddings=tied, attention_bias=tied, mlp_bias=tied)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    (model if tied else lively(model)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture(scope="module")
def bases(folder: Path) -> dict[str, str]:
    return {"apart": save_base_model(folder / "apart", False), "tied": save_base_model(folder / "tied", True)}


@pytest.fixture(scope="module")
def reward(bases: dict[str, str], folder: Path) -> str:
    return save_reward(bases["apart"], folder / "reward")


def move(model: nn.Module, seed: int, size: float = 0.1) -> None:
    """Another number in every place that trains; once where two names have one place."""
    generator = torch.Generator().manual_seed(seed)
    places = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    for parameter in places.values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * size)


def save_adapter(base: str, path: Path, kind: str, seed: int, **more: Any) -> str:
    """An adapter of one of the KINDS, by plain PEFT."""
    if path.exists():
        return str(path)
    torch.manual_seed(seed)
    model = get_peft_model(load_plain(base), LoraConfig(task_type="CAUSAL_LM", r=4, **{**KINDS[kind], **more}))
    move(model, seed)
    if kind == "embedding in the file":
        model.get_input_embeddings().weight.data.add_(torch.randn(320, 32) * 0.1)
    model.save_pretrained(path, save_embedding_layers=kind == "embedding in the file" or "auto")
    return str(path)


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@functools.cache
def alone(base: str, adapter: str | None) -> Tensor:
    """Logits of the base with one adapter, or none, by plain PEFT."""
    model = load_plain(base)
    return logits(model if adapter is None else PeftModel.from_pretrained(model, adapter).eval())


def side_by_side(base: str, *adapters: str) -> ChatModels:
    """As compare.py and chat.py load them; the models have the names of the folders."""
    words = [f"{path}={path}" for path in adapters]
    return load_models(InferenceArguments(model_name_or_path=base, adapters=words, output_max_length=8))


@torch.no_grad()
def job_logits(model: PeftModel) -> Tensor:
    """Logits as sampler and log-probs compute them."""
    mask = torch.ones_like(IDS)
    return model(
        input_ids=IDS, attention_mask=mask, hidden_state_fn=lambda base, hidden: output_logits(base, hidden[0])
    )[None]


# ---------------------------------------------------------------- side by side


@pytest.mark.parametrize(
    ("kind", "of_base"),
    [(kind, of_base) for of_base in ("apart", "tied") for kind in KINDS if of_base == "apart" or kind in ON_TIED],
)
def test_two_of_a_kind_act_as_if_they_were_alone(kind, of_base, bases, folder):
    """A user's adapter that had trained embed_tokens and lm_head for new chat tokens moved all models beside it: "base" in
    compare.py was off by 3.4.  Trained tokens beside another adapter were a KeyError, biases moved the base by 1.5."""
    base = bases[of_base]
    first, second = (save_adapter(base, folder / f"{of_base} {kind} {seed}", kind, seed) for seed in (1, 2))
    plain = save_adapter(base, folder / f"{of_base} plain", "plain", 3)
    if of_base == "tied" and "biases" in kind:  # this base has some, the other one none
        with pytest.raises(InputError, match=rf"{first} changes the base's own biases .*merge_lora.py"):
            read_adapter(first, "--adapters A")
        return
    expected = {path: alone(base, path) for path in (None, first, second, plain)}
    assert (expected[first] - expected[second]).abs().max() > 0.05
    for order in ([first, second, plain], [plain, second, first]):
        models = side_by_side(base, *order)
        model = models.model
        for path in (None, *order, None):
            with use_adapter(model, *models.adapters[path or "base"]):
                assert_close(logits(model), expected[path], rtol=0, atol=1e-5)
                assert_close(job_logits(model), expected[path], rtol=0, atol=1e-5)
        assert base_fingerprint(model.get_base_model()) == base_fingerprint(load_plain(base))


def test_an_embedding_in_the_file_that_is_the_base_s_own_is_left_out(bases, folder):
    """PEFT adds the embedding to the file wherever it thinks that it may have changed; a copy of it costs memory."""
    path = folder / "own embedding"
    model = get_peft_model(load_plain(bases["apart"]), LoraConfig(task_type="CAUSAL_LM", **KINDS["plain"]))
    move(model, 1)
    model.bfloat16().save_pretrained(path, save_embedding_layers=True)  # the base is float32
    assert "base_model.model.lm_head.weight" in read_adapter(str(path), "--x").keys
    model = side_by_side(bases["apart"], str(path)).model
    assert not any(isinstance(module, ModulesToSaveWrapper) for module in model.modules())


def test_one_layer_changed_in_two_ways_is_refused_by_name(bases, folder):
    """PEFT wraps one wrapper in the other, and both adapters compute something else, or it fails far from the cause."""
    base = bases["tied"]
    kinds = {
        kind: save_adapter(base, folder / f"tied {kind} 1", kind, 1) for kind in ("whole output", "tokens", "output")
    }
    for one, other, words in (
        ("tokens", "output", r"changes lm_head by LoRA, another one here lm_head token by token"),
        ("output", "whole output", r"changes lm_head as a whole, another one here lm_head by LoRA"),
        ("whole output", "tokens", r"changes lm_head token by token, another one here lm_head as a whole"),
    ):
        with pytest.raises(InputError, match=f"{kinds[other]} {words}"):
            side_by_side(base, kinds[one], kinds[other])


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pissa"}, "changes the base's own weights .init_lora_weights pissa."),
        ({"init_lora_weights": "olora"}, "changes the base's own weights .init_lora_weights olora."),
        ({"layer_replication": [(0, 2), (1, 2)]}, "is a LoRA with layer_replication, which"),
        ({"alora_invocation_tokens": [5, 9]}, "is a LoRA with alora_invocation_tokens, which"),
    ],
)
def test_what_cannot_be_switched_is_refused_by_name(settings, words, bases, tmp_path):
    """PiSSA and OLoRA take their start off the base each time that they are loaded: reference and base were others then."""
    model = get_peft_model(load_plain(bases["apart"]), LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, **KINDS["biases"]))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(InputError, match=f"--x {tmp_path} {words}"):
        read_adapter(str(tmp_path), "--x")


@pytest.mark.parametrize("script", [rl_training, reward_modeling, compare])
def test_every_script_refuses_it(script, bases, folder, tmp_path, monkeypatch):
    base = bases["tied"]
    adapter = save_adapter(base, folder / "tied biases 1", "biases", 1)
    words = ["--model_name_or_path", base, "--output_dir", tmp_path / "output"]
    if script is compare:
        words += ["--adapters", f"A={adapter}", "--prompts", write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])]
        monkeypatch.setattr("sys.argv", ["compare.py", *map(str, words)])
        call = compare.main
    else:
        rows = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
        words += ["--sft_model_lora_path", adapter, "--dataset", write_rows(tmp_path / "pairs.jsonl", rows)]
        words += ["--reward_model_lora_path", adapter] if script is rl_training else ["--eval_fraction", "0.3"]

        def call() -> None:
            run_main(script, words, monkeypatch)

    with pytest.raises(InputError, match=rf"{adapter} changes the base's own biases"):
        call()
    assert not list(tmp_path.glob("output/*.safetensors"))


def save_resized(base: str, path: Path) -> str:
    model = load_plain(base)
    model.resize_token_embeddings(324, mean_resizing=False)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **KINDS["both whole"])).save_pretrained(path)
    return str(path)


def test_a_resized_vocabulary_is_told_as_such(bases, tmp_path):
    adapter = save_resized(bases["apart"], tmp_path)
    with pytest.raises(InputError, match=rf"{adapter} has 324 tokens in lm_head, this base 320: .*resized vocabulary"):
        side_by_side(bases["apart"], adapter)


def test_stage_2_tells_before_the_training_that_the_sft_adapter_does_not_fit(bases, tmp_path, monkeypatch):
    """The SFT adapter is loaded for the reward card alone, which comes last: hours were lost."""
    adapter = save_resized(bases["apart"], tmp_path / "sft")
    rows = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
    words = ["--model_name_or_path", bases["apart"], "--output_dir", tmp_path / "reward", "--eval_fraction", "0.3"]
    words += ["--sft_model_lora_path", adapter, "--dataset", write_rows(tmp_path / "pairs.jsonl", rows)]
    monkeypatch.setattr(reward_modeling.RewardTrainer, "train", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(InputError, match="resized vocabulary"):
        run_main(reward_modeling, words, monkeypatch)


# ---------------------------------------------------------------- stage 3


def three_models(model: PeftModel) -> list[Tensor]:
    """Logits of base and reference, and a score, as numbers to compare bit by bit."""
    found = []
    for names in ((), (REFERENCE,)):
        with use_adapter(model, *names):
            found += [logits(model), job_logits(model)]
    with torch.no_grad():
        return [*found, reward_scores(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})]


@pytest.mark.parametrize("kind", ["both whole", "tokens", "embedding", "DoRA"])
def test_ppo_moves_the_policy_alone_and_saves_all_of_it(kind, bases, reward, folder, tmp_path):
    """The reference read the policy's own lm_head: its logits moved by 1.7 to 1.9 with the policy, so KL was measured to a
    moving model.  Where tokens or embeddings were adapted, a part of the policy did not train and could not be saved."""
    base = bases["apart"]
    sft = save_adapter(base, folder / f"apart {kind} 1", kind, 1)
    trainer = make_ppo_trainer(Stages(base, sft, reward), tmp_path, steps=1, ppo_epochs=1)
    model = trainer.model
    before, start = three_models(model), logits(model)
    for logit in (start, before[2], before[3]):
        assert_close(logit, alone(base, sft), rtol=0, atol=1e-5)
    trainer.train()  # raises where the first policy is not the reference
    move_policy(trainer)
    after = three_models(model)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert (logits(model) - start).abs().max() > 0.1

    reply, (query,) = [7, 41, 2], queries_of(trainer, 1)
    batch = make_batch([query], [reply], 0)
    with torch.no_grad(), use_adapter(model, REFERENCE):
        hidden_state_fn = logprobs_fn(batch, trainer.collector.sampling, with_values=False)
        found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, hidden_state_fn=hidden_state_fn)
    plain = PeftModel.from_pretrained(load_plain(base), sft).eval()
    assert_close(
        found.logprobs[0], independent_logprobs(plain, query, reply, trainer.collector.sampling), rtol=0, atol=1e-5
    )

    trainer.save_model(str(tmp_path / "saved"))
    assert_close(alone(base, str(tmp_path / "saved")), logits(model), rtol=0, atol=1e-5)
    moved = logits(model)
    move_policy(trainer)
    trainer.policy_files.load(str(tmp_path / "saved"))
    assert torch.equal(logits(model), moved)


def test_ppo_trains_the_lora_weights_and_nothing_that_came_whole(bases, reward, folder):
    base = bases["apart"]
    sft = save_adapter(base, folder / "apart both whole 1", "both whole", 1)
    model = assemble_ppo_model(load_plain(base), read_adapter(sft, "--sft"), read_adapter(reward, "--reward"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all((".lora_" in name and f".{POLICY}." in name) or ".v_head." in name for name in trained)
    assert len(trained) == 2 * 2 * len(LINEAR) + 2


def test_the_plan_counts_what_an_adapter_brings_whole(bases, reward, folder):
    base = bases["apart"]
    sft = read_adapter(save_adapter(base, folder / "apart both whole 1", "both whole", 1), "--sft")
    args = ModelArguments(model_name_or_path=base)
    sizes = []
    for empty in (empty_base(args, torch.float32), load_base(args, torch.float32)):
        model = assemble_ppo_model(empty, sft, read_adapter(reward, "--reward"))
        sizes.append(tensor_bytes([*model.parameters(), *model.buffers()]))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("named", [True, False])
def test_a_score_head_that_the_configuration_does_not_name(named, bases, tmp_path):
    """An old PEFT wrote `modules_to_save: null` beside a head in the file: all checks passed, and stage 3 died of it."""
    base = bases["apart"]
    torch.manual_seed(4)
    judge = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    judge = get_peft_model(judge, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=LINEAR))
    move(judge, 4)
    judge.save_pretrained(tmp_path / "reward")
    file = tmp_path / "reward" / "adapter_config.json"
    if not named:
        file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": None}))
    sft = save_adapter(base, tmp_path / "sft", "both whole", 1)
    reward = read_adapter(str(tmp_path / "reward"), "--reward")
    model = assemble_ppo_model(load_plain(base), read_adapter(sft, "--sft"), reward)
    with torch.no_grad():
        scores = reward_scores(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
        assert_close(scores, judge.eval()(input_ids=IDS).logits[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "biases" not in kind])
def test_a_reward_adapter_starts_as_the_sft_adapter(kind, bases, folder, tmp_path):
    """--init_from_sft: its scores are a new head's on the SFT model's states, LoRA and head alone learn, and a file is read
    back with all that the SFT adapter had."""
    base = bases["tied" if kind in ON_TIED else "apart"]
    sft = save_adapter(base, folder / f"{Path(base).name} {kind} 1", kind, 1)
    model, members = new_reward_model(load_plain(base), LoraArguments(), seed=2, sft=read_adapter(sft, "--x"))
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    head = model.get_base_model().score.modules_to_save[members[0]].weight.detach()
    plain = PeftModel.from_pretrained(load_plain(base), sft).eval()
    with torch.no_grad():
        states = plain(input_ids=IDS, output_hidden_states=True).hidden_states[-1][:, -1]
        (scores,) = member_scores(model.eval(), inputs, members)
    assert_close(scores, (states @ head.T)[:, 0], rtol=0, atol=1e-6)

    before = {name: value.clone() for name, value in model.named_parameters()}
    move(model, seed=3)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any(".score." in name for name in changed)
    assert all("lora_" in name or ".score." in name for name in changed)
    assert {name for name in before if "lora_" in name} <= changed
    model.save_pretrained(tmp_path)
    saved = read_adapter(str(tmp_path), "--x")
    assert saved.has_score_head
    load_adapter(model, saved, "reloaded")
    with torch.no_grad():
        ours, reloaded = member_scores(model.eval(), inputs, [*members, "reloaded"])
    assert torch.equal(ours, reloaded)
    assert not torch.equal(ours, scores)


@pytest.mark.parametrize("kind", ["tokens", "both whole"])
def test_the_reward_stage_gives_back_what_it_borrowed(kind, bases, folder, tmp_path):
    """Stage 2 loads the SFT adapter to sample from it and takes it off again: the reward model is as it was, and its file
    can be read back."""
    base = bases["tied"]
    sft = save_adapter(base, folder / f"tied {kind} 1", kind, 1)
    model, members = new_reward_model(load_plain(base), LoraArguments(lora_r=4, lora_dropout=0.5), seed=2)
    strengthen(model, seed=2)
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        (before,) = member_scores(model.eval(), inputs, members)
        load_adapter(model, read_adapter(sft, "--x"), "sft")
        with use_adapter(model, "sft"):
            assert_close(logits(model), alone(base, sft), rtol=0, atol=1e-5)
        model.delete_adapter("sft")
        load_adapter(model, read_adapter(str(tmp_path), "--x"), "reloaded")
        for scores in member_scores(model, inputs, [*members, "reloaded"]):
            assert torch.equal(scores, before)


# ---------------------------------------------------------------- merge


@pytest.mark.parametrize(
    "kind", ["output", "embedding", "both tied", "whole embedding", "tokens", "tokens apart", "all biases", "LoRA bias"]
)
def test_merging_onto_a_tied_base(kind, bases, folder, tmp_path, monkeypatch):
    """LoRA on a tied lm_head was merged into the embedding as well, and then a traceback said that the models differ."""
    base = bases["tied"]
    adapter = save_adapter(base, folder / f"tied {kind} 1", kind, 1)
    words = ["--base_model_name", base, "--adapter_path", adapter, "--output_dir", str(tmp_path / "merged")]
    monkeypatch.setattr("sys.argv", ["merge_lora.py", *words])
    merge_lora.main()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert_close(logits(merged), alone(base, adapter), rtol=0, atol=1e-5)


def test_a_lora_bias_without_a_place_is_one_line(bases, folder, tmp_path, monkeypatch):
    base = bases["apart"]
    adapter = save_adapter(base, folder / "apart LoRA bias 1", "LoRA bias", 1)
    words = ["--base_model_name", base, "--adapter_path", adapter, "--output_dir", str(tmp_path / "merged")]
    monkeypatch.setattr("sys.argv", ["merge_lora.py", *words])
    with pytest.raises(InputError, match=rf"{adapter} cannot be merged into this base: .*the base layer has no bias"):
        merge_lora.main()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", [True, 3, "lm_head", [1], [None], {"lm_head": True}])
def test_modules_to_save_of_another_type_is_one_line(value, bases, folder, tmp_path):
    """`modules_to_save: true` in an edited adapter_config.json was a TypeError; "lm_head" was read letter by letter."""
    file = Path(shutil.copytree(save_adapter(bases["apart"], folder / "apart plain 1", "plain", 1), tmp_path / "a"))
    file /= "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": value}))
    with pytest.raises(InputError, match=r"^--sft .*: modules_to_save in its adapter_config\.json is .*, not a list"):
        read_adapter(str(tmp_path / "a"), "--sft")


@pytest.mark.parametrize("field", [{"megatron_config": {"a": 1}}, {"trainable_token_indices": 1.5}])
def test_what_this_machine_or_base_has_not_is_one_line(field, bases, folder, tmp_path):
    """Megatron that is not installed, or half a token, ended in a traceback of PEFT."""
    base = bases["apart"]
    file = Path(shutil.copytree(save_adapter(base, folder / "apart plain 1", "plain", 1), tmp_path / "a"))
    file /= "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **field}))
    adapter = read_adapter(str(tmp_path / "a"), "--sft")
    with pytest.raises(InputError, match="does not fit this base"):
        attach_adapter(load_plain(base), adapter, adapter.config)
