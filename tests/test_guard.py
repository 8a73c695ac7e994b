"""The guard: what it measures, when it speaks, when a collapse is certain, and which policy is the best."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from rewards.broken_replies import find_broken
from rewards.guard import ALARM, WARNING, Guard, Limits, find_signs, measure_responses
from rewards.scores import REWARD_MODEL, ScoreRules, ScoreStatistics, floor_scores, normalize_scores

ROOT = Path(__file__).parent.parent
SFT = {
    **{"length": 20.0, "broken": 0.0, "empty": 0.0, "same": 0.02, "distinct": 0.6, "asked": 0.4},
    **{"kl": 0.0, "score": 0.0, "extreme": 2.0},
}


def measure(prompts: list[str], responses: list[str], lengths: list[int]) -> dict[str, float]:
    return measure_responses(prompts, responses, list(map(find_broken, prompts, responses)), lengths)


LIMITS = Limits(kl_budget=5.0)


def levels(**changes: float) -> list[str]:
    return [level for level, _ in find_signs({**SFT, **changes}, SFT, LIMITS)]


# ---- The floor ----


def test_floor_by_hand() -> None:
    """At most -3, and half a standard deviation under the lowest sound score; what is lower already stays there."""
    broken = torch.tensor([True, False, False, True])
    assert floor_scores(torch.tensor([5.0, -1.0, 2.0, -4.0]), broken).tolist() == [-3.0, -1.0, 2.0, -4.0]
    assert floor_scores(torch.tensor([5.0, -3.5, 2.0, -3.8]), broken).tolist() == [-4.0, -3.5, 2.0, -4.0]


def test_floor_where_all_or_none_are_broken() -> None:
    scores = torch.tensor([5.0, 3.0])
    assert floor_scores(scores, torch.tensor([True, True])).tolist() == [-3.0, -3.0]
    assert floor_scores(scores, torch.tensor([False, False])).tolist() == [5.0, 3.0]


def test_the_floor_comes_last() -> None:
    """A blank reply that ended got -3, and a sound one that was cut got -2.5 minus the penalty: -3.5.  At the clip both were
    at -5.  Where replies are often cut, saying nothing was then the better choice.
    """
    rules = ScoreRules(
        {REWARD_MODEL: ScoreStatistics(1.0, 2.0)},
        {REWARD_MODEL: 1.0},
        baseline=0.0,
        missing_eos_penalty=1.0,
        clip=5.0,
        floor_broken=True,
    )
    scores = torch.tensor([9.0, -4.0, 1.0])  # 4, -2.5 and 0 deviations
    broken, ended = torch.tensor([True, False, False]), torch.tensor([True, False, True])
    assert normalize_scores({REWARD_MODEL: scores}, broken, ended, rules).tolist() == [-4.0, -3.5, 0.0]
    scores = torch.tensor([-99.0, -99.0, 1.0])
    assert normalize_scores({REWARD_MODEL: scores}, broken, ended, rules).tolist() == [-5.5, -5.0, 0.0]


def test_one_lucky_empty_reply_gets_no_advantage() -> None:
    """The article: a single empty reply with a very high score was enough to send the model down the wrong way."""
    scores = torch.tensor([0.1, -0.2, 0.0, 12.0])
    broken = torch.tensor([False, False, False, True])
    assert int(floor_scores(scores, broken).argmin()) == 3
    assert int(scores.argmax()) == 3


# ---- Measures ----


def test_measures_by_hand() -> None:
    prompts = ["a?", "b?", "b?", "c?"]
    replies = ["one two three", "one two three", "", "four five"]
    measures = measure(prompts, replies, [4, 4, 1, 3])
    assert measures["length"] == 3.0
    assert measures["broken"] == measures["empty"] == 0.25
    assert measures["same"] == 0.5  # two prompts got "one two three"
    # pairs: one-two, two-three, one-two, two-three, four-five: three different ones of five
    assert measures["distinct"] == pytest.approx(3 / 5)


def test_how_much_of_the_question_is_taken_up_by_hand() -> None:
    """All four prompts have "is", which weighs nothing; two have "tea" and two "it", log 2; "hot" and "cold" weigh log 4."""
    prompts = ["is tea hot", "is tea cold", "is it", "is it"]
    replies = ["tea is hot", "TEA", "is", "it"]
    # 1, log 2 / (log 2 + log 4) = 1/3, 0, 1
    assert measure(prompts, replies, [1, 1, 1, 1])["asked"] == pytest.approx((1 + 1 / 3 + 0 + 1) / 4)
    assert measure(["a", "a"], ["a", "b"], [1, 1])["asked"] == 0.0  # nothing tells the prompts apart


def test_a_policy_that_leaves_the_topic_is_seen() -> None:
    """A reward model that could not tell topics apart let the policy drop them, and no other measure showed it."""
    topics = ("tea", "soup", "rice", "bread")
    prompts = [f"what about {topic}?" for topic in topics]
    before = measure(prompts, [f"I like {topic} so much." for topic in topics], [6] * 4)
    after = measure(prompts, [f"I like {topic} so much." for topic in topics[::-1]], [6] * 4)
    rest = {"kl": 0.0, "score": 0.0, "extreme": 1.0}
    signs = find_signs({**after, **rest}, {**before, **rest}, LIMITS)
    words = "replies leave the topic: they take up 0.00 of what was asked, the SFT model's 1.00"
    assert signs == [(ALARM, words)]


def test_the_same_reply_to_the_same_prompt_is_no_sign() -> None:
    assert measure(["a?", "a?"], ["yes indeed", "yes indeed"], [3, 3])["same"] == 0.0


def test_measures_of_nothing_but_empty_replies() -> None:
    measures = measure(["a?", "b?"], ["", ""], [1, 1])
    assert (measures["broken"], measures["distinct"], measures["same"]) == (1.0, 1.0, 1.0)


# ---- Signs ----


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"length": 17.1}, []),
        ({"length": 16.9}, [WARNING]),
        ({"length": 12.0}, [ALARM]),
        ({"length": 30.0}, [WARNING]),
        ({"length": 40.0}, [ALARM]),
        ({"broken": 0.06}, [WARNING]),
        ({"broken": 0.3}, [ALARM]),
        ({"same": 0.13}, [WARNING]),
        ({"same": 0.5}, [ALARM]),
        ({"distinct": 0.29}, [WARNING]),
        ({"distinct": 0.2}, [ALARM]),
        ({"asked": 0.31}, []),
        ({"asked": 0.29}, [WARNING]),
        ({"asked": 0.19}, [ALARM]),
        ({"kl": 5.0}, [WARNING]),
        ({"kl": 10.0}, [ALARM]),
        ({"extreme": 9.0}, [WARNING]),
    ],
)
def test_each_sign(changes: dict[str, float], expected: list[str]) -> None:
    assert levels(**changes) == expected


def test_a_rising_score_alone_is_no_sign() -> None:
    assert levels(score=3.0) == []
    assert levels(score=3.0, length=16.0) == [WARNING]


def test_two_warnings_and_a_rising_score_are_an_alarm() -> None:
    """The article's curves: the reward rises while the replies shrink.  Each by itself is ordinary."""
    assert levels(length=16.0, same=0.2) == [WARNING, WARNING]
    assert levels(length=16.0, same=0.2, score=0.4) == [WARNING, WARNING]
    assert levels(length=16.0, same=0.2, score=0.5) == [ALARM, WARNING, WARNING]


