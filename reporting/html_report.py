"""report.html: what one or several runs left behind, as one page that opens offline.

Curves to hover over, every reply of stage 3 to search and sort, the reward card and run.json.  Nothing here knows the full
list of metrics: whatever number is in metrics.jsonl gets a curve, and the known ones come first and in plain words.
"""

import hashlib
import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reporting.html import html_page, write_page
from reporting.plots import CURVES
from utils.console import InputError, say

STAGES = {"sft": "Stage 1: SFT", "reward": "Stage 2: reward model", "ppo": "Stage 3: PPO"}  # in the order of the page
COUNTERS = ("iteration", "step", "epoch")  # what curves are drawn over, never a curve
GROUPS = {  # heading -> metrics under it, in this order; others follow by the word in front of their slash
    "Score and distance": (
        "score_mean",
        "gold_mean",
        "score_std",
        "normalized_score_mean",
        "reward_mean",
        "kl",
        "kl_k3",
        "kl_max",
        "kl_coef",
    ),
    "Replies and entropy": ("response_length", "response_length_std", "empty_fraction", "ended_fraction", "entropy"),
    "Training": (
        "loss",
        "mean_token_accuracy",
        "policy_loss",
        "clip_fraction",
        "approx_kl",
        "ratio_first",
        "grad_norm",
        "learning_rate",
        "optimizer_steps",
        "stopped_early",
    ),
    "Value": ("value_loss", "value_clip_fraction", "values_mean", "returns_mean"),
    "Held-out": (),  # all that starts with eval_
    "Speed": (
        "seconds",
        "tokens_per_second",
        "num_tokens",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
    ),
}
PREFIXES = {"guard": "Guard", "heldout": "Guard: held-out prompts"}  # word in front of the slash -> heading
TITLES = {
    "gold": "gold (your own measure)",
    "score_std": "standard deviation of the score",
    "normalized_score_mean": "score in the reward card's units",
    "reward_mean": "reward: score minus KL penalty",
    "kl_k3": "KL to the SFT model, k3 estimate",
    "kl_max": "largest KL of a reply",
    "kl_coef": "weight of the KL penalty",
    "response_length_std": "standard deviation of the reply length",
    "empty_fraction": "share of empty replies",
    "ended_fraction": "share of replies that ended by themselves",
    "mean_token_accuracy": "share of tokens that the model has right",
    "approx_kl": "KL to the policy that sampled (nats a token)",
    "ratio_first": "first ratio (healthy: 1)",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
    "optimizer_steps": "optimizer steps in an iteration",
    "stopped_early": "PPO epochs stopped early",
    "value_clip_fraction": "share of clipped values",
    "values_mean": "mean value",
    "returns_mean": "mean return",
    "accuracy": "accuracy on pairs",
    "accuracy_low": "accuracy, lower end of the 95% interval",
    "accuracy_high": "accuracy, upper end of the 95% interval",
    "accuracy_ci95": "accuracy, 95% interval",
    "margin": "margin: chosen minus rejected",
    "length_correlation": "correlation of score and length",
    "reload_difference": "largest difference after saving and loading",
    "runtime": "seconds",
    "samples_per_second": "rows a second",
    "steps_per_second": "steps a second",
    "train_runtime": "seconds of the run",
    "train_samples_per_second": "rows a second over the run",
    "train_steps_per_second": "steps a second over the run",
    "train_loss": "mean loss of the run",
    "total_flos": "operations, as the Trainer counts them",
    "pairs": "pairs",
    "length_only_accuracy": "accuracy of counting tokens alone",
    "length_matched_accuracy": "accuracy where the replies are equally long",
    "shorter_chosen_accuracy": "accuracy where the shorter one is chosen",
    "longer_chosen_accuracy": "accuracy where the longer one is chosen",
    "short_good_accuracy": "accuracy where a short one is chosen",
    "length_matched_pairs": "pairs of equally long replies",
    "shorter_chosen_pairs": "pairs whose shorter one is chosen",
    "longer_chosen_pairs": "pairs whose longer one is chosen",
    "short_good_pairs": "pairs with a short chosen one",
    "calibration_error": "calibration error",
    "temperature": "temperature that would calibrate it",
    "sft_score_mean": "mean score of SFT replies",
    "sft_score_std": "standard deviation of the scores of SFT replies",
    "sft_replies": "SFT replies",
    "ensemble_size": "reward adapters in the ensemble",
    "ensemble_penalty": "penalty for their disagreement",
    "threshold": "share of prompts that a probe has to reach",
    "exempt": "probes that do not decide",
    "failed": "what failed",
    "seconds": "seconds an iteration",
    "tokens_per_second": "tokens a second",
    "num_tokens": "tokens seen",
}
GUARD_TITLES = {  # of guard/... and heldout/...
    "length": "reply length (tokens)",
    "broken": "share of broken replies",
    "empty": "share of empty replies",
    "same": "share of replies that several prompts got",
    "distinct": "different word pairs among all",
    "asked": "share of what was asked that the reply takes up",
    "kl": "KL to the SFT model (nats a reply)",
    "score": "score in the reward card's units",
    "gold": "gold (your own measure)",
    "extreme": "farthest score (standard deviations)",
    "signs": "warnings and alarms",
    "alarms": "alarms",
    "recent_alarms": "alarms that count",
}
PROBES = ("probes", "probe_counts", "probes_above_sft")  # of the reward card: a number for each kind of broken reply
SAMPLE_NUMBERS = ("iteration", "score", "gold", "length", "kl")  # first, in this order


