"""PPO arithmetic as pure tensor functions. No model, tokenizer, Trainer or device code lives here.

Shapes: B = replies in the batch, T = reply tokens (the prompt is already sliced off). Every mask is bool [B, T], True
on real tokens. Padding may hold anything, nan and inf included: it is overwritten BEFORE any nonlinear step, because a
product with a zero mask would keep the nan, in the value and in the gradient.

A result has the dtype of its inputs. Prefer float32: bf16 works, but keeps about three digits of a log-ratio.
Every function raises ValueError where shapes differ (nothing is broadcast) or a mask is not bool.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    loss: Tensor  # [] scalar, carries the gradient
    clip_fraction: Tensor  # [] share of real tokens whose clipped term won
    approx_kl: Tensor  # [] k3 estimate of KL(rollout policy || current policy)


class ValueLoss(NamedTuple):
    loss: Tensor  # [] scalar, carries the gradient
    clip_fraction: Tensor  # [] share of real tokens whose clipped term won


def _check_shapes(mask: Tensor, **tensors: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True on real tokens), got {mask.dtype}")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but the mask has {list(mask.shape)}")


def _check_no_empty_row(mask: Tensor) -> None:
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"every reply needs at least one real token, but the mask of rows {empty} is all False")


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the real tokens of the whole batch, a scalar.

    x: float [B, T]; mask: bool [B, T]. ValueError where the mask is all False: an epsilon in the denominator would turn
    that bug into a plausible 0.
    """
    _check_shapes(mask, x=x)
    if not mask.any():
        raise ValueError(f"masked_mean of nothing: the mask of shape {list(mask.shape)} is all False")
    return x.masked_fill(~mask, 0).sum() / mask.sum()


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale the real tokens to variance 1, and to mean 0 unless shift_mean=False keeps the mean. [B, T], 0 on padding.

    x: float [B, T]; mask: bool [B, T]. (x - mean) / sqrt(var + 1e-8) with the population variance, as OpenAI's
    lm-human-preferences does: shift for advantages, none for rewards, whose zero has a meaning.
    ValueError on an all-False mask.
    """
    mean = masked_mean(x, mask)
    centered = (x - mean).masked_fill(~mask, 0)
    whitened = centered / torch.sqrt(masked_mean(centered.square(), mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) on tokens that the policy sampled. [B, T]

    logprobs, ref_logprobs: float [B, T] of the sampled tokens. With d = logprobs - ref_logprobs (Schulman 2020,
    http://joschu.net/blog/kl-approx.html): "k1" = d is unbiased, "k2" = d^2 / 2 has the right gradient as a loss,
    "k3" = exp(-d) - 1 + d is unbiased, of low variance and never negative. ValueError for another kind.
    Without a mask, what comes out on padding is as arbitrary as what went in: the functions below ignore it.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"logprobs has shape {list(logprobs.shape)}, but ref_logprobs has {list(ref_logprobs.shape)}")
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d  # exp(-d) - 1 would round away the whole estimate where d is small
    raise ValueError(f'kind must be one of "k1", "k2", "k3", got {kind!r}')


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the score on the last real token. [B, T], 0 on padding.

    Ziegler et al. 2019 (arXiv:1909.08593), eq. 2, spread over the tokens.
    scores: float [B]; kl: float [B, T]; mask: bool [B, T], real tokens contiguous anywhere in a row.
    ValueError where a row has no real token.
    """
    _check_shapes(mask, kl=kl)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores has shape {list(scores.shape)}, but a mask of {list(mask.shape)} needs one per row")
    _check_no_empty_row(mask)
    positions = torch.arange(mask.shape[1], device=mask.device)  # [T]
    last = (positions * mask).amax(dim=1, keepdim=True)  # [B, 1]
    rewards = (-kl_coef * kl).masked_fill(~mask, 0)
    return torch.where(positions == last, rewards + scores[:, None], rewards)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, (advantages, returns), both [B, T], 0 on padding and without gradient.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1} (Schulman et al. 2016,
    arXiv:1506.02438, eq. 16); returns = A + V. A reply ends with its last real token: V and A after it are 0.

    rewards, values: float [B, T]; mask: bool [B, T], real tokens contiguous. ValueError where a row has no real token.
    """
    _check_shapes(mask, rewards=rewards, values=values)
    _check_no_empty_row(mask)
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # [B]
    reversed_advantages = []
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        reversed_advantages.append(next_advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)  # [B, T]
    advantages = advantages.masked_fill(~mask, 0)  # padding on the left was reached from the first real token
    return advantages, advantages + values


def _group_rewards(rewards: Tensor, mask: Tensor, replies: int) -> Tensor:
    """Reward of each whole reply, by prompt: [B / replies, replies].  ValueError where a group is no group."""
    _check_shapes(mask, rewards=rewards)
    _check_no_empty_row(mask)
    if replies < 2 or len(mask) % replies:
        raise ValueError(
            f"{len(mask)} rows in groups of {replies}: a group needs two replies or more, and all are whole"
        )
    return rewards.masked_fill(~mask, 0).sum(dim=1).view(-1, replies)


@torch.no_grad()
def rloo(rewards: Tensor, mask: Tensor, replies: int) -> Tensor:
    """Leave-one-out advantages: A_i = R_i - mean of R_j over the other replies to the prompt.  [B, T], 0 on padding.

    Ahmadian et al. 2024 (arXiv:2402.14740), eq. 9, where R is the reward of the whole reply; each of its tokens gets A.
    rewards: float [B, T]; mask: bool [B, T]; rows i * replies to (i + 1) * replies - 1 answer the same prompt.
    ValueError where a row has no real token, or the rows do not make groups of at least 2.
    """
    whole = _group_rewards(rewards, mask, replies)
    others = (whole.sum(dim=1, keepdim=True) - whole) / (replies - 1)
    return (whole - others).view(-1, 1).expand(mask.shape).masked_fill(~mask, 0)


@torch.no_grad()
def grpo(rewards: Tensor, mask: Tensor, replies: int, divide_by_std: bool = True) -> Tensor:
    """Advantages relative to the group: A_i = (R_i - mean of R) / (std of R + 1e-4).  [B, T], 0 on padding.

    Shao et al. 2024 (arXiv:2402.03300), section 4.1.2, with the deviation of a sample (n - 1) and the 1e-4 of TRL's
    GRPOTrainer.  Not divided it is Dr. GRPO's (Liu et al. 2025, arXiv:2503.20783), which does not give groups of nearly
    equal rewards the weight of the others.  Arguments and errors as in `rloo`.
    """
    whole = _group_rewards(rewards, mask, replies)
    centered = whole - whole.mean(dim=1, keepdim=True)
    if divide_by_std:
        centered = centered / (whole.std(dim=1, keepdim=True) + 1e-4)
    return centered.view(-1, 1).expand(mask.shape).masked_fill(~mask, 0)


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of the k3 estimate of KL(policy || reference), with its gradient by logprobs. []

    The term that GRPO subtracts in its objective: Shao et al. 2024 (arXiv:2402.03300), eq. 4.  Its gradient by a log-prob is
    1 - exp(ref - logprob): none where the two agree.
    logprobs, ref_logprobs: float [B, T]; mask: bool [B, T].  ValueError on an all-False mask.
    """
    _check_shapes(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = (logprobs - ref_logprobs.detach()).masked_fill(~mask, 0).clamp(-20, 20)  # as in `policy_loss`
    return masked_mean(kl_penalty(log_ratio, torch.zeros_like(log_ratio), "k3"), mask)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> PolicyLoss:
    """Clipped surrogate, eq. 7 of Schulman et al. 2017 (arXiv:1707.06347), negated so that we minimise it.

    logprobs, old_logprobs, advantages: float [B, T]; mask: bool [B, T]. Only logprobs carries a gradient.
    ValueError on an all-False mask.
    """
    _check_shapes(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(~mask, 0)
    # exp() overflows float32 at 89, and one such token makes the loss inf and the weights nan. A log-ratio of 20 is far
    # outside any clip range, so the clamp (as in verl and OpenRLHF) keeps the numbers finite and changes nothing else.
    log_ratio = log_ratio.clamp(-20, 20)
    ratio = log_ratio.exp()
    advantages = advantages.detach().masked_fill(~mask, 0)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)  # pessimistic bound: the larger loss counts
    with torch.no_grad():
        clip_fraction = masked_mean((clipped > unclipped).to(loss.dtype), mask)
        approx_kl = masked_mean(torch.expm1(log_ratio) - log_ratio, mask)  # k3: the old policy sampled the tokens
    return PolicyLoss(loss, clip_fraction, approx_kl)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> ValueLoss:
    """0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), where c = clip_range.

    The clipped value loss of OpenAI's PPO: https://github.com/openai/baselines, ppo2/model.py.
    values, old_values, returns: float [B, T]; mask: bool [B, T]. Only values carries a gradient.
    ValueError on an all-False mask.
    """
    _check_shapes(mask, values=values, old_values=old_values, returns=returns)
    values = values.masked_fill(~mask, 0)
    old_values = old_values.detach().masked_fill(~mask, 0)
    returns = returns.detach().masked_fill(~mask, 0)
    unclipped = (values - returns).square()
    clipped = (values.clamp(old_values - clip_range, old_values + clip_range) - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask)
    with torch.no_grad():
        clip_fraction = masked_mean((clipped > unclipped).to(loss.dtype), mask)
    return ValueLoss(loss, clip_fraction)


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, batch_size: int) -> float:
    """The next KL coefficient: up where the measured KL is above its target, down where it is below.

    kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * batch_size / horizon): Ziegler et al. 2019 (arXiv:1909.08593),
    section 2.2, with the gain K written as in their code. kl and target: nats summed over a reply; batch_size and
    horizon: replies. A nan kl comes back as nan.
    """
    error = min(float(kl) / target - 1, 0.2)  # the error comes first in min() and max(): so a nan is not clipped away
    return kl_coef * (1 + max(error, -0.2) * batch_size / horizon)
