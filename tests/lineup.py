"""A base with adapters that know how they were trained, for the scripts that let several of them answer."""

import json
from pathlib import Path
from typing import NamedTuple

from peft import PeftModel

from tests.helpers import load_plain, make_stages, save_lively_base, strengthen
from utils.adapters import base_fingerprint

TEMPLATE = "Q: {prompt}\nA:"


class Lineup(NamedTuple):
    """Folders of a base, two different policies and a reward adapter."""

    base: str
    sft: str
    ppo: str
    reward: str


def make_lineup(folder: Path) -> Lineup:
    stages = make_stages(save_lively_base(folder / "base"), folder)
    policy = PeftModel.from_pretrained(load_plain(stages.base), stages.sft)
    strengthen(policy, seed=7)
    policy.save_pretrained(folder / "ppo")
    lineup = Lineup(stages.base, stages.sft, str(folder / "ppo"), stages.reward)
    for path in lineup[1:]:
        write_run(path, lineup.base)
    return lineup


def write_run(path: str, base: str, template: str = TEMPLATE) -> None:
    run = {"base_fingerprint": base_fingerprint(load_plain(base)), "base_model": base, "prompt_template": template}
    Path(path, "run.json").write_text(json.dumps(run), encoding="utf-8")