@dataclass
class Run:
    """What the folder of one run holds."""

    name: str
    folder: str
    record: dict[str, Any]  # run.json
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    card: dict[str, Any] | None
    card_folder: str  # its own, or that of the reward model that it used

    @property
    def stage(self) -> str:
        return self.record.get("stage", "run")

    @property
    def counter(self) -> str:
        """What this run's metrics are counted in."""
        return "iteration" if any("iteration" in row for row in self.metrics) else "step"

    def series(self) -> dict[str, tuple[list[float], list[float]]]:
        """Each metric as (counts, values)."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for row in self.metrics:
            for name, value in flatten(row).items():
                if isinstance(value, (int, float)) and name not in COUNTERS:
                    counts, values = found.setdefault(name, ([], []))
                    count = row.get(self.counter, 0)
                    if counts and counts[-1] == count:  # measured again after the training
                        values[-1] = float(value)
                    else:
                        counts.append(count)
                        values.append(float(value))
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_run(folder: str, name: str) -> Run:
    """Read what a run wrote; it may still be running.  Raises InputError when it is no run's folder."""
    if not os.path.isfile(os.path.join(folder, "metrics.jsonl")):
        raise InputError(f"there is no metrics.jsonl in {folder}; give the output folder of a training script")
    record = _read_json(folder, "run.json") or {}
    # stage 3 shows the card of the model that gave the scores
    card_folder = record.get("arguments", {}).get("reward_model_lora_path") or folder
    card = _read_card(card_folder)
    metrics, samples = (_read_rows(folder, file) for file in ("metrics.jsonl", "samples.jsonl"))
    return Run(name, folder, record, metrics, samples, card, card_folder)


def _read_json(folder: str, file: str) -> dict[str, Any] | None:
    path = os.path.join(folder, file)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as stream:
        try:
            content = json.load(stream)
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON: {error}; is the file complete?") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object; correct or remove the file")
    return content


def _read_card(folder: str) -> dict[str, Any] | None:
    """The reward card.  Raises InputError where its probes are no numbers: these go into the page without being escaped."""
    card = _read_json(folder, "reward_card.json")
    drawn = flatten({name: card[name] for name in ("threshold", *PROBES) if name in card} if card else {})
    wrong = [name for name, value in drawn.items() if not isinstance(value, (int, float))]
    if wrong:
        path = os.path.join(folder, "reward_card.json")
        raise InputError(f"{path} is no reward card: {wrong[0]} is no number; train the reward model again")
    return card


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
# What the page's script draws
# ---------------------------------------------------------------------------------------------------------------------


def title_of(metric: str, titles: Mapping[str, str]) -> str:
    """A metric in plain words, its own name where nobody has put it into words."""
    if metric.startswith("eval_"):
        return "held-out: " + title_of(metric.removeprefix("eval_"), titles)
    group, _, name = metric.partition("/")
    if group in PREFIXES:
        return ("held-out: " if group == "heldout" else "") + GUARD_TITLES.get(name, name)
    return titles.get(metric, metric)


def group_metrics(names: Iterable[str]) -> dict[str, list[str]]:
    """Heading -> metrics, the known headings first; every name is in exactly one."""
    groups: dict[str, list[str]] = {heading: [] for heading in GROUPS}
    heading_of = {metric: heading for heading, metrics in GROUPS.items() for metric in metrics}
    for name in sorted(names):
        if name in heading_of:
            heading = heading_of[name]
        elif name.startswith("eval_"):
            heading = "Held-out"
        else:
            group = name.split("/")[0]
            heading = PREFIXES.get(group, group.capitalize()) if "/" in name else "Other"
        groups.setdefault(heading, []).append(name)
    for heading, known in GROUPS.items():
        groups[heading].sort(key=lambda name: known.index(name) if name in known else len(known))
    return {heading: metrics for heading, metrics in groups.items() if metrics}


