"""report.html and compare.html in a real browser; run by scripts/test_browser.sh, which wants Chromium to be there."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from compare import as_html
from reporting.html import write_page
from reporting.html_report import report_page
from tests.browser.chromium import Browser, contrast, luminance

SCRIPT = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"
ARABIC, EMOJI, LONG = "مرحبا، كيف حالك؟", "😀 👩‍👩‍👧‍👦 \u2028 end", "long 长 " * 3000
PROMPTS = [SCRIPT, ARABIC, EMOJI, LONG, *(f"question {i} 问题" for i in range(196))]
ROWS = "[...document.querySelectorAll('#samples tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))"


def write_run(folder: Path, seed: int) -> str:
    """10,000 samples: 200 prompts in each of 50 iterations; two metrics."""
    rng = random.Random(seed)
    folder.mkdir()
    flat = {"constant": 0.05, "nought": 0.0, "huge": 3e9, "negative": -2.5}
    metrics = [
        {
            "iteration": i,
            "score_mean": i + seed,
            "guard/alarms": float(seed and i in (38, 40)),
            "guard/x": float("nan") if i == 7 else 1.0,
            **flat,
            "nearly": 1 + i * 1e-7,
            "tiny": 1e-6 * (51 - i),
            "large": 2e7 * i,
        }
        for i in range(1, 51)
    ]
    samples = [
        {
            "iteration": i,
            "prompt": prompt,
            "response": f"reply {i} of run {seed}",
            "score": rng.gauss(0, 1),
            "length": 9,
        }
        for i in range(1, 51)
        for prompt in PROMPTS
    ]
    for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    record = {"stage": "ppo", "base_model": SCRIPT, "seed": seed, "best": {"iteration": 30}}
    if seed:  # the second run collapses
        signs = f"iteration 40, rollouts: {SCRIPT}"
        record["guard"] = {"verdict": signs, "collapse_at": 40, "stopped": True, "rolled_back_to": 30}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run, and the same beside a second one."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / name, seed) for seed, name in enumerate(("one", "two"))]
    files = {"one": folder / "one.html", "both": folder / "both.html", "compare": folder / "compare.html"}
    write_page(report_page(runs[:1], 20000), str(files["one"]))
    write_page(report_page(runs, 20000), str(files["both"]))
    tables = [(prompt, [["base", prompt, "1.00"], ["SFT", "x" * 5000, "2.00"]]) for prompt in PROMPTS[:4]]
    summary = (["model", "score"], [["base", "1.000"], ["SFT", "2.000"]])
    write_page(as_html(SCRIPT, summary, tables), str(files["compare"]))
    return files


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A fresh browser; whatever a test does, the console stays clean and no address but the page's own is asked for."""
    browser = Browser(tmp_path / "profile")
    yield browser
    problems, requests = browser.problems, browser.requests
    browser.close()
    assert problems == []
    assert requests
    assert all(address.startswith(("file://", "about:")) for address in requests)


def count_shown(browser: Browser) -> str:
    return browser.run("document.querySelector('#samples [aria-live]').textContent")


def test_texts_are_shown_as_text(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    browser.click("#samples thead button")  # iterations upwards
    rows = browser.run(ROWS)
    assert [row[-2] for row in rows[:4]] == [SCRIPT, ARABIC, EMOJI, LONG]
    assert browser.run("document.title") == "one"
    assert browser.run("document.querySelectorAll('img').length") == 0
    direction = "getComputedStyle(document.querySelectorAll('#samples tbody tr')[{}].cells[3].firstChild).direction"
    assert [browser.run(direction.format(row)) for row in (0, 1)] == ["ltr", "rtl"]


def test_nothing_is_wider_than_the_window(browser: Browser, pages: dict[str, Path]) -> None:
    for name in pages:
        browser.open(pages[name])
        for width in (1200, 420):
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
            )
            assert browser.run("document.documentElement.scrollWidth <= innerWidth"), (name, width)


