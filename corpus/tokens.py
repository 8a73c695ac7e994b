"""From dialogues to token ids: format the prompt, tokenize, say what is trained on.

One rule holds the three stages together: prompt and reply are tokenized apart and joined as ids, EOS behind the reply
(under a chat template the token that ends its turns, see `reply_end_id`).
So SFT, the reward model and PPO see the same ids for the same prompt and reply, whatever the tokenizer would have done
at the seam, and the query of a PPO rollout is exactly the query that SFT was trained on.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from datasets import Dataset
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase

from corpus.chat_template import chat_text, moves_system, reply_end_id
from corpus.files import Rows
from corpus.formats import (
    DIFFER_BEFORE,
    NOTHING_SHARED,
    Message,
    Pair,
    Prompt,
    Reader,
    Row,
    as_turns,
    has_scores,
    margin_of,
    message_text,
    pairs_of_scores,
    preference_reader,
    prompt_reader,
    sft_reader,
    unused,
)
from utils.console import InputError, is_main_process, say

HELD_OUT = "held-out"  # the name of the other split
LONGEST_SHOWN = 600  # characters at either end of a part of an example

# ---------------------------------------------------------------------------------------------------------------------
# Token ids
# ---------------------------------------------------------------------------------------------------------------------


def format_prompt(prompt: Prompt, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text in front of the reply: `template` filled in, or the tokenizer's chat template where it is "chat".

    In a dialogue each earlier turn is written in the same template, one blank line apart; a system message comes first.
    """
    if template == "chat":
        return chat_text(as_turns(prompt), tokenizer, add_generation_prompt=True)
    if isinstance(prompt, str):
        return template.replace("{prompt}", prompt)
    text = ""
    for message in prompt:
        if message["role"] == "user":
            text += template.replace("{prompt}", message["content"])
        else:
            text += message_text(message) + "\n\n"
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


def encode_turn(
    prompt: Prompt, response: Message, template: str, tokenizer: PreTrainedTokenizerBase, end_id: int
) -> list[int]:
    """Token ids of an assistant's turn behind the prompt, without its end: its text, in which a chat template may have
    words of its own for the tools that it calls and for what it thinks first.
    """
    if template == "chat" and response.keys() - {"role", "content", "name", "weight"}:
        before = format_prompt(prompt, template, tokenizer)
        whole = chat_text([*as_turns(prompt), response], tokenizer, add_generation_prompt=False)
        if whole.startswith(before):
            text = whole.removeprefix(before)
            return encode_response(
                text.rpartition(tokenizer.convert_ids_to_tokens(end_id))[0] or text, tokenizer, end_id
            )
    return encode_response(message_text(response), tokenizer, end_id)


def is_blank(text: Prompt | None) -> bool:
    """Whether a prompt or a response is empty: no text but white space, or turns of which one has no role or no text.

    The one rule for all stages: what is blank is neither trained on, nor broken, nor asked.  A turn that calls a tool may be
    without text, and so may what the tool returns.
    """
    if isinstance(text, str):
        return not text.strip()
    said = [turn for turn in text or () if turn["role"] != "tools"]
    return not said or not all(
        turn["role"] and (turn["content"].strip() or turn.get("tool_calls") or turn["role"] == "tool") for turn in said
    )


def holds_end(end: str, prompt: Prompt, *responses: str) -> bool:
    """Whether a text of the data spells out `end`, the token that closes a reply: the tokenizer reads it as the token."""
    return any(end in text for text in [*(turn["content"] for turn in as_turns(prompt)), *responses])


# ---------------------------------------------------------------------------------------------------------------------
# The three stages
# ---------------------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What becomes of one row of the data."""

    statuses: list[str]  # one for each example that the row holds
    rows: list[Row]  # columns of those that are kept
    holds_end: int = 0  # how many of these spell out the end of a reply
    moved: bool = False  # whether a system message stands elsewhere in them, as the chat template has no place for it


