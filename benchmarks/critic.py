"""Healthy PPO runs in the demo's world: does the guard keep quiet, and is a critic with an adapter of its own worth it?

    python -m benchmarks.critic --output_dir critic --seeds 0 1 2 3 4 5 6 7 8 9 --critic_seeds 0 1 2 3 4

For each seed a reward model and a PPO run with the demo's settings, its values from a head on the policy; and for the
critic seeds a run that differs in --critic adapter alone, one after the other on the same core.  Gold is compared after
equal time: where the run with the head ends, the other one has done fewer iterations.  Writes critic.md; work that is
already in --output_dir is not repeated.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.runs import in_parallel, judge_adapters, make_world_and_sft, train_ppo, train_reward
from demo.gold import gold_score
from utils.console import run_script
from utils.files import read_jsonl

LAST = 4  # iterations whose rollouts make one figure


def train(folder: Path, seed: int, critics: list[str]) -> None:
    """Reward model and PPO runs of one seed."""
    make_world_and_sft(folder, seed)
    train_reward(
        folder, seed, "reward", f"{folder}/world/preferences.jsonl", f"{folder}/world/preferences_heldout.jsonl"
    )
    for critic in critics:
        weak = ["--allow_weak_reward", "true"]
        train_ppo(folder, seed, critic, "reward", f"{folder}/world/prompts.jsonl", "--critic", critic, *weak)


def read_run(folder: Path) -> dict[str, Any]:
    """Seconds of an iteration (median), gold of the rollouts by iteration, and what the guard said."""
    metrics = [row for row in read_jsonl(f"{folder}/metrics.jsonl") if "score_mean" in row]
    gold: dict[int, list[float]] = {}
    for row in read_jsonl(f"{folder}/samples.jsonl"):
        gold.setdefault(row["iteration"], []).append(gold_score(row["prompt"], row["response"]))
    return {
        "seconds": median(row["seconds"] for row in metrics),
        "gold": [mean(gold[iteration]) for iteration in sorted(gold)],
        "value_loss": mean(row["value_loss"] for row in metrics[:5]),
        "warned": sum(row["guard/signs"] > 0 for row in metrics),
        "alarms": sum(row["guard/recent_alarms"] > 0 for row in metrics),
        "run": json.loads((folder / "run.json").read_text(encoding="utf-8")),
    }


def healthy_table(output: Path, seeds: list[int]) -> list[str]:
    """A row a seed: the reward model, gold of SFT, last and best policy, and the guard."""
    lines = [
        "| seed | reward accuracy | failed probes | SFT gold | last gold | best gold | best at | SFT length | best length | "
        "iterations with a warning | with an alarm | stopped |",
        "|" + "---|" * 12,
    ]
    for seed in seeds:
        folder = output / f"seed{seed}"
        card = json.loads((folder / "reward" / "reward_card.json").read_text(encoding="utf-8"))
        run = read_run(folder / "head")
        adapters = {"last": folder / "head", "best": folder / "head" / "best"}
        _, sft, last, best = judge_adapters(folder, "reward", adapters)
        cells = [
            seed,
            f"{card['accuracy']:.3f}",
            "; ".join(card["failed"]) or "none",
            *(f"{row.gold:.3f}" for row in (sft, last, best)),
            run["run"]["best"]["iteration"],
            *(f"{row.length:.1f}" for row in (sft, best)),
            run["warned"],
            run["alarms"],
            "yes" if run["run"]["guard"]["stopped"] else "no",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def critic_table(output: Path, seeds: list[int]) -> list[str]:
    """A row a seed: time of an iteration, early value loss, and gold at equal iterations and at equal time."""
    lines = [
        "| seed | seconds an iteration, adapter / head | value loss of the first 5 iterations: head | adapter | "
        "gold at the end: head | adapter | adapter after the same time |",
        "|" + "---|" * 7,
    ]
    for seed in seeds:
        head, adapter = (read_run(output / f"seed{seed}" / critic) for critic in ("head", "adapter"))
        ratio = adapter["seconds"] / head["seconds"]
        count = max(LAST, round(len(head["gold"]) / ratio))
        ends = [head["gold"][-LAST:], adapter["gold"][-LAST:], adapter["gold"][count - LAST : count]]
        cells = [seed, f"{ratio:.2f}", f"{head['value_loss']:.3f}", f"{adapter['value_loss']:.3f}"]
        lines.append("| " + " | ".join(map(str, [*cells, *(f"{mean(end):.3f}" for end in ends)])) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for all runs and the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--critic_seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--jobs", type=int, default=2, help="seeds at once, a core each")
    args = parser.parse_args()

    def work(seed: int) -> None:
        critics = ["head", "adapter"] if seed in args.critic_seeds else ["head"]
        train(args.output_dir / f"seed{seed}", seed, critics)

    in_parallel(work, args.seeds, args.jobs)
    lines = [*healthy_table(args.output_dir, args.seeds), "", *critic_table(args.output_dir, args.critic_seeds)]
    text = "\n".join(lines) + "\n"
    (args.output_dir / "critic.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_script(main)
