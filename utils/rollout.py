"""Sample replies, and the log-probs of exactly the distribution that they were sampled from.

One function, `sampling_logits`, turns the model's raw logits into the distribution: repetition penalty, suppressed first
tokens, temperature.  The sampler and the log-probs of policy and reference all go through it, so the KL between them is
one between the distributions that really acted, and cannot be driven negative.

Shapes: B replies, L tokens of prompt + reply, T reply tokens, V vocabulary, N real reply tokens of all rows in one list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from utils.adapters import Job
from utils.arguments import InputError
from utils.data import pad_right

LOGIT_CHUNK = 2**25  # logits held at once, in numbers (128 MiB in float32)


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.  No top-k or top-p: PPO needs log-probs of the whole distribution, so all of it is sampled."""

    eos_token_id: int
    pad_token_id: int
    max_new_tokens: int
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    begin_suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.repetition_penalty <= 0 or self.max_new_tokens < 1:
            raise InputError(
                f"--temperature {self.temperature}, --repetition_penalty {self.repetition_penalty} and "
                f"--output_max_length {self.max_new_tokens} have to be above 0"
            )


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
    entropy: Tensor | None  # float [B, T], of the distribution the token was drawn from, in nats


def make_batch(queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Join ragged queries and responses, each with at least one token, into a Batch."""
    rows = [[*query, *response] for query, response in zip(queries, responses, strict=True)]
    ids, mask = pad_right(rows, pad_id)
    _, response_mask = pad_right(responses, pad_id)
    return Batch(ids, mask, torch.tensor([len(query) for query in queries]), response_mask.bool())


def sampling_logits(logits: Tensor, seen: Tensor | None, is_first: Tensor, sampling: Sampling) -> Tensor:
    """Logits of the distribution that a token is sampled from, float32 [N, V].

    logits: [N, V] from the model; seen: bool [N, V], True on tokens that the prompt or the reply so far holds (None where
    there is no repetition penalty); is_first: bool [N], True where the token is the first of its reply.
    The order is that of transformers: repetition penalty (Keskar et al. 2019, eq. 2), suppression, temperature.
    """
    logits = logits.float()
    if seen is not None:
        penalised = torch.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.begin_suppress_tokens:
        banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        banned[list(sampling.begin_suppress_tokens)] = True
        logits = logits.masked_fill(is_first.unsqueeze(-1) & banned, -torch.inf)
    return logits / sampling.temperature


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


class _Draw(LogitsProcessor):
    """Draws the next token inside generate(): one uniform number a reply token picks it from the cumulative distribution.

    With a stream of numbers for each reply, a reply depends on its own seed and prompt alone: not on the batch that it is
    sampled in, and not on how many processes share the work.
    """

    def __init__(self, prompt_mask: Tensor, uniforms: Tensor, sampling: Sampling) -> None:
        self.prompt_mask = prompt_mask  # bool [B, P], left-padded prompts
        self.uniforms = uniforms  # float64 [B, T]
        self.sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        prompt_length = self.prompt_mask.shape[1]
        step = input_ids.shape[1] - prompt_length
        seen = None
        if self.sampling.repetition_penalty != 1:
            real = torch.ones_like(input_ids, dtype=torch.bool)
            real[:, :prompt_length] = self.prompt_mask
            seen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            rows, columns = real.nonzero(as_tuple=True)
            seen[rows, input_ids[rows, columns]] = True
        is_first = torch.full((len(scores),), step == 0, device=scores.device)
        logits = sampling_logits(scores, seen, is_first, self.sampling)
        cumulative = logits.double().softmax(-1).cumsum(-1)  # [B, V]; float32 sums lose the tail of a large vocabulary
        target = self.uniforms[:, step : step + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def uniform_streams(seeds: Sequence[int], length: int) -> Tensor:
    """For each seed its own stream of `length` numbers in [0, 1), float64 [B, length]."""
    streams = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(streams)


@torch.no_grad()
def sample_replies(
    model: PreTrainedModel | PeftModel,
    queries: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """One reply for each query, as token ids: up to and with EOS, or `max_new_tokens` long without one.

    seeds: one number a query; the same query with the same seed gives the same reply in any batch, up to the rounding
    of the forward pass.  streamer: gets each token as soon as it is drawn; transformers has that for one query only.
    """
    device = next(model.parameters()).device
    flipped, flipped_mask = pad_right([query[::-1] for query in queries], sampling.pad_token_id)
    ids, mask = flipped.flip(1).to(device), flipped_mask.flip(1).to(device)  # generate() goes on at the right edge
    uniforms = uniform_streams(seeds, sampling.max_new_tokens).to(device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # _Draw has sampled: what it leaves is one token
        eos_token_id=sampling.eos_token_id,
        pad_token_id=sampling.pad_token_id,
    )
    draw = LogitsProcessorList([_Draw(mask.bool(), uniforms, sampling)])
    output = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=draw, streamer=streamer
    )
    replies = []
    for row in output[:, ids.shape[1] :].tolist():
        end = row.index(sampling.eos_token_id) + 1 if sampling.eos_token_id in row else len(row)
        replies.append(row[:end])
    return replies


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs
# ---------------------------------------------------------------------------------------------------------------------


def output_logits(base: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [N, V] of hidden states [N, H], with the scaling that a few families apply behind the output embedding."""
    logits = base.get_output_embeddings()(hidden)
    config = base.config.get_text_config()
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return torch.tanh(logits / softcap) * softcap if softcap else logits


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


def reply_job(batch: Batch, sampling: Sampling, with_values: bool, with_entropy: bool) -> Job:
    """Job that gives the ReplyStatistics of `batch`.

    Only real reply positions reach the output embedding, `LOGIT_CHUNK` logits at a time; with a gradient each chunk is
    computed again in the backward pass, so that the logits of the whole batch never exist at once.
    """

    def job(base: PreTrainedModel, hidden: Tensor) -> ReplyStatistics:
        rows, steps = batch.response_mask.nonzero(as_tuple=True)  # [N], [N]
        before = batch.query_lengths[rows] + steps - 1  # the position that predicts the token
        states = hidden[rows, before]  # [N, H]
        tokens = batch.input_ids[rows, before + 1]  # [N]
        vocabulary = base.get_output_embeddings().weight.shape[0]
        first_seen = _first_seen(batch, vocabulary) if sampling.repetition_penalty != 1 else None  # [B, V]

        def token_statistics(part: slice, states: Tensor) -> tuple[Tensor, Tensor | None]:
            seen = None if first_seen is None else first_seen[rows[part]] < steps[part, None]
            logits = sampling_logits(output_logits(base, states), seen, steps[part] == 0, sampling)
            logprobs = logits.log_softmax(-1)  # [n, V]
            entropy = None
            if with_entropy:  # a suppressed token has probability 0 and adds nothing
                entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0)).sum(-1)
            return logprobs.gather(1, tokens[part, None]).squeeze(1), entropy

        chunk = max(1, LOGIT_CHUNK // vocabulary)
        parts = [slice(start, start + chunk) for start in range(0, len(tokens), chunk)]
        again = torch.is_grad_enabled() and len(parts) > 1
        results = [
            checkpoint(token_statistics, part, states[part], use_reentrant=False)
            if again
            else token_statistics(part, states[part])
            for part in parts
        ]

        def spread(values: Tensor) -> Tensor:  # [N] -> [B, T]
            return values.new_zeros(batch.response_mask.shape).index_put((rows, steps), values)

        values = spread(state_values(base, states)) if with_values else None
        entropy = spread(torch.cat([part for _, part in results])) if with_entropy else None
        return ReplyStatistics(spread(torch.cat([logprobs for logprobs, _ in results])), values, entropy)

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
