"""A base with adapters that know how they were trained, for the scripts that let several of them respond."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from corpus.tokens import encode_prompt
from inference.side_by_side import prompt_seed
from lora.base_model import base_fingerprint
from rollout.distribution import default_sampling
from rollout.sampler import generate_ids
from tests.conftest import make_tokenizer
from tests.helpers import load_with_hidden_state_fn, make_stages, save_lively_base, strengthen

TEMPLATE = "Q: {prompt}\nA:"
LENGTH = 12  # tokens of the longest reply


class AdapterFolders(NamedTuple):
    """Folders of a base, two different policies and a reward adapter."""

    base: str
    sft: str
    ppo: str
    reward: str


def make_adapter_folders(folder: Path) -> AdapterFolders:
    stages = make_stages(save_lively_base(folder / "base"), folder)
    policy = PeftModel.from_pretrained(load_with_hidden_state_fn(stages.base), stages.sft)
    strengthen(policy, seed=7)
    policy.save_pretrained(folder / "ppo")
    folders = AdapterFolders(stages.base, stages.sft, str(folder / "ppo"), stages.reward)
    for path in folders[1:]:
        write_run(path, folders.base)
    return folders


def write_run(path: str, base: str, template: str = TEMPLATE) -> None:
    run = {
        "base_fingerprint": base_fingerprint(load_with_hidden_state_fn(base)),
        "base_model": base,
        "prompt_template": template,
    }
    Path(path, "run.json").write_text(json.dumps(run), encoding="utf-8")


def expected(
    folders: AdapterFolders, adapter: str | None, dialogue: list[str], number: int
) -> tuple[str, list[int], list[int]]:
    """Text, query and response of one model alone to question `number`; dialogue: questions and responses in turn."""
    model = load_with_hidden_state_fn(folders.base)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(dialogue)]
    tokenizer = make_tokenizer()
    query = encode_prompt(turns, TEMPLATE, tokenizer)
    seed = prompt_seed(0, f"{number} {dialogue[-1]}")
    (response,) = generate_ids(model, [query], [seed], default_sampling(tokenizer, (2,), LENGTH))
    return tokenizer.decode(response, skip_special_tokens=True), query, response


def score_of(folders: AdapterFolders, query: list[int], response: list[int]) -> float:
    """The reward model's score of a response, by transformers and PEFT alone."""
    base = AutoModelForSequenceClassification.from_pretrained(folders.base, num_labels=1, dtype=torch.float32)
    reward_model = PeftModel.from_pretrained(base, folders.reward).eval()
    with torch.no_grad():
        return float(reward_model(input_ids=torch.tensor([[*query, *response]])).logits)
