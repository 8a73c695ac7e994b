"""The reward card: what a reward model can and cannot tell apart, measured on held-out prompts.

reward_modeling.py writes it, rl_training.py reads it and refuses a model that failed.  Arithmetic on numpy arrays; N pairs,
scores float [N, 2] and response lengths int [N, 2] in tokens, chosen first.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rewards.broken_replies import KINDS
from utils.console import InputError
from utils.files import read_json_object

CARD_FILE = "reward_card.json"
# Share of the held-out pairs; the least with which PPO still gained in docs/reference_runs/label_noise.md.
MIN_ACCURACY = 0.55
PROBE_THRESHOLD = 0.95  # share of the prompts where the good response has to beat the broken one, for each kind
LENGTH_TELLS = 0.9  # from this accuracy of counting tokens alone, a model has to show on other pairs that it does more
# A model hardly learned whose held-out loss is so near to log 2 = 0.693, that of equal scores, with scores so equal.
UNLEARNT_LOSS, UNLEARNT_STD = 0.68, 0.1
SAME_LENGTH = 0.1  # two responses are equally long when they differ by at most this share of the longer one
SHORT_SHARE = 0.2  # the chosen responses up to this quantile of their lengths are the short good ones
BINS = 10  # of the calibration error
Z_95 = 1.959964  # a normal variable is within this many standard deviations of its mean with probability 0.95


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share seen in `count` independent trials (Wilson 1927); stays inside [0, 1]."""
    z = Z_95
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy(scores: np.ndarray) -> float:
    """Share of pairs whose chosen response scores higher; a tie counts as half.  scores: [N, 2]."""
    margin = scores[:, 0] - scores[:, 1]
    return float((margin > 0).mean() + 0.5 * (margin == 0).mean())


def length_correlation(scores: np.ndarray, lengths: np.ndarray) -> float:
    """Pearson's correlation of score and response length over all responses; 0 where either does not vary."""
    varies = scores.std() > 0 and lengths.std() > 0
    return float(np.corrcoef(scores.ravel(), lengths.ravel())[0, 1]) if varies else 0.0


