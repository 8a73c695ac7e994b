"""Which prompts a stage trained on, so that a later one knows which of its held-out prompts are new to all.

PPO's best/ is the policy with the highest score on the guard's prompts.  Where the reward model has learnt the scores of
replies to those very prompts, or SFT the replies, that says less about new ones.
"""

import os
from collections.abc import Iterator, Mapping

from datasets import Dataset

from lora.adapters import SavedAdapter
from utils.console import InputError, say
from utils.files import saving
from utils.hashing import hash64

SEEN_FILE = "seen_prompts.txt"  # a hash a line, sorted; beside run.json


def queries_of(rows: Dataset) -> Iterator[list[int]]:
    """The query of everything that is trained on.  rows: as the three stages tokenize them, see corpus/tokens.py."""
    if "labels" in rows.column_names:  # a query is all that stands in front of tokens with a loss
        for row in rows.select_columns(["input_ids", "labels"]):
            taught = [label != -100 for label in row["labels"]]
            yield from (row["input_ids"][:i] for i in range(1, len(taught)) if taught[i] and not taught[i - 1])
    elif "chosen_ids" in rows.column_names:
        for row in rows.select_columns(["chosen_ids", "query_length"]):
            yield row["chosen_ids"][: row["query_length"]]
    else:
        yield from rows["input_ids"]


def hash_of_query(query: list[int]) -> str:
    """16 hex digits; the ids decide, so that another template or tokenizer makes another prompt."""
    return f"{hash64(' '.join(map(str, query))):016x}"


def write_seen_prompts(rows: Dataset, folder: str) -> None:
    """Put down which prompts are trained on.  Raises RunError where the disk fails."""
    path = os.path.join(folder, SEEN_FILE)
    with saving(path):
        with open(path + ".new", "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in sorted({hash_of_query(query) for query in queries_of(rows)}))
        os.replace(path + ".new", path)


def read_seen_prompts(adapter: SavedAdapter) -> set[str]:
    """What an adapter was trained on; empty where nothing says so, as for one of another tool.

    A checkpoint and best/ lie in the folder of their run, which has the file.  Raises InputError for a damaged file.
    """
    for folder in (adapter.path, os.path.dirname(os.path.abspath(adapter.path))):
        path = os.path.join(folder, SEEN_FILE)
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8") as file:
                    return set(file.read().split())
            except (OSError, ValueError) as error:
                raise InputError(f"cannot read {path}: {error}; restore the file, or remove it") from error
    return set()


def new_prompts(prompts: Dataset, seen: Mapping[str, set[str]]) -> list[int]:
    """Rows of the prompts that no earlier stage has trained on.  seen: of `read_seen_prompts`, by adapter."""
    known = set().union(*seen.values())
    return [i for i, query in enumerate(prompts["input_ids"]) if hash_of_query(query) not in known]


def warn_of_seen_prompts(prompts: Dataset, seen: Mapping[str, set[str]]) -> None:
    """Say how many of the guard's prompts each stage has trained on.  seen: of `read_seen_prompts`, by adapter."""
    hashes = [hash_of_query(query) for query in prompts["input_ids"]]
    counts = {adapter: len(set(hashes) & known) for adapter, known in seen.items()}
    if any(counts.values()):
        by = ", ".join(f"{count} by {adapter}" for adapter, count in counts.items() if count)
        say(
            f"warning: best/ is chosen by the scores of {len(hashes)} prompts of which some were trained on ({by}), so "
            "its score says less about new prompts; give prompts that no stage has seen as --eval_dataset"
        )
