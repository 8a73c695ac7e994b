"""From rows to token ids. Expected ids come from calling the tokenizer on a text that is written out here."""

import datetime
import gzip
import json
import sys

import openpyxl
import pytest
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing

from corpus.files import read_dataset, train_and_eval_rows
from corpus.tokens import (
    HELD_OUT,
    encode_prompt,
    encode_response,
    format_prompt,
    mark,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_sft,
)
from rewards.broken_replies import broken_pairs
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
    rows = tokenize_sft(one(row), TEMPLATE, tokenizer, 200, "last")
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
    with pytest.raises(InputError, match=r"column answer of the dataset holds int \(42\), wanted text"):
        tokenize_sft(one({"question": "6 x 7?", "answer": 42}), TEMPLATE, tokenizer, 200)
    with pytest.raises(InputError, match=r"column messages of the dataset holds str \(hi\), wanted turns"):
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
    assert list(read_dataset(str(path), split)) == rows


def test_a_missing_split_is_named(tmp_path):
    DatasetDict({"train": one({"prompt": "x"})}).save_to_disk(tmp_path / "rows")
    with pytest.raises(InputError, match="test"):
        read_dataset(str(tmp_path / "rows"), "test")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".csv.gz", ".tsv", ".txt"])
def test_more_files(tmp_path, suffix):
    content = {
        ".jsonl.gz": b'{"prompt": "a, b"}\n\n{"prompt": "NA"}\n',
        ".csv.gz": b'prompt\r\n"a, b"\r\nNA\r\n',
        ".tsv": b"n\tprompt\n1\ta, b\n2\tNA\n",
        ".txt": b"\xef\xbb\xbfa, b\r\nNA\n",
    }[suffix]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    assert prompts_of(read_dataset(str(path))) == ["a, b", "NA"]


def test_a_field_keeps_its_line_ends_and_spaces(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b'n,prompt\r\n1,"a\r\nb ""c"""\r\n2, b \r\n')
    assert prompts_of(read_dataset(str(tmp_path / "rows.csv"))) == ['a\r\nb "c"', " b "]


def test_a_table_as_excel_saves_it(tmp_path):
    """A mark in front (BOM), columns without a name at the end; by tabs, a comma in a name cuts nothing."""
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeffprompt;response;;\nTee?;Ja, bitte;;\n".encode())
    for all_columns in (False, True):
        assert list(read_dataset(str(path), all_columns=all_columns)) == [{"prompt": "Tee?", "response": "Ja, bitte"}]
    (tmp_path / "rows.tsv").write_text("a, b\tPrompt\nx\thi\n")
    for all_columns in (False, True):
        assert prompts_of(read_dataset(str(tmp_path / "rows.tsv"), all_columns=all_columns)) == ["hi"]


def test_half_a_gz_is_one_line(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 100)[:30])
    with pytest.raises(InputError, match=r"cannot read the dataset .*rows\.jsonl\.gz"):
        read_dataset(str(tmp_path / "rows.jsonl.gz"))


def test_excel_without_openpyxl_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"pip install -r requirements-excel\.txt, or save the sheet as \.csv"):
        read_dataset(str(tmp_path / "rows.xlsx"))


def test_excel(tmp_path, tokenizer, capsys):
    """Excel has types of its own: a date without a time is its day, a number what it is, and #N/A was a traceback."""
    book = openpyxl.Workbook()
    replies = [
        "007",
        7,
        0.5,
        True,
        datetime.date(2021, 5, 1),
        datetime.datetime(2021, 5, 1, 13, 30),
        "None",
        "#N/A",
        "ü",
    ]
    for line in [["Nr", "Prompt", "Response", None], *([1, "a", reply, "x"] for reply in replies), [None] * 4]:
        book.active.append(line)
    book.create_sheet("Rest")
    book.save(tmp_path / "rows.xlsx")
    rows = read_dataset(str(tmp_path / "rows.xlsx"))
    texts = ["007", "7", "0.5", "True", "2021-05-01", "2021-05-01 13:30:00", "None", "#N/A", "ü"]
    assert list(rows) == [{"prompt": "a", "response": text} for text in texts]
    assert rows.column_names == ["Nr", "prompt", "response"]
    assert "rows.xlsx has 2 sheets; the first one, Sheet, is read\n" in capsys.readouterr().err
    assert len(tokenize_sft(rows, TEMPLATE, tokenizer, 200)) == len(texts)


def test_a_damaged_excel_table_is_one_line(tmp_path):
    """zipfile's own exception is of no common kind: it was a traceback."""
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"cannot read the dataset .*rows\.xlsx: File is not a zip file"):
        read_dataset(str(tmp_path / "rows.xlsx"))


