"""README.md of a folder of weights: the model card of the Hugging Face hub.

What the model is, from which base and adapters, by which script, with which results, and how to load it.  All of it is read
from the files of the run, and what is not in them is not claimed.  Of a local folder only the name is told, so that a card
that is uploaded says nothing about the machine.
"""

import json
import os
import re
from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCardData

from rewards.reward_card import CARD_FILE, in_short
from utils.files import read_json_object, read_jsonl, saving

STAGES = {  # by run.json: what the adapter is, what it is for, the script that writes it, its tag on the hub
    "sft": (
        "SFT",
        "the policy of stage 1, supervised fine-tuning on prompts with their replies",
        "sft_training.py",
        "sft",
    ),
    "reward": (
        "Reward",
        "the judge of stage 2, which gives a reply to a prompt a score, trained on pairs of a better and a worse reply",
        "reward_modeling.py",
        "reward-model",
    ),
    "ppo": ("PPO", "the policy of stage 3, PPO, which started as an SFT adapter", "rl_training.py", "ppo"),
}
# The settings of a run that a reader asks for first.
SETTINGS = (
    "lora_r lora_alpha lora_dropout learning_rate num_train_epochs per_device_train_batch_size gradient_accumulation_steps "
    "steps batch_size ppo_epochs init_kl_coef temperature output_max_length ensemble_size ensemble_penalty seed"
)
QUESTION = "What is the capital of France?"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)


def write_model_card(folder: str, run: dict[str, Any], metrics_folder: str | None = None) -> None:
    """Write README.md of an adapter or a merged model.

    run: content of its run.json; where it is empty, nothing is known, and nothing is written.  metrics_folder: where the
    metrics.jsonl of its run lies, None for none.  Raises RunError where the disk fails.
    """
    path = os.path.join(folder, "README.md")
    if run:
        with saving(path), open(path, "w", encoding="utf-8") as file:
            file.write(model_card(folder, run, metrics_folder))


def model_card(folder: str, run: dict[str, Any], metrics_folder: str | None) -> str:
    """Text of the card; arguments as of `write_model_card`."""
    merged = run["stage"] == "merged"
    source = run["adapter"] if merged else folder  # the adapter's own folder
    made = read_json_object(os.path.join(source, "run.json")) if merged else run
    stage = made.get("stage")
    base = public_name(run["base_model"])
    is_reward = stage == "reward" or bool(
        run["arguments"].get("as_classifier")
    )  # of a foreign adapter there is no stage
    data = ModelCardData(
        base_model=base if HUB_NAME.fullmatch(base) else None,  # the hub refuses a card with anything else
        base_model_relation="finetune" if merged else "adapter",
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-classification" if is_reward else "text-generation",
        tags=["lora", "rlhf", *([STAGES[stage][3]] if stage in STAGES else [])],
    )
    kind, what, script, _ = STAGES.get(stage, ("LoRA", "trained by another tool", "", ""))
    title = f"{kind} {'model from' if merged else 'adapter for'} {base}"
    checkpoint = CHECKPOINT.fullmatch(os.path.basename(os.path.realpath(source)))
    is_best = os.path.basename(os.path.realpath(source)).removesuffix(".new") == "best"
    if checkpoint:
        title += f", after {_step(stage)} {checkpoint[1]}"
    elif is_best:
        title += ", the best policy of its run"
    text = f"A LoRA adapter for `{base}`: {what}. Written by `{script}`."
    if merged:
        text = (
            f"`{base}` with the LoRA adapter `{public_name(source)}` in its weights: {what}. Written by `merge_lora.py`, "
            "which loaded it again and compared it with base + adapter: the largest difference is "
            f"{run['largest_difference']:.1e} of the largest output."
        )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {title}", text]
    results = result_lines(source, stage, is_best, metrics_folder)
    if results:
        parts += ["## Results", "\n".join(f"- {line}" for line in results)]
    parts += ["## How to load it", f"```python\n{loading(folder, run, merged, is_reward)}\n```"]
    settings = _settings(made)
    if settings:
        table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in settings.items())]
        parts += ["## How it was made", "\n".join(table)]
    if os.path.isdir(run["base_model"]):
        parts.append(f"The base is a local folder of the name {base}: before an upload, name it as the hub does.")
    parts.append("The licence is the one of the base model.")
    return "\n\n".join(parts) + "\n"


def public_name(name: str) -> str:
    """What a card tells of a model, a folder or a file: its name on the hub, else the end of its path."""
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots", name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if not os.path.exists(name) and HUB_NAME.fullmatch(name):
        return name
    parts = PurePath(os.path.realpath(name)).parts[1:]
    inside = parts[-1] == "best" or CHECKPOINT.fullmatch(parts[-1])
    return "/".join(parts[-2:] if inside else parts[-1:])


