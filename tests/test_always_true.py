"""Rules 1, 2, 4, 5, 9 and 10 of DESIGN.md ("Always true"), and what PPOTrainer promises beside them."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from trl import SFTConfig, SFTTrainer

from corpus.tokens import encode_response, tokenize_preferences, tokenize_prompts, tokenize_sft
from lora.adapters import REFERENCE, REWARD, read_adapter, use_adapter
from lora.heads import load_value_head, score_fn
from rewards.scores import ScoreStatistics, read_statistics
from rl_training import PPOTrainer, Targets
from rollout import batch as rollout_batch
from rollout import distribution
from rollout.batch import make_batch
from rollout.experience import Experience, describe
from rollout.logprobs import logprobs_fn
from rollout.model import assemble_ppo_model
from tests.conftest import FAMILIES, make_model, make_tokenizer
from tests.helpers import (
    Stages,
    collect,
    independent_logprobs,
    load_plain,
    make_experience,
    make_ppo_trainer,
    make_stages,
    move_policy,
    queries_of,
    save_lively_base,
    save_reward,
    wake_value_head,
)
from utils import ppo
from utils.files import read_jsonl

PAD, EOS = 0, 2
CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant: "


@pytest.fixture(scope="module")
def dropout_stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """The same with dropout wherever a base and an adapter can have it."""
    folder = tmp_path_factory.mktemp("dropout")
    return make_stages(save_lively_base(folder / "base", attention_dropout=0.5), folder, lora_dropout=0.5)


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def ragged_experience(trainer: PPOTrainer) -> Experience:
    wake_value_head(trainer)
    experience = collect(trainer, 8)
    assert len(set(experience.batch.response_mask.sum(1).tolist())) > 2  # ragged, or the tests below show nothing
    return experience


# ---------------------------------------------------------------------------------------------------------------------
# Rule 1: iteration 0
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"temperature": 0.7, "repetition_penalty": 1.3}], ids=["plain", "shaped"])
def test_the_policy_starts_as_the_sft_model(stages: Stages, tmp_path: Path, shape: dict) -> None:
    """LoRA starts at the base, not at the SFT adapter, when its weights are not copied: KL and ratios show it at once.

    Two epochs of two optimizer steps: the first step is the one whose ratios have to be 1; later ones must differ.
    """
    trainer = make_ppo_trainer(stages, tmp_path, steps=1, **shape)
    ratios = []
    loss = trainer.micro_batch_loss
    trainer.micro_batch_loss = lambda *args: ratios.append((result := loss(*args)).farthest_ratio) or result
    trainer.train()
    metrics = read_jsonl(str(tmp_path / "metrics.jsonl"))[0]
    assert metrics["iteration"] == 1
    assert metrics["kl_max"] <= 1e-6 * trainer.args.output_max_length  # rounding adds up over the tokens of a reply
    assert abs(metrics["kl"]) <= 1e-6 * trainer.args.output_max_length
    assert metrics["ratio_first"] == pytest.approx(1, abs=1e-5)
    assert ratios[0] == metrics["ratio_first"]  # of all ratios in the first minibatch, the one farthest from 1
    assert abs(ratios[-1] - 1) > 1e-3


def test_no_dropout_in_any_part(dropout_stages: Stages, tmp_path: Path) -> None:
    """Trainer calls model.train(), and dropout in base or adapter made the first ratio anything but 1.

    Activation checkpointing is what keeps the model in train mode, so it is on.
    """
    trainer = make_ppo_trainer(dropout_stages, tmp_path, steps=1, activation_checkpointing=True)
    trainer.model.enable_input_require_grads()
    model = trainer.model
    assert model.get_base_model().config.attention_dropout == 0.5
    assert model.peft_config[REFERENCE].lora_dropout == 0.5
    trainer.train()
    assert model.training
    assert trainer.state.log_history[0]["ratio_first"] == pytest.approx(1, abs=1e-5)
    assert trainer.state.log_history[0]["kl_max"] <= 1e-6 * trainer.args.output_max_length


# ---------------------------------------------------------------------------------------------------------------------
# Rule 2: the reference is base + SFT adapter, and nothing but the policy changes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_reference_is_base_and_sft_adapter(stages: Stages, tmp_path: Path) -> None:
    """The original (and TRL until today) took the raw base for a reference: disable_adapter() on a PEFT policy."""
    trainer = make_ppo_trainer(stages, tmp_path)
    move_policy(trainer)  # the reference must not follow
    experience = ragged_experience(trainer)
    base, sft = load_plain(stages.base), PeftModel.from_pretrained(load_plain(stages.base), stages.sft).eval()
    queries, mask = queries_of(trainer, 8), experience.batch.response_mask
    rows = list(zip(queries, experience.batch.responses(), strict=True))
    of_sft = torch.cat([independent_logprobs(sft, *row, trainer.collector.sampling) for row in rows])
    of_base = torch.cat([independent_logprobs(base, *row, trainer.collector.sampling) for row in rows])
    torch.testing.assert_close(experience.ref_logprobs[mask], of_sft, rtol=1e-4, atol=1e-4)
    assert (of_sft - of_base).abs().mean() > 0.5
    assert (experience.logprobs[mask] - of_sft).abs().mean() > 0.05


def test_training_changes_policy_and_value_head_alone(stages: Stages, tmp_path: Path) -> None:
    """PEFT flips requires_grad when adapters are loaded or switched: a frozen part that trains is invisible in the loss."""
    trainer = make_ppo_trainer(stages, tmp_path, steps=3)
    before = tensors(trainer.model)
    trainer.train()
    after = tensors(trainer.model)
    assert before.keys() == after.keys()
    kinds = {"policy": [], "value": [], "reference": [], "reward": [], "base": []}
    for name in before:
        if ".default." in name:
            kind = "policy"
        elif ".v_head." in name:
            kind = "value"
        elif f".{REFERENCE}." in name:
            kind = "reference"
        else:
            kind = "reward" if f".{REWARD}." in name else "base"
        kinds[kind].append(torch.equal(before[name], after[name]))
    # 2 layers with 7 linear modules, each with two matrices an adapter; the reward adapter has its head too
    assert [len(kinds[kind]) for kind in ("policy", "value", "reference", "reward")] == [28, 2, 28, 29]
    assert not any(kinds["policy"])
    assert not any(kinds["value"])
    assert all(kinds["reference"] + kinds["reward"] + kinds["base"])
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in before if ".default." in name or ".v_head." in name}
    # and the base is what is on the disk, not a merged copy
    disk = {name.replace(".", ""): value for name, value in load_plain(stages.base).named_parameters()}
    for name, value in after.items():
        plain = name.removeprefix("base_model.model.").replace("base_layer.", "").replace(".", "")
        if "lora_" not in name and plain in disk:
            assert torch.equal(disk.pop(plain), value)
    assert not disk


# ---------------------------------------------------------------------------------------------------------------------
# Rule 4: a score depends on the prompt and the reply alone
# ---------------------------------------------------------------------------------------------------------------------

ROWS = [[5, 9, 30, EOS], [40, 41, 42, 43, 44, 45, 46, EOS], [7, PAD, PAD], [EOS], [17, EOS, EOS, 18, 19]]


def padded(rows: list[list[int]], side: str, extra: int, pad: int) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), length), pad), torch.zeros((len(rows), length), dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), length)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_the_same_in_any_batch_and_padding(family: str, tmp_path: Path) -> None:
    """The original found the last token by `ids != pad`, and trained and scored with different pad ids.

    Rows that hold pad tokens, end with them, or are an EOS alone; pad == EOS among the paddings.  The wanted scores come
    from transformers' own sequence classifier, row by row without padding.
    """
    base = str(tmp_path / "base")
    make_model(family).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    reward = save_reward(base, tmp_path / "reward")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    classifier.config.pad_token_id = 319  # it looks for the last token by id: give it one that no row has
    classifier = PeftModel.from_pretrained(classifier, reward).eval()
    with torch.no_grad():
        wanted = torch.cat([classifier(input_ids=torch.tensor([row])).logits[:, 0] for row in ROWS])
    assert wanted.std() > 0.005  # far above the tolerance

    model = stage_3_model(Stages(base, make_stages(base, tmp_path / "more").sft, reward))
    for side in ("right", "left"):
        for extra, pad in ((0, PAD), (0, EOS), (7, PAD), (7, 99)):
            for rows in (ROWS, ROWS[::-1], ROWS[:1]):
                ids, mask = padded(rows, side, extra, pad)
                with torch.no_grad(), use_adapter(model, REWARD):
                    scores = model(input_ids=ids, attention_mask=mask, hidden_state_fn=score_fn(mask, REWARD))
                expected = torch.stack([wanted[ROWS.index(row)] for row in rows])
                torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def stage_3_model(stages: Stages) -> PeftModel:
    adapters = (
        read_adapter(stages.sft, "--sft_model_lora_path"),
        read_adapter(stages.reward, "--reward_model_lora_path"),
    )
    return assemble_ppo_model(load_plain(stages.base), *adapters)


# ---------------------------------------------------------------------------------------------------------------------
# Rule 5: the same ids in all stages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["问：{prompt}\n\n答：", "Question: {prompt}\n\nAnswer: ", "chat"])
def test_all_stages_see_the_same_ids(template: str) -> None:
    """The original copied its template into two scripts by hand, and its third had none; EOS came and went.

    "Answer: " ends in a space, which a tokenizer merges with the reply when it is given both at once.
    """
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    prompt, reply = "What is the capital of France?", "the capital of France is 很好吃"
    sft = tokenize_sft(Dataset.from_list([{"prompt": prompt, "response": reply}]), template, tokenizer, 200)[0]
    pair = Dataset.from_list([{"prompt": prompt, "chosen": reply, "rejected": "no"}])
    preferences = tokenize_preferences(pair, template, tokenizer, 200, "drop").pairs[0]
    query = tokenize_prompts(pair, template, tokenizer, 200)[0]["input_ids"]
    response = [*encode_response(reply, tokenizer, EOS), EOS]

    assert sft["input_ids"] == preferences["chosen_ids"] == query + response
    assert preferences["query_length"] == len(query)
    assert sft["labels"] == [-100] * len(query) + response  # EOS is learnt, the prompt is not
    rejected = encode_response("no", tokenizer, EOS)
    assert preferences["rejected_ids"] == [*query, *rejected, EOS]
    assert response.count(EOS) == 1
    # the ids say what was meant: the prompt in its template, the reply, EOS
    text = "<s>user: " + prompt + "</s><s>assistant: " if template == "chat" else template.replace("{prompt}", prompt)
    assert tokenizer.decode(query) == text
    assert tokenizer.decode(response) == reply + "</s>"
    # what stage 3 makes of them
    batch = make_batch([query], [response], PAD)
    assert batch.input_ids.tolist() == [sft["input_ids"]]
    assert batch.responses() == [response]


@pytest.mark.parametrize("room", [1, 3])
def test_a_cut_reply_has_no_eos(room: int) -> None:
    """EOS behind a reply that was cut teaches the model to stop in the middle, and the reward model to like it."""
    tokenizer = make_tokenizer()
    row = {"prompt": "你好", "chosen": "the capital of France is Paris", "rejected": "很好吃很可爱"}
    query = tokenize_prompts(Dataset.from_list([row]), "{prompt}=", tokenizer, 200)[0]["input_ids"]
    limit = len(query) + room
    chosen, rejected = (encode_response(row[side], tokenizer, EOS) for side in ("chosen", "rejected"))
    assert min(len(chosen), len(rejected)) > room
    sft = tokenize_sft(
        Dataset.from_list([{"prompt": "你好", "response": row["chosen"]}]), "{prompt}=", tokenizer, limit
    )
    assert sft[0]["input_ids"] == query + chosen[:room]
    pair = tokenize_preferences(Dataset.from_list([row]), "{prompt}=", tokenizer, limit, "cut").pairs[0]
    assert pair["chosen_ids"] == query + chosen[:room]
    assert pair["rejected_ids"] == query + rejected[:room]
    # one token more than the reply has is room for EOS, one less is not
    whole = len(query) + len(chosen) + 1
    for length, end in ((whole, [EOS]), (whole - 1, [])):
        rows = Dataset.from_list([{"prompt": "你好", "response": row["chosen"]}])
        assert tokenize_sft(rows, "{prompt}=", tokenizer, length)[0]["input_ids"] == query + chosen + end


def test_sft_trainer_leaves_the_ids_alone(stages: Stages, tmp_path: Path) -> None:
    """TRL adds EOS, templates and masks of its own to data that it tokenizes: ours must reach the model untouched."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # EOS has to be learnt even so
    texts = [{"prompt": "你好", "response": "a"}, {"prompt": "the cat", "response": "sat on the mat"}]
    rows = tokenize_sft(Dataset.from_list(texts), "{prompt}=", tokenizer, 100)
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2
    )
    trainer = SFTTrainer(load_plain(stages.base), args, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    seen = {
        (tuple(ids[mask == 1].tolist()), tuple(labels[mask == 1].tolist()))
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    }
    assert seen == {(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows}
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


# ---------------------------------------------------------------------------------------------------------------------
# Rule 9: save and load
# ---------------------------------------------------------------------------------------------------------------------


def test_a_saved_policy_and_value_head_give_the_same_outputs(stages: Stages, tmp_path: Path) -> None:
    """TRL's PPO saved the policy alone; others saved all adapters, or the wrong one at the root of the folder."""
    trainer = make_ppo_trainer(stages, tmp_path / "run", steps=2)
    wake_value_head(trainer)
    trainer.train()
    saved = tmp_path / "run"
    trainer.save_model()
    names = set(load_file(saved / "adapter_model.safetensors"))
    assert len(names) == 28
    assert all("lora_" in name for name in names)
    assert set(load_file(saved / "value_head.safetensors")) == {"weight", "bias"}

    experience = collect(trainer, 8)
    mask = experience.batch.response_mask
    rows = list(zip(queries_of(trainer, 8), experience.batch.responses(), strict=True))
    reloaded = PeftModel.from_pretrained(load_plain(stages.base), str(saved)).eval()  # by PEFT alone
    logprobs = torch.cat([independent_logprobs(reloaded, *row, trainer.collector.sampling) for row in rows])
    torch.testing.assert_close(experience.logprobs[mask], logprobs, rtol=1e-4, atol=1e-4)
    assert (experience.logprobs - experience.ref_logprobs)[mask].abs().max() > 1e-2  # it has learnt something

    again = stage_3_model(Stages(stages.base, str(saved), stages.reward))  # the next round of PPO goes on from here
    load_value_head(again.get_base_model(), str(saved))
    hidden_state_fn = logprobs_fn(experience.batch, trainer.collector.sampling, with_values=True)
    with torch.no_grad():
        inputs = {"input_ids": experience.batch.input_ids, "attention_mask": experience.batch.attention_mask}
        values = again(**inputs, hidden_state_fn=hidden_state_fn).values
    torch.testing.assert_close(values, experience.values, rtol=1e-5, atol=1e-5)
    assert values[mask].std() > 0.1


def test_a_checkpoint_fills_policy_and_value_head(stages: Stages, tmp_path: Path) -> None:
    """A resume that "loads" but leaves the value head at its start was TRL's state for years."""
    trainer = make_ppo_trainer(stages, tmp_path / "run", steps=2)
    trainer.train()
    trainer.kl_coef = 0.123
    trainer.save_model(str(tmp_path / "saved"))
    fresh = make_ppo_trainer(stages, tmp_path / "other", steps=2)
    fresh._load_from_checkpoint(str(tmp_path / "saved"))
    wanted, loaded = tensors(trainer.model), tensors(fresh.model)
    assert wanted.keys() == loaded.keys()
    differing = [name for name in wanted if not torch.equal(wanted[name], loaded[name])]
    assert differing == ["base_model.model.score.original_module.weight"]  # random, and used by nobody
    assert fresh.kl_coef == 0.123


# ---------------------------------------------------------------------------------------------------------------------
# Rule 10: measures over real tokens
# ---------------------------------------------------------------------------------------------------------------------


def test_measures_are_worked_by_hand_on_ragged_rows(stages: Stages, tmp_path: Path) -> None:
    """TRL's entropy adds -1 a padded token, its approx_kl is a mean over padding too: diluted by long neighbours."""
    trainer = make_ppo_trainer(stages, tmp_path)
    nan = float("nan")
    batch = make_batch([[5, 6, 7], [8]], [[40, EOS], [41, 42, 43, 44]], PAD)
    experience = make_experience(
        trainer,
        batch,
        scores=torch.tensor([2.0, 4.0]),
        logprobs=torch.tensor([[-1.0, -2.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]]),
        ref_logprobs=torch.tensor([[-1.5, -2.0, nan, nan], [-1.0, -1.0, -1.0, -2.0]]),
        entropy=torch.tensor([[1.0, 2.0, nan, nan], [3.0, 4.0, 5.0, 6.0]]),
    )
    # log-ratios: 0.5 and 0 in the first response, 1 in the second: KL sums 0.5 and 1
    assert experience.response_kl.tolist() == [0.5, 1.0]
    # normalised, the second response lost the missing-EOS penalty of 1 and is 3
    measures = describe(experience)
    expected = {
        "score_mean": 3.0,
        "score_std": 1.0,
        "normalized_score_mean": 2.5,
        "kl": 0.75,
        # k3 = exp(-d) - 1 + d: 0.106531 for 0.5, 0.367879 for 1; the mean of both replies' sums
        "kl_k3": (0.106531 + 0.367879) / 2,
        "kl_max": 1.0,
        "response_length": 3.0,
        "response_length_std": 1.0,
        "empty_fraction": 0.0,
        "ended_fraction": 0.5,
        "entropy": 21 / 6,
    }
    assert measures == pytest.approx(expected, rel=1e-5)


def test_metrics_of_an_iteration_are_means_over_real_tokens(stages: Stages, tmp_path: Path) -> None:
    """The logged losses come from several micro-batches of different widths: their mean must be one over tokens.

    With a single optimizer step a learning rate cannot act: all losses are those of the rollout policy itself, so they
    can be computed from the experience in one go.
    """
    arguments = {"mini_batch_size": 2, "gradient_accumulation_steps": 4, "ppo_epochs": 1, "steps": 1}
    trainer = make_ppo_trainer(stages, tmp_path, **arguments)
    wake_value_head(trainer)
    seen = []
    collect_batch = trainer.collector.collect
    trainer.collector.collect = lambda *args: seen.append(collect_batch(*args)) or seen[-1]
    trainer.train()
    metrics, [experience] = trainer.state.log_history[0], seen
    mask = experience.batch.response_mask
    rewards = ppo.token_rewards(experience.normalized_scores, torch.zeros(mask.shape), mask, 0.0)  # KL is 0
    advantages, returns = ppo.gae(rewards, experience.values, mask, 1.0, 0.95)
    value_loss = 0.5 * (experience.values - returns)[mask].square().mean()
    assert metrics["value_loss"] == pytest.approx(float(value_loss), rel=1e-4)
    assert metrics["policy_loss"] == pytest.approx(0, abs=1e-5)  # minus the mean of whitened advantages
    assert metrics["returns_mean"] == pytest.approx(float(returns[mask].mean()), rel=1e-4)
    assert metrics["values_mean"] == pytest.approx(float(experience.values[mask].mean()), rel=1e-4)
    assert metrics["reward_mean"] == pytest.approx(float(experience.normalized_scores.mean()), rel=1e-4)
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + 0.1 * metrics["value_loss"], rel=1e-5)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-9)
    assert advantages[mask].std() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


