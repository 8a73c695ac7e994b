"""Broken replies: what each kind is, that good short replies are left alone, and that the broken ones are found again."""

import pytest
from datasets import Dataset

from corpus.tokens import tokenize_preferences
from rewards.broken_replies import (
    BLANKS,
    KINDS,
    STOCK,
    GoodResponse,
    ResponseBreaker,
    broken_pairs,
    distinct_share,
    empty_share,
    find_broken,
    script_of,
    words_of,
)
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
ROWS = [
    {
        "prompt": "What do cats eat?",
        "chosen": "Cats eat fish. They like milk too.",
        "rejected": "Cats eat mice at night.",
    },
    {
        "prompt": "Is rice cheap?",
        "chosen": "Rice is cheap. You buy it by the bag.",
        "rejected": "Rice may be cheap or not.",
    },
    {
        "prompt": "Who painted this?",
        "chosen": "Goya painted it in Spain. He was old.",
        "rejected": "A man painted it there.",
    },
    {"prompt": "熊猫吃什么？", "chosen": "熊猫主要吃竹子。它们每天吃很多。", "rejected": "熊猫是一种动物。"},
    {"prompt": "长城有多长？", "chosen": "长城非常长。它有两万多公里。", "rejected": "长城在中国北方。"},
    {"prompt": "怎么煮面条？", "chosen": "先把水烧开。再放面条煮三分钟。", "rejected": "面条放进锅里就行。"},
]


