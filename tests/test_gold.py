"""--gold_function: measured in every place where there is a score, and without any effect on the run."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

import rl_training
from reporting.html_report import report_page
from rewards.reward_functions import Notes, Replies, load_function, try_function
from rollout.batch import make_batch
from tests import golds
from tests.conftest import write_rows
from tests.helpers import PROMPTS, Stages, make_experience, make_ppo_trainer, run_main
from tests.pages import Page
from utils.console import InputError
from utils.files import read_jsonl

HELD_OUT = ["held-out question", "另一个问题", "one more"]


@pytest.fixture(scope="module")
def runs(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with and without gold, with guard and evaluation; what the function was asked is in golds.asked."""
    root = tmp_path_factory.mktemp("runs")
    train, held_out = (
        write_rows(root / f"{name}.jsonl", [{"prompt": prompt} for prompt in prompts])
        for name, prompts in (("train", PROMPTS), ("held_out", HELD_OUT))
    )
    words = ["--model_name", stages.base, "--sft_model_lora_path", stages.sft]
    words += ["--reward_model_lora_path", stages.reward]
    words += ["--dataset", train, "--eval_dataset", held_out, "--prompt_template", "{prompt}=", "--steps", "3"]
    words += ["--batch_size", "4", "--mini_batch_size", "4", "--ppo_epochs", "2", "--output_max_length", "8"]
    words += ["--max_length", "64", "--learning_rate", "0.01", "--allow_weak_reward", "true", "--guard", "warn"]
    words += ["--guard_freq", "2", "--eval_strategy", "steps", "--eval_steps", "3"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(rl_training, [*words, "--output_dir", root / "without"], monkeypatch)
        golds.asked.clear()
        words += ["--gold_function", "tests.golds:judge"]
        run_main(rl_training, [*words, "--output_dir", root / "with"], monkeypatch)
    return root


def rows_of(folder: Path, key: str) -> list[dict]:
    return [row for row in read_jsonl(str(folder / "metrics.jsonl")) if key in row]


def mean(pairs: list[tuple[str, str]]) -> float:
    return sum(golds.verdict(*pair) for pair in pairs) / len(pairs)


def test_gold_of_every_reply_and_of_every_iteration(runs: Path) -> None:
    samples = read_jsonl(str(runs / "with/samples.jsonl"))
    assert len(samples) == 3 * 4
    for row in samples:
        assert row["gold"] == pytest.approx(golds.verdict(row["prompt"], row["response"]), rel=1e-6)
    for row in rows_of(runs / "with", "score_mean"):
        mine = [(each["prompt"], each["response"]) for each in samples if each["iteration"] == row["iteration"]]
        assert row["gold_mean"] == pytest.approx(mean(mine), rel=1e-6)


def test_gold_of_held_out_replies(runs: Path) -> None:
    """The guard looks three times (the SFT model, iterations 2 and 3), then the evaluation, at the same prompts."""
    held_out = [pair for pair in golds.asked if pair[0] in HELD_OUT]
    looks = [held_out[start : start + 3] for start in range(0, len(held_out), 3)]
    assert [sorted(prompt for prompt, _ in look) for look in looks] == [sorted(HELD_OUT)] * 4
    assert [row["heldout/gold"] for row in rows_of(runs / "with", "heldout/gold")] == pytest.approx(
        [mean(look) for look in looks[1:3]], rel=1e-6
    )
    (evaluation,) = rows_of(runs / "with", "eval_gold")
    assert evaluation["eval_gold"] == pytest.approx(mean(looks[3]), rel=1e-6)


def test_gold_changes_nothing(runs: Path) -> None:
    """Adapters, value head, best/, what the guard remembers and all other numbers are those of the run without it."""
    clocks = {"seconds", "tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    new = {"gold_mean", "heldout/gold", "eval_gold"}
    lines = {name: read_jsonl(str(runs / name / "metrics.jsonl")) for name in ("with", "without")}
    assert set().union(*lines["with"]) - set().union(*lines["without"]) == new
    for one, other in zip(lines["with"], lines["without"], strict=True):
        assert {name: one[name] for name in one.keys() - clocks - new} == {
            name: other[name] for name in other.keys() - clocks
        }
    for file in ("adapter_model.safetensors", "value_head.safetensors", "best/adapter_model.safetensors"):
        one, other = load_file(runs / "with" / file), load_file(runs / "without" / file)
        assert all(torch.equal(one[name], other[name]) for name in one)
    states = [json.loads((runs / name / "ppo_state.json").read_text(encoding="utf-8")) for name in lines]
    assert states[0] == states[1]
    assert "gold" not in str(states[0])


def test_gold_is_in_the_pictures_and_in_the_report(runs: Path) -> None:
    assert {path.name for path in (runs / "with/plots").iterdir()} - {
        path.name for path in (runs / "without/plots").iterdir()
    } == {"gold_mean.png"}
    page = report_page([str(runs / "with")], 1000)
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["samples"]["columns"] == ["iteration", "score", "gold", "length", "kl"]
    charts = dict(re.findall(r'data-metric="(.*?)"><figcaption>(.*?)<', page))
    assert list(charts)[:4] == ["normalized_score_mean", "score_mean", "score_std", "gold_mean"]
    assert charts["gold_mean"] == "gold (your own measure)"
    assert charts["heldout/gold"] == "held-out: gold (your own measure)"
    figures = [row[0] for row in Page(page).tables[0] if "gold" in row[0]]
    assert figures == ["held-out: gold (your own measure)"]


def test_a_function_that_fails_in_the_middle_ends_the_run(stages: Stages, tmp_path: Path) -> None:
    gold = load_function("--gold_function", "tests.golds:fails_later")
    trainer = make_ppo_trainer(stages, tmp_path, gold=gold)
    with pytest.raises(InputError) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert message.count("\n") == 0
    assert any(repr(prompt) in message for prompt in PROMPTS)
    assert "tests.golds:fails_later on the prompt" in message
    assert "fails (LookupError: no verdict on this one)" in message


def test_rows_keep_their_gold(stages: Stages, tmp_path: Path) -> None:
    """Held-out responses with NaN are left out, and the others go on with what is theirs."""
    trainer = make_ppo_trainer(stages, tmp_path)
    batch = make_batch([[5], [6], [7]], [[8], [9], [10, 11]], 0)
    experience = make_experience(trainer, batch, torch.zeros(3), gold=torch.tensor([1.0, 2, 3]))
    rows = experience.rows(torch.tensor([0, 1]))
    assert rows.gold.tolist() == [1.0, 2.0]
    assert rows.prompts == PROMPTS[:2]
    assert rows.responses == experience.responses[:2]
    assert rows.logprobs.shape == rows.mask.shape == (2, 1)  # the padding of the third row is gone


def test_whatever_is_a_number_counts(stages: Stages, tmp_path: Path) -> None:
    """A unit test passes or it does not."""
    trainer = make_ppo_trainer(stages, tmp_path, gold=load_function("--gold_function", "tests.golds:is_long"), steps=1)
    trainer.train()
    assert {row["gold"] for row in trainer.samples} <= {0.0, 1.0}
    (line,) = [row for row in trainer.state.log_history if "gold_mean" in row]
    assert line["gold_mean"] == sum(len(row["response"]) > 10 for row in trainer.samples) / 8


def test_a_module_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python looks beside rl_training.py, where users do not put their own files."""
    (tmp_path / "my_rules.py").write_text("def rate(prompt, response):\n    return len(prompt)\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    gold = load_function("--gold_function", "my_rules:rate")
    try_function(gold, {"prompt": "four"}, 2)
    replies = Replies([{"prompt": "four"}], [""], [[2]])
    assert gold.judge(replies, TrainerState(), Notes([{}])) == [4.0]


def test_a_script_that_ends_when_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the training without a word about why."""
    (tmp_path / "my_script.py").write_text("raise SystemExit('usage: my_script.py FILE')\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cannot import my_script \(SystemExit: usage: my_script.py FILE\); give"):
        load_function("--gold_function", "my_script:rate")