def gradients(trainer: PPOTrainer, experience: Experience) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of the first optimizer step of an update, which does not act."""
    trainer.create_optimizer_and_scheduler(1)
    noise = torch.Generator().manual_seed(5)
    advantages = torch.randn(experience.values.shape, generator=noise)
    found: dict[str, Tensor] = {}

    def keep() -> None:
        found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.optimizer.step = keep
    return found, trainer.update(trainer.model, experience, Targets(advantages, advantages + experience.values))


def test_micro_batches_do_not_change_the_gradient(stages: Stages, tmp_path: Path) -> None:
    """Means of micro-batches with equal weight give tokens of short replies more weight than those of long ones."""
    once = {"ppo_epochs": 1, "max_grad_norm": 0.0}
    whole = make_ppo_trainer(stages, tmp_path / "whole", mini_batch_size=8, **once)
    parts = make_ppo_trainer(stages, tmp_path / "parts", mini_batch_size=2, gradient_accumulation_steps=4, **once)
    experience = ragged_experience(whole)
    wake_value_head(parts)
    for trainer in (whole, parts):
        move_policy(trainer)  # ratios off 1, some of them clipped
    expected, expected_metrics = gradients(whole, experience)
    found, metrics = gradients(parts, experience)
    assert metrics["optimizer_steps"] == expected_metrics["optimizer_steps"] == 1
    assert expected.keys() == found.keys()
    assert len(expected) == 30  # 28 LoRA matrices, weight and bias of the value head
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    assert 0 < expected_metrics["clip_fraction"] < 1
    skip = ("ratio_first",)  # of the first micro-batch, which differs
    for name in expected_metrics.keys() - set(skip):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("arguments", [{}, {"temperature": 0.7, "repetition_penalty": 1.3}], ids=["plain", "shaped"])
def test_the_gradient_is_that_of_a_plain_implementation(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict
) -> None:
    """Sorted parts, logits in chunks and a gradient taken in the forward pass may not change what is learnt.

    The reference is autograd through transformers' own forward pass, logits of every position, one row at a time, with the
    loss written out as in the papers.
    """
    monkeypatch.setattr(distribution, "TILE", 64)
    monkeypatch.setitem(rollout_batch.PASS_OVERHEAD, "cpu", 0.0)  # one length a part
    settings = {"ppo_epochs": 1, "max_grad_norm": 0.0, "mini_batch_size": 8, **arguments}
    trainer = make_ppo_trainer(stages, tmp_path, **settings)
    experience = ragged_experience(trainer)
    move_policy(trainer)
    found, metrics = gradients(trainer, experience)
    batch, sampling, model = experience.batch, trainer.collector.sampling, trainer.model
    assert len(trainer.collector.micro_batches(batch, torch.arange(8))) > 3
    advantages = torch.randn(experience.values.shape, generator=torch.Generator().manual_seed(5))
    returns = advantages + experience.values
    losses = []
    for row, reply in enumerate(batch.responses()):
        start, end = int(batch.query_lengths[row]), int(batch.query_lengths[row]) + len(reply)
        ids = batch.input_ids[row : row + 1, :end]
        states = model.get_base_model().model(input_ids=ids).last_hidden_state[0, start - 1 : end - 1]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, start - 1 : end - 1]
        values = model.get_base_model().v_head(states).squeeze(1)
        for step, token in enumerate(reply):
            own = logits[step]
            seen = torch.zeros(320, dtype=torch.bool).index_fill(0, ids[0, : start + step], True)
            penalty = sampling.repetition_penalty
            own = torch.where(seen, torch.where(own < 0, own * penalty, own / penalty), own)
            if step == 0:
                own = own.index_fill(0, torch.tensor([PAD, EOS]), -torch.inf)
            logprob = (own / sampling.temperature).log_softmax(-1)[token]
            ratio = (logprob - experience.logprobs[row, step]).exp()
            advantage, old = advantages[row, step], experience.values[row, step]
            policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
            clipped = values[step].clamp(old - 0.2, old + 0.2)
            squares = torch.maximum((values[step] - returns[row, step]) ** 2, (clipped - returns[row, step]) ** 2)
            losses.append(policy + 0.1 * 0.5 * squares)
    loss = torch.stack(losses).mean()
    model.zero_grad()
    loss.backward()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert len(found) == 30
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale + 1e-7)


def test_early_stopping_ends_the_epochs(stages: Stages, tmp_path: Path) -> None:
    """Without it a large learning rate carries the policy away from the replies it learns from."""
    wild = {"learning_rate": 0.05, "ppo_epochs": 6, "target_kl": 0.01, "steps": 1}
    runs = {}
    for stopping in (False, True):
        trainer = make_ppo_trainer(stages, tmp_path / str(stopping), early_stopping=stopping, **wild)
        trainer.train()
        runs[stopping] = trainer.state.log_history[0]
    assert runs[False]["optimizer_steps"] == 12  # 6 epochs of 8 / 4
    assert runs[False]["stopped_early"] == 0
    assert runs[False]["approx_kl"] > 0.015
    assert 1 <= runs[True]["optimizer_steps"] < 12
    assert runs[True]["stopped_early"] == 1
    assert runs[True]["approx_kl"] <= 0.015  # only steps that were taken are in the mean


def test_early_stopping_leaves_a_calm_run_alone(stages: Stages, tmp_path: Path) -> None:
    """A limit that always stops would pass for one that works."""
    trainer = make_ppo_trainer(stages, tmp_path, early_stopping=True, learning_rate=1e-5, steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["optimizer_steps"] == 4
    assert trainer.state.log_history[0]["stopped_early"] == 0


def test_early_stopping_takes_at_least_one_step(stages: Stages, tmp_path: Path) -> None:
    """Rounding (much of it in bfloat16) is a KL above a tiny target: no step was taken, and the metrics had no loss."""
    trainer = make_ppo_trainer(stages, tmp_path, early_stopping=True, steps=1)
    trainer.args.target_kl = -1.0  # below any rounding
    trainer.train()
    assert trainer.state.log_history[0]["optimizer_steps"] == 1
    assert trainer.state.log_history[0]["stopped_early"] == 1


def test_adafactor_trains(stages: Stages, tmp_path: Path) -> None:
    """--adafactor True of the original ended in a NameError."""
    trainer = make_ppo_trainer(stages, tmp_path, adafactor=True, steps=2)
    before = tensors(trainer.model)
    trainer.train()
    assert "Adafactor" in type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__
    after = tensors(trainer.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".default." in name or ".v_head." in name}


def test_scores_are_normalised_penalised_and_clipped(stages: Stages, tmp_path: Path) -> None:
    """The original fed sigmoid(score) to PPO and did not care whether a reply was finished.

    Card: mean 1, standard deviation 2.  Baseline 0.5, missing-EOS penalty 1.5, clip at 3.
    """
    settings = {"reward_baseline": 0.5, "missing_eos_penalty": 1.5, "score_clip": 3.0, "floor_broken_replies": False}
    trainer = make_ppo_trainer(stages, tmp_path, statistics=ScoreStatistics(1.0, 2.0), **settings)
    # the third reply is cut though its prompt ends with EOS; the first and the fourth have their own EOS
    batch = make_batch([[5], [6], [7, EOS], [8]], [[40, EOS], [41, 42], [43], [EOS]], PAD)
    experience = make_experience(trainer, batch, torch.tensor([3.0, 3.0, -9.0, 20.0]))
    assert experience.ended.tolist() == [True, False, False, True]
    # (3-1)/2 - 0.5 = 0.5; the same - 1.5 = -1; (-9-1)/2 - 0.5 - 1.5 = -7 -> -3; (20-1)/2 - 0.5 = 9 -> 3
    assert experience.normalized_scores.tolist() == [0.5, -1.0, -3.0, 3.0]


def test_statistics_come_from_the_reward_card(stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Scores of a reward adapter without a card are used as they are, and one line says so."""
    reward = save_reward(stages.base, tmp_path / "reward")

    def read(**card: object) -> ScoreStatistics:
        if card:
            Path(reward, "reward_card.json").write_text(json.dumps({"passed": True, **card}), encoding="utf-8")
        return read_statistics(read_adapter(reward, "--reward_model_lora_path"), allow_weak=True)

    assert read() == ScoreStatistics(0.0, 1.0)
    assert capsys.readouterr().err.count("has no reward_card.json") == 1
    assert read(score_mean=-1.5, score_std=0.25) == ScoreStatistics(-1.5, 0.25)
    assert read(score_mean=-1.5, score_std=0.0) == ScoreStatistics(-1.5, 1.0)  # all scores alike


