"""Learning rates of the values: head and critic in groups of their own, and a policy that waits for them at the start."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lora.adapters import CRITIC, is_of

OF_VALUES = "of_values"  # in the optimizer's groups, and with them in its checkpoints


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float) -> None:
    """Put value head and critic into groups of their own, behind the policy's, with this learning rate."""
    of_values = {id(weight) for name, weight in model.named_parameters() if ".v_head." in name or is_of(name, CRITIC)}
    groups = []
    for values in (False, True):
        for group in optimizer.param_groups:
            weights = [weight for weight in group["params"] if (id(weight) in of_values) == values]
            rate = learning_rate if values else group["lr"]
            if weights:
                groups.append({**group, "params": weights, "lr": rate, OF_VALUES: values})
    optimizer.param_groups[:] = groups


def let_policy_wait(schedule: LambdaLR, iterations: int) -> LambdaLR:
    """The schedule with a rate of 0 for the policy in the first iterations; `split_groups` has to come before it."""

    def late(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda iteration: factor(iteration) if iteration >= iterations else 0.0

    groups = zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True)
    factors = [factor if group[OF_VALUES] else late(factor) for group, factor in groups]
    return LambdaLR(schedule.optimizer, factors)
