"""What a stage trained on is known to the next one, so that best/ is chosen on prompts that are new, or a line says so."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset

import rl_training
import sft_training
from lora.adapters import read_adapter
from runs.seen_prompts import SEEN_FILE, hash_of_query, new_prompts, queries_of, read_seen_prompts
from tests.conftest import make_tokenizer, write_rows
from tests.helpers import PROMPTS, Stages, run_main


def test_the_query_is_what_stands_in_front_of_tokens_with_a_loss():
    dialogue = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, 3, -100, -100, 6]}  # two turns are taught
    assert list(queries_of(Dataset.from_list([dialogue]))) == [[1, 2], [1, 2, 3, 4, 5]]
    pair = {"chosen_ids": [7, 8, 9], "rejected_ids": [7, 8, 4], "query_length": 2}
    assert list(queries_of(Dataset.from_list([pair]))) == [[7, 8]]
    assert list(queries_of(Dataset.from_list([{"input_ids": [5]}]))) == [[5]]
    assert hash_of_query([1, 23]) == "2cb22e62a1ec9ade" != hash_of_query([12, 3])


@pytest.fixture(scope="module")
def sft_run(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SFT run on the first half of the prompts, with a checkpoint."""
    folder = tmp_path_factory.mktemp("seen")
    rows = [{"prompt": prompt, "response": "yes"} for prompt in PROMPTS[: len(PROMPTS) // 2]]
    words = ["--model_name_or_path", stages.base, "--dataset", write_rows(folder / "sft.jsonl", rows), "--lora_r", "2"]
    words += ["--max_steps", "1", "--save_steps", "1", "--output_dir", str(folder / "run")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(sft_training, words, monkeypatch)
    return folder / "run"


def test_a_checkpoint_and_a_run_know_what_they_were_trained_on(sft_run: Path, stages: Stages, tmp_path: Path):
    tokenizer = make_tokenizer()
    template = json.loads((sft_run / "run.json").read_text())["prompt_template"]
    ids = [tokenizer(template.replace("{prompt}", prompt))["input_ids"] for prompt in PROMPTS]
    half = len(PROMPTS) // 2
    for folder in (sft_run, sft_run / "checkpoint-1"):
        adapter = read_adapter(str(folder), "--sft_model_lora_path")
        assert read_seen_prompts(adapter) == {hash_of_query(query) for query in ids[:half]}
        assert new_prompts(Dataset.from_dict({"input_ids": ids}), {"sft": read_seen_prompts(adapter)}) == list(
            range(half, len(ids))
        )
    elsewhere = shutil.copytree(sft_run / "checkpoint-1", tmp_path / "elsewhere")
    assert read_seen_prompts(read_adapter(str(elsewhere), "--sft_model_lora_path")) == set()


def test_ppo_says_how_many_prompts_of_best_were_trained_on(
    sft_run: Path, stages: Stages, tmp_path: Path, monkeypatch, capsys
):
    """The guard's prompts were held out of PPO alone, and nothing said that SFT and the reward model knew them all."""
    words = ["--model_name_or_path", stages.base, "--sft_model_lora_path", str(sft_run), "--allow_weak_reward", "true"]
    words += ["--reward_model_lora_path", stages.reward, "--steps", "1", "--save_freq", "1", "--batch_size", "2"]
    words += [
        "--mini_batch_size",
        "2",
        "--output_max_length",
        "4",
        "--max_length",
        "64",
        "--output_dir",
        str(tmp_path / "ppo"),
    ]
    half = len(PROMPTS) // 2
    every, mixed = ([{"prompt": prompt} for prompt in part] for part in (PROMPTS, PROMPTS[half - 1 : half + 2]))
    words += ["--dataset", write_rows(tmp_path / "every.jsonl", every)]
    run_main(rl_training, [*words, "--eval_dataset", write_rows(tmp_path / "mixed.jsonl", mixed)], monkeypatch)
    warning = f"the scores of 3 prompts of which some were trained on (1 by {sft_run})"
    assert warning in capsys.readouterr().err
    shutil.rmtree(tmp_path / "ppo")
    run_main(rl_training, words, monkeypatch)  # without --eval_dataset two prompts are held out, of those that are new
    assert "were trained on (" not in capsys.readouterr().err
    trained_on = set((tmp_path / "ppo" / SEEN_FILE).read_text().split())
    assert len(trained_on) == len(PROMPTS) - 2
    assert read_seen_prompts(read_adapter(str(sft_run), "--sft_model_lora_path")) < trained_on