def test_a_spent_kl_budget_is_no_second_warning() -> None:
    """Two healthy runs of ten got an alarm: some prompts asked for the same in other words and got the same reply, and KL
    had just reached its budget, as it does where a policy learns.  Twice the budget is an alarm by itself.
    """
    assert levels(same=0.2, kl=5.1, score=3.0) == [WARNING, WARNING]
    assert levels(same=0.2, length=16.0, kl=5.1, score=3.0) == [ALARM, WARNING, WARNING, WARNING]
    assert levels(same=0.2, kl=10.0, score=3.0) == [WARNING, ALARM]


def test_signs_name_the_numbers() -> None:
    (_, sentence), *rest = find_signs({**SFT, "length": 6.04}, SFT, LIMITS)
    assert (sentence, rest) == ("replies shrink: 6.0 tokens a reply, the SFT model 20.0", [])


# ---- The watch over a run ----


def watched(patience: int = 2) -> Guard:
    guard = Guard(LIMITS, patience)
    assert guard.check(0, {"held-out": SFT}) == []
    return guard


def look(guard: Guard, iteration: int, **changes: float) -> list[tuple[str, str]]:
    return guard.check(iteration, {"rollouts": {**SFT, **changes}})


def test_a_source_is_compared_with_its_own_first_measures() -> None:
    guard = watched()
    assert look(guard, 1, length=8.0) == []  # the rollouts' prompts have short answers
    assert look(guard, 2, length=8.0) == []
    assert [level for level, _ in guard.check(3, {"held-out": {**SFT, "length": 8.0}})] == [ALARM]


def test_a_collapse_is_certain_after_two_alarms_in_three_iterations() -> None:
    guard = watched()
    look(guard, 1)
    look(guard, 2, length=5.0)
    assert guard.verdict is None
    look(guard, 3)
    look(guard, 4, length=5.0)
    assert guard.collapse_at == 4
    assert guard.verdict == "iteration 4, rollouts: replies shrink: 5.0 tokens a reply, the SFT model 20.0"