def curve_sections(runs: Sequence[Run], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """For each stage its runs, with their series, and the charts under their headings.

    Stages are never drawn into one chart: a loss of SFT and one of PPO have nothing in common.
    """
    sections = []
    order = {stage: place for place, stage in enumerate(STAGES)}
    for stage in sorted({run.stage for run in runs}, key=lambda stage: (order.get(stage, len(order)), stage)):
        members = [(number, run, run.series()) for number, run in enumerate(runs) if run.stage == stage]
        # one number in a whole run is no curve: those are in the table of single figures
        curves = {name for _, _, series in members for name, (counts, _) in series.items() if len(counts) > 1}
        sections.append(
            {
                "title": STAGES.get(stage, stage),
                "counter": members[0][1].counter,
                "runs": [
                    {
                        "number": number,
                        "name": run.name,
                        "best": best_count(run),
                        "collapse": collapse_count(run),
                        "alarms": alarm_counts(series),
                        "series": {name: series[name] for name in curves if name in series},
                    }
                    for number, run, series in members
                ],
                "groups": [
                    {
                        "title": heading,
                        "charts": [{"metric": name, "title": title_of(name, titles)} for name in metrics],
                    }
                    for heading, metrics in group_metrics(curves).items()
                ],
            }
        )
    return sections


def best_count(run: Run) -> float | None:
    """The iteration that run.json calls the best one, None where it names none."""
    best = run.record.get("best")
    return best.get(run.counter) if isinstance(best, Mapping) else None


def collapse_count(run: Run) -> float | None:
    """The iteration in which the guard was certain of a collapse, None where it was not."""
    guard = run.record.get("guard")
    return guard.get("collapse_at") if isinstance(guard, Mapping) else None


def alarm_counts(series: Mapping[str, tuple[list[float], list[float]]]) -> list[float]:
    """The iterations with an alarm of the guard."""
    return [count for count, alarms in zip(*series.get("guard/alarms", ([], [])), strict=True) if alarms > 0]


def chosen_samples(samples: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """All samples, or those of so many prompts that at most about `most` are left.

    Whole prompts, picked by a hash of their text: the same prompt can then still be followed over the iterations.
    """
    share = most / max(1, len(samples))
    if share >= 1:
        return list(samples)

    def picked(prompt: str) -> bool:
        digest = hashlib.sha256(prompt.encode(errors="replace")).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    return [row for row in samples if picked(row["prompt"])]


def sample_tables(runs: Sequence[Run], most: int) -> dict[str, Any]:
    """The samples of all runs in one table: number columns first, then the run's number, prompt number and response."""
    rows = [(number, row) for number, run in enumerate(runs) for row in chosen_samples(run.samples, most)]
    numeric = {key for _, row in rows for key, value in row.items() if isinstance(value, (int, float))}
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


def fact_table(columns: Sequence[tuple[str, Mapping[str, Any]]], titles: Mapping[str, str] | None = None) -> str:
    """HTML table: a row a key, a column a run.  Rows in which the runs agree have the class "same".

    titles: metrics in plain words; None where the keys are no metrics.
    """
    flat = [flatten(facts) for _, facts in columns]
    keys = list(dict.fromkeys(key for facts in flat for key in facts))
    parts = ['<div class="scroll"><table class="facts"><thead><tr><th></th>']
    parts += [f'<th dir="auto">{html.escape(name)}</th>' for name, _ in columns]
    parts.append("</tr></thead><tbody>")
    for key in keys:
        cells = [shown(facts.get(key)) for facts in flat]
        same = ' class="same"' if len(set(cells)) == 1 else ""
        parts.append(f'<tr{same}><th scope="row">{html.escape(key if titles is None else title_of(key, titles))}</th>')
        parts += [f'<td class="text" dir="auto">{html.escape(cell)}</td>' for cell in cells]
        parts.append("</tr>")
    return "".join([*parts, "</tbody></table></div>"])


def probe_table(name: str, card: Mapping[str, Any]) -> str:
    """HTML table of a reward card's probes: a row a kind of broken reply, with a bar that says whether it passed."""
    probes, counts, above = (card.get(part, {}) for part in PROBES)
    threshold = card.get("threshold", 1.0)
    head = ["broken reply", "the good one wins", "", "above the median SFT reply", "prompts"]
    parts = [f'<div class="scroll"><table class="facts"><caption dir="auto">{html.escape(name)}</caption><thead><tr>']
    parts += [f"<th>{html.escape(title)}</th>" for title in head]
    parts.append("</tr></thead><tbody>")
    for kind, share in probes.items():
        verdict = "" if share >= threshold else "exempt" if kind in card.get("exempt", ()) else "failed"
        bar = f'<meter min="0" max="1" low="{threshold}" optimum="1" value="{share}"></meter> {shown(share)}'
        parts.append(f'<tr><th scope="row">{html.escape(kind)}</th><td>{bar}</td><td class="{verdict}">{verdict}</td>')
        parts += [f'<td class="number">{shown(part.get(kind))}</td>' for part in (above, counts)]
        parts.append("</tr>")
    return "".join([*parts, "</tbody></table></div>"])


def single_figures(run: Run) -> dict[str, float]:
    """Metrics of which the run has one value only, such as its run time."""
    return {name: values[0] for name, (_, values) in run.series().items() if len(values) == 1}


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def report_page(folders: Sequence[str], titles: Mapping[str, str], max_samples: int) -> str:
    """The whole page for these runs.  Raises InputError when one of them is no run's folder.

    titles: metrics in plain words, besides the ones known here; max_samples: about so many replies of each run.
    """
    titles = {**TITLES, **titles}
    runs = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    data = {
        "runs": [run.name for run in runs],
        "sections": curve_sections(runs, titles),
        "samples": sample_tables(runs, max_samples),
    }
    heading = ", ".join(run.name for run in runs)
    parts = [("curves", "Curves", "")]
    figures = [(run.name, single_figures(run)) for run in runs]
    if any(facts for _, facts in figures):
        parts.append(("figures", "Single figures", fact_table(figures, titles)))
    owners: dict[str, list[Run]] = {}  # PPO runs of one reward model share its card
    for run in runs:
        if run.card is not None:
            owners.setdefault(os.path.realpath(run.card_folder), []).append(run)
    if owners:
        cards = [(", ".join(run.name for run in members), members[0].card) for members in owners.values()]
        facts = [(name, {key: value for key, value in card.items() if key not in PROBES}) for name, card in cards]
        tables = "".join(probe_table(name, card) for name, card in cards if card.get("probes"))
        parts.append(("card", "Reward card", fact_table(facts, titles) + tables))
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
        *(_verdict(run) for run in runs if collapse_count(run) is not None),
        "<nav>" + " ".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in parts) + "</nav>",
        "<noscript><p>The curves and the samples need JavaScript; nothing is fetched from anywhere.</p></noscript>",
    ]
    for anchor, name, content in parts:
        title = "" if anchor == "curves" else f"<h2>{name}</h2>"  # each stage's curves have a heading of their own
        body.append(f'<section id="{anchor}">{title}{content}</section>')
    return html_page(heading, "\n".join(body), data, "report")


