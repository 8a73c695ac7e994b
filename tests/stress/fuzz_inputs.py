"""Damages valid input files at random: whatever comes out, the scripts' readers take it or say what is wrong in one line.

    python -m tests.stress.fuzz_inputs                      2,000 tries, two minutes
    python -m tests.stress.fuzz_inputs --tries 50000 --seed 7

Data files of every format, YAML, adapter_config.json, run.json, reward_card.json and safetensors are changed in two ways: as
bytes (flipped, cut, doubled, moved, with pieces put in that readers stumble over), and as values (any part of a JSON file
replaced, renamed or taken away), which gets past the parsers.  A try fails when anything but an InputError of one line comes
out; the file is then kept and named.  The same seed gives the same tries.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, disable_progress_bars
from transformers.utils import logging

from corpus.files import train_and_eval_rows
from corpus.tokens import tokenize_preferences, tokenize_prompts, tokenize_sft
from lora.adapters import REFERENCE, attach_adapter, check_adapter, load_adapter, read_adapter
from lora.base_model import base_fingerprint
from lora.heads import add_hidden_state_fn, add_score_head
from reward_modeling import RewardArguments, RewardDataArguments
from rewards.reward_model import load_reward
from rl_training import PPOArguments, read_statistics
from sft_training import SFTArguments
from tests.conftest import make_tokenizer, save_base
from tests.helpers import load_plain, make_stages
from utils.arguments import DataArguments, LoraArguments, ModelArguments, parse_arguments
from utils.console import InputError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
ROWS: list[list[dict[str, Any]]] = [
    [{"prompt": "What about tea?", "response": "Tea is good."}, {"prompt": "你好", "response": "很好"}] * 2,
    [{"prompt": "a", "chosen": "yo", "rejected": "no", "margin": 0.5}, {"prompt": "b", "chosen": "c", "rejected": "d"}],
    [{"chosen": TURNS, "rejected": TURNS}, {"chosen": [*TURNS, *TURNS], "rejected": TURNS}],
    [{"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "\n\nHuman: hi\n\nAssistant: no"}],
    [{"messages": TURNS}, {"messages": [*TURNS, *TURNS]}],
    [{"question": "hi", "chatgpt_answers": ["yo", "hey"]}],
    [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "system": "Be kind."}] * 2,
    [{"prompt": "hi", "response": "yo", "score": 1.0}, {"prompt": "hi", "response": "no", "score": 0.0}],
    [
        {
            "prompt": "hi",
            "chosen": [*TURNS, *TURNS],
            "rejected": [*TURNS, TURNS[0], {"role": "assistant", "content": "no"}],
        }
    ],
    [{"instruction": "hi", "history": [["a", "b"]], "output": "yo", "tools": '[{"name": "now"}]'}],
    [{"prompt": "hi", "chosen": "yo", "rejected": ["no", "nay"]}],
    [{"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]}],
    [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Say yo", "input": "", "output": "yo"}],
]
CONFIG = {
    "model_name": "base",
    "dataset": "rows.jsonl",
    "eval_fraction": 0.1,
    "learning_rate": 1e-4,
    "seed": 3,
    "output_dir": "out",
    "per_device_eval_batch_size": 4,
    "max_length": 256,
    "lr_scheduler_type": "cosine",
    "use_cpu": True,
    "report_to": ["none"],
    "prompt_template": "Q: {prompt}\nA:",
}
KINDS_OF_ARGUMENTS = (
    (ModelArguments, DataArguments, LoraArguments, SFTArguments),
    (ModelArguments, RewardDataArguments, LoraArguments, RewardArguments),
    (ModelArguments, DataArguments, PPOArguments),
)
PIECES = [
    b"null",
    b"{}",
    b"[]",
    b'""',
    b"-1",
    b"1e999",
    b"NaN",
    b"\xff\xfe",
    b"\\ud83d",
    b'"',
    b"{",
    b"]",
    b",",
    b":",
    b"\n",
]
PIECES += [
    b"\x00",
    b"</s>",
    b"\xe9",
    b"- ",
    b"!!python/object:os.system",
    b"&a *a",
    b"true",
    b"\r\n",
    b"\xef\xbb\xbf",
    b"'",
    b"#",
]
VALUES = [
    None,
    True,
    0,
    -1,
    2**70,
    1e308,
    float("nan"),
    "",
    " ",
    "x",
    "</s>",
    "{prompt}",
    "\x1b[2J",
    "\x00",
    [],
    [None],
    [[]],
]
VALUES += [
    {},
    {"role": "user"},
    [{"role": None, "content": None}],
    TURNS,
    "none",
    "../..",
    "q_proj",
    ["q_proj"],
    "LORA",
]


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few random edits."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice([1, 1, 2, 8, 64]))
        way = rng.randrange(6)
        if way == 0:
            content = content[:start] + rng.choice(PIECES) + content[end:]
        elif way == 1:
            content = content[:start] + rng.choice(PIECES) + content[start:]
        elif way == 2:
            content = content[:start] + content[end:]
        elif way == 3:
            content = content[:start] + content[start:end] * rng.randint(2, 5) + content[end:]
        elif way == 4 and start < len(content):
            content = content[:start] + bytes([rng.randrange(256)]) + content[start + 1 :]
        else:
            content = content[:start]
    return content


def damage_value(value: Any, rng: random.Random) -> Any:
    """One random part of a JSON value changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        way = rng.randrange(5)
        changed = {name: part for name, part in value.items() if name != key}
        if way == 0:
            return changed
        if way == 1:
            return {**changed, rng.choice(["prompt", "text", "content", "", "output", key.upper()]): value[key]}
        return {**changed, key: damage_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], damage_value(value[place], rng), *value[place + 1 :]]
    return rng.choice(VALUES)


