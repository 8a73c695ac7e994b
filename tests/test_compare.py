"""compare.py: every model responds as it would alone, the figures are right, and no text breaks out of its table cell."""

import hashlib
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, GenerationConfig

import compare
from corpus.tokens import encode_prompt
from inference.side_by_side import (
    Response,
    adapter_samplings,
    agreed_template,
    prompt_seed,
    read_named_adapters,
)
from lora.adapters import read_adapter
from rewards.reward_card import wilson_interval
from rollout.distribution import default_sampling
from rollout.sampler import generate_ids
from tests.adapter_folders import TEMPLATE, AdapterFolders, make_adapter_folders, write_run
from tests.conftest import make_tokenizer, save_base, write_rows
from tests.helpers import load_with_hidden_state_fn, save_sft
from tests.pages import Page
from utils.console import InputError, run_script

NASTY = "a | b\n<script>alert(1)</script> *x* مرحبا 😀"
PROMPTS = ["What is tea?", "你好", NASTY, "dogs", "the cat sat on the mat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> AdapterFolders:
    return make_adapter_folders(tmp_path_factory.mktemp("folders"))


def run_compare(monkeypatch: pytest.MonkeyPatch, folders: AdapterFolders, output: Path, *more: str) -> list[dict]:
    words = ["--base_model_name", folders.base, "--adapters", f"SFT={folders.sft}", f"v1.5 (16)={folders.ppo}"]
    words += ["--output_dir", str(output), "--output_max_length", "12", *more]
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    compare.main()
    return [json.loads(line) for line in (output / "compare.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def outcome(folders: AdapterFolders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """One run with a reward model, in batches of two."""
    folder = tmp_path_factory.mktemp("outcome")
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    with pytest.MonkeyPatch.context() as patch:
        more = ("--prompts", prompts, "--reward_model_lora_path", folders.reward, "--batch_size", "2")
        return folder / "out", run_compare(patch, folders, folder / "out", *more)


# ---- Replies and scores ----


def test_each_model_replies_as_it_does_alone(folders: AdapterFolders, outcome: tuple[Path, list[dict]]) -> None:
    """Base and adapters loaded one at a time by plain PEFT give the replies that they gave side by side."""
    tokenizer = make_tokenizer()
    alone = {
        "base": load_with_hidden_state_fn(folders.base),
        "SFT": PeftModel.from_pretrained(load_with_hidden_state_fn(folders.base), folders.sft),
        "v1.5 (16)": PeftModel.from_pretrained(load_with_hidden_state_fn(folders.base), folders.ppo),
    }
    rows = outcome[1]
    assert [(row["prompt"], row["model"]) for row in rows] == [(p, name) for p in PROMPTS for name in alone]
    for row in rows:
        digest = hashlib.sha256(f"0 {row['prompt']}".encode()).hexdigest()
        query = encode_prompt(row["prompt"], TEMPLATE, tokenizer)
        sampling = default_sampling(tokenizer, (2,), 12)
        (reply,) = generate_ids(alone[row["model"]], [query], [int(digest[:16], 16) // 2], sampling)
        assert row["response"] == tokenizer.decode(reply, skip_special_tokens=True).strip()
        assert row["length"] == len(reply)
    assert len({row["response"] for row in rows if row["prompt"] == "dogs"}) == 3, (
        "adapters that do not act prove nothing"
    )


def test_a_policy_that_may_say_nothing_is_free_to(
    folders: AdapterFolders, outcome: tuple[Path, list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with --begin_suppress_tokens none ended with 80% empty replies in its own log and with none in a comparison,
    which kept every model from an empty reply.  Here the run's first token can be nothing but EOS.
    """
    tokenizer = make_tokenizer()
    free = Path(shutil.copytree(folders.ppo, tmp_path / "free"))
    run = json.loads((free / "run.json").read_text(encoding="utf-8"))
    others = ",".join(str(token) for token in range(len(tokenizer)) if token != tokenizer.eos_token_id)
    run["arguments"] = {"begin_suppress_tokens": others}
    (free / "run.json").write_text(json.dumps(run), encoding="utf-8")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    rows = run_compare(monkeypatch, folders._replace(ppo=str(free)), tmp_path / "out", "--prompts", prompts)
    assert [(row["response"], row["length"]) for row in rows if row["model"] == "v1.5 (16)"] == [("", 1)] * len(PROMPTS)

    def of_the_others(rows: list[dict]) -> list[str]:
        return [row["response"] for row in rows if row["model"] != "v1.5 (16)"]

    assert of_the_others(rows) == of_the_others(outcome[1])


@pytest.mark.parametrize(
    ("run", "banned"),
    [
        ({}, {0, 2}),
        ({"arguments": "?"}, {0, 2}),
        ({"arguments": {"learning_rate": 1e-5}}, {0, 2}),
        ({"arguments": {"begin_suppress_tokens": "eos"}}, {0, 2}),
        ({"arguments": {"begin_suppress_tokens": "none"}}, set()),
        ({"arguments": {"begin_suppress_tokens": "7, 8"}}, {7, 8}),
    ],
)
def test_first_tokens_as_the_run_had_them(folders: AdapterFolders, run: dict, banned: set[int]) -> None:
    tokenizer = make_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    samplings = adapter_samplings(
        {"PPO": replace(read_adapter(folders.ppo, "--adapters"), run=run)}, tokenizer, (2,), 12
    )
    assert {name: set(sampling.begin_suppress_tokens) for name, sampling in samplings.items()} == {
        "base": {0, 2},
        "PPO": banned,
    }


def test_temperature_0_takes_the_likeliest_token(folders: AdapterFolders, tmp_path: Path, monkeypatch) -> None:
    """Whatever the seed; against the greedy search of transformers, one prompt at a time."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    words = ("--prompts", prompts, "--temperature", "0", "--seed")
    rows = run_compare(monkeypatch, folders, tmp_path / "out", *words, "1")
    assert run_compare(monkeypatch, folders, tmp_path / "again", *words, "2") == rows
    tokenizer = make_tokenizer()
    model = PeftModel.from_pretrained(load_with_hidden_state_fn(folders.base), folders.sft)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    greedy = GenerationConfig(
        max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=pad, begin_suppress_tokens=[eos, pad]
    )
    for row in (row for row in rows if row["model"] == "SFT"):
        query = torch.tensor([encode_prompt(row["prompt"], TEMPLATE, tokenizer)])
        output = model.generate(input_ids=query, attention_mask=torch.ones_like(query), generation_config=greedy)
        reply = output[0, query.shape[1] :]
        assert row["response"] == tokenizer.decode(reply, skip_special_tokens=True).strip()
        assert row["length"] == len(reply)


def test_score_is_the_reward_models(folders: AdapterFolders, outcome: tuple[Path, list[dict]]) -> None:
    """Against the sequence classifier of transformers with the reward adapter, one reply at a time, no padding."""
    base = AutoModelForSequenceClassification.from_pretrained(folders.base, num_labels=1, dtype=torch.float32)
    judge = PeftModel.from_pretrained(base, folders.reward).eval()
    tokenizer = make_tokenizer()
    row = next(row for row in outcome[1] if row["model"] == "SFT" and 1 < row["length"] < 12)  # it ended with EOS
    query = encode_prompt(row["prompt"], TEMPLATE, tokenizer)
    seed = prompt_seed(0, row["prompt"])
    sft = PeftModel.from_pretrained(load_with_hidden_state_fn(folders.base), folders.sft)
    (reply,) = generate_ids(sft, [query], [seed], default_sampling(tokenizer, (2,), 12))
    with torch.no_grad():
        expected = float(judge(input_ids=torch.tensor([[*query, *reply]])).logits)
    assert row["score"] == pytest.approx(expected, abs=1e-4)


def test_a_reply_depends_on_seed_and_prompt_alone(
    folders: AdapterFolders, outcome: tuple[Path, list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replies(rows: list[dict]) -> dict[tuple[str, str], str]:
        return {(row["prompt"], row["model"]): row["response"] for row in rows}

    turned = write_rows(tmp_path / "turned.jsonl", [{"prompt": prompt} for prompt in PROMPTS[::-1]])
    again = run_compare(monkeypatch, folders, tmp_path / "again", "--prompts", turned, "--batch_size", "5")
    assert replies(again) == replies(outcome[1])
    assert {row["score"] for row in again} == {None}
    other = run_compare(monkeypatch, folders, tmp_path / "other", "--prompts", turned, "--seed", "1")
    assert replies(other) != replies(outcome[1])
    page = (tmp_path / "again" / "compare.html").read_text(encoding="utf-8")
    assert "score" not in page, "no column of a reward model that is not there"
    assert "wins" not in page


# ---- Prompts ----


def test_prompts_from_file_lines_or_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("\ufeffone\n\n二\n", encoding="utf-8")
    assert [row["prompt"] for row in compare.read_prompts(str(lines))] == ["one", "", "二"]  # empty: dropped later
    assert [row["prompt"] for row in compare.read_prompts("Who are you?")] == ["Who are you?"]
    assert "taken as the text of one prompt" in capsys.readouterr().err
    assert len(compare.read_prompts(None)) == 5
    for missing in ("none.txt", "none.jsonl"):
        with pytest.raises(InputError, match=missing):
            compare.read_prompts(str(tmp_path / missing))


def test_max_prompts_takes_the_first(folders: AdapterFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\none\ntwo\nthree\n", encoding="utf-8")
    rows = run_compare(monkeypatch, folders, tmp_path / "out", "--prompts", str(lines), "--max_prompts", "2")
    assert [row["prompt"] for row in rows[::3]] == ["one", "two"]


def test_max_tables_shows_the_first_and_counts_all(folders: AdapterFolders, tmp_path: Path, monkeypatch) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("one\ntwo\nthree\n", encoding="utf-8")
    rows = run_compare(monkeypatch, folders, tmp_path / "out", "--prompts", str(lines), "--max_tables", "2")
    assert [row["prompt"] for row in rows[::3]] == ["one", "two", "three"]
    summary, *tables = Page((tmp_path / "out/compare.html").read_text(encoding="utf-8")).tables
    assert [table[0][1] for table in tables] == ["one", "two"]
    assert summary[1][1] == f"{sum(row['length'] for row in rows[::3]) / 3:.1f}"
    text = (tmp_path / "out/compare.md").read_text(encoding="utf-8")
    assert "3 prompts; base" in text
    assert "the first 2 are shown" in text


# ---- Figures ----


def test_win_rate_by_hand() -> None:
    """Won, tied, lost, won: 2.5 of 4.  The ends of Wilson's interval are where |share - p| is 1.96 deviations of p."""
    share, low, high = compare.win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0])
    assert share == 0.625
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 4), rel=1e-6)
    assert low < share < high
    assert wilson_interval(0.0, 10)[0] == 0
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1)