def test_rows_under_a_key(tmp_path, capsys):
    """Many a .json has its rows under data or train; it was read as one row, with a column data."""
    path = tmp_path / "rows.json"
    rows = [{"from": "forum", "prompt": "a"}, {"from": "mail", "prompt": "b"}]
    path.write_text(json.dumps({"version": 1, "data": rows}))
    assert prompts_of(read_dataset(str(path))) == ["a", "b"]
    assert f"note: the 2 rows of {path} are those under data; not read: version\n" in capsys.readouterr().err
    path.write_text(json.dumps({"train": rows, "test": rows[:1]}))
    with pytest.raises(InputError, match=r"holds several lists of rows: train \(2\), test \(1\); save each as a file"):
        read_dataset(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("hi"), assistant("yo")], "tools": [{"name": "now"}]},
        {"conversations": [{"from": "human", "value": "hi"}], "meta": [{"id": 1}]},
        {"messages": [user("hi"), {"role": "assistant", "tool_calls": [{"name": "now"}]}]},
    ],
)
def test_one_row_with_lists_is_no_key_with_rows(tmp_path, row):
    (tmp_path / "rows.json").write_text(json.dumps(row))
    rows = read_dataset(str(tmp_path / "rows.json"))
    column = next(iter(row))
    assert len(rows) == 1
    assert rows[0][column] == row[column]


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("write", [json.dumps, str])
def test_dialogues_as_text_in_a_cell(tmp_path, tokenizer, capsys, form, write):
    """Tables have no lists: they hold a dialogue as JSON, or as pandas writes it, in Python's words (str).

    The pairs were trained as texts that begin with a bracket.
    """
    talk = [{"from": "human", "value": 'say "it\'s"'}, {"from": "gpt", "value": "it's, \nso\\d"}]
    table = {
        "conversations": [write(talk), write(talk)],
        "chosen": [write(talk), None],
        "rejected": [write([talk[0], assistant("no")]), None],
    }
    for name, columns in (("talk", ["conversations"]), ("pairs", ["chosen", "rejected"])):
        path = tmp_path / f"{name}.{form}"
        made = Dataset.from_dict({column: table[column] for column in columns})
        made.to_parquet(path) if form == "parquet" else made.to_csv(path, sep="\t" if form == "tsv" else ",")
    query, reply = ids_of(tokenizer, 'Q: say "it\'s"\nA:'), ids_of(tokenizer, "it's, \nso\\d")
    rows = tokenize_sft(read_dataset(str(tmp_path / f"talk.{form}")), TEMPLATE, tokenizer, 200)
    assert rows["input_ids"] == [[*query, *reply, EOS]] * 2
    assert "as JSON text" not in capsys.readouterr().err
    pairs = read_dataset(str(tmp_path / f"pairs.{form}"))
    assert "chosen, rejected of" in capsys.readouterr().err
    pair = tokenize_preferences(pairs, TEMPLATE, tokenizer, 200, "drop").pairs[0]
    assert (pair["chosen_ids"], pair["query_length"]) == ([*query, *reply, EOS], len(query))
    path = write_rows(tmp_path / "turn.jsonl", [{"prompt": "a", "response": write(assistant("yo"))}])
    assert read_dataset(path)[0]["response"] == assistant("yo")


def test_a_text_that_looks_like_a_list_stays_a_text(tmp_path, tokenizer):
    """Whoever asks for the JSON of a dialogue gets it, and so does who asks for a list."""
    replies = ["[1, 2]", json.dumps([user("hi")]), "{'a': 1}", "yo"]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "[x]", "response": text} for text in replies])
    rows = read_dataset(path)
    assert [row["response"] for row in rows] == replies
    lists = write_rows(tmp_path / "lists.jsonl", [{"prompt": "a", "response": "[1, 2]"}] * 2)
    assert read_dataset(lists)[0]["response"] == "[1, 2]"


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv"])
def test_a_folder_of_shards(tmp_path, form):
    """Shards whose unused columns differ in type are one data set; a README beside them is none of it."""
    for number, row in enumerate([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "x-1"}]):
        shard = tmp_path / "data" / f"part-{number}.{form}"
        shard.parent.mkdir(exist_ok=True)
        if form == "jsonl":
            write_rows(shard, [row])
        else:
            getattr(one(row), f"to_{form}")(shard)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "prompts.txt").write_text("no")
    assert prompts_of(read_dataset(str(tmp_path))) == ["a", "b"]
    assert prompts_of(read_dataset(str(tmp_path), data_dir="data")) == ["a", "b"]


