"""From a dataset to token ids: read it, find its columns, format the prompt, tokenize.

One rule holds the three stages together: prompt and reply are tokenized apart and joined as ids, EOS behind the reply
(under a chat template the token that ends its turns, see `reply_end_id`).
So SFT, the reward model and PPO see the same ids for the same prompt and reply, whatever the tokenizer would have done
at the seam, and the query of a PPO rollout is exactly the query that SFT was trained on.
"""

import codecs
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, LargeList, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from corpus.chat_template import Message, chat_text, reply_end_id
from utils.arguments import DataArguments
from utils.console import InputError, is_main_process, one_line, say
from utils.hashing import in_share

Prompt = str | list[Message]  # a plain question, or the turns of a dialogue that ends with the user's
Row = dict[str, Any]

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TEXT_TYPES = ("string", "large_string", "string_view", "null")  # null: a column without any value
SFT_COLUMNS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("q", "a"))
PREFERENCE_COLUMNS = (("prompt", "chosen", "rejected"), ("question", "response_j", "response_k"))
PROMPT_COLUMNS = ("prompt", "question", "q", "instruction", "messages")
TRANSCRIPT_TURN = "\n\nAssistant:"  # hh-rlhf writes its dialogues as "\n\nHuman: ...\n\nAssistant: ..."


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_dataset(name: str, split: str = "train", data_dir: str | None = None) -> Dataset:
    """Rows of a local file, a save_to_disk folder, or a dataset of the hub.

    Raises InputError when there is no such thing, it cannot be parsed, or it has no rows.
    """
    suffix = os.path.splitext(name)[1].lower()
    try:
        if os.path.isfile(name):
            if suffix not in FILE_FORMATS:
                raise InputError(f"{name} ends in {suffix or 'nothing'}; give one of {', '.join(FILE_FORMATS)}")
            if os.path.getsize(name) == 0:
                raise InputError(f"the dataset {name} is an empty file; give one that has rows")
            if FILE_FORMATS[suffix] == "json":
                check_json(name)
            rows = load_dataset(FILE_FORMATS[suffix], data_files=name, split="train")
        elif os.path.isdir(name) and any(
            os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")
        ):
            rows = load_from_disk(name)
            if isinstance(rows, DatasetDict):
                rows = rows[split]
        elif not os.path.isdir(name) and (suffix in FILE_FORMATS or name.startswith((".", "/", "~"))):
            raise InputError(f"there is no file or folder {name}; check --dataset")
        else:
            rows = load_dataset(name, data_dir=data_dir, split=split)
        rows.data.validate(full=True)  # pyarrow takes any bytes for text, and fails when a row is read
    except READ_ERRORS as error:
        # how datasets says that a file, or a folder of save_to_disk, has no rows
        if "corresponds to no data" in str(error) or isinstance(error, IndexError):
            raise InputError(f"the dataset {name} has no rows; give one that has") from error
        # DatasetGenerationError says nothing itself: what was wrong with the content is in its cause
        reason = one_line(error.__cause__ or error)
        raise InputError(f"cannot read the dataset {name}: {reason}; check the name, or correct the file") from error
    if len(rows) == 0:
        raise InputError(f"the dataset {name} has no rows; give one that has")
    if any(column.startswith("__index_level_") for column in rows.column_names):  # pandas shifts the columns silently
        raise InputError(f"{name} has rows with more fields than its first line names; quote texts that hold a comma")
    return rows


# What datasets raises for names, splits and content; TypeError and the rest come out of pyarrow and pandas.
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, DatasetGenerationError)


