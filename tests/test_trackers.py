"""What wandb and TensorBoard show of a run, read back from their own files: the names of docs/metrics.md, and no other."""

import json
import os
import re
import struct
from collections.abc import Iterator
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
from wandb.proto import wandb_internal_pb2

import reward_modeling
import rl_training
from reporting.trackers import SAMPLES, Grouped, TensorBoardTracker, show_card, tracker_name, use_grouped_names
from tests.helpers import make_stages, run_main, save_lively_base
from utils.console import InputError
from utils.files import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH, TEMPLATE = 3, 4, "Q: {prompt}\nA:"
PLAIN = ("objective", "policy", "value", "reply", "speed")
WATCHED = (*PLAIN, "guard and held-out prompts", "evaluation", "gold")
ONLY_WANDB, ONLY_TENSORBOARD = {"card/probes", "train/global_step"}, {"card/table"}


def documented() -> dict[str, dict[str, str]]:
    """Section of docs/metrics.md -> name in trackers -> name in metrics.jsonl, as far as stage 3 goes."""
    sections: dict[str, dict[str, str]] = {}
    for line in (ROOT / "docs/metrics.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = sections.setdefault(line.removeprefix("## ").removeprefix("Stage 3: "), {})
        elif line.startswith("| `"):
            names, flat, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            assert len(rest) == 3, line
            for name in re.findall(r"`([^`]+)`", names):
                assert name not in section, f"{name} has two lines"
                section[name] = flat.strip("`") or name
    return sections


def names_of(*sections: str) -> set[str]:
    found = documented()
    return {name for section in sections for name in found[section]}


class Tracked(NamedTuple):
    """A run as a tracker has it."""

    series: dict[str, dict[int, Any]]  # metric -> iteration -> value; wandb's media are dictionaries
    texts: dict[str, dict[int, str]]


def wandb_records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Records of a .wandb file: 7 bytes, then LevelDB's log format (blocks of 32 KiB, a head of 7 bytes a piece)."""
    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def read_wandb(folder: Path) -> Tracked:
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    series: dict[str, dict[int, Any]] = {}
    for record in wandb_records(path):
        row: dict[str, Any] = {}
        for item in record.history.item:
            value = json.loads(item.value_json)
            if len(item.nested_key) > 1:
                row.setdefault(item.nested_key[0], {})[item.nested_key[1]] = value
            else:
                row[item.key or item.nested_key[0]] = value
        for name, value in row.items():
            if not name.startswith("_"):  # wandb's own clock and counter
                series.setdefault(name, {})[row["train/global_step"]] = value
    return Tracked(series, {})


def read_tensorboard(folder: Path) -> Tracked:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
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
def runs(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """A reward model, and PPO with and without guard, evaluation and gold; all with both trackers."""
    folder = tmp_path_factory.mktemp("trackers")
    stages = make_stages(save_lively_base(folder / "base"), folder / "stages")
    common = ["--model_name", stages.base, "--prompt_template", TEMPLATE, "--dataset", data["preferences"]]
    common += ["--report_to", "all", "--seed", "5"]
    reward = ["--eval_dataset", data["preferences"], "--max_steps", "2", "--logging_steps", "1"]
    ppo = ["--sft_model_lora_path", stages.sft, "--reward_model_lora_path", folder / "reward"]
    ppo += ["--allow_weak_reward", "true", "--output_max_length", "12", "--save_freq", "2", "--learning_rate", "1e-3"]
    ppo += ["--steps", STEPS, "--batch_size", BATCH]
    watched = ["--guard_freq", "2", "--guard", "warn", "--eval_fraction", "0.4", "--eval_strategy", "steps"]
    watched += ["--gold_function", "tests.golds:judge"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("WANDB_SILENT", "true")
        both = ["wandb", "tensorboard"]  # what "all" is where nothing else is installed
        monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: both)
        for name, script, words in (
            ("reward", reward_modeling, reward),
            ("plain", rl_training, [*ppo, "--guard", "off"]),
            ("watched", rl_training, [*ppo, *watched, "--eval_steps", "2"]),
        ):
            (folder / "trackers" / name).mkdir(parents=True)
            monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "trackers" / name / "tensorboard"))
            # the trainer takes the run that is there; wandb reads WANDB_DIR only once in a process
            with wandb.init(project="tests", dir=folder / "trackers" / name):
                run_main(script, [*common, *words, "--output_dir", folder / name], monkeypatch)
    return folder


