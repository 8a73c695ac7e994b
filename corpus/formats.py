"""Formats: from the columns of a row to the turns of a dialogue, and the responses to it.

Whatever changes what is asked is kept: system, history, input, tools, and the earlier turns of every dialogue.
"""

import ast
import contextlib
import itertools
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from utils.console import InputError

Message = dict[str, Any]  # {"role": "user" | "assistant" | "system" | "tool", "content": text}, and what templates take
Prompt = str | list[Message]  # a plain question, or the turns of a dialogue that the assistant is to go on with
Row = dict[str, Any]

TURNS_COLUMNS = ("messages", "conversations", "conversation")
SFT_COLUMNS = (
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("q", "a"),
    ("instruction", "response"),
    ("query", "response"),
    ("question", "response"),
)
REPLY_COLUMNS = frozenset(reply for _, reply in SFT_COLUMNS)
PREFERENCE_COLUMNS = (("chosen", "rejected"), ("response_j", "response_k"))
PROMPT_COLUMNS = ("prompt", "question", "q", "instruction", "query")
CONTEXT_COLUMNS = ("system", "system_prompt", "history", "input", "context", "tools")
KNOWN_COLUMNS = frozenset(
    itertools.chain(
        TURNS_COLUMNS,
        *SFT_COLUMNS,
        *PREFERENCE_COLUMNS,
        PROMPT_COLUMNS,
        CONTEXT_COLUMNS,
        ("chatgpt_answers", "score", "margin"),
    )
)
# ShareGPT and its kin
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= {"model": "assistant", "function_call": "assistant", "observation": "tool", "function": "tool"}
ROLES |= {"tools": "tool"}  # the name is taken: a turn of that role holds descriptions of tools
TRANSCRIPT_TURN = "\n\nAssistant:"  # hh-rlhf writes its dialogues as "\n\nHuman: ...\n\nAssistant: ..."
# statuses of pairs
DIFFER_BEFORE = "differ before the last turn"
NOTHING_SHARED = "no shared prompt"


@dataclass(frozen=True)
class Reader:
    """Reads rows that have certain columns.  Call it with a row."""

    used: tuple[str, ...]  # the columns that it reads
    needed: tuple[str, ...]  # those of them that have to hold something
    read: Callable[[Row], Any]

    def __call__(self, row: Row) -> Any:
        return self.read(row)


class Pair(NamedTuple):
    """Two responses to a prompt."""

    prompt: Prompt
    chosen: Message
    rejected: Message
    status: str = "kept"  # or DIFFER_BEFORE, NOTHING_SHARED


class Dialogue(NamedTuple):
    """What SFT learns from: the prompt, which may hold earlier turns of the assistant, and its last turn."""

    prompt: Prompt
    response: Message
    is_whole: bool = (
        False  # the prompt's turns of the assistant are to be learnt too: they are no prompt, but a dialogue
    )


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def message_text(message: Message) -> str:
    """Content of a turn, and as JSON behind it the tools that it calls: for templates without words of their own."""
    calls = message.get("tool_calls")
    parts = [message["content"]] if message["content"] else []
    return "\n".join([*parts, *([json.dumps(calls, ensure_ascii=False)] if calls else [])])


def _text(row: Row, column: str) -> str:
    """A text; null is the empty one."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise _wrong_kind(column, value, "text")
    return value or ""


def _wrong_kind(column: str, value: Any, wanted: str) -> InputError:
    found = f"{type(value).__name__} ({str(value)[:60]})"
    return InputError(f"the column {column} of the dataset holds {found}, wanted {wanted}; convert it")


def from_json(value: Any) -> Any:
    """A .csv holds dialogues and tools as JSON text, or in Python's words, as pandas writes them."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for parse in (json.loads, _from_python):
            with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                found = parse(value.strip())
                json.dumps(found, ensure_ascii=False).encode()  # half of an emoji's pair of \u is no text
                return found
    return value


