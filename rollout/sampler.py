"""Sample replies, and the log-probs of exactly the distribution that they were sampled from.

One function, `sampling_logits`, turns the model's raw logits into the distribution: repetition penalty, suppressed first
tokens, temperature.  The sampler and the log-probs of policy and reference all go through it, so the KL between them is
one between the distributions that really acted, and cannot be driven negative.

Shapes: B replies, L tokens of prompt + reply, T reply tokens, V vocabulary, N real reply tokens of all rows in one list.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from utils.adapters import Job
from utils.arguments import InputError, RunError
from utils.data import pad_right
from utils.sharding import is_sharded

# Logits held at once, in numbers.  On a CPU 16 MiB of float32, on a GPU, which needs more of them to be busy, 128 MiB.
LOGIT_CHUNK = {"cpu": 2**22, "cuda": 2**25}
# Rows of the output embedding that are multiplied with at once, at least.  A CPU takes no more: these weights and their
# logits stay in its cache, and a product with the whole embedding is half as fast.
TILE = 1024

# What a layer costs in a forward and backward pass before its first token, in floating-point operations: the time that
# starting some hundred small operations takes, at the rate of large ones.
PASS_OVERHEAD = {"cpu": 4e8, "cuda": 1e11}
# More tokens in a pass make a CPU no faster and need more memory, unless the model is so small that passes are dear.
PASS_TOKENS = {"cpu": 512, "cuda": 2**31}


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.  No top-k or top-p: PPO needs log-probs of the whole distribution, so all of it is sampled."""

    eos_token_id: int
    pad_token_id: int
    max_new_tokens: int
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    begin_suppress_tokens: tuple[int, ...] = ()
    greedy: bool = False  # always the likeliest token: for answers alone, the log-probs know nothing of it

    def __post_init__(self) -> None:
        numbers = (self.temperature, self.repetition_penalty, self.max_new_tokens)
        if not all(0 < number < math.inf for number in numbers):
            raise InputError(
                f"--temperature {self.temperature}, --repetition_penalty {self.repetition_penalty} and "
                f"--output_max_length {self.max_new_tokens} have to be above 0"
            )


