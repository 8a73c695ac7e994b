"""All three stages and the merge on tiny random models of six families, through the scripts' own main().

Each family runs the whole pipeline once, with two or three steps a stage; the tests look at what it left behind.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer

import merge_lora
import reward_modeling
import rl_training
import sft_training
from rollout.batch import Batch, make_batch
from rollout.distribution import Sampling
from rollout.logprobs import reply_job
from rollout.model import assemble_ppo_model
from tests.conftest import FAMILIES, save_base
from tests.helpers import load_plain, run_main
from utils.adapters import POLICY, REFERENCE, REWARD, load_weights, read_adapter, use_adapter
from utils.files import read_jsonl
from utils.heads import load_value_head, score_job

QUERIES = [[5, 9, 33, 7], [41], [100, 60, 61, 62, 63, 64, 65]]
RESPONSES = [[12, 300, 2], [90, 91, 92, 93, 94, 95, 2], [17]]  # the last one was cut: it has no EOS
TRUNK = "base_model.model."  # what PEFT puts in front of the base's own names


@dataclass
class Trained:
    """A model after a stage, and its parameters that were trainable as they were before it."""

    model: PeftModel
    before: dict[str, Tensor]


@dataclass
class Pipeline:
    """What one run of the four scripts left behind: folders, and the models of the stages."""

    family: str
    folder: Path
    trained: dict[str, Trained] = field(default_factory=dict)

    def __getattr__(self, name: str) -> str:
        """Folder of that name, such as `pipeline.sft`."""
        return str(self.folder / name)


def train_arguments(pipeline: Pipeline, stage: str, dataset: str) -> list[str]:
    """What the three stages have in common."""
    return [
        *("--model_name", pipeline.base, "--dataset", dataset, "--output_dir", str(pipeline.folder / stage)),
        *("--prompt_template", "{prompt}=", "--learning_rate", "1e-2", "--report_to", "none", "--save_strategy", "no"),
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data) -> Pipeline:
    family = request.param
    result = Pipeline(family, tmp_path_factory.mktemp(family))
    save_base(result.folder / "base", family)
    train = Trainer.train

    with pytest.MonkeyPatch.context() as patch:

        def run(script: ModuleType, stage: str, arguments: list[str]) -> None:
            def remember(trainer: Trainer, *args, **kwargs):
                model = trainer.model
                before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
                result.trained[stage] = Trained(model, before)
                return train(trainer, *args, **kwargs)

            patch.setattr(Trainer, "train", remember)
            run_main(script, arguments, patch)

        lora = ["--lora_r", "4", "--lora_dropout", "0", "--max_steps", "3", "--per_device_train_batch_size", "4"]
        run(sft_training, "sft", [*train_arguments(result, "sft", data["sft"]), *lora])
        held_out = ["--eval_fraction", "0.3"]
        run(
            reward_modeling,
            "reward",
            [*train_arguments(result, "reward", data["preferences"]), *lora, "--eval_strategy", "no", *held_out],
        )
        adapters = ["--sft_model_lora_path", result.sft, "--reward_model_lora_path", result.reward]
        adapters += ["--allow_weak_reward", "true"]
        sizes = ["--steps", "2", "--batch_size", "4", "--mini_batch_size", "2", "--ppo_epochs", "2"]
        run(
            rl_training,
            "ppo",
            [*train_arguments(result, "ppo", data["preferences"]), *adapters, *sizes, "--output_max_length", "6"],
        )
        for stage in ("sft", "ppo", "reward"):
            words = ["--base_model_name", result.base, "--adapter_path", str(result.folder / stage)]
            words += ["--output_dir", str(result.folder / f"merged_{stage}")]
            words += ["--as_classifier"] if stage == "reward" else []
            patch.setattr(sys, "argv", ["merge_lora.py", *words])
            merge_lora.main()
    return result


def parameters(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def with_adapter(pipeline: Pipeline, stage: str) -> PeftModel:
    """Base + adapter by plain transformers and PEFT."""
    return PeftModel.from_pretrained(load_plain(pipeline.base), str(pipeline.folder / stage)).eval()


def ppo_model(pipeline: Pipeline) -> PeftModel:
    """Base + all adapters, as stage 3 starts."""
    sft, reward = read_adapter(pipeline.sft, "--sft"), read_adapter(pipeline.reward, "--reward")
    return assemble_ppo_model(load_plain(pipeline.base), sft, reward)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> list[Tensor]:
    rows = [torch.tensor([[*query, *response]]) for query, response in zip(QUERIES, RESPONSES, strict=True)]
    return [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in rows]


@torch.no_grad()
def scores_of(model: PeftModel, ids: Tensor, mask: Tensor, adapter: str = REWARD) -> Tensor:
    with use_adapter(model, adapter):
        return model(input_ids=ids, attention_mask=mask, job=score_job(mask, adapter))


def single_scores(model: PeftModel, adapter: str = REWARD) -> Tensor:
    """Score of each reply on its own, without any padding."""
    rows = [torch.tensor([[*query, *response]]) for query, response in zip(QUERIES, RESPONSES, strict=True)]
    return torch.cat([scores_of(model, ids, torch.ones_like(ids), adapter) for ids in rows])


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_every_trainable_tensor_changed_and_the_base_did_not(stage, pipeline):
    model, before = pipeline.trained[stage].model, pipeline.trained[stage].before
    after = parameters(model)
    heads = {"sft": set(), "reward": {"score"}, "ppo": {"v_head"}}[stage]
    assert {kind for kind in ("score", "v_head") if any(f".{kind}." in name for name in before)} == heads
    # the adapter being trained and its head: no part of the base, and not PPO's reference or reward adapter
    assert all(f".{POLICY}." in name or ".v_head." in name for name in before)
    assert [name for name, tensor in before.items() if torch.equal(tensor, after[name])] == []

    saved = parameters(load_plain(pipeline.base))
    kept = {
        name.removeprefix(TRUNK).replace(".base_layer", ""): tensor
        for name, tensor in after.items()
        if "lora_" not in name and ".score." not in name and ".v_head." not in name
    }
    assert kept.keys() == saved.keys()
    assert [name for name, tensor in saved.items() if not torch.equal(tensor, kept[name])] == []


def test_reference_and_reward_adapter_are_those_of_their_stages(pipeline):
    after = parameters(pipeline.trained["ppo"].model)
    for name, stage in ((REFERENCE, "sft"), (REWARD, "reward")):
        file = load_file(pipeline.folder / stage / "adapter_model.safetensors")
        found = {
            key.replace(f".{name}.", ".").replace(".modules_to_save.", "."): tensor
            for key, tensor in after.items()
            if f".{name}." in key
        }
        found = {key.replace(".score.modules_to_save", ".score"): tensor for key, tensor in found.items()}
        assert found.keys() == file.keys()
        assert [key for key, tensor in file.items() if not torch.equal(tensor, found[key])] == []


def test_ppo_starts_at_the_sft_model(pipeline):
    first, last = read_jsonl(f"{pipeline.ppo}/metrics.jsonl")[:2]
    assert (first["iteration"], last["iteration"]) == (1, 2)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert first["kl_max"] == pytest.approx(0, abs=1e-5)
    assert first["ratio_first"] == pytest.approx(1, abs=1e-5)
    assert last["ratio_first"] == pytest.approx(1, abs=1e-5)
    assert last["kl_max"] > 1e-3  # the learning rate is high enough that a second iteration must have moved


# ---------------------------------------------------------------- saved and loaded again


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_saved_adapters_give_equal_logits(stage, pipeline):
    trained = pipeline.trained[stage].model.eval()
    expected = logits_of(trained)
    assert_close(logits_of(with_adapter(pipeline, stage)), expected, rtol=1e-5, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(pipeline.folder / f"merged_{stage}").eval()
    assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    base = logits_of(load_plain(pipeline.base))
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(base, expected, strict=True))


@torch.no_grad()
def test_saved_value_head_gives_equal_values(pipeline):
    """load_weights and load_value_head are what a resumed run calls, with all adapters in place."""
    trained, loaded = pipeline.trained["ppo"].model.eval(), ppo_model(pipeline)
    load_weights(loaded, pipeline.ppo, POLICY)
    load_value_head(loaded.get_base_model(), pipeline.ppo)
    batch = make_batch(QUERIES, RESPONSES, pad_id=0)
    expected, found = (reply_statistics(model, batch, Sampling(2, 0, 7)) for model in (trained, loaded))
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.values[batch.response_mask].abs().min() > 0


def test_saved_reward_adapter_gives_equal_scores(pipeline):
    trained = pipeline.trained["reward"].model.eval()
    expected = single_scores(trained, POLICY)
    assert_close(single_scores(ppo_model(pipeline)), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-3  # far above the tolerance


def test_reward_adapter_in_stock_transformers_and_peft(pipeline):
    """Independent of this toolkit's head and pooling: right padding, and no reply ends with a pad id."""
    rows = [torch.tensor([*query, *response]) for query, response in zip(QUERIES, RESPONSES, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    expected = single_scores(ppo_model(pipeline))

    classifier = AutoModelForSequenceClassification.from_pretrained(pipeline.base, num_labels=1, pad_token_id=0)
    stock = PeftModel.from_pretrained(classifier, pipeline.reward).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(pipeline.merged_reward).eval()
    for model in (stock, merged):
        with torch.no_grad():
            scores = model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0]
        assert_close(scores, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- numbers that may not depend on padding


@pytest.mark.parametrize("pad_id", [0, 2], ids=["pad", "pad_is_eos"])
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_score_does_not_depend_on_padding_or_batch(side, extra, pad_id, pipeline):
    model = ppo_model(pipeline)
    expected = single_scores(model)
    rows = [[*query, *response] for query, response in zip(QUERIES, RESPONSES, strict=True)]
    width = max(map(len, rows)) + extra
    ids, mask = torch.full((3, width), pad_id), torch.zeros(3, width, dtype=torch.long)
    for row, numbers in enumerate(rows):
        place = slice(width - len(numbers), width) if side == "left" else slice(0, len(numbers))
        ids[row, place], mask[row, place] = torch.tensor(numbers), 1
    assert_close(scores_of(model, ids, mask), expected, rtol=1e-5, atol=1e-5)
    assert_close(scores_of(model, ids[1:], mask[1:]), expected[1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def reply_statistics(model: PeftModel, batch: Batch, sampling: Sampling):
    job = reply_job(batch, sampling, with_values=True)
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, job=job)


def test_log_probs_are_those_of_the_models_own_forward(pipeline):
    """One unpadded sequence at a time through stock PEFT: EOS and pad suppressed at the first token, temperature 0.7."""
    sampling = Sampling(2, 0, 7, temperature=0.7, begin_suppress_tokens=(0, 2))
    batch = make_batch(QUERIES, RESPONSES, pad_id=0)
    found = reply_statistics(ppo_model(pipeline), batch, sampling)
    plain = logits_of(with_adapter(pipeline, "sft"))
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        logits = plain[row][0, len(query) - 1 : -1].clone()
        logits[0, [0, 2]] = -torch.inf
        logprobs = (logits / 0.7).log_softmax(-1)
        expected = logprobs[torch.arange(len(response)), torch.tensor(response)]
        assert_close(found.logprobs[row, : len(response)], expected, rtol=1e-5, atol=1e-5)
        entropy = torch.distributions.Categorical(logits=logits / 0.7).entropy()
        assert_close(found.entropy[row, : len(response)], entropy, rtol=1e-4, atol=1e-5)
        assert (found.logprobs[row, len(response) :] == 0).all()


def test_what_the_stages_wrote(pipeline):
    for stage in ("sft", "reward", "ppo"):
        folder = pipeline.folder / stage
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "run.json"} <= names
        assert json.loads((folder / "run.json").read_text())["stage"] == stage
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == pipeline.base
