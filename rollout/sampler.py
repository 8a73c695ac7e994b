"""Sample a reply to each query from the distribution of rollout/distribution.py, with what the policy said of it.

Shapes: R replies that go on, V vocabulary, T reply tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from lora.heads import HiddenStateFn, last_token_index, state_values
from lora.sharding import is_sharded
from rollout.batch import TokenStatistics
from rollout.cache import new_cache
from rollout.distribution import Sampling, entropies, output_logits, sampling_logits
from utils.batching import pad_right
from utils.console import RunError


class NextToken(NamedTuple):
    """The next token of each of R replies, and what the model said of it."""

    tokens: Tensor  # int64 [R]
    logprobs: Tensor  # float32 [R]
    entropy: Tensor  # float32 [R], in nats
    values: Tensor | None  # float32 [R], of the state in front of the token


def next_token_fn(
    uniforms: Tensor,
    mask: Tensor,
    seen: Tensor | None,
    first: bool,
    sampling: Sampling,
    with_values: bool,
    copies: int = 1,
) -> HiddenStateFn:
    """Function that draws the next token of each row.

    uniforms: float64 [R], one number in [0, 1) a row picks its token from the cumulative distribution; mask: int64
    [R / copies, L] of the tokens in this pass, of which each row is drawn from `copies` times; seen: as in
    `sampling_logits`; first: whether these are the first tokens of their replies.
    """

    def function(base: PreTrainedModel, hidden: Tensor) -> NextToken:
        states = hidden[torch.arange(len(hidden), device=hidden.device), last_token_index(mask)]
        states = states.repeat_interleave(copies, 0)  # [R, H]
        is_first = torch.full(states.shape[:1], first, device=states.device)
        logprobs = sampling_logits(output_logits(base, states), seen, is_first, sampling).log_softmax(-1)  # [R, V]
        probabilities = logprobs.exp()
        tokens = logprobs.argmax(-1) if sampling.greedy else inverse_cumulative(probabilities, uniforms)
        entropy = entropies(logprobs, probabilities)
        tokens[~entropy.isfinite()] = sampling.stop_token_ids[0]  # no distribution: the reply ends, its log-prob is NaN
        values = state_values(base, states) if with_values else None
        return NextToken(tokens, logprobs.gather(1, tokens[:, None]).squeeze(1), entropy, values)

    return function


def inverse_cumulative(probabilities: Tensor, uniforms: Tensor, block: int = 256) -> Tensor:
    """The first token of each row at which the cumulative probability is above `uniforms` of the sum, int64 [R].

    probabilities: float32 [R, V], not necessarily of sum 1; uniforms: float64 [R] in [0, 1).  First the block of tokens is
    found, then the token in it: running sums of a whole vocabulary take long in float64, and lose its tail in float32.
    """
    blocks = nn.functional.pad(probabilities, (0, -probabilities.shape[1] % block)).unflatten(1, (-1, block))
    ends = blocks.sum(-1).cumsum(1, dtype=torch.float64)  # [R, blocks]
    target = (uniforms * ends[:, -1])[:, None]
    number = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)  # [R, 1]
    own = blocks.gather(1, number[..., None].expand(-1, -1, block)).squeeze(1)  # [R, block]
    inside = own.cumsum(1, dtype=torch.float64)
    # what rounding may not do: end in front of the block's first token, or behind its last one, where nothing is probable
    target = (target - ends.gather(1, number) + inside[:, -1:]).clamp(min=0)
    target = torch.minimum(target, inside[:, -1:] * (1 - 1e-15))
    return (number * block + torch.searchsorted(inside, target, right=True).clamp(max=block - 1)).squeeze(1)


def seed_of(*parts: int) -> int:
    """One number out of several, spread over 63 bits: seed, iteration and row must not fall on each other."""
    state = 0
    for part in parts:
        state = ((state ^ (part + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9) % 2**64
        state ^= state >> 31
    return state % 2**63


def uniform_streams(seeds: Sequence[int], length: int) -> Tensor:
    """For each seed its own stream of `length` numbers in [0, 1), float64 [B, length]."""
    streams = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(streams)


def everyone_done(done: bool, device: torch.device) -> bool:
    """Whether `done` is true in every process.  Each of them has to ask."""
    open_processes = torch.tensor(float(not done), device=device)
    torch.distributed.all_reduce(open_processes)
    return not open_processes


class Generated(NamedTuple):
    """Sampled replies, each up to and with a stop token, or `max_new_tokens` long without one."""

    ids: list[list[int]]
    statistics: "TokenStatistics"  # [B, T] of the sampler's own forward passes, T = tokens of the longest reply


def generate_ids(
    model: PreTrainedModel | PeftModel,
    queries: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Token ids of one reply for each query; see `generate_responses`.  Raises RunError where logits are NaN or infinite."""
    replies = generate_responses(model, queries, seeds, sampling, streamer)
    broken = int((~replies.statistics.logprobs.isfinite().all(1)).sum())
    if broken:
        raise RunError(
            f"NaN or infinity in the model's logits for {broken} of {len(queries)} prompts; check the adapter, or compute "
            "in float32 (--dtype float32)"
        )
    return replies.ids


