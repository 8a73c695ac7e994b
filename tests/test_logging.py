"""What a run leaves behind: metrics.jsonl, samples.jsonl, run.json, pictures; test_trackers.py has the trackers."""

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import reward_modeling
import rl_training
import sft_training
from reporting.plots import draw_curves, limits
from reporting.progress import iteration_line
from tests.helpers import make_stages, run_main, save_lively_base
from utils.files import drop_rows_after, read_jsonl

STEPS, BATCH, TEMPLATE = 3, 4, "Q: {prompt}\nA:"
PPO_METRICS = {  # the ones that DESIGN.md promises
    "iteration",
    "score_mean",
    "score_std",
    "kl",
    "response_length",
    "empty_fraction",
    "entropy",
    "ratio_first",
    "approx_kl",
    "clip_fraction",
    "value_loss",
    "kl_coef",
    "learning_rate",
    "seconds",
    "tokens_per_second",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """Folders of one short run of each stage, logged to TensorBoard, and the base."""
    folder = tmp_path_factory.mktemp("logging")
    base = save_lively_base(folder / "base")
    stages = make_stages(base, folder / "stages")
    common = ["--model_name", base, "--prompt_template", TEMPLATE, "--report_to", "tensorboard", "--seed", "5"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, script, words in (
            ("sft", sft_training, ["--dataset", data["sft"], "--max_steps", "3", "--logging_steps", "1"]),
            (
                "reward",
                reward_modeling,
                ["--dataset", data["preferences"], "--eval_dataset", data["preferences"], "--max_steps", "2"],
            ),
            (
                "ppo",
                rl_training,
                [
                    *("--dataset", data["preferences"], "--sft_model_lora_path", stages.sft),
                    *("--reward_model_lora_path", stages.reward, "--output_max_length", "12", "--save_freq", "2"),
                    *("--allow_weak_reward", "true"),
                    *("--steps", STEPS, "--batch_size", BATCH, "--learning_rate", "1e-3"),
                ],
            ),
        ):
            monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / name / "tensorboard"))
            run_main(script, [*common, *words, "--output_dir", folder / name], monkeypatch)
    return folder


@pytest.fixture(scope="module")
def iterations(runs):
    return [row for row in read_jsonl(str(runs / "ppo" / "metrics.jsonl")) if "score_mean" in row]


def scalars(folder):
    """Scalars of the event files of a run: name -> [(step, value)]."""
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_metrics_of_every_iteration(iterations):
    assert [row["iteration"] for row in iterations] == list(range(1, STEPS + 1))
    for row in iterations:
        assert set(row) >= PPO_METRICS
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, (int, float)))
        assert 1 <= row["response_length"] <= 12
        assert row["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["response_length"] * BATCH / row["seconds"])
    assert iterations[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert iterations[0]["ratio_first"] == pytest.approx(1, abs=1e-5)
    assert iterations[0]["learning_rate"] == pytest.approx(1e-3)


def test_samples_are_the_replies_that_the_metrics_speak_of(runs, iterations, data):
    samples = read_jsonl(str(runs / "ppo" / "samples.jsonl"))
    prompts = {row["prompt"] for row in read_jsonl(data["preferences"])}
    assert [row["iteration"] for row in samples] == [n + 1 for n in range(STEPS) for _ in range(BATCH)]
    for row in samples:
        assert set(row) >= {"iteration", "prompt", "response", "score", "kl", "length"}
        assert row["prompt"] in prompts
    for row in iterations:
        mine = [sample for sample in samples if sample["iteration"] == row["iteration"]]
        for metric, key in (("score_mean", "score"), ("kl", "kl"), ("response_length", "length")):
            assert sum(sample[key] for sample in mine) / BATCH == pytest.approx(row[metric], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("stage", "tags"), [("sft", {"train/loss"}), ("reward", {"eval/accuracy", "eval/loss"})])
def test_the_other_stages_log_too(runs, stage, tags):
    assert tags <= set(scalars(runs / stage))
    rows = read_jsonl(str(runs / stage / "metrics.jsonl"))
    names = {tag.replace("train/", "").replace("eval/", "eval_") for tag in tags}
    assert names <= set().union(*rows)
    assert all("step" in row for row in rows)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_run_json_says_how_to_repeat_the_run(runs, stage):
    run = json.loads((runs / stage / "run.json").read_text(encoding="utf-8"))
    assert (run["stage"], run["seed"], run["prompt_template"]) == (stage, 5, TEMPLATE)
    assert run["base_model"] == str(runs / "base")
    assert set(run) >= {"base_fingerprint", "git_commit", "python", "libraries", "arguments", "data"}
    assert run["arguments"]["output_dir"] == str(runs / stage)
    for library in ("torch", "transformers", "peft", "trl", "datasets", "accelerate"):
        assert run["libraries"][library] == version(library)
    assert not [key for key in run["arguments"] if key.endswith("_token")]  # no secrets of the hub
    if stage == "ppo":
        assert (run["arguments"]["steps"], run["arguments"]["batch_size"]) == (STEPS, BATCH)
        # an earlier filter for access tokens swallowed every argument with "token" in its name
        assert run["arguments"]["begin_suppress_tokens"] == "eos"
        then = json.loads((runs / "ppo/checkpoint-2/run.json").read_text(encoding="utf-8"))
        assert then == {
            name: run[name] for name in run if name not in ("best", "guard", "what_to_take")
        }  # known at the end
    else:
        assert run["lora"]["lora_r"] == 16


def test_pictures(runs):
    pictures = list((runs / "ppo" / "plots").glob("*.png"))
    wanted = {"score_mean", "response_length", "kl", "entropy", "policy_loss", "value_loss", "clip_fraction"}
    assert {picture.stem for picture in pictures} == wanted
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.format == "PNG"
            assert image.width > 400
            assert len(np.unique(np.asarray(image.convert("L")))) > 10  # something is drawn


def test_pictures_show_the_numbers(tmp_path, monkeypatch):
    """The curves are columns of metrics.jsonl, evaluation rows left out, with best, collapse and alarms where they were."""
    names = ("score_mean", "score_std", "kl", "entropy")
    rows = [{"iteration": i, **{name: i * 10.0 + n for n, name in enumerate(names)}} for i in (1, 2, 3)]
    rows[2]["guard/alarms"] = 2.0
    lines = [rows[0], {"iteration": 1, "eval_score_mean": 99.0}, *rows[1:]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.json").write_text(json.dumps({"best": {"iteration": 2}, "guard": {"collapse_at": 3}}))
    saved = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: saved.update({Path(path).name: self.axes[0]}))
    draw_curves(str(tmp_path))
    assert list(saved) == ["score_mean.png", "kl.png", "entropy.png"]
    kl = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in saved["kl.png"].lines}
    assert ([1, 2, 3], [12.0, 22.0, 32.0]) in kl.values()
    assert {name: kl[name][0] for name in ("best", "collapse", "alarm")} == {
        "best": [2, 2],
        "collapse": [3, 3],
        "alarm": [3],
    }
    assert (saved["kl.png"].get_title(), saved["kl.png"].get_ylabel()) == ("KL to the SFT model", "nats a reply")
    (band,) = saved["score_mean.png"].collections  # 10 +- 11, 20 +- 21, 30 +- 31
    assert (band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()) == (-1, 61)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], (0, 1)),
        ([0.0, 0.0], (0, 1)),
        ([-2.0], (-2.2, -1.8)),
        ([1.0, 3.0], (0.9, 3.1)),  # a twentieth of the range on either side
        ([1.0, 1 + 1e-9], (0.999, 1.001)),  # rounding errors are no curve
    ],
)
def test_ends_of_an_axis(values, wanted):
    assert limits(np.array(values)) == pytest.approx(wanted, abs=1e-8)


