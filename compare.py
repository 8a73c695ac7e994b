"""The same prompts through several adapters, side by side: base, SFT, RLHF(10), RLHF(16) ... in one table a prompt.

    python compare.py --base_model_name BASE --adapters SFT=output/sft "RLHF (10)=output/ppo/checkpoint-10" \\
        PPO=output/ppo/best --reward_model_lora_path output/reward --prompts prompts.jsonl --output_dir output/compare

The base is held once and the adapters are switched; the bare base answers too.  Every reply has a seed of its own, made
of --seed and the prompt: it does not depend on the other prompts, their order or the batch.  Replies come from the whole
distribution, as PPO samples them.  Writes compare.md, compare.html (opens offline) and compare.jsonl (every reply).
"""

import utils.quiet  # isort: skip  # noqa: F401 - before any library

import html
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tqdm.auto import tqdm

from corpus.files import FILE_FORMATS, Rows, read_dataset, suffix_of
from corpus.tokens import tokenize_prompts
from inference.side_by_side import InferenceArguments, Response, load_models, prompt_seed
from reporting.html import html_page, markdown_cell, markdown_table, write_page
from rewards.broken_replies import distinct_share
from rewards.reward_card import wilson_interval
from utils.arguments import check_new_folder, parse_arguments
from utils.console import InputError, run_script, say
from utils.files import append_jsonl

DEFAULT_PROMPTS = (
    "你好！请介绍一下你自己。",
    "今天心情不太好，怎么办？",
    "怎样才能睡得更好？",
    "What is a good way to learn a language?",
    "Can you explain what a rainbow is?",
)