def check_json(path: str) -> None:
    """Raise InputError unless a file holds JSON objects in UTF-8: one a line, or in a .json file all in one array.

    pyarrow, which reads the file next, names no lines, and crashes without an exception where one holds `null`.
    """
    with open(path, "rb") as file:
        rows = _json_array(file.read()) if path.lower().endswith(".json") else None
        file.seek(0)
        for number, item in enumerate(file if rows is None else rows, 1):
            place, fault, row = f"{'line' if rows is None else 'element'} {number}", None, item
            try:
                if rows is None:
                    row = json.loads(item.removeprefix(codecs.BOM_UTF8)) if item.strip() else {}
                json.dumps(row, ensure_ascii=False).encode()  # half of an emoji's pair of \u is no text
            except (ValueError, RecursionError) as error:
                fault = f"is not JSON in UTF-8 ({one_line(error)})"
            else:
                if not isinstance(row, dict):
                    fault = f"holds {type(row).__name__}, not an object with the columns"
            if fault is not None:
                raise InputError(f"cannot read the dataset {path}: {place} {fault}; correct the file")


def _json_array(content: bytes) -> list[Any] | None:
    """The elements of a JSON array, or a lone value as the only one; None where the content is not one value."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else [value]


def train_and_eval_rows(data: DataArguments, default: str) -> tuple[Dataset, Dataset | None]:
    """Training rows, and held-out rows where the arguments ask for them.

    `eval_fraction` holds out whole prompts: rows that share a prompt fall on the same side, so nothing leaks.
    """
    name = data.dataset or default
    rows = read_dataset(name, data.dataset_split, data.dataset_data_dir)
    if data.eval_dataset is not None:
        evaluation = read_dataset(data.eval_dataset, data.eval_dataset_split, data.eval_dataset_data_dir)
        trained_on = {str(prompt) for prompt in map(prompt_reader(rows), rows)}
        shared = sum(str(prompt) in trained_on for prompt in map(prompt_reader(evaluation), evaluation))
        if shared:
            say(
                f"warning: {shared} of the {len(evaluation)} rows of --eval_dataset have a prompt that is trained on too, "
                "so their figures say little about new prompts"
            )
        return rows, evaluation
    if data.eval_fraction == 0:
        return rows, None
    prompt_of = prompt_reader(rows)
    # by the text alone: a prompt is on the same side in every run and every stage
    held_out = [in_share(str(prompt_of(row)), data.eval_fraction) for row in rows]
    train = rows.select([i for i, out in enumerate(held_out) if not out])
    evaluation = rows.select([i for i, out in enumerate(held_out) if out])
    if len(train) == 0 or len(evaluation) == 0:
        raise InputError(
            f"--eval_fraction {data.eval_fraction} of {len(rows)} rows leaves {len(train)} for training and "
            f"{len(evaluation)} for evaluation; change the share or give --eval_dataset"
        )
    return train, evaluation


# ---------------------------------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------------------------------


def sft_reader(rows: Dataset) -> Callable[[Row], list[tuple[Prompt, str]]]:
    """Function row -> its (prompt, reply) pairs, by the columns that the dataset has.

    Raises InputError that names the columns found and the ones wanted.
    """
    columns = rows.column_names
    if "messages" in columns:
        _check_kind(rows, ["messages"], TURNS)
        return lambda row: [_split_messages(row["messages"])]
    if {"question", "chatgpt_answers"} <= set(columns):  # HC3: a list of answers, each an example of its own
        _check_kind(rows, ["question"], TEXT)
        _check_kind(rows, ["chatgpt_answers"], TEXTS)
        return lambda row: [(_dialogue(row["question"]), answer) for answer in row["chatgpt_answers"] or []]
    if {"instruction", "output"} <= set(columns):
        _check_kind(rows, ["instruction", "output", *{"input"} & set(columns)], TEXT)
        return lambda row: [(_instruction(row), row["output"])]
    for prompt, response in SFT_COLUMNS:
        if {prompt, response} <= set(columns):
            _check_kind(rows, [prompt, response], TEXT, TURNS)
            return lambda row: [(_dialogue(row[prompt]), _last_response(row[response]))]
    if {"chosen", "response_j"} & set(columns):  # SFT on the preferred replies
        pair = preference_reader(rows)
        return lambda row: [pair(row)[:2]]
    raise _unknown_columns(
        columns,
        "prompt/response, prompt/completion, question/answer, q/a, instruction[/input]/output, messages, "
        "question/chatgpt_answers or prompt/chosen",
    )


def preference_reader(rows: Dataset) -> Callable[[Row], tuple[Prompt, str, str]]:
    """Function row -> (prompt, chosen, rejected).  Raises InputError that names the columns found and wanted."""
    columns = rows.column_names
    for prompt, chosen, rejected in PREFERENCE_COLUMNS:
        if {prompt, chosen, rejected} <= set(columns):
            _check_kind(rows, [prompt, chosen, rejected], TEXT, TURNS)
            return lambda row: (
                _dialogue(row[prompt]),
                _last_response(row[chosen]),
                _last_response(row[rejected]),
            )
    if {"chosen", "rejected"} <= set(columns):
        _check_dialogues(rows)
        return _split_pair
    raise _unknown_columns(columns, "prompt/chosen/rejected, question/response_j/response_k or chosen/rejected")


def prompt_reader(rows: Dataset) -> Callable[[Row], Prompt]:
    """Function row -> prompt: any dataset with prompts will do, SFT and preference data included."""
    columns = rows.column_names
    for column in PROMPT_COLUMNS:
        if column not in columns:
            continue
        if column == "messages":
            _check_kind(rows, [column], TURNS)
            return lambda row: _without_response(row["messages"])
        if column == "instruction":
            _check_kind(rows, ["instruction", *{"input"} & set(columns)], TEXT)
            return _instruction
        _check_kind(rows, [column], TEXT, TURNS)
        return lambda row: _dialogue(row[column])
    if {"chosen", "rejected"} <= set(columns):
        _check_dialogues(rows)
        return lambda row: _split_pair(row)[0]
    raise _unknown_columns(columns, ", ".join(PROMPT_COLUMNS) + " or chosen/rejected")


def _is_text(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in TEXT_TYPES


def _are_turns(kind: Any) -> bool:
    turn = kind.feature if isinstance(kind, (List, LargeList)) else None
    return isinstance(turn, dict) and _is_text(turn.get("role")) and _is_text(turn.get("content"))


def _are_texts(kind: Any) -> bool:
    return isinstance(kind, (List, LargeList)) and _is_text(kind.feature)


KINDS_OF_COLUMNS = {
    "text": _is_text,
    "turns with role and content": _are_turns,
    "a list of texts": _are_texts,
    "numbers": lambda kind: isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "float", "null")),
}
TEXT, TURNS, TEXTS, NUMBERS = KINDS_OF_COLUMNS


def _check_dialogues(rows: Dataset) -> None:
    """chosen and rejected without a prompt: both hold the whole dialogue, in the same form."""
    form = TURNS if _are_turns(rows.features["chosen"]) else TEXT
    _check_kind(rows, ["chosen", "rejected"], form)


def _check_kind(rows: Dataset, columns: Sequence[str], *wanted: str) -> None:
    """Raise InputError when a column holds none of the `wanted` kinds: in a .csv the answer 42 is a number, not a text."""
    for column in columns:
        kind = rows.features[column]
        if not any(KINDS_OF_COLUMNS[name](kind) for name in wanted):
            found = kind.dtype if isinstance(kind, Value) else str(kind)[:100]
            raise InputError(
                f"the column {column} of the dataset holds {found}, wanted {' or '.join(wanted)}; convert it"
            )


def _unknown_columns(found: Sequence[str], wanted: str) -> InputError:
    return InputError(f"no known columns in the dataset: found {', '.join(found)}; wanted {wanted}; rename yours")


def _instruction(row: Row) -> str:
    extra = row.get("input")
    return f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]


def _split_messages(messages: list[Message]) -> tuple[Prompt, str]:
    """Dialogue that ends with the assistant's turn -> (the turns before it, its text)."""
    if not messages or not messages[-1] or messages[-1]["role"] != "assistant":
        return messages, ""  # no reply to learn from: counted as empty
    return messages[:-1], messages[-1]["content"]


