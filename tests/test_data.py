"""From rows to token ids. Expected ids come from calling the tokenizer on a text that is written out here."""

import json

import pytest
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing

from corpus.tokens import (
    encode_prompt,
    encode_response,
    format_prompt,
    read_dataset,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_sft,
    train_and_eval_rows,
)
from tests.conftest import make_tokenizer, write_rows
from utils.arguments import DataArguments
from utils.batching import pad_right
from utils.console import InputError
from utils.hashing import hash64, in_share

TEMPLATE = "Q: {prompt}\nA:"
EOS = 2
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TURNS = [user("hi"), assistant("hello"), user("and?")]
TURNS_TEXT = "Q: hi\nA:hello\n\nQ: and?\nA:"  # worked by hand: each turn in the template, a blank line behind a reply
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"

# name, row, formatted prompt, replies
SFT_LAYOUTS = [
    ("prompt/response", {"prompt": "hi", "response": "yo"}, "Q: hi\nA:", ["yo"]),
    ("prompt/completion", {"prompt": "hi", "completion": "yo"}, "Q: hi\nA:", ["yo"]),
    ("turns/completion", {"prompt": TURNS, "completion": [assistant("yo")]}, TURNS_TEXT, ["yo"]),
    ("question/answer", {"question": "hi", "answer": "yo"}, "Q: hi\nA:", ["yo"]),
    ("q/a", {"q": "hi", "a": "yo"}, "Q: hi\nA:", ["yo"]),
    ("instruction/output", {"instruction": "hi", "output": "yo"}, "Q: hi\nA:", ["yo"]),
    ("instruction/input/output", {"instruction": "hi", "input": "x", "output": "yo"}, "Q: hi\n\nx\nA:", ["yo"]),
    ("empty input", {"instruction": "hi", "input": "", "output": "yo"}, "Q: hi\nA:", ["yo"]),
    ("messages", {"messages": [user("hi"), assistant("yo")]}, "Q: hi\nA:", ["yo"]),
    ("dialogue", {"messages": [*TURNS, assistant("yo")]}, TURNS_TEXT, ["yo"]),
    (
        "system message",
        {"messages": [{"role": "system", "content": "Be kind."}, user("hi"), assistant("yo")]},
        "Be kind.\n\nQ: hi\nA:",
        ["yo"],
    ),
    (
        "HC3",
        {"id": "1", "question": "hi", "human_answers": ["h"], "chatgpt_answers": ["yo", "hey"]},
        "Q: hi\nA:",
        ["yo", "hey"],
    ),
    ("chosen replies", {"prompt": "hi", "chosen": "yo", "rejected": "no"}, "Q: hi\nA:", ["yo"]),
    ("transcript as prompt", {"prompt": TRANSCRIPT, "response": "yo"}, TURNS_TEXT, ["yo"]),
    (
        "stack-exchange-paired",
        {"qid": 1, "question": "hi", "date": "d", "metadata": ["m"], "response_j": "yo", "response_k": "no"},
        "Q: hi\nA:",
        ["yo"],
    ),
]
PREFERENCE_LAYOUTS = [
    ("prompt/chosen/rejected", {"prompt": "hi", "chosen": "yo", "rejected": "no"}, "Q: hi\nA:"),
    ("question/response_j/k", {"question": "hi", "response_j": "yo", "response_k": "no"}, "Q: hi\nA:"),
    (
        "turns with prompt",
        {"prompt": TURNS, "chosen": [assistant("yo")], "rejected": [assistant("no")]},
        TURNS_TEXT,
    ),
    (
        "text prompt, whole dialogues",  # ultrafeedback_binarized
        {"prompt": "hi", "chosen": [user("hi"), assistant("yo")], "rejected": [user("hi"), assistant("no")]},
        "Q: hi\nA:",
    ),
    ("turns", {"chosen": [*TURNS, assistant("yo")], "rejected": [*TURNS, assistant("no")]}, TURNS_TEXT),
    ("transcripts", {"chosen": TRANSCRIPT + " yo", "rejected": TRANSCRIPT + " no"}, TURNS_TEXT),
    ("transcript as prompt", {"prompt": TRANSCRIPT, "chosen": "yo", "rejected": "no"}, TURNS_TEXT),
]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def one(row):
    return Dataset.from_list([row])


def named(layouts):
    return [pytest.param(*case[1:], id=case[0]) for case in layouts]


# ---- Columns ----