@dataclass
class CompareArguments(InferenceArguments):
    """What is asked, and where the tables go."""

    prompts: str | None = field(
        default=None,
        metadata={
            "help": "A file with prompts in any form that --dataset takes, such as a .txt file with a prompt a line, or "
            "the text of one prompt.  Default: a few general questions."
        },
    )
    max_prompts: int = field(default=100, metadata={"help": "Number of prompts to take, the first ones; -1: all."})
    max_tables: int = field(
        default=-1,
        metadata={"help": "Number of prompts whose replies are shown, the first ones; -1: all.  Figures are of all."},
    )
    batch_size: int = field(default=16, metadata={"help": "Replies that are sampled at once."})
    output_dir: str = field(default="output/compare", metadata={"help": "Folder for the tables."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_prompts", "max_tables"):
            if getattr(self, name) < -1 or getattr(self, name) == 0:
                raise InputError(f"--{name} is {getattr(self, name)}; give a number of prompts, or -1 for all")
        if self.batch_size < 1:
            raise InputError(f"--batch_size is {self.batch_size}; give a number above 0")


class ModelResponses(NamedTuple):
    """One model's responses to all prompts."""

    name: str
    responses: list[Response]


class Summary(NamedTuple):
    """One model in figures."""

    name: str
    score: float | None  # mean, as the reward model gives it
    length: float  # mean, tokens
    distinct_1: float  # different tokens as a share of all tokens
    distinct_2: float
    empty: float  # share of responses without text
    wins: tuple[float, float, float] | None  # win rate against the first adapter with its 95% interval


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def read_prompts(words: str | None) -> Rows:
    """Rows of the file that --prompts names, or its own text as the one row.  Raises InputError."""
    if words is None:
        return Rows(["prompt"], [{"prompt": prompt} for prompt in DEFAULT_PROMPTS])
    if suffix_of(words) in FILE_FORMATS or os.path.exists(words):
        if not os.path.exists(words):
            raise InputError(f"there is no file {words}; check --prompts")
        return read_dataset(words)
    say("--prompts names no file: it is taken as the text of one prompt")
    return Rows(["prompt"], [{"prompt": words}])


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def win_rate(scores: Sequence[float], other_scores: Sequence[float]) -> tuple[float, float, float]:
    """Share of the prompts where `scores` is above `other_scores`, a tie as half, with its 95% interval."""
    pairs = zip(scores, other_scores, strict=True)
    share = sum(0.5 if score == other else float(score > other) for score, other in pairs) / len(scores)
    return share, *wilson_interval(share, len(scores))


def summarise(model: ModelResponses, first: ModelResponses, stop_ids: Collection[int]) -> Summary:
    """The figures of one model; `first` is the one it is compared with."""
    responses = model.responses
    scores = [response.score for response in responses]
    compares = scores[0] is not None and model is not first
    tokens = [[token for token in response.ids if token not in stop_ids] for response in responses]
    return Summary(
        model.name,
        score=None if scores[0] is None else sum(scores) / len(scores),
        length=sum(len(response.ids) for response in responses) / len(responses),
        distinct_1=distinct_share(tokens, 1) or 0.0,
        distinct_2=distinct_share(tokens, 2) or 0.0,  # 0 without any pair
        empty=sum(not response.text for response in responses) / len(responses),
        wins=win_rate(scores, [response.score for response in first.responses]) if compares else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def summary_table(summaries: Sequence[Summary], first: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the summary; the columns of the reward model are left out where there is none."""
    scored = summaries[0].score is not None
    head = ["model", "reply length", "distinct-1", "distinct-2", "empty replies"]
    rows = [
        [s.name, f"{s.length:.1f}", f"{s.distinct_1:.3f}", f"{s.distinct_2:.3f}", f"{s.empty:.1%}"] for s in summaries
    ]
    if scored:
        head[1:1] = ["score", f"wins against {first} (95% interval)"]
        for row, summary in zip(rows, summaries, strict=True):
            wins = "–" if summary.wins is None else "{:.0%} ({:.0%} to {:.0%})".format(*summary.wins)
            row[1:1] = [f"{summary.score:.3f}", wins]
    return head, rows


def prompt_tables(prompts: Sequence[str], models: Sequence[ModelResponses]) -> list[tuple[str, list[list[str]]]]:
    """For each prompt its text and one row a model: name, response and, where there is one, the score."""
    tables = []
    for number, prompt in enumerate(prompts):
        responses = [(model.name, model.responses[number]) for model in models]
        rows = [[name, r.text] + ([] if r.score is None else [f"{r.score:.2f}"]) for name, r in responses]
        tables.append((prompt, rows))
    return tables


def as_markdown(
    facts: str,
    summary: tuple[list[str], list[list[str]]],
    tables: Sequence[tuple[str, list[list[str]]]],
) -> str:
    """compare.md."""
    lines = ["# Models side by side", "", markdown_cell(facts), "", *markdown_table(*summary)]
    for prompt, rows in tables:
        scored = len(rows[0]) == 3
        lines += ["", *markdown_table(["prompt", prompt, *["score"] * scored], rows)]
    return "\n".join(lines) + "\n"


def as_html(
    facts: str,
    summary: tuple[list[str], list[list[str]]],
    tables: Sequence[tuple[str, list[list[str]]]],
) -> str:
    """compare.html.  dir="auto" lets each cell run in the direction of its own script."""

    def cell(text: str, tag: str, kind: str) -> str:
        return f'<{tag} class="{kind}" dir="auto">{html.escape(text)}</{tag}>'

    head, rows = summary
    parts = ["<h1>Models side by side</h1>", f'<p class="note">{html.escape(facts)}</p>', '<div class="scroll"><table>']
    parts.append("<tr>" + "".join(cell(title, "th", "name") for title in head) + "</tr>")
    for row in rows:
        parts.append(
            "<tr>" + cell(row[0], "th", "name") + "".join(cell(text, "td", "number") for text in row[1:]) + "</tr>"
        )
    parts.append("</table></div>")
    for prompt, rows in tables:
        score = cell("score", "th", "number") if len(rows[0]) == 3 else ""
        parts.append('<table class="answers">')
        parts.append("<tr>" + cell("prompt", "th", "name") + cell(prompt, "th", "text") + score + "</tr>")
        for name, text, *scores in rows:
            scored = "".join(cell(figure, "td", "number") for figure in scores)
            parts.append("<tr>" + cell(name, "th", "name") + cell(text, "td", "text") + scored + "</tr>")
        parts.append("</table>")
    return html_page("Models side by side", "\n".join(parts))


def main() -> None:
    # ---- Arguments ----
    (args,) = parse_arguments((CompareArguments,), description="The same prompts through several adapters.")
    check_new_folder(args.output_dir)
    rows = read_prompts(args.prompts)

    # ---- Models and prompts ----
    models = load_models(args)
    dataset = tokenize_prompts(rows, models.template, models.tokenizer, models.max_query_length, split="compared")
    if 0 < args.max_prompts < len(dataset):
        say(f"the first {args.max_prompts} of {len(dataset)} prompts are taken; --max_prompts changes that")
        dataset = dataset.select(range(args.max_prompts))
    prompts, queries = list(dataset["prompt"]), list(dataset["input_ids"])

    # ---- Responses ----
    seeds = [prompt_seed(args.seed, prompt) for prompt in prompts]
    outcomes = []
    with tqdm(total=len(prompts) * len(models.adapters), desc="replies", unit="reply") as bar:
        for name in models.adapters:
            outcomes.append(ModelResponses(name, []))
            for response in models.generate(name, queries, seeds, args.batch_size):
                outcomes[-1].responses.append(response)
                bar.update()

    # ---- Save ----
    first = outcomes[1]  # behind the bare base
    summaries = [summarise(model, first, models.stop_ids) for model in outcomes]
    facts = (
        f"{len(prompts)} prompts; base {args.model_name_or_path}; temperature {args.temperature}, at most "
        f"{args.output_max_length} tokens a reply, seed {args.seed}"
    )
    facts += f"; scores from {args.reward_model_lora_path}" if models.can_score else ""
    shown = prompts if args.max_tables == -1 else prompts[: args.max_tables]
    if len(shown) < len(prompts):
        facts += f"; the first {len(shown)} are shown"
    tables = prompt_tables(shown, outcomes)
    summary = summary_table(summaries, first.name)
    os.makedirs(args.output_dir, exist_ok=True)
    with open(os.path.join(args.output_dir, "compare.md"), "w", encoding="utf-8") as file:
        file.write(as_markdown(facts, summary, tables))
    write_page(as_html(facts, summary, tables), os.path.join(args.output_dir, "compare.html"))
    records = [
        {"prompt": prompt, "model": model.name, "response": r.text, "score": r.score, "length": len(r.ids)}
        for number, prompt in enumerate(prompts)
        for model, r in ((model, model.responses[number]) for model in outcomes)
    ]
    append_jsonl(records, args.output_dir, "compare.jsonl")
    say(f"side by side: {args.output_dir}/compare.md, compare.html and compare.jsonl")


if __name__ == "__main__":
    run_script(main)
