"""Merging: the standalone model says what base + adapter say, and what cannot be merged is refused in one line."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraModel, PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import merge_lora
from lora.adapters import REWARD, read_adapter
from lora.base_model import base_fingerprint, load_base
from lora.heads import add_score_head, score_fn
from rewards.reward_model import new_reward_model
from rollout.model import assemble_ppo_model
from tests.conftest import make_model, make_tokenizer, save_base
from tests.forks import run_command
from tests.helpers import Stages, load_plain, load_with_hidden_state_fn, make_stages, own_lines, strengthen
from utils.arguments import LoraArguments, ModelArguments
from utils.console import InputError, run_script

CAUSAL_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "run.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
TEXTS = ["a", "苹果 香蕉 好吃吗？", "What is the capital of France? Paris, I think."]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    folder = tmp_path_factory.mktemp("merge")
    return make_stages(save_base(folder / "base"), folder)


@pytest.fixture(autouse=True)
def no_progress_bars():
    """They share stderr with the lines that are tested."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """merge_lora.main() as its command line would call it."""

    def call(base: str, adapter: str, output: Path, *more: str) -> None:
        words = ["--base_model_name", base, "--adapter_path", adapter, "--output_dir", str(output), *more]
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", *words])
        merge_lora.main()

    return call


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def write_record(folder: Path, **changes: str) -> None:
    """run.json as a stage writes it."""
    (folder / "run.json").write_text(json.dumps({"stage": "sft", "prompt_template": "{prompt}=", **changes}))


def logits_of(model: torch.nn.Module) -> list[torch.Tensor]:
    tokenizer = make_tokenizer()
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS]


def reward_rows() -> list[list[int]]:
    tokenizer = make_tokenizer()
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]


def toolkit_scores(stages: Stages) -> torch.Tensor:
    """Scores as stage 3 computes them, one reply at a time."""
    sft, reward = read_adapter(stages.sft, "--sft"), read_adapter(stages.reward, "--reward")
    model = assemble_ppo_model(load_plain(stages.base), sft, reward)
    model.set_adapter(REWARD)
    masks = [torch.ones(1, len(row), dtype=torch.long) for row in reward_rows()]
    with torch.no_grad():
        return torch.cat(
            [
                model(input_ids=torch.tensor([row]), attention_mask=mask, hidden_state_fn=score_fn(mask, REWARD))
                for row, mask in zip(reward_rows(), masks, strict=True)
            ]
        )


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_causal_model_equals_base_and_adapter(stage, stages, tmp_path, merge):
    adapter = tmp_path / stage
    shutil.copytree(stages.sft, adapter)
    write_record(
        adapter, stage=stage, base_model=stages.base, base_fingerprint=base_fingerprint(load_plain(stages.base))
    )
    if stage == "ppo":  # beside the adapter, and no part of the model
        save_file({"weight": torch.ones(1, 32), "bias": torch.ones(1)}, adapter / "value_head.safetensors")
    before = contents(adapter)
    output = tmp_path / "output" / "merged"
    merge(stages.base, str(adapter), output)

    assert set(contents(output)) == CAUSAL_FILES
    assert contents(adapter) == before
    assert [path.name for path in output.parent.iterdir()] == ["merged"]  # nothing temporary is left
    assert set(load_file(output / "model.safetensors")) == set(load_file(Path(stages.base) / "model.safetensors"))
    record = json.loads((output / "run.json").read_text())
    assert (record["stage"], record["base_model"], record["adapter"]) == ("merged", stages.base, str(adapter))
    assert (record["adapter_stage"], record["prompt_template"]) == (stage, "{prompt}=")
    assert record["largest_difference"] < 1e-5

    expected = logits_of(PeftModel.from_pretrained(load_plain(stages.base), stages.sft))
    assert_close(logits_of(AutoModelForCausalLM.from_pretrained(output)), expected, rtol=1e-4, atol=1e-4)
    base = logits_of(load_plain(stages.base))
    assert all((a - b).abs().max() > 0.1 for a, b in zip(base, expected, strict=True))  # the adapter does something
    assert AutoTokenizer.from_pretrained(output)(TEXTS)["input_ids"] == make_tokenizer()(TEXTS)["input_ids"]


def test_classifier_equals_our_scores(stages, tmp_path, merge):
    before = contents(stages.reward)
    output = tmp_path / "judge"
    merge(stages.base, stages.reward, output, "--as_classifier")
    # no run.json, so no prompt template that a chat template could write
    assert set(contents(output)) == CAUSAL_FILES - {"generation_config.json", "chat_template.jinja"}
    assert contents(stages.reward) == before
    check_classifier(output, toolkit_scores(stages), pad_token="<pad>")


def test_classifier_where_the_base_pads_with_eos(tmp_path, merge):
    """Stock classifiers skip every pad id at the end: with pad == eos they would score the token in front of EOS."""
    base = tmp_path / "base"
    model, tokenizer = make_model("llama"), make_tokenizer()
    model.config.pad_token_id = None
    tokenizer.pad_token = tokenizer.unk_token = None
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    stages = make_stages(str(base), tmp_path)
    merge(stages.base, stages.reward, tmp_path / "judge", "--as_classifier")
    check_classifier(tmp_path / "judge", toolkit_scores(stages), pad_token="<|pad|>")


def check_classifier(folder: Path, expected: torch.Tensor, pad_token: str) -> None:
    """The folder alone, read by stock transformers as one padded batch, gives `expected`."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (pad_token, model.config.pad_token_id)
    batch = tokenizer.pad({"input_ids": reward_rows()}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.005  # equal scores would prove nothing


def test_an_ensemble_becomes_its_first_member_and_says_so(stages, tmp_path, merge, capsys):
    """A stock classifier has one head.  Scores that silently are another model's would be worse than a refusal."""
    model, _ = new_reward_model(load_plain(stages.base), LoraArguments(lora_r=4, lora_alpha=8), seed=5, ensemble_size=3)
    strengthen(model, seed=5)
    model.save_pretrained(tmp_path / "ensemble")
    merge(stages.base, str(tmp_path / "ensemble"), tmp_path / "judge", "--as_classifier")
    assert "warning: " + str(tmp_path / "ensemble") + " is an ensemble of 3 adapters" in capsys.readouterr().err
    first = shutil.copytree(tmp_path / "ensemble", tmp_path / "first")
    for member in ("member1", "member2"):
        shutil.rmtree(first / member)
    check_classifier(tmp_path / "judge", toolkit_scores(stages._replace(reward=str(first))), pad_token="<pad>")
    merge(stages.base, stages.reward, tmp_path / "single", "--as_classifier")
    assert "is an ensemble of" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"), [((), torch.bfloat16), (("--dtype", "float32"), torch.float32)], ids=["auto", "float32"]
)
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_dtype_is_that_of_the_base_unless_it_is_given(kind, arguments, expected, stages, tmp_path, merge):
    base = tmp_path / "base"
    load_plain(stages.base).bfloat16().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    more = ["--as_classifier"] if kind == "reward" else []
    merge(str(base), getattr(stages, kind), tmp_path / "merged", *arguments, *more)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}