@pytest.mark.parametrize(("row", "prompt", "replies"), named(SFT_LAYOUTS))
def test_sft_columns(tokenizer, row, prompt, replies):
    query = ids_of(tokenizer, prompt)
    wanted = [[*ids_of(tokenizer, reply), EOS] for reply in replies]
    rows = tokenize_sft(one(row), TEMPLATE, tokenizer, 200)
    assert rows["input_ids"] == [query + reply for reply in wanted]
    assert rows["labels"] == [[-100] * len(query) + reply for reply in wanted]


@pytest.mark.parametrize(("row", "prompt"), named(PREFERENCE_LAYOUTS))
def test_preference_columns(tokenizer, row, prompt):
    query = ids_of(tokenizer, prompt)
    pair = tokenize_preferences(one(row), TEMPLATE, tokenizer, 200, "drop").pairs[0]
    assert pair["chosen_ids"] == [*query, *ids_of(tokenizer, "yo"), EOS]
    assert pair["rejected_ids"] == [*query, *ids_of(tokenizer, "no"), EOS]
    assert pair["query_length"] == len(query)


@pytest.mark.parametrize(
    ("row", "prompt"),
    named([case[:3] for case in SFT_LAYOUTS] + PREFERENCE_LAYOUTS + [("prompts alone", {"prompt": "hi"}, "Q: hi\nA:")]),
)
def test_prompts_of_every_layout_are_the_queries_of_the_other_stages(tokenizer, row, prompt):
    rows = tokenize_prompts(one(row), TEMPLATE, tokenizer, 200)
    assert rows["input_ids"] == [ids_of(tokenizer, prompt)]


@pytest.mark.parametrize("read", [tokenize_sft, tokenize_preferences, tokenize_prompts])
def test_unknown_columns_are_named(tokenizer, read):
    limits = (200, "drop") if read is tokenize_preferences else (200,)
    with pytest.raises(InputError, match=r"found text, label; wanted .*(prompt|chosen)"):
        read(Dataset.from_list([{"text": "hi", "label": 1}]), TEMPLATE, tokenizer, *limits)


def test_a_column_of_numbers_is_named(tokenizer):
    """A .csv with answers like 42 is read as numbers; the tokenizer would fail on them with a traceback."""
    with pytest.raises(InputError, match="column answer of the dataset holds int64, wanted text"):
        tokenize_sft(one({"question": "6 x 7?", "answer": 42}), TEMPLATE, tokenizer, 200)
    with pytest.raises(InputError, match="column messages of the dataset holds string, wanted turns"):
        tokenize_sft(one({"messages": "hi"}), TEMPLATE, tokenizer, 200)


# ---- Files ----


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet", "save_to_disk", "DatasetDict"])
def test_files(tmp_path, form):
    rows = [{"prompt": "你好\n吗", "response": 'a "b", c'}, {"prompt": "hi", "response": "yo"}]
    path = tmp_path / f"rows.{form}"
    made = Dataset.from_list(rows)
    if form == "jsonl":
        write_rows(path, rows)
    elif form == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif form == "csv":
        made.to_csv(path)
    elif form == "parquet":
        made.to_parquet(path)
    elif form == "save_to_disk":
        made.save_to_disk(path)
    else:
        DatasetDict({"train": one({"prompt": "x", "response": "y"}), "extra": made}).save_to_disk(path)
    split = "extra" if form == "DatasetDict" else "train"
    assert read_dataset(str(path), split).to_list() == rows


def test_a_missing_split_is_named(tmp_path):
    DatasetDict({"train": one({"prompt": "x"})}).save_to_disk(tmp_path / "rows")
    with pytest.raises(InputError, match="test"):
        read_dataset(str(tmp_path / "rows"), "test")


# ---- Held-out rows ----


def held_out(path, fraction):
    return train_and_eval_rows(DataArguments(dataset=path, eval_fraction=fraction), "nothing")


def test_eval_fraction_holds_out_whole_prompts(tmp_path):
    rows = [{"prompt": f"prompt {i % 200}", "chosen": str(i), "rejected": "no"} for i in range(600)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    train, evaluation = held_out(path, 0.25)
    assert len(train) + len(evaluation) == 600
    assert not set(train["prompt"]) & set(evaluation["prompt"])
    prompts = len(set(evaluation["prompt"]))
    assert len(evaluation) == 3 * prompts  # all the rows of a prompt
    assert 30 <= prompts <= 70  # 200 x 0.25, within 3 standard deviations
    again = held_out(path, 0.25)
    assert (again[0].to_list(), again[1].to_list()) == (train.to_list(), evaluation.to_list())


def test_stages_hold_out_the_same_prompts(tmp_path):
    """Otherwise PPO would train on prompts that the reward model was judged by."""
    prompts = [f"prompt {i}" for i in range(100)]
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": p, "chosen": "a", "rejected": "b"} for p in prompts])
    alone = write_rows(tmp_path / "alone.jsonl", [{"prompt": p} for p in reversed(prompts)])
    assert set(held_out(pairs, 0.2)[1]["prompt"]) == set(held_out(alone, 0.2)[1]["prompt"])


def test_eval_dataset_wins_and_no_fraction_means_none(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "c"}])
    assert held_out(path, 0.0)[1] is None
    train, evaluation = train_and_eval_rows(
        DataArguments(dataset=path, eval_dataset=other, eval_fraction=0.5), "nothing"
    )
    assert (train["prompt"], evaluation["prompt"]) == (["a", "b"], ["c"])