def tokenize_sft(
    rows: Rows | Dataset,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on_turns: str = "all",
    split: str = "training",
) -> Dataset:
    """Columns input_ids and labels, -100 on whatever is not trained: on all but responses, each with its end.

    train_on_turns: "all" turns of the assistant in a dialogue, or the "last" one.  The ids of a turn are those of its prompt
    and response in the other stages.  Where they are the beginning of a later turn's ids, as under most chat templates, both
    are in one row; where the template writes an earlier turn otherwise than it is sampled (without its thoughts, or without
    an end), each has a row of its own.

    An example longer than `max_length` is cut in the reply, and then has no end: the model must not learn that replies end
    in the middle.  How many were cut and dropped is printed.  Raises InputError when nothing is left.
    """
    read = sft_reader(rows)
    end_id = reply_end_id(tokenizer, template)
    end = tokenizer.convert_ids_to_tokens(end_id)
    whole = []  # trained turns of each dialogue that is given as one

    def encode(row: Row) -> Encoded:
        statuses: list[str] = []
        made: list[Row] = []
        with_end, moved = 0, False
        for dialogue in read(row):
            turns = [(dialogue.prompt, dialogue.response)]
            if dialogue.is_whole and train_on_turns == "all":
                earlier = enumerate(as_turns(dialogue.prompt))
                turns[:0] = [(dialogue.prompt[:place], turn) for place, turn in earlier if turn["role"] == "assistant"]
            spans: list[tuple[str, list[int], list[int]]] = []
            for prompt, response in turns:
                status, query, ids = fit(prompt, response)
                statuses.append(status)
                if ids:
                    spans.append((status, query, ids))
            joined = join_turns([(query, ids) for _, query, ids in spans])
            made += joined
            with_end += len(joined) * holds_end(end, dialogue.prompt, message_text(dialogue.response))
            if dialogue.is_whole:
                whole.append(len(spans))
            moved = moved or (bool(joined) and _moves(dialogue.prompt, template, tokenizer))
        return Encoded(statuses, made, with_end, moved)

    def fit(prompt: Prompt, response: Message) -> tuple[str, list[int], list[int]]:
        """Status, query and response of one turn; no response where it is not trained."""
        if response.get("weight") == 0:  # OpenAI's word for: not to be learnt
            return "weight 0", [], []
        if is_blank(prompt) or is_blank(message_text(response)):
            return "empty", [], []
        query = encode_prompt(prompt, template, tokenizer)
        ids = [*encode_turn(prompt, response, template, tokenizer, end_id), end_id]
        room = max_length - len(query)
        if room < 1:
            return "prompt too long", [], []
        return ("kept" if len(ids) <= room else "cut"), query, ids[:room]

    kept = _map_and_count(rows, read, encode, "SFT examples", split, end)
    if whole:
        dialogues = sum(count > 0 for count in whole)
        say(f"{split}: {dialogues} dialogues, {sum(whole)} trained turns in {len(kept)} rows")
    if split == "training":
        row = kept[0]
        loss = [label != -100 for label in row["labels"]]
        _show(
            f"one example of {len(loss)} tokens, {sum(loss)} of them with loss, marked",
            row["input_ids"],
            loss,
            tokenizer,
        )
    return kept


def join_turns(turns: list[tuple[list[int], list[int]]]) -> list[Row]:
    """Rows of a dialogue's turns, each (query, response): a turn whose ids begin those of a later one is in its row."""
    made: list[Row] = []
    for query, response in reversed(turns):
        ids = query + response
        if made and made[-1]["input_ids"][: len(ids)] == ids:
            made[-1]["labels"][len(query) : len(ids)] = response
        else:
            made.append({"input_ids": ids, "labels": [-100] * len(query) + response})
    return made[::-1]


