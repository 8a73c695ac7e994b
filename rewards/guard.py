"""Watches a PPO run: sees a collapse while it begins, says in words what it is, and knows the best policy so far.

A score that rises says nothing when the reward model is wrong.  What a collapse cannot hide is in the replies: they shrink
or run on, they say nothing, repeat themselves, leave the topic, or become the same whatever was asked, while KL to the SFT
model grows.  So every batch of replies is measured against the SFT model's own, and best is the highest score on held-out
prompts within the KL budget and without any such sign.

Measures are plain dicts of floats, so that they can be logged and kept in a checkpoint as they are.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rewards.broken_replies import distinct_share, empty_share, words_of

EXTREME = 8.0  # standard deviations from the mean score from which a single reply is named
WARNING, ALARM = "warning", "alarm"


@dataclass(frozen=True)
class Limits:
    """How far replies may move from the SFT model's: (from here a warning, from here an alarm).

    A single warning is common in a healthy run.  Two at once about the replies while the score rises are an alarm: then the
    score is being had for something else than better replies.  KL is not about the replies: a healthy run spends its budget.
    """

    kl_budget: float  # nats a reply; an alarm at twice that
    length_low: tuple[float, float] = (0.85, 0.6)  # times the SFT model's mean length
    length_high: tuple[float, float] = (1.5, 2.0)
    broken: tuple[float, float] = (0.05, 0.25)  # share of replies, more than the SFT model's
    same: tuple[float, float] = (0.1, 0.4)  # the same
    distinct: tuple[float, float] = (0.5, 0.35)  # times the SFT model's share of different word pairs
    asked: tuple[float, float] = (0.75, 0.5)  # times the SFT model's share of what was asked that the reply takes up
    score_rise: float = 0.5  # standard deviations


def measure_responses(
    prompts: Sequence[str], responses: Sequence[str], faults: Sequence[str | None], lengths: Sequence[int]
) -> dict[str, float]:
    """What the responses look like, whatever they score.  faults: what `find_broken` says of each.

    length: mean, in tokens.  broken: share with a plain fault; empty: see `empty_share`.
    same: share of responses that another prompt got too, word for word.  distinct: share of different ones among all pairs
    of neighbouring words (Li et al. 2016, distinct-2), 1 where there are none; it falls with the number of responses, so
    compare equal numbers.  asked: mean share of the prompt's words that the response has too, each with the weight
    log(prompts / prompts with it) (Sparck Jones 1972, idf): words that all prompts have say nothing.
    """
    askers: dict[str, set[str]] = {}
    for prompt, response in zip(prompts, responses, strict=True):
        askers.setdefault(response.strip(), set()).add(prompt)
    count = len(responses)
    said = [words_of(response) for response in responses]
    asked = [set(words_of(prompt)) for prompt in prompts]
    askers_of = Counter(word for words in asked for word in words)
    shares = []
    for words, taken_up in zip(asked, map(set, said), strict=True):
        weights = {word: math.log(count / askers_of[word]) for word in words}
        if any(weights.values()):
            # fsum: the words of a set come in another order in each process, and the sum has to be the same
            shares.append(math.fsum(weights[word] for word in words & taken_up) / math.fsum(weights.values()))
    return {
        "length": sum(lengths) / count,
        "broken": sum(kind is not None for kind in faults) / count,
        "empty": empty_share(faults),
        "same": sum(len(askers[response.strip()]) > 1 for response in responses) / count,
        "distinct": distinct_share(said, 2) or 1.0,
        "asked": sum(shares) / len(shares) if shares else 0.0,
    }


def find_signs(now: dict[str, float], sft: dict[str, float], limits: Limits) -> list[tuple[str, str]]:
    """(level, sentence) for everything that has moved too far from the SFT model.

    now, sft: `measure_responses` and kl (nats a reply), score (normalised mean), extreme (largest |normalised score|).
    """
    signs, budget = find_reply_signs(now, sft, limits), limits.kl_budget
    if now["kl"] >= budget:
        sentence = f"KL to the SFT model is {now['kl']:.1f} nats a reply, the budget {budget:g}"
        signs.append((ALARM if now["kl"] >= 2 * budget else WARNING, sentence))
    if now["extreme"] >= EXTREME > sft["extreme"]:
        signs.append((WARNING, f"one reply's score is {now['extreme']:.1f} standard deviations from the mean"))
    return signs


def find_reply_signs(now: dict[str, float], sft: dict[str, float], limits: Limits) -> list[tuple[str, str]]:
    """Those of `find_signs` that are about the replies themselves."""
    signs = []

    def note(value: float, thresholds: tuple[float, float], sentence: str, below: bool = False) -> None:
        warn, alarm = ((value <= limit) if below else (value >= limit) for limit in thresholds)
        if warn or alarm:
            signs.append((ALARM if alarm else WARNING, sentence))

    length, distinct = now["length"] / sft["length"], now["distinct"] / sft["distinct"]
    lengths = f"{now['length']:.1f} tokens a reply, the SFT model {sft['length']:.1f}"
    note(length, limits.length_low, f"replies shrink: {lengths}", below=True)
    note(length, limits.length_high, f"replies run on: {lengths}")
    broken = (
        f"{now['broken']:.0%} of the replies are empty, blank, loops or echoes, the SFT model's {sft['broken']:.0%}"
    )
    note(now["broken"] - sft["broken"], limits.broken, broken)
    same = f"{now['same']:.0%} of the replies answer several prompts word for word, the SFT model's {sft['same']:.0%}"
    note(now["same"] - sft["same"], limits.same, same)
    variety = f"{now['distinct']:.3f} of the word pairs are different ones, the SFT model's {sft['distinct']:.3f}"
    note(distinct, limits.distinct, f"replies lose variety: {variety}", below=True)
    if sft["asked"] > 0:
        asked = f"they take up {now['asked']:.2f} of what was asked, the SFT model's {sft['asked']:.2f}"
        note(now["asked"] / sft["asked"], limits.asked, f"replies leave the topic: {asked}", below=True)
    rise = now["score"] - sft["score"]
    if len(signs) > 1 and rise >= limits.score_rise:
        signs.insert(0, (ALARM, f"the score rose by {rise:.1f} standard deviations, but for the wrong reasons"))
    return signs


@dataclass
class Guard:
    """The state of the watch over one run; `state` and `restore` carry it through a checkpoint."""

    limits: Limits
    patience: int  # so many iterations with an alarm, among one more, make a collapse certain
    baselines: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # source of replies -> the SFT model's measures
    alarms: list[int] = field(default_factory=list)  # the last iterations with one
    best: dict[str, Any] | None = None  # iteration, score, kl
    verdict: str | None = None  # the first collapse, in words
    collapse_at: int | None = None  # its iteration

    def check(self, iteration: int, measures: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
        """Look at an iteration's measures by source ("rollouts", "held-out"); a source's first ones are the SFT model's.

        Returns the signs.  Sets `verdict` and `collapse_at` after `patience` iterations with an alarm out of one more, and
        at once where the alarm is about the replies and KL is over its budget: nothing out there can become best/, so
        there is nothing to wait for.
        """
        found, lost = {}, False
        for source, now in measures.items():
            sft = self.baselines.setdefault(source, now)
            found[source] = find_signs(now, sft, self.limits)
            if now["kl"] >= self.limits.kl_budget:
                lost |= any(level == ALARM for level, _ in find_reply_signs(now, sft, self.limits))
        alarmed = {source: signs for source, signs in found.items() if any(level == ALARM for level, _ in signs)}
        self.alarms = [when for when in self.alarms if when >= iteration - self.patience] + [iteration] * bool(alarmed)
        if alarmed and (lost or len(self.alarms) >= self.patience) and self.verdict is None:
            self.collapse_at = iteration
            parts = [f"{source}: " + "; ".join(sentence for _, sentence in signs) for source, signs in alarmed.items()]
            self.verdict = f"iteration {iteration}, " + ". ".join(parts)
        return [(level, f"{source}: {sentence}") for source, signs in found.items() for level, sentence in signs]

    def is_best(self, iteration: int, held_out: dict[str, float], signs: list[tuple[str, str]]) -> bool:
        """Whether this is the policy to keep so far: the highest held-out score, with no sign and within the KL budget.

        The first look is at the SFT model itself, which is always there to go back to.
        """
        if self.best is not None and (signs or held_out["score"] <= self.best["score"]):
            return False
        self.best = {"iteration": iteration, "score": held_out["score"], "kl": held_out["kl"]}
        return True

    def state(self) -> dict[str, Any]:
        """Everything that changes, as JSON takes it."""
        return {name: value for name, value in asdict(self).items() if name not in ("limits", "patience")}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name, value in state.items():
            setattr(self, name, value)
