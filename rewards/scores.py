"""From the reward model's scores to the ones that PPO learns from."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora.adapters import SavedAdapter
from rewards.reward_card import in_short, read_card
from utils.console import InputError, say

FLOOR = 3.0  # standard deviations under the mean score: where a broken response is put, at most
FLOOR_GAP = 0.5  # and at least so far under the worst sound one


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of the reward model's scores on held-out responses."""

    mean: float = 0.0
    std: float = 1.0


class ScoreRules(NamedTuple):
    """How scores are normalised: see `normalize_scores`."""

    statistics: ScoreStatistics
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


def normalize_scores(scores: Tensor, broken: Tensor, ended: Tensor, rules: ScoreRules) -> Tensor:
    """Scores in units of the reward card, minus baseline and EOS penalty, clipped, broken responses at the floor, [B].

    scores: float [B], as the reward model gives them; broken, ended: bool [B], what has a plain fault and what ends in EOS.
    """
    scores = (scores - rules.statistics.mean) / rules.statistics.std - rules.baseline
    scores = scores - rules.missing_eos_penalty * (~ended).float()
    scores = scores.clamp(-rules.clip, rules.clip)
    return floor_scores(scores, broken) if rules.floor_broken else scores


def read_statistics(reward: SavedAdapter, allow_weak: bool) -> ScoreStatistics:
    """Mean and standard deviation of the scores out of the reward card; 0 and 1 where there is none.

    Raises InputError when the card is missing or says that the model did not pass, unless `allow_weak` lets it through
    with a warning: PPO finds whatever a reward model likes by mistake.
    """
    card = read_card(reward.path)
    if card is None:
        weak = f"the reward adapter {reward.path} has no reward_card.json, so nothing is known about it"
    elif not card.get("passed"):
        reasons = in_short(card.get("failed", [])) or "it is the card of an older version"
        weak = f"the reward adapter {reward.path} did not pass its reward card: {reasons}"
    else:
        weak = None
    if weak and not allow_weak:
        raise InputError(
            f"{weak}; train it with reward_modeling.py on more data or with a higher --degenerate_ratio, or go on at your "
            "own risk with --allow_weak_reward true"
        )
    if weak:
        say(f"warning: {weak}")
    if card is None:
        return ScoreStatistics()
    return ScoreStatistics(card["score_mean"], card["score_std"] or 1.0)