def test_the_names_of_shards_tell_their_split(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    assert prompts_of(read_dataset(str(tmp_path))) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert prompts_of(read_dataset(str(tmp_path), "validation")) == ["validation-00000-of-00001"]
    with pytest.raises(InputError, match="is of the split test; found train, validation; change --dataset_split"):
        read_dataset(str(tmp_path), "test")


TRICKY = ["None", "NA", "null", "N/A", "nan", "007", "2021-05-01", "1e5", "True"]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_texts_stay_texts(tmp_path, tokenizer, form):
    """pandas took the replies None and NA for none, and pyarrow made a date of 2021-05-01, which was refused."""
    mark = {"csv": ",", "tsv": "\t"}.get(form)
    lines = [json.dumps({"prompt": "a", "response": text}) if form == "jsonl" else f"a{mark}{text}" for text in TRICKY]
    path = tmp_path / f"rows.{form}"
    path.write_text("\n".join([*([] if form == "jsonl" else [f"prompt{mark}response"]), *lines]) + "\n")
    rows = tokenize_sft(read_dataset(str(path)), TEMPLATE, tokenizer, 200)
    replies = [[label for label in labels if label != -100] for labels in rows["labels"]]
    assert replies == [[*ids_of(tokenizer, text), EOS] for text in TRICKY]


def test_later_rows_may_differ_in_what_is_not_read(tmp_path):
    """10 MB of null in `input`, or of numbers in `id`, and then a text: a right file was refused."""
    long = "a" * 300
    rows = [{"instruction": f"{n} {long}", "input": None, "output": "yes", "id": n} for n in range(35_000)]
    last = {"instruction": "sum", "input": "3 and 4", "output": "7", "id": "x-1"}
    assert read_dataset(write_rows(tmp_path / "rows.jsonl", [*rows, last]))[35_000]["input"] == "3 and 4"


# ---- Held-out rows ----


def prompts_of(rows):
    return [row["prompt"] for row in rows]


def held_out(path, fraction):
    return train_and_eval_rows(DataArguments(dataset=path, eval_fraction=fraction), "nothing")


def test_eval_fraction_holds_out_whole_prompts(tmp_path):
    rows = [{"prompt": f"prompt {i % 200}", "chosen": str(i), "rejected": "no"} for i in range(600)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    train, evaluation = held_out(path, 0.25)
    assert len(train) + len(evaluation) == 600
    assert not set(prompts_of(train)) & set(prompts_of(evaluation))
    prompts = len(set(prompts_of(evaluation)))
    assert len(evaluation) == 3 * prompts  # all the rows of a prompt
    assert 30 <= prompts <= 70  # 200 x 0.25, within 3 standard deviations
    again = held_out(path, 0.25)
    assert again == (train, evaluation)


def test_stages_hold_out_the_same_prompts(tmp_path):
    """Otherwise PPO would train on prompts that the reward model was judged by."""
    prompts = [f"prompt {i}" for i in range(100)]
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": p, "chosen": "a", "rejected": "b"} for p in prompts])
    alone = write_rows(tmp_path / "alone.jsonl", [{"prompt": p} for p in reversed(prompts)])
    assert set(prompts_of(held_out(pairs, 0.2)[1])) == set(prompts_of(held_out(alone, 0.2)[1]))


def test_eval_dataset_wins_and_no_fraction_means_none(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "c"}])
    assert held_out(path, 0.0)[1] is None
    train, evaluation = train_and_eval_rows(
        DataArguments(dataset=path, eval_dataset=other, eval_fraction=0.5), "nothing"
    )
    assert (prompts_of(train), prompts_of(evaluation)) == (["a", "b"], ["c"])


def test_a_share_that_leaves_nothing_is_an_error(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}] * 3)
    with pytest.raises(InputError, match="leaves"):
        held_out(path, 0.5)


# ---- Own columns ----


def test_own_column_names(tmp_path, tokenizer, capsys):
    rows = [{"Frage": f"hi {n}", "gut": "yo", "schlecht": "no", "prompt": "other", "messages": 3} for n in range(2)]
    words = "prompt=Frage, chosen=gut,rejected=schlecht"
    data = DataArguments(dataset=write_rows(tmp_path / "rows.jsonl", rows), columns=words)
    train, _ = train_and_eval_rows(data, "nothing")
    assert "rows.jsonl that are not used: prompt, messages\n" in capsys.readouterr().err
    pairs = tokenize_preferences(train, TEMPLATE, tokenizer, 200, "drop").pairs
    assert pairs["chosen_ids"][1] == [*ids_of(tokenizer, "Q: hi 1\nA:"), *ids_of(tokenizer, "yo"), EOS]
    wanted = [ids_of(tokenizer, f"Q: hi {n}\nA:") for n in range(2)]
    assert tokenize_prompts(train, TEMPLATE, tokenizer, 200)["input_ids"] == wanted


def test_wrong_own_column_names_are_one_line(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"Frage": "hi", "Antwort": "yo"}])
    with pytest.raises(InputError, match=r"--columns names Fragen, which .* does not have; found Frage, Antwort"):
        train_and_eval_rows(DataArguments(dataset=path, columns="prompt=Fragen"), "nothing")
    for words in ("prompt", "prompt=", "frage=prompt", ""):
        with pytest.raises(InputError, match="is not NAME=COLUMN with a NAME out of prompt, response"):
            DataArguments(columns=words)
    with pytest.raises(InputError, match="names a column twice"):
        DataArguments(columns="prompt=a,prompt=b")


