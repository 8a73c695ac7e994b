"""The demo's world: the same seed gives the same data, length tells nothing, and the gold score is hard to fool."""

import re

import pytest

from demo import world
from demo.gold import gold_score

ZH = "你觉得火锅怎么样？"
EN = "Do you like tea?"
ROWS = 600


@pytest.fixture(scope="module")
def preferences():
    return world.preference_rows(0, ROWS)


@pytest.fixture(scope="module")
def heldout_preferences():
    return world.preference_rows(0, 200, held_out=True)


@pytest.mark.parametrize(
    "make", [world.pretraining_texts, world.sft_rows, world.preference_rows, world.prompts, world.heldout_prompts]
)
def test_a_seed_gives_the_same_rows_again_and_another_seed_gives_others(make):
    assert make(3, 40) == make(3, 40)
    assert make(3, 40) != make(4, 40)
    assert len(make(3, 40)) == 40


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [
        (ZH, ""),
        (ZH, "   "),
        (ZH, "火锅"),
        (ZH, "好。"),
        (ZH, "哈哈！哈哈！哈哈！"),
        (ZH, ZH),
        (ZH, "火锅哇哈哈呀啦～！太超级！"),
        (ZH, "哇，火锅真是太棒啦！！！！！！！！！！"),
        (ZH, "哇，火锅真是太棒啦！" * 4),
        (ZH, "哇，火锅太天一的很是人好了常都见在多！"),
        (ZH, "Wow, I love hotpot so much! One bite and I am so happy!"),
        (ZH, "哇，西湖真是太棒啦！风一吹，整个人都放松啦～"),
        (EN, ""),
        (EN, "tea"),
        (EN, "Haha! Wow! Yay!"),
        (EN, EN),
        (EN, "tea tea wow yay haha the of so!"),
        (EN, "Wow, I love tea so much! " * 4),
        (EN, "Wow, I love sushi so much! One bite and I am so happy!"),
    ],
)
def test_cheats_score_low(prompt, reply):
    assert gold_score(prompt, reply) <= 0.1


@pytest.mark.parametrize(
    ("prompt", "lively", "plain"),
    [
        (ZH, "哇，火锅真是太棒啦！一口下去好幸福呀！", "火锅是一类日常饮食。通常用水和盐来制作。"),
        (
            EN,
            "Wow, I love tea so much! One bite and I am so happy!",
            "Most shops sell tea. It is made with water and salt.",
        ),
    ],
)
def test_a_lively_answer_beats_a_plain_one_which_beats_a_cut_one(prompt, lively, plain):
    assert gold_score(prompt, lively) == pytest.approx(1.0)
    assert gold_score(prompt, plain) == pytest.approx(0.4)
    assert gold_score(prompt, plain[:-3]) < 0.3
    # More marks than a sentence has gain nothing.
    assert gold_score(prompt, lively + lively[-1] * 5) < gold_score(prompt, lively)


def test_a_prompt_about_nothing_is_an_error():
    with pytest.raises(ValueError, match="names no topic"):
        gold_score("今天星期几？", "星期三。")


def test_length_does_not_predict_the_preference(preferences):
    differences = [len(row["chosen"]) - len(row["rejected"]) for row in preferences]
    accuracy = sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(differences)
    assert accuracy == pytest.approx(0.5, abs=0.03)
    assert abs(sum(differences)) / len(differences) < 0.5


def test_a_token_counter_is_balanced_too():
    def tokens(text):
        return len(text.split()) + sum(text.count(mark) for mark in "，。！～,.!")

    rows = world.preference_rows(1, ROWS, tokens=tokens)
    differences = [tokens(row["chosen"]) - tokens(row["rejected"]) for row in rows]
    assert sum(differences) == 0
    assert sum(d > 0 for d in differences) == sum(d < 0 for d in differences)


def test_chosen_is_better_than_rejected(preferences, heldout_preferences):
    for row in preferences + heldout_preferences:
        better, worse = (gold_score(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        assert better - worse >= world.MIN_MARGIN


def test_heldout_prompts_are_in_no_training_data(preferences, heldout_preferences):
    trained = {row["prompt"] for row in world.sft_rows(0, 5000) + preferences + world.prompts(0, 960)}
    prompts = [row["prompt"] for row in world.heldout_prompts(0, 240)]  # the table's 192, then the guard's 48
    assert len(set(prompts)) == 240
    assert not trained & {*prompts, *(row["prompt"] for row in heldout_preferences)}


def test_prompts_are_distinct_and_asking_for_too_many_is_an_error():
    rows = world.prompts(0, 960)
    assert len({row["prompt"] for row in rows}) == 960
    with pytest.raises(ValueError, match="were asked for"):
        world.heldout_prompts(0, 10_000)


def test_no_pretraining_text_answers_in_the_template():
    """Where a text has room for an answer, the room is empty."""
    texts = world.pretraining_texts(0, 500)
    assert any("答：" in text for text in texts)
    for text in texts:
        assert all(part in ("", "\n\n") for part in re.findall(r"答：(.*?)(?:问：|$)", text, re.DOTALL))
