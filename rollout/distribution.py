"""The distribution that replies are sampled from: one function, `sampling_logits`, makes it of the model's raw logits.

The sampler and the log-probs of policy and reference all go through it, so the KL between them is one between the
distributions that really acted, and cannot be driven negative.

Shapes: N reply tokens of all rows in one list, H hidden width, V vocabulary, C tokens of one tile of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora.base_model import bare_layer, text_decoder
from utils.console import InputError

# Logits held at once, in numbers.  On a CPU 16 MiB of float32, on a GPU, which needs more of them to be busy, 128 MiB.
LOGIT_CHUNK = {"cpu": 2**22, "cuda": 2**25}
# Rows of the output embedding that are multiplied with at once, at least.  A CPU takes no more: these weights and their
# logits stay in its cache, and a product with the whole embedding is half as fast.
TILE = 1024


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.  No top-k or top-p: PPO needs log-probs of the whole distribution, so all of it is sampled."""

    stop_token_ids: tuple[int, ...]  # of `stop_token_ids`: a reply ends with any of them
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


def first_token_ban(words: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> tuple[int, ...]:
    """Ids that --begin_suppress_tokens names; "eos" is every stop token and padding, which would make an empty reply."""
    if words == "none":
        return ()
    if words == "eos":
        return tuple(sorted({*stop_ids, tokenizer.pad_token_id}))
    ids = [word.strip() for word in words.split(",")]
    if not all(word.isdecimal() and int(word) < len(tokenizer) for word in ids):
        raise InputError(
            f"--begin_suppress_tokens {words}: give eos, none, or token ids below {len(tokenizer)} joined by commas"
        )
    return tuple(map(int, ids))


def default_sampling(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    temperature: float = 1.0,
    first_tokens: str = "eos",
) -> Sampling:
    """The distribution that PPO trains by default: all of it, no stop token or padding as a first token.

    At temperature 0 its likeliest token, always.  first_tokens: --begin_suppress_tokens of a PPO run that had others.
    """
    return Sampling(
        stop_token_ids=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        temperature=temperature or 1.0,
        greedy=temperature == 0,
        begin_suppress_tokens=first_token_ban(first_tokens, tokenizer, stop_ids),
    )


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


def output_head(base: PreTrainedModel) -> nn.Module:
    """The output embedding that acts now: one that the active adapter brings, else the base's."""
    head = base.get_output_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    return head.modules_to_save[head.active_adapters[0]] if head.active_adapters else head.original_module


def output_logits(base: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [N, V] of hidden states [N, H]."""
    head = output_head(base)
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
    if getattr(config, "logits_mup_width_multiplier", None):  # Inkling
        logits = logits / config.logits_mup_width_multiplier
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(
        config, "logits_soft_cap", None
    )  # Gemma 2, Recurrent Gemma
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
def check_output_logits(model: PreTrainedModel | PeftModel) -> None:
    """Make sure that `output_logits` is what this model's own forward pass computes.  Raises InputError if it is not."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    vocabulary = len(bare_layer(base.get_input_embeddings()).weight)
    ids = torch.arange(1, 9, device=next(base.parameters()).device).unsqueeze(0) % vocabulary
    mask = torch.ones_like(ids)
    hidden = text_decoder(base)(input_ids=ids, attention_mask=mask).last_hidden_state
    own = output_logits(base, hidden[0]).float()
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
    # not vecdot(), which autocast makes bfloat16: the clamped number is -inf there, and 0 * -inf is NaN
    return -logprobs.clamp(min=torch.finfo(logprobs.dtype).min).mul_(probabilities).sum(-1)