def test_summary_by_hand() -> None:
    """EOS (2) counts in the length, as everywhere, and not in the distinct tokens."""
    first = compare.ModelResponses("SFT", [Response([5, 6, 2], "ab", 1.0), Response([5, 5, 2], "aa", 0.0)])
    second = compare.ModelResponses("PPO", [Response([7, 2], "", 3.0), Response([5, 6, 7, 8], "abcd", -1.0)])
    summary = compare.summarise(second, first, stop_ids=(2,))
    assert summary[:6] == ("PPO", 1.0, 3.0, 4 / 5, 1.0, 0.5)
    assert summary.wins[0] == 0.5
    assert compare.summarise(first, first, stop_ids=(2,)).wins is None
    short = compare.ModelResponses("short", [Response([5, 2], "a", None), Response([2], "", None)])
    assert compare.summarise(short, first, stop_ids=(2,))[1:] == (None, 1.5, 1.0, 0.0, 0.5, None)  # no pair of tokens
    head, rows = compare.summary_table([summary], "SFT")
    assert head[:3] == ["model", "score", "wins against SFT (95% interval)"]
    assert head[3:] == ["reply length", "distinct-1", "distinct-2", "empty replies"]
    assert rows == [["PPO", "1.000", "50% (9% to 91%)", "3.0", "0.800", "1.000", "50.0%"]]