@pytest.mark.parametrize(("name", "sections"), [("plain", PLAIN), ("watched", WATCHED)])
def test_the_names_in_the_trackers_are_the_documented_ones(runs: Path, name: str, sections: tuple[str, ...]) -> None:
    expected = names_of(*sections, "what only trackers show")
    assert set(read_wandb(runs / "trackers" / name).series) == expected - ONLY_TENSORBOARD
    series, texts = read_tensorboard(runs / "trackers" / name)
    assert {*series, *texts} == expected - ONLY_WANDB
    assert set(texts) == {"reply/samples", "card/table"}


@pytest.mark.parametrize("name", ["plain", "watched"])
@pytest.mark.parametrize("read", [read_wandb, read_tensorboard])
def test_a_tracker_has_the_numbers_of_metrics_jsonl(runs: Path, name: str, read: Any) -> None:
    """Every number of every line, under the name that docs/metrics.md gives for it."""
    flat = {name: flat for section in WATCHED for name, flat in documented()[section].items()}
    tracked = read(runs / "trackers" / name).series
    wanted: dict[str, dict[int, float]] = {}
    for row in read_jsonl(str(runs / name / "metrics.jsonl")):
        for metric, value in row.items():
            if metric != "iteration":
                wanted.setdefault(metric, {})[row["iteration"]] = value
    numbers = {metric: values for metric, values in tracked.items() if flat.get(metric) in wanted}
    assert {flat[metric] for metric in numbers} == set(wanted)
    for metric, values in numbers.items():
        assert values == pytest.approx(wanted[flat[metric]], rel=1e-5, abs=1e-8), metric


def test_histograms_are_of_the_replies(runs: Path) -> None:
    samples = read_jsonl(str(runs / "plain" / "samples.jsonl"))
    of_wandb, of_tensorboard = (
        read_wandb(runs / "trackers/plain").series,
        read_tensorboard(runs / "trackers/plain").series,
    )
    for name, column in (("objective/scores", "score"), ("reply/lengths", "length")):
        for iteration in range(1, STEPS + 1):
            values = [row[column] for row in samples if row["iteration"] == iteration]
            counts, edges = np.histogram(values, bins=64)
            assert of_wandb[name][iteration]["values"] == counts.tolist()
            assert of_wandb[name][iteration]["bins"] == pytest.approx(edges.tolist())
            histogram = of_tensorboard[name][iteration]
            assert (histogram.num, histogram.min, histogram.max) == (BATCH, min(values), max(values))


@pytest.mark.parametrize(("name", "more"), [("plain", []), ("watched", ["gold"])])
def test_samples_are_shown_at_the_start_and_with_every_checkpoint(runs: Path, name: str, more: list[str]) -> None:
    samples = read_jsonl(str(runs / name / "samples.jsonl"))
    assert list(samples[0]) == ["iteration", "prompt", "response", "score", "kl", "length", *more]
    tables = read_wandb(runs / "trackers" / name).series["reply/samples"]
    texts = read_tensorboard(runs / "trackers" / name).texts["reply/samples"]
    assert list(tables) == list(texts) == [1, 2, 3]  # the SFT model, --save_freq 2, the end
    (files,) = (runs / "trackers" / name / "wandb").glob("offline-run-*/files")
    for iteration, table in tables.items():
        rows = [row for row in samples if row["iteration"] == iteration][:SAMPLES]
        shown = json.loads((files / table["path"]).read_text(encoding="utf-8"))
        assert shown["columns"] == list(rows[0])
        assert shown["data"] == [list(row.values()) for row in rows]
        assert len(texts[iteration].splitlines()) == 2 + len(rows)