def _from_python(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a backslash in a text
        return json.loads(json.dumps(ast.literal_eval(text)))


def is_turn(value: Any) -> bool:
    """Whether this is a turn in OpenAI's or ShareGPT's words."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def are_turns(value: Any) -> bool:
    """Whether this is a dialogue: turns and nothing else, each with a role and what was said."""
    turns = [value] if is_turn(value) else value
    return (
        bool(turns)
        and isinstance(turns, list)
        and all(is_turn(turn) and ("content" in turn or "value" in turn) for turn in turns)
    )


def _turns(column: str, value: Any) -> list[Message]:
    """Turns in the words of chat templates, from OpenAI's or ShareGPT's; null is none, an empty system turn is left out."""
    value = from_json(value)
    if value is None:
        return []
    value = [value] if is_turn(value) else value
    if not isinstance(value, list) or not all(turn is None or is_turn(turn) for turn in value):
        raise _wrong_kind(column, value, "turns with role and content, or from and value")
    turns = [_turn(column, turn or {}) for turn in value]
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def _turn(column: str, turn: Row) -> Message:
    role = turn.get("role") or turn.get("from")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(_text(part, "text") for part in content)
    if not isinstance(content, str | None) or not isinstance(role, str | None):
        raise _wrong_kind(column, turn, "turns with role and content, both texts")
    more = {
        key: part for key, part in turn.items() if part is not None and key not in ("role", "from", "content", "value")
    }
    if "tool_calls" in more:
        if not isinstance(more["tool_calls"], list):
            raise _wrong_kind(column, turn, "turns whose tool_calls are a list")
        more["tool_calls"] = [_call(call) for call in more["tool_calls"]]
    return {"role": role and ROLES.get(role.strip().lower(), role.strip().lower()), "content": content or "", **more}


def _call(call: Any) -> Any:
    """A call of a tool with its arguments as an object, as chat templates want them; OpenAI has them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    return {**call, "function": {**function, "arguments": from_json(function.get("arguments"))}}


def as_turns(prompt: Prompt) -> list[Message]:
    """The turns of any prompt."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def bare(prompt: Prompt) -> Prompt:
    """A prompt without what its turns do not have: a data set puts None there, and templates ask whether it is there."""
    if isinstance(prompt, str):
        return prompt
    return [{name: value for name, value in turn.items() if value is not None} for turn in prompt]


def _transcript(prompt: str) -> Prompt:
    """A transcript "Human: ... Assistant: ... Assistant:" becomes turns; any other prompt stays as it is."""
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
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def _prompt_in(column: str, columns: set[str]) -> Reader:
    """Row -> prompt in this column, with the system prompt, history, input and tools that stand beside it."""
    extras = ("input", "context") if column == "instruction" else ("input",)
    extra = next((name for name in extras if name in columns), None) if column in PROMPT_COLUMNS else None
    system = next((name for name in ("system", "system_prompt") if name in columns), None)

    def read(row: Row) -> Prompt:
        value = row.get(column)
        if column in TURNS_COLUMNS or isinstance(value, (list, dict)):
            prompt: Prompt = _turns(column, value)
        else:
            text = _text(row, column)
            more = _text(row, extra) if extra else ""
            # beside a prompt, and not an instruction, it may be the same text once more
            prompt = _transcript(
                f"{text}\n\n{more}" if more and (column == "instruction" or more not in text) else text
            )
        if row.get("history"):
            prompt = [*_history(row["history"]), *as_turns(prompt)]
        rule = _text(row, system) if system else ""
        if rule.strip() and not any(turn["role"] == "system" for turn in as_turns(prompt)):
            prompt = [{"role": "system", "content": rule}, *as_turns(prompt)]
        tools = from_json(row.get("tools"))
        if tools:
            if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
                raise _wrong_kind("tools", tools, "a list of descriptions, or its JSON text")
            # a turn of its own, in front: whatever is cut out of the dialogue keeps it
            prompt = [{"role": "tools", "content": json.dumps(tools, ensure_ascii=False)}, *as_turns(prompt)]
        return prompt

    beside = (name for name in (extra, system, "history", "tools") if name in columns)
    return Reader((column, *beside), (column,), read)


def _history(value: Any) -> list[Message]:
    """Alpaca's [[question, answer], ...], or turns."""
    value = from_json(value)
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        pairs = [{"question": question, "answer": answer} for question, answer in value]
        return [
            turn
            for pair in pairs
            for turn in ({"role": "user", "content": _text(pair, "question")}, assistant(_text(pair, "answer")))
        ]
    return _turns("history", value)


def _prompt_column(columns: set[str]) -> str | None:
    return next((name for name in (*PROMPT_COLUMNS, *TURNS_COLUMNS) if name in columns), None)


def prompt_reader(rows: Any) -> Reader:
    """Row -> prompt: any dataset with prompts will do, SFT and preference data included.

    rows: what has column_names.  Raises InputError that names the columns found and the ones wanted.
    """
    columns = set(rows.column_names)
    if any(set(sides) <= columns for sides in PREFERENCE_COLUMNS):
        pairs = preference_reader(rows)

        def first_prompt(row: Row) -> Prompt:
            found = pairs(row)
            return found[0].prompt if found else ""

        return Reader(pairs.used, pairs.needed, first_prompt)
    column = _prompt_column(columns)
    if column is None:
        wanted = ", ".join((*PROMPT_COLUMNS, *TURNS_COLUMNS))
        raise _unknown_columns(rows.column_names, wanted + " or chosen/rejected")
    ask = _prompt_in(column, columns)
    return Reader(
        ask.used, ask.needed, lambda row: _without_response(ask(row)) if column in TURNS_COLUMNS else ask(row)
    )


def _without_response(turns: list[Message]) -> list[Message]:
    return turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns


def _unknown_columns(found: Sequence[str], wanted: str) -> InputError:
    return InputError(
        f"no known columns in the dataset: found {', '.join(found)}; wanted {wanted}; rename yours, or name them with "
        "--columns prompt=NAME,..."
    )


# ---------------------------------------------------------------------------------------------------------------------
# SFT
# ---------------------------------------------------------------------------------------------------------------------


def sft_reader(rows: Any) -> Reader:
    """Row -> its dialogues.  Raises InputError that names the columns found and the ones wanted."""
    columns = set(rows.column_names)
    is_preference = any(set(sides) <= columns for sides in PREFERENCE_COLUMNS)
    if is_preference:
        pairs = preference_reader(rows)
    turns = next((name for name in TURNS_COLUMNS if name in columns), None)
    if turns is not None:
        ask = _prompt_in(turns, columns)
        if not is_preference:
            return Reader(ask.used, ask.needed, lambda row: [_split_turns(ask(row))])

        def whole_or_chosen(row: Row) -> list[Dialogue]:
            dialogue = ask(row)
            ends = dialogue and dialogue[-1]["role"] == "assistant"
            return [_split_turns(dialogue)] if ends else _chosen(pairs(row))

        return Reader((*ask.used, *pairs.used), ask.needed, whole_or_chosen)
    if {"question", "chatgpt_answers"} <= columns:  # HC3: a list of answers, each an example of its own
        ask = _prompt_in("question", columns)

        def answers(row: Row) -> list[Dialogue]:
            return [Dialogue(ask(row), assistant(answer)) for answer in _texts(row, "chatgpt_answers")]

        return Reader((*ask.used, "chatgpt_answers"), ask.needed, answers)
    for prompt, response in SFT_COLUMNS:
        if {prompt, response} <= columns:
            ask = _prompt_in(prompt, columns)

            def dialogue(row: Row, ask: Reader = ask, response: str = response) -> list[Dialogue]:
                return [Dialogue(*_side(ask(row), response, row.get(response)), is_whole=bool(row.get("history")))]

            return Reader((*ask.used, response), (prompt, response), dialogue)
    if is_preference:  # SFT on the preferred replies
        return Reader(pairs.used, pairs.needed, lambda row: _chosen(pairs(row)))
    raise _unknown_columns(
        rows.column_names,
        "prompt/response, prompt/completion, question/answer, q/a, instruction[/input]/output, messages, conversations, "
        "question/chatgpt_answers or prompt/chosen",
    )


def _texts(row: Row, column: str) -> list[str]:
    values = from_json(row.get(column)) or []
    if not isinstance(values, list) or not all(isinstance(value, str | None) for value in values):
        raise _wrong_kind(column, values, "a list of texts")
    return [value or "" for value in values]


def _split_turns(turns: list[Message]) -> Dialogue:
    """Turns up to the last one of the assistant; what a user says behind it asks for nothing that could be learnt."""
    for place in range(len(turns) - 1, -1, -1):
        if turns[place]["role"] == "assistant":
            return Dialogue(turns[:place], turns[place], is_whole=True)
    return Dialogue(turns, assistant(""), is_whole=True)  # no response: counted as empty


def _chosen(pairs: list[Pair]) -> list[Dialogue]:
    """The preferred responses, each once."""
    return list({message_text(pair.chosen): Dialogue(pair.prompt, pair.chosen) for pair in pairs}.values())


# ---------------------------------------------------------------------------------------------------------------------
# Preferences
# ---------------------------------------------------------------------------------------------------------------------


def preference_reader(rows: Any) -> Reader:
    """Row -> its pairs.  Raises InputError that names the columns found and wanted."""
    columns = set(rows.column_names)
    for better, worse in PREFERENCE_COLUMNS:
        if {better, worse} <= columns:
            column = _prompt_column(columns)
            beside = _prompt_in(column or "dialogue", columns)
            used = [name for name in beside.used if name in columns]
            used += ["margin"] if "margin" in columns else []
            needed = (*((column,) if column else ()), better, worse)
            return Reader((*used, better, worse), needed, _pairs_reader(beside, column, better, worse))
    raise _unknown_columns(
        rows.column_names,
        "prompt/chosen/rejected, question/response_j/response_k, chosen/rejected or prompt/response/score",
    )


def _pairs_reader(beside: Reader, column: str | None, better: str, worse: str) -> Callable[[Row], list[Pair]]:
    """column: that of the prompt; None where the two dialogues hold it.  beside: reads it, and what stands beside it."""

    def read(row: Row) -> list[Pair]:
        prompt = beside(row) if column else None
        if column in TURNS_COLUMNS:
            prompt = _without_response(prompt)  # UltraFeedback's messages are its chosen dialogue
        sides = [[_side(prompt, name, value) for value in _several(row.get(name))] for name in (better, worse)]
        if column is None:  # system prompt and tools
            sides = [[(beside({**row, "dialogue": context}), response) for context, response in side] for side in sides]
        return [_pair(chosen, rejected) for chosen in sides[0] for rejected in sides[1]]

    return read


def _several(value: Any) -> list[Any]:
    """A list of responses: of texts or of dialogues; a text or a dialogue is the only one."""
    several = isinstance(value, list) and any(isinstance(part, str | list) for part in value)
    return value if several else [value]


def _side(prompt: Prompt | None, column: str, value: Any) -> tuple[Prompt, Message]:
    """One response with all that stands in front of it.  prompt: what its own column holds, None without one."""
    if isinstance(value, (list, dict)):
        turns = _turns(column, value)
        if not turns or turns[-1]["role"] != "assistant":
            return prompt or [], assistant("")  # no response: counted as empty
        return (_join(prompt, turns[:-1]), turns[-1])
    text = _text({column: value}, column)
    if prompt is not None and not (text.lstrip().startswith("Human:") and TRANSCRIPT_TURN in text):
        return prompt, assistant(text)
    start, turn, response = text.rpartition(TRANSCRIPT_TURN)
    context = _transcript(start + turn)
    return (_join(prompt, context) if isinstance(context, list) else context), assistant(response.strip())


def _same(one: Message, other: Message) -> bool:
    return one["role"] == other["role"] and one["content"].strip() == other["content"].strip()


def _join(prompt: Prompt | None, earlier: list[Message]) -> Prompt:
    """The prompt and the turns of a dialogue in front of its last one, which may begin with the prompt, or go on with it."""
    if not prompt or not earlier:
        return prompt or earlier
    rules = [turn for turn in as_turns(prompt) if turn["role"] in ("tools", "system")]
    asked = [turn for turn in as_turns(prompt) if turn["role"] not in ("tools", "system")]
    said = [turn for turn in earlier if turn["role"] != "system"]
    if len(said) < len(earlier):  # the dialogue's own system prompt counts
        rules = [turn for turn in rules if turn["role"] == "tools"]
        rules += [turn for turn in earlier if turn["role"] == "system"]
    if not asked or not said:
        turns = asked or said
    elif said[0]["role"] != "user":  # it goes on where the prompt ends
        turns = [*asked, *said]
    elif len(asked) <= len(said) and all(map(_same, asked, said)):
        turns = said
    elif _same(asked[-1], said[0]):
        turns = [*asked[:-1], *said]
    elif any(_same(asked[-1], turn) for turn in said):
        turns = said
    else:  # something else is asked in the two: both are kept, in one turn
        both = f"{asked[-1]['content']}\n\n{said[0]['content']}"
        turns = [*asked[:-1], {"role": "user", "content": both}, *said[1:]]
    joined = [*rules, *turns]
    return prompt if isinstance(prompt, str) and joined == as_turns(prompt) else joined


def _pair(chosen: tuple[Prompt, Message], rejected: tuple[Prompt, Message]) -> Pair:
    """Two responses; where the dialogues part earlier, those at the first turn in which they differ."""
    if chosen[0] == rejected[0]:
        return Pair(chosen[0], chosen[1], rejected[1])
    sides = [[*as_turns(prompt), response] for prompt, response in (chosen, rejected)]
    shared = 0
    while shared < min(map(len, sides)) and _same(sides[0][shared], sides[1][shared]):
        shared += 1
    if shared == min(map(len, sides)) or any(side[shared]["role"] != "assistant" for side in sides):
        return Pair(sides[0][:shared], assistant(""), assistant(""), NOTHING_SHARED)
    return Pair(sides[0][:shared], sides[0][shared], sides[1][shared], DIFFER_BEFORE)


def margin_of(row: Row) -> float:
    """How much better the chosen response is, 0 where nothing says so.  Raises InputError for what is no number."""
    value = row.get("margin")
    if value is None or value == "":
        return 0.0
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong_kind("margin", value, "numbers") from error


# ---------------------------------------------------------------------------------------------------------------------
# Scores instead of pairs
# ---------------------------------------------------------------------------------------------------------------------


class ScoredPairs(NamedTuple):
    """Pairs made of scored responses, as rows with prompt, chosen, rejected and margin; and what came of the rest."""

    rows: list[Row]
    column_names: list[str]
    alone: int  # responses without another one to the same prompt
    ties: int  # pairs with the same score


def has_scores(rows: Any) -> bool:
    """Whether these are scored responses instead of pairs."""
    columns = set(rows.column_names)
    return "score" in columns and not any(set(sides) <= columns for sides in PREFERENCE_COLUMNS)


def pairs_of_scores(rows: Any) -> ScoredPairs:
    """Every two responses to the same prompt whose scores differ; the margin is the difference of their scores as a share
    of the widest difference in the data, so that stars and percentages weigh alike.

    Raises InputError when a score is no number, or no prompt has two responses that differ in it.
    """
    reader = sft_reader(rows)
    by_prompt: dict[str, list[tuple[float, Dialogue]]] = defaultdict(list)
    for row in rows:
        try:
            score = float(row.get("score"))
        except (TypeError, ValueError) as error:
            raise _wrong_kind("score", row.get("score"), "numbers") from error
        if not math.isfinite(score):
            raise _wrong_kind("score", score, "finite numbers")
        for dialogue in reader(row):
            by_prompt[str(dialogue.prompt)].append((score, dialogue))
    scores = [score for group in by_prompt.values() for score, _ in group]
    widest = (max(scores) - min(scores)) or 1.0
    pairs, ties = [], 0
    for group in by_prompt.values():
        for (a, one), (b, other) in itertools.combinations(group, 2):
            if a == b:
                ties += 1
                continue
            better, worse = (one, other) if a > b else (other, one)
            margin = abs(a - b) / widest
            row = {"prompt": one.prompt, "chosen": [better.response], "rejected": [worse.response], "margin": margin}
            pairs.append(row)
    if not pairs:
        raise InputError(
            f"none of the {len(by_prompt)} prompts has two responses with different scores, so there is no pair; give "
            "several responses a prompt, or prompt/chosen/rejected"
        )
    alone = sum(len(group) == 1 for group in by_prompt.values())
    return ScoredPairs(pairs, ["prompt", "chosen", "rejected", "margin"], alone, ties)


def unused(names: Iterable[str], reader: Reader) -> list[str]:
    """The columns that a reader leaves alone."""
    return [name for name in names if name not in reader.used]
