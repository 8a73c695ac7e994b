"""How accurate does a reward model have to be for PPO to gain anything?  Labels flipped at random, in the demo's world.

    python -m benchmarks.label_noise --output_dir label_noise --seeds 0 1 2 --flipped 0 0.1 0.2 0.3 0.4

For each seed and share of flipped labels a reward model (chosen and rejected change places in that share of the training
pairs; the held-out pairs stay as they are) and the demo's PPO run on it, with the guard only watching.  Gold of the last
policy over the SFT model's, on 192 held-out prompts, against the accuracy that the card shows, and the one that it would
show where the held-out labels are flipped too, as in a user's data.  Writes label_noise.md and
label_noise.json; work that is already in --output_dir is not repeated.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from benchmarks.runs import in_parallel, judge_adapters, make_world_and_sft, train_ppo, train_reward, write_rows
from utils.console import run_script
from utils.files import read_jsonl, write_json


def flip(rows: list[dict[str, str]], share: float, seed: int) -> list[dict[str, str]]:
    """Pairs with chosen and rejected in each other's place in `share` of them."""
    flipped = set(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if number in flipped else row
        for number, row in enumerate(rows)
    ]


def train(folder: Path, seed: int, shares: list[float]) -> None:
    """Reward models and PPO runs of one seed."""
    make_world_and_sft(folder, seed)
    pairs = read_jsonl(f"{folder}/world/preferences.jsonl")
    for share in shares:
        name = f"{share:g}"
        noisy = write_rows(folder / f"pairs_{name}.jsonl", flip(pairs, share, seed))
        train_reward(folder, seed, f"reward_{name}", noisy, f"{folder}/world/preferences_heldout.jsonl")
        more = ["--allow_weak_reward", "true", "--guard", "warn"]
        train_ppo(folder, seed, f"ppo_{name}", f"reward_{name}", f"{folder}/world/prompts.jsonl", *more)


def read_seed(folder: Path, shares: list[float]) -> list[dict[str, Any]]:
    """A row a share of flipped labels."""
    adapters = {f"{share:g}": folder / f"ppo_{share:g}" for share in shares}
    rows = {row.name: row for row in judge_adapters(folder, f"reward_{shares[0]:g}", adapters)}
    found = []
    for name in adapters:
        card = json.loads((folder / f"reward_{name}" / "reward_card.json").read_text(encoding="utf-8"))
        found.append(
            {
                "flipped": float(name),
                "accuracy": card["accuracy"],
                "interval": card["accuracy_ci95"],
                "probes_below": sum(share < card["threshold"] for share in card["probes"].values()),
                "sft_gold": rows["SFT"].gold,
                "gold": rows[name].gold,
                "length": rows[name].length,
            }
        )
    return found


def table(seeds: dict[int, list[dict[str, Any]]]) -> list[str]:
    """A row a seed and share."""
    lines = [
        "| flipped | seed | accuracy (95% interval) | by flipped labels | failed probes | SFT gold | PPO gold "
        "| PPO / SFT | tokens a reply |",
        "|" + "---|" * 9,
    ]
    rows = sorted((row["flipped"], seed, row) for seed, found in seeds.items() for row in found)
    for flipped, seed, row in rows:
        low, high = row["interval"]
        cells = [f"{flipped:.0%}", seed, f"{row['accuracy']:.3f} ({low:.3f} to {high:.3f})"]
        by_flipped = row["accuracy"] * (1 - flipped) + (1 - row["accuracy"]) * flipped  # what is expected
        cells += [f"{by_flipped:.3f}", row["probes_below"]]
        cells += [f"{row['sft_gold']:.3f}", f"{row['gold']:.3f}", f"{row['gold'] / row['sft_gold']:.2f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['length']:.1f}"])) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--flipped", type=float, nargs="+", default=[0, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once, each on one core")
    args = parser.parse_args()
    in_parallel(lambda seed: train(args.output_dir / f"seed{seed}", seed, args.flipped), args.seeds, args.jobs)
    seeds = {seed: read_seed(args.output_dir / f"seed{seed}", args.flipped) for seed in args.seeds}
    write_json(seeds, str(args.output_dir), "label_noise.json")
    text = "\n".join(table(seeds))
    (args.output_dir / "label_noise.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_script(main)
