"""report.html, as far as it can be judged without a browser; scripts/test_browser.sh opens it in one."""

import html
import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import reporting.__main__
from reporting.html import POLICY, WEB, embed_json, write_page
from reporting.html_report import (
    chosen_samples,
    curves_of,
    read_run,
    report_page,
    runs_by_stage,
    short_names,
)
from reporting.plots import Curve
from tests.helpers import own_lines
from tests.pages import Page
from utils.console import InputError, run_script

ROOT = Path(__file__).resolve().parent.parent
NASTY = "</script><script>alert(1)</script> <!-- مرحبا 😀 \u2028 & \x00 \\u003c"


def write_run(folder: Path, stage: str = "ppo", metrics: str | None = None, **record: object) -> str:
    """A small run whose texts try to break the page."""
    folder.mkdir(parents=True)
    counter = "iteration" if stage == "ppo" else "step"
    lines = [
        {counter: 1, "score_mean": 0.5, "kl": 0.0, "guard/limit": 3.0, "guard/steep": float("nan"), "note": "text"},
        {counter: 2, "score_mean": 0.75, "kl": 0.25, "guard/limit": 3.0, "guard/steep": 0.5},
        {counter: 2, "eval_score_mean": 0.625},
        {counter: 2, "train_runtime": 12.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) if metrics is None else metrics
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    run = {
        "stage": stage,
        "base_model": NASTY,
        "arguments": {"learning_rate": 1e-5, "nested": {"deep": [1, 2]}},
        **record,
    }
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    if stage == "ppo":
        samples = [
            {
                "iteration": i,
                "prompt": prompt,
                "response": f"{NASTY}{i}",
                "score": i / 2,
                "kl": 0.1,
                "length": 7,
                "gold": i,
            }
            for i in (1, 2)
            for prompt in (NASTY, "plain")
        ]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
    return str(folder)


def page_of(*folders: str, most: int = 1000) -> str:
    return report_page(folders, most)


def data_of(page: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(found)


# ---- Text stays text ----


def test_any_text_survives_the_page(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "<i>ppo"))
    parsed = Page(page)
    assert parsed.tags.count("script") == 2  # the data and the script, none out of a prompt
    assert "i" not in parsed.tags
    data = data_of(page)
    assert data["samples"]["prompts"] == [NASTY, "plain"]
    assert [row[-1] for row in data["samples"]["rows"]] == [NASTY + "1"] * 2 + [NASTY + "2"] * 2
    assert ["base_model", NASTY] in parsed.tables[-1]


def test_embedded_json_cannot_end_its_element() -> None:
    text = embed_json({"a": NASTY, "b": [float("nan"), float("inf"), 1.5], 3: ("x",)})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": NASTY, "b": [None, None, 1.5], "3": ["x"]}


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path: Path) -> None:
    """JSON can hold one, UTF-8 cannot."""
    write_page("a\ud83db", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "a?b"


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "ppo"))
    addresses = re.findall(r"https?://[^\s\"']+", page)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}  # the name of SVG, which nobody fetches
    assert re.search(r"@import|url\([^#]|\bsrc=|href=\"[^#]|<link|fetch\(|XMLHttpRequest|import\(", page) is None
    assert POLICY in page
    assert POLICY.startswith("default-src 'none';")


def test_the_script_never_writes_html() -> None:
    script = (WEB / "report.js").read_text(encoding="utf-8")
    assert re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", script) is None


# ---- Curves ----


