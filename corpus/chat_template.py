"""What a chat template writes, and which tokens end a reply."""

import json
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from corpus.formats import Message
from utils.console import InputError, one_line, say

DATE_CODES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdFHIjmMpSuUwWxXyYZ"))  # of strftime()


def chat_text(messages: list[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool) -> str:
    """A dialogue in the tokenizer's chat template.  Raises InputError when the template refuses it, or leaves tools out.

    A first turn with the role tools holds descriptions of tools as JSON, which templates get apart from the turns.  System
    messages for which the template has no place stand in front of what the user says behind them, see `moves_system`.
    """
    if moves_system(messages, tokenizer):
        messages = _with_user(messages)
    turns, options = _turns_and_options(messages, tokenizer)
    options["add_generation_prompt"] = add_generation_prompt
    try:
        text = tokenizer.apply_chat_template(turns, **options)
    except TemplateError as error:  # many want user and assistant in turn
        roles = ", ".join(message["role"] for message in turns)
        raise InputError(
            f"the tokenizer's chat template refuses a dialogue ({roles}): {one_line(error)}; "
            "correct the data, or give a --prompt_template with {prompt}"
        ) from error
    _check_tools(turns, tokenizer, options)
    return text


def moves_system(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has no place for a system message of the dialogue: Gemma's refuses any, others refuse or
    leave out one that is not the first turn, or say nothing of any.
    """
    if all(message["role"] != "system" for message in messages):
        return False
    turns, options = _turns_and_options(messages, tokenizer)
    try:
        return not _writes("system", turns, tokenizer, options)
    except TemplateError:
        return True


def _with_user(messages: list[Message]) -> list[Message]:
    """The dialogue with each system message in the user's turn behind it; at the end it is a turn of the user."""
    moved: list[Message] = []
    rules: list[str] = []
    for message in messages:
        if message["role"] == "system":
            rules.append(message["content"])
        elif message["role"] == "user":
            moved.append({**message, "content": "\n\n".join([*rules, message["content"]])})
            rules = []
        else:
            moved.append(message)
    return [*moved, {"role": "user", "content": "\n\n".join(rules)}] if rules else moved


def _turns_and_options(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Message], dict[str, Any]]:
    """What apply_chat_template gets: turns, and the tools and the day apart from them."""
    options: dict[str, Any] = {"tokenize": False}
    if hasattr(tokenizer, "prompt_date"):
        options["chat_template"] = with_date(tokenizer.get_chat_template(), tokenizer.prompt_date)
    if messages and messages[0]["role"] == "tools":
        options["tools"], messages = json.loads(messages[0]["content"]), messages[1:]
    return messages, options


def _writes(role: str, turns: list[Message], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> bool:
    """Whether the template writes what the turns of a role say, whatever it makes of the white space in it."""
    words = {place: f"({role} {place})" for place, turn in enumerate(turns) if turn["role"] == role}
    marked = [{**turn, "content": words.get(place, turn["content"])} for place, turn in enumerate(turns)]
    text = tokenizer.apply_chat_template(marked, **options)
    return all(word in text for word in words.values())


def _check_tools(turns: list[Message], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
    """Raise InputError when the template writes nothing of the tools, of calls of them or of what they return."""
    template = str(tokenizer.get_chat_template())
    found = "tools" if "tools" in options and "tools" not in template else ""
    if any(turn.get("tool_calls") for turn in turns) and "tool_calls" not in template:
        found = "calls of tools"
    elif any(turn["role"] == "tool" for turn in turns) and not _writes("tool", turns, tokenizer, options):
        found = "answers of tools"
    if found:
        raise InputError(
            f"the data have {found}, of which the tokenizer's chat template writes nothing; leave them out, or give a "
            "--prompt_template with {prompt}"
        )


# What `format_prompt` writes of a dialogue.  Text is in expressions alone, which white space control does not touch.
PLAIN_CHAT_TEMPLATE = """
{{- FRONT -}}
{%- if tools -%}{{ tools | tojson }}{{ BLANK_LINE }}{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('no role ' ~ message['role'] ~ ': only system, user, assistant and tool can be written') -}}
    {%- endif -%}
    {%- set text = namespace(all='') -%}
    {%- if message['content'] is string -%}
        {%- set text.all = message['content'] -%}
    {%- elif message['content'] -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] != 'text' -%}{{- raise_exception('only text can be written') -}}{%- endif -%}
            {%- set text.all = text.all ~ part['text'] -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- BEFORE ~ text.all ~ BEHIND -}}
    {%- elif message['role'] != 'system' or text.all.strip() -%}
        {{- text.all -}}
        {%- if message['tool_calls'] -%}
            {{- NEW_LINE if text.all else '' -}}{{- message['tool_calls'] | tojson -}}
        {%- endif -%}
        {{- eos_token if loop.last and message['role'] == 'assistant' and not add_generation_prompt else BLANK_LINE -}}
    {%- endif -%}
{%- endfor -%}
"""


def plain_chat_template(template: str, front: str) -> str:
    """A chat template that writes a dialogue as a prompt `template` with {prompt} does.

    front: the text of the special tokens in front of any prompt, which a tokenizer does not add to a chat.  A reply at the
    end of a dialogue gets the token that closes it, unless another one is asked for.
    """
    before, behind = template.split("{prompt}")
    written = {"FRONT": front, "BEFORE": before, "BEHIND": behind, "BLANK_LINE": "\n\n", "NEW_LINE": "\n"}
    # in quotes of JSON, which Jinja reads alike; a mark of Jinja in the text is none in there
    texts = [f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}" for name, text in written.items()]
    return "\n".join(texts) + PLAIN_CHAT_TEMPLATE.rstrip()


def fix_date(
    tokenizer: PreTrainedTokenizerBase, template: str, given: str | None, runs: Iterable[dict[str, Any]]
) -> str | None:
    """Settle which day it is for a chat template that asks for today's date, as Llama 3.2's does; None where none asks.

    The day is the one that was given, else that of the first of `runs` (contents of run.json) that has one, else today.
    With the day, the ids of a prompt would change, between the stages and where a run goes on.
    """
    if template != "chat" or "strftime_now" not in str(tokenizer.chat_template):
        if given is not None:
            say("warning: --prompt_date has no effect here; it needs a chat template that writes the date")
        return None
    known = [run["prompt_date"] for run in runs if run.get("prompt_date")]
    tokenizer.prompt_date = date.fromisoformat(given or next(iter(known), date.today().isoformat()))
    return tokenizer.prompt_date.isoformat()


def with_date(chat_template: str, day: date) -> str:
    """The chat template with a macro in the place of transformers' strftime_now, which says that it is `day`, 0:00.

    A function of ours cannot be put there: transformers gives templates nothing that can be called.
    """
    answers = "".join(f".replace('{code}', '{day.strftime(code)}')" for code in DATE_CODES)
    macro = "{%- macro strftime_now(format) -%}{{ format" + answers + " }}{%- endmacro %}"
    return macro + "{{ '' }}" + chat_template  # a block in front would take a new line from the template


def reply_end_id(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """The token that closes a reply in training data: what a chat template writes behind an assistant's turn, else EOS.

    Gemma's turns end with <end_of_turn>, Phi-3's with <|end|>, Llama 3's with <|eot_id|>, and EOS may be another token.
    """
    if template != "chat":
        return tokenizer.eos_token_id
    reply = "reply"
    turns = [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": reply}]
    # without a generation prompt, whose header would follow a turn that has no end
    behind = chat_text(turns, tokenizer, add_generation_prompt=False).rpartition(reply)[2]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    # not every tool marks its <|im_end|> as special; some tokenizers add runs of white space
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return next((id for id in ids if id in added), tokenizer.eos_token_id)


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, template: str, generation_config: GenerationConfig
) -> tuple[int, ...]:
    """The tokens that end a reply; the first one is `reply_end_id`, which training data have.

    The others are EOS and those of the base's generation_config, at which plain generate() stops too.
    """
    own = generation_stop_ids(generation_config)
    return tuple(dict.fromkeys([reply_end_id(tokenizer, template), tokenizer.eos_token_id, *own]))


def generation_stop_ids(generation_config: GenerationConfig) -> list[int]:
    """The tokens at which plain generate() stops: one, several or none."""
    ids = generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def check_reply_end(
    path: str, run: dict[str, Any], stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise InputError when an adapter was trained on replies that end with another token; run: its run.json, or {}."""
    # what has no record was made before there was one, when replies ended with EOS under any template
    taught = run.get("stop_token_ids", [tokenizer.eos_token_id])[0]
    if not run or taught == stop_ids[0]:
        return
    taught, wanted = tokenizer.convert_ids_to_tokens([taught, stop_ids[0]])
    if "stop_token_ids" not in run:
        say(
            f"warning: {path} was trained by an older version, on replies that end with {taught}; they now end with "
            f"{wanted}, as the turns of the chat template do: train it again"
        )
        return
    raise InputError(
        f"{path} was trained on replies that end with {taught}, but by base, tokenizer and prompt template they end with "
        f"{wanted}; give the tokenizer and chat template of that run, or train it again"
    )


def reply_text(reply: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> str:
    """Text of a reply, without special tokens and without its end, which some tokenizers do not count among them."""
    return tokenizer.decode(reply[:-1] if reply[-1] in stop_ids else reply, skip_special_tokens=True)