# ---------------------------------------------------------------------------------------------------------------------
# What one iteration may not share with the next, and numbers that nothing else looks at
# ---------------------------------------------------------------------------------------------------------------------


def test_each_iteration_samples_anew_and_each_epoch_has_its_order(stages: Stages, tmp_path: Path) -> None:
    """Seeds without the iteration give the same responses to the same prompts for ever."""
    trainer = make_ppo_trainer(stages, tmp_path)
    rows = [trainer.train_dataset[row] for row in range(8)]
    sampled, orders = [], []
    for iteration in (0, 1, 0):
        trainer.state.global_step = iteration
        sampled.append(trainer.collect(trainer.model, rows).responses)
        orders.append(torch.cat(list(trainer.optimizer_batches(8))).view(2, 8).tolist())  # [epochs, rows]
    assert sampled[0] == sampled[2] != sampled[1]
    assert orders[0] == orders[2] != orders[1]
    for first, second in orders:
        assert sorted(first) == sorted(second) == list(range(8))
        assert first != second


def test_a_policy_that_is_not_the_sft_model_at_the_start_ends_the_run(stages: Stages, tmp_path: Path) -> None:
    trainer = make_ppo_trainer(stages, tmp_path)
    move_policy(trainer, size=0.01)
    with pytest.raises(RuntimeError, match="the policy is not the SFT model before its first update: KL") as stopped:
        trainer.train()
    assert 1e-3 < float(str(stopped.value).rpartition(" ")[2]) < 10  # far enough from the limit to say something of it


def test_the_kl_weight_moves_with_the_responses_of_an_iteration(stages: Stages, tmp_path: Path) -> None:
    """KL is 0 in the first iteration, 100% under its target and so 20% after the clip: 8 responses of a horizon of 100."""
    trainer = make_ppo_trainer(stages, tmp_path, steps=1, adap_kl_ctrl=True, adap_kl_horizon=100.0, init_kl_coef=0.5)
    trainer.train()
    assert trainer.kl_coef == pytest.approx(0.5 * (1 - 0.2 * 8 / 100), rel=1e-6)


@pytest.mark.parametrize(("share", "steps"), [(1.25, 2), (1.6, 1)])
def test_early_stopping_is_at_one_and_a_half_times_the_target(
    stages: Stages, tmp_path: Path, share: float, steps: int
) -> None:
    """Two optimizer steps; before the first KL is 0, so that of the second is twice the mean."""
    settings = {"steps": 1, "ppo_epochs": 1}
    free = make_ppo_trainer(stages, tmp_path / "free", **settings)
    free.train()
    second = 2 * free.state.log_history[0]["approx_kl"]
    trainer = make_ppo_trainer(stages, tmp_path / "stops", early_stopping=True, target_kl=second / share, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["optimizer_steps"] == steps
