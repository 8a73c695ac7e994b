"""What wandb and TensorBoard are given of a run: the names of docs/metrics.md, and no other."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

import reward_modeling
import rl_training
from reporting.trackers import SAMPLES, Grouped, TensorBoardTracker, read_picture, show_card, use_grouped_names
from tests.helpers import make_stages, run_main, save_lively_base
from utils.console import InputError
from utils.files import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH, TEMPLATE = 3, 4, "Q: {prompt}\nA:"
ONLY_WANDB, ONLY_TENSORBOARD = {"card/probes", "train/global_step"}, {"card/table"}


def names_of(watched: bool) -> dict[str, str]:
    """Names in the trackers of what docs/metrics.md lists for stage 3 -> those in metrics.jsonl."""
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8").split("## Stages 1 and 2")[0]
    found = dict(re.findall(r"^\| `(.*?)` \| (?:`(.*?)`)?", page, flags=re.MULTILINE))
    only = re.compile(r"guard/|heldout/|eval/|objective/gold")  # with a guard, an evaluation and a gold function
    return {name: flat for name, flat in found.items() if watched or not only.match(name)}


class Runs(NamedTuple):
    folder: Path
    logged: dict[str, list[dict[str, Any]]]  # run -> what wandb was given, one log after the other


class Tracked(NamedTuple):
    """A run as a tracker has it."""

    series: dict[str, dict[int, Any]]  # metric -> iteration -> value
    texts: dict[str, dict[int, str]]


def read_wandb(runs: Runs, name: str) -> Tracked:
    series: dict[str, dict[int, Any]] = {}
    for entries in runs.logged[name]:
        for metric, value in entries.items():
            series.setdefault(metric, {})[entries.get("train/global_step")] = value  # None: the Trainer's own
    return Tracked(series, {})


def read_tensorboard(runs: Runs, name: str) -> Tracked:
    folder = runs.folder / "trackers" / name
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    series = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags["scalars"]}
    series |= {tag: {e.step: e.histogram_value for e in events.Histograms(tag)} for tag in tags["histograms"]}
    series |= {tag: {e.step: e for e in events.Images(tag)} for tag in tags["images"]}
    texts = {
        tag.removesuffix("/text_summary"): {
            e.step: make_ndarray(e.tensor_proto).item().decode() for e in events.Tensors(tag)
        }
        for tag in tags["tensors"]
    }
    for name in ("args", "model_config"):  # what the Trainer's own callback writes down
        del texts[name]
    return Tracked(series, texts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Runs:
    """A reward model, and PPO with and without guard, evaluation and gold; all with both trackers."""
    folder = tmp_path_factory.mktemp("trackers")
    stages = make_stages(save_lively_base(folder / "base"), folder / "stages")
    common = ["--model_name", stages.base, "--prompt_template", TEMPLATE, "--dataset", data["preferences"]]
    common += ["--report_to", "all", "--seed", "5"]
    reward = ["--eval_dataset", data["preferences"], "--max_steps", "2", "--logging_steps", "1"]
    ppo = ["--sft_model_lora_path", stages.sft, "--reward_model_lora_path", folder / "reward"]
    ppo += ["--allow_weak_reward", "true", "--output_max_length", "12", "--save_freq", "2", "--learning_rate", "1e-3"]
    ppo += ["--steps", STEPS, "--batch_size", BATCH, "--kl_in", "loss"]
    watched = ["--guard_freq", "2", "--guard", "warn", "--eval_fraction", "0.4", "--eval_strategy", "steps"]
    watched += ["--gold_function", "tests.golds:judge"]
    logged: dict[str, list[dict[str, Any]]] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        both = ["wandb", "tensorboard"]  # what "all" is where nothing else is installed
        monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: both)
        for name, script, words in (
            ("reward", reward_modeling, reward),
            ("plain", rl_training, [*ppo, "--guard", "off"]),
            ("watched", rl_training, [*ppo, *watched, "--eval_steps", "2"]),
        ):
            monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "trackers" / name))
            # the trainer takes the run that is there
            with wandb.init(mode="disabled"), pytest.MonkeyPatch.context() as spied:
                spied.setattr(wandb, "log", logged.setdefault(name, []).append)
                run_main(script, [*common, *words, "--output_dir", folder / name], monkeypatch)
    return Runs(folder, logged)


@pytest.mark.parametrize("name", ["plain", "watched"])
def test_the_names_in_the_trackers_are_the_documented_ones(runs: Runs, name: str) -> None:
    expected = set(names_of(name == "watched"))
    assert set(read_wandb(runs, name).series) == expected - ONLY_TENSORBOARD
    series, texts = read_tensorboard(runs, name)
    assert {*series, *texts} == expected - ONLY_WANDB
    assert set(texts) == {"reply/samples", "card/table"}


@pytest.mark.parametrize("name", ["plain", "watched"])
@pytest.mark.parametrize("read", [read_wandb, read_tensorboard])
def test_a_tracker_has_the_numbers_of_metrics_jsonl(runs: Runs, name: str, read: Any) -> None:
    """Every number of every line, under the name that docs/metrics.md gives for it."""
    flat = names_of(watched=True)
    wanted: dict[str, dict[int, float]] = {}
    for row in read_jsonl(str(runs.folder / name / "metrics.jsonl")):
        for metric, value in row.items():
            if metric != "iteration":
                wanted.setdefault(metric, {})[row["iteration"]] = value
    numbers = {metric: values for metric, values in read(runs, name).series.items() if flat.get(metric) in wanted}
    assert {flat[metric] for metric in numbers} == set(wanted)
    for metric, values in numbers.items():
        assert values == pytest.approx(wanted[flat[metric]], rel=1e-5, abs=1e-8), metric


def test_histograms_are_of_the_replies(runs: Runs) -> None:
    samples = read_jsonl(str(runs.folder / "plain" / "samples.jsonl"))
    of_wandb, of_tensorboard = read_wandb(runs, "plain").series, read_tensorboard(runs, "plain").series
    for name, column in (("objective/scores", "score"), ("reply/lengths", "length")):
        for iteration in range(1, STEPS + 1):
            values = [row[column] for row in samples if row["iteration"] == iteration]
            counts, edges = np.histogram(values, bins=64)
            assert list(of_wandb[name][iteration].histogram) == counts.tolist()
            assert list(of_wandb[name][iteration].bins) == pytest.approx(edges.tolist())
            histogram = of_tensorboard[name][iteration]
            assert (histogram.num, histogram.min, histogram.max) == (BATCH, min(values), max(values))


@pytest.mark.parametrize(("name", "more"), [("plain", []), ("watched", ["gold"])])
def test_samples_are_shown_at_the_start_and_with_every_checkpoint(runs: Runs, name: str, more: list[str]) -> None:
    samples = read_jsonl(str(runs.folder / name / "samples.jsonl"))
    columns = ["iteration", "prompt", "response", "score", "kl", "length", "ended", *more]
    assert list(samples[0]) == [*columns, "response_ids"]  # which say nothing to a person
    tables = read_wandb(runs, name).series["reply/samples"]
    texts = read_tensorboard(runs, name).texts["reply/samples"]
    assert list(tables) == list(texts) == [1, 2, 3]  # the SFT model, --save_freq 2, the end
    for iteration, table in tables.items():
        rows = [row for row in samples if row["iteration"] == iteration][:SAMPLES]
        assert table.columns == columns
        assert table.data == [[row[column] for column in columns] for row in rows]
        assert len(texts[iteration].splitlines()) == 2 + len(rows)


@pytest.mark.parametrize("name", ["reward", "plain"])
def test_the_reward_card_is_shown(runs: Runs, name: str) -> None:
    """By the stage that makes it and by the stage that uses it."""
    card = json.loads((runs.folder / "reward/reward_card.json").read_text(encoding="utf-8"))
    series = read_wandb(runs, name).series
    (step, table), (picture,) = *series["card/probes"].items(), series["card/picture"].values()
    assert step == (2 if name == "reward" else 0)  # behind the last step, and in front of the first
    assert table.data == [[kind, share, card["probe_counts"][kind]] for kind, share in card["probes"].items()]
    drawn = read_picture(str(runs.folder / "reward/reward_card.png"))
    assert np.array_equal(np.asarray(picture.image.convert("RGB")), drawn)
    tracked = read_tensorboard(runs, name)
    (image,) = tracked.series["card/picture"].values()
    assert image.width == drawn.shape[1]
    (text,) = tracked.texts["card/table"].values()
    assert f"accuracy | {card['accuracy']:.3f}" in text


def test_the_other_stages_keep_the_names_of_the_trainer(runs: Runs) -> None:
    wanted = {"eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/margin", "eval/loss", "train/loss"}
    assert wanted <= set(read_tensorboard(runs, "reward").series)


class Recorder(Grouped, TrainerCallback):
    """A tracker that keeps what it is sent."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.sent: list[tuple] = []

    def send(self, *log: Any) -> None:
        self.sent.append(log)