def test_a_share_that_leaves_nothing_is_an_error(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}] * 3)
    with pytest.raises(InputError, match="leaves"):
        held_out(path, 0.5)


# ---- Lengths ----


def test_sft_cuts_the_reply_and_never_the_prompt(tokenizer, capsys):
    query = ids_of(tokenizer, "Q: hi\nA:")
    reply = ids_of(tokenizer, "你好你好")
    rows = Dataset.from_list(
        [
            {"prompt": "hi", "response": "你好你好"},
            {"prompt": "hi " * 40, "response": "yo"},
            {"prompt": "hi", "response": "  "},
            {"prompt": "hi", "response": None},
        ]
    )
    whole = len(query) + len(reply) + 1
    cut = tokenize_sft(rows, TEMPLATE, tokenizer, whole - 2)
    assert cut["input_ids"] == [query + reply[:-1]]  # no EOS behind a reply that was cut
    assert cut["labels"] == [[-100] * len(query) + reply[:-1]]
    assert "1 cut, 2 empty, 1 prompt too long" in capsys.readouterr().err
    assert tokenize_sft(rows, TEMPLATE, tokenizer, whole - 1)["input_ids"] == [query + reply]  # the EOS alone is cut
    assert tokenize_sft(rows, TEMPLATE, tokenizer, whole)["input_ids"] == [[*query, *reply, EOS]]


def test_nothing_left_is_an_error(tokenizer):
    rows = Dataset.from_list([{"prompt": "hi " * 40, "response": "yo"}] * 2)
    with pytest.raises(InputError, match=r"none of 2 rows is usable.*'prompt too long': 2"):
        tokenize_sft(rows, TEMPLATE, tokenizer, 30)


@pytest.mark.parametrize("long_side", ["chosen", "rejected"])
def test_overlong_pairs(tokenizer, capsys, long_side):
    """A cut reply beside a whole one would teach the reward model to tell them by their EOS: both are treated alike."""
    short_side = "rejected" if long_side == "chosen" else "chosen"
    query = ids_of(tokenizer, "Q: hi\nA:")
    long, short = ids_of(tokenizer, "zzzzzzzz"), ids_of(tokenizer, "yyy")
    rows = Dataset.from_list(
        [{"prompt": "hi", long_side: "zzzzzzzz", short_side: "yyy"}, {"prompt": "hi", "chosen": "a", "rejected": "b"}]
    )
    whole = len(query) + len(long) + 1

    assert len(tokenize_preferences(rows, TEMPLATE, tokenizer, whole, "drop").pairs) == 2
    dropped = tokenize_preferences(rows, TEMPLATE, tokenizer, whole - 1, "drop").pairs
    assert dropped["chosen_ids"] == [[*query, *ids_of(tokenizer, "a"), EOS]]
    assert "1 kept, 1 too long" in capsys.readouterr().err

    pair = tokenize_preferences(rows, TEMPLATE, tokenizer, whole - 1, "cut").pairs[0]
    shared = min(len(long), len(short))
    assert pair[f"{long_side}_ids"] == query + long[:shared]
    assert pair[f"{short_side}_ids"] == query + short[:shared]
    assert "1 cut, 1 kept" in capsys.readouterr().err


def test_useless_pairs_are_dropped_and_counted(tokenizer, capsys):
    rows = Dataset.from_list(
        [
            {"prompt": "hi", "chosen": "yo", "rejected": "yo"},
            {"prompt": "hi", "chosen": "", "rejected": "yo"},
            {"prompt": "hi", "chosen": "yo", "rejected": ""},
            {"prompt": "hi", "chosen": "yo", "rejected": None},
        ]
    )
    pairs, _ = tokenize_preferences(rows, TEMPLATE, tokenizer, 200, "drop")
    assert pairs["rejected_ids"] == [[*ids_of(tokenizer, "Q: hi\nA:"), EOS]]  # an empty rejected reply teaches a lot
    assert "1 chosen equals rejected, 2 empty, 1 kept" in capsys.readouterr().err