def first_token_ban(words: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that --begin_suppress_tokens names; "eos" is EOS and padding, which would both make an empty reply."""
    if words == "none":
        return ()
    if words == "eos":
        return tuple(sorted({tokenizer.eos_token_id, tokenizer.pad_token_id}))
    ids = [word.strip() for word in words.split(",")]
    if not all(word.isdecimal() and int(word) < len(tokenizer) for word in ids):
        raise InputError(
            f"--begin_suppress_tokens {words}: give eos, none, or token ids below {len(tokenizer)} joined by commas"
        )
    return tuple(map(int, ids))


class Batch(NamedTuple):
    """Prompts with their replies, padded on the right."""

    input_ids: Tensor  # int64 [B, L]: query, response, padding
    attention_mask: Tensor  # int64 [B, L]
    query_lengths: Tensor  # int64 [B]
    response_mask: Tensor  # bool [B, T], True on real reply tokens, EOS included

    def rows(self, index: Tensor) -> "Batch":
        """The rows `index`, with the padding cut to the longest of them."""
        response_mask = self.response_mask[index]
        response_mask = response_mask[:, : int(response_mask.sum(1).max())]
        length = int(self.attention_mask[index].sum(1).max())
        ids, mask = self.input_ids[index, :length], self.attention_mask[index, :length]
        return Batch(ids, mask, self.query_lengths[index], response_mask)

    def responses(self) -> list[list[int]]:
        """Reply ids of each row, without padding."""
        lengths = self.response_mask.sum(1).tolist()
        rows = zip(self.input_ids.tolist(), self.query_lengths.tolist(), lengths, strict=True)
        return [ids[start : start + length] for ids, start, length in rows]


class ReplyStatistics(NamedTuple):
    """What the policy says of each reply token.  0 on padding."""

    logprobs: Tensor  # float [B, T]
    values: Tensor | None  # float [B, T], value of the state in front of the token
    entropy: Tensor  # float [B, T], of the distribution the token was drawn from, in nats


def split_by_length(lengths: Sequence[int], overhead: float, most_rows: int, most_tokens: int) -> list[list[int]]:
    """Row numbers in parts of similar length: the cheapest cut of the rows, sorted by length, into forward passes.

    A pass costs its rows times its longest row, padding included, plus `overhead`, all in tokens.  Every part has at most
    `most_rows` rows, and at most `most_tokens` tokens unless one row has more.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    costs, starts = [0.0], [0]  # of the cheapest cut of the first n rows: its cost, and where its last part starts
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        widest = min(most_rows, max(1, most_tokens // longest), end)
        choices = [(costs[end - rows] + rows * longest + overhead, end - rows) for rows in range(1, widest + 1)]
        cost, start = min(choices)
        costs.append(cost)
        starts.append(start)
    parts, end = [], len(order)
    while end:
        parts.append(order[starts[end] : end])
        end = starts[end]
    return parts[::-1]


def pass_limits(base: PreTrainedModel, device: torch.device) -> tuple[float, int]:
    """`overhead` and `most_tokens` of `split_by_length` for this model on this device.

    A layer of n weights takes 4n operations a token, forward and backward; the weights themselves are frozen.
    """
    layers = base.config.get_text_config().num_hidden_layers
    embedding = base.get_input_embeddings().weight.numel()  # looked up, not multiplied with
    layer_size = (sum(parameter.numel() for parameter in base.base_model.parameters()) - embedding) / layers
    overhead = PASS_OVERHEAD[device.type] / (4 * layer_size)
    return overhead, max(PASS_TOKENS[device.type], int(8 * overhead))


def make_batch(queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Join ragged queries and responses, each with at least one token, into a Batch."""
    rows = [[*query, *response] for query, response in zip(queries, responses, strict=True)]
    ids, mask = pad_right(rows, pad_id)
    _, response_mask = pad_right(responses, pad_id)
    return Batch(ids, mask, torch.tensor([len(query) for query in queries]), response_mask.bool())


def sampling_logits(
    logits: Tensor, seen: Tensor | None, is_first: Tensor, sampling: Sampling, first_column: int = 0
) -> Tensor:
    """Logits of the distribution that a token is sampled from, float32 [N, C].  Each comes from one logit alone.

    logits: [N, C] from the model, of the C tokens from `first_column` on; seen: bool [N, C], True on tokens that the prompt
    or the reply so far holds (None where there is no repetition penalty); is_first: bool [N], True where the token is the
    first of its reply.
    The order is that of transformers: repetition penalty (Keskar et al. 2019, eq. 2), suppression, temperature.
    """
    logits = logits.float()
    if seen is not None:
        penalised = torch.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    columns = [token - first_column for token in sampling.begin_suppress_tokens]
    columns = [column for column in columns if 0 <= column < logits.shape[-1]]
    if columns and is_first.any():  # else a pass over all logits for nothing
        banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        banned[columns] = True
        logits = logits.masked_fill(is_first.unsqueeze(-1) & banned, -torch.inf)
    return logits if sampling.temperature == 1 else logits / sampling.temperature


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """The next token of each of R replies, and what the model said of it."""

    tokens: Tensor  # int64 [R]
    logprobs: Tensor  # float32 [R]
    entropy: Tensor  # float32 [R], in nats
    values: Tensor | None  # float32 [R], of the state in front of the token


def draw_job(uniforms: Tensor, seen: Tensor | None, first: bool, sampling: Sampling, with_values: bool) -> Job:
    """Job that draws the next token of each row.

    uniforms: float64 [R], one number in [0, 1) a row picks its token from the cumulative distribution; seen: as in
    `sampling_logits`; first: whether these are the first tokens of their replies.
    """

    def job(base: PreTrainedModel, hidden: Tensor) -> Drawn:
        states = hidden[:, -1]  # [R, H]
        is_first = torch.full(states.shape[:1], first, device=states.device)
        logprobs = sampling_logits(output_logits(base, states), seen, is_first, sampling).log_softmax(-1)  # [R, V]
        probabilities = logprobs.exp()
        tokens = logprobs.argmax(-1) if sampling.greedy else inverse_cumulative(probabilities, uniforms)
        entropy = entropies(logprobs, probabilities)
        tokens[~entropy.isfinite()] = sampling.eos_token_id  # no distribution: the reply ends, and its log-prob is NaN
        values = state_values(base, states) if with_values else None
        return Drawn(tokens, logprobs.gather(1, tokens[:, None]).squeeze(1), entropy, values)

    return job


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


def uniform_streams(seeds: Sequence[int], length: int) -> Tensor:
    """For each seed its own stream of `length` numbers in [0, 1), float64 [B, length]."""
    streams = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(streams)


def everyone_done(done: bool, device: torch.device) -> bool:
    """Whether `done` is true in every process.  Each of them has to ask."""
    open_processes = torch.tensor(float(not done), device=device)
    torch.distributed.all_reduce(open_processes)
    return not open_processes


class Replies(NamedTuple):
    """Sampled replies, each up to and with EOS, or `max_new_tokens` long without one."""

    ids: list[list[int]]
    statistics: "ReplyStatistics"  # [B, T] of the sampler's own forward passes, T = tokens of the longest reply


def sample_replies(
    model: PreTrainedModel | PeftModel,
    queries: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Token ids of one reply for each query; see `draw_replies`.  Raises RunError where logits are NaN or infinite."""
    replies = draw_replies(model, queries, seeds, sampling, streamer)
    broken = int((~replies.statistics.logprobs.isfinite().all(1)).sum())
    if broken:
        raise RunError(
            f"NaN or infinity in the model's logits for {broken} of {len(queries)} prompts; check the adapter, or compute "
            "in float32 (--dtype float32)"
        )
    return replies.ids


@torch.no_grad()
def draw_replies(
    model: PreTrainedModel | PeftModel,
    queries: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
    with_values: bool = False,
) -> Replies:
    """One reply for each query, with what the policy said.  The base needs `enable_jobs`, and a value head for the values.

    seeds: one number a query; the same query with the same seed gives the same reply in any batch and on any number of
    processes, up to the rounding of the forward pass.  A reply that has ended leaves the batch.  streamer: gets the prompt
    and then each token as soon as it is drawn, of one query only.  Logits that are NaN or infinite end a reply with EOS and
    a log-prob of NaN.
    """
    device = next(model.parameters()).device
    count, longest = len(queries), sampling.max_new_tokens
    flipped, flipped_mask = pad_right([query[::-1] for query in queries], sampling.pad_token_id)
    ids, mask = flipped.flip(1).to(device), flipped_mask.flip(1).to(device)  # replies go on at the right edge
    uniforms = uniform_streams(seeds, longest).to(device)
    seen = None
    if sampling.repetition_penalty != 1:
        vocabulary = model.get_output_embeddings().weight.shape[0]
        seen = torch.zeros(count, vocabulary, dtype=torch.int64, device=device).scatter_add(1, ids, mask).bool()
    cache = DynamicCache(config=model.config)
    tokens = torch.full((count, longest), sampling.pad_token_id, device=device)
    logprobs, entropy, values = (torch.zeros(count, longest, device=device) for _ in range(3))
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    rows = torch.arange(count, device=device)  # the replies that go on
    sharded, done = is_sharded(model), False
    if streamer is not None:
        streamer.put(ids.cpu())
    for step in range(longest):
        job = draw_job(uniforms[rows, step], seen, step == 0, sampling, with_values)
        drawn = model(input_ids=ids, attention_mask=mask, past_key_values=cache, job=job)
        if not done:
            tokens[rows, step], logprobs[rows, step], entropy[rows, step] = drawn.tokens, drawn.logprobs, drawn.entropy
            if with_values:
                values[rows, step] = drawn.values
            lengths[rows] += 1
            if streamer is not None:
                streamer.put(drawn.tokens.cpu())
        on = (drawn.tokens != sampling.eos_token_id).nonzero().squeeze(1)
        done = done or len(on) == 0
        if everyone_done(done, device) if sharded else done:
            break
        if done:  # a row whose tokens nobody reads, since the forward pass of the others needs this process
            on = torch.zeros(1, dtype=torch.int64, device=device)
        ids, mask = drawn.tokens[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if seen is not None:
            seen = seen.scatter(1, ids, True)
        if len(on) < len(rows):
            rows, ids, mask = rows[on], ids[on], mask[on]
            seen = None if seen is None else seen[on]
            cache.batch_select_indices(on)
    if streamer is not None:
        streamer.end()
    width = int(lengths.max())
    replies = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    statistics = ReplyStatistics(logprobs[:, :width], values[:, :width] if with_values else None, entropy[:, :width])
    return Replies(replies, statistics)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs
# ---------------------------------------------------------------------------------------------------------------------


def output_logits(base: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [N, V] of hidden states [N, H]."""
    head = base.get_output_embeddings()
    if not is_plain(head):
        return scale_logits(base, head(hidden))
    tiles = vocabulary_tiles(hidden.device, len(hidden), head.weight.shape[0])
    return scale_logits(base, torch.cat([tile_logits(head, hidden, tile) for tile in tiles], -1))


def scale_logits(base: PreTrainedModel, logits: Tensor) -> Tensor:
    """What a few families do to each logit behind the output embedding."""
    config = base.config.get_text_config()
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def is_plain(head: nn.Module) -> bool:
    """Whether an output embedding is one frozen matrix that lies here whole: no adapter on it, not a part of it (ZeRO-3)."""
    return type(head) is nn.Linear and not head.weight.requires_grad and head.weight.dim() == 2


def vocabulary_tiles(device: torch.device, rows: int, vocabulary: int) -> list[slice]:
    """The vocabulary in parts, for products of [rows, H] with the output embedding."""
    width = TILE if device.type == "cpu" else max(TILE, LOGIT_CHUNK["cuda"] // rows)
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def tile_logits(head: nn.Linear, hidden: Tensor, tile: slice) -> Tensor:
    """Logits of the tokens of `tile` alone, [N, C]."""
    return nn.functional.linear(hidden, head.weight[tile], None if head.bias is None else head.bias[tile])


@torch.no_grad()
def check_output_logits(model: PeftModel) -> None:
    """Make sure that `output_logits` is what this model's own forward pass computes.  Raises InputError if it is not."""
    base = model.get_base_model()
    ids = (
        torch.arange(1, 9, device=next(base.parameters()).device).unsqueeze(0)
        % base.get_input_embeddings().num_embeddings
    )
    mask = torch.ones_like(ids)
    own = model(input_ids=ids, attention_mask=mask, job=lambda base, hidden: output_logits(base, hidden[0])).float()
    theirs = model(input_ids=ids, attention_mask=mask).logits[0].float()
    # A soft cap moves small logits by less than 1%, so only 16-bit weights, which round to about 3 digits, get that much.
    share = 1e-4 if base.dtype == torch.float32 else 1e-2
    if not (own - theirs).abs().max() <= share * theirs.abs().max():  # NaN is refused too
        raise InputError(
            f"{type(base).__name__} changes its logits in a way that this toolkit does not know; report it"
        )


def logit_rows(device: torch.device, vocabulary: int) -> int:
    """Rows of logits [n, V] that are held at once, at least one."""
    return max(1, LOGIT_CHUNK.get(device.type, LOGIT_CHUNK["cuda"]) // vocabulary)


def entropies(logprobs: Tensor, probabilities: Tensor) -> Tensor:
    """Entropy of each distribution [N, V] in nats, [N].  A suppressed token has probability 0 and adds nothing."""
    return -torch.linalg.vecdot(probabilities, logprobs.clamp(min=torch.finfo(logprobs.dtype).min))


class _KnownGradient(torch.autograd.Function):
    """y [N], and dy/dx [N, H] for x [N, H], of which each row makes one number."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, results: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(slopes)
        ctx.dtype = states.dtype
        return results.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradient[:, None] * slopes).to(ctx.dtype), None, None


@torch.no_grad()
def tiled_logprobs(
    head: nn.Linear,
    states: Tensor,
    tokens: Tensor,
    shape: Callable[[Tensor, slice], Tensor],
    with_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-prob of each token [N], entropy of its distribution [N], and with_slopes the log-prob's derivative [N, H].

    The distribution is the softmax of shape(logits, tile), where `shape` works on each logit alone: logits are [N, C], of
    the tokens of `tile`.  states: [N, H]; tokens: int64 [N].

    The logits [N, V] never exist.  As in attention that goes through the keys in blocks (Dao et al. 2022), sums over the
    vocabulary are kept relative to the largest logit so far.  With z the shaped logit, y the plain one, p = softmax(z):
    d log p(t) / d state = dz(t)/dy(t) w(t) - sum over v of p(v) dz(v)/dy(v) w(v), where w(v) is row v of the embedding.
    """
    least = torch.finfo(torch.float32).min  # in the place of -inf, which has no product with 0
    peak = torch.full(tokens.shape, least, device=states.device)
    own, total, mean = (torch.zeros_like(peak) for _ in range(3))  # z(t); sums of exp(z - peak) and of z exp(z - peak)
    own_slope = torch.ones_like(peak)
    slopes = torch.zeros(states.shape, device=states.device) if with_slopes else None
    for tile in vocabulary_tiles(states.device, len(states), head.weight.shape[0]):
        plain = tile_logits(head, states, tile)
        with torch.set_grad_enabled(with_slopes):
            shaped = shape(plain.requires_grad_(with_slopes), tile)
        by_plain = None
        if with_slopes and shaped is not plain:
            (by_plain,) = torch.autograd.grad(shaped, plain, torch.ones_like(shaped))
        shaped = shaped.detach()

        column = (tokens - tile.start).clamp(0, shaped.shape[1] - 1)[:, None]
        is_here = (tokens >= tile.start) & (tokens < tile.stop)
        own = torch.where(is_here, shaped.gather(1, column).squeeze(1), own)

        old_peak, peak = peak, torch.maximum(peak, shaped.amax(1))
        kept, weights = (old_peak - peak).exp(), (shaped - peak[:, None]).exp_()
        total = total * kept + weights.sum(1)
        mean = mean * kept + torch.linalg.vecdot(weights, shaped.clamp(min=least))
        if with_slopes:
            if by_plain is not None:
                own_slope = torch.where(is_here, by_plain.gather(1, column).squeeze(1).float(), own_slope)
                weights *= by_plain
            slopes = slopes * kept[:, None] + weights.to(plain.dtype) @ head.weight[tile]
    if with_slopes:
        slopes = own_slope[:, None] * head.weight[tokens] - slopes / total[:, None]
    # differences of logits first: they are far smaller than the logits, and so is the rounding
    return (own - peak) - total.log(), (peak - mean / total) + total.log(), slopes


def reply_job(batch: Batch, sampling: Sampling, with_values: bool) -> Job:
    """Job that gives the ReplyStatistics of `batch`; the entropy has no gradient.

    Only real reply positions reach the output embedding, and the logits of all of them never exist at once: a frozen
    embedding is gone through in tiles of the vocabulary, another one with few reply positions at a time.
    """

    def job(base: PreTrainedModel, hidden: Tensor) -> ReplyStatistics:
        rows, steps = batch.response_mask.nonzero(as_tuple=True)  # [N], [N]
        before = batch.query_lengths[rows] + steps - 1  # the position that predicts the token
        states = hidden[rows, before]  # [N, H]
        tokens = batch.input_ids[rows, before + 1]  # [N]
        head = base.get_output_embeddings()
        vocabulary = head.weight.shape[0]
        first_seen = _first_seen(batch, vocabulary) if sampling.repetition_penalty != 1 else None  # [B, V]

        def shape(logits: Tensor, tile: slice, part: slice = slice(None)) -> Tensor:  # [n, C], [n, C]
            seen = None if first_seen is None else first_seen[rows[part], tile] < steps[part, None]
            return sampling_logits(scale_logits(base, logits), seen, steps[part] == 0, sampling, tile.start)

        def chunk_statistics(part: slice, states: Tensor) -> tuple[Tensor, Tensor]:  # [n, H] -> [n], [n]
            logprobs = shape(head(states), slice(0, vocabulary), part).log_softmax(-1)  # [n, V]
            entropy = entropies(logprobs.detach(), logprobs.detach().exp())
            return logprobs.gather(1, tokens[part, None]).squeeze(1), entropy

        if is_plain(head):
            needs_slopes = torch.is_grad_enabled()
            logprobs, entropy, slopes = tiled_logprobs(head, states.detach(), tokens, shape, needs_slopes)
            if needs_slopes:
                logprobs = _KnownGradient.apply(states, logprobs, slopes)
        else:
            chunk = logit_rows(states.device, vocabulary)
            parts = [slice(start, start + chunk) for start in range(0, len(tokens), chunk)]
            # Kept, the logits would be the largest tensor of the update, so they are computed again in the backward pass.
            results = [checkpoint(chunk_statistics, part, states[part], use_reentrant=False) for part in parts]
            logprobs, entropy = (torch.cat(column) for column in zip(*results, strict=True))

        def spread(values: Tensor) -> Tensor:  # [N] -> [B, T]
            return values.new_zeros(batch.response_mask.shape).index_put((rows, steps), values)

        values = spread(state_values(base, states)) if with_values else None
        return ReplyStatistics(spread(logprobs), values, spread(entropy))

    return job


def value_job(batch: Batch) -> Job:
    """Job that gives the values [B, T] of `batch` alone, for a critic that has an adapter of its own."""

    def job(base: PreTrainedModel, hidden: Tensor) -> Tensor:
        rows, steps = batch.response_mask.nonzero(as_tuple=True)  # [N], [N]
        values = state_values(base, hidden[rows, batch.query_lengths[rows] + steps - 1])
        return values.new_zeros(batch.response_mask.shape).index_put((rows, steps), values)

    return job


def state_values(base: PreTrainedModel, states: Tensor) -> Tensor:
    """The value head on hidden states [N, H], float32 [N], outside autocast: values differ by little."""
    with torch.autocast(states.device.type, enabled=False):
        return nn.functional.linear(states.float(), base.v_head.weight, base.v_head.bias).squeeze(-1)


def _first_seen(batch: Batch, vocabulary: int) -> Tensor:
    """Where each token was first seen, int32 [B, V]: -1 in the prompt, t as reply token t, else a huge number."""
    never = torch.iinfo(torch.int32).max
    length = batch.input_ids.shape[1]
    position = torch.arange(length, device=batch.input_ids.device).expand(len(batch.input_ids), -1)
    step = (position - batch.query_lengths[:, None]).clamp(min=-1).int()
    step = step.masked_fill(batch.attention_mask == 0, never)
    seen = torch.full((len(step), vocabulary), never, dtype=torch.int32, device=step.device)
    return seen.scatter_reduce(1, batch.input_ids, step, "amin")