def _step(stage: str | None) -> str:
    return "iteration" if stage == "ppo" else "step"


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def result_lines(folder: str, stage: str | None, is_best: bool, metrics_folder: str | None) -> list[str]:
    """A sentence for each result in the reward card, in what PPO's guard remembers, or in the last evaluation."""
    card = read_json_object(os.path.join(folder, CARD_FILE))
    if card:
        return _of_reward_card(card)
    guard = read_json_object(os.path.join(folder, "ppo_state.json")).get("guard", {})
    if guard.get("best"):
        return _of_guard(guard, is_best)
    path = os.path.join(metrics_folder or folder, "metrics.jsonl")
    rows = read_jsonl(path) if os.path.isfile(path) else []
    row = next((row for row in reversed(rows) if any(name.startswith("eval_") for name in row)), {})
    if "eval_accuracy" in row:
        low, high = row["eval_accuracy_low"], row["eval_accuracy_high"]
        found = f"accuracy on held-out pairs {row['eval_accuracy']:.3f} (95% interval {low:.3f} to {high:.3f})"
    elif "eval_score_mean" in row:
        found = f"mean score of the replies to held-out prompts {row['eval_score_mean']:.3f}"
    elif "eval_loss" in row:
        found = f"loss on held-out rows {row['eval_loss']:.3f}"
    else:
        return []
    return [f"At {_step(stage)} {row[_step(stage)]}: {found}."]


def _of_reward_card(card: dict[str, Any]) -> list[str]:
    low, high = card["accuracy_ci95"]
    verdict = "passed" if card["passed"] else f"did not pass: {in_short(card['failed'])}"
    return [
        f"Accuracy on {card['eval_pairs']} held-out pairs: {card['accuracy']:.3f} (95% interval {low:.3f} to {high:.3f}); "
        f"of counting tokens alone: {card['length_only_accuracy']:.3f}.",
        f"The reward card: {verdict}.",
    ]


def _of_guard(guard: dict[str, Any], is_best: bool) -> list[str]:
    best, sft = guard["best"], guard["baselines"]["held-out"]["score"]
    if best["iteration"] == 0:
        lines = [f"No policy of the run beat the SFT model on held-out prompts (normalised score {sft:.3f})."]
    else:
        lines = [
            f"{'This policy' if is_best else 'The best policy of the run, in `best/`'}, of iteration {best['iteration']}: "
            f"normalised score {best['score']:.3f} on held-out prompts, {best['score'] - sft:+.3f} beside the SFT model's "
            f"{sft:.3f}; KL to the SFT model {best['kl']:.2f} nats a reply."
        ]
    if guard.get("verdict"):
        lines.append(f"The guard called a collapse: {guard['verdict']}.")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# How to load it, and how it was made
# ---------------------------------------------------------------------------------------------------------------------


def loading(folder: str, run: dict[str, Any], merged: bool, is_reward: bool) -> str:
    """Python that loads the model with plain libraries, and lets it reply or score once.

    Prompt and reply are tokenized apart, as in training.
    """
    template = run.get("prompt_template")
    takes_messages = os.path.isfile(os.path.join(folder, "chat_template.jinja"))
    messages = f'[{{"role": "user", "content": "{QUESTION}"}}]'
    if merged and takes_messages and not is_reward:
        return (
            "from transformers import pipeline\n\n"
            'chat = pipeline("text-generation", "FOLDER")\n'
            f'print(chat({messages}, max_new_tokens=128)[0]["generated_text"][-1]["content"])'
        )
    if template == "chat":
        query = f'tokenizer.apply_chat_template({messages}, add_generation_prompt=True, return_dict=True)["input_ids"]'
    else:
        text = json.dumps((template or "{prompt}").replace("{prompt}", QUESTION), ensure_ascii=False)
        query = f'tokenizer({text})["input_ids"]'
    auto, options = ("SequenceClassification", ", num_labels=1") if is_reward else ("CausalLM", "")
    model = f"AutoModelFor{auto}.from_pretrained"
    lines = ["import torch", *([] if merged else ["from peft import PeftModel"])]
    lines += [f"from transformers import AutoModelFor{auto}, AutoTokenizer", ""]
    if merged:
        lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")', f'model = {model}("FOLDER")']
    else:
        base = json.dumps(public_name(run["base_model"]))
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({base})",
            f'model = PeftModel.from_pretrained({model}({base}{options}), "FOLDER")',
        ]
    lines.append(f"query = {query}")
    if is_reward:
        end = f"[{run['stop_token_ids'][0]}]" if "stop_token_ids" in run else "[tokenizer.eos_token_id]"
        lines += [
            f'reply = tokenizer("Paris.", add_special_tokens=False)["input_ids"] + {end}',
            "model.config.pad_token_id = None  # one reply at a time: the score is read at its last token",
            "print(float(model(torch.tensor([query + reply])).logits))",
        ]
    else:
        lines += [
            "output = model.generate(torch.tensor([query]), max_new_tokens=128)",
            "print(tokenizer.decode(output[0, len(query) :], skip_special_tokens=True))",
        ]
    return "\n".join(lines)


def _settings(run: dict[str, Any]) -> dict[str, str]:
    """Row of the table -> its value, of a run.json; those that the run has."""
    arguments = {**run.get("data", {}), **run.get("lora", {}), **run.get("arguments", {})}
    found: dict[str, Any] = {}
    for name in ("dataset", "sft_model_lora_path", "reward_model_lora_path"):
        if arguments.get(name):
            found[f"`--{name}`"] = public_name(arguments[name])
    found |= {f"`--{name}`": arguments[name] for name in SETTINGS.split() if arguments.get(name) is not None}
    if run.get("prompt_template"):
        found["`--prompt_template`"] = f"`{json.dumps(run['prompt_template'], ensure_ascii=False)}`"
    if run.get("libraries"):
        found["libraries"] = ", ".join(f"{name} {version}" for name, version in run["libraries"].items())
    return found
