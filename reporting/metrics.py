"""Every number of metrics.jsonl, once: console, pictures, report page, trackers and docs/metrics.md read this table.

python -m reporting.metrics    writes docs/metrics.md's tables anew; their last column, what to do, is written there.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
KL, GOLD, HELD_OUT = "KL to the SFT model", "gold (your own measure)", "held-out: "
SCORE, CARD_SCORE = "raw score", "normalised score"  # the console says score for the second one

PART_TITLES = {"mean": "mean score", "std": "standard deviation", "none": "share of replies that it does not apply to"}


class Metric(NamedTuple):
    """One number that a run logs."""

    name: str  # in metrics.jsonl
    tracker: str  # what Weights & Biases, TensorBoard and trackio call it
    title: str  # in plain words
    unit: str = ""
    healthy: str = ""  # for docs/metrics.md
    console: str = ""  # its part of the line on the console, with the space in front of it
    picture: bool = False  # whether plots/ has a picture of it

    @property
    def label(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


def _pair(name: str, title: str, unit: str, healthy: str, console: str = "") -> tuple[Metric, Metric]:
    """guard/NAME, of the replies of each iteration, and heldout/NAME, of replies to held-out prompts."""
    own, held_out = f"guard/{name}", f"heldout/{name}"
    return (
        Metric(own, own, title, unit, healthy),
        Metric(held_out, held_out, HELD_OUT + title, unit, healthy, console),
    )


# fmt: off
GUARD = (
    _pair("length", "reply length", "tokens", "above 0.85 (alarm 0.6) and below 1.5 (2) times the SFT model's"),
    _pair("broken", "share of broken replies", "", "at most 0.05 (0.25) above the SFT model's"),
    _pair("empty", "share of empty replies", "", "0"),
    _pair("same", "share of replies that several prompts got", "", "at most 0.1 (0.4) above the SFT model's"),
    _pair("distinct", "different word pairs among all", "", "above 0.5 (0.35) times the SFT model's"),
    _pair("asked", "share of what was asked that the reply takes up", "", "above 0.75 (0.5) times the SFT model's"),
    _pair("kl", KL, "nats a reply", "below `--kl_budget` (twice that)"),
    _pair("score", CARD_SCORE, "", "rises; a rise with two warnings (KL aside) is an alarm", "  held-out score {:.2f}"),
    _pair("extreme", "farthest score", "standard deviations", "below 8"),
)
PPO = {  # heading -> the metrics of stage 3, in the order in which they are shown
    "Score and distance": (
        Metric("normalized_score_mean", "objective/normalized_score_mean", CARD_SCORE, "", "-3 to 3", "  score {:.2f}"),
        Metric("score_mean", "objective/score_mean", SCORE, "", "rises, then flattens", "  raw score {:.2f}", picture=True),
        Metric("score_std", "objective/score_std", "standard deviation of the raw score", "", "well above 0", " +- {:.2f}"),
        Metric("gold_mean", "objective/gold", GOLD, "", "rises with the score", "  gold {:.2f}", picture=True),
        Metric("reward_mean", "objective/reward_mean", "reward: score minus KL penalty", "", "rises, below the score"),
        Metric("kl", "objective/kl", KL, "nats a reply", "0 at first, then rises slowly, below `--kl_budget`",
               "  KL {:.2f}", picture=True),
        Metric("kl_k3", "objective/kl_k3", f"{KL}, k3 estimate", "nats a reply", "near `objective/kl`"),
        Metric("kl_max", "objective/kl_max", "largest KL of a reply", "nats",
               "a few times the mean; at first rounding alone, in float32 below 1e-6 a token"),
        Metric("kl_coef", "objective/kl_coef", "weight of the KL penalty", "", "constant; moves with `--adap_kl_ctrl`"),
    ),
    "Replies and entropy": (
        Metric("response_length", "reply/length", "reply length", "tokens", "0.85 to 1.5 times the SFT model's",
               "  {:.1f} tokens a reply", picture=True),
        Metric("response_length_std", "reply/length_std", "standard deviation of the reply length", "tokens",
               "near the SFT model's"),
        Metric("empty_fraction", "reply/empty_fraction", "share of empty replies", "", "0", "  empty {:.0%}"),
        Metric("ended_fraction", "reply/ended_fraction", "share of replies that ended by themselves", "",
               "the SFT model's or higher"),
        Metric("entropy", "policy/entropy", "entropy", "nats a token", "falls slowly from the SFT model's",
               "  entropy {:.2f}", picture=True),
    ),
    "Training": (
        Metric("loss", "objective/loss", "loss", "", "small, no trend"),
        Metric("train_loss", "objective/loss_of_run", "mean loss of the run", "", "small"),
        Metric("policy_loss", "policy/loss", "policy loss", "", "around 0, slightly negative", picture=True),
        Metric("kl_loss", "policy/kl_loss", "KL to the SFT model, as it is in the loss", "nats a token",
               "0 at first, then rises slowly"),
        Metric("clip_fraction", "policy/clip_fraction", "share of clipped ratios", "", "0 to 0.2", picture=True),
        Metric("approx_kl", "policy/approx_kl", "KL to the policy that sampled", "nats a token", "0.0001 to 0.05"),
        Metric("ratio_first", "policy/ratio_first", "first ratio", "", "1 (float32: within 0.001)"),
        Metric("grad_norm", "policy/grad_norm", "norm of the gradient", "", "steady"),
        Metric("learning_rate", "policy/learning_rate", "learning rate", "", "the schedule you chose"),
        Metric("optimizer_steps", "policy/optimizer_steps", "optimizer steps in an iteration", "", "the same in each"),
        Metric("stopped_early", "policy/stopped_early", "PPO epochs stopped early", "", "mostly 0"),
        Metric("nonfinite_steps", "policy/nonfinite_steps", "steps left out for NaN or infinity", "", "0"),
    ),
    "Value": (
        Metric("value_loss", "value/loss", "value loss", "", "falls at first, then flat", picture=True),
        Metric("value_clip_fraction", "value/clip_fraction", "share of clipped values", "", "0 to 0.3"),
        Metric("values_mean", "value/mean", "mean value of a token", "", "approaches `value/returns_mean`"),
        Metric("returns_mean", "value/returns_mean", "mean return of a token", "", "follows `objective/reward_mean`"),
    ),
    "Held-out": (
        Metric("eval_normalized_score_mean", "eval/normalized_score_mean", HELD_OUT + CARD_SCORE, "",
               "follows `objective/normalized_score_mean`", "  score {:.2f}"),
        Metric("eval_score_mean", "eval/score_mean", HELD_OUT + SCORE, "", "follows `objective/score_mean`",
               "  raw score {:.2f}"),
        Metric("eval_gold", "eval/gold", HELD_OUT + GOLD, "", "rises with the score", "  gold {:.2f}"),
        Metric("eval_kl", "eval/kl", HELD_OUT + KL, "nats a reply", "near `objective/kl`", "  KL {:.2f}"),
        Metric("eval_kl_k3", "eval/kl_k3", HELD_OUT + f"{KL}, k3 estimate", "nats a reply", "near `eval/kl`"),
        Metric("eval_response_length", "eval/response_length", HELD_OUT + "reply length", "tokens", "as `reply/length`",
               "  {:.1f} tokens a reply"),
        Metric("eval_empty_fraction", "eval/empty_fraction", HELD_OUT + "share of empty replies", "", "0",
               "  empty {:.0%}"),
    ),
    "Speed": (
        Metric("seconds", "speed/seconds", "seconds an iteration", "", "steady"),
        Metric("tokens_per_second", "speed/tokens_per_second", "sampled tokens a second", "", "steady",
               "  {:.0f} tokens/s"),
        Metric("epoch", "speed/epoch", "passes over the data"),
        Metric("train_runtime", "speed/run_seconds", "seconds of the run"),
        Metric("train_samples_per_second", "speed/run_replies_per_second", "rows a second over the run"),
        Metric("train_steps_per_second", "speed/run_iterations_per_second", "steps a second over the run"),
        Metric("total_flos", "speed/run_flos", "operations, as the Trainer counts them", "", "0: PPO counts none"),
    ),
    "Guard": (
        *(own for own, _ in GUARD),
        Metric("guard/signs", "guard/signs", "warnings and alarms", "", "0; a single one now and then"),
        Metric("guard/alarms", "guard/alarms", "alarms", "", "0"),
        Metric("guard/recent_alarms", "guard/recent_alarms", "alarms that count", "", "0"),
    ),
    "Guard: held-out prompts": (
        *(held_out for _, held_out in GUARD),
        Metric("heldout/gold", "heldout/gold", HELD_OUT + GOLD, "", "rises with the score", " gold {:.2f}"),
    ),
}
TRAINER = {  # those of stages 1 and 2, where trackers get the names of the Hugging Face Trainer
    "Replies and entropy": (Metric("entropy", "train/entropy", "entropy", "nats a token", "falls to near the loss"),),
    "Training": (
        Metric("loss", "train/loss", "loss", "", "falls"),
        Metric("mean_token_accuracy", "train/mean_token_accuracy", "share of tokens that the model has right", "", "rises"),
        Metric("grad_norm", "train/grad_norm", "norm of the gradient", "", "steady"),
        Metric("learning_rate", "train/learning_rate", "learning rate", "", "the schedule you chose"),
        Metric("nonfinite_steps", "train/nonfinite_steps", "steps left out for NaN or infinity", "", "0"),
    ),
    "Held-out": (
        Metric("eval_loss", "eval/loss", HELD_OUT + "loss", "", "falls"),
        Metric("eval_accuracy", "eval/accuracy", HELD_OUT + "accuracy on pairs", "",
               "0.6 to 0.75 on human pairs, more on easy ones"),
        Metric("eval_accuracy_low", "eval/accuracy_low", "lower end of its 95% interval", "", "above 0.5"),
        Metric("eval_accuracy_high", "eval/accuracy_high", "upper end of its 95% interval", "", "above 0.5"),
        Metric("eval_margin", "eval/margin", HELD_OUT + "margin, chosen minus rejected", "", "rises"),
        Metric("eval_score_mean", "eval/score_mean", HELD_OUT + SCORE, "", "near 0"),
        Metric("eval_score_std", "eval/score_std", HELD_OUT + "standard deviation of the raw score", "", "well above 0"),
        Metric("eval_length_correlation", "eval/length_correlation", HELD_OUT + "correlation of score and length", "",
               "-0.3 to 0.3"),
    ),
    "Speed": (
        Metric("num_tokens", "train/num_tokens", "tokens seen"),
        Metric("epoch", "train/epoch", "passes over the data"),
        Metric("eval_runtime", "eval/runtime", HELD_OUT + "seconds"),
        Metric("eval_samples_per_second", "eval/samples_per_second", HELD_OUT + "rows a second"),
        Metric("eval_steps_per_second", "eval/steps_per_second", HELD_OUT + "steps a second"),
    ),
}
# fmt: on
# fmt: on
OF_PPO = {metric.name: metric for metrics in PPO.values() for metric in metrics}
KNOWN = {metric.name: metric for metrics in TRAINER.values() for metric in metrics} | OF_PPO
EVALUATED = tuple(name for name in OF_PPO if f"eval_{name}" in OF_PPO)  # the ones that an evaluation measures too


def metric_of(name: str) -> Metric:
    """What is known of a metric, `tracker` being its name in stage 3; others keep their name and go to other/."""
    if name in KNOWN:
        return KNOWN[name]
    of_part = re.fullmatch(r"(eval_|heldout/|)reward/(.+)/(mean|std|none)", name)
    if of_part is not None:
        held_out, part, kind = of_part.groups()
        tracker = name.replace("eval_", "eval/", 1) if held_out == "eval_" else name
        return Metric(name, tracker, (HELD_OUT if held_out else "") + f"{part}, {PART_TITLES[kind]}")
    if name.startswith("eval_"):
        short = name.removeprefix("eval_")
        known = KNOWN.get(short, Metric(short, short, short))
        return Metric(name, f"eval/{short}", HELD_OUT + known.title, known.unit)
    return Metric(name, name if "/" in name else f"other/{name}", name)


def group_metrics(names: Iterable[str]) -> dict[str, list[str]]:
    """Heading -> metrics, those of the table first and in its order; every name is in exactly one."""
    wanted = set(names)
    groups: dict[str, list[str]] = {}
    for heading in PPO:
        known = [metric.name for metric in (*PPO[heading], *TRAINER.get(heading, ()))]
        groups[heading] = [name for name in dict.fromkeys(known) if name in wanted]
        wanted -= set(known)
    for name in sorted(wanted):
        group, slash, _ = name.partition("/")
        heading = "Held-out" if name.startswith("eval_") else group.capitalize() if slash else "Other"
        groups.setdefault("Guard: held-out prompts" if group == "heldout" else heading, []).append(name)
    return {heading: metrics for heading, metrics in groups.items() if metrics}


# ---- docs/metrics.md ----


def doc_rows() -> dict[str, dict[str, str]]:
    """Section of docs/metrics.md -> name in trackers -> its row in the table there, but for the last cell."""
    sections = {f"Stage 3: {heading.lower()}": metrics for heading, metrics in PPO.items()}
    sections["Stages 1 and 2"] = tuple(metric for metrics in TRAINER.values() for metric in metrics)
    return {
        section: {
            metric.tracker: f"| `{metric.tracker}` | `{metric.name}` | {metric.label} | {metric.healthy} |"
            for metric in metrics
        }
        for section, metrics in sections.items()
    }


def with_tables(page: str) -> str:
    """docs/metrics.md with the rows of `doc_rows` in its tables; the last cell of a row is kept."""
    rows, section = doc_rows(), ""
    advice: dict[tuple[str, str], str] = {}
    kept: list[tuple[str, str]] = []
    for line in page.splitlines(keepends=True):
        if line.startswith("## "):
            section = line.removeprefix("## ").strip()
        row = re.match(r"\| `(.*?)` .*\|(.*)\|$", line) if section in rows else None
        if row is None:
            kept.append((section, line))
        else:
            advice[section, row[1]] = row[2]
    parts = []
    for section, line in kept:
        parts.append(line)
        if line.startswith("|---"):
            parts += [f"{row}{advice.get((section, name), ' ')}|\n" for name, row in rows.get(section, {}).items()]
    return "".join(parts)


if __name__ == "__main__":
    DOCS.write_text(with_tables(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
