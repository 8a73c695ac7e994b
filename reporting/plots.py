"""Pictures: a metric over the iterations of one or several runs, as plots/*.png and in report.html, and the reward card."""

import html
import io
import json
import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reporting.html import WEB
from reporting.metrics import OF_PPO, Metric
from rewards.reward_card import judge_probes
from utils.files import read_jsonl

if TYPE_CHECKING:  # matplotlib is a second of import time that --help should not pay
    from matplotlib.figure import Figure

RUN_COLOURS = 8  # --c0 ... --c7 of style.css
DASHES = ((), (4, 2), (1, 2), (5, 2, 1, 2))  # the next eight runs are told apart by these


class Curve(NamedTuple):
    """One metric of one run, and what is marked in it."""

    run: int  # decides colour and dashes
    counts: Sequence[float]  # iterations or steps
    values: Sequence[float]  # NaN is a gap
    best: float | None = None
    collapse: float | None = None
    alarms: Sequence[float] = ()
    spread: Sequence[float] | None = None  # a standard deviation around the values


def colours() -> dict[str, str]:
    """Name -> colour of the light theme of the pages."""
    return dict(re.findall(r"--(\w+): (#\w{6});", (WEB / "style.css").read_text(encoding="utf-8").split("@media")[0]))


def dashes_of(run: int) -> tuple[int, ...]:
    """Lengths of dashes and gaps in a run's curve; none where it is drawn through."""
    return DASHES[run // RUN_COLOURS % len(DASHES)]


def limits(values: np.ndarray) -> tuple[float, float]:
    """Ends of the upright axis: some room around the values, and never so narrow that rounding errors fill the picture."""
    low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
    if low > high or low == high == 0:
        return 0.0, 1.0
    size = max(abs(low), abs(high))
    half = size * 0.1 if low == high else max((high - low) * 0.55, size * 1e-3)
    return (low + high) / 2 - half, (low + high) / 2 + half


def draw(metric: Metric, curves: Sequence[Curve], counter: str) -> "Figure":
    """A metric over `counter`, a curve a run; the caller saves the figure.

    Best: a dashed upright line.  Collapse: a red one with a cross.  Alarms: triangles along the lower edge, a row a run.
    The gids become classes in `as_svg`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    palette = colours()
    figure = Figure(figsize=(6, 3))
    axes = figure.add_axes((0.15, 0.16, 0.83, 0.75))
    edge = axes.get_xaxis_transform()  # counts along, shares of the picture upwards
    finite: list[np.ndarray] = []
    for place, curve in enumerate(curves):
        gid, colour = f"run{curve.run}", palette[f"c{curve.run % RUN_COLOURS}"]
        counts, values = np.array(curve.counts, float), np.array(curve.values, float)
        values[~(np.abs(values) < 1e300)] = np.nan  # no axis reaches that far
        known = np.isfinite(values)
        dashes = dashes_of(curve.run)
        style = (0, dashes) if dashes else "-"
        axes.plot(counts, values, color=colour, linestyle=style, linewidth=1.8, gid=f"{gid} line")
        alone = known & ~np.append(False, known[:-1]) & ~np.append(known[1:], False)  # no line reaches these
        if alone.any():
            axes.plot(counts[alone], values[alone], "o", color=colour, markersize=4, gid=gid)
        finite.append(values[known])
        if curve.spread is not None:
            low, high = values - curve.spread, values + curve.spread
            band = {"color": colour, "alpha": 0.15, "linewidth": 0, "label": "one standard deviation", "gid": gid}
            axes.fill_between(counts, low, high, **band)
            finite += [low[known], high[known]]
        if curve.best is not None:
            axes.axvline(curve.best, color=colour, linestyle="--", linewidth=1.2, label="best", gid=f"{gid} best")
        if curve.collapse is not None:
            red = {"color": palette["bad"], "linewidth": 1.6, "label": "collapse"}
            axes.axvline(curve.collapse, gid=f"{gid} collapse", **red)
            cross = {"color": colour, "markersize": 8, "markeredgewidth": 2, "transform": edge, "zorder": 4}
            axes.plot([curve.collapse], [0.94], "x", gid=f"{gid} cross", **cross)
        if curve.alarms:
            row = [0.03 + 0.05 * place] * len(curve.alarms)
            mark = {"color": colour, "markersize": 6, "transform": edge, "label": "alarm"}
            axes.plot(curve.alarms, row, "^", gid=f"{gid} alarm", **mark)
    axes.set(ylim=limits(np.concatenate(finite)), xlabel=counter, ylabel=metric.unit)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=(1, 2, 5, 10), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y", color=palette["line"], linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=palette["faint"])
    for text in (axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()):
        text.set_color(palette["faint"])
    return figure


def as_svg(figure: "Figure", name: str, label: str) -> str:
    """A figure as an element of a page: text stays text, and colours and font are those of style.css.

    name: of the figure, no other one of the page has it: what is defined in one (clips, marks) has an id made from it, and
    all other ids are gone.  label: what it shows, for those who cannot see it.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ascii(name)}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # a date would be another one each time
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"<style.*?</style>|font-(size|family):[^;\"]*;? ?", "", file.getvalue(), flags=re.DOTALL)
    for variable, colour in colours().items():
        svg = svg.replace(colour, f"var(--{variable})")
    used = set(re.findall(r"#(\w+)[)\"]", svg))
    svg = re.sub(r' id="(run[^"]*)"', r' class="\1"', svg)
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    head = f'<svg role="img" aria-label="{html.escape(label)}" viewBox='
    return re.sub(
        r"\s*\n\s*", " ", re.sub(r".*<svg .*?viewBox=", lambda _: head, svg, count=1, flags=re.DOTALL)
    ).strip()