def test_a_resumed_run_forgets_the_rows_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"iteration": i}) + "\n" for i in (1, 2, 3, 4)))
    drop_rows_after(str(path), "iteration", 2)
    assert [row["iteration"] for row in read_jsonl(str(path))] == [1, 2]


def test_the_console_shows_one_readable_line_an_iteration():
    """The held-out score is in the card's standard deviations; score and evaluation beside it were raw, and said no word."""
    logs = {"score_mean": 1.234, "score_std": 0.5, "kl": 2.0, "response_length": 16.44, "empty_fraction": 0.125}
    logs |= {"normalized_score_mean": 0.31, "entropy": 0.618, "tokens_per_second": 351.7, "loss": 0.1}
    line = "iteration 3/24  score 0.31  raw score 1.23 +- 0.50"
    line += "  KL 2.00  16.4 tokens a reply  empty 12%  entropy 0.62  352 tokens/s"
    assert iteration_line(logs, 3, 24) == line
    assert iteration_line({**logs, "heldout/score": 0.71}, 3, 24) == line + "  held-out score 0.71"
    with_gold = {**logs, "gold_mean": 0.617, "heldout/score": 0.71, "heldout/gold": 0.5}
    assert iteration_line(with_gold, 3, 24) == (
        line.replace("  KL", "  gold 0.62  KL") + "  held-out score 0.71 gold 0.50"
    )
    names = ("score_mean", "normalized_score_mean", "kl", "response_length", "empty_fraction")
    evaluation = {f"eval_{name}": logs[name] for name in names}
    assert (
        iteration_line(evaluation, 3, 24)
        == "evaluation after 3  score 0.31  raw score 1.23  KL 2.00  16.4 tokens a reply  empty 12%"
    )
    assert iteration_line({**evaluation, "eval_gold": 0.25}, 3, 24).startswith(
        "evaluation after 3  score 0.31  raw score 1.23  gold 0.25  KL 2.00"
    )
    assert iteration_line({"train_runtime": 3.0}, 24, 24) is None


@pytest.mark.parametrize("quiet", ["true", "false"])
def test_a_run_prints_its_iterations_and_no_dictionary(runs, data, tmp_path, monkeypatch, capfd, quiet):
    words = ["--model_name_or_path", runs / "base", "--dataset", data["preferences"], "--output_dir", tmp_path / "ppo"]
    words += ["--prompt_template", TEMPLATE, "--steps", "2", "--batch_size", "4", "--output_max_length", "8"]
    words += ["--sft_model_lora_path", runs / "stages/sft", "--reward_model_lora_path", runs / "stages/reward"]
    words += ["--allow_weak_reward", "true", "--guard", "off", "--use_cpu", "true", "--disable_tqdm", quiet]
    monkeypatch.setattr(sys, "argv", ["rl_training.py", *map(str, words)])
    rl_training.main()
    shown = capfd.readouterr()
    printed = shown.out + shown.err
    assert printed.count("iteration 1/2  score") == printed.count("iteration 2/2  score") == 1
    assert "{'score_mean'" not in printed