class Source(NamedTuple):
    """A preference row that broken responses can be made from: both responses hold text and fit whole."""

    prompt: str  # the last turn, without the template
    whole: Prompt  # all of it, as the data have it
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
    rows: Rows | Dataset,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: str,
    split: str = "training",
) -> Preferences:
    """Every usable pair of the rows, and the rows that broken responses can be made from.

    margin: how much better the chosen response is, from a column of that name or from scores, else 0.  kind: "" for pairs of
    people, see rewards/broken_replies.py.

    A pair in which either side is longer than `max_length` is dropped, or with overlong="cut" both of its responses are cut
    to the same number of tokens and lose their end: a cut response must not pass for a short or an unfinished one beside a
    whole one.  Pairs whose tokens are equal, and those without a chosen response, are dropped.  All of it is counted and
    printed.  Raises InputError when no pair is left.
    """
    if has_scores(rows):
        scored = pairs_of_scores(rows)
        say(
            f"{split}: {len(scored.rows)} pairs of {len(rows)} scored replies; {scored.ties} pairs have equal scores, "
            f"{scored.alone} prompts one reply"
        )
        _say_unused([name for name in unused(rows.column_names, sft_reader(rows)) if name != "score"], split)
        rows = Rows(scored.column_names, scored.rows)
    read = preference_reader(rows)
    sources = []
    end_id = reply_end_id(tokenizer, template)
    end = tokenizer.convert_ids_to_tokens(end_id)
    part_early = 0

    def encode(row: Row) -> Encoded:
        nonlocal part_early
        made = []
        for pair in read(row):
            made.append(encode_pair(pair, margin_of(row)))
            part_early += pair.status == DIFFER_BEFORE and bool(made[-1].rows)
        return Encoded(
            [status for each in made for status in each.statuses],
            [kept for each in made for kept in each.rows],
            sum(each.holds_end for each in made),
            any(each.moved for each in made),
        )

    def encode_pair(pair: Pair, margin: float) -> Encoded:
        prompt, texts = pair.prompt, [message_text(pair.chosen), message_text(pair.rejected)]
        if pair.status == NOTHING_SHARED:
            return Encoded([NOTHING_SHARED], [])
        if is_blank(prompt) or is_blank(texts[0]):
            return Encoded(["empty"], [])
        query = encode_prompt(prompt, template, tokenizer)
        responses = [encode_turn(prompt, side, template, tokenizer, end_id) for side in (pair.chosen, pair.rejected)]
        room = max_length - len(query)
        fits = max(map(len, responses)) < room  # the end comes behind
        if fits and not is_blank(texts[1]):
            asked = as_turns(prompt)[-1]["content"]
            sources.append(Source(asked, prompt, query, texts[0], responses[0], texts[1], responses[1]))
        if not math.isfinite(margin):
            return Encoded(["margin is no number"], [])
        if responses[0] == responses[1]:
            return Encoded(["chosen equals rejected"], [])
        if fits:
            responses = [[*ids, end_id] for ids in responses]
        else:
            shared = min(room, *map(len, responses))
            if overlong == "drop" or shared < 1:
                return Encoded(["too long"], [])
            responses = [ids[:shared] for ids in responses]
            if responses[0] == responses[1]:
                return Encoded(["too long"], [])
        kept = {
            "chosen_ids": query + responses[0],
            "rejected_ids": query + responses[1],
            "query_length": len(query),
            "length": len(query) + max(map(len, responses)),  # for --train_sampling_strategy group_by_length
            "margin": margin,
            "kind": "",
        }
        return Encoded(
            ["kept" if fits else "cut"], [kept], holds_end(end, prompt, *texts), _moves(prompt, template, tokenizer)
        )

    pairs = _map_and_count(rows, read, encode, "preference pairs", split, end)
    if part_early:
        say(f"note: {part_early} of the {split} pairs {DIFFER_BEFORE}; the first turns that differ are compared")
    if split == "training":
        for side in ("chosen", "rejected"):
            ids, start = pairs[0][f"{side}_ids"], pairs[0]["query_length"]
            scored_part = [place >= start for place in range(len(ids))]
            what = f"one {side} reply with its prompt, {len(ids)} tokens, the {len(ids) - start} of the reply marked"
            _show(f"{what}; its score is read at the last one", ids, scored_part, tokenizer)
    return Preferences(pairs, sources)