def test_prompts_are_distinct_and_short_enough(tokenizer, capsys):
    rows = Dataset.from_list([{"prompt": text} for text in ("a", "b", "a", "", "long " * 40)])
    kept = tokenize_prompts(rows, TEMPLATE, tokenizer, 20)
    assert kept["prompt"] == ["a", "b"]
    assert "1 empty, 2 kept, 1 repeated, 1 too long" in capsys.readouterr().err


# ---- Templates ----


def test_template_with_braces_in_the_prompt(tokenizer):
    assert format_prompt("what is {x}? {prompt} %s", TEMPLATE, tokenizer) == "Q: what is {x}? {prompt} %s\nA:"
    assert format_prompt("hi", '{"json": "{prompt}"}', tokenizer) == '{"json": "hi"}'


def test_chat_template_is_the_tokenizers(tokenizer):
    chatty = make_tokenizer()
    chatty.chat_template = CHATML
    assert format_prompt("hi", "chat", chatty) == "<|user|>hi</s><|assistant|>"
    text = "<|user|>hi</s><|assistant|>hello</s><|user|>and?</s><|assistant|>"
    assert encode_prompt(TURNS, "chat", chatty) == ids_of(chatty, text)  # </s> in the middle is an id of its own
    assert encode_prompt(TURNS, "chat", chatty).count(EOS) == 3
    rows = tokenize_sft(one({"messages": [*TURNS, assistant("yo")]}), "chat", chatty, 200)
    assert rows["input_ids"] == [[*ids_of(chatty, text), *ids_of(chatty, "yo"), EOS]]


@pytest.mark.parametrize("template", [TEMPLATE, "chat"])
def test_special_tokens_stand_where_the_model_expects_them(template):
    """A tokenizer that puts BOS in front and EOS behind: one BOS, no EOS in the query, one behind the reply."""
    adding = make_tokenizer()
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    adding.chat_template = "<s>" + CHATML
    row = {"prompt": "hi", "chosen": "yo", "rejected": "no"}
    text = "Q: hi\nA:" if template != "chat" else "<|user|>hi</s><|assistant|>"
    query = [1, *ids_of(adding, text)]
    assert tokenize_sft(one(row), template, adding, 200)["input_ids"] == [[*query, *ids_of(adding, "yo"), EOS]]
    pair = tokenize_preferences(one(row), template, adding, 200, "drop").pairs[0]
    assert pair["chosen_ids"] == [*query, *ids_of(adding, "yo"), EOS]
    assert tokenize_prompts(one(row), template, adding, 200)["input_ids"] == [query]


def test_tokens_do_not_merge_across_the_seam(tokenizer):
    """Tokenized as one text, "What is" and " the" could merge with their neighbours: then the query of a rollout would
    not be the beginning of what SFT was trained on."""
    template = "{prompt} th"
    rows = tokenize_sft(one({"prompt": "What is", "response": "e capital"}), template, tokenizer, 200)
    seam = ids_of(tokenizer, "What is th")
    assert rows["input_ids"][0][: len(seam)] == seam
    assert ids_of(tokenizer, "What is the capital")[: len(seam)] != seam  # what the test is about


def test_pad_right():
    ids, mask = pad_right([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_who_is_held_out_is_the_same_for_ever():
    """The number of "abc" by FIPS 180-2, appendix B.1: ba7816bf 8f01cfea ...  Other numbers would mix old evaluation rows
    into the training of a resumed run."""
    assert hash64("abc") == 0xBA7816BF8F01CFEA
    assert in_share("abc", 0.729) is True  # 0xba7816bf / 2^32 = 0.72839...
    assert in_share("abc", 0.728) is False
    assert hash64("\ud800") == hash64("?")


def test_a_prompt_of_just_the_longest_length_is_kept(tokenizer):
    longest = len(encode_prompt("hello", TEMPLATE, tokenizer))
    assert len(tokenize_prompts(one({"prompt": "hello"}), TEMPLATE, tokenizer, longest)) == 1
    with pytest.raises(InputError):
        tokenize_prompts(one({"prompt": "hello"}), TEMPLATE, tokenizer, longest - 1)


def test_eos_in_text_is_left_out_however_often_it_stands_there(tokenizer):
    """Exports often end each text with EOS, some with two; a query with EOS behind it asks for nothing."""
    assert encode_prompt("hi", "Q: {prompt}\nA:</s></s>", tokenizer) == ids_of(tokenizer, "Q: hi\nA:")
    assert encode_response("yo</s></s>", tokenizer, EOS) == ids_of(tokenizer, "yo")
