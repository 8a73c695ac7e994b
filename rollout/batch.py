"""Prompts with their replies as padded tensors, and how many go through the model at once.

Shapes: B replies, L tokens of prompt + reply, T reply tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora.base_model import text_decoder
from utils.batching import pad_right

# What a layer costs in a forward and backward pass before its first token, in floating-point operations: the time that
# starting some hundred small operations takes, at the rate of large ones.
PASS_OVERHEAD = {"cpu": 4e8, "cuda": 1e11}
# More tokens in a pass make a CPU no faster and need more memory, unless the model is so small that passes are dear.
PASS_TOKENS = {"cpu": 512, "cuda": 2**31}


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


class TokenStatistics(NamedTuple):
    """What the policy says of each reply token.  0 on padding."""

    logprobs: Tensor  # float [B, T]
    values: Tensor | None  # float [B, T], value of the state in front of the token
    entropy: Tensor  # float [B, T], of the distribution the token was drawn from, in nats


def make_batch(queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Join ragged queries and responses, each with at least one token, into a Batch."""
    rows = [[*query, *response] for query, response in zip(queries, responses, strict=True)]
    ids, mask = pad_right(rows, pad_id)
    _, response_mask = pad_right(responses, pad_id)
    return Batch(ids, mask, torch.tensor([len(query) for query in queries]), response_mask.bool())


def pass_limits(base: PreTrainedModel, device: torch.device) -> tuple[float, int]:
    """`overhead` and `most_tokens` of `split_by_length` for this model on this device.

    A layer of n weights takes 4n operations a token, forward and backward; the weights themselves are frozen.
    """
    layers = base.config.get_text_config().num_hidden_layers
    embedding = base.get_input_embeddings().weight.numel()  # looked up, not multiplied with
    layer_size = (sum(parameter.numel() for parameter in text_decoder(base).parameters()) - embedding) / layers
    overhead = PASS_OVERHEAD[device.type] / (4 * layer_size)
    return overhead, max(PASS_TOKENS[device.type], int(8 * overhead))