def decoded(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


def good_responses(rows: list[dict[str, str]]) -> list[GoodResponse]:
    return [GoodResponse(r["prompt"], r["chosen"], TOKENIZER(r["chosen"])["input_ids"]) for r in rows]


@pytest.fixture(scope="module")
def breaker() -> ResponseBreaker:
    return ResponseBreaker(good_responses(ROWS), TOKENIZER, seed=0)


def made(breaker: ResponseBreaker, kind: str) -> list[tuple[GoodResponse, str]]:
    """All replies of a kind that the breaker makes, with the good ones they were made from."""
    pairs = [(good, breaker.break_response(kind, index)) for index, good in enumerate(breaker.responses)]
    return [(good, decoded(ids)) for good, ids in pairs if ids is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_made_and_is_never_the_good_reply(breaker: ResponseBreaker, kind: str) -> None:
    replies = made(breaker, kind)
    assert len(replies) >= 4
    for good, broken in replies:
        assert broken.strip() != good.response.strip()


def test_what_each_kind_is(breaker: ResponseBreaker) -> None:
    assert {broken for _, broken in made(breaker, "empty")} == {""}
    for _, broken in made(breaker, "blank"):
        assert not any(mark.isalnum() for mark in broken)
        assert broken
    for good, broken in made(breaker, "repeated"):
        joiner = " " if " " in good.response else ""
        assert broken in {joiner.join([good.response] * times) for times in (2, 3)}
    for good, broken in made(breaker, "sentence_loop"):
        last = good.response.replace("。", "。|").replace(". ", ".|").strip("|").split("|")[-1]
        assert broken.startswith(good.response)
        assert 3 <= broken.count(last) <= 6
    for good, broken in made(breaker, "shuffled"):
        assert sorted(words_of(broken)) == sorted(words_of(good.response))
        assert words_of(broken) != words_of(good.response)
    for good, broken in made(breaker, "echo"):
        assert broken.replace(" ", "") in {good.prompt.replace(" ", "") * times for times in (1, 2)}
    for good, broken in made(breaker, "stock"):
        assert broken in STOCK["LATIN" if good.prompt.isascii() else "CJK"]
    others = {row["chosen"] for row in ROWS}
    for good, broken in made(breaker, "off_topic"):
        assert broken in others - {good.response}
        assert script_of(broken) == script_of(good.response)
    for good, broken in made(breaker, "wrong_language"):
        assert broken in others
        assert {script_of(broken), script_of(good.response)} == {"LATIN", "CJK"}


@pytest.mark.parametrize("percent", [5, 10, 25, 50])
def test_cut_to_a_share_of_the_tokens(breaker: ResponseBreaker, percent: int) -> None:
    for index, good in enumerate(breaker.responses):
        ids = breaker.break_response(f"cut_{percent}", index)
        wanted = max(1, round(len(good.ids) * percent / 100))
        assert ids == good.ids[: len(ids)]
        assert len(ids) <= wanted
        assert len(ids) == wanted or decoded(good.ids[: len(ids) + 1]).rstrip()[-1] in ".。"


def test_a_cut_never_ends_where_a_sentence_does() -> None:
    """Half of a reply of two sentences is one whole sentence, which may be a good short reply: it must not be punished."""
    text = "Cats eat fish. Dogs eat meat."
    ids = TOKENIZER(text)["input_ids"]
    breaker = ResponseBreaker([GoodResponse("What?", text, ids)], TOKENIZER, seed=0)
    first_sentence = next(n for n in range(len(ids)) if decoded(ids[:n]) == "Cats eat fish.")
    for percent in (5, 10, 25, 50):
        assert not decoded(breaker.break_response(f"cut_{percent}", 0)).endswith(".")
    assert breaker._cut(breaker.responses[0], first_sentence) == ids[: first_sentence - 1]


def test_token_loop_ends_in_one_token(breaker: ResponseBreaker) -> None:
    for index, good in enumerate(breaker.responses):
        ids = breaker.break_response("token_loop", index)
        assert ids[-6:] == [ids[-1]] * 6
        assert ids[-1] in good.ids


@pytest.mark.parametrize("reply", ["Yes.", "No!", "4", "好。"])
def test_a_good_short_reply_is_neither_cut_nor_made_tiny(reply: str) -> None:
    """Three tokens of a reply of four are nearly all of it: taught as broken, they would teach that short is bad."""
    ids = TOKENIZER(reply)["input_ids"][:5]
    breaker = ResponseBreaker([GoodResponse("Is it?", reply, ids)], TOKENIZER, seed=0)
    kinds = ["tiny", "cut_5", "cut_10", "cut_25", "cut_50", "shuffled"]
    assert [breaker.break_response(kind, 0) for kind in kinds] == [None] * 6


def test_a_reply_that_may_answer_this_prompt_too_is_not_off_topic() -> None:
    rows = [
        {"prompt": "Do you like tea?", "chosen": "I like tea."},
        {"prompt": "Is tea good?", "chosen": "Tea helps me."},
    ]
    breaker = ResponseBreaker(good_responses(rows), TOKENIZER, seed=0)
    assert breaker.break_response("off_topic", 1) is None  # "I like tea." has as many of its words as its own reply


def test_no_wrong_language_in_data_of_one_language() -> None:
    breaker = ResponseBreaker(good_responses(ROWS[:3]), TOKENIZER, seed=0)
    assert made(breaker, "wrong_language") == []


def test_the_seed_decides() -> None:
    def everything(seed: int, held_out: bool = False) -> list[list[int] | None]:
        breaker = ResponseBreaker(good_responses(ROWS), TOKENIZER, seed, held_out)
        return [breaker.break_response(kind, index) for kind in KINDS for index in range(len(ROWS))]

    assert everything(3) == everything(3)
    assert everything(3) != everything(4)


def test_probes_have_phrases_that_no_training_pair_has() -> None:
    def texts(kind: str, held_out: bool) -> set[str]:
        found = set()
        for seed in range(40):
            found |= {text for _, text in made(ResponseBreaker(good_responses(ROWS), TOKENIZER, seed, held_out), kind)}
        return found

    assert texts("stock", False)
    assert not texts("stock", False) & texts("stock", True)
    assert {mark for text in texts("blank", True) for mark in text} <= {
        mark for text in BLANKS[1::2] for mark in text
    } | {" "}


def test_an_unknown_kind_is_named(breaker: ResponseBreaker) -> None:
    with pytest.raises(ValueError, match="no kind 'upside_down'"):
        breaker.break_response("upside_down", 0)


# ---- Pairs ----


def pairs_of(counts: dict[str, int], max_length: int = 200, held_out: bool = False) -> list[dict]:
    sources = tokenize_preferences(Dataset.from_list(ROWS), "{prompt}=", TOKENIZER, max_length, "drop").sources
    return broken_pairs(sources, counts, TOKENIZER, EOS, max_length, 0, held_out)


def test_pairs_are_prompt_reply_and_eos() -> None:
    pairs = pairs_of({"empty": 4, "stock": 3}, held_out=True)
    assert [pair["kind"] for pair in pairs] == ["empty"] * 4 + ["stock"] * 3
    by_query = {tuple(TOKENIZER(row["prompt"] + "=")["input_ids"]): row for row in ROWS}
    for pair in pairs:
        row = by_query[tuple(pair["chosen_ids"][: pair["query_length"]])]
        assert pair["chosen_ids"][pair["query_length"] :] == [*TOKENIZER(row["chosen"])["input_ids"], EOS]
        assert pair["rejected_ids"][: pair["query_length"]] == pair["chosen_ids"][: pair["query_length"]]
        assert pair["rejected_ids"][-1] == EOS
        assert pair["length"] == max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        if pair["kind"] == "empty":
            assert pair["rejected_ids"][pair["query_length"] :] == [EOS]


def user(text: str | None) -> list[dict[str, str | None]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("held_out", [False, True])
def test_what_is_too_empty_to_train_on_is_not_broken_either(held_out: bool) -> None:
    """A row with a null in the user's turn was counted as empty, and then ended the run: the broken pairs were read again
    by a rule of their own, and the user saw "TypeError: replace() argument 2 must be str, not None".  A prompt of white
    space was left out of the training pairs, and yet every kind was made of its replies.
    """
    replies = {"chosen": ROWS[0]["chosen"], "rejected": ROWS[0]["rejected"]}
    blank = [{"prompt": prompt, **replies} for prompt in (user(None), user(""), [], None)]
    good = {"prompt": user("Is rice cheap?"), **{side: ROWS[1][side] for side in replies}}
    spaces = [
        {**row, "prompt": prompt} for row, prompt in ((ROWS[0], " \n"), (ROWS[0], ""), (ROWS[1], "Is rice cheap?"))
    ]
    for rows in ([*blank, good], spaces):
        preferences = tokenize_preferences(Dataset.from_list(rows), "{prompt}=", TOKENIZER, 200, "drop")
        made = broken_pairs(preferences.sources, dict.fromkeys(KINDS, 2), TOKENIZER, EOS, 200, 0, held_out)
        assert {decoded(pair["chosen_ids"][: pair["query_length"]]) for pair in made} == {"Is rice cheap?="}
        assert [decoded(ids) for ids in preferences.pairs["chosen_ids"]] == [f"Is rice cheap?={good['chosen']}</s>"]


def test_what_no_training_pair_can_be_made_of_may_still_be_broken() -> None:
    """Equal replies show no preference and are good replies all the same; a rejected one without text cannot be broken, and
    one that does not fit would be cut twice."""
    rows = [
        {**ROWS[0], "rejected": ROWS[0]["chosen"]},
        {**ROWS[1], "rejected": " "},
        {**ROWS[2], "rejected": "too long " * 90},
        ROWS[3],
    ]
    preferences = tokenize_preferences(Dataset.from_list(rows), "{prompt}=", TOKENIZER, 200, "cut")
    assert len(preferences.pairs) == 3  # all but the equal ones
    assert [source.prompt for source in preferences.sources] == [ROWS[0]["prompt"], ROWS[3]["prompt"]]


def test_every_second_training_pair_is_made_from_a_rejected_reply() -> None:
    """With good replies alone on the better side, a cut reply came out above the dull ones that a policy starts from."""
    rejected = {row["rejected"] for row in ROWS}

    def share(kind: str, held_out: bool) -> float:
        pairs = pairs_of({kind: 4}, held_out=held_out)
        better = [decoded(pair["chosen_ids"][pair["query_length"] : -1]) for pair in pairs]
        return sum(text in rejected for text in better) / len(better)

    assert share("empty", held_out=False) == 0.5
    assert share("empty", held_out=True) == 0
    assert share("stock", held_out=False) == 0  # a refusal may well be better than a harmful reply


def test_a_broken_reply_that_is_too_long_is_cut_and_has_no_eos() -> None:
    longest = max(len(TOKENIZER(row["prompt"] + "=" + row["chosen"])["input_ids"]) + 1 for row in ROWS)
    pairs = pairs_of({"repeated": 6}, max_length=longest, held_out=True)
    cut = [pair for pair in pairs if pair["rejected_ids"][-1] != EOS]
    assert cut
    assert all(len(pair["rejected_ids"]) == longest for pair in cut)


# ---- Finding ----


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("...！ \n", "blank"),
        ("tea tea tea tea tea tea tea tea", "loop"),
        ("我喜欢茶。我喜欢茶。我喜欢茶。", "loop"),
        ("What is tea?", "echo"),
        ("what is tea? What is tea", "echo"),
        ("Tea.", None),
        ("好。", None),
        ("👍", None),
        ("Tea is a drink that people make from leaves and hot water.", None),
        ("What is tea? It is a drink.", None),
        ("no no no", None),  # three words are no loop yet
    ],
)
def test_find_broken(reply: str, kind: str | None) -> None:
    assert find_broken("What is tea?", reply) == kind


def test_distinct_share_by_hand() -> None:
    assert distinct_share(["ababa"], 2) == 2 / 4  # ab ba ab ba
    assert distinct_share([words_of("我喜我喜")], 2) == pytest.approx(2 / 3)  # characters are words: 我喜 喜我 我喜
    assert distinct_share([[1, 2, 1, 2], [2, 3]], 1) == 3 / 6
    assert distinct_share([[1, 2, 1, 2], [2, 3]], 2) == 3 / 4  # no run goes from one sequence into the next
    assert distinct_share([["one"], []], 2) is None


def test_an_empty_reply_says_nothing():
    """Console, metrics and guard count alike: marks alone are as empty as no text."""
    faults = [find_broken("a", response) for response in ("", " \n", "...", "yes", "no " * 20)]
    assert empty_share(faults) == 3 / 5


@pytest.mark.parametrize("kind", ["empty", "blank", "repeated", "sentence_loop", "echo"])
def test_what_is_made_is_found(breaker: ResponseBreaker, kind: str) -> None:
    replies = made(breaker, kind)
    found = [find_broken(good.prompt, broken) for good, broken in replies]
    assert sum(name is not None for name in found) >= len(replies) - 1  # a short reply twice may pass for emphasis
    assert not any(find_broken(good.prompt, good.response) for good in breaker.responses)


def test_a_loop_has_fewer_different_runs_than_the_limit() -> None:
    """a to f twice: 6 of its 10 runs of three words are different, just the limit; one word less varied is a loop."""
    assert find_broken("say it", "a b c d e f a b c d e f") is None
    assert find_broken("say it", "a b c d e f a b c d e f a") == "loop"
