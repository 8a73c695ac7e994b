"""Which broken replies a reward model sees through, with and without having been taught them, in the demo's world.

    python -m benchmarks.probes --output_dir probes --seeds 0

For each seed: a reward model without broken replies, one with all kinds of configs/reward_demo.yaml, and for each kind one
that was taught all the others.  Writes probes.md; work that is already in --output_dir is not repeated.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.runs import for_each_seed, make_world_and_sft, train_reward
from utils.arguments import read_yaml, run_script

TAUGHT = read_yaml("configs/reward_demo.yaml")["degenerate_kinds"].split(",")


def train(folder: Path, seed: int) -> None:
    """All reward models of one seed."""
    make_world_and_sft(folder, seed)
    data = (f"{folder}/world/preferences.jsonl", f"{folder}/world/preferences_heldout.jsonl")
    train_reward(folder, seed, "none", *data, "--degenerate_ratio", "0")
    train_reward(folder, seed, "all", *data)
    for kind in TAUGHT:
        others = ",".join(other for other in TAUGHT if other != kind)
        train_reward(folder, seed, f"without_{kind}", *data, "--degenerate_kinds", others)


def report(cards: list[dict[str, dict[str, Any]]]) -> str:
    """cards: for each seed, name of the reward model -> its card."""

    def share(name: str, kind: str) -> str:
        values = [card[name]["probes"][kind] for card in cards]
        return f"{mean(values):.3f}" + (f" ({min(values):.3f})" if len(values) > 1 else "")

    lines = ["| broken reply | taught none | taught all | taught all but this |", "|---|---|---|---|"]
    for kind in cards[0]["all"]["probes"]:
        left_out = share(f"without_{kind}", kind) if kind in TAUGHT else "-"
        lines.append(f"| {kind} | {share('none', kind)} | {share('all', kind)} | {left_out} |")
    for measure in ("accuracy", "length_matched_accuracy", "short_good_accuracy", "calibration_error", "temperature"):
        values = [f"{mean(card[name][measure] for card in cards):.3f}" for name in ("none", "all")]
        lines.append(f"| *{measure.replace('_', ' ')}* | {values[0]} | {values[1]} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for all runs and the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at once, a core each")
    args = parser.parse_args()
    for_each_seed(lambda seed: train(args.output_dir / f"seed{seed}", seed), args.seeds, args.jobs)
    cards = []
    for seed in args.seeds:
        files = (args.output_dir / f"seed{seed}").glob("*/reward_card.json")
        cards.append({file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files})
    text = report(cards)
    (args.output_dir / "probes.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_script(main)