def test_own_column_names_may_be_any(tmp_path):
    """Capitals, spaces, other scripts, and an umlaut in two signs, as a Mac writes it: it looks the same on the screen."""
    names = {"prompt": "Die Frage", "chosen": "Gute Lo\u0308sung", "rejected": "差的"}
    path = tmp_path / "rows.csv"
    path.write_text(",".join(names.values()) + "\na,b,c\n", encoding="utf-8")
    data = DataArguments(dataset=str(path), columns="prompt=Die Frage,chosen=Gute L\u00f6sung,rejected=差的")
    assert list(train_and_eval_rows(data, "nothing")[0]) == [{"prompt": "a", "chosen": "b", "rejected": "c"}]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "save_to_disk"])
def test_known_names_in_any_case(tmp_path, tokenizer, capsys, form):
    """Prompt and Response, as a table has them for its heading, were no known columns."""
    path = tmp_path / f"rows.{form}"
    row = {"Instruction": "hi", "INPUT": "x", "Output ": "yo", "Id": "3"}
    write_rows(path, [row]) if form == "jsonl" else getattr(one(row), form if form == "save_to_disk" else f"to_{form}")(
        path
    )
    rows = tokenize_sft(read_dataset(str(path)), TEMPLATE, tokenizer, 200)
    assert rows["input_ids"] == [[*ids_of(tokenizer, "Q: hi\n\nx\nA:"), *ids_of(tokenizer, "yo"), EOS]]
    assert "not used: Id\n" in capsys.readouterr().err


def test_names_that_differ_in_case_are_not_mixed_up(tmp_path, tokenizer, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"Prompt": "no", "prompt": "hi", "response": "yo"}])
    assert tokenize_prompts(read_dataset(path), TEMPLATE, tokenizer, 200)["prompt"] == ["hi"]
    assert "not used: Prompt, response\n" in capsys.readouterr().err
    assert read_dataset(path, columns={"prompt": "Prompt"})[0] == {"prompt": "no"}
    path = write_rows(tmp_path / "two.jsonl", [{"Prompt": "no", "PROMPT": "hi", "response": "yo"}])
    with pytest.raises(InputError, match=r"has 2 columns prompt that differ .* alone: 'Prompt', 'PROMPT'; rename one"):
        read_dataset(path)
    assert read_dataset(path, columns={"prompt": "PROMPT"})[0] == {"prompt": "hi"}


def test_functions_get_what_stands_beside_a_prompt_by_its_own_name(tmp_path):
    """A reward function asks for Answer, which is what its file says."""
    path = write_rows(tmp_path / "rows.jsonl", [{"Question": "6 x 7?", "Answer": "42"}])
    assert read_dataset(path, all_columns=True)[0] == {"Answer": "42", "question": "6 x 7?"}


def test_unused_columns_are_named_once(tmp_path, tokenizer, capsys):
    rows = read_dataset(write_rows(tmp_path / "rows.jsonl", [{"id": 1, "prompt": "a", "response": "b", "source": {}}]))
    tokenize_sft(rows, TEMPLATE, tokenizer, 200)
    tokenize_sft(rows, TEMPLATE, tokenizer, 200, split=HELD_OUT)
    assert capsys.readouterr().err.count("note: columns that are not used: id, source\n") == 1


# ---- Dialogues ----

TALK = [user("hi"), assistant("hello"), user("and?"), assistant("yo"), user("so?"), assistant("bye")]


def trained(rows, tokenizer):
    """The texts with loss, of each row."""
    found = []
    for row in rows:
        text = tokenizer.decode([label if label != -100 else 0 for label in row["labels"]])
        found.append([part for part in text.split("<pad>") if part])
    return found


def test_every_turn_of_the_assistant_is_trained(tokenizer, capsys):
    """What --train_on_turns chooses.  Of three replies in a dialogue the last one alone was learnt, without a word."""
    chatty = make_tokenizer()
    chatty.chat_template = CHATML
    data = Dataset.from_list([{"messages": TALK}, {"messages": TALK[:3]}])
    rows = tokenize_sft(data, "chat", chatty, 200)
    assert trained(rows, chatty) == [["hello</s>", "yo</s>", "bye</s>"], ["hello</s>"]]
    assert "training: 2 dialogues, 4 trained turns in 2 rows" in capsys.readouterr().err
    text = "<|user|>hi</s><|assistant|>hello</s><|user|>and?</s><|assistant|>yo</s><|user|>so?</s><|assistant|>bye</s>"
    assert rows["input_ids"][0] == ids_of(chatty, text)
    assert trained(tokenize_sft(data, "chat", chatty, 200, "last"), chatty) == [["bye</s>"], ["hello</s>"]]
    # without an end behind earlier replies, each is a row of its own: its ids are those of PPO's prompt and reply
    plain = tokenize_sft(data, TEMPLATE, tokenizer, 200)
    assert trained(plain, tokenizer) == [["hello</s>"], ["yo</s>"], ["bye</s>"], ["hello</s>"]]
    query = tokenize_prompts(one({"messages": TALK}), TEMPLATE, tokenizer, 200)["input_ids"][0]
    assert plain["input_ids"][2][: len(query)] == query
    assert "training: 2 dialogues, 4 trained turns in 4 rows" in capsys.readouterr().err


