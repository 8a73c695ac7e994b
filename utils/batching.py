"""Rows into tensors, and tensors into forward passes that compute little padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_PART = 8  # rows that go through the model together on a GPU, whatever their lengths


def part_size(rows: int, smallest: int = SMALLEST_PART) -> int:
    """So many of `rows` rows are worth a pass of their own, to save the padding that only the longest ones need."""
    return max(smallest, rows // 4)


def sft_part_size(rows: int, device: torch.device) -> int:
    """`part_size` in stage 1, which may be smaller on a CPU: there a pass costs nothing but its tokens."""
    return part_size(rows, 2 if device.type == "cpu" else SMALLEST_PART)


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


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ragged ids -> (ids int64 [B, L], attention mask int64 [B, L]), padded on the right to the longest one."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros((len(sequences), length), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return ids, mask