def charts_of(page: str) -> dict[str, list[tuple[str, str]]]:
    """Heading -> name and title of the pictures under it."""
    _, *parts = re.split(r"<h3>(.*?)</h3>", page)
    chart = r'<figure class="chart" data-metric="(.*?)"><figcaption>(.*?)(?:<code>.*?</code>)?</figcaption>'
    return {heading: re.findall(chart, text) for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def test_every_number_has_its_place(tmp_path: Path) -> None:
    """Two values are a curve, one is a figure, text is neither; NaN becomes a gap; the evaluation counts for itself."""
    folder = write_run(tmp_path / "ppo", best={"iteration": 2})
    page, run = page_of(folder), read_run(folder, "ppo")
    assert run.counter == "iteration"
    curves = {name: curves_of(name, {3: run}) for name in run.series}
    assert curves["score_mean"] == [Curve(3, [1, 2], [0.5, 0.75], best=2, alarms=[])]
    assert curves["guard/limit"] == [Curve(3, [1, 2], [3.0, 3.0], best=2, alarms=[])]
    (steep,) = curves["guard/steep"]
    assert (math.isnan(steep.values[0]), steep.values[1]) == (True, 0.5)
    assert f"ppo: Stage 3: PPO, 2 iterations, base {html.escape(NASTY)}" in page
    assert charts_of(page) == {
        "Score and distance": [("score_mean", "raw score"), ("kl", "KL to the SFT model")],
        "Guard": [("guard/limit", "guard/limit"), ("guard/steep", "guard/steep")],
    }
    figures = Page(page).tables[0]
    assert figures[1:] == [["held-out: raw score", "0.625"], ["seconds of the run", "12.5"]]


def test_an_evaluation_that_is_repeated_counts_once(tmp_path: Path) -> None:
    """Stage 2 evaluates at its last step and once more behind it: that was drawn as an upright line."""
    lines = [{"step": 1, "eval_loss": 3.0}, {"step": 2, "eval_loss": 2.0}, {"step": 2, "eval_loss": 2.5}]
    folder = write_run(tmp_path / "a", "reward", metrics="".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(folder, "a").series == {"eval_loss": ([1, 2], [3.0, 2.5])}


def test_stages_are_drawn_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, stage) for name, stage in (("c", "ppo"), ("a", "sft"), ("b", "ppo"))]
    stages = runs_by_stage([read_run(folder, Path(folder).name) for folder in folders])
    assert {title: {number: run.name for number, run in runs.items()} for title, runs in stages.items()} == {
        "Stage 1: SFT": {1: "a"},
        "Stage 3: PPO": {0: "c", 2: "b"},
    }
    first, second = page_of(*folders).split('<section class="stage">')[1:]
    assert first.startswith('<h2 dir="auto">Stage 1: SFT</h2>')
    assert (first.count('class="run1 line"'), first.count('class="run0 line"')) == (4, 0)
    assert all(second.count(f'class="run{number} line"') == 4 for number in (0, 2))


def test_pictures_of_a_page_do_not_clash(tmp_path: Path) -> None:
    """An SVG refers to its clips and marks by ids, which are those of the whole page: the first one was taken for all.

    And the same runs give the same page.
    """
    folders = [write_run(tmp_path / name, **collapsed()) for name in ("a", "b")]
    page = page_of(*folders)
    ids = re.findall(r'\bid="(.*?)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#(\w+)', page)
    assert len(used) > 20
    assert set(used) <= set(ids)
    assert page_of(*folders) == page