def calibration_error(margins: np.ndarray) -> float:
    """Expected calibration error of sigmoid(|margin|) as the probability of having ordered a pair correctly, in [0, 0.5].

    margins: chosen minus rejected score, float [N].  `BINS` bins of equal width over [0.5, 1] (Guo et al. 2017, eq. 5).
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    correct = (margins > 0) + 0.5 * (margins == 0)
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(confidence[bins == b].mean() - correct[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    return float(sum(gaps))


def fit_temperature(margins: np.ndarray) -> float:
    """The T that makes sigmoid(margin / T) fit best: minimises mean(-log sigmoid(margin / T)) over [0.01, 100].

    margins: chosen minus rejected score, float [N].  The loss is convex in 1 / T (Guo et al. 2017, section 4.2), so its
    derivative is bisected.  Above 1: the model is too sure of itself.
    """
    margins = margins.astype(np.float64)
    low, high = 0.01, 100.0  # of 1 / T
    for _ in range(60):
        middle = (low * high) ** 0.5
        falling = (margins / (1 + np.exp(np.clip(middle * margins, -700, 700)))).mean() > 0
        low, high = (middle, high) if falling else (low, middle)
    return 1 / low


def longer_wins(train_lengths: np.ndarray) -> bool:
    """The rule of counting tokens alone: whether the longer response wins at least half of the training pairs, [M, 2]."""
    difference = train_lengths[:, 0] - train_lengths[:, 1]
    return bool((difference > 0).sum() >= (difference < 0).sum())


def length_only_accuracy(train_lengths: np.ndarray, lengths: np.ndarray) -> float:
    """Accuracy of only counting tokens: the side (shorter or longer) that wins most training pairs always wins."""
    return accuracy(lengths if longer_wins(train_lengths) else -lengths)


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a card, and the card
# ---------------------------------------------------------------------------------------------------------------------


def pair_measures(scores: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """What every evaluation during training says about the held-out pairs; accuracy_low and _high: its 95% interval."""
    share = accuracy(scores)
    low, high = wilson_interval(share, len(scores))
    return {
        "accuracy": share,
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": float((scores[:, 0] - scores[:, 1]).mean()),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "length_correlation": length_correlation(scores, lengths),
    }


def accuracy_by_length(scores: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """Accuracy and number of the pairs of each sort: does the model judge more than length?  None where there are none."""
    difference = lengths[:, 0] - lengths[:, 1]
    short = lengths[:, 0] <= np.quantile(lengths[:, 0], SHORT_SHARE)
    sorts = {
        "length_matched": np.abs(difference) <= SAME_LENGTH * lengths.max(1),
        "shorter_chosen": difference < 0,
        "longer_chosen": difference > 0,
        "short_good": short & (difference < 0),
    }
    return {
        **{f"{name}_accuracy": accuracy(scores[rows]) if rows.any() else None for name, rows in sorts.items()},
        **{f"{name}_pairs": int(rows.sum()) for name, rows in sorts.items()},
    }


def against_length(scores: np.ndarray, lengths: np.ndarray, train_lengths: np.ndarray) -> dict[str, Any]:
    """Accuracy, 95% interval and number of the pairs that the rule of `longer_wins` does not get right, and that rule.

    Counting tokens alone gets at most half of them, those of equal length.  None where there are no such pairs.
    """
    longer = longer_wins(train_lengths)
    difference = lengths[:, 0] - lengths[:, 1]
    rows = difference <= 0 if longer else difference >= 0
    share, count = (accuracy(scores[rows]), int(rows.sum())) if rows.any() else (None, 0)
    return {
        "length_rule": "longer" if longer else "shorter",
        "against_length_accuracy": share,
        "against_length_ci95": None if share is None else list(wilson_interval(share, count)),
        "against_length_pairs": count,
    }


def probe(
    score: Callable[[list[list[int]], str], np.ndarray],
    pairs: Sequence[dict[str, Any]],
    sft_sequences: list[list[int]],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The card's part about broken and SFT responses, and the scores of each sort of response, for the picture.

    score: (token sequences, description for a progress bar) -> scores [N]; pairs: from `broken_pairs`; sft_sequences:
    prompt + response of the SFT model, may be empty.
    """
    kinds = np.array([pair["kind"] for pair in pairs])
    unique = {tuple(pair["chosen_ids"]): None for pair in pairs}
    score_of = dict(zip(unique, score([list(ids) for ids in unique], "good replies"), strict=True))
    good = np.array([score_of[tuple(pair["chosen_ids"])] for pair in pairs])
    broken = score([pair["rejected_ids"] for pair in pairs], "broken replies")
    found = [kind for kind in KINDS if (kinds == kind).any()]
    shares = {kind: float((good > broken)[kinds == kind].mean()) for kind in found}
    counts = {kind: int((kinds == kind).sum()) for kind in found}
    card: dict[str, Any] = {
        "probes": shares,
        "probes_ci95": {kind: list(wilson_interval(shares[kind], counts[kind])) for kind in found},
        "probe_counts": counts,
    }
    scores = {kind: broken[kinds == kind] for kind in found}
    scores["good"] = good
    if sft_sequences:
        sft = score(sft_sequences, "SFT replies")
        card |= {"sft_score_mean": float(sft.mean()), "sft_score_std": float(sft.std()), "sft_replies": len(sft)}
        card["probes_above_sft"] = {kind: float((scores[kind] > np.median(sft)).mean()) for kind in found}
        scores["SFT"] = sft
    return card, scores


def make_card(
    evaluation: dict[str, float],
    scores: np.ndarray,
    lengths: np.ndarray,
    train_lengths: np.ndarray,
    probed: dict[str, Any],
    exempt: Sequence[str],
    trained: str,
) -> dict[str, Any]:
    """The card, with its verdict.

    evaluation: the Trainer's metrics of the held-out pairs, eval_loss and those of `pair_measures`; scores, lengths: of the
    same pairs; train_lengths: of the training pairs, int [M, 2]; probed: from `probe`, and whatever else is to be in the
    card; exempt: kinds of broken responses that do not decide; trained: steps, learning rate and rank in words, for the
    reason of a model that hardly learned; empty for one that others have trained.
    """
    margins = scores[:, 0] - scores[:, 1]
    card = {
        "accuracy": evaluation["eval_accuracy"],
        "accuracy_ci95": [evaluation["eval_accuracy_low"], evaluation["eval_accuracy_high"]],
        "eval_pairs": len(scores),
        "length_only_accuracy": length_only_accuracy(train_lengths, lengths),
        **against_length(scores, lengths, train_lengths),
        **accuracy_by_length(scores, lengths),
        "calibration_error": calibration_error(margins),
        "temperature": fit_temperature(margins),
        **{name: evaluation[f"eval_{name}"] for name in ("score_mean", "score_std", "length_correlation", "loss")},
        **probed,
    }
    return card | verdict(card, exempt, trained)


