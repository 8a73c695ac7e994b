"""The outcomes of several demo runs as one table, a row a run.

for seed in 0 1 2 3 4; do SEED=$seed OUTPUT=demo_output_$seed bash scripts/demo.sh; done
python -m demo.summary demo_output_0 demo_output_1 demo_output_2 demo_output_3 demo_output_4
"""

import argparse
import json
from pathlib import Path

from utils.console import InputError, run_script


def as_row(folder: Path) -> str:
    """One line of the table: the reward model's accuracy, and gold, length and empty share of base, SFT and PPO."""
    path = folder / "table.json"
    if not path.is_file():
        raise InputError(f"there is no table.json in {folder}; give folders that scripts/demo.sh has filled")
    outcome = json.loads(path.read_text(encoding="utf-8"))
    base, sft, *_, ppo = outcome["models"]
    run = json.loads((folder / "ppo" / "run.json").read_text(encoding="utf-8"))
    cells = (
        run["seed"],
        f"{outcome['reward_accuracy']:.3f}",
        *(f"{model['gold']:.3f}" for model in (base, sft, ppo)),
        f"{ppo['gold'] / sft['gold']:.2f}",
        *(f"{model['score']:.2f}" for model in (sft, ppo)),
        *(f"{model['length']:.1f}" for model in (sft, ppo)),
        f"{ppo['empty']:.1%}",
        "; ".join(outcome["missed"]) or "none",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders that scripts/demo.sh has filled")
    rows = [as_row(folder) for folder in parser.parse_args().folders]
    columns = (
        "seed | reward accuracy | base gold | SFT gold | PPO gold | PPO / SFT | SFT score | PPO score | SFT length | "
        "PPO length | PPO empty | bars missed"
    )
    print(f"| {columns} |", "|" + "---|" * (columns.count("|") + 1), *rows, sep="\n")


if __name__ == "__main__":
    run_script(main)
