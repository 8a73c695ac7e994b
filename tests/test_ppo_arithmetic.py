"""utils/ppo.py against numbers worked by hand, and against an independent implementation in plain Python loops."""

import ast
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from utils import ppo

NAN, INF = math.nan, math.inf
LN2 = math.log(2)


def mask_of(*rows: str) -> torch.Tensor:
    """Rows like "110": 1 is a real token, 0 is padding."""
    return torch.tensor([[character == "1" for character in row] for row in rows])


# ---------------------------------------------------------------- worked by hand


def test_masked_mean():
    x = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, NAN]], requires_grad=True)
    mean = ppo.masked_mean(x, mask_of("110", "100"))
    mean.backward()
    assert_close(mean, torch.tensor(7 / 3))  # (1 + 2 + 4) / 3: over tokens, not over rows (that would be 2.75)
    assert_close(x.grad, torch.tensor([[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]]))


@pytest.mark.parametrize(("shift_mean", "low", "high"), [(True, -1.0, 1.0), (False, 2.0, 4.0)])
def test_masked_whiten(shift_mean, low, high):
    # Real values 1, 1, 5, 5: mean 3, population variance 16 / 4 = 4, so (x - 3) / 2 = -1 or 1 (unbiased: 16 / 3).
    x = torch.tensor([[1.0, 5.0, NAN], [5.0, 1.0, -INF]])
    whitened = ppo.masked_whiten(x, mask_of("110", "110"), shift_mean=shift_mean)
    assert_close(whitened, torch.tensor([[low, high, 0.0], [high, low, 0.0]]))


def test_masked_whiten_epsilon():
    # Real values +-1e-4: variance 1e-8, so the divisor is sqrt(1e-8 + 1e-8) and the results are +-1 / sqrt(2).
    whitened = ppo.masked_whiten(torch.tensor([[1e-4, -1e-4]]), mask_of("11"))
    assert_close(whitened, torch.tensor([[0.5**0.5, -(0.5**0.5)]]))
    assert_close(ppo.masked_whiten(torch.full((1, 2), 7.0), mask_of("11")), torch.zeros(1, 2))  # no variance: no nan


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [LN2, -LN2, 0.0]),
        ("k2", [LN2**2 / 2, LN2**2 / 2, 0.0]),
        ("k3", [0.5 - 1 + LN2, 2 - 1 - LN2, 0.0]),
    ],
)
def test_kl_penalty(kind, expected):
    # Probabilities 1/2 and 1/4 under the policy, 1/4 and 1/2 under the reference: d = ln 2 and -ln 2.
    logprobs = torch.tensor([[0.5, 0.25, 0.25]]).log()
    ref_logprobs = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert_close(ppo.kl_penalty(logprobs, ref_logprobs, kind), torch.tensor([expected]))


def test_k3_survives_rounding():
    # d^2 / 2 = 5e-13 for d = +-1e-6. exp(-d) - 1 + d in float32 has an error of 6e-8, of either sign.
    logprobs = torch.tensor([[1e-6, -1e-6]])
    assert_close(ppo.kl_penalty(logprobs, torch.zeros(1, 2), "k3"), torch.full((1, 2), 5e-13), rtol=0.2, atol=0)


def test_token_rewards():
    # -0.1 * kl, and the score on the last real token: 10 - 0.05 = 9.95; -1 - 0.2 = -1.2; 3 - 0.4; 5 + 0.3.
    kl = torch.tensor([[1.0, 0.5, NAN, INF], [2.0, NAN, NAN, NAN], [-INF, 2.0, 4.0, NAN], [NAN, NAN, 1.0, -3.0]])
    rewards = ppo.token_rewards(
        torch.tensor([10.0, -1.0, 3.0, 5.0]), kl, mask_of("1100", "1000", "0110", "0011"), kl_coef=0.1
    )
    expected = [[-0.1, 9.95, 0, 0], [-1.2, 0, 0, 0], [0, -0.2, 2.6, 0], [0, 0, -0.1, 5.3]]
    assert_close(rewards, torch.tensor(expected))