def test_generation_defaults_of_the_base_are_kept(stages, tmp_path, merge):
    """load_base drops them, for PPO; transformers complains about some, such as a temperature without sampling."""
    base = tmp_path / "base"
    shutil.copytree(stages.base, base)
    settings = {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.05, "eos_token_id": [2, 3]}
    (base / "generation_config.json").write_text(json.dumps(settings))
    merge(str(base), stages.sft, tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert {name: written.get(name) for name in settings} == settings


# ---------------------------------------------------------------- what is refused


def damaged(stages: Stages, folder: Path) -> str:
    """SFT adapter without one of its tensors."""
    shutil.copytree(stages.sft, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[next(iter(tensors))]
    save_file(tensors, folder / "adapter_model.safetensors")
    write_record(folder, base_model=stages.base, base_fingerprint=base_fingerprint(load_plain(stages.base)))
    return str(folder)


def of_another_base(stages: Stages, folder: Path) -> str:
    shutil.copytree(stages.sft, folder)
    write_record(folder, base_model="another", base_fingerprint="0" * 16)
    return str(folder)


def full_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "file").write_text("mine")
    return folder


# name -> (base, adapter, output folder, more arguments, what the line says)
REFUSED = {
    "reward adapter": lambda s, t: (s.base, s.reward, t / "out", [], "add --as_classifier"),
    "no score head": lambda s, t: (s.base, s.sft, t / "out", ["--as_classifier"], "leave out --as_classifier"),
    "no base": lambda s, t: (str(t / "none"), s.sft, t / "out", [], str(t / "none")),
    "base is an adapter": lambda s, t: (s.sft, s.sft, t / "out", [], "cannot load"),
    "no adapter": lambda s, t: (s.base, str(t / "none"), t / "out", [], "there is no adapter_config.json"),
    "adapter is a whole model": lambda s, t: (s.base, s.base, t / "out", [], "there is no adapter_config.json"),
    "a tensor is missing": lambda s, t: (s.base, damaged(s, t / "a"), t / "out", [], "does not fit this base"),
    "another base": lambda s, t: (s.base, of_another_base(s, t / "a"), t / "out", [], "trained on the base another"),
    "full output folder": lambda s, t: (s.base, s.sft, full_folder(t / "out"), [], "is not empty"),
    "output folder is a file": lambda s, t: (s.base, s.sft, full_folder(t / "out") / "file", [], "is a file"),
    "unknown argument": lambda s, t: (s.base, s.sft, t / "out", ["--prompt_template", "{prompt}"], "unknown argument"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals(case, stages, tmp_path, merge, capsys):
    base, adapter, output, more, says = case(stages, tmp_path)
    before = contents(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: merge(base, adapter, output, *more))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert says in error
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_exit_code_of_the_script(tmp_path):
    script = Path(merge_lora.__file__)
    done = run_command([script, "--base_model_name", "B", "--adapter_path", tmp_path / "none"], tmp_path)
    assert done.returncode == 2
    assert own_lines(done.stderr).startswith("error: --adapter_path ")
    assert len(own_lines(done.stderr).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_merged_model_is_another_base_than_the_one_it_was_made_from(stages, tmp_path, merge):
    """The fingerprint once read the embedding alone, which LoRA leaves as it was: stage 3 took a merged SFT model together
    with the SFT adapter that was in it already, and no line said so.
    """
    adapter = str(shutil.copytree(stages.sft, tmp_path / "adapter"))
    write_record(Path(adapter), base_model=stages.base, base_fingerprint=base_fingerprint(load_plain(stages.base)))
    merge(stages.base, adapter, tmp_path / "merged")
    with pytest.raises(InputError, match=f"was trained on the base {stages.base}, not on {tmp_path}/merged"):
        merge(str(tmp_path / "merged"), adapter, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_folder_and_float_type_do_not_change_the_fingerprint(stages, tmp_path):
    first = base_fingerprint(load_plain(stages.base))
    moved = shutil.copytree(stages.base, tmp_path / "moved")
    for dtype in (torch.float32, torch.bfloat16):
        assert base_fingerprint(load_base(ModelArguments(str(moved)), dtype)) == first


def test_adapters_and_heads_do_not_change_the_fingerprint(stages):
    base = load_plain(stages.base)
    first = base_fingerprint(base)
    model, _ = new_reward_model(
        load_with_hidden_state_fn(stages.base), LoraArguments(lora_target_modules="all-linear"), seed=0
    )
    assert base_fingerprint(model.get_base_model()) == first


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_change_in_any_matrix_changes_the_fingerprint(family, tmp_path):
    base = load_plain(save_base(tmp_path, family))
    first = base_fingerprint(base)
    for name, matrix in base.named_parameters():
        if matrix.dim() == 2:
            old = matrix.detach().clone()
            matrix.data[0] += 1
            assert base_fingerprint(base) != first, name
            matrix.data.copy_(old)
    assert base_fingerprint(base) == first


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_a_wrong_result_is_not_kept(kind, stages, tmp_path, merge, monkeypatch):
    monkeypatch.setattr(LoraModel, "merge_and_unload", LoraModel.unload)  # drops the adapter instead of merging it
    if kind == "reward":  # unload() would also put the empty head back: leave the right one, so that only LoRA is lost
        head = load_file(Path(stages.reward) / "adapter_model.safetensors")["base_model.model.score.weight"]
        monkeypatch.setattr(merge_lora, "add_score_head", lambda base: with_head(base, head))
    more = ["--as_classifier"] if kind == "reward" else []
    with pytest.raises(InputError, match=r"differs from base \+ adapter by .*, so nothing was written"):
        merge(stages.base, getattr(stages, kind), tmp_path / "out" / "merged", *more)
    assert list((tmp_path / "out").iterdir()) == []


def with_head(base: torch.nn.Module, weight: torch.Tensor) -> None:
    add_score_head(base)
    base.score.weight.data.copy_(weight)


def test_nan_is_a_wrong_result():
    expected = torch.tensor([1.0, 2.0])
    with pytest.raises(InputError, match="by nan"):
        merge_lora.largest_difference(expected, torch.tensor([1.0, float("nan")]), torch.float32)
    assert merge_lora.largest_difference(expected, torch.tensor([1.0, 2.0001]), torch.float32) == pytest.approx(
        5e-5, rel=1e-2
    )