def test_a_template_that_writes_earlier_replies_otherwise(capsys):
    """Qwen3 leaves the thoughts out of earlier replies: a mask over one rendering would train replies without them."""
    thinking = make_tokenizer()
    thinking.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    talk = [user("hi"), assistant("<think>x</think>hello"), user("and?"), assistant("<think>y</think>yo")]
    rows = tokenize_sft(one({"messages": talk}), "chat", thinking, 200)
    assert trained(rows, thinking) == [["<think>x</think>hello</s>"], ["<think>y</think>yo</s>"]]
    assert thinking.decode(rows["input_ids"][1]) == (
        "<|user|>hi</s><|assistant|>hello</s><|user|>and?</s><|assistant|><think>y</think>yo</s>"
    )


def test_a_long_dialogue_keeps_the_turns_that_fit(tokenizer, capsys):
    chatty = make_tokenizer()
    chatty.chat_template = CHATML
    length = len(ids_of(chatty, "<|user|>hi</s><|assistant|>hello</s>"))
    rows = tokenize_sft(one({"messages": [*TALK[:2], user("long " * 50), assistant("yo")]}), "chat", chatty, length)
    assert trained(rows, chatty) == [["hello</s>"]]
    assert "1 kept, 1 prompt too long" in capsys.readouterr().err


def test_weight_0_is_not_trained(capsys):
    chatty = make_tokenizer()
    chatty.chat_template = CHATML
    talk = [user("hi"), {**assistant("hello"), "weight": 0}, user("and?"), {**assistant("yo"), "weight": 1}]
    assert trained(tokenize_sft(one({"messages": talk}), "chat", chatty, 200), chatty) == [["yo</s>"]]
    assert "1 kept, 1 weight 0" in capsys.readouterr().err


def test_tools_are_given_to_the_chat_template():
    """The words of the template for a call are trained, with its end; OpenAI writes arguments as JSON text."""
    template = make_tokenizer()
    template.chat_template = (
        "{% if tools %}[{{ tools[0].function.name }}]{% endif %}{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.arguments.at }}</call>{% else %}{{ m.content }}{% endif %}"
        "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "now", "arguments": '{"at": "x"}'}}
    talk = [
        user("time?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": ""},
        assistant("nine"),
    ]
    row = {"messages": talk, "tools": json.dumps([{"type": "function", "function": {"name": "now"}}])}
    rows = tokenize_sft(one(row), "chat", template, 200)
    assert template.decode(rows["input_ids"][0]) == (
        "[now]<|user|>time?</s><|assistant|><call>x</call></s><|tool|></s><|assistant|>nine</s>"
    )
    assert trained(rows, template) == [["<call>x</call></s>", "nine</s>"]]


def test_tools_that_nobody_would_write_are_one_line(tokenizer):
    chatty = make_tokenizer()
    chatty.chat_template = CHATML
    row = {"messages": TALK[:2], "tools": '[{"name": "now"}]'}
    with pytest.raises(InputError, match="the data have tools, of which the tokenizer's chat template writes nothing"):
        tokenize_sft(one(row), "chat", chatty, 200)
    with pytest.raises(
        InputError, match=r"column tools of the dataset holds str \(now\), wanted a list of descriptions"
    ):
        tokenize_sft(one({**row, "tools": "now"}), TEMPLATE, tokenizer, 200)
    call = {**assistant("hello"), "tool_calls": 3}
    with pytest.raises(InputError, match="wanted turns whose tool_calls are a list"):
        tokenize_sft(one({"messages": [user("hi"), call]}), TEMPLATE, tokenizer, 200)


# Templates without a place for system messages: Gemma's refuses them, others say nothing of them.
TURN = "<|{{ m.role }}|>{{ m.content }}</s>"
WITHOUT_SYSTEM = {
    "refuses": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}",
    "leaves out": "{% for m in messages if m.role in ['user', 'assistant'] %}" + TURN + "{% endfor %}",
}