def test_gae():
    # gamma = lam = 1/2, so gamma * lam = 1/4.
    # Row 1: r = 1, 0, 2; V = 2, 4, 8. delta_2 = 2 - 8 = -6; delta_1 = 0 + 8/2 - 4 = 0; delta_0 = 1 + 4/2 - 2 = 1.
    #        A_2 = -6; A_1 = 0 - 6/4 = -1.5; A_0 = 1 - 1.5/4 = 0.625.
    # Row 2: one token, r = 3, V = 1: A = 3 - 1 = 2, whatever stands after it.  Row 3: the same, padded on the left.
    rewards = torch.tensor([[1.0, 0, 2], [3, NAN, 7], [INF, NAN, 3]])
    values = torch.tensor([[2.0, 4, 8], [1, 100, NAN], [NAN, -INF, 1]], requires_grad=True)
    advantages, returns = ppo.gae(rewards, values, mask_of("111", "100", "001"), gamma=0.5, lam=0.5)
    assert_close(advantages, torch.tensor([[0.625, -1.5, -6], [2, 0, 0], [0, 0, 2]]))
    assert_close(returns, torch.tensor([[2.625, 2.5, 2], [3, 0, 0], [0, 0, 3]]))
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_policy_loss():
    # clip 0.2. Loss = max(-A r, -A clip(r, 0.8, 1.2)); its gradient in logprobs is -A r / n, or 0 where the clip won.
    #   r   1    2    1/2   2    1/2   pad
    #   A   1    1    -1   -1    1     pad
    #      -1  -1.2   0.8   2   -0.5          sum 0.1; clipped: the 2nd and 3rd of 5
    # k3 of KL(old || new) = r - 1 - ln r: 0, 1 - ln 2, ln 2 - 1/2, 1 - ln 2, ln 2 - 1/2: sum 1
    logprobs = torch.tensor([[0.0, LN2, -LN2], [LN2, -LN2, NAN]], requires_grad=True)
    old_logprobs = torch.tensor([[0.0, 0, 0], [0, 0, INF]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1, -1], [-1, 1, NAN]], requires_grad=True)
    result = ppo.policy_loss(logprobs, old_logprobs, advantages, mask_of("111", "110"), clip_range=0.2)
    result.loss.backward()
    assert_close(result.loss.detach(), torch.tensor(0.1 / 5))
    assert_close(result.clip_fraction, torch.tensor(2 / 5))
    assert_close(result.approx_kl, torch.tensor(1 / 5))
    assert_close(logprobs.grad, torch.tensor([[-1, 0, 0], [2, -0.5, 0]]) / 5)
    assert old_logprobs.grad is None
    assert advantages.grad is None


def test_policy_loss_before_the_first_step():
    # The same log-probs: every ratio is exactly 1, the loss is minus the mean advantage, nothing is clipped.
    logprobs = torch.tensor([[-1.0, -2.5]], requires_grad=True)
    result = ppo.policy_loss(logprobs, logprobs, torch.tensor([[3.0, -1.0]]), mask_of("11"), clip_range=0.2)
    result.loss.backward()
    assert (result.loss.item(), result.clip_fraction.item(), result.approx_kl.item()) == (-1, 0, 0)
    assert_close(logprobs.grad, torch.tensor([[-1.5, 0.5]]))  # -A / 2: the old log-probs are a constant


def test_policy_loss_clamps_the_log_ratio():
    # 0 - -1000 is clamped to 20, so the loss of A = -1 is e^20 and not inf. -1000 - 0 is clamped to -20: loss 0.8.
    logprobs = torch.tensor([[0.0, -1000.0]], requires_grad=True)
    advantages = torch.tensor([[-1.0, -1.0]])
    result = ppo.policy_loss(logprobs, torch.tensor([[-1000.0, 0.0]]), advantages, mask_of("11"), clip_range=0.2)
    result.loss.backward()
    assert_close(result.loss.detach(), torch.tensor((math.exp(20) + 0.8) / 2))
    assert_close(result.approx_kl, torch.tensor((math.exp(20) - 1 - 20 + math.exp(-20) - 1 + 20) / 2))
    assert_close(logprobs.grad, torch.zeros(1, 2))


