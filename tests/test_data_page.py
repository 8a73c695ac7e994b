"""docs/data.md: every example on the page gives the text that stands under it."""

import re
from pathlib import Path

import pytest

from corpus.files import read_dataset
from corpus.tokens import mark, tokenize_preferences, tokenize_prompts, tokenize_sft
from tests.conftest import make_tokenizer
from utils.arguments import split_columns

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
FENCE = re.compile(r"^```(\w+) (\w+) ?(\S*)\n(.*?)^```\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = FENCE.findall(PAGE.read_text(encoding="utf-8"))
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(("form", "stage", "more", "content", "wanted"), EXAMPLES)
def test_an_example(tmp_path, form, stage, more, content, wanted):
    (tmp_path / f"rows.{form}").write_text(content, encoding="utf-8")
    columns = split_columns(more) if "=" in more else None
    rows = read_dataset(str(tmp_path / f"rows.{form}"), columns=columns)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    template = "chat" if more == "chat" else "Q: {prompt}\nA:"
    if stage == "sft":
        made = tokenize_sft(rows, template, tokenizer, 400)
        texts = [mark(row["input_ids"], [label != -100 for label in row["labels"]], tokenizer) for row in made]
    elif stage == "reward":
        pairs = tokenize_preferences(rows, template, tokenizer, 400, "drop").pairs
        sides = [(pair[f"{side}_ids"], pair["query_length"]) for pair in pairs for side in ("chosen", "rejected")]
        texts = [mark(ids, [place >= start for place in range(len(ids))], tokenizer) for ids, start in sides]
    else:
        texts = [
            mark(ids, [False] * len(ids), tokenizer)
            for ids in tokenize_prompts(rows, template, tokenizer, 400)["input_ids"]
        ]
    assert "\n---\n".join(texts) == wanted.removesuffix("\n")


def test_every_example_is_run():
    fences = re.findall(r"^```\w+ \w+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == len(EXAMPLES) > 15