def draw_curves(folder: str) -> None:
    """Draw folder/metrics.jsonl of stage 3 as folder/plots/*.png, one picture a metric, over iterations."""
    rows = [row for row in read_jsonl(os.path.join(folder, "metrics.jsonl")) if "score_mean" in row]
    with open(os.path.join(folder, "run.json"), encoding="utf-8") as file:
        run = json.load(file)
    counts = [row["iteration"] for row in rows]
    best, collapse = (run.get("best") or {}).get("iteration"), run.get("guard", {}).get("collapse_at")
    alarms = [row["iteration"] for row in rows if row.get("guard/alarms", 0) > 0]
    os.makedirs(os.path.join(folder, "plots"), exist_ok=True)
    for metric in OF_PPO.values():
        if not metric.picture or not any(metric.name in row for row in rows):  # gold, where there is none
            continue
        values = [row.get(metric.name, math.nan) for row in rows]
        spread = [row["score_std"] for row in rows] if metric.name == "score_mean" else None
        figure = draw(metric, [Curve(0, counts, values, best, collapse, alarms, spread)], "iteration")
        (axes,) = figure.axes
        axes.set_title(metric.title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        figure.savefig(os.path.join(folder, "plots", f"{metric.name}.png"), dpi=150)


def draw_card(card: dict[str, Any], scores: dict[str, np.ndarray], folder: str) -> None:
    """The probes, and where the scores of each sort of reply lie, as folder/reward_card.png."""
    card_figure(card, scores).savefig(os.path.join(folder, "reward_card.png"), dpi=110)


def card_figure(card: dict[str, Any], scores: dict[str, np.ndarray]) -> "Figure":
    """Bars with their 95% intervals: blue ones passed, red ones failed, yellow ones are not shown, grey ones do not decide.

    scores: float [N] by sort of response.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="tight")
    left, right = figure.subplots(1, 2)
    threshold, intervals = card["threshold"], card["probes_ci95"]
    probes = dict(reversed(card["probes"].items()))
    judged = judge_probes(card)
    colour = {"passed": "#0072b2", "failed": "#d55e00", "not shown": "#e69f00", "exempt": "#8c8c8c"}
    names = [
        f"{kind} ({'' if judged[kind] == 'passed' else judged[kind] + ', '}{card['probe_counts'][kind]} prompts)"
        for kind in probes
    ]
    # rounding puts an end of the interval of 0 or 1 a hair on the wrong side, and no bar of errors may be negative
    reach = [[max(0.0, probes[k] - intervals[k][0]), max(0.0, intervals[k][1] - probes[k])] for k in probes]
    left.barh(names, probes.values(), color=[colour[judged[kind]] for kind in probes])
    left.errorbar(probes.values(), names, xerr=np.array(reach).reshape(-1, 2).T, fmt="none", ecolor="black", capsize=2)
    left.axvline(threshold, color="black", linewidth=1, linestyle="--")
    wanted = f"broken replies (dashed: {threshold}, what is wanted; lines: 95% intervals)"
    left.set(xlim=(0, 1), xlabel="share of prompts where the good reply beats the broken one", title=wanted)
    names = list(scores)[::-1]  # from the top, in the same order as on the left
    boxes = [scores[name] for name in names]
    right.boxplot(boxes, orientation="horizontal", showfliers=False, tick_labels=names)
    right.set(xlabel="score", title="where the scores lie (box: middle half)")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    return figure