def test_ten_thousand_samples_are_filtered_in_less_than_a_second(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    assert count_shown(browser) == "10,000 of 10,000 replies, page 1 of 200"
    assert len(browser.run(ROWS)) == 50
    seconds = browser.run(
        "new Promise(done => { const field = document.querySelector('input[type=search]'); const start = performance.now();"
        "field.value = 'QUESTION 17 '; field.dispatchEvent(new Event('input'));"
        "requestAnimationFrame(() => setTimeout(() => done((performance.now() - start) / 1000))); })"
    )
    print(f"filtered in {seconds:.3f} s")
    assert count_shown(browser) == "50 of 10,000 replies, page 1 of 1"
    assert seconds < 1


def test_filter_sort_and_pages(browser: Browser, pages: dict[str, Path]) -> None:
    """Against the same done in Python."""
    samples = [json.loads(line) for line in (pages["one"].parent / "one" / "samples.jsonl").open(encoding="utf-8")]
    browser.open(pages["one"])
    browser.type("input[type=search]", "Reply 12 ")
    wanted = [row for row in samples if row["iteration"] == 12]
    assert count_shown(browser) == "200 of 10,000 replies, page 1 of 4"
    browser.click("#samples thead th:nth-child(2) button")  # score, from the top
    wanted.sort(key=lambda row: -row["score"])
    assert [row[-2] for row in browser.run(ROWS)] == [row["prompt"] for row in wanted[:50]]
    browser.click("#samples .bar button:nth-child(2)")  # next page
    assert [row[-2] for row in browser.run(ROWS)] == [row["prompt"] for row in wanted[50:100]]
    browser.click("#samples thead th:nth-child(2) button")  # from the bottom
    assert [row[-2] for row in browser.run(ROWS)] == [row["prompt"] for row in wanted[:-51:-1]]
    browser.run(
        "const list = document.querySelector('select'); list.value = '13'; list.dispatchEvent(new Event('change'))"
    )
    assert count_shown(browser) == "0 of 10,000 replies, page 1 of 1"
    browser.type("input[type=search]", "مرحبا")
    assert [row[-2] for row in browser.run(ROWS)] == [ARABIC]


def test_a_prompt_across_iterations_side_by_side(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["both"])
    browser.click("#samples tbody tr td")
    assert browser.run("document.querySelector('dialog').open")
    assert browser.run("document.querySelector('dialog .prompt').textContent") == SCRIPT
    texts = browser.run("[...document.querySelectorAll('.reply .plain')].map(node => node.textContent)")
    assert texts == [f"reply {i} of run {seed}" for i in range(1, 51) for seed in (0, 1)]
    in_sight = browser.run(
        "(() => { const box = document.querySelector('.reply.chosen').getBoundingClientRect();"
        "return box.top >= 0 && box.bottom <= innerHeight; })()"
    )
    assert in_sight
    assert browser.run("document.querySelector('.reply.chosen .plain').textContent") == "reply 50 of run 0"
    browser.click("dialog button")
    assert not browser.run("document.querySelector('dialog').open")


def test_a_collapse_is_marked_where_it_was(browser: Browser, pages: dict[str, Path]) -> None:
    """A red line with a cross in the run's colour at iteration 40, triangles at the alarms, and the verdict as text."""
    browser.open(pages["both"])
    chart = '[data-metric="score_mean"]'
    every = browser.run("document.querySelectorAll('.chart').length")
    assert browser.run("document.querySelectorAll('.chart .collapse').length") == every
    marks = browser.run(
        f"(() => {{ const all = part => [...document.querySelectorAll('{chart} ' + part)];"
        "const middle = node => { const box = node.getBoundingClientRect(); return box.left + box.width / 2; };"
        "return {collapse: all('.collapse').map(middle), cross: all('.cross').map(middle), best: all('.best').map(middle),"
        "alarms: all('.alarm use').map(middle), line: all('.line').map(node => node.getBoundingClientRect().toJSON())}; })()"
    )
    assert len(marks["line"]) == 2
    box = marks["line"][0]  # its curve goes from iteration 1 to 50
    place = {i: box["left"] + (i - 1) / 49 * box["width"] for i in (30, 38, 40)}
    for name, iterations in (("collapse", [40]), ("cross", [40]), ("best", [30, 30]), ("alarms", [38, 40])):
        assert marks[name] == pytest.approx([place[i] for i in iterations], abs=1.5), name
    colours = [
        browser.run(f"getComputedStyle(document.querySelector('{chart} .run1.{part}')).{what}")
        for part, what in (("line path", "stroke"), ("cross use", "stroke"), ("alarm use", "fill"))
    ]
    assert len(set(colours)) == 1  # the second run's
    keys = browser.run("[...document.querySelectorAll('.legend .key')].map(node => node.textContent)")
    assert keys == [
        "one (dashed upright line: best, iteration 30)",
        "two (dashed upright line: best, iteration 30; red line with a cross: collapse, iteration 40; triangles: alarms)",
    ]
    assert browser.run("[...document.querySelectorAll('p.verdict')].map(node => node.textContent)") == [
        f"two: collapse at iteration 40; stopped, and rolled back to the policy of iteration 30. rollouts: {SCRIPT}"
    ]
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    colour = "getComputedStyle(document.querySelector('{}')).{}"
    assert (
        contrast(
            browser.run(colour.format("p.verdict", "color")), browser.run(colour.format("p.verdict", "backgroundColor"))
        )
        > 4.5
    )
    panel = browser.run(colour.format(".chart", "backgroundColor"))
    assert contrast(browser.run(colour.format(".chart .collapse path", "stroke")), panel) > 3


def test_a_gap_is_a_gap_and_a_run_can_be_hidden(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["both"])
    path = browser.run("document.querySelector('[data-metric=\"guard/x\"] .line path').getAttribute('d')")
    assert path.count("M") == 2  # iteration 7 is not a number
    display = "getComputedStyle(document.querySelector('[data-metric=score_mean] .{}.line')).display"
    assert [browser.run(display.format(run)) for run in ("run0", "run1")] == ["inline", "inline"]
    browser.click(".legend input")
    assert [browser.run(display.format(run)) for run in ("run0", "run1")] == ["none", "inline"]


def test_the_legend_stays_in_sight(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["both"])
    browser.run("document.querySelector('.chart:last-child').scrollIntoView()")
    assert browser.run("document.querySelector('.legend').getBoundingClientRect().top") == 0


def test_words_of_a_picture_can_be_searched_and_selected(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    browser.run("getSelection().collapse(document.querySelector('.chart figcaption'))")
    assert browser.run("find('iteration') && getSelection().anchorNode.parentNode.closest('svg').ariaLabel") == (
        "raw score"
    )


def test_every_axis_can_be_read(browser: Browser, pages: dict[str, Path]) -> None:
    """At least two labels up and along, no two alike, none cut off or over another."""
    browser.open(pages["one"])
    axes = browser.run(
        "[...document.querySelectorAll('.chart svg')].map(svg => [...svg.querySelectorAll('text')].map(text => "
        "({anchor: getComputedStyle(text).textAnchor, label: text.textContent, left: text.getBBox().x,"
        "right: text.getBBox().x + text.getBBox().width, width: svg.viewBox.baseVal.width})))"
    )
    assert len(axes) == 10
    for texts in axes:
        assert texts.count(next(text for text in texts if text["label"] == "iteration")) == 1
        up = [text for text in texts if text["anchor"] == "end"]
        along = [text for text in texts if text["label"].isdigit() and text["anchor"] == "middle"]
        for labels in (up, along):
            assert len({text["label"] for text in labels}) == len(labels) >= 2, labels
        assert all(text["left"] >= 0 and text["right"] <= text["width"] for text in texts), texts
        assert all(one["right"] < other["left"] for one, other in itertools.pairwise(along)), along


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(browser: Browser, pages: dict[str, Path], scheme: str) -> None:
    """Contrast of at least 4.5 for text and 3 for curves, as WCAG asks."""
    browser.open(pages["both"])
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    colour = "getComputedStyle(document.querySelector('{}')).{}"
    page = browser.run(colour.format("body", "backgroundColor"))
    panel = browser.run(colour.format(".chart", "backgroundColor"))
    assert (luminance(page) < 0.2) == (scheme == "dark")
    assert contrast(browser.run(colour.format("body", "color")), page) > 4.5
    assert contrast(browser.run(colour.format("p.note", "color")), page) > 4.5
    assert contrast(browser.run(colour.format(".chart text", "fill")), panel) > 4.5
    for number in range(8):
        browser.run(f"document.querySelector('.line path').style.stroke = 'var(--c{number})'")
        assert contrast(browser.run(colour.format(".line path", "stroke")), panel) > 3, number


def test_compare_page(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["compare"])
    assert browser.run("document.title") == "Models side by side"
    assert (
        browser.run("[...document.querySelectorAll('.answers tr:nth-child(2) td.text')].map(c => c.textContent)")
        == PROMPTS[:4]
    )