@pytest.mark.parametrize("way", WITHOUT_SYSTEM)
def test_a_template_without_a_place_for_system_messages(capsys, way):
    """One system message in 10,000 rows refused the data under Gemma; other templates trained on less than there was."""
    chatty = make_tokenizer()
    chatty.chat_template = WITHOUT_SYSTEM[way] + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    system = {"role": "system", "content": " Be kind."}
    rows = Dataset.from_list([{"messages": [system, *TALK[:4]]}, {"messages": TALK[:2]}])
    made = tokenize_sft(rows, "chat", chatty, 200)
    text = "<|user|> Be kind.\n\nhi</s><|assistant|>hello</s><|user|>and?</s><|assistant|>yo</s>"
    assert made["input_ids"] == [ids_of(chatty, text), ids_of(chatty, "<|user|>hi</s><|assistant|>hello</s>")]
    said = "note: the chat template has no place for the system message of 1 training rows; it stands in front of"
    assert capsys.readouterr().err.count(said) == 1
    prompts = tokenize_prompts(rows, "chat", chatty, 200)
    assert prompts["prompt"][0] == text.removesuffix("yo</s>")
    pairs = Dataset.from_list([{"prompt": [system, user("hi")], "chosen": "yo", "rejected": "no"}])
    pair = tokenize_preferences(pairs, "chat", chatty, 200, "drop").pairs[0]
    assert pair["chosen_ids"] == ids_of(chatty, "<|user|> Be kind.\n\nhi</s><|assistant|>yo</s>")
    assert capsys.readouterr().err.count(said) == 2


def test_a_template_with_a_place_for_system_messages_keeps_them_there(capsys):
    chatty = make_tokenizer()
    chatty.chat_template = CHATML
    row = {"messages": [{"role": "system", "content": "Be kind."}, *TALK[:2]]}
    text = "<|system|>Be kind.</s><|user|>hi</s><|assistant|>hello</s>"
    assert tokenize_sft(one(row), "chat", chatty, 200)["input_ids"] == [ids_of(chatty, text)]
    assert "no place" not in capsys.readouterr().err


def test_a_rule_behind_the_last_words_of_the_user_is_not_lost():
    chatty = make_tokenizer()
    chatty.chat_template = WITHOUT_SYSTEM["leaves out"]
    prompt = [user("hi"), {"role": "system", "content": "Be kind."}]
    assert format_prompt(prompt, "chat", chatty) == "<|user|>hi</s><|user|>Be kind.</s>"


@pytest.mark.parametrize(("turn", "what"), [("call", "calls of tools"), ("answer", "answers of tools")])
def test_calls_and_answers_that_nobody_would_write_are_one_line(turn, what):
    """The call was trained as an empty reply, and the answer was left out of the prompt."""
    chatty = make_tokenizer()
    chatty.chat_template = WITHOUT_SYSTEM["leaves out"] + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "now"}]}
    answer = {"role": "tool", "content": "9:00"}
    turns = [user("time?"), call if turn == "call" else answer, assistant("nine")]
    with pytest.raises(
        InputError, match=f"the data have {what}, of which the tokenizer's chat template writes nothing"
    ):
        tokenize_sft(one({"messages": turns}), "chat", chatty, 200)


def test_turns_of_which_some_have_more_keys(tmp_path, tokenizer):
    """A name in some of the turns, and the file was refused as if they had no role and content."""
    talks = [[user("hi"), assistant("yo")], [{**user("hi"), "name": "bob"}, assistant("yo")]]
    rows = read_dataset(write_rows(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks]))
    wanted = [*ids_of(tokenizer, "Q: hi\nA:"), *ids_of(tokenizer, "yo"), EOS]
    assert tokenize_sft(rows, TEMPLATE, tokenizer, 200)["input_ids"] == [wanted, wanted]


# ---- Pairs ----


def sides_of(pairs, tokenizer):
    return [tuple(tokenizer.decode(pair[side]) for side in ("chosen_ids", "rejected_ids")) for pair in pairs]


def test_turns_beside_a_prompt_are_kept(tokenizer, capsys):
    """`prompt` with whole dialogues beside it: the turns between the two were left out without a word."""
    asked = [user("first?"), assistant("one"), user("second?")]
    wanted = ("Q: first?\nA:one\n\nQ: second?\nA:two</s>", "Q: first?\nA:one\n\nQ: second?\nA:no</s>")
    beside = {
        "first": ("first?", asked),
        "last": ("second?", asked),
        "all": (asked, asked),
        "going on": ("first?", asked[1:]),
    }
    for prompt, turns in beside.values():
        row = {"prompt": prompt, "chosen": [*turns, assistant("two")], "rejected": [*turns, assistant("no")]}
        assert sides_of(tokenize_preferences(one(row), TEMPLATE, tokenizer, 200, "drop").pairs, tokenizer) == [wanted]
        assert tokenizer.decode(tokenize_prompts(one(row), TEMPLATE, tokenizer, 200)["input_ids"][0]) == wanted[0][:-7]