def judge_probes(card: Mapping[str, Any]) -> dict[str, str]:
    """Each kind of broken response -> passed, failed, not shown or exempt.

    A probe passes when its share reaches the threshold.  It has failed when the whole 95% interval of the share is under the
    threshold; where the interval still holds it, there are too few prompts to say, and it is not shown.  The card of an
    older version has no intervals: there the share decides.
    """
    threshold, intervals = card.get("threshold", PROBE_THRESHOLD), card.get("probes_ci95", {})
    found = {}
    for kind, share in card["probes"].items():
        _, high = intervals.get(kind, (share, share))
        below = "failed" if high < threshold else "not shown"
        found[kind] = "exempt" if kind in card.get("exempt", ()) else "passed" if share >= threshold else below
    return found


def prompts_to_tell(share: float, threshold: float) -> int:
    """The least number of prompts whose interval around `share` does not hold the threshold; share != threshold."""
    # Wilson's interval holds what is within z * sqrt(threshold * (1 - threshold) / count) of the share
    return math.floor(Z_95**2 * threshold * (1 - threshold) / (threshold - share) ** 2) + 1


def probe_in_words(card: Mapping[str, Any], kind: str) -> str:
    """A probe with its number of prompts and its interval, for the reasons of a card."""
    share, count, (low, high) = card["probes"][kind], card["probe_counts"][kind], card["probes_ci95"][kind]
    return (
        f"probe {kind} {share:.3f} of {count} prompts (95% interval {low:.3f} to {high:.3f}, wanted {PROBE_THRESHOLD})"
    )


def confounded(card: Mapping[str, Any]) -> str:
    """What is wrong, in words, where the model may do no more than count tokens; empty where it does more.

    Where counting tokens alone gets `LENGTH_TELLS` of the pairs, and the model is not surely better, the pairs that this
    rule does not get right decide: of those it has to order more than half, with the whole interval.
    """
    if card["length_only_accuracy"] < max(LENGTH_TELLS, card["accuracy_ci95"][0]):
        return ""
    share, count = card["against_length_accuracy"], card["against_length_pairs"]
    low, high = card["against_length_ci95"] or (0.0, 1.0)
    if low > 0.5:
        return ""
    rule = card["length_rule"]
    other = "shorter" if rule == "longer" else "longer"
    what = "the model judges by length" if high < 0.5 else "the pairs cannot tell quality from length"
    reason = f"counting tokens alone gets {card['length_only_accuracy']:.3f} of the held-out pairs, the model "
    reason += f"{card['accuracy']:.3f}, and "
    if share is None:
        reason += f"in none of the {card['eval_pairs']} is the better reply not the {rule} one"
    else:
        interval = f"(95% interval {low:.3f} to {high:.3f})"
        reason += f"{share:.3f} {interval} of the {count} whose better reply is not the {rule} one"
    remedy = f"add pairs whose better reply is the {other} one, to a tenth of all or more, in training and held out"
    return f"{what}: {reason}; {remedy}"


def hardly_learned(card: Mapping[str, Any]) -> bool:
    """Whether the training left the scores of all responses about equal."""
    return card["loss"] > UNLEARNT_LOSS and card["score_std"] < UNLEARNT_STD


def verdict(card: dict[str, Any], exempt: Sequence[str], trained: str) -> dict[str, Any]:
    """`passed`, `threshold`, `exempt`, and in words `failed` and `not_shown`.

    A model passes when its accuracy is at least MIN_ACCURACY with the whole interval above chance, it is not `confounded`
    with length, and no probe that is not exempt has failed.  What is not shown for lack of prompts is told and fails
    nothing.  Where a model that failed has hardly learned, that is the first reason, and its probes are one.
    """
    judged = judge_probes({**card, "threshold": PROBE_THRESHOLD, "exempt": exempt})
    failed, failed_probes, not_shown = [], [], []
    low, high = card["accuracy_ci95"]
    if low <= 0.5:
        interval = f"(95% interval {low:.3f} to {high:.3f})"
        failed.append(f"accuracy {card['accuracy']:.3f} on held-out pairs {interval} may be chance")
    elif card["accuracy"] < MIN_ACCURACY:
        failed.append(f"accuracy {card['accuracy']:.3f} on held-out pairs (wanted {MIN_ACCURACY})")
    elif reason := confounded(card):
        failed.append(reason)
    for kind, found in judged.items():
        words = probe_in_words(card, kind) if found in ("failed", "not shown") else ""
        if found == "failed":
            failed_probes.append(words)
        elif found == "not shown":
            needed = prompts_to_tell(card["probes"][kind], PROBE_THRESHOLD)
            not_shown.append(f"{words}; with this share it takes {needed} prompts to tell")
    if trained and hardly_learned(card) and (failed or failed_probes):
        found = f"its loss on held-out pairs is {card['loss']:.3f}, equal scores give 0.693, and its scores have a standard "
        found += f"deviation of {card['score_std']:.3f}"
        remedy = "most likely the learning rate is too low or the steps are too few: raise --learning_rate, "
        remedy += "--num_train_epochs or --max_steps, and then --lora_r"
        failed.insert(0, f"the model has hardly learned {trained}: {found}; {remedy}")
        if failed_probes:
            failed_probes = [f"{len(failed_probes)} of {len(judged)} probes failed"]
    failed += failed_probes
    return {
        "passed": not failed,
        "threshold": PROBE_THRESHOLD,
        "exempt": list(exempt),
        "failed": failed,
        "not_shown": not_shown,
    }


