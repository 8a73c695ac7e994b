"""The table of metrics, and that docs/metrics.md follows it.  What a run logs is compared with it in test_trackers.py."""

import re

from reporting.metrics import DOCS, EVALUATED, PPO, TRAINER, doc_rows, group_metrics, metric_of, with_tables


def test_docs_follow_the_table() -> None:
    """A name, title, unit or healthy range that is changed in one of them alone; `python -m reporting.metrics` mends it."""
    page = DOCS.read_text(encoding="utf-8")
    assert with_tables(page) == page
    assert set(doc_rows()) <= set(re.findall(r"^## (.*)$", page, flags=re.MULTILINE))
    row = "| `guard/kl` | `guard/kl` | KL to the SFT model (nats a reply) | below `--kl_budget` (twice that) | as for "
    assert page.count(row) == 1
    for metrics in (*PPO.values(), *TRAINER.values()):
        for metric in metrics:
            assert page.count(f"| `{metric.tracker}` | `{metric.name}` | {metric.label} | {metric.healthy} |") >= 1


def test_a_row_that_is_written_anew_keeps_its_advice() -> None:
    rows = "| `value/mean` | old | old | old | do this |\n| `value/gone` | | | | |\n"
    page = f"## Stage 3: value\n\n|---|\n{rows}\n## Else\n| `kept` | | | | x |\n"
    assert with_tables(page).splitlines()[3:] == [
        "| `value/loss` | `value_loss` | value loss | falls at first, then flat | |",
        "| `value/clip_fraction` | `value_clip_fraction` | share of clipped values | 0 to 0.3 | |",
        "| `value/mean` | `values_mean` | mean value of a token | approaches `value/returns_mean` | do this |",
        "| `value/returns_mean` | `returns_mean` | mean return of a token | follows `objective/reward_mean` | |",
        "",
        "## Else",
        "| `kept` | | | | x |",
    ]


def test_no_name_stands_for_two_metrics() -> None:
    for table in (PPO, TRAINER):
        metrics = [metric for group in table.values() for metric in group]
        for names in ([metric.name for metric in metrics], [metric.tracker for metric in metrics]):
            assert len(names) == len(set(names))


def test_what_an_evaluation_measures() -> None:
    wanted = {"score_mean", "normalized_score_mean", "kl", "kl_k3", "response_length", "empty_fraction"}
    assert set(EVALUATED) == wanted


def test_metrics_in_words() -> None:
    assert metric_of("guard/asked").label == "share of what was asked that the reply takes up"
    assert metric_of("heldout/kl").label == "held-out: KL to the SFT model (nats a reply)"
    assert metric_of("eval_entropy").label == "held-out: entropy (nats a token)"
    assert metric_of("eval_entropy").tracker == "eval/entropy"
    assert metric_of("reward/exact/none").label == "exact, share of replies that it does not apply to"
    assert metric_of("heldout/reward/exact/mean").label == "held-out: exact, mean score"
    assert metric_of("eval_reward/exact/mean").tracker == "eval/reward/exact/mean"
    assert metric_of("speed_of_light").label == "speed_of_light"
    assert metric_of("speed_of_light").tracker == "other/speed_of_light"


def test_unknown_metrics_come_last_and_none_is_lost() -> None:
    names = ["zeta", "loss", "guard/x", "eval_kl", "kl", "score_mean", "speed_of_light", "heldout/kl", "some/thing"]
    assert list(group_metrics(names).items()) == [
        ("Score and distance", ["score_mean", "kl"]),
        ("Training", ["loss"]),
        ("Held-out", ["eval_kl"]),
        ("Guard", ["guard/x"]),
        ("Guard: held-out prompts", ["heldout/kl"]),
        ("Some", ["some/thing"]),
        ("Other", ["speed_of_light", "zeta"]),
    ]
