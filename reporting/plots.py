"""Pictures: the curves of stage 3 and the reward card."""

import json
import os
from typing import Any

import numpy as np

from utils.files import read_jsonl

CURVES = {  # metrics of stage 3 -> title of the picture
    "score_mean": "score (reward model)",
    "gold_mean": "gold (your own measure)",
    "response_length": "reply length (tokens)",
    "kl": "KL to the SFT model (nats a reply)",
    "entropy": "entropy (nats a token)",
    "policy_loss": "policy loss",
    "value_loss": "value loss",
    "clip_fraction": "share of clipped ratios",
}


def draw_curves(folder: str) -> None:
    """Draw folder/metrics.jsonl of stage 3 as folder/plots/*.png, one picture a metric, over iterations."""
    import matplotlib  # a second of import time that --help should not pay

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in read_jsonl(os.path.join(folder, "metrics.jsonl")) if "score_mean" in row]
    with open(os.path.join(folder, "run.json"), encoding="utf-8") as file:
        run = json.load(file)
    best, collapse = (run.get("best") or {}).get("iteration"), run.get("guard", {}).get("collapse_at")
    marks = [(best, "best", "#009e73", "--"), (collapse, "collapse", "#d55e00", "-")]
    alarms = [row["iteration"] for row in rows if row.get("guard/alarms", 0) > 0]
    os.makedirs(os.path.join(folder, "plots"), exist_ok=True)
    for metric, title in CURVES.items():
        if not any(metric in row for row in rows):  # gold, where there is none
            continue
        figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
        axes.plot([row["iteration"] for row in rows], [row.get(metric) for row in rows], linewidth=1.8)
        if metric == "score_mean":
            low = [row["score_mean"] - row["score_std"] for row in rows]
            high = [row["score_mean"] + row["score_std"] for row in rows]
            axes.fill_between([row["iteration"] for row in rows], low, high, alpha=0.15, label="one standard deviation")
        for iteration, label, colour, style in marks:
            if iteration is not None:
                axes.axvline(iteration, linestyle=style, linewidth=1.2, color=colour, label=label)
        if alarms:  # along the lower edge, whatever the numbers are
            place = axes.get_xaxis_transform()
            axes.scatter(alarms, [0.03] * len(alarms), marker="^", color="#d55e00", transform=place, label="alarm")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        axes.set(xlabel="iteration", title=title)
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(os.path.join(folder, "plots", f"{metric}.png"))
        pyplot.close(figure)


def draw_card(card: dict[str, Any], scores: dict[str, np.ndarray], folder: str) -> None:
    """The probes, and where the scores of each sort of reply lie, as folder/reward_card.png."""
    import matplotlib  # a second of import time that --help should not pay

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.5), dpi=110)
    kinds = list(card["probes"])[::-1]
    colours = ["#0072b2" if card["probes"][kind] >= card["threshold"] else "#d55e00" for kind in kinds]
    left.barh(kinds, [card["probes"][kind] for kind in kinds], color=colours)
    left.axvline(card["threshold"], color="black", linewidth=1, linestyle="--")
    wanted = f"broken replies (dashed: {card['threshold']}, what is wanted)"
    left.set(xlim=(0, 1), xlabel="share of prompts where the good reply beats the broken one", title=wanted)
    names = list(scores)[::-1]  # from the top, in the same order as on the left
    boxes = [scores[name] for name in names]
    right.boxplot(boxes, orientation="horizontal", showfliers=False, tick_labels=names)
    right.set(xlabel="score", title="where the scores lie (box: middle half)")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(os.path.join(folder, "reward_card.png"))
    pyplot.close(figure)
