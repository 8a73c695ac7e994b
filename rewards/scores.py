"""From the scores of a reward model and of reward functions to the one that is learned from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.adapters import SavedAdapter
from rewards.reward_card import in_short, read_card
from utils.console import InputError, say

FLOOR = 3.0  # standard deviations under the mean score: where a broken response is put, at most
FLOOR_GAP = 0.5  # and at least so far under the worst sound one
REWARD_MODEL = "reward_model"  # the name of its part of a score; the others have those of their functions


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of scores: the reward model's on held-out responses, a function's on the SFT model's."""

    mean: float = 0.0
    std: float = 1.0


@dataclass
class ScoreRules:
    """How a score is made of its parts: see `weighted_sum` and `normalize_scores`."""

    statistics: dict[str, ScoreStatistics]  # by part
    weights: dict[str, float]  # by part
    baseline: float  # subtracted from every normalised score
    missing_eos_penalty: float  # subtracted where the length limit cut a response
    clip: float  # normalised scores are clipped to +- this
    floor_broken: bool  # whether broken responses are put at a floor


def floor_scores(scores: Tensor, broken: Tensor) -> Tensor:
    """Normalised scores with those of broken responses at a floor, [B]: below all others, and at most -3.

    scores: float [B], in standard deviations from the mean, with all that is added and clipped; broken: bool [B].
    One empty response with a lucky score is enough to ruin a policy, so it never gets one.  The floor comes last: a penalty
    or a clip behind it would put sound responses at or under it.
    """
    worst = torch.full_like(scores[:1], FLOOR_GAP - FLOOR)
    floor = torch.cat([worst, scores[~broken]]).min() - FLOOR_GAP
    return torch.where(broken, torch.minimum(scores, floor), scores)


def weighted_sum(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The score of each response out of its parts, float32 [B].

    parts: float32 [B] by name; NaN of a function says that it does not apply to that response, and then nothing is added.
    NaN of the reward model stays NaN.
    """
    terms = [
        weights[name] * (values if name == REWARD_MODEL else values.masked_fill(values.isnan(), 0.0))
        for name, values in parts.items()
    ]
    return torch.stack(terms).sum(0)


def standardize(parts: Mapping[str, Tensor], rules: ScoreRules) -> dict[str, Tensor]:
    """Each part in standard deviations from its mean, so that a weight means the same for all of them."""
    return {name: (values - rules.statistics[name].mean) / rules.statistics[name].std for name, values in parts.items()}


def normalize_scores(parts: Mapping[str, Tensor], broken: Tensor, ended: Tensor, rules: ScoreRules) -> Tensor:
    """The weighted sum of the normalised parts, minus baseline and EOS penalty, clipped, broken responses at the floor, [B].

    parts: float [B] by name, as reward model and functions give them; broken, ended: bool [B], what has a plain fault and
    what ends in EOS.
    """
    scores = weighted_sum(standardize(parts, rules), rules.weights) - rules.baseline
    scores = scores - rules.missing_eos_penalty * (~ended).float()
    scores = scores.clamp(-rules.clip, rules.clip)
    return floor_scores(scores, broken) if rules.floor_broken else scores


def measure_scores(scores: Tensor) -> ScoreStatistics:
    """Mean and standard deviation of what applies among scores [B]; 0 and 1 where nothing does, 1 for a deviation of 0.

    In float64 and in order of size, so that the responses may come in any order.
    """
    scores = scores[~scores.isnan()].double().sort().values
    if len(scores) == 0:
        return ScoreStatistics()
    return ScoreStatistics(float(scores.mean()), float(scores.std(unbiased=False)) or 1.0)


def part_weights(given: str | None, functions: list[str], has_reward_model: bool) -> dict[str, float]:
    """Weight of each part of a score: 1, or as --reward_weights says, one for each of `functions`, which are names.

    One number more, in front, is the reward model's.  Raises InputError for what are no such numbers.
    """
    names = [REWARD_MODEL, *functions] if has_reward_model else functions
    if given is None:
        return dict.fromkeys(names, 1.0)
    try:
        weights = [float(weight) for weight in given.split(",")]
    except ValueError:
        weights = []
    if has_reward_model and len(weights) == len(functions):
        weights = [1.0, *weights]
    if len(weights) != len(names) or not all(map(math.isfinite, weights)):
        wanted = f"{len(functions)} numbers joined by commas, for {', '.join(functions) or 'no function'}"
        wanted += ", or one more in front for the reward adapter" if has_reward_model else ""
        raise InputError(f"--reward_weights is {given}; give {wanted}")
    return dict(zip(names, weights, strict=True))


def check_card(card: dict[str, Any] | None, what: str, remedy: str, allow_weak: bool) -> None:
    """Say what a reward card leaves open.

    Raises InputError when there is no card or the model did not pass, unless `allow_weak` lets it through with a warning:
    PPO finds whatever a reward model likes by mistake.  what: the model in words; remedy: what else to do.
    """
    if card is None:
        weak = f"{what} has no reward_card.json, so nothing is known about it"
    elif not card.get("passed"):
        reasons = in_short(card.get("failed", [])) or "it is the card of an older version"
        weak = f"{what} did not pass its reward card: {reasons}"
    else:
        weak = None
    if weak and not allow_weak:
        raise InputError(
            f"{weak}; {remedy}, or go on at your own risk: the same rl_training.py command with --allow_weak_reward true"
        )
    if weak:
        say(f"warning: {weak}")
    if card and card.get("not_shown"):
        say(f"note: the reward card had too few prompts to tell: {in_short(card['not_shown'])}")


def read_statistics(reward: SavedAdapter, allow_weak: bool) -> ScoreStatistics:
    """Mean and standard deviation of the scores out of the reward card; 0 and 1 where there is none.

    Raises InputError as `check_card` does.
    """
    card = read_card(reward.path)
    remedy = "train it again with reward_modeling.py, on more data or with a higher --degenerate_ratio"
    check_card(card, f"the reward adapter {reward.path}", remedy, allow_weak)
    if card is None:
        return ScoreStatistics()
    return ScoreStatistics(card["score_mean"], card["score_std"] or 1.0)
