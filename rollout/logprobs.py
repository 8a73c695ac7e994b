"""Log-probs, values and entropy of replies under the distribution that they were sampled from.

Shapes: B replies, L tokens of prompt + reply, T reply tokens, V vocabulary, N real reply tokens of all rows in one list.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lora.heads import HiddenStateFn, state_values
from rollout.batch import Batch, TokenStatistics
from rollout.distribution import (
    Sampling,
    entropies,
    is_plain,
    logit_rows,
    output_head,
    sampling_logits,
    scale_logits,
    tile_logits,
    vocabulary_tiles,
)


class _KnownGradient(torch.autograd.Function):
    """y [N], and dy/dx [N, H] for x [N, H], of which each row makes one number."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, results: Tensor, grad_states: Tensor) -> Tensor:
        ctx.save_for_backward(grad_states)
        ctx.dtype = states.dtype
        return results.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (grad_states,) = ctx.saved_tensors
        return (gradient[:, None] * grad_states).to(ctx.dtype), None, None


@torch.no_grad()
def tiled_logprobs(
    head: nn.Linear,
    states: Tensor,
    tokens: Tensor,
    process_logits: Callable[[Tensor, slice], Tensor],
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-prob of each token [N], entropy of its distribution [N], and with_gradient the log-prob's derivative [N, H].

    The distribution is the softmax of process_logits(logits, tile), which works on each logit alone: logits are [N, C], of
    the tokens of `tile`.  states: [N, H]; tokens: int64 [N].

    The logits [N, V] never exist.  As in attention that goes through the keys in blocks (Dao et al. 2022), sums over the
    vocabulary are kept relative to the largest logit so far.  With z the processed logit, y the plain one, p = softmax(z):
    d log p(t) / d state = dz(t)/dy(t) w(t) - sum over v of p(v) dz(v)/dy(v) w(v), where w(v) is row v of the embedding.
    """
    least = torch.finfo(torch.float32).min  # in the place of -inf, which has no product with 0
    max_logit = torch.full(tokens.shape, least, device=states.device)
    # z(t); sums of exp(z - max) and of z exp(z - max)
    token_logit, sum_exp, sum_exp_logit = (torch.zeros_like(max_logit) for _ in range(3))
    token_slope = torch.ones_like(max_logit)
    grad_states = torch.zeros(states.shape, device=states.device) if with_gradient else None
    for tile in vocabulary_tiles(states.device, len(states), head.weight.shape[0]):
        plain = tile_logits(head, states, tile)
        with torch.set_grad_enabled(with_gradient):
            processed = process_logits(plain.requires_grad_(with_gradient), tile)
        by_plain = None
        if with_gradient and processed is not plain:
            (by_plain,) = torch.autograd.grad(processed, plain, torch.ones_like(processed))
        processed = processed.detach()

        column = (tokens - tile.start).clamp(0, processed.shape[1] - 1)[:, None]
        is_here = (tokens >= tile.start) & (tokens < tile.stop)
        token_logit = torch.where(is_here, processed.gather(1, column).squeeze(1), token_logit)

        old_max_logit, max_logit = max_logit, torch.maximum(max_logit, processed.amax(1))
        kept, weights = (old_max_logit - max_logit).exp(), (processed - max_logit[:, None]).exp_()
        sum_exp = sum_exp * kept + weights.sum(1)
        # not vecdot(): see `entropies`
        sum_exp_logit = sum_exp_logit * kept + processed.clamp(min=least).mul_(weights).sum(1)
        if with_gradient:
            if by_plain is not None:
                token_slope = torch.where(is_here, by_plain.gather(1, column).squeeze(1).float(), token_slope)
                weights *= by_plain
            grad_states = grad_states * kept[:, None] + weights.to(plain.dtype) @ head.weight[tile]
    if with_gradient:
        grad_states = token_slope[:, None] * head.weight[tokens] - grad_states / sum_exp[:, None]
    # differences of logits first: they are far smaller than the logits, and so is the rounding
    return (token_logit - max_logit) - sum_exp.log(), (max_logit - sum_exp_logit / sum_exp) + sum_exp.log(), grad_states


def logprobs_fn(batch: Batch, sampling: Sampling, with_values: bool) -> HiddenStateFn:
    """Function that gives the TokenStatistics of `batch`; the entropy has no gradient.

    Only real reply positions reach the output embedding, and the logits of all of them never exist at once: a frozen
    embedding is gone through in tiles of the vocabulary, another one with few reply positions at a time.
    """

    def function(base: PreTrainedModel, hidden: Tensor) -> TokenStatistics:
        rows, steps = batch.response_mask.nonzero(as_tuple=True)  # [N], [N]
        before = batch.query_lengths[rows] + steps - 1  # the position that predicts the token
        states = hidden[rows, before]  # [N, H]
        tokens = batch.input_ids[rows, before + 1]  # [N]
        head = output_head(base)
        vocabulary = head.weight.shape[0]
        first_seen = _first_seen(batch, vocabulary) if sampling.repetition_penalty != 1 else None  # [B, V]

        def process_logits(logits: Tensor, tile: slice, part: slice = slice(None)) -> Tensor:  # [n, C], [n, C]
            seen = None if first_seen is None else first_seen[rows[part], tile] < steps[part, None]
            return sampling_logits(scale_logits(base, logits), seen, steps[part] == 0, sampling, tile.start)

        def chunk_statistics(part: slice, states: Tensor) -> tuple[Tensor, Tensor]:  # [n, H] -> [n], [n]
            logprobs = process_logits(head(states), slice(0, vocabulary), part).log_softmax(-1)  # [n, V]
            entropy = entropies(logprobs.detach(), logprobs.detach().exp())
            return logprobs.gather(1, tokens[part, None]).squeeze(1), entropy

        if is_plain(head):
            needs_gradient = torch.is_grad_enabled()
            logprobs, entropy, grad_states = tiled_logprobs(
                head, states.detach(), tokens, process_logits, needs_gradient
            )
            if needs_gradient:
                logprobs = _KnownGradient.apply(states, logprobs, grad_states)
        else:
            chunk = logit_rows(states.device, vocabulary)
            parts = [slice(start, start + chunk) for start in range(0, len(tokens), chunk)]
            # Kept, the logits would be the largest tensor of the update, so they are computed again in the backward pass.
            results = [checkpoint(chunk_statistics, part, states[part], use_reentrant=False) for part in parts]
            logprobs, entropy = (torch.cat(column) for column in zip(*results, strict=True))

        def spread(values: Tensor) -> Tensor:  # [N] -> [B, T]
            return values.new_zeros(batch.response_mask.shape).index_put((rows, steps), values)

        values = spread(state_values(base, states)) if with_values else None
        return TokenStatistics(spread(logprobs), values, spread(entropy))

    return function


def logit_bytes(base: PreTrainedModel, tokens: int, training: bool, device: torch.device) -> int:
    """The most that `logprobs_fn` holds of the logits of N reply tokens, and of what it makes of them: for the memory plan.

    Of a tile [N, C] five float32 tensors in `tiled_logprobs`: the model's logits, those of the sampler, the derivative of
    the one by the other, the distance to the largest, and a bounded copy.  In training beside them three tensors [N, H] for
    the derivative of each log-prob by its hidden state.

    An output embedding that is trained or not plain: five tensors [n, V] of the n tokens that go through it at a time
    (logits, log-probs, probabilities, bounded log-probs, logits of the model), with gradients one more.
    """
    head = output_head(base)
    vocabulary, width = head.weight.shape
    if is_plain(head):
        columns = max(tile.stop - tile.start for tile in vocabulary_tiles(device, tokens, vocabulary))
        return 4 * (5 * tokens * columns + 3 * training * tokens * width)
    return 4 * (5 + training) * min(tokens, logit_rows(device, vocabulary)) * vocabulary


def values_fn(batch: Batch) -> HiddenStateFn:
    """Function that gives the values [B, T] of `batch` alone, for a critic that has an adapter of its own."""

    def function(base: PreTrainedModel, hidden: Tensor) -> Tensor:
        rows, steps = batch.response_mask.nonzero(as_tuple=True)  # [N], [N]
        values = state_values(base, hidden[rows, batch.query_lengths[rows] + steps - 1])
        return values.new_zeros(batch.response_mask.shape).index_put((rows, steps), values)

    return function


def _first_seen(batch: Batch, vocabulary: int) -> Tensor:
    """Where each token was first seen, int32 [B, V]: -1 in the prompt, t as reply token t, else a huge number."""
    never = torch.iinfo(torch.int32).max
    length = batch.input_ids.shape[1]
    position = torch.arange(length, device=batch.input_ids.device).expand(len(batch.input_ids), -1)
    step = (position - batch.query_lengths[:, None]).clamp(min=-1).int()
    step = step.masked_fill(batch.attention_mask == 0, never)
    seen = torch.full((len(step), vocabulary), never, dtype=torch.int32, device=step.device)
    return seen.scatter_reduce(1, batch.input_ids, step, "amin")
