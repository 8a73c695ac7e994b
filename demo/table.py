"""The end of the demo: base, SFT and PPO at several iterations answer the same held-out prompts, side by side.

    python -m demo.table --folder demo_output

Reads what the three scripts wrote under the folder, samples one reply to each held-out prompt from each model (one base
in memory, adapters switched), judges it by the gold rules and by the reward model, prints the table and a few replies,
and writes table.md, table.json and report.html (of all three stages).  Exits with 1 when the outcome misses the demo's
bars (see BARS).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from corpus.tokens import encode_prompt
from demo.gold import gold_score
from inference.side_by_side import ChatModels, InferenceArguments, load_models
from reporting.html_report import write_report
from utils.console import InputError, run_script
from utils.files import read_jsonl, write_json

BATCH = 64
SHOWN = 3  # prompts whose replies are printed
BARS = """reward accuracy at least 0.90
SFT gold above base gold
gold of the best PPO policy at least 1.2 times SFT gold
PPO reply length between 0.5 and 2 times SFT's
no empty PPO reply"""


class Row(NamedTuple):
    """One model's replies to all held-out prompts."""

    name: str
    gold: float  # mean, 0 to 1
    score: float  # mean, as the reward model gives it
    length: float  # mean, tokens
    empty: float  # share of replies without text
    replies: list[str]


def judge(models: ChatModels, name: str, prompts: list[str]) -> Row:
    """Let the model `name` respond to every prompt, the seed of a response being its prompt's number."""
    queries = [encode_prompt(prompt, models.template, models.tokenizer) for prompt in prompts]
    responses = list(models.generate(name, queries, range(len(prompts)), BATCH))
    texts = [response.text for response in responses]
    return Row(
        name,
        gold=sum(gold_score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)) / len(prompts),
        score=sum(response.score for response in responses) / len(responses),
        length=sum(len(response.ids) for response in responses) / len(responses),
        empty=sum(not text for text in texts) / len(texts),
        replies=texts,
    )


def missed_bars(rows: list[Row], accuracy: float) -> list[str]:
    """The bars that the outcome misses; rows: base, SFT, PPO ..., the last one being the PPO model that a user takes."""
    base, sft, ppo = rows[0], rows[1], rows[-1]
    met = (
        accuracy >= 0.9,
        sft.gold > base.gold,
        ppo.gold >= 1.2 * sft.gold,
        0.5 * sft.length <= ppo.length <= 2 * sft.length,
        ppo.empty == 0,
    )
    return [bar for bar, ok in zip(BARS.splitlines(), met, strict=True) if not ok]


def as_markdown(rows: list[Row], prompts: list[str], accuracy: float) -> str:
    """The table and the replies to the first prompts."""
    lines = [
        f"Reward model: accuracy {accuracy:.3f} on held-out pairs. {len(prompts)} held-out prompts:",
        "",
        "| model | gold score | reward score | reply length | empty replies |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {r.name} | {r.gold:.3f} | {r.score:.2f} | {r.length:.1f} tokens | {r.empty:.1%} |" for r in rows]
    for i in range(SHOWN):
        lines += ["", f"| prompt | {prompts[i]} |", "|---|---|"]
        lines += [f"| {r.name} | {' '.join(r.replies[i].split())} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder with world, sft, reward and ppo in it")
    folder = parser.parse_args().folder

    # ---- Base and adapters ----
    checkpoints = sorted((folder / "ppo").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not checkpoints:
        raise InputError(f"there is no checkpoint under {folder / 'ppo'}; run scripts/demo.sh, which makes them")
    card = json.loads((folder / "reward" / "reward_card.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "ppo" / "run.json").read_text(encoding="utf-8"))["arguments"]
    best = json.loads((folder / "ppo" / "best" / "run.json").read_text(encoding="utf-8"))["best"]["iteration"]
    folders = {"SFT": folder / "sft", **{f"PPO ({path.name.split('-')[1]})": path for path in checkpoints}}
    folders[f"PPO best ({best})"] = folder / "ppo" / "best"
    models = load_models(
        InferenceArguments(
            str(folder / "world" / "base"),
            adapters=[f"{name}={path}" for name, path in folders.items()],
            reward_model_lora_path=str(folder / "reward"),
            output_max_length=settings["output_max_length"],
            dtype="float32",
        )
    )

    # ---- Responses ----
    prompts = [row["prompt"] for row in read_jsonl(str(folder / "world" / "heldout_prompts.jsonl"))]
    rows = [judge(models, name, prompts) for name in models.adapters]

    # ---- Report ----
    table = as_markdown(rows, prompts, card["accuracy"])
    (folder / "table.md").write_text(table, encoding="utf-8")
    missed = missed_bars(rows, card["accuracy"])
    figures = [{**row._asdict(), "replies": None} for row in rows]
    write_json({"reward_accuracy": card["accuracy"], "models": figures, "missed": missed}, str(folder / "table.json"))
    print(
        f"\n{table}\nadapters: {folder}/sft, {folder}/reward, {folder}/ppo/best (and checkpoints by iteration beside it)"
    )
    print(f"metrics:  metrics.jsonl in each of them; pictures: {folder}/ppo/plots; merged model: {folder}/merged")
    # here and not by `python -m reporting`, which would import everything once more
    write_report([str(folder / stage) for stage in ("sft", "reward", "ppo")], str(folder / "report.html"))
    if missed:
        print("the demo missed: " + "; ".join(missed), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
