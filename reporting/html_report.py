"""report.html: what one or several runs left behind, as one page that opens offline.

Curves, every reply of stage 3 to search and sort, the reward card and run.json.  Whatever number is in metrics.jsonl gets a
curve; those of reporting.metrics come first and in plain words.
"""

import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from reporting.html import html_page, write_page
from reporting.metrics import group_metrics, metric_of
from reporting.plots import RUN_COLOURS, Curve, as_svg, dashes_of, draw
from rewards.reward_card import PROBE_THRESHOLD, judge_probes
from utils.console import InputError, say
from utils.files import read_json_object
from utils.hashing import in_share

STAGES = {"sft": "Stage 1: SFT", "reward": "Stage 2: reward model", "ppo": "Stage 3: PPO"}  # in the order of the page
COUNTERS = ("iteration", "step", "epoch")  # what curves are drawn over, never a curve
CARD_TITLES = {  # of the reward card; what is not here is a metric's title, or its own name
    "accuracy": "accuracy on pairs",
    "accuracy_ci95": "accuracy, 95% interval",
    "length_only_accuracy": "accuracy of counting tokens alone",
    "length_rule": "the side that wins by counting tokens alone",
    "against_length_accuracy": "accuracy on the pairs that this does not get right",
    "against_length_ci95": "accuracy on those, 95% interval",
    "against_length_pairs": "number of those",
    "length_matched_accuracy": "accuracy where the replies are equally long",
    "shorter_chosen_accuracy": "accuracy where the shorter one is chosen",
    "longer_chosen_accuracy": "accuracy where the longer one is chosen",
    "short_good_accuracy": "accuracy where a short one is chosen",
    "length_matched_pairs": "pairs of equally long replies",
    "shorter_chosen_pairs": "pairs whose shorter one is chosen",
    "longer_chosen_pairs": "pairs whose longer one is chosen",
    "short_good_pairs": "pairs with a short chosen one",
    "length_correlation": "correlation of score and length",
    "calibration_error": "calibration error",
    "temperature": "temperature that would calibrate it",
    "reload_difference": "largest difference after saving and loading",
    "sft_score_mean": "mean score of SFT replies",
    "sft_score_std": "standard deviation of the scores of SFT replies",
    "sft_replies": "SFT replies",
    "ensemble_size": "reward adapters in the ensemble",
    "ensemble_penalty": "penalty for their disagreement",
    "threshold": "share of prompts that a probe has to reach",
    "exempt": "probes that do not decide",
    "failed": "what failed",
    "not_shown": "what too few prompts do not tell",
}
# of the reward card: a number for each kind of broken reply, and the two ends of an interval
PROBES = ("probes", "probe_counts", "probes_above_sft", "probes_ci95")
SAMPLE_NUMBERS = ("iteration", "score", "gold", "length", "kl")  # first, in this order


@dataclass
class Run:
    """What the folder of one run holds."""

    name: str
    folder: str
    record: dict[str, Any]  # run.json
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    card: dict[str, Any]  # empty where there is none
    card_folder: str  # its own, or that of the reward model that it used

    @property
    def stage(self) -> str:
        return str(self.record.get("stage", "run"))

    @property
    def counter(self) -> str:
        """What this run's metrics are counted in."""
        return "iteration" if any("iteration" in row for row in self.metrics) else "step"

    @cached_property
    def series(self) -> dict[str, tuple[list[float], list[float]]]:
        """Each metric as (counts, values)."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for row in self.metrics:
            count = row.get(self.counter, 0)
            for name, value in flatten(row).items():
                if is_count(count) and (isinstance(value, float) or is_count(value)) and name not in COUNTERS:
                    counts, values = found.setdefault(name, ([], []))
                    if counts and counts[-1] == count:  # measured again after the training
                        values[-1] = float(value)
                    else:
                        counts.append(count)
                        values.append(float(value))
        return found

    @property
    def best(self) -> float | None:
        """The iteration that run.json calls the best one, None where it names none."""
        return self._said_of("best", self.counter)

    @property
    def collapse(self) -> float | None:
        """The iteration in which the guard was certain of a collapse, None where it was not."""
        return self._said_of("guard", "collapse_at")

    @property
    def alarms(self) -> list[float]:
        """The iterations with an alarm of the guard."""
        return [count for count, alarms in zip(*self.series.get("guard/alarms", ([], [])), strict=True) if alarms > 0]

    def _said_of(self, part: str, key: str) -> float | None:
        facts = self.record.get(part)
        count = facts.get(key) if isinstance(facts, Mapping) else None
        return count if is_count(count) else None


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_run(folder: str, name: str) -> Run:
    """Read what a run wrote; it may still be running.  Raises InputError when it is no run's folder."""
    if not os.path.isfile(os.path.join(folder, "metrics.jsonl")):
        raise InputError(f"there is no metrics.jsonl in {folder}; give the output folder of a training script")
    record = read_json_object(os.path.join(folder, "run.json"))
    # stage 3 shows the card of the model that gave the scores
    card_folder = record.get("arguments", {}).get("reward_model_lora_path") or folder
    card = _read_card(card_folder)
    metrics, samples = (_read_rows(folder, file) for file in ("metrics.jsonl", "samples.jsonl"))
    return Run(name, folder, record, metrics, samples, card, card_folder)


