"""A run goes on as the run that it was: what another command changes is taken and named, or refused.

Before, another learning rate was ignored, another template, seed or data set taken without a word, and another rank ended
in a traceback.
"""

import datetime
import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import rl_training
import sft_training
from corpus import chat_template
from corpus.tokens import format_prompt
from lora.adapters import SavedAdapter
from runs.resume import settle_date
from tests.conftest import make_tokenizer, save_base, write_rows, write_sft
from tests.helpers import PROMPTS, Stages, run_main, save_sft
from tests.test_resume import files_of, killed_copy
from utils.arguments import DataArguments
from utils.console import InputError
from utils.files import read_jsonl


def words_of(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def sft_run(base_path: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], Path]:
    """6 steps with a linear schedule, and the checkpoint after 3 of them: (arguments, folder)."""
    folder = tmp_path_factory.mktemp("sft")
    values = {
        "model_name_or_path": base_path,
        "dataset": write_sft(folder / "sft.jsonl"),
        "max_length": 64,
        "lora_r": 4,
    }
    values |= {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    values |= {"logging_steps": 1}
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(sft_training, words_of(values | {"output_dir": folder / "run"}), monkeypatch)
    return values, folder / "run"


@pytest.fixture(scope="module")
def ppo_run(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], Path]:
    """2 iterations, and the checkpoint after the first: (arguments, folder)."""
    folder = tmp_path_factory.mktemp("ppo")
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    values = {"model_name_or_path": stages.base, "dataset": prompts, "sft_model_lora_path": stages.sft}
    values |= {"reward_model_lora_path": stages.reward, "allow_weak_reward": "true", "guard": "off", "steps": 2}
    values |= {"save_freq": 1, "batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 1, "output_max_length": 4}
    values |= {"max_length": 64}
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(rl_training, words_of(values | {"output_dir": folder / "run"}), monkeypatch)
    return values, folder / "run"


def go_on(run: tuple[dict[str, object], Path], copy: Path, monkeypatch: pytest.MonkeyPatch, **changed: object) -> None:
    """Go on with a copy that was killed in the middle, with some arguments changed."""
    values, folder = run
    script, checkpoint = (sft_training, 3) if "max_steps" in values else (rl_training, 1)
    if not copy.exists():
        killed_copy(folder, copy, checkpoint)
    run_main(
        script,
        words_of(values | changed | {"output_dir": copy, "resume_from_checkpoint": "true"}),
        monkeypatch,
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"prompt_template": "Q{prompt}A"},
            "--prompt_template was '问：{prompt}.n.n答：' in the run of .*checkpoint-3, and ",
        ),
        (
            {"lora_r": 8},
            "--lora_r was 4 in the run of .*checkpoint-3, and is 8 now, which a run that goes on cannot change;",
        ),
        ({"lora_target_modules": "q_proj"}, "--lora_target_modules was 'all-linear'"),
        ({"seed": 1}, "--seed was 42"),
        ({"optim": "sgd"}, "--optim was 'adamw_torch_fused'"),
        ({"weight_decay": 0.1}, "--weight_decay was 0.0"),
        ({"lr_scheduler_type": "cosine"}, "--lr_scheduler_type was 'linear'"),
        ({"max_length": 63}, "--max_length was 64"),
        ({"per_device_train_batch_size": 2}, "the number of rows in a step .* was 4 in the run of .*, and is 2 now"),
        ({"dataset": "other order"}, "--dataset was .*, and is .*, with other rows or in another order now"),
        ({"model_name_or_path": "other base"}, "--model_name_or_path was .*, and is another base"),
    ],
)
def test_what_makes_it_another_run_is_refused(
    sft_run: tuple[dict[str, object], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, object],
    message: str,
) -> None:
    """In one line that has the argument, the old value and the new one; nothing is written."""
    copy = killed_copy(sft_run[1], tmp_path / "copy", 3)
    before = files_of(copy)
    if changed == {"dataset": "other order"}:
        rows = read_jsonl(str(sft_run[0]["dataset"]))
        changed = {"dataset": write_rows(tmp_path / "rows.jsonl", [rows[1], rows[0], *rows[2:]])}
    if changed == {"model_name_or_path": "other base"}:
        changed = {"model_name_or_path": save_base(tmp_path / "base", seed=5)}
    with pytest.raises(InputError, match=message):
        go_on(sft_run, copy, monkeypatch, **changed)
    assert files_of(copy) == before