def _without_response(messages: list[Message]) -> Prompt:
    return messages[:-1] if messages and messages[-1] and messages[-1]["role"] == "assistant" else messages


def _last_response(response: str | list[Message] | None) -> str | None:
    if not isinstance(response, list):
        return response
    return response[-1]["content"] if response and response[-1] else None


def _split_pair(row: Row) -> tuple[Prompt, str, str]:
    """Chosen and rejected that each hold the whole dialogue -> (prompt, chosen reply, rejected reply)."""
    if not row["chosen"] or not row["rejected"]:
        return "", "", ""  # counted as empty
    if isinstance(row["chosen"], list):
        prompt, chosen = _split_messages(row["chosen"])
        return prompt, chosen, _split_messages(row["rejected"])[1]
    start, turn, chosen = row["chosen"].rpartition(TRANSCRIPT_TURN)
    rejected = row["rejected"].rpartition(TRANSCRIPT_TURN)[2]
    return _dialogue(start + turn), chosen.strip(), rejected.strip()


def _dialogue(prompt: Prompt) -> Prompt:
    """A transcript "Human: ... Assistant: ... Assistant:" becomes turns; any other prompt stays as it is."""
    if not isinstance(prompt, str):
        return prompt
    text = prompt.strip()
    if not (text.startswith("Human:") and text.endswith("Assistant:")):
        return prompt
    turns = []
    for human in text.removesuffix("Assistant:").split("\n\nHuman:"):
        question, _, answer = human.removeprefix("Human:").partition(TRANSCRIPT_TURN)
        turns.append({"role": "user", "content": question.strip()})
        if answer:
            turns.append({"role": "assistant", "content": answer.strip()})
    return turns


