"""The cache that replies are sampled with, for the families whose numbers it does not change."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lora.base_model import BROKEN_MODEL, bare_layer, same_numbers
from utils.console import say


def new_cache(model: PreTrainedModel | PeftModel) -> DynamicCache | None:
    """An empty cache, or None for a base whose cached passes do not give the numbers of whole ones.

    Each base is tried once.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not hasattr(base, "cache_is_exact"):
        base.cache_is_exact = cache_is_exact(model)
        if not base.cache_is_exact:
            say(
                f"note: {type(base).__name__} does not give the same numbers with a cache, so each token of a reply comes "
                "from a pass over its whole row, which is slower"
            )
    return DynamicCache(config=base.config) if base.cache_is_exact else None


@torch.no_grad()
def cache_is_exact(model: PreTrainedModel | PeftModel) -> bool:
    """Whether this family can be sampled from with a cache, padding on the left, and rows that leave the batch.

    A recurrent layer may read padding, a family that takes no position_ids counts it, and some have another kind of cache.
    So a short row goes through the model beside a longer one, which then leaves, and is compared with a pass over the whole
    of it.
    """
    device = next(model.parameters()).device
    count = bare_layer(model.get_input_embeddings()).num_embeddings
    rows = torch.randint(count, (2, 20), generator=torch.Generator().manual_seed(0)).to(device)
    short = rows[1:, :13]

    def states(ids: Tensor, mask: Tensor, **inputs: DynamicCache) -> Tensor:  # [R, L] -> [R, L, H]
        return model(input_ids=ids, attention_mask=mask, hidden_state_fn=lambda base, hidden: hidden.float(), **inputs)

    expected = states(short, torch.ones_like(short))[0, 9:]
    cache, found = DynamicCache(config=model.config), []
    padded = torch.cat([rows[1:, 13:18], short[:, :10]], 1)  # 5 places of padding, whatever their ids, and 10 tokens
    mask = torch.ones(2, 15, dtype=torch.int64, device=device)
    mask[1, :5] = 0
    try:
        found.append(states(torch.cat([rows[:1, :15], padded]), mask, past_key_values=cache)[1, -1])
        for step in range(2):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            ids = torch.stack([rows[0, 15 + step], short[0, 10 + step]])[:, None]
            found.append(states(ids, mask, past_key_values=cache)[1, -1])
        cache.reorder_cache(torch.ones(1, dtype=torch.int64, device=device))
        mask = torch.cat([mask[1:], mask.new_ones(1, 1)], 1)
        found.append(states(short[:, 12:], mask, past_key_values=cache)[0, -1])
    except BROKEN_MODEL:  # what a family raises that takes no such cache
        return False
    return same_numbers(torch.stack(found), expected, model)