def test_a_run_that_is_still_writing(tmp_path: Path) -> None:
    """The last line has no end yet: it is left out, and so is anything that no run wrote so far."""
    folder = write_run(tmp_path / "a", "sft", metrics='{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    with open(f"{folder}/metrics.jsonl", "ab") as file:
        file.write("好".encode()[:1])  # a character has no end yet either
    run = read_run(folder, "a")
    assert run.series == {"loss": ([1, 2], [2.0, 1.0])}
    assert run.best is None
    assert 'class="chart"' in page_of(folder)


@pytest.mark.parametrize("best", [{}, None, 3, {"iteration": "<b>"}])
def test_no_best_is_no_mark(tmp_path: Path, best: object) -> None:
    assert read_run(write_run(tmp_path / "a", best=best), "a").best is None


def collapsed(**guard: object) -> dict:
    """run.json of a run that the guard ended."""
    signs = "iteration 2, rollouts: replies shrink: <b>1</b> token a reply"
    said = {"verdict": signs, "collapse_at": 2, "stopped": True, "rolled_back_to": 1}
    return {"best": {"iteration": 1}, "guard": {**said, **guard}}


def test_a_collapse_is_marked_and_said(tmp_path: Path) -> None:
    """It was in run.json alone, and a page of a ruined run looked like that of a good one."""
    lines = [{"iteration": i, "score_mean": i, "guard/alarms": alarms} for i, alarms in ((1, 0), (2, 1), (3, 2))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    quiet = text.replace("alarms", "x")
    runs = [
        write_run(tmp_path / "ended", metrics=text, **collapsed()),
        write_run(tmp_path / "warned", metrics=quiet, **collapsed(stopped=False, rolled_back_to=None)),
        write_run(
            tmp_path / "good",
            metrics=quiet,
            guard={"verdict": None, "collapse_at": None, "stopped": False},
            what_to_take="what to take: <b>ppo/best",
        ),
    ]
    page = page_of(*runs)
    assert re.findall(r'<p class="note" dir="auto">(.*?)</p>', page) == ["good: what to take: &lt;b&gt;ppo/best"]
    curves = curves_of("score_mean", {n: read_run(folder, "") for n, folder in enumerate(runs)})
    assert [(c.best, c.collapse, c.alarms) for c in curves] == [(1, 2, [2, 3]), (1, 2, []), (None, None, [])]
    drawn = page.split('data-metric="score_mean"')[1].split("</figure>")[0]
    marks = re.findall(r'class="run(.) (best|collapse|cross|alarm)"', drawn)
    assert sorted(marks) == sorted([(n, m) for n in "01" for m in ("best", "collapse", "cross")] + [("0", "alarm")])
    assert re.findall(r"<bdi>(.*?)</bdi>", page) == [
        "ended (dashed upright line: best, iteration 1; red line with a cross: collapse, iteration 2; triangles: alarms)",
        "warned (dashed upright line: best, iteration 1; red line with a cross: collapse, iteration 2)",
        "good",
    ]
    assert re.findall(r'<p class="verdict" dir="auto">(.*?)</p>', page) == [
        "<strong>ended: collapse at iteration 2; stopped, and rolled back to the policy of iteration 1.</strong> "
        "rollouts: replies shrink: &lt;b&gt;1&lt;/b&gt; token a reply",
        "<strong>warned: collapse at iteration 2; the guard only warned, and the run went on.</strong> "
        "rollouts: replies shrink: &lt;b&gt;1&lt;/b&gt; token a reply",
    ]


@pytest.mark.parametrize("guard", [{}, None, 3, {"collapse_at": None}, {"collapse_at": [1]}])
def test_no_collapse_is_no_mark(tmp_path: Path, guard: object) -> None:
    folder = write_run(tmp_path / "a", guard=guard)
    assert read_run(folder, "a").collapse is None
    assert 'class="verdict"' not in page_of(folder)


def test_numbers_that_no_axis_reaches(tmp_path: Path) -> None:
    """A file from elsewhere may hold anything: the page is drawn, of what can be drawn."""
    odd = [0.0, -1e308, 1e308, float("inf"), 5e-324, 10**400, 1e299, "text", None, [1], True]
    lines = [{"iteration": i, "kl": value, "\ud83d $x$ <b>": 1e-320} for i, value in enumerate(odd)]
    lines += [{"iteration": count, "kl": 1.0} for count in (float("nan"), float("inf"), 1e308, "x", None)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    folder = write_run(tmp_path / "a", metrics=text, best={"iteration": float("inf")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = page_of(folder)
    assert page.count('class="run0 line"') == 2


# ---- Tables and samples ----


def test_reward_card_of_the_model_that_ppo_used(tmp_path: Path) -> None:
    reward = write_run(tmp_path / "reward", "reward")
    probes = {"probes": {"empty": 1.0, "cut <b>": 0.25, "echo": 0.5, "stock": 0.9, "tiny": 0.9}}
    probes |= {"probe_counts": {"empty": 40}, "probes_ci95": {"stock": [0.6, 0.98], "tiny": [0.8, 0.94]}}
    verdict = {"passed": False, "threshold": 0.95, "exempt": ["echo"]}
    card = {"accuracy": 0.9, "accuracy_ci95": [0.85, 0.95], **probes, **verdict}
    Path(reward, "reward_card.json").write_text(json.dumps(card), encoding="utf-8")
    runs = [write_run(tmp_path / name, arguments={"reward_model_lora_path": reward}) for name in ("x", "y")]
    facts, probed = Page(page_of(*runs)).tables[1:3]
    assert facts == [
        ["", "x, y"],
        ["accuracy on pairs", "0.9"],
        ["accuracy, 95% interval", "0.85, 0.95"],
        ["passed", "no"],
        ["share of prompts that a probe has to reach", "0.95"],
        ["probes that do not decide", "echo"],
    ]
    assert probed[1:] == [
        ["empty", " 1", "", "–", "40", "–"],
        ["cut <b>", " 0.25", "failed", "–", "–", "–"],
        ["echo", " 0.5", "exempt", "–", "–", "–"],
        ["stock", " 0.9", "not shown", "0.6 to 0.98", "–", "–"],
        ["tiny", " 0.9", "failed", "0.8 to 0.94", "–", "–"],
    ]


@pytest.mark.parametrize("part", ["threshold", "probes", "probe_counts", "probes_above_sft", "probes_ci95"])
def test_a_reward_card_from_elsewhere_cannot_write_html(tmp_path: Path, part: str) -> None:
    """Texts in the place of numbers went into the page as they were, and its policy lets a script run."""
    reward = write_run(tmp_path / "reward", "reward")
    trap = '"><script>alert(1)</script>'
    card = {"probes": {"empty": 1.0}, "threshold": 0.95, part: "" if part == "threshold" else {"empty": trap}}
    Path(reward, "reward_card.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(InputError, match=f"reward_card.json is no reward card: {part}.* is no number"):
        page_of(write_run(tmp_path / "ppo", arguments={"reward_model_lora_path": reward}))


@pytest.mark.parametrize(
    "wrong", [3, {"empty": 0.5}, {"empty": [0.5]}, {"empty": [0.5, "<b>"]}, {"empty": [0.1, 0.2, 0.3]}]
)
def test_intervals_from_elsewhere_are_two_numbers(tmp_path: Path, wrong: object) -> None:
    reward = write_run(tmp_path / "reward", "reward")
    card = {"probes": {"empty": 1.0}, "threshold": 0.95, "probes_ci95": wrong}
    Path(reward, "reward_card.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(InputError, match=r"reward_card.json is no reward card: probes_ci95\S* is no number"):
        page_of(reward)


def test_records_side_by_side(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a", seed=1, guard={"same": 2}), write_run(tmp_path / "b", seed=2))
    table = Page(page).tables[-1]
    assert ["guard/same", "2", "–"] in table  # a key, not the metric of that name
    assert ["seed", "1", "2"] in table
    assert ["arguments/nested/deep", "1, 2", "1, 2"] in table
    assert re.search(r'<tr><th scope="row">seed<', page)
    assert re.search(r'<tr class="same"><th scope="row">stage<', page)


def test_samples_of_several_runs(tmp_path: Path) -> None:
    samples = data_of(page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b")))["samples"]
    assert samples["columns"] == ["iteration", "score", "gold", "length", "kl"]
    assert samples["prompts"] == [NASTY, "plain"]
    assert samples["rows"][0] == [1, 0.5, 1, 7, 0.1, 0, 0, NASTY + "1"]
    assert samples["rows"][7] == [2, 1.0, 2, 7, 0.1, 1, 1, NASTY + "2"]


def test_a_choice_of_samples_keeps_whole_prompts(tmp_path: Path) -> None:
    rows = [{"iteration": i, "prompt": f"prompt {p}"} for i in range(5) for p in range(1000)]
    kept = chosen_samples(rows, 1000)
    assert 700 < len(kept) < 1300  # 200 of 1000 prompts, standard deviation 13 prompts of 5 rows each
    counts = {row["prompt"]: 0 for row in kept}
    for row in kept:
        counts[row["prompt"]] += 1
    assert set(counts.values()) == {5}
    assert chosen_samples(rows, 5000) == rows
    folder = write_run(tmp_path / "a", metrics='{"iteration": 1, "kl": 0}\n')
    many = [{"iteration": i, "prompt": f"prompt {i}", "response": "", "score": 0.0} for i in range(1000)]
    Path(folder, "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    page = page_of(folder, most=100)
    assert f"{len(data_of(page)['samples']['rows'])} of 1,000 replies: those of a random choice of prompts." in page


# ---- Names and mistakes ----


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    assert short_names(["/x/ppo", "/x/sft/"]) == ["ppo", "sft"]
    assert short_names(["/x/a/ppo", "/x/b/ppo", "/x/c"]) == ["a/ppo", "b/ppo", "x/c"]
    with pytest.raises(InputError, match="given twice"):
        short_names(["/x/ppo", "/x/y/../ppo"])


def test_as_a_command(tmp_path: Path) -> None:
    """Writes the page where it says; a folder that is no run is one line, exit code 2, and nothing written."""
    folder = write_run(tmp_path / "ppo")
    command = [sys.executable, "-m", "reporting", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, own_lines(done.stderr)) == (0, f"report: {folder}/report.html\n")
    assert Page(Path(folder, "report.html").read_text(encoding="utf-8")).tables


@pytest.mark.parametrize(
    ("folder", "output", "message"),
    [
        ("ppo/..", "page.html", "there is no metrics.jsonl in {0}/ppo/..; give the output folder of a training script"),
        ("ppo", "no/page.html", "cannot write {0}/no/page.html: No such file or directory; give another --output"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, monkeypatch, capsys, folder: str, output: str, message: str) -> None:
    write_run(tmp_path / "ppo")
    monkeypatch.setattr(sys, "argv", ["reporting", f"{tmp_path}/{folder}", "--output", f"{tmp_path}/{output}"])
    with pytest.raises(SystemExit) as stop:
        run_script(reporting.__main__.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message.format(tmp_path)}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["ppo"]


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "samples.jsonl"])
def test_a_broken_file_is_named(tmp_path: Path, file: str) -> None:
    folder = write_run(tmp_path / "ppo")
    for content in ('{"a": \n', "[1]\n"):
        Path(folder, file).write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=file):
            page_of(folder)