def test_a_dialogue_that_begins_with_the_end_of_the_prompt(tokenizer):
    prompt = [user("zero?"), assistant("nil"), user("first?")]
    row = {
        "prompt": prompt,
        "chosen": [user("first?"), assistant("one")],
        "rejected": [user("first?"), assistant("no")],
    }
    wanted = "Q: zero?\nA:nil\n\nQ: first?\nA:"
    pairs = tokenize_preferences(one(row), TEMPLATE, tokenizer, 200, "drop").pairs
    assert sides_of(pairs, tokenizer) == [(wanted + "one</s>", wanted + "no</s>")]


def test_dialogues_that_part_early_are_counted(tokenizer, capsys):
    early = {"chosen": TALK[:4], "rejected": [user("hi"), assistant("what?"), user("and?"), assistant("no")]}
    asked = {"chosen": TALK[:4], "rejected": [user("hi"), assistant("hello"), user("else?"), assistant("no")]}
    pairs = tokenize_preferences(Dataset.from_list([early, asked]), TEMPLATE, tokenizer, 200, "drop").pairs
    assert sides_of(pairs, tokenizer) == [("Q: hi\nA:hello</s>", "Q: hi\nA:what?</s>")]
    said = capsys.readouterr().err
    assert "1 kept, 1 no shared prompt" in said
    assert "note: 1 of the training pairs differ before the last turn; the first turns that differ are compared" in said


def test_scores_make_pairs(tokenizer, capsys):
    """Margins by hand: the scores go from 1 to 5, so 5 against 3 is half of the widest difference."""
    scored = [("a", "x", 5), ("a", "y", 3), ("a", "z", 3), ("b", "x", 1), ("b", "y", 2), ("c", "x", 4)]
    rows = Dataset.from_list([{"prompt": p, "response": r, "score": score, "id": r} for p, r, score in scored])
    pairs = tokenize_preferences(rows, TEMPLATE, tokenizer, 200, "drop").pairs
    x_y, x_z = (("Q: a\nA:x</s>", f"Q: a\nA:{worse}</s>") for worse in "yz")
    assert sides_of(pairs, tokenizer) == [x_y, x_z, ("Q: b\nA:y</s>", "Q: b\nA:x</s>")]
    assert pairs["margin"] == [0.5, 0.5, 0.25]
    said = capsys.readouterr().err
    assert "training: 3 pairs of 6 scored replies; 1 pairs have equal scores, 1 prompts one reply" in said
    assert "not used: id\n" in said
    with pytest.raises(InputError, match="none of the 1 prompts has two responses with different scores"):
        tokenize_preferences(rows.select(range(1, 3)), TEMPLATE, tokenizer, 200, "drop")
    with pytest.raises(InputError, match="column score of the dataset holds str"):
        tokenize_preferences(one({"prompt": "a", "response": "b", "score": "good"}), TEMPLATE, tokenizer, 200, "drop")


def test_a_pair_of_equal_tokens_is_dropped(tokenizer, capsys):
    """Replies that differ in an EOS at their end alone are the same tokens: nothing can be learnt from the pair."""
    rows = Dataset.from_list([{"prompt": "a", "chosen": "yo", "rejected": reply} for reply in ("yo</s>", "no")])
    assert len(tokenize_preferences(rows, TEMPLATE, tokenizer, 200, "drop").pairs) == 1
    assert "1 chosen equals rejected, 1 kept" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", [None, " \n", [user(None)], [user(" ")], [user("a"), assistant(None), user("b")]])
def test_what_is_empty_in_one_place_is_empty_in_all(tokenizer, capsys, prompt):
    """A white prompt was dropped from training and still made broken pairs; null in a turn ended in a traceback there."""
    rows = Dataset.from_list([{"prompt": prompt, "chosen": "yes yes", "rejected": "no no"}])
    for tokenize, more in ((tokenize_sft, ()), (tokenize_preferences, ("drop",)), (tokenize_prompts, ())):
        with pytest.raises(InputError, match=r"none of 1 training rows is usable: \{'empty': 1\}"):
            tokenize(rows, TEMPLATE, tokenizer, 200, *more)
    whole = Dataset.from_list([{**rows[0], "prompt": [user("hi")] if isinstance(prompt, list) else "hi"}, rows[0]])
    preferences = tokenize_preferences(whole, TEMPLATE, tokenizer, 200, "drop")
    assert [source.prompt for source in preferences.sources] == ["hi"]
    pairs = broken_pairs(preferences.sources, {"empty": 5}, tokenizer, EOS, 200, 0)
    assert {tuple(pair["rejected_ids"]) for pair in pairs} == {(*ids_of(tokenizer, "Q: hi\nA:"), EOS)}


# ---- What is trained on ----