def tokenize_prompts(
    rows: Rows | Dataset,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    max_query: int,
    carry: Sequence[str] | None = None,
    split: str = "training",
) -> Dataset:
    """Columns input_ids (the query) and prompt (its text) of every distinct prompt of at most `max_query` tokens.

    With `carry`, names of columns, also these as they are, in a mapping `columns`, and turns: the prompt where it is a
    dialogue, else None.  They are for functions that judge replies.
    """
    read = prompt_reader(rows)
    end = tokenizer.convert_ids_to_tokens(reply_end_id(tokenizer, template))
    seen = set()

    def encode(row: Row) -> Encoded:
        prompt = read(row)
        if is_blank(prompt):
            return Encoded(["empty"], [])
        query = encode_prompt(prompt, template, tokenizer)
        if len(query) > max_query:
            return Encoded(["too long"], [])
        if tuple(query) in seen:  # preference data repeats its prompts, once a pair
            return Encoded(["repeated"], [])
        seen.add(tuple(query))
        text = prompt if isinstance(prompt, str) else format_prompt(prompt, template, tokenizer)
        example = {"input_ids": query, "prompt": text}
        if carry is not None:
            example["columns"] = {name: row.get(name) for name in carry}
            example["turns"] = None if isinstance(prompt, str) else prompt
        return Encoded(["kept"], [example], holds_end(end, prompt), _moves(prompt, template, tokenizer))

    kept = _map_and_count(rows, read, encode, "prompts", split, end, carry or ())
    if split == "training":
        ids = kept[0]["input_ids"]
        _show(f"one prompt of {len(ids)} tokens, behind which the policy replies", ids, [False] * len(ids), tokenizer)
    return kept


def _map_and_count(
    rows: Rows | Dataset,
    read: Reader,
    encode: Callable[[Row], Encoded],
    what: str,
    split: str,
    end: str,
    carry: Sequence[str] = (),
) -> Dataset:
    """Run `encode` over the rows, and print how many examples went where.  Raises InputError when none is kept.

    Says what may be a mistake: columns that are not used, null in a column that is needed, examples that are there twice,
    and `end`, which closes a reply, spelled out in a text.
    """
    _say_unused([name for name in unused(rows.column_names, read) if name not in carry], split)
    counts: Counter[str] = Counter()
    nulls: Counter[str] = Counter()
    kept, seen, with_end, moved = [], set(), 0, 0
    for row in tqdm(rows, desc=f"tokenizing {what}", disable=not is_main_process(), mininterval=1):
        nulls.update(column for column in read.needed if row.get(column) is None)
        encoded = encode(row)
        counts.update(encoded.statuses or ["empty"])
        kept += encoded.rows
        seen.update(hash(repr(example)) for example in encoded.rows)
        with_end += encoded.holds_end
        moved += encoded.moved
    if not kept:
        raise InputError(f"none of {len(rows)} {split} rows is usable: {dict(counts)}; check the data and --max_length")
    say(f"{split} {what}: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    if nulls:
        found = ", ".join(f"{count} in {column}" for column, count in nulls.items())
        say(f"note: null in {split} rows, read as an empty text: {found}")
    if len(seen) < len(kept):
        say(f"warning: {len(kept) - len(seen)} of the {split} {what} are there twice or more, and count as often")
    if moved:
        say(
            f"note: the chat template has no place for the system message of {moved} {split} rows; it stands in front of "
            "what the user says behind it"
        )
    if with_end:
        say(
            f"warning: {with_end} of the {split} {what} hold {end} as text, which is read as the end of a reply; "
            "at the end of a reply it does no harm, elsewhere remove it"
        )
    return Dataset.from_list(kept)


def _moves(prompt: Prompt, template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return template == "chat" and moves_system(as_turns(prompt), tokenizer)


def _say_unused(names: list[str], split: str) -> None:
    if names and split != HELD_OUT:  # once
        say(f"note: columns that are not used: {', '.join(names)}")


def mark(ids: list[int], marked: Iterable[bool], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the ids, with the marked ones between >>> and <<<; of long parts the beginning and the end."""
    text = ""
    for inside, part in itertools.groupby(zip(ids, marked, strict=True), key=lambda pair: pair[1]):
        words = tokenizer.decode([token for token, _ in part])
        if len(words) > 2 * LONGEST_SHOWN:
            words = f"{words[:LONGEST_SHOWN]} [...] {words[-LONGEST_SHOWN:]}"
        text += f">>>{words}<<<" if inside else words
    return text


def _show(what: str, ids: list[int], marked: list[bool], tokenizer: PreTrainedTokenizerBase) -> None:
    say(f"{what}:\n    " + mark(ids, marked, tokenizer).replace("\n", "\n    "))