def _headline(run: Run) -> str:
    """One line about a run."""
    counts = [row[run.counter] for row in run.metrics if run.counter in row]
    parts = [STAGES.get(run.stage, run.stage), f"{max(counts, default=0)} {run.counter}s"]
    parts += [f"base {run.record['base_model']}"] if "base_model" in run.record else []
    return f"{run.name}: " + ", ".join(parts)


def _verdict(run: Run) -> str:
    """HTML paragraph: what the guard saw of a collapse, and what came of it."""
    guard, at = run.record["guard"], collapse_count(run)
    end = "the guard was to warn only, and the run went on"
    if guard.get("stopped"):
        end = f"stopped, and rolled back to the policy of iteration {guard.get('rolled_back_to')}"
    signs = str(guard.get("verdict")).removeprefix(f"iteration {at}, ")
    lead = html.escape(f"{run.name}: collapse at iteration {at}; {end}.")
    return f'<p class="verdict" dir="auto"><strong>{lead}</strong> {html.escape(signs)}</p>'


def _sample_note(kept: int, total: int) -> str:
    note = "Click a row to read it in full, beside the other replies to the same prompt."
    return note if kept == total else f"{kept:,} of {total:,} replies: those of a random choice of prompts. {note}"


def write_report(folders: Sequence[str], output: str, max_samples: int = 20000) -> None:
    """Write these runs as one HTML page, with about `max_samples` replies of each.  Raises InputError."""
    page = report_page(folders, CURVES, max_samples)
    try:
        write_page(page, output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}; give another --output") from error
    say(f"report: {output}")
