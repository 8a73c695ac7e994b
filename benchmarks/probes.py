"""Which broken replies a reward model sees through, with and without having been taught them, in the demo's world.

    python -m benchmarks.probes --output_dir probes --seeds 0
    python -m benchmarks.probes --output_dir repeated --seeds 0 1 2 3 --left_out repeated

For each seed: a reward model without broken replies, one with all kinds of configs/reward_demo.yaml, and for each kind one
that was taught all the others (--left_out: for these kinds only).  Writes probes.md; work that is already in --output_dir is
not repeated.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.runs import in_parallel, make_world_and_sft, train_reward
from utils.arguments import read_yaml
from utils.console import run_script

TAUGHT = read_yaml("configs/reward_demo.yaml")["degenerate_kinds"].split(",")


def train(folder: Path, seed: int, name: str, max_steps: int) -> None:
    """The reward model `name` of a seed: "none", "all", or "without_" and a kind."""
    data = (f"{folder}/world/preferences.jsonl", f"{folder}/world/preferences_heldout.jsonl")
    arguments = ["--max_steps", f"{max_steps}"]
    if name == "none":
        arguments += ["--degenerate_ratio", "0"]
    elif name != "all":
        others = ",".join(kind for kind in TAUGHT if name != f"without_{kind}")
        arguments += ["--degenerate_kinds", others]
    train_reward(folder, seed, name, *data, *arguments)


def report(cards: list[dict[str, dict[str, Any]]], left_out: list[str]) -> str:
    """cards: for each seed, name of the reward model -> its card; left_out: kinds that one model each was not taught."""

    def share(name: str, kind: str) -> str:
        values = [card[name]["probes"][kind] for card in cards]
        return f"{mean(values):.3f}" + (f" ({min(values):.3f})" if len(values) > 1 else "")

    lines = ["| broken reply | taught none | taught all | taught all but this |", "|---|---|---|---|"]
    for kind in cards[0]["all"]["probes"]:
        without = share(f"without_{kind}", kind) if kind in left_out else "-"
        lines.append(f"| {kind} | {share('none', kind)} | {share('all', kind)} | {without} |")
    for measure in ("accuracy", "length_matched_accuracy", "short_good_accuracy", "calibration_error", "temperature"):
        values = [f"{mean(card[name][measure] for card in cards):.3f}" for name in ("none", "all")]
        lines.append(f"| *{measure.replace('_', ' ')}* | {values[0]} | {values[1]} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for all runs and the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--left_out", nargs="+", choices=TAUGHT, default=TAUGHT, help="kinds; by default all that are taught"
    )
    parser.add_argument("--max_steps", type=int, default=300, help="of each reward model")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, a core each")
    args = parser.parse_args()
    in_parallel(lambda seed: make_world_and_sft(args.output_dir / f"seed{seed}", seed), args.seeds, args.jobs)
    names = ["none", "all", *(f"without_{kind}" for kind in args.left_out)]
    models = [(seed, name) for seed in args.seeds for name in names]
    in_parallel(lambda m: train(args.output_dir / f"seed{m[0]}", *m, args.max_steps), models, args.jobs)
    cards = []
    for seed in args.seeds:
        files = (args.output_dir / f"seed{seed}").glob("*/reward_card.json")
        cards.append({file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files})
    text = report(cards, args.left_out)
    (args.output_dir / "probes.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_script(main)