def test_value_loss():
    # clip 0.2 around V_old = 0, R = 1. Loss = max((V - 1)^2, (clip(V) - 1)^2) / 2; gradient (V - R) / n, 0 if clipped.
    #   V = 1    0 against (0.2 - 1)^2 = 0.64: clipped, 0.32
    #   V = 0.1  inside: 0.81 / 2 = 0.405; gradient -0.9 / 3
    #   V = -1   4 against (-0.2 - 1)^2 = 1.44: 2; gradient -2 / 3
    values = torch.tensor([[1.0, 0.1], [-1.0, NAN]], requires_grad=True)
    old_values = torch.tensor([[0.0, 0.0], [0.0, NAN]], requires_grad=True)
    returns = torch.tensor([[1.0, 1.0], [1.0, INF]], requires_grad=True)
    result = ppo.value_loss(values, old_values, returns, mask_of("11", "10"), clip_range=0.2)
    result.loss.backward()
    assert_close(result.loss.detach(), torch.tensor((0.32 + 0.405 + 2) / 3))
    assert_close(result.clip_fraction, torch.tensor(1 / 3))
    assert_close(values.grad, torch.tensor([[0.0, -0.3], [-2 / 3, 0.0]]))
    assert old_values.grad is None
    assert returns.grad is None


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (12.0, 0.0501),  # twice the target: the error 1 is clipped to 0.2; 0.05 * (1 + 0.2 * 100 / 10000)
        (6.6, 0.05005),  # error 0.1, inside
        (6.0, 0.05),
        (0.0, 0.0499),  # error -1, clipped to -0.2
        (torch.tensor(6.6), 0.05005),
        (INF, 0.0501),
    ],
)
def test_adaptive_kl_coef(kl, expected):
    coef = ppo.adaptive_kl_coef(0.05, kl, target=6.0, horizon=10_000, batch_size=100)
    assert isinstance(coef, float)
    assert coef == pytest.approx(expected, rel=1e-6)


def test_adaptive_kl_coef_shows_a_nan():
    assert math.isnan(ppo.adaptive_kl_coef(0.05, NAN, target=6.0, horizon=10_000, batch_size=100))


GROUPS = mask_of("110", "100", "111", "010")  # two prompts with two replies each; padding on either side


def test_rloo():
    """Rewards of whole replies 3, 1 and 4, -2: each minus the other one."""
    rewards = torch.tensor([[1.0, 2.0, NAN], [1.0, INF, NAN], [1.0, 1.0, 2.0], [NAN, -2.0, NAN]])
    advantages = ppo.rloo(rewards, GROUPS, 2)
    assert advantages.tolist() == [[2.0, 2.0, 0.0], [-2.0, 0.0, 0.0], [6.0, 6.0, 6.0], [0.0, -6.0, 0.0]]


def test_rloo_of_three():
    """Rewards 3, 0, 6: the others' means are 3, 4.5 and 1.5.  A constant for all of a prompt changes nothing."""
    rewards, mask = torch.tensor([[3.0], [0.0], [6.0]]), mask_of("1", "1", "1")
    for constant in (0.0, 100.0):
        assert ppo.rloo(rewards + constant, mask, 3).tolist() == [[0.0], [-4.5], [4.5]]