def test_one_example_is_shown(tokenizer, capsys):
    rows = one({"prompt": "hi", "chosen": "yo", "rejected": "no"})
    query = len(ids_of(tokenizer, "Q: hi\nA:"))
    reply = len(ids_of(tokenizer, "yo")) + 1
    tokenize_sft(rows, TEMPLATE, tokenizer, 200)
    shown = (
        f"one example of {query + reply} tokens, {reply} of them with loss, marked:\n    Q: hi\n    A:>>>yo</s><<<\n"
    )
    assert shown in capsys.readouterr().err
    tokenize_preferences(rows, TEMPLATE, tokenizer, 200, "drop")
    said = capsys.readouterr().err
    assert "the last one:\n    Q: hi\n    A:>>>yo</s><<<\n" in said
    assert "the last one:\n    Q: hi\n    A:>>>no</s><<<\n" in said
    tokenize_prompts(rows, TEMPLATE, tokenizer, 200)
    assert (
        f"one prompt of {query} tokens, behind which the policy replies:\n    Q: hi\n    A:\n"
        in capsys.readouterr().err
    )
    tokenize_sft(rows, TEMPLATE, tokenizer, 200, split=HELD_OUT)
    tokenize_preferences(rows, TEMPLATE, tokenizer, 200, "drop", HELD_OUT)
    tokenize_prompts(rows, TEMPLATE, tokenizer, 200, split=HELD_OUT)
    assert ">>>" not in (said := capsys.readouterr().err)
    assert "one prompt" not in said


def test_of_a_long_text_both_ends_are_shown(tokenizer):
    """600 characters at either end: a page of numbers hid what the row is."""
    long = "a" * 600 + "b" * 5 + "c" * 600
    ids = ids_of(tokenizer, long)
    assert mark(ids, [True] * len(ids), tokenizer) == ">>>" + "a" * 600 + " [...] " + "c" * 600 + "<<<"
    short = ids_of(tokenizer, "a" * 600 + "c" * 600)
    assert mark(short, [False] * len(short), tokenizer) == "a" * 600 + "c" * 600


# Found by changing rows at random.


def test_an_error_is_one_line_whatever_the_data_hold(tokenizer):
    """A text with line ends in a column of turns gave a message of three lines."""
    with pytest.raises(InputError) as refused:
        tokenize_sft(one({"messages": "Human: x\n\nAssistant:"}), TEMPLATE, tokenizer, 200)
    assert "holds str (Human: x  Assistant:), wanted turns" in str(refused.value)


def test_a_part_of_a_turn_that_is_no_text_is_one_line(tokenizer):
    """{"type": "text", "text": 3} was a TypeError of join()."""
    with pytest.raises(InputError, match=r"holds int \(3\), wanted text"):
        tokenize_sft(one({"messages": [user([{"type": "text", "text": 3}])]}), TEMPLATE, tokenizer, 200)


def test_a_turn_with_the_role_tools_is_an_answer_of_a_tool(tokenizer):
    """The role stands for descriptions of tools in here: such a turn was taken for JSON, with a traceback."""
    turns = [{"role": "tools", "content": "9:00"}, user("so?"), assistant("nine")]
    for_all = make_tokenizer()
    for_all.chat_template = CHATML
    text = "<|tool|>9:00</s><|user|>so?</s><|assistant|>nine</s>"
    assert tokenize_sft(one({"messages": turns}), "chat", for_all, 200)["input_ids"] == [ids_of(for_all, text)]


def test_tools_without_a_turn_are_no_prompt(capsys):
    """transformers refuses a chat without turns with a ValueError."""
    chatty = make_tokenizer()
    chatty.chat_template = "{{ tools }}" + CHATML
    rows = Dataset.from_list([{"tools": "[{}]", "messages": turns} for turns in ([assistant("a")], TALK[:2])])
    assert len(tokenize_sft(rows, "chat", chatty, 200)) == 1
    assert "1 empty, 1 kept" in capsys.readouterr().err


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
    with pytest.raises(InputError, match=r"none of 2 training rows is usable.*'prompt too long': 2"):
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
    # an empty rejected reply teaches a lot, and null is an empty text
    assert pairs["rejected_ids"] == [[*ids_of(tokenizer, "Q: hi\nA:"), EOS]] * 2
    said = capsys.readouterr().err
    assert "1 chosen equals rejected, 1 empty, 2 kept" in said
    assert "note: null in training rows, read as an empty text: 1 in rejected" in said


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
    hello, yo = ([*ids_of(chatty, reply), EOS] for reply in ("hello", "yo"))
    assert rows["input_ids"] == [[*ids_of(chatty, text), *yo]]
    before, between = "<|user|>hi</s><|assistant|>", "<|user|>and?</s><|assistant|>"
    ignored = [[-100] * len(ids_of(chatty, part)) for part in (before, between)]
    assert rows["labels"] == [[*ignored[0], *hello, *ignored[1], *yo]]


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