def test_what_a_tracker_is_sent() -> None:
    """Replies once an iteration and not again with its evaluation; nothing from any process but the first.

    They are the trainer's own at that moment, whatever list it had before.
    """
    trainer = SimpleNamespace(samples=[{"score": 99.0}])
    recorder, args = Recorder(trainer), SimpleNamespace(save_steps=2)
    trainer.samples = samples = [{"score": float(number)} for number in range(SAMPLES + 1)]
    for step, logs in ((1, "score_mean"), (1, "eval_score_mean"), (2, "score_mean"), (3, "score_mean"), (5, "kl")):
        for first in (True, False):
            state = SimpleNamespace(global_step=step, max_steps=5, is_world_process_zero=first)
            recorder.on_log(args, state, None, {logs: 0.5})
    name, few = "objective/score_mean", samples[:SAMPLES]
    assert recorder.sent == [
        (1, {name: 0.5}, samples, few),
        (1, {"eval/score_mean": 0.5}, [], []),
        (2, {name: 0.5}, samples, few),
        (3, {name: 0.5}, samples, []),
        (5, {"objective/kl": 0.5}, [], []),
    ]


def test_only_the_trackers_that_were_asked_for_are_replaced() -> None:
    class Callbacks:
        """The part of a Trainer that holds its callbacks: TensorBoard alone."""

        def __init__(self) -> None:
            self.added: list[TrainerCallback] = []

        def pop_callback(self, kind: type[TrainerCallback]) -> object | None:
            return kind if kind is TensorBoardCallback else None

        def add_callback(self, callback: TrainerCallback) -> None:
            self.added.append(callback)

    trainer = Callbacks()
    use_grouped_names(trainer)
    assert [type(callback) for callback in trainer.added] == [TensorBoardTracker]