def test_grpo():
    """Rewards 3, 1: mean 2, deviation of the sample sqrt(2).  4, -2: mean 1, sqrt(18)."""
    rewards = torch.tensor([[1.0, 2.0, NAN], [1.0, INF, NAN], [1.0, 1.0, 2.0], [NAN, -2.0, NAN]])
    high, low = 1 / (2**0.5 + 1e-4), 3 / (18**0.5 + 1e-4)
    wanted = torch.tensor([[high, high, 0.0], [-high, 0.0, 0.0], [low, low, low], [0.0, -low, 0.0]])
    assert_close(ppo.grpo(rewards, GROUPS, 2), wanted)
    plain = ppo.grpo(rewards, GROUPS, 2, divide_by_std=False)
    assert plain.tolist() == [[1.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [3.0, 3.0, 3.0], [0.0, -3.0, 0.0]]


def test_grpo_of_equal_replies():
    """All right or all wrong: nothing to learn, and no division by 0."""
    assert ppo.grpo(torch.full((4, 1), 7.0), mask_of("1", "1", "1", "1"), 4).tolist() == [[0.0]] * 4


@pytest.mark.parametrize("advantages", [ppo.rloo, ppo.grpo])
def test_a_group_of_one_is_no_group(advantages):
    with pytest.raises(ValueError, match="4 rows in groups of 1: a group needs two replies or more"):
        advantages(torch.zeros(4, 3), GROUPS, 1)
    with pytest.raises(ValueError, match="4 rows in groups of 3"):
        advantages(torch.zeros(4, 3), GROUPS, 3)
    with pytest.raises(ValueError, match="real token"):
        advantages(torch.zeros(2, 1), mask_of("1", "0"), 2)


def test_kl_loss():
    """Probabilities 1/2, 1/4 under the policy and 1/4, 1/2 under the reference: k3 is ln 2 - 1/2 and 1 - ln 2, mean 1/4.

    By a log-prob: (1 - 1/2) / 2 and (1 - 2) / 2, by those of equal probability nothing.
    """
    logprobs = torch.tensor([[0.5, 0.25, 1.0]]).log().requires_grad_(True)
    loss = ppo.kl_loss(logprobs, torch.tensor([[0.25, 0.5, NAN]]).log(), mask_of("110"))
    loss.backward()
    assert_close(loss.detach(), torch.tensor(0.25))
    assert_close(logprobs.grad, torch.tensor([[0.25, -0.5, 0.0]]))
    same = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    ppo.kl_loss(same, same.detach(), mask_of("11")).backward()
    assert same.grad.tolist() == [[0.0, 0.0]]


def test_kl_loss_of_an_impossible_token_is_finite():
    logprobs = torch.tensor([[-500.0]], requires_grad=True)
    loss = ppo.kl_loss(logprobs, torch.tensor([[-1.0]]), mask_of("1"))
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.isfinite().all()


# ---------------------------------------------------------------- an independent implementation
# Replies are lists of numbers without any padding; no recursion, no masks, no torch.


def spans_to_batch(replies: list[list[float]], starts: list[int], width: int, chance: random.Random) -> torch.Tensor:
    """Lay the replies into a [B, T] tensor whose padding is poison."""
    batch = [[chance.choice([NAN, INF, -INF, 1e30, -1e30, 0.0, 7.0]) for _ in range(width)] for _ in replies]
    for row, reply, start in zip(batch, replies, starts, strict=True):
        row[start : start + len(reply)] = reply
    return torch.tensor(batch, dtype=torch.float64)


class Case:
    """A random ragged batch: every quantity as lists (`reference`) and as poisoned tensors (`batch`)."""

    def __init__(self, seed: int):
        chance = random.Random(seed)
        lengths = [chance.randint(1, 7) for _ in range(chance.randint(1, 6))]
        right_padding_only = chance.random() < 0.5
        starts = [0 if right_padding_only else chance.randint(0, 4) for _ in lengths]
        width = max(s + n for s, n in zip(starts, lengths, strict=True)) + chance.randint(0, 3)
        self.mask = torch.tensor([[s <= t < s + n for t in range(width)] for s, n in zip(starts, lengths, strict=True)])
        self.lists, self.batch = {}, {}
        for name in ("x", "logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "rewards"):
            self.lists[name] = [[chance.gauss(0, 0.6) for _ in range(n)] for n in lengths]
            self.batch[name] = spans_to_batch(self.lists[name], starts, width, chance)
        self.scores = [chance.gauss(0, 2) for _ in lengths]
        self.clip_range = chance.choice([0.1, 0.2, 0.5])
        self.gamma, self.lam = chance.choice([(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.97, 0.0)])
        self.kl_coef = chance.choice([0.05, 0.2, 1.0])

    def flat(self, name: str) -> list[float]:
        return [number for reply in self.lists[name] for number in reply]

    def check(self, result: torch.Tensor, replies) -> None:
        """Real tokens are those of the reference, padding is 0."""
        numbers = [number for reply in replies for number in reply]
        assert_close(result[self.mask], torch.tensor(numbers, dtype=torch.float64), rtol=1e-10, atol=1e-10)
        assert (result[~self.mask] == 0).all()


@pytest.fixture(params=range(40))
def case(request):
    return Case(request.param)


def test_statistics_match(case):
    numbers = np.array(case.flat("x"))
    mean, std = numbers.mean(), math.sqrt(numbers.var() + 1e-8)
    x = case.batch["x"].requires_grad_()
    result = ppo.masked_mean(x, case.mask)
    (gradient,) = torch.autograd.grad(result, x)
    assert result.item() == pytest.approx(mean, rel=1e-10, abs=1e-12)
    case.check(gradient, [[1 / len(numbers)] * len(reply) for reply in case.lists["x"]])
    whitened = [[(number - mean) / std for number in reply] for reply in case.lists["x"]]
    case.check(ppo.masked_whiten(x, case.mask).detach(), whitened)
    kept = [[number + mean for number in reply] for reply in whitened]
    case.check(ppo.masked_whiten(x, case.mask, shift_mean=False).detach(), kept)


def test_rewards_match(case):
    estimators = {
        "k1": lambda policy, ref: policy - ref,
        "k2": lambda policy, ref: 0.5 * (policy - ref) ** 2,
        "k3": lambda policy, ref: math.exp(ref) / math.exp(policy) - 1 - (ref - policy),
    }
    for kind, estimator in estimators.items():
        kl = ppo.kl_penalty(case.batch["logprobs"], case.batch["old_logprobs"], kind)
        rewards = ppo.token_rewards(torch.tensor(case.scores, dtype=torch.float64), kl, case.mask, case.kl_coef)
        expected = []
        for score, policy, ref in zip(case.scores, case.lists["logprobs"], case.lists["old_logprobs"], strict=True):
            expected.append([-case.kl_coef * estimator(p, r) for p, r in zip(policy, ref, strict=True)])
            expected[-1][-1] += score
        case.check(rewards, expected)


def test_gae_matches_the_double_sum(case):
    advantages, returns = [], []
    for rewards, values in zip(case.lists["rewards"], case.lists["values"], strict=True):
        n = len(rewards)
        deltas = [rewards[t] + (case.gamma * values[t + 1] if t + 1 < n else 0) - values[t] for t in range(n)]
        advantages.append([sum((case.gamma * case.lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)])
        returns.append([advantage + value for advantage, value in zip(advantages[-1], values, strict=True)])
    result = ppo.gae(case.batch["rewards"], case.batch["values"], case.mask, case.gamma, case.lam)
    case.check(result[0], advantages)
    case.check(result[1], returns)


def test_policy_loss_matches(case):
    losses, gradients, clips, kls = [], [], [], []
    for new, old, advantage in zip(*map(case.flat, ("logprobs", "old_logprobs", "advantages")), strict=True):
        ratio = math.exp(new) / math.exp(old)
        low, high = 1 - case.clip_range, 1 + case.clip_range
        clipped = (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
        losses.append(-advantage * ((high if ratio > high else low) if clipped else ratio))
        gradients.append(0 if clipped else -advantage * ratio)
        clips.append(clipped)
        kls.append(ratio - 1 - (new - old))
    logprobs = case.batch["logprobs"].requires_grad_()
    result = ppo.policy_loss(logprobs, case.batch["old_logprobs"], case.batch["advantages"], case.mask, case.clip_range)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    for got, expected in zip(result, (losses, clips, kls), strict=True):
        assert got.item() == pytest.approx(np.mean(expected), rel=1e-10, abs=1e-12)
    case.check(gradient, [np.array(gradients) / len(losses)])


def test_value_loss_matches(case):
    losses, gradients, clips = [], [], []
    for value, old, target in zip(*map(case.flat, ("values", "old_values", "returns")), strict=True):
        nearest = min(max(value, old - case.clip_range), old + case.clip_range)
        clipped = abs(nearest - target) > abs(value - target)
        losses.append(0.5 * ((nearest if clipped else value) - target) ** 2)
        gradients.append(0 if clipped else value - target)
        clips.append(clipped)
    values = case.batch["values"].requires_grad_()
    result = ppo.value_loss(values, case.batch["old_values"], case.batch["returns"], case.mask, case.clip_range)
    (gradient,) = torch.autograd.grad(result.loss, values)
    for got, expected in zip(result, (losses, clips), strict=True):
        assert got.item() == pytest.approx(np.mean(expected), rel=1e-10, abs=1e-12)
    case.check(gradient, [np.array(gradients) / len(losses)])


# ---------------------------------------------------------------- padding, dtypes, errors


def run_everything(case: Case, dtype: torch.dtype, left: int, right: int) -> list[torch.Tensor]:
    """Every result and gradient of one update on a batch with extra columns of nan, cut back to T columns."""

    def pad(tensor, fill):
        return torch.nn.functional.pad(tensor, (left, right), value=fill)

    width, mask = case.mask.shape[1], pad(case.mask, False)
    tensors = {name: pad(tensor.detach().to(dtype), NAN) for name, tensor in case.batch.items()}
    logprobs, values = tensors["logprobs"].requires_grad_(), tensors["values"].requires_grad_()
    kl = ppo.kl_penalty(logprobs.detach(), tensors["old_logprobs"], "k3")
    rewards = ppo.token_rewards(torch.tensor(case.scores, dtype=dtype), kl, mask, case.kl_coef)
    advantages, returns = ppo.gae(rewards, values, mask, case.gamma, case.lam)
    whitened = ppo.masked_whiten(advantages, mask)
    policy = ppo.policy_loss(logprobs, tensors["old_logprobs"], whitened, mask, case.clip_range)
    value = ppo.value_loss(values, tensors["old_values"], returns, mask, case.clip_range)
    (policy.loss + value.loss).backward()
    columns = [rewards, advantages, returns, whitened, logprobs.grad, values.grad]
    outside = torch.cat([torch.cat([c[:, :left], c[:, left + width :]], dim=1) for c in columns], dim=1)
    assert (outside == 0).all()
    inside = [c[:, left : left + width] for c in columns]
    return [result.detach() for result in [*inside, *policy, *value]]


@pytest.mark.parametrize(("left", "right"), [(0, 1), (0, 9), (3, 0), (2, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_more_padding_changes_nothing(seed, left, right):
    case = Case(seed)
    plain = run_everything(case, torch.float64, 0, 0)
    assert_close(run_everything(case, torch.float64, left, right), plain, rtol=1e-12, atol=1e-12)


def test_no_nan_inside_the_backward_pass(case):
    """Anomaly mode, which users turn on to find a nan of their own, must not stop at one that padding made."""
    logprobs, values = case.batch["logprobs"].requires_grad_(), case.batch["values"].requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        ppo.policy_loss(logprobs, case.batch["old_logprobs"], case.batch["advantages"], case.mask, 0.2).loss.backward()
        ppo.value_loss(values, case.batch["old_values"], case.batch["returns"], case.mask, 0.2).loss.backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("seed", range(5))
def test_dtypes(seed, dtype, tolerance):
    """float32 and bf16 give their own dtype back, and about the float64 numbers (bf16 has 8 bits)."""
    case = Case(seed)
    for result, exact in zip(run_everything(case, dtype, 0, 2), run_everything(case, torch.float64, 0, 2), strict=True):
        assert result.dtype == dtype
        assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


BT, MASK, EMPTY = torch.zeros(2, 3), mask_of("110", "100"), mask_of("000", "000")
HALF_EMPTY = mask_of("110", "000")
WIDE, FLAT = torch.zeros(2, 4), torch.zeros(3)  # FLAT would broadcast against [2, 3]
ERRORS = {
    "mean of nothing": (lambda: ppo.masked_mean(BT, EMPTY), r"\[2, 3\] is all False"),
    "mean, shape": (lambda: ppo.masked_mean(FLAT, MASK), r"x has shape \[3\].* \[2, 3\]"),
    "mean, integer mask": (lambda: ppo.masked_mean(BT, MASK.long()), "must be bool"),
    "whiten nothing": (lambda: ppo.masked_whiten(BT, EMPTY), r"\[2, 3\] is all False"),
    "whiten, shape": (lambda: ppo.masked_whiten(WIDE, MASK), "x has shape"),
    "kl, shape": (lambda: ppo.kl_penalty(BT, FLAT, "k1"), r"logprobs has shape \[2, 3\].* \[3\]"),
    "kl, kind": (lambda: ppo.kl_penalty(BT, BT, "kl"), '"k1", "k2", "k3", got \'kl\''),
    "rewards, empty row": (lambda: ppo.token_rewards(torch.zeros(2), BT, HALF_EMPTY, 0.1), r"rows \[1\]"),
    "rewards, kl": (lambda: ppo.token_rewards(torch.zeros(2), FLAT, MASK, 0.1), "kl has shape"),
    "rewards, scores of another batch": (lambda: ppo.token_rewards(torch.zeros(1), BT, MASK, 0.1), "scores has shape"),
    "rewards, scores [B, 1]": (lambda: ppo.token_rewards(torch.zeros(2, 1), BT, MASK, 0.1), "scores has shape"),
    "gae, empty rows": (lambda: ppo.gae(BT, BT, EMPTY, 1, 1), r"rows \[0, 1\]"),
    "gae, rewards": (lambda: ppo.gae(FLAT, BT, MASK, 1, 1), "rewards has shape"),
    "gae, values": (lambda: ppo.gae(BT, WIDE, MASK, 1, 1), "values has shape"),
    "policy, nothing": (lambda: ppo.policy_loss(BT, BT, BT, EMPTY, 0.2), "all False"),
    "policy, logprobs": (lambda: ppo.policy_loss(FLAT, BT, BT, MASK, 0.2), "logprobs has shape"),
    "policy, old": (lambda: ppo.policy_loss(BT, FLAT, BT, MASK, 0.2), "old_logprobs has shape"),
    "policy, advantages": (lambda: ppo.policy_loss(BT, BT, BT[:, :1], MASK, 0.2), "advantages has shape"),
    "value, nothing": (lambda: ppo.value_loss(BT, BT, BT, EMPTY, 0.2), "all False"),
    "value, values": (lambda: ppo.value_loss(FLAT, BT, BT, MASK, 0.2), "values has shape"),
    "value, old": (lambda: ppo.value_loss(BT, FLAT, BT, MASK, 0.2), "old_values has shape"),
    "value, returns": (lambda: ppo.value_loss(BT, BT, BT[:1], MASK, 0.2), "returns has shape"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_imports_torch_and_nothing_else():
    nodes = list(ast.walk(ast.parse(Path(ppo.__file__).read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names == {"torch", "typing"}