# ---------------------------------------------------------------------------------------------------------------------
# Token ids
# ---------------------------------------------------------------------------------------------------------------------


def format_prompt(prompt: Prompt, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text in front of the reply: `template` filled in, or the tokenizer's chat template where it is "chat".

    In a dialogue each earlier turn is written in the same template, one blank line apart; a system message comes first.
    """
    if template == "chat":
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return chat_text(messages, tokenizer, add_generation_prompt=True)
    if isinstance(prompt, str):
        return template.replace("{prompt}", prompt)
    text = ""
    for message in prompt:
        if message["role"] == "user":
            text += template.replace("{prompt}", message["content"])
        else:
            text += message["content"] + "\n\n"
    return text


def check_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError when the template is "chat" and the tokenizer has none."""
    if template == "chat" and not tokenizer.chat_template:
        raise InputError("--prompt_template is chat, but this tokenizer has no chat template; give one with {prompt}")


def encode_prompt(prompt: Prompt, template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the formatted prompt, with the special tokens that the model expects in front and no EOS."""
    text = format_prompt(prompt, template, tokenizer)
    # a chat template writes its own special tokens into the text
    ids = tokenizer(text, add_special_tokens=template != "chat")["input_ids"]
    while ids and ids[-1] == tokenizer.eos_token_id and template != "chat":
        ids = ids[:-1]
    return ids


def encode_response(response: str, tokenizer: PreTrainedTokenizerBase, end_id: int) -> list[int]:
    """Token ids of the response alone, without EOS or `end_id` even where the text itself ends with them."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    while ids and ids[-1] in (tokenizer.eos_token_id, end_id):
        ids = ids[:-1]
    return ids


def is_blank(text: Prompt | None) -> bool:
    """Whether a prompt or a response is empty: no text but white space, or turns of which one has no role or no text.

    The one rule for all stages: what is blank is neither trained on, nor broken, nor asked.
    """
    if isinstance(text, str):
        return not text.strip()
    return not text or not all(turn and turn["role"] and turn["content"] for turn in text)


def holds_end(end: str, prompt: Prompt, *responses: str) -> bool:
    """Whether a text of the data spells out `end`, the token that closes a reply: the tokenizer reads it as the token."""
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    return any(end in text for text in [*texts, *responses])


def tokenize_sft(rows: Dataset, template: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Columns input_ids and labels (-100 on the prompt) of every example with room for at least one reply token.

    An example longer than `max_length` is cut in the reply, and then has no end: the model must not learn that replies end
    in the middle.  How many were cut and dropped is printed.  Raises InputError when nothing is left.
    """
    read = sft_reader(rows)
    end_id = reply_end_id(tokenizer, template)
    end = tokenizer.convert_ids_to_tokens(end_id)

    def encode(row: Row) -> list[Row]:
        examples = []
        for prompt, response in read(row):
            if is_blank(prompt) or is_blank(response):
                examples.append({"status": "empty"})
                continue
            query = encode_prompt(prompt, template, tokenizer)
            ids = [*encode_response(response, tokenizer, end_id), end_id]
            room = max_length - len(query)
            if room < 1:
                examples.append({"status": "prompt too long"})
                continue
            status = "kept" if len(ids) <= room else "cut"
            columns = {"input_ids": query + ids[:room], "labels": [-100] * len(query) + ids[:room]}
            examples.append({"status": status, "holds_end": holds_end(end, prompt, response), **columns})
        return examples

    return _map_and_count(rows, encode, ("kept", "cut"), ("input_ids", "labels"), "SFT examples", end)


class Source(NamedTuple):
    """A preference row that broken responses can be made from: both responses hold text and fit whole."""

    prompt: str  # the last turn, without the template
    query: list[int]
    chosen: str
    chosen_ids: list[int]  # of the response alone, without its end
    rejected: str
    rejected_ids: list[int]


class Preferences(NamedTuple):
    """Preference rows, read and tokenized once for everything that stage 2 makes of them."""

    pairs: (
        Dataset  # columns chosen_ids, rejected_ids (query + response + its end), query_length, length, margin and kind
    )
    sources: list[Source]


def tokenize_preferences(
    rows: Dataset, template: str, tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: str
) -> Preferences:
    """Every usable pair of the rows, and the rows that broken responses can be made from.

    margin: how much better the chosen response is, from a column of that name, else 0.  kind: "" for pairs of people, see
    rewards/broken_replies.py.

    A pair in which either side is longer than `max_length` is dropped, or with overlong="cut" both of its responses are cut
    to the same number of tokens and lose their end: a cut response must not pass for a short or an unfinished one beside a
    whole one.  Pairs that are equal or have no chosen response are dropped.  All of it is counted and printed.
    Raises InputError when no pair is left.
    """
    read = preference_reader(rows)
    if "margin" in rows.column_names:
        _check_kind(rows, ["margin"], NUMBERS)
    sources = []
    end_id = reply_end_id(tokenizer, template)
    end = tokenizer.convert_ids_to_tokens(end_id)

    def encode(row: Row) -> list[Row]:
        prompt, chosen, rejected = read(row)
        if is_blank(prompt) or is_blank(chosen) or rejected is None:
            return [{"status": "empty"}]
        query = encode_prompt(prompt, template, tokenizer)
        responses = [encode_response(text, tokenizer, end_id) for text in (chosen, rejected)]
        room = max_length - len(query)
        fits = max(map(len, responses)) < room  # the end comes behind
        if fits and not is_blank(rejected):
            asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            sources.append(Source(asked, query, chosen, responses[0], rejected, responses[1]))
        margin = float(row.get("margin") or 0.0)
        if not math.isfinite(margin):
            return [{"status": "margin is no number"}]
        if chosen == rejected:
            return [{"status": "chosen equals rejected"}]
        if fits:
            responses = [[*ids, end_id] for ids in responses]
        else:
            shared = min(room, *map(len, responses))
            if overlong == "drop" or shared < 1:
                return [{"status": "too long"}]
            responses = [ids[:shared] for ids in responses]
            if responses[0] == responses[1]:
                return [{"status": "too long"}]
        length = len(query) + max(map(len, responses))  # for --train_sampling_strategy group_by_length
        return [
            {
                "status": "kept" if fits else "cut",
                "holds_end": holds_end(end, prompt, chosen, rejected),
                "chosen_ids": query + responses[0],
                "rejected_ids": query + responses[1],
                "query_length": len(query),
                "length": length,
                "margin": margin,
                "kind": "",
            }
        ]

    columns = ("chosen_ids", "rejected_ids", "query_length", "length", "margin", "kind")
    return Preferences(_map_and_count(rows, encode, ("kept", "cut"), columns, "preference pairs", end), sources)


def tokenize_prompts(
    rows: Dataset,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    max_query: int,
    carry: Sequence[str] | None = None,
) -> Dataset:
    """Columns input_ids (the query) and prompt (its text) of every distinct prompt of at most `max_query` tokens.

    With `carry`, names of columns, also these as they are, in a mapping `columns`, and turns: the prompt where it is a
    dialogue, else None.  They are for functions that judge replies.
    """
    read = prompt_reader(rows)
    end = tokenizer.convert_ids_to_tokens(reply_end_id(tokenizer, template))
    seen = set()

    def encode(row: Row) -> list[Row]:
        prompt = read(row)
        if is_blank(prompt):
            return [{"status": "empty"}]
        query = encode_prompt(prompt, template, tokenizer)
        if len(query) > max_query:
            return [{"status": "too long"}]
        if tuple(query) in seen:  # preference data repeats its prompts, once a pair
            return [{"status": "repeated"}]
        seen.add(tuple(query))
        text = prompt if isinstance(prompt, str) else format_prompt(prompt, template, tokenizer)
        example = {"status": "kept", "holds_end": holds_end(end, prompt), "input_ids": query, "prompt": text}
        if carry is not None:
            example["columns"] = {name: row[name] for name in carry}
            example["turns"] = None if isinstance(prompt, str) else prompt
        return [example]

    columns = ("input_ids", "prompt") + (("columns", "turns") if carry is not None else ())
    return _map_and_count(rows, encode, ("kept",), columns, "prompts", end)


def _map_and_count(
    rows: Dataset,
    encode: Callable[[Row], list[Row]],
    keep: tuple[str, ...],
    columns: tuple[str, ...],
    what: str,
    end: str,
) -> Dataset:
    """Run `encode` over the rows, keep the examples whose status is in `keep`, and print how many went where.

    Warns of what may be a mistake: examples that are there twice, and `end`, which closes a reply, spelled out in a text.
    """
    counts: Counter[str] = Counter()
    kept, seen, with_end = [], set(), 0
    for row in tqdm(rows, desc=f"tokenizing {what}", disable=not is_main_process(), mininterval=1):
        for example in encode(row):
            counts[example["status"]] += 1
            if example["status"] in keep:
                kept.append({column: example[column] for column in columns})
                seen.add(hash(repr(kept[-1])))
                with_end += example["holds_end"]
    if not kept:
        raise InputError(f"none of {len(rows)} rows is usable: {dict(counts)}; check the data and --max_length")
    say(f"{what}: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    if len(seen) < len(kept):
        say(f"warning: {len(kept) - len(seen)} of the {what} are there twice or more, and count as often")
    if with_end:
        say(
            f"warning: {with_end} of the {what} hold {end} as text, which is read as the end of a reply; "
            "at the end of a reply it does no harm, elsewhere remove it"
        )
    return Dataset.from_list(kept)
