"""The reward card: its arithmetic against hand calculation, its verdict, its table and its picture."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from reporting.plots import card_figure, draw_card
from rewards.reward_card import (
    CARD_FILE,
    accuracy,
    accuracy_by_length,
    against_length,
    calibration_error,
    card_table,
    fit_temperature,
    in_short,
    judge_probes,
    length_correlation,
    length_only_accuracy,
    make_card,
    pair_measures,
    probe,
    read_card,
    verdict,
)
from rewards.scores import read_statistics
from utils.console import InputError
from utils.files import write_json

NO_PROBES = {"probes": {}, "probes_ci95": {}, "probe_counts": {}}
CARD = {
    "accuracy": 0.8,
    "accuracy_ci95": [0.7, 0.9],
    "length_only_accuracy": 0.5,
    "loss": 0.5,
    "score_std": 1.0,
    **NO_PROBES,
}
TRAINED = "after 20 optimizer steps at learning rate 1e-05, rank 8"


def judged(card: dict, exempt: tuple[str, ...] = ()) -> dict:
    return verdict(card, exempt, TRAINED)


def with_probes(card: dict, **won: tuple[int, int]) -> dict:
    """The card with probes that were won on so many of so many prompts.

    Each end of an interval solves (share - end)^2 = z^2 / count * end * (1 - end).
    """
    intervals = {}
    for kind, (wins, count) in won.items():
        z = 1.959964**2 / count
        ends = np.roots([1 + z, -(2 * wins / count + z), (wins / count) ** 2])
        intervals[kind] = sorted(float(end) for end in np.real(ends))
    counts = {kind: count for kind, (_, count) in won.items()}
    shares = {kind: wins / count for kind, (wins, count) in won.items()}
    return {**card, "probes": shares, "probes_ci95": intervals, "probe_counts": counts}


def test_accuracy_counts_a_tie_as_half() -> None:
    assert accuracy(np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [3.0, 0.0]])) == 2.5 / 4


def test_calibration_error_by_hand() -> None:
    """Ten pairs with margin log 4: probability 0.8 of being right.  Eight are right: error 0.  Five are: error 0.3."""
    margin = np.log(4.0)
    assert calibration_error(np.array([margin] * 8 + [-margin] * 2)) == pytest.approx(0.0, abs=1e-9)
    assert calibration_error(np.array([margin] * 5 + [-margin] * 5)) == pytest.approx(0.3)


def test_calibration_error_weighs_the_bins() -> None:
    """Four pairs at 0.8 of which two are right (gap 0.3), one sure one that is right (confidence 1, gap 0)."""
    margin = np.log(4.0)
    assert calibration_error(np.array([margin, margin, -margin, -margin, 50.0])) == pytest.approx(0.3 * 4 / 5)


def test_temperature_against_a_grid() -> None:
    generator = np.random.default_rng(0)
    margins = generator.normal(1.0, 2.0, 400)
    grid = np.geomspace(0.05, 20, 4000)
    losses = [np.log1p(np.exp(-margins / t)).mean() for t in grid]
    assert fit_temperature(margins) == pytest.approx(grid[int(np.argmin(losses))], rel=5e-3)


def test_temperature_scales_with_the_scores() -> None:
    """A model that is three times as sure of itself needs three times the temperature."""
    margins = np.random.default_rng(1).normal(0.5, 1.0, 300)
    assert fit_temperature(3 * margins) == pytest.approx(3 * fit_temperature(margins), rel=1e-6)


def test_temperature_has_bounds() -> None:
    assert fit_temperature(np.array([1.0, 2.0])) == pytest.approx(0.01, rel=1e-6)  # never wrong: as sure as it may be
    assert fit_temperature(np.array([-1.0, -2.0])) == pytest.approx(100.0, rel=1e-6)


def test_length_only_accuracy_learns_the_side_from_training() -> None:
    train = np.array([[5, 9], [5, 9], [9, 5]])  # the shorter one wins
    held_out = np.array([[3, 4], [4, 3], [2, 8], [5, 5]])
    assert length_only_accuracy(train, held_out) == (1 + 0 + 1 + 0.5) / 4
    assert length_only_accuracy(train[:, ::-1], held_out) == (0 + 1 + 0 + 0.5) / 4


def test_length_correlation_against_torch() -> None:
    generator = np.random.default_rng(0)
    scores, lengths = generator.normal(size=(20, 2)), generator.integers(1, 50, (20, 2))
    expected = torch.corrcoef(torch.tensor(np.stack([scores.ravel(), lengths.ravel()])))[0, 1]
    assert length_correlation(scores, lengths) == pytest.approx(float(expected))
    assert length_correlation(scores, np.full((20, 2), 7)) == 0.0


SCORES = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 0.0]])
LENGTHS = np.array([[10, 10], [5, 20], [20, 10], [19, 20]])  # matched; shorter, short; longer; matched and shorter


def test_pair_measures_by_hand() -> None:
    measures = pair_measures(SCORES, LENGTHS)
    assert measures["accuracy"] == 0.75
    for end in (
        measures["accuracy_low"],
        measures["accuracy_high"],
    ):  # a share that is just 1.96 deviations from 3 of 4
        assert abs(0.75 - end) == pytest.approx(1.959964 * (end * (1 - end) / 4) ** 0.5)
    assert measures["accuracy_low"] < 0.75 < measures["accuracy_high"]
    assert measures["margin"] == (1 - 1 + 2 + 3) / 4
    assert measures["score_mean"] == pytest.approx(7 / 8)
    assert measures["score_std"] == pytest.approx((15 / 8 - (7 / 8) ** 2) ** 0.5)  # of 1 0 0 1 2 0 3 0


def test_accuracy_by_length_by_hand() -> None:
    measures = accuracy_by_length(SCORES, LENGTHS)
    assert (measures["length_matched_accuracy"], measures["length_matched_pairs"]) == (1.0, 2)
    assert (measures["shorter_chosen_accuracy"], measures["shorter_chosen_pairs"]) == (0.5, 2)
    assert (measures["longer_chosen_accuracy"], measures["longer_chosen_pairs"]) == (1.0, 1)
    assert (measures["short_good_accuracy"], measures["short_good_pairs"]) == (0.0, 1)


def test_pairs_against_the_rule_of_length_by_hand() -> None:
    longer, shorter = np.array([[9, 5], [9, 5], [5, 9]]), np.array([[5, 9]])  # which side wins most training pairs
    # of the pairs 10 10 and 5 20 and 19 20 the first and last are right
    measures = against_length(SCORES, LENGTHS, longer)
    assert (measures["length_rule"], measures["against_length_pairs"]) == ("longer", 3)
    assert measures["against_length_accuracy"] == pytest.approx(2 / 3)
    for end in measures["against_length_ci95"]:
        assert abs(2 / 3 - end) == pytest.approx(1.959964 * (end * (1 - end) / 3) ** 0.5)
    measures = against_length(SCORES, LENGTHS, shorter)  # 10 10 and 20 10
    assert (measures["length_rule"], measures["against_length_pairs"]) == ("shorter", 2)
    assert measures["against_length_accuracy"] == 1.0


def test_measures_of_sorts_that_are_not_there() -> None:
    measures = accuracy_by_length(np.array([[1.0, 0.0]]), np.array([[9, 3]]))
    assert measures["shorter_chosen_accuracy"] is None
    assert measures["shorter_chosen_pairs"] == 0
    measures = against_length(np.array([[1.0, 0.0]]), np.array([[9, 3]]), np.array([[9, 3]]))
    assert (measures["against_length_accuracy"], measures["against_length_ci95"]) == (None, None)
    assert measures["against_length_pairs"] == 0


def test_probes_by_hand() -> None:
    """The score is the sum of the ids.  Good ones score 10 and 4: 10 beats blank 7, 4 does not; both beat the empty one."""
    asked = []

    def score(sequences: list[list[int]], description: str) -> np.ndarray:
        asked.append((description, sequences))
        return np.array([float(sum(ids)) for ids in sequences])

    pairs = [
        {"kind": kind, "chosen_ids": chosen, "rejected_ids": rejected}
        for kind, rejected in (("blank", [7]), ("empty", [1]))
        for chosen in ([4, 6], [1, 3])
    ]
    card, scores = probe(score, pairs, [[2], [6], [20]])
    assert card["probes"] == {"empty": 1.0, "blank": 0.5}
    assert card["probe_counts"] == {"empty": 2, "blank": 2}
    # z^2 = 3.8415; of 2 of 2 the lower end is 2 / (2 + z^2); of 1 of 2 the ends are 0.5 -+ 0.5 * sqrt(z^2 / (2 + z^2))
    assert card["probes_ci95"]["empty"] == pytest.approx([0.34237, 1.0], abs=1e-4)
    assert card["probes_ci95"]["blank"] == pytest.approx([0.09453, 0.90547], abs=1e-4)
    assert card["probes_above_sft"] == {"empty": 0.0, "blank": 1.0}  # 7 is above the median, 6
    assert (card["sft_score_mean"], card["sft_replies"]) == (pytest.approx(28 / 3), 3)
    assert {name: values.tolist() for name, values in scores.items()} == {
        "blank": [7.0, 7.0],
        "empty": [1.0, 1.0],
        "good": [10.0, 4.0, 10.0, 4.0],
        "SFT": [2.0, 6.0, 20.0],
    }
    assert asked[0] == ("good replies", [[4, 6], [1, 3]])  # each good one once
    assert "sft_score_mean" not in probe(score, pairs, [])[0]


# ---- Verdict ----


def test_a_probe_whose_interval_is_below_the_threshold_fails_and_is_named() -> None:
    """90 of 100: (0.9 - 0.95)^2 is above z^2 / 100 * 0.95 * 0.05 = 0.0018, so the interval does not reach 0.95."""
    result = judged(with_probes(CARD, empty=(100, 100), cut_50=(90, 100)))
    assert result["passed"] is False
    assert result["failed"] == ["probe cut_50 0.900 of 100 prompts (95% interval 0.826 to 0.945, wanted 0.95)"]
    assert result["not_shown"] == []


def test_a_probe_of_few_prompts_is_not_shown_and_fails_nothing() -> None:
    """A newcomer's card failed on 21 of 23 prompts; a model that wins 0.96 of all gets no more in a fourth of the tries.

    With this share, 0.037 below 0.95, it takes 3.8415 * 0.95 * 0.05 / 0.036957^2 = 133.6 prompts to tell.
    """
    result = judged(with_probes(CARD, cut_50=(21, 23), echo=(20, 23)))
    assert (result["passed"], result["failed"]) == (True, [])
    assert result["not_shown"] == [
        "probe cut_50 0.913 of 23 prompts (95% interval 0.732 to 0.976, wanted 0.95); with this share it takes 134 prompts "
        "to tell",
        # 3.8415 * 0.0475 / 0.080435^2 = 28.2
        "probe echo 0.870 of 23 prompts (95% interval 0.679 to 0.955, wanted 0.95); with this share it takes 29 prompts "
        "to tell",
    ]
    assert len(judged(with_probes(CARD, cut_50=(19, 23)))["failed"]) == 1  # upper end 0.930


def test_a_share_that_reaches_the_threshold_passes_however_wide_its_interval() -> None:
    """23 of 23 have a lower end of 0.857, and nobody could do better on 23 prompts."""
    result = judged(with_probes(CARD, empty=(23, 23), blank=(1, 1), tiny=(19, 20)))
    assert (result["passed"], result["failed"], result["not_shown"]) == (True, [], [])


def test_one_function_judges_and_an_old_card_is_judged_by_its_shares() -> None:
    card = with_probes({**CARD, "threshold": 0.95, "exempt": ["echo"]}, empty=(23, 23), cut_50=(21, 23), echo=(0, 23))
    card["probes"]["tiny"], card["probes_ci95"]["tiny"] = 0.5, [0.3, 0.7]
    assert judge_probes(card) == {"empty": "passed", "cut_50": "not shown", "echo": "exempt", "tiny": "failed"}
    del card["probes_ci95"]
    assert judge_probes(card) == {"empty": "passed", "cut_50": "failed", "echo": "exempt", "tiny": "failed"}


def test_many_failures_are_told_in_short() -> None:
    assert in_short(["a", "b"]) == "a; b"
    assert in_short(["a", "b", "c", "d", "e"]) == "a; b; c; and 2 more"


def test_an_exempt_probe_does_not_decide() -> None:
    result = judged(with_probes(CARD, empty=(100, 100), cut_50=(90, 100), echo=(21, 23)), exempt=("cut_50", "echo"))
    assert (result["passed"], result["exempt"], result["not_shown"]) == (True, ["cut_50", "echo"], [])


def test_accuracy_that_may_be_chance_fails() -> None:
    result = judged({**CARD, "accuracy": 0.56, "accuracy_ci95": [0.49, 0.63]})
    assert result["failed"] == ["accuracy 0.560 on held-out pairs (95% interval 0.490 to 0.630) may be chance"]


def test_accuracy_above_chance_by_a_hair_fails() -> None:
    """On many pairs 0.53 was surely no chance and passed, though nobody has seen PPO gain with so little."""
    result = judged({**CARD, "accuracy": 0.53, "accuracy_ci95": [0.515, 0.545]})
    assert result["failed"] == ["accuracy 0.530 on held-out pairs (wanted 0.55)"]
    assert judged({**CARD, "accuracy": 0.55, "accuracy_ci95": [0.535, 0.565]})["passed"] is True


# ---- Length ----


def card_of_pairs(lengths: list[tuple[int, int]], margins: list[float]) -> dict:
    """The card, without probes, of a model with these margins on held-out pairs, of which the training pairs are a copy."""
    lengths = np.array(lengths)
    scores = np.stack([margins, np.zeros(len(margins))], axis=1)
    evaluation = {f"eval_{name}": value for name, value in pair_measures(scores, lengths).items()}
    return make_card(evaluation | {"eval_loss": 0.3}, scores, lengths, lengths, NO_PROBES, (), TRAINED)


@pytest.mark.parametrize(("rule", "other", "pair"), [("longer", "shorter", (30, 9)), ("shorter", "longer", (9, 30))])
def test_pairs_that_cannot_tell_quality_from_length_fail_with_a_remedy(rule: str, other: str, pair: tuple) -> None:
    """Accuracy 1.000 where counting tokens alone gave 1.000, and no better reply was the other one: the card just passed."""
    card = card_of_pairs([pair] * 24, [1.0] * 24)
    assert card["passed"] is False
    assert card["failed"] == [
        "the pairs cannot tell quality from length: counting tokens alone gets 1.000 of the held-out pairs, the model "
        f"1.000, and in none of the 24 is the better reply not the {rule} one; add pairs whose better reply is the {other} "
        "one, to a tenth of all or more, in training and held out"
    ]


def test_few_pairs_against_length_do_not_tell_either() -> None:
    """3 of 3 has a lower end of 3 / (3 + 3.8415) = 0.439."""
    (reason,) = card_of_pairs([(30, 9)] * 97 + [(9, 30)] * 3, [1.0] * 100)["failed"]
    assert reason.startswith(
        "the pairs cannot tell quality from length: counting tokens alone gets 0.970 of the held-out pairs, the model "
        "1.000, and 1.000 (95% interval 0.439 to 1.000) of the 3 whose better reply is not the longer one; add pairs"
    )


def test_a_model_that_judges_by_length_is_told_so() -> None:
    """92 of 100 are as the rule says; of the 8 others it orders none: the upper end is 3.84 / 11.84 = 0.324."""
    (reason,) = card_of_pairs([(30, 9)] * 92 + [(9, 30)] * 8, [1.0] * 92 + [-1.0] * 8)["failed"]
    assert reason.startswith(
        "the model judges by length: counting tokens alone gets 0.920 of the held-out pairs, the model 0.920, and 0.000 "
        "(95% interval 0.000 to 0.324) of the 8 whose better reply is not the longer one; add pairs"
    )


def test_enough_pairs_against_length_show_that_a_model_does_more() -> None:
    """Of 10 against the rule 9 are right: the lower end of 9 of 10 is 0.596.  Replies of equal length are such pairs too."""
    lengths = [(30, 9)] * 90 + [(9, 30)] * 6 + [(20, 20)] * 4
    card = card_of_pairs(lengths, [1.0] * 80 + [-1.0] * 11 + [1.0] * 9)
    assert (card["accuracy"], card["length_only_accuracy"]) == (0.89, 0.92)
    assert (card["against_length_accuracy"], card["against_length_pairs"]) == (0.9, 10)
    assert card["against_length_ci95"] == pytest.approx([0.5958, 0.9821], abs=1e-4)
    assert card["passed"] is True


def test_honest_pairs_whose_better_reply_is_mostly_longer_pass() -> None:
    """The longer one is better in 70%, and the model is no better than counting tokens: nothing says that it counts."""
    card = card_of_pairs([(30, 9)] * 70 + [(9, 30)] * 30, [1.0] * 50 + [-1.0] * 20 + [1.0] * 20 + [-1.0] * 10)
    assert (card["accuracy"], card["length_only_accuracy"], card["passed"]) == (0.7, 0.7, True)


def test_a_model_that_is_surely_better_than_counting_tokens_passes() -> None:
    """960 of 1000 have a lower end of 0.946, counting tokens gets 0.920; of the 80 others, where it gets none, half."""
    card = card_of_pairs([(30, 9)] * 920 + [(9, 30)] * 80, [1.0] * 960 + [-1.0] * 40)
    assert (card["against_length_accuracy"], card["passed"]) == (0.5, True)


# ---- A model that hardly learned ----

UNLEARNT = {**CARD, "loss": 0.692, "score_std": 0.0049}
THIRTEEN = dict.fromkeys([f"kind{number}" for number in range(13)], (5, 55))


def test_a_model_that_hardly_learned_is_told_why_before_its_probes() -> None:
    """A stranger saw 13 failed probes, and not that the learning rate had been far too low for 20 steps."""
    card = with_probes({**UNLEARNT, "accuracy_ci95": [0.45, 0.9]}, **THIRTEEN, empty=(55, 55))
    assert judged(card)["failed"] == [
        "the model has hardly learned after 20 optimizer steps at learning rate 1e-05, rank 8: its loss on held-out "
        "pairs is 0.692, equal scores give 0.693, and its scores have a standard deviation of 0.005; most likely the "
        "learning rate is too low or the steps are too few: raise --learning_rate, --num_train_epochs or --max_steps, and "
        "then --lora_r",
        "accuracy 0.800 on held-out pairs (95% interval 0.450 to 0.900) may be chance",
        "13 of 14 probes failed",
    ]


@pytest.mark.parametrize("learnt", [{"loss": 0.66}, {"score_std": 0.11}])
def test_the_probes_of_a_model_that_learned_are_named_one_by_one(learnt: dict) -> None:
    """Noisy pairs keep the loss near 0.69 however much was learned, but then the scores differ."""
    failed = judged(with_probes({**UNLEARNT, **learnt}, **THIRTEEN))["failed"]
    assert [reason.split(" (")[0] for reason in failed] == [f"probe {kind} 0.091 of 55 prompts" for kind in THIRTEEN]


def test_small_scores_alone_fail_nothing() -> None:
    """What they order well they order well: stage 3 divides them by their standard deviation."""
    assert judged(with_probes(UNLEARNT, empty=(55, 55)))["failed"] == []


# ---- Stage 3 ----


def test_stage_3_goes_on_and_says_what_was_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    card = {"score_mean": 0.5, "score_std": 2.0, **judged(with_probes(CARD, cut_50=(21, 23)))}
    write_json(card, str(tmp_path), CARD_FILE)
    assert read_statistics(SimpleNamespace(path=str(tmp_path)), allow_weak=False) == (0.5, 2.0)
    assert "note: the reward card had too few prompts to tell: probe cut_50 0.913 of 23" in capsys.readouterr().err


# ---- Files ----


def whole_card() -> dict:
    generator = np.random.default_rng(0)
    scores, lengths = generator.normal(size=(12, 2)), generator.integers(1, 30, (12, 2))
    evaluation = {f"eval_{name}": value for name, value in pair_measures(scores, lengths).items()}
    evaluation |= {"eval_accuracy": 0.8, "eval_accuracy_low": 0.7, "eval_accuracy_high": 0.9, "eval_loss": 0.5}
    probed = with_probes({}, empty=(10, 10), cut_50=(9, 10), off_topic=(5, 10), stock=(4, 10))
    return make_card(evaluation, scores, lengths, lengths, probed, ("off_topic",), TRAINED)


def test_a_card_takes_from_the_evaluation_what_that_has_measured() -> None:
    card = whole_card()
    assert (card["accuracy"], card["accuracy_ci95"], card["loss"]) == (0.8, [0.7, 0.9], 0.5)
    assert card["passed"] is False
    assert [reason.split(" (")[0] for reason in card["failed"]] == ["probe stock 0.400 of 10 prompts"]
    assert [reason.split(" (")[0] for reason in card["not_shown"]] == ["probe cut_50 0.900 of 10 prompts"]


def test_the_table_shows_what_failed() -> None:
    card = whole_card()
    lines = card_table(card).splitlines()
    assert f"| of pairs against that | {card['against_length_accuracy']:.3f} | 95% interval" in "\n".join(lines)
    # of 10 of 10: 10 / (10 + 3.8415); of 5 of 10: 0.5 -+ 0.5 * sqrt(3.8415 / 13.8415)
    assert "| empty | 1.000 | 0.722 to 1.000 | 10 | - |" in lines
    assert "| off_topic | 0.500 exempt | 0.237 to 0.763 | 10 | - |" in lines
    assert "| cut_50 | 0.900 not shown | 0.596 to 0.982 | 10 | - |" in lines
    assert "| stock | 0.400 **failed** | 0.168 to 0.687 | 10 | - |" in lines


def test_the_card_of_an_older_version_is_shown_by_its_shares() -> None:
    card = whole_card()
    for name in ("probes_ci95", "not_shown", "against_length_accuracy", "against_length_ci95", "against_length_pairs"):
        del card[name]
    assert "| cut_50 | 0.900 **failed** | - | 10 | - |" in card_table(card).splitlines()


def test_the_picture_shows_verdicts_prompts_and_intervals() -> None:
    """off_topic was red at 0.44 in the picture of a card that had passed."""
    left, _ = card_figure(whole_card(), {"good": np.ones(5)}).axes
    names, bars = left.get_yticklabels(), left.patches
    bars = {name.get_text(): to_hex(bar.get_facecolor()) for name, bar in zip(names, bars, strict=True)}
    assert bars == {
        "stock (failed, 10 prompts)": "#d55e00",
        "off_topic (exempt, 10 prompts)": "#8c8c8c",
        "cut_50 (not shown, 10 prompts)": "#e69f00",
        "empty (10 prompts)": "#0072b2",
    }
    (lines,) = left.collections
    found = [sorted(segment[:, 0].tolist()) for segment in lines.get_segments()]
    wanted = [[0.1682, 0.6873], [0.2366, 0.7634], [0.5958, 0.9821], [0.7225, 1.0]]  # from the bottom upwards
    assert np.array(found) == pytest.approx(np.array(wanted), abs=1e-4)


def test_written_and_read(tmp_path: Path) -> None:
    card = whole_card()
    write_json(card, str(tmp_path), CARD_FILE)
    draw_card(card, {"good": np.ones(5), "empty": np.zeros(5)}, str(tmp_path))
    assert read_card(str(tmp_path)) == json.loads(json.dumps(card))
    with Image.open(tmp_path / "reward_card.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    assert read_card(str(tmp_path / "elsewhere")) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a list, not an object"),
        ('{"score_mean": 1}', "is no reward card"),
        ('{"score_mean": 1, "score_std": "x"}', "is no reward card"),
        ('{"score_mean": 1, "score_std": 1, "not_shown": [1]}', "is no reward card"),
    ],
)
def test_a_file_that_is_no_card(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "reward_card.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_card(str(tmp_path))


def test_a_model_that_cannot_tell_anything_apart_passes_no_probe() -> None:
    """A constant score is no win: taken for one, a model that learned nothing passes every probe."""
    pairs = [{"kind": kind, "chosen_ids": [4, 6], "rejected_ids": [1]} for kind in ("empty", "blank")]
    card, _ = probe(lambda sequences, description: np.zeros(len(sequences)), pairs, [])
    assert card["probes"] == {"empty": 0.0, "blank": 0.0}