def test_over_the_kl_budget_one_alarm_about_the_replies_is_enough() -> None:
    """Waiting for a second one let a run's gold fall below the SFT model's, and no policy from there can become best/."""
    guard = watched()
    look(guard, 1)
    look(guard, 2, length=5.0, kl=4.9)
    assert guard.verdict is None
    guard = watched()
    look(guard, 1)
    look(guard, 2, length=16.0, kl=5.0)  # a warning about the replies
    look(guard, 3, kl=11.0)  # an alarm that is not about the replies
    assert guard.verdict is None
    guard = watched()
    look(guard, 1)
    look(guard, 2, length=5.0, kl=5.0)
    words = (
        "replies shrink: 5.0 tokens a reply, the SFT model 20.0; KL to the SFT model is 5.0 nats a reply, the budget 5"
    )
    assert guard.verdict == f"iteration 2, rollouts: {words}"


def test_reply_alarm_and_kl_of_different_sources_are_no_certainty() -> None:
    """Held-out prompts and rollouts have KL of their own: only the replies that are far away themselves are lost."""
    guard = watched()
    guard.check(1, {"rollouts": SFT})
    guard.check(2, {"rollouts": {**SFT, "length": 5.0}, "held-out": {**SFT, "kl": 6.0}})
    assert guard.verdict is None


def test_alarms_far_apart_are_no_collapse() -> None:
    guard = watched()
    look(guard, 1)
    for iteration in range(2, 30):
        look(guard, iteration, length=5.0 if iteration % 3 == 0 else 20.0)
    assert guard.verdict is None


def test_the_first_verdict_stays() -> None:
    guard = watched(patience=1)
    look(guard, 1)
    look(guard, 2, kl=11.0)
    look(guard, 3, length=1.0)
    assert guard.collapse_at == 2
    assert "KL to the SFT model is 11.0 nats a reply, the budget 5" in guard.verdict


def test_best_is_the_highest_score_without_a_sign() -> None:
    guard = watched()
    assert guard.is_best(0, SFT, [])
    assert not guard.is_best(4, {**SFT, "score": -0.1}, [])
    assert guard.is_best(8, {**SFT, "score": 0.7, "kl": 2.0}, [])
    signs = find_signs({**SFT, "score": 2.0, "kl": 5.1}, SFT, LIMITS)
    assert not guard.is_best(12, {**SFT, "score": 2.0, "kl": 5.1}, signs)  # over the KL budget
    assert guard.best == {"iteration": 8, "score": 0.7, "kl": 2.0}


def test_the_state_goes_through_a_checkpoint() -> None:
    guard = watched()
    look(guard, 1)
    look(guard, 2, length=5.0)
    guard.is_best(2, {**SFT, "score": 0.5}, [])
    restored = Guard(LIMITS, 2)
    restored.restore(json.loads(json.dumps(guard.state())))
    assert restored == guard
    look(restored, 3, length=5.0)
    assert restored.collapse_at == 3


def test_nan_scores_raise_no_false_alarm() -> None:
    """A comparison with nan is false: such a run is not the guard's business, and it must not crash on it."""
    assert levels(score=math.nan) == []


def measured() -> list[dict[str, float]]:
    """The measures of 20 batches of random words."""
    rng, words = Random(0), [f"word{i}" for i in range(60)]

    def texts() -> list[str]:
        return [" ".join(rng.sample(words, 15)) for _ in range(40)]

    return [measure_responses(texts(), texts(), [None] * 40, [15] * 40) for _ in range(20)]


@pytest.mark.slow
def test_measures_are_the_same_in_every_process() -> None:
    """Words of a set come in an order that differs by process; a plain sum of their weights differed in its last digit.

    A resumed run, and the processes of one run, would then disagree.
    """
    environment = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    command = [sys.executable, "-c", "from tests.test_guard import measured\nprint(measured())"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == str(measured())


def test_lost_by_one_source_is_lost() -> None:
    """The last source looked at decided, so that held-out prompts over the budget took a collapse of the rollouts back."""
    guard = watched()
    guard.check(1, {"rollouts": SFT, "held-out": SFT})
    guard.check(2, {"rollouts": {**SFT, "length": 5.0, "kl": 6.0}, "held-out": {**SFT, "kl": 6.0}})
    assert guard.collapse_at == 2


def test_an_extreme_score_that_the_sft_model_has_too_is_no_sign() -> None:
    assert find_signs({**SFT, "extreme": 9.0}, {**SFT, "extreme": 8.5}, LIMITS) == []
    assert len(find_signs({**SFT, "extreme": 9.0}, {**SFT, "extreme": 7.5}, LIMITS)) == 1


def test_a_tie_does_not_replace_best() -> None:
    """A later policy with the same score is farther from the SFT model for nothing."""
    guard = watched()
    assert guard.is_best(0, SFT, [])
    assert not guard.is_best(5, dict(SFT), [])
    assert guard.best["iteration"] == 0