@pytest.mark.parametrize("name", ["reward", "plain"])
def test_the_reward_card_is_shown(runs: Path, name: str) -> None:
    """By the stage that makes it and by the stage that uses it."""
    card = json.loads((runs / "reward/reward_card.json").read_text(encoding="utf-8"))
    series = read_wandb(runs / "trackers" / name).series
    (files,) = (runs / "trackers" / name / "wandb").glob("offline-run-*/files")
    (step, table), (picture,) = *series["card/probes"].items(), series["card/picture"].values()
    assert step == (2 if name == "reward" else 0)  # behind the last step, and in front of the first
    shown = json.loads((files / table["path"]).read_text(encoding="utf-8"))["data"]
    assert shown == [[kind, share, card["probe_counts"][kind]] for kind, share in card["probes"].items()]
    assert (files / picture["path"]).read_bytes() == (runs / "reward/reward_card.png").read_bytes()
    tracked = read_tensorboard(runs / "trackers" / name)
    (image,) = tracked.series["card/picture"].values()
    assert image.width == picture["width"]
    (text,) = tracked.texts["card/table"].values()
    assert f"accuracy | {card['accuracy']:.3f}" in text


def test_the_other_stages_keep_the_names_of_the_trainer(runs: Path) -> None:
    names = set(read_tensorboard(runs / "trackers/reward").series)
    wanted = {name for name in names_of("Stages 1 and 2") if name.startswith("eval/")} | {"train/loss"}
    assert wanted <= names


class Recorder(Grouped, TrainerCallback):
    """A tracker that keeps what it is sent."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        super().__init__(samples)
        self.sent: list[tuple] = []

    def send(self, *log: Any) -> None:
        self.sent.append(log)


def test_what_a_tracker_is_sent() -> None:
    """Replies once an iteration and not again with its evaluation; nothing from any process but the first."""
    samples = [{"score": float(number)} for number in range(SAMPLES + 1)]
    recorder, args = Recorder(samples), SimpleNamespace(save_steps=2)
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
    use_grouped_names(trainer, [])
    assert [type(callback) for callback in trainer.added] == [TensorBoardTracker]


def test_a_card_from_before_there_were_probes_is_not_shown(tmp_path: Path) -> None:
    """Stage 3 takes such a card, for its mean and standard deviation; a tracker ended the run on its missing probes."""
    (tmp_path / "reward_card.json").write_text('{"score_mean": 0.0, "score_std": 1.0}', encoding="utf-8")
    show_card(SimpleNamespace(_wandb=object()), str(tmp_path), 0)  # a tracker that takes nothing


def test_a_metric_that_nobody_knows_has_a_group_too() -> None:
    assert tracker_name("num_input_tokens_seen") == "other/num_input_tokens_seen"


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


def test_trackio_gets_the_same(runs: Path, data: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    """trackio reads TRACKIO_DIR when it is imported.  An earlier test that imported it once made this one read the rows of
    an older run, left in the user's own cache: tests/conftest.py sets the folder before anything is imported.
    """
    import trackio

    words = ["--model_name", runs / "base", "--prompt_template", TEMPLATE, "--dataset", data["preferences"]]
    words += ["--sft_model_lora_path", runs / "stages/sft", "--reward_model_lora_path", runs / "reward"]
    words += ["--allow_weak_reward", "true", "--guard", "off", "--output_max_length", "12", "--steps", "1"]
    words += ["--batch_size", BATCH, "--log_with", "trackio", "--run_name", "tests", "--output_dir", tmp_path / "ppo"]
    run_main(rl_training, words, monkeypatch)
    assert str(trackio.utils.TRACKIO_DIR) == os.environ["TRACKIO_DIR"]
    rows = trackio.SQLiteStorage.get_logs("huggingface", "tests")
    names = {name for row in rows for name in row} - {"step", "timestamp"}
    assert names == names_of(*PLAIN, "what only trackers show") - ONLY_TENSORBOARD
    (first,) = (row["objective/score_mean"] for row in rows if "objective/score_mean" in row)
    assert first == pytest.approx(read_jsonl(str(tmp_path / "ppo/metrics.jsonl"))[0]["score_mean"])