def in_short(reasons: list[str], shown: int = 3) -> str:
    """The reasons of a verdict as one line: the first few, and how many more there are."""
    more = len(reasons) - shown
    return "; ".join(reasons[:shown]) + (f"; and {more} more" if more > 0 else "")


def read_card(folder: str) -> dict[str, Any] | None:
    """The card of a reward adapter, None where it has none.  Raises InputError when the file is no card."""
    path = os.path.join(folder, CARD_FILE)
    if not os.path.isfile(path):
        return None
    card = read_json_object(path)
    try:
        if not all(math.isfinite(card[name]) for name in ("score_mean", "score_std")) or card["score_std"] < 0:
            raise ValueError(f"score_mean {card['score_mean']}, score_std {card['score_std']}")
        for reasons in ("failed", "not_shown"):
            in_short(card.get(reasons, []))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no reward card ({error!r}); train the reward model again") from error
    return card


# ---------------------------------------------------------------------------------------------------------------------
# For people
# ---------------------------------------------------------------------------------------------------------------------


def card_table(card: dict[str, Any]) -> str:
    """The card as two Markdown tables."""
    return f"{pairs_table(card)}\n\n{probes_table(card)}"


def pairs_table(card: dict[str, Any]) -> str:
    """What the card says about pairs and SFT replies, as a Markdown table."""

    def row(name: str, value: float | None, note: str = "") -> str:
        return f"| {name} | {'-' if value is None else f'{value:.3f}'} | {note} |"

    low, high = card["accuracy_ci95"]
    against = ""  # in the card of an older version
    if card.get("against_length_pairs") is not None:
        against = f"{card['against_length_pairs']} pairs"
        if card["against_length_ci95"]:
            against = "95% interval {:.3f} to {:.3f}, ".format(*card["against_length_ci95"]) + against
    lines = [
        "| held-out pairs | | |",
        "|---|---|---|",
        row("accuracy", card["accuracy"], f"95% interval {low:.3f} to {high:.3f}, {card['eval_pairs']} pairs"),
        row("of counting tokens alone", card["length_only_accuracy"]),
        *([row("of pairs against that", card["against_length_accuracy"], against)] if against else []),
        row("replies of equal length", card["length_matched_accuracy"], f"{card['length_matched_pairs']} pairs"),
        row("the shorter one is chosen", card["shorter_chosen_accuracy"], f"{card['shorter_chosen_pairs']} pairs"),
        row("the longer one is chosen", card["longer_chosen_accuracy"], f"{card['longer_chosen_pairs']} pairs"),
        row("a short one is chosen", card["short_good_accuracy"], f"{card['short_good_pairs']} pairs"),
        row("correlation of score and length", card["length_correlation"]),
        row("calibration error", card["calibration_error"], f"temperature {card['temperature']:.2f}"),
        row("score: mean", card["score_mean"], f"standard deviation {card['score_std']:.2f}"),
    ]
    if "sft_score_mean" in card:
        spread = f"standard deviation {card['sft_score_std']:.2f}"
        lines.append(row("score of SFT replies: mean", card["sft_score_mean"], spread))
    return "\n".join(lines)


def probes_table(card: dict[str, Any]) -> str:
    """What the card says about broken replies, as a Markdown table."""
    lines = ["| broken reply | the good one wins | 95% interval | prompts | above the median SFT reply |"]
    lines.append("|---|---|---|---|---|")
    above, intervals = card.get("probes_above_sft", {}), card.get("probes_ci95", {})
    marks = {"passed": "", "exempt": " exempt", "not shown": " not shown", "failed": " **failed**"}
    for kind, found in judge_probes(card).items():
        interval = "{:.3f} to {:.3f}".format(*intervals[kind]) if kind in intervals else "-"
        beats = f"{above[kind]:.3f}" if kind in above else "-"
        share, count = card["probes"][kind], card["probe_counts"][kind]
        lines.append(f"| {kind} | {share:.3f}{marks[found]} | {interval} | {count} | {beats} |")
    return "\n".join(lines)