def test_another_learning_rate_is_taken(
    sft_run: tuple[dict[str, object], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Lowered after a NaN, it was ignored: optimizer and schedule came back with the old one."""
    go_on(sft_run, tmp_path / "copy", monkeypatch, learning_rate=1e-5)
    assert "going on with --learning_rate 1e-05, which was 0.01\n" in capsys.readouterr().err
    old, new = ([row["learning_rate"] for row in rows_of(folder)] for folder in (sft_run[1], tmp_path / "copy"))
    assert new[:3] == old[:3]
    assert new[3:] == pytest.approx([rate / 1000 for rate in old[3:]], rel=1e-9)
    assert old[3] == pytest.approx(0.01 * 3 / 6)
    record = json.loads((tmp_path / "copy" / "run.json").read_text(encoding="utf-8"))
    assert record["arguments"]["learning_rate"] == 1e-5


def rows_of(folder: Path) -> list[dict]:
    return [row for row in read_jsonl(str(folder / "metrics.jsonl")) if "learning_rate" in row]


def test_more_steps_another_place_and_other_accumulation_are_taken(
    sft_run: tuple[dict[str, object], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Right input is not refused: base and data may have moved, and four rows a step may be two passes of two."""
    moved = {
        "model_name_or_path": shutil.copytree(sft_run[0]["model_name_or_path"], tmp_path / "base"),
        "dataset": shutil.copy(sft_run[0]["dataset"], tmp_path / "moved.jsonl"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    go_on(sft_run, tmp_path / "copy", monkeypatch, max_steps=8, save_steps=4, **moved)
    lines = capsys.readouterr().err
    assert "going on with --max_steps 8, which was 6\n" in lines
    assert "going on with --save_steps 4, which was 3\n" in lines
    assert lines.count("going on with --") == 2
    assert [row["step"] for row in rows_of(tmp_path / "copy")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (tmp_path / "copy" / "checkpoint-8").is_dir()


def test_an_unchanged_run_says_nothing(
    sft_run: tuple[dict[str, object], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    go_on(sft_run, tmp_path / "copy", monkeypatch)
    assert "going on with --" not in capsys.readouterr().err
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (sft_run[1], tmp_path / "copy")]
    assert weights[0] == weights[1]


def test_a_run_of_an_older_version_goes_on(
    sft_run: tuple[dict[str, object], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run.json has no hash of the rows and no sizes, so these are not compared."""
    copy = killed_copy(sft_run[1], tmp_path / "copy", 3)
    for file in (copy / "run.json", copy / "checkpoint-3" / "run.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        for name in ("rows_hash", "rows_a_step", "rows_an_update", "adapters"):
            del record[name]
        file.write_text(json.dumps(record), encoding="utf-8")
    sizes = json.loads((copy / "checkpoint-3" / "complete.json").read_text(encoding="utf-8"))
    sizes["run.json"] = (copy / "checkpoint-3" / "run.json").stat().st_size
    (copy / "checkpoint-3" / "complete.json").write_text(json.dumps(sizes), encoding="utf-8")
    go_on(sft_run, copy, monkeypatch)
    assert [row["step"] for row in rows_of(copy)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"init_kl_coef": 0.5}, "--init_kl_coef was 0.05"),
        ({"critic": "adapter"}, "--critic was 'head'"),
        ({"mini_batch_size": 4}, "the number of replies in an update .* was 2 in the run of .*, and is 4 now"),
        ({"batch_size": 8}, "the number of rows in a step .* was 4 in the run of .*, and is 8 now"),
        (
            {"sft_model_lora_path": "other"},
            "the adapter of --sft_model_lora_path was .*, and is one with other weights",
        ),
    ],
)
def test_ppo_that_would_be_another_run_is_refused(
    ppo_run: tuple[dict[str, object], Path],
    stages: Stages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, object],
    message: str,
) -> None:
    if "sft_model_lora_path" in changed:
        changed = {"sft_model_lora_path": save_sft(stages.base, tmp_path / "sft")}
    with pytest.raises(InputError, match=message):
        go_on(ppo_run, tmp_path / "copy", monkeypatch, **changed)


def test_ppo_takes_more_iterations(
    ppo_run: tuple[dict[str, object], Path],
    stages: Stages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Another learning rate too; its adapters may have moved."""
    moved = shutil.copytree(stages.sft, tmp_path / "sft")
    go_on(ppo_run, tmp_path / "copy", monkeypatch, steps=3, learning_rate=1e-6, sft_model_lora_path=moved)
    lines = capsys.readouterr().err
    assert "going on with --steps 3, which was 2\n" in lines
    assert "going on with --learning_rate 1e-06, which was 1e-05\n" in lines
    # a linear schedule over 3 iterations, of which one is done
    assert [row["learning_rate"] for row in rows_of(tmp_path / "copy")][1:] == pytest.approx([1e-6 * 2 / 3, 1e-6 / 3])


# ---- A chat template that writes today's date ----

DATED = (  # as Llama 3.2's does
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{ 'Today Date: ' + date_string }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
)


class Someday(datetime.date):
    """A day that a test sets."""

    days = (2026, 11, 24)

    @classmethod
    def today(cls) -> datetime.date:
        return datetime.date(*cls.days)


def dated_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED
    return tokenizer


def test_a_run_that_goes_on_the_next_day_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts said another day than those of the steps before."""
    monkeypatch.setattr(chat_template, "date", Someday)
    base = save_base(tmp_path / "base")
    dated_tokenizer().save_pretrained(base)
    values = {"model_name_or_path": base, "dataset": write_sft(tmp_path / "sft.jsonl"), "max_length": 96, "lora_r": 4}
    values |= {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4, "prompt_template": "chat"}
    run_main(sft_training, words_of(values | {"output_dir": tmp_path / "run"}), monkeypatch)
    copies = [killed_copy(tmp_path / "run", tmp_path / name, 1) for name in ("copy", "other day")]
    monkeypatch.setattr(Someday, "days", (2026, 11, 25))
    words = words_of(values | {"output_dir": copies[0], "resume_from_checkpoint": "true"})
    run_main(sft_training, words, monkeypatch)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "run", copies[0])]
    assert weights[0] == weights[1]
    record = json.loads((copies[0] / "run.json").read_text(encoding="utf-8"))
    assert record["prompt_date"] == "2026-11-24"
    words = words_of(values | {"output_dir": copies[1], "resume_from_checkpoint": "true", "prompt_date": "2026-11-25"})
    with pytest.raises(InputError, match=r"--dataset was .* with other rows or in another order"):
        run_main(sft_training, words, monkeypatch)


def test_later_stages_have_the_day_of_the_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """SFT on one day and PPO on the next had different ids for the same prompt."""
    monkeypatch.setattr(chat_template, "date", Someday)

    def text(given: str | None, *adapters: SavedAdapter) -> str:
        tokenizer = dated_tokenizer()
        settle_date(tokenizer, "chat", given, None, *adapters)
        return format_prompt("hi", "chat", tokenizer)

    sft, reward = (
        SavedAdapter("", None, [], {"stage": stage, "prompt_date": day})
        for stage, day in (("sft", "2020-02-03"), ("reward", "2020-02-04"))
    )
    assert text(None) == "Today Date: 24 Nov 2026[user]hi[assistant]"
    assert text(None, sft) == "Today Date: 03 Feb 2020[user]hi[assistant]"
    assert capsys.readouterr().err == ""
    assert text(None, sft, reward) == "Today Date: 03 Feb 2020[user]hi[assistant]"
    assert "date 2020-02-03 into the prompts here; the reward adapter's were of 2020-02-04\n" in capsys.readouterr().err
    assert text("2021-01-02", sft) == "Today Date: 02 Jan 2021[user]hi[assistant]"


def test_a_template_without_a_date_has_none(capsys: pytest.CaptureFixture) -> None:
    tokenizer = dated_tokenizer()
    assert settle_date(tokenizer, "{prompt}", None, None) is None
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert settle_date(tokenizer, "chat", "2020-02-03", None) is None
    assert "--prompt_date has no effect here" in capsys.readouterr().err


def test_a_day_that_there_is_not() -> None:
    with pytest.raises(InputError, match="--prompt_date is 2026-02-30; give a day such as 2026-11-25"):
        DataArguments(prompt_date="2026-02-30")