def _read_card(folder: str) -> dict[str, Any]:
    """The reward card, empty where there is none.

    Raises InputError where its probes are no numbers: these go into the page without being escaped.
    """
    path = os.path.join(folder, "reward_card.json")
    card = read_json_object(path)
    drawn = flatten({name: card[name] for name in ("threshold", *PROBES) if name in card})
    wrong = [name for name, value in drawn.items() if not _is_drawn(name, value)]
    if wrong:
        raise InputError(f"{path} is no reward card: {wrong[0]} is no number; train the reward model again")
    return card


def _is_drawn(name: str, value: Any) -> bool:
    """Whether `probe_table` draws this value of a flattened card under that name: a number, or the ends of an interval."""
    if name.startswith("probes_ci95/"):
        return isinstance(value, list) and len(value) == 2 and all(isinstance(end, (int, float)) for end in value)
    return name not in PROBES and isinstance(value, (int, float))


def _read_rows(folder: str, file: str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, without a last line that is still being written; none where there is no file."""
    path = os.path.join(folder, file)
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as stream:
        try:
            rows = [json.loads(line) for line in stream if line.endswith("\n")]
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON: {error}; correct or remove the line") from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} has lines that are no objects; correct or remove them")
    return rows


def short_names(folders: Sequence[str]) -> list[str]:
    """The last part of each folder's path, as many parts of all where that does not tell them apart."""
    parts = [os.path.realpath(folder).split(os.sep) for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"the same run was given twice: {', '.join(folders)}; give each one once")


def is_count(value: Any) -> bool:
    """Whether this is a number that an axis reaches: a file from elsewhere may hold anything, integers without end too."""
    return isinstance(value, (int, float)) and abs(value) < 2**53


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, the keys joined by slashes."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------


def runs_by_stage(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Heading -> the runs of that stage by number, in the order of the page.

    Stages are never drawn into one picture: a loss of SFT and one of PPO have nothing in common.
    """
    stages: dict[str, dict[int, Run]] = {title: {} for title in STAGES.values()}
    for number, run in enumerate(runs):
        stages.setdefault(STAGES.get(run.stage, run.stage), {})[number] = run
    return {title: members for title, members in stages.items() if members}


def curves_of(name: str, runs: Mapping[int, Run]) -> list[Curve]:
    """One metric of all runs that have it; the numbers of the runs decide their colours."""
    found = []
    for number, run in runs.items():
        if name in run.series:
            counts, values = run.series[name]
            found.append(Curve(number, counts, values, run.best, run.collapse, run.alarms))
    return found


def curve_section(title: str, runs: Mapping[int, Run]) -> str:
    """HTML of a stage: which run has which colour, and a picture a metric under their headings."""
    counter = next(iter(runs.values())).counter
    parts = [f'<section class="stage"><h2 dir="auto">{html.escape(title)}</h2><div class="bar legend">']
    parts += [_key(number, run, len(runs) > 1) for number, run in runs.items()]
    parts.append("</div>")
    # one number in a whole run is no curve: those are in the table of single figures
    names = {name for run in runs.values() for name, (counts, _) in run.series.items() if len(counts) > 1}
    for heading, metrics in group_metrics(names).items():
        parts.append(f'<h3>{html.escape(heading)}</h3><div class="charts">')
        for name in metrics:
            metric = metric_of(name)
            figure = draw(metric, curves_of(name, runs), counter)
            flat = "" if metric.title == name else f"<code>{html.escape(name)}</code>"
            parts.append(
                f'<figure class="chart" data-metric="{html.escape(name)}"><figcaption>{html.escape(metric.title)}{flat}'
            )
            parts.append(f"</figcaption>{as_svg(figure, f'{title} {name}', metric.label)}</figure>")
        parts.append("</div>")
    return "".join([*parts, "</section>"])


def _key(number: int, run: Run, several: bool) -> str:
    """HTML of a run in the legend: its line, its name and its marks; a box to switch it off where there are others."""
    words = []
    if run.best is not None:
        words.append(f"dashed upright line: best, {run.counter} {run.best}")
    if run.collapse is not None:
        words.append(f"red line with a cross: collapse, {run.counter} {run.collapse}")
    if run.alarms:
        words.append("triangles: alarms")
    name = html.escape(f"{run.name} ({'; '.join(words)})" if words else run.name)
    dashes = " ".join(str(2 * length) for length in dashes_of(number)) or "none"
    style = f"stroke:var(--c{number % RUN_COLOURS});stroke-width:3;stroke-dasharray:{dashes}"
    line = f'<svg width="28" height="10"><line x2="28" y1="5" y2="5" style="{style}"></line></svg>'
    if not several:
        return f'<span class="key">{line}<bdi>{name}</bdi></span>'
    off = f"<style>body:has(#show{number}:not(:checked)) .run{number} {{ display: none; }}</style>"
    return f'{off}<label class="key"><input type="checkbox" id="show{number}" checked>{line}<bdi>{name}</bdi></label>'


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def chosen_samples(samples: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """All samples, or those of so many prompts that at most about `most` are left.

    Whole prompts, picked by a hash of their text: the same prompt can then still be followed over the iterations.
    """
    share = most / max(1, len(samples))
    return [row for row in samples if in_share(row["prompt"], share)]


def sample_tables(runs: Sequence[Run], most: int) -> dict[str, Any]:
    """The samples of all runs in one table: number columns first, then the run's number, prompt number and response."""
    rows = [(number, row) for number, run in enumerate(runs) for row in chosen_samples(run.samples, most)]
    numeric = {key for _, row in rows for key, value in row.items() if type(value) in (int, float)}  # no bool
    columns = [key for key in SAMPLE_NUMBERS if key in numeric] + sorted(numeric - {*SAMPLE_NUMBERS})
    prompts: dict[str, int] = {}
    return {
        "columns": columns,
        "rows": [
            [
                *(row.get(key) for key in columns),
                number,
                prompts.setdefault(row["prompt"], len(prompts)),
                row["response"],
            ]
            for number, row in rows
        ],
        "prompts": list(prompts),  # read after the rows, which fill it
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """One value as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "–"
    return str(value)


def card_title(key: str) -> str:
    """A number of the reward card in plain words."""
    return CARD_TITLES.get(key) or metric_of(key).label


def fact_table(columns: Sequence[tuple[str, Mapping[str, Any]]], title: Callable[[str], str] = str) -> str:
    """HTML table: a row a key, a column a run.  Rows in which the runs agree have the class "same".

    title: gives a key in plain words.
    """
    flat = [flatten(facts) for _, facts in columns]
    keys = list(dict.fromkeys(key for facts in flat for key in facts))
    parts = ['<div class="scroll"><table class="facts"><thead><tr><th></th>']
    parts += [f'<th dir="auto">{html.escape(name)}</th>' for name, _ in columns]
    parts.append("</tr></thead><tbody>")
    for key in keys:
        cells = [shown(facts.get(key)) for facts in flat]
        same = ' class="same"' if len(set(cells)) == 1 else ""
        parts.append(f'<tr{same}><th scope="row">{html.escape(title(key))}</th>')
        parts += [f'<td class="text" dir="auto">{html.escape(cell)}</td>' for cell in cells]
        parts.append("</tr>")
    return "".join([*parts, "</tbody></table></div>"])


def probe_table(name: str, card: Mapping[str, Any]) -> str:
    """HTML table of a reward card's probes: a row a kind of broken reply, with a bar that says whether it passed."""
    probes, counts, above, intervals = (card.get(part, {}) for part in PROBES)
    threshold = card.get("threshold", PROBE_THRESHOLD)
    head = ["broken reply", "the good one wins", "", "95% interval", "prompts", "above the median SFT reply"]
    parts = [f'<div class="scroll"><table class="facts"><caption dir="auto">{html.escape(name)}</caption><thead><tr>']
    parts += [f"<th>{html.escape(title)}</th>" for title in head]
    parts.append("</tr></thead><tbody>")
    for kind, judged in judge_probes(card).items():
        share, verdict = probes[kind], "" if judged == "passed" else judged
        interval = " to ".join(map(shown, intervals[kind])) if kind in intervals else "–"
        bar = f'<meter min="0" max="1" low="{threshold}" optimum="1" value="{share}"></meter> {shown(share)}'
        parts.append(f'<tr><th scope="row">{html.escape(kind)}</th><td>{bar}</td><td class="{verdict}">{verdict}</td>')
        numbers = (interval, shown(counts.get(kind)), shown(above.get(kind)))
        parts += [f'<td class="number">{text}</td>' for text in numbers]
        parts.append("</tr>")
    return "".join([*parts, "</tbody></table></div>"])


def single_figures(run: Run) -> dict[str, float]:
    """Metrics of which the run has one value only, such as its run time."""
    return {name: values[0] for name, (_, values) in run.series.items() if len(values) == 1}


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def report_page(folders: Sequence[str], max_samples: int) -> str:
    """The whole page for these runs, with about `max_samples` replies of each.

    Raises InputError when one of the folders is no run's.
    """
    runs = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    data = {"runs": [run.name for run in runs], "samples": sample_tables(runs, max_samples)}
    heading = ", ".join(run.name for run in runs)
    # each stage's curves have a heading of their own
    parts = [("curves", "Curves", "".join(curve_section(*stage) for stage in runs_by_stage(runs).items()))]
    figures = [(run.name, single_figures(run)) for run in runs]
    if any(facts for _, facts in figures):
        parts.append(("figures", "Single figures", fact_table(figures, lambda name: metric_of(name).label)))
    owners: dict[str, list[Run]] = {}  # PPO runs of one reward model share its card
    for run in runs:
        if run.card:
            owners.setdefault(os.path.realpath(run.card_folder), []).append(run)
    if owners:
        cards = [(", ".join(run.name for run in members), members[0].card) for members in owners.values()]
        facts = [(name, {key: value for key, value in card.items() if key not in PROBES}) for name, card in cards]
        tables = "".join(probe_table(name, card) for name, card in cards if card.get("probes"))
        parts.append(("card", "Reward card", fact_table(facts, card_title) + tables))
    if data["samples"]["rows"]:
        note = _sample_note(len(data["samples"]["rows"]), sum(len(run.samples) for run in runs))
        parts.append(("samples", "Samples", f'<p class="note">{note}</p>'))
    records = [(run.name, run.record) for run in runs if run.record]
    if records:
        only = '<label><input type="checkbox" id="only-differences"> only where the runs differ</label>'
        facts = (only if len(records) > 1 else "") + fact_table(records)
        parts.append(("record", "run.json", f"<details><summary>How it was made</summary>{facts}</details>"))
    body = [
        f'<h1 dir="auto">{html.escape(heading)}</h1>',
        *(f'<p class="note">{html.escape(_headline(run))}</p>' for run in runs),
        *(_verdict(run) for run in runs if run.collapse is not None),
        *(_what_to_take(run) for run in runs if isinstance(run.record.get("what_to_take"), str)),
        "<nav>" + " ".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in parts) + "</nav>",
        "<noscript><p>The samples need JavaScript; nothing is fetched from anywhere.</p></noscript>",
    ]
    for anchor, name, content in parts:
        title = "" if anchor == "curves" else f"<h2>{name}</h2>"
        body.append(f'<section id="{anchor}">{title}{content}</section>')
    return html_page(heading, "\n".join(body), data, "report")


def _headline(run: Run) -> str:
    """One line about a run."""
    counts = [row[run.counter] for row in run.metrics if is_count(row.get(run.counter))]
    parts = [STAGES.get(run.stage, run.stage), f"{max(counts, default=0)} {run.counter}s"]
    parts += [f"base {run.record['base_model']}"] if "base_model" in run.record else []
    return f"{run.name}: " + ", ".join(parts)


def _verdict(run: Run) -> str:
    """HTML paragraph: what the guard saw of a collapse, and what came of it."""
    guard, at = run.record["guard"], run.collapse
    end = "the guard only warned, and the run went on"
    if guard.get("stopped"):
        end = f"stopped, and rolled back to the policy of iteration {guard.get('rolled_back_to')}"
    signs = str(guard.get("verdict")).removeprefix(f"iteration {at}, ")
    lead = html.escape(f"{run.name}: collapse at iteration {at}; {end}.")
    return f'<p class="verdict" dir="auto"><strong>{lead}</strong> {html.escape(signs)}</p>'


def _what_to_take(run: Run) -> str:
    """HTML paragraph: the sentence with which the run ended."""
    return f'<p class="note" dir="auto">{html.escape(run.name)}: {html.escape(run.record["what_to_take"])}</p>'


def _sample_note(kept: int, total: int) -> str:
    note = "Click a row to read it in full, beside the other replies to the same prompt."
    return note if kept == total else f"{kept:,} of {total:,} replies: those of a random choice of prompts. {note}"


def write_report(folders: Sequence[str], output: str, max_samples: int = 20000) -> None:
    """Write these runs as one HTML page, with about `max_samples` replies of each.  Raises InputError."""
    page = report_page(folders, max_samples)
    try:
        write_page(page, output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}; give another --output") from error
    say(f"report: {output}")
