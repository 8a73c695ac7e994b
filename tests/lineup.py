"""A base with adapters that know how they were trained, for the scripts that let several of them answer."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from inference.side_by_side import answer_sampling, reply_seed
from rollout.sampler import sample_replies
from tests.conftest import make_tokenizer
from tests.helpers import load_with_jobs, make_stages, save_lively_base, strengthen
from utils.base_model import base_fingerprint
from utils.data import encode_prompt

TEMPLATE = "Q: {prompt}\nA:"
LENGTH = 12  # tokens of the longest reply


class Lineup(NamedTuple):
    """Folders of a base, two different policies and a reward adapter."""

    base: str
    sft: str
    ppo: str
    reward: str


def make_lineup(folder: Path) -> Lineup:
    stages = make_stages(save_lively_base(folder / "base"), folder)
    policy = PeftModel.from_pretrained(load_with_jobs(stages.base), stages.sft)
    strengthen(policy, seed=7)
    policy.save_pretrained(folder / "ppo")
    lineup = Lineup(stages.base, stages.sft, str(folder / "ppo"), stages.reward)
    for path in lineup[1:]:
        write_run(path, lineup.base)
    return lineup


def write_run(path: str, base: str, template: str = TEMPLATE) -> None:
    run = {"base_fingerprint": base_fingerprint(load_with_jobs(base)), "base_model": base, "prompt_template": template}
    Path(path, "run.json").write_text(json.dumps(run), encoding="utf-8")


def expected(lineup: Lineup, adapter: str | None, dialogue: list[str], asked: int) -> tuple[str, list[int], list[int]]:
    """Text, query and reply of one model alone; dialogue: questions and replies in turn, a question at the end."""
    model = load_with_jobs(lineup.base)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(dialogue)]
    tokenizer = make_tokenizer()
    query = encode_prompt(turns, TEMPLATE, tokenizer)
    seed = reply_seed(0, f"{asked} {dialogue[-1]}")
    (reply,) = sample_replies(model, [query], [seed], answer_sampling(tokenizer, LENGTH))
    return tokenizer.decode(reply, skip_special_tokens=True), query, reply


def score_of(lineup: Lineup, query: list[int], reply: list[int]) -> float:
    """The reward model's score of a reply, by transformers and PEFT alone."""
    base = AutoModelForSequenceClassification.from_pretrained(lineup.base, num_labels=1, dtype=torch.float32)
    judge = PeftModel.from_pretrained(base, lineup.reward).eval()
    with torch.no_grad():
        return float(judge(input_ids=torch.tensor([[*query, *reply]])).logits)