def damage(content: bytes, rng: random.Random) -> bytes:
    """`content` with a random fault; lines of JSON and whole JSON files as often by value as by byte."""
    if rng.random() < 0.5:
        return damage_bytes(content, rng)
    try:
        return json.dumps(damage_value(json.loads(content), rng)).encode()
    except ValueError:
        pass
    try:
        rows = [json.loads(line) for line in content.splitlines()]
        return b"".join(json.dumps(row).encode() + b"\n" for row in damage_value(rows, rng))
    except (ValueError, TypeError):
        return damage_bytes(content, rng)


class Inputs:
    """Valid files of every sort in a folder, and what reads them.  Call `attempt` for one try."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = make_tokenizer()
        self.stages = make_stages(save_base(folder / "base"), folder)
        self.base = load_plain(self.stages.base)
        run = {"base_fingerprint": base_fingerprint(self.base), "base_model": "base", "prompt_template": "{prompt}="}
        run["arguments"] = {"ensemble_penalty": 1.0, "seed": 0}
        card = {"score_mean": 0.1, "score_std": 1.0, "passed": False, "failed": ["probe empty 0.1"]}
        for path in (self.stages.sft, self.stages.reward):
            (Path(path) / "run.json").write_text(json.dumps(run), encoding="utf-8")
        (Path(self.stages.reward) / "reward_card.json").write_text(json.dumps(card), encoding="utf-8")
        self.seeds = [*self.data_files(), *self.configs(), *self.adapter_files()]

    def data_files(self) -> list[tuple[str, bytes, Callable[[Path], None]]]:
        found = []
        for rows in ROWS:
            found.append(("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode(), self.read_data))
            found.append(("rows.json", json.dumps(rows).encode(), self.read_data))
            parquet, text = io.BytesIO(), io.BytesIO()
            Dataset.from_list(rows).to_parquet(parquet)
            found.append(("rows.parquet", parquet.getvalue(), self.read_data))
            if all(isinstance(value, (str, float)) for row in rows for value in row.values()):
                Dataset.from_list(rows).to_csv(text)
                found.append(("rows.csv", text.getvalue(), self.read_data))
        return found

    def configs(self) -> list[tuple[str, bytes, Callable[[Path], None]]]:
        return [("config.yaml", yaml.safe_dump(CONFIG).encode(), self.read_config)] * 4 + [
            ("config.yaml", json.dumps(CONFIG).encode(), self.read_config)  # JSON is YAML, and is damaged by value
        ] * 4

    def adapter_files(self) -> list[tuple[str, bytes, Callable[[Path], None]]]:
        found = []
        for stage, read in (("sft", self.read_sft), ("reward", self.read_reward)):
            for path in sorted(Path(getattr(self.stages, stage)).iterdir()):
                if path.suffix in (".json", ".safetensors"):
                    found += [(path.name, path.read_bytes(), read)] * 2
        return found

    def read_data(self, path: Path) -> None:
        for stage, tokenize in (("sft", tokenize_sft), ("reward", tokenize_preferences), ("ppo", tokenize_prompts)):
            more = ("cut",) if stage == "reward" else ()
            arguments = DataArguments(dataset=str(path), eval_fraction=0.3 if stage == "ppo" else 0.0)
            with contextlib.suppress(InputError):  # the file is one stage's: to the others it is wrong
                rows, _ = train_and_eval_rows(arguments, "")
                tokenize(rows, "Q: {prompt}\nA:", self.tokenizer, 64, *more)

    def read_config(self, path: Path) -> None:
        for kinds in KINDS_OF_ARGUMENTS:
            with contextlib.suppress(InputError):  # lora_r is no argument of PPO
                parse_arguments(kinds, ["--config", str(path), "--use_cpu", "true"])

    def copy(self, stage: str, path: Path) -> str:
        """The adapter with the damaged file in it."""
        folder = path.parent / stage
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(getattr(self.stages, stage), folder)
        shutil.copy(path, folder / path.name)
        return str(folder)

    def read_sft(self, path: Path) -> None:
        adapter = read_adapter(self.copy("sft", path), "--sft_model_lora_path")
        base = load_plain(self.stages.base)
        check_adapter(adapter, "--sft_model_lora_path", False, "{prompt}=", base)
        load_adapter(attach_adapter(base, adapter, adapter.config), adapter, REFERENCE)

    def read_reward(self, path: Path) -> None:
        sft, reward = read_adapter(self.stages.sft, "--sft"), read_adapter(self.copy("reward", path), "--reward")
        base = load_plain(self.stages.base)
        check_adapter(reward, "--reward", True, "{prompt}=", base)
        read_statistics(reward, allow_weak=True)
        add_hidden_state_fn(base)
        model = attach_adapter(base, sft, sft.config)
        add_score_head(base)
        load_reward(model, reward)

    def attempt(self, rng: random.Random) -> tuple[str, str, str | None]:
        """One try: (name of the file, "taken" or "refused" or "failed", traceback of a failure)."""
        name, content, read = rng.choice(self.seeds)
        path = self.folder / "damaged" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damage(content, rng))
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                read(path)
        except InputError as error:
            one_line = "\n" not in str(error)
            return name, "refused" if one_line else "failed", None if one_line else f"more than one line: {error}"
        except (Exception, SystemExit):  # this is what the search is for
            return name, "failed", traceback.format_exc()
        return name, "taken", None


def fuzz(tries: int, seed: int, keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Outcomes of so many tries, and the tracebacks of those that failed, whose files are copied to `keep`."""
    disable_progress_bars()
    logging.disable_progress_bar()
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder))
        for number in range(tries):
            name, outcome, problem = inputs.attempt(rng)
            outcomes[outcome] += 1
            if problem is not None:
                failures.append(f"try {number}, {name}:\n{problem}")
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(Path(folder) / "damaged" / name, keep / f"{seed}_{number}_{name}")
    return outcomes, failures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.fuzz_inputs", description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures"), help="where files that fail are kept")
    args = parser.parse_args()
    outcomes, failures = fuzz(args.tries, args.seed, args.keep)
    for failure in failures:
        print(failure)
    print(f"{args.tries} tries: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