@torch.no_grad()
def generate_responses(
    model: PreTrainedModel | PeftModel,
    queries: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
    with_values: bool = False,
) -> Generated:
    """One or more replies for each query, with what the policy said.

    The base needs `add_hidden_state_fn`, and for values a head.
    seeds: one number a reply; with several a query its replies are neighbours, and the query goes through the model once.
    The same query with the same seed gives the same reply in any batch and on any number of processes, up to the rounding of
    the forward pass.  A reply that has ended leaves the batch.  streamer: gets the prompt
    and then each token as soon as it is drawn, but no stop token, of one query only.  Logits that are NaN or infinite end a
    reply with a stop token and a log-prob of NaN.
    """
    device = next(model.parameters()).device
    count, copies, longest = len(seeds), len(seeds) // len(queries), sampling.max_new_tokens
    flipped, flipped_mask = pad_right([query[::-1] for query in queries], sampling.pad_token_id)
    ids, mask = flipped.flip(1).to(device), flipped_mask.flip(1).to(device)  # replies go on at the right edge
    uniforms = uniform_streams(seeds, longest).to(device)
    seen = None
    if sampling.repetition_penalty != 1:
        vocabulary = model.get_output_embeddings().weight.shape[0]
        seen = torch.zeros(len(ids), vocabulary, dtype=torch.int64, device=device).scatter_add(1, ids, mask).bool()
        seen = seen.repeat_interleave(copies, 0)
    cache = new_cache(model)
    if cache is None:  # whole rows each time: padded on the right, which no causal model sees
        ids, mask = (part.to(device) for part in pad_right(queries, sampling.pad_token_id))
        ids, mask, copies = ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0), 1
    tokens = torch.full((count, longest), sampling.pad_token_id, device=device)
    logprobs, entropy, values = (torch.zeros(count, longest, device=device) for _ in range(3))
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    rows = torch.arange(count, device=device)  # the replies that go on
    stops = torch.tensor(sampling.stop_token_ids, device=device)
    sharded, done = is_sharded(model), False
    if streamer is not None:
        streamer.put(ids.cpu())
    for step in range(longest):
        new_mask = mask[:, -ids.shape[1] :]
        draw = next_token_fn(uniforms[rows, step], new_mask, seen, step == 0, sampling, with_values, copies)
        drawn = model(input_ids=ids, attention_mask=mask, past_key_values=cache, hidden_state_fn=draw)
        if copies > 1:  # the queries have been read, and each reply goes on by itself
            cache.reorder_cache(torch.arange(len(queries), device=device).repeat_interleave(copies))
            mask, copies = mask.repeat_interleave(copies, 0), 1
        if not done:
            tokens[rows, step], logprobs[rows, step], entropy[rows, step] = drawn.tokens, drawn.logprobs, drawn.entropy
            if with_values:
                values[rows, step] = drawn.values
            lengths[rows] += 1
        on = (~torch.isin(drawn.tokens, stops)).nonzero().squeeze(1)
        if streamer is not None and not done and len(on):
            streamer.put(drawn.tokens.cpu())
        done = done or len(on) == 0
        if everyone_done(done, device) if sharded else done:
            break
        if done:  # a row whose tokens nobody reads, since the forward pass of the others needs this process
            on = torch.zeros(1, dtype=torch.int64, device=device)
        token = drawn.tokens[:, None]
        if seen is not None:
            seen = seen.scatter(1, token, True)
        if cache is None:
            end = mask.sum(1, keepdim=True)
            ids = nn.functional.pad(ids, (0, 1), value=sampling.pad_token_id).scatter(1, end, token)
            mask = nn.functional.pad(mask, (0, 1)).scatter(1, end, 1)
        else:
            ids, mask = token, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if len(on) < len(rows):
            rows, ids, mask = rows[on], ids[on], mask[on]
            seen = None if seen is None else seen[on]
            if cache is not None:
                cache.reorder_cache(on)  # all layers have it; batch_select_indices only those of attention
    if streamer is not None:
        streamer.end()
    width = int(lengths.max())
    replies = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    statistics = TokenStatistics(logprobs[:, :width], values[:, :width] if with_values else None, entropy[:, :width])
    return Generated(replies, statistics)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs
# ---------------------------------------------------------------------------------------------------------------------