# ---- Tables ----


def test_markdown_cells_hold_any_text() -> None:
    cell = compare.markdown_cell("a|b\n<script>\r\n*x* _y_ `z` \\| [l](u) $m$ &amp;\u2028end")
    assert cell == (
        "a&#124;b<br>&lt;script&gt;<br>\\*x\\* \\_y\\_ \\`z\\` \\\\&#124; \\[l\\](u) \\$m\\$ &amp;amp;<br>end"
    )


def test_html_shows_every_text_as_it_is(folders: AdapterFolders, outcome: tuple[Path, list[dict]]) -> None:
    folder, rows = outcome
    text = (folder / "compare.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert f"5 prompts; base {folders.base}; temperature 1.0, at most 12 tokens a reply, seed 0" in text
    assert f"scores from {folders.reward}</p>" in text
    assert re.search("https?://", text) is None
    summary, *tables = page.tables
    assert [row[0] for row in summary] == ["model", "base", "SFT", "v1.5 (16)"]
    assert [table[0] for table in tables] == [["prompt", prompt, "score"] for prompt in PROMPTS]
    shown = [cells for table in tables for cells in table[1:]]
    assert shown == [[row["model"], row["response"], f"{row['score']:.2f}"] for row in rows]


def test_markdown_has_a_row_a_model_in_each_table(outcome: tuple[Path, list[dict]]) -> None:
    lines = (outcome[0] / "compare.md").read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == (2 + 3) * (1 + len(PROMPTS))
    assert all(line.count("|") == 8 for line in tables[:5])
    assert all(line.count("|") == 4 for line in tables[5:])
    assert "<script>" not in "".join(lines)


# ---- Mistakes ----


def test_mistakes_are_one_line(
    folders: AdapterFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_base(tmp_path / "other", seed=1)
    other_sft = save_sft(other, tmp_path / "other_sft")
    write_run(other_sft, other)
    template = shutil.copytree(folders.sft, tmp_path / "template")
    write_run(str(template), folders.base, "{prompt}!")
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("precious")
    good = f"SFT={folders.sft}"
    cases = [
        (["--adapters", "SFT"], "is not NAME=FOLDER"),
        (["--adapters", good, good], "given twice"),
        (["--adapters", f"base={folders.sft}"], "the bare base's"),
        (["--adapters", f"SFT={tmp_path / 'none'}"], "no adapter_config.json"),
        (["--adapters", f"SFT={folders.reward}"], "is a reward adapter"),
        (["--adapters", f"SFT={other_sft}"], "was trained on the base"),
        (["--adapters", good, f"B={template}"], "give adapters of one template"),
        (["--adapters", good, "--prompt_template", "{prompt}?"], "was trained with the prompt template"),
        (["--adapters", good, "--reward_model_lora_path", folders.sft], "holds no score head"),
        (["--adapters", good, "--output_dir", str(used)], "is not empty"),
        (["--adapters", good, "--temperature", "-1"], "have to be above 0"),
        (["--adapters", good, "--batch_size", "0"], "--batch_size is 0"),
        (["--adapters", good, "--max_prompts", "0"], "--max_prompts is 0"),
        (["--adapters", good, "--max_tables", "0"], "--max_tables is 0"),
        (["--adapters", good, "--output_max_length", "256"], "leaves no room for a prompt"),
        (["--adapters", good, "--prompts", str(tmp_path / "none.jsonl")], "there is no file"),
        ([], "no adapter was given"),
    ]
    for words, message in cases:
        output = tmp_path / "output"
        monkeypatch.setattr(
            sys, "argv", ["compare.py", "--base_model_name", folders.base, "--output_dir", str(output), *words]
        )
        with pytest.raises(SystemExit) as stop:
            run_script(compare.main)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2, words
        assert len(errors) == 1, words
        assert message in errors[0]
        assert not output.exists(), words
    assert [path.name for path in used.iterdir()] == ["mine.txt"]


def test_template_of_adapters_trained_elsewhere(folders: AdapterFolders, tmp_path: Path) -> None:
    """Without any run.json the argument decides; one run.json is enough to know."""
    bare = shutil.copytree(folders.sft, tmp_path / "bare", ignore=shutil.ignore_patterns("run.json"))
    args = SimpleNamespace(prompt_template="{prompt}=", template_given=False)
    assert agreed_template(args, read_named_adapters([f"a={bare}"])) == "{prompt}="
    assert agreed_template(args, read_named_adapters([f"a={bare}", f"b={folders.sft}"])) == TEMPLATE


def test_prompts_that_do_not_fit_are_dropped(
    folders: AdapterFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny base has 256 positions; 240 of them are the reply's."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "x" * 100}, {"prompt": "tea"}])
    rows = run_compare(monkeypatch, folders, tmp_path / "out", "--prompts", prompts, "--output_max_length", "240")
    assert {row["prompt"] for row in rows} == {"tea"}
