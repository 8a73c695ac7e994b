"""The collapse that PPO is known for, reproduced and cured, in the demo's world.

    python -m benchmarks.collapse --output_dir collapse --seeds 0 1 2 3 4 5 6 7 8 9
    python -m benchmarks.collapse --output_dir collapse --seeds 0 1 2 --ablation

Preference data with the usual gap (demo/world.py, gapped_preference_rows): the better reply is mostly the shorter one, and
no reply is broken, so nothing says what an empty one is worth.  For each seed a base, SFT, a plain reward model and one
with broken replies are trained once, and every arm starts from them, with the same prompts, iterations and learning rate:

    A  plain reward model, EOS allowed as a first token, no floor, guard only watching
    B  the same with EOS suppressed as a first token
    C  reward model trained with broken replies, EOS suppressed, floor, guard that stops; its result is best/

Gold is the world's own judgement by rules (demo/gold.py), which no part of the training sees.  Curves are of the rollouts,
64 replies each; the tables are of 192 held-out prompts.  Writes collapse.md, collapse.json and collapse.png; work that is
already in --output_dir is not repeated.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.runs import in_parallel, judge_adapters, make_world_and_sft, train_ppo, train_reward, write_rows
from demo import world
from demo.gold import gold_score
from demo.table import Row
from utils.console import run_script
from utils.files import read_jsonl, write_json

PLAIN, ROBUST = "reward_plain", "reward_robust"
WEAK = ["--allow_weak_reward", "true"]
NO_CURE = [*WEAK, "--floor_broken_replies", "false", "--guard", "warn"]
EMPTY_ALLOWED = ["--begin_suppress_tokens", "none"]
ARMS = {  # name -> (reward model, arguments of rl_training.py)
    "A": (PLAIN, [*NO_CURE, *EMPTY_ALLOWED]),
    "B": (PLAIN, NO_CURE),
    "C": (ROBUST, WEAK),
}
ABLATION = {
    "only the reward model": (ROBUST, [*NO_CURE, *EMPTY_ALLOWED]),
    "only the floor": (PLAIN, [*NO_CURE, *EMPTY_ALLOWED, "--floor_broken_replies", "true"]),
    "only the guard": (PLAIN, [*NO_CURE, *EMPTY_ALLOWED, "--guard", "stop"]),
    "all but the reward model": (PLAIN, WEAK),
    "all but the guard": (ROBUST, [*WEAK, "--guard", "warn"]),
}
COLOURS = {"A": "#d55e00", "B": "#0072b2", "C": "#009e73"}
TITLES = {"score": "score (reward model)", "gold": "gold score (rules)", "length": "reply length (tokens)"}
LAST = 3  # iterations whose rollouts make one figure


def prepare(folder: Path, seed: int) -> None:
    """World, SFT, data and both reward models of one seed."""
    make_world_and_sft(folder, seed)
    pairs = write_rows(folder / "pairs.jsonl", world.gapped_preference_rows(seed, 3200))
    held_out = write_rows(folder / "pairs_heldout.jsonl", world.gapped_preference_rows(seed, 400, held_out=True))
    train_reward(folder, seed, PLAIN, pairs, held_out, "--degenerate_ratio", "0")
    train_reward(folder, seed, ROBUST, pairs, held_out)


def run_arm(folder: Path, seed: int, arm: str, iterations: int) -> None:
    """PPO of one seed and arm."""
    reward, arguments = {**ARMS, **ABLATION}[arm]
    length = ["--steps", f"{iterations}", "--save_freq", f"{iterations}", "--lr_scheduler_type", "constant"]
    name = arm.replace(" ", "_")
    train_ppo(folder, seed, name, reward, f"{folder}/world/prompts.jsonl", *length, *arguments)


def read_arm(folder: Path, arm: str) -> dict[str, Any]:
    """Curves of a run over its iterations, and what the guard said."""
    output = folder / arm.replace(" ", "_")
    curves: dict[str, list[float]] = {name: [] for name in ("score", "gold", "length", "empty")}
    rows = read_jsonl(str(output / "samples.jsonl"))
    for iteration in range(1, rows[-1]["iteration"] + 1):
        replies = [row for row in rows if row["iteration"] == iteration]
        curves["score"].append(mean(row["score"] for row in replies))
        curves["length"].append(mean(row["length"] for row in replies))
        curves["gold"].append(mean(gold_score(row["prompt"], row["response"]) for row in replies))
        curves["empty"].append(mean(not row["response"].strip() for row in replies))
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return {"curves": curves, "best": run["best"], **run["guard"]}


def judge_seed(folder: Path, arms: list[str]) -> dict[str, Any]:
    """Of one seed: the SFT model on held-out prompts, and each arm with its curves, its last policy and its best one."""
    outputs = {arm: folder / arm.replace(" ", "_") for arm in arms}
    adapters = {**outputs, **{f"{arm}, best": path / "best" for arm, path in outputs.items()}}
    rows: dict[str, Row] = {row.name: row for row in judge_adapters(folder, PLAIN, adapters)}
    figures = {name: {"gold": row.gold, "length": row.length, "empty": row.empty} for name, row in rows.items()}
    card = json.loads((folder / ROBUST / "reward_card.json").read_text(encoding="utf-8"))
    found = {arm: {**read_arm(folder, arm), "last": figures[arm], "taken": figures[f"{arm}, best"]} for arm in arms}
    return {"sft": figures["SFT"], "card_failed": card["failed"], "arms": found}


def at_stop(arm: dict[str, Any]) -> float | None:
    """Gold of the rollouts when the guard called the collapse, over the last `LAST` iterations; None if it did not."""
    end = arm["collapse_at"]
    return None if end is None else mean(arm["curves"]["gold"][max(0, end - LAST) : end])


def result_of(arm: str, found: dict[str, Any]) -> dict[str, float]:
    """What a user of this arm ends up with: best/ where the guard may act, else the last policy."""
    return found["taken"] if arm in ("C", "only the guard", "all but the reward model") else found["last"]


def seed_table(seeds: dict[int, dict[str, Any]]) -> list[str]:
    """A row a seed: gold and length of SFT and of each arm's result, and where the guard spoke."""
    lines = [
        "| seed | SFT gold | A gold | B gold | C gold | SFT length | A length | B length | C length | most empty of A | "
        "guard on A | gold then | guard on B | gold then | C stopped at | C's best |",
        "|" + "---|" * 16,
    ]
    for seed, one in seeds.items():
        arms = one["arms"]
        results = {arm: result_of(arm, arms[arm]) for arm in ARMS}
        cells = [
            seed,
            f"{one['sft']['gold']:.3f}",
            *(f"{results[arm]['gold']:.3f}" for arm in ARMS),
            f"{one['sft']['length']:.1f}",
            *(f"{results[arm]['length']:.1f}" for arm in ARMS),
            f"{max(arms['A']['curves']['empty']):.0%}",
        ]
        for arm in ("A", "B"):
            gold = at_stop(arms[arm])
            cells += [arms[arm]["collapse_at"] or "-", "-" if gold is None else f"{gold:.3f}"]
        cells += [arms["C"]["collapse_at"] or "-", arms["C"]["best"]["iteration"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def counts(seeds: dict[int, dict[str, Any]]) -> list[str]:
    """The claims, counted."""
    total = len(seeds)

    def count(holds: Any) -> str:
        return f"{sum(bool(holds(one)) for one in seeds.values())} of {total}"

    lines = [
        "- C ends above SFT in gold: " + count(lambda s: s["arms"]["C"]["taken"]["gold"] > s["sft"]["gold"]),
        "- C's length within 0.5 to 2 times SFT's: "
        + count(lambda s: 0.5 <= s["arms"]["C"]["taken"]["length"] / s["sft"]["length"] <= 2),
        "- the reward model of C passed its card: " + count(lambda s: not s["card_failed"]),
    ]
    for arm in ("A", "B"):
        last = f"{arm} ends below SFT in gold: "
        lines += [
            last + count(lambda s, arm=arm: s["arms"][arm]["last"]["gold"] < s["sft"]["gold"]),
            f"{arm} ends below 0.7 times SFT's length: "
            + count(lambda s, arm=arm: s["arms"][arm]["last"]["length"] < 0.7 * s["sft"]["length"]),
            f"the guard calls the collapse of {arm}: " + count(lambda s, arm=arm: s["arms"][arm]["collapse_at"]),
            f"and before gold is under SFT's (rollouts, mean of {LAST} iterations): "
            + count(lambda s, arm=arm: (at_stop(s["arms"][arm]) or 0) >= s["sft"]["gold"]),
            f"best/ of {arm} at that time is above SFT in gold: "
            + count(lambda s, arm=arm: s["arms"][arm]["taken"]["gold"] > s["sft"]["gold"]),
        ]
        lines[-5:] = [f"- {line}" for line in lines[-5:]]
    return lines


def ablation_table(seeds: dict[int, dict[str, Any]], arms: list[str]) -> list[str]:
    """A row an arm: gold and length of its result, as shares of SFT's, over the seeds."""
    lines = ["| arm | gold / SFT: mean | worst | length / SFT: mean | above SFT in gold |", "|---|---|---|---|---|"]
    for arm in arms:
        pairs = [(result_of(arm, one["arms"][arm]), one["sft"]) for one in seeds.values()]
        gold = [result["gold"] / sft["gold"] for result, sft in pairs]
        length = [result["length"] / sft["length"] for result, sft in pairs]
        above = f"{sum(ratio > 1 for ratio in gold)} of {len(gold)}"
        lines.append(f"| {arm} | {mean(gold):.2f} | {min(gold):.2f} | {mean(length):.2f} | {above} |")
    return lines


def draw(seeds: dict[int, dict[str, Any]], path: Path) -> None:
    """Score, gold and length over iterations: a thin line a run, a thick one for the mean of A and B, a dot at C's best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(16, 5), dpi=110)
    for axes, (name, title) in zip(panels, TITLES.items(), strict=True):
        for arm, colour in COLOURS.items():
            runs = [one["arms"][arm]["curves"][name] for one in seeds.values()]
            for run in runs:
                axes.plot(range(1, len(run) + 1), run, color=colour, linewidth=0.5, alpha=0.45)
            if arm != "C":
                means = [mean(values) for values in zip(*runs, strict=True)]
                axes.plot(
                    range(1, len(means) + 1), means, color=colour, linewidth=2.5, label=f"{arm}: mean of {len(runs)}"
                )
            else:
                best = [one["arms"]["C"]["best"]["iteration"] for one in seeds.values()]
                taken = [run[max(0, iteration - 1)] for run, iteration in zip(runs, best, strict=True)]
                axes.scatter(best, taken, color=colour, s=30, zorder=3, label="C: best/")
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    sft = mean(one["sft"]["gold"] for one in seeds.values())
    panels[1].axhline(sft, color="black", linewidth=1, linestyle="--")
    panels[1].text(1, sft, " SFT", va="bottom")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for all runs and the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--iterations", type=int, default=60, help="of PPO")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at once, a core each")
    parser.add_argument("--ablation", action="store_true", help="the arms of the ablation too")
    args = parser.parse_args()
    arms = [*ARMS, *(ABLATION if args.ablation else ())]

    # ---- Training ----
    def train(seed: int) -> None:
        folder = args.output_dir / f"seed{seed}"
        prepare(folder, seed)
        for arm in arms:
            run_arm(folder, seed, arm, args.iterations)

    in_parallel(train, args.seeds, args.jobs)

    # ---- Report ----
    seeds = {seed: judge_seed(args.output_dir / f"seed{seed}", arms) for seed in args.seeds}
    lines = [*seed_table(seeds), "", *counts(seeds), "", *ablation_table(seeds, arms)]
    report = "\n".join(lines) + "\n"
    name = "ablation" if args.ablation else "collapse"
    (args.output_dir / f"{name}.md").write_text(report, encoding="utf-8")
    write_json(seeds, str(args.output_dir / f"{name}.json"))
    draw(seeds, args.output_dir / f"{name}.png")
    print(report)


if __name__ == "__main__":
    run_script(main)