def test_a_card_from_before_there_were_probes_is_not_shown(tmp_path: Path) -> None:
    """Stage 3 takes such a card, for its mean and standard deviation; a tracker ended the run on its missing probes."""
    card = {"score_mean": 0.0, "score_std": 1.0}
    show_card(SimpleNamespace(_wandb=object()), card, str(tmp_path), 0)  # a tracker that takes nothing


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("nonsense", "--report_to nonsense is no tracker; there are .*tensorboard.*wandb"),
        ("trackio", "pip install trackio"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch, tracker: str, message: str) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: False)
    words = ["--model_name", "m", "--output_dir", tmp_path / "ppo", "--log_with", tracker]
    with pytest.raises(InputError, match=message):
        run_main(rl_training, words, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_trackio_gets_the_same(runs: Runs, data: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    """trackio reads TRACKIO_DIR when it is imported.  An earlier test that imported it once made this one read the rows of
    an older run, left in the user's own cache: tests/conftest.py sets the folder before anything is imported.
    """
    import trackio

    words = ["--model_name", runs.folder / "base", "--prompt_template", TEMPLATE, "--dataset", data["preferences"]]
    words += ["--sft_model_lora_path", runs.folder / "stages/sft", "--reward_model_lora_path", runs.folder / "reward"]
    words += ["--allow_weak_reward", "true", "--guard", "off", "--output_max_length", "12", "--steps", "1"]
    words += [
        "--batch_size",
        BATCH,
        "--log_with",
        "trackio",
        "--run_name",
        "tests",
        "--kl_in",
        "loss",
        "--project",
        "toolkit",
        "--output_dir",
        tmp_path / "ppo",
    ]
    run_main(rl_training, words, monkeypatch)
    assert str(trackio.utils.TRACKIO_DIR) == os.environ["TRACKIO_DIR"]
    rows = trackio.SQLiteStorage.get_logs("toolkit", "tests")
    names = {name for row in rows for name in row} - {"step", "timestamp"}
    assert names == set(names_of(watched=False)) - ONLY_TENSORBOARD
    (first,) = (row["objective/score_mean"] for row in rows if "objective/score_mean" in row)
    assert first == pytest.approx(read_jsonl(str(tmp_path / "ppo/metrics.jsonl"))[0]["score_mean"])
