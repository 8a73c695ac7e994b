"""Every YAML file of configs/ is read by its script's own parser, and every data set it names by our readers."""

from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import reward_modeling
import rl_training
import sft_training
from corpus.tokens import tokenize_preferences, tokenize_prompts, tokenize_sft
from tests.conftest import make_tokenizer
from utils.arguments import DataArguments, LoraArguments, ModelArguments, PlanArguments, parse_arguments
from utils.console import InputError

FOLDER = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if "accelerate" not in path.parts)
SCRIPTS = {"sft": sft_training, "reward": reward_modeling, "ppo": rl_training}  # by the beginning of the file name
ARGUMENTS = {  # the dataclasses of a script, in the order of its main()
    "sft": (ModelArguments, DataArguments, LoraArguments, sft_training.SFTArguments, PlanArguments),
    "reward": (
        reward_modeling.RewardModelArguments,
        reward_modeling.RewardDataArguments,
        LoraArguments,
        reward_modeling.RewardArguments,
        PlanArguments,
    ),
    "ppo": (ModelArguments, DataArguments, rl_training.PPOArguments, PlanArguments),
}
STUDIES = ("baichuan2_7b", "qwen2_5_7b", "stack_llama")

TURNS = [{"role": "user", "content": "hi"}]
PAIR_OF_TURNS = {
    "chosen": [*TURNS, {"role": "assistant", "content": "yo"}],
    "rejected": [*TURNS, {"role": "assistant", "content": "no"}],
}
ROWS = {  # one row with the columns that the data set has on the hub
    "Hello-SimpleAI/HC3-Chinese": {"id": "0", "question": "hi", "human_answers": ["a"], "chatgpt_answers": ["yo"]},
    "beyond/rlhf-reward-single-round-trans_chinese": {"prompt": "hi", "chosen": "yo", "rejected": "no"},
    "HuggingFaceH4/ultrachat_200k": {"prompt": "hi", "prompt_id": "0", "messages": PAIR_OF_TURNS["chosen"]},
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": "hi",
        "prompt_id": "0",
        **PAIR_OF_TURNS,
        "messages": PAIR_OF_TURNS["chosen"],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    },
    "lvwerra/stack-exchange-paired": {
        "qid": 1,
        "question": "hi",
        "date": "2011/05/01",
        "metadata": ["https://example.com"],
        "response_j": "yo",
        "response_k": "no",
    },
}


def read(path):
    """The parsed arguments; a file may leave the base model to the command line."""
    model = [] if "\nmodel_name" in path.read_text(encoding="utf-8") else ["--model_name", "base"]
    return parse_arguments(ARGUMENTS[path.name.split("_")[0]], [*model, "--config", str(path)])


@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_arguments_are_those_that_the_script_asks_for(stage, monkeypatch):
    """PlanArguments was left out here: a key of theirs in a file would have been refused by the test alone."""

    def ask(kinds, **_):
        assert kinds == ARGUMENTS[stage]
        raise InputError("asked")

    monkeypatch.setattr(SCRIPTS[stage], "parse_arguments", ask)
    with pytest.raises(InputError, match="asked"):
        SCRIPTS[stage].main()


def test_there_are_files_for_every_stage_of_every_study():
    names = {path.name for path in FILES}
    assert len(FILES) >= 12
    assert {f"{stage}_{study}.yaml" for stage in SCRIPTS for study in (*STUDIES, "demo")} <= names
    assert not list(FOLDER.rglob("*.yml"))  # would not be seen here


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_script_reads_it(path):
    parsed = read(path)
    values = {name: value for part in parsed for name, value in vars(part).items()}
    for key, wanted in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        if key in ("gradient_accumulation_steps", "save_strategy", "lr_scheduler_type"):
            continue  # counted by the script itself, or turned into an enum
        found = values[key]
        assert found == (type(found)(wanted) if isinstance(wanted, str) and not isinstance(found, str) else wanted), key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_begins_with_what_it_is_for_and_how_to_start_it(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert any("GPU" in line or "CPU" in line for line in header)
    assert any(
        f"{SCRIPTS[path.name.split('_')[0]].__name__}.py --config configs/{path.name}" in line for line in header
    )


@pytest.mark.parametrize("study", STUDIES)
def test_the_stages_of_a_study_fit_together(study):
    """PPO refuses adapters of another base or template: the files must not lead anybody there."""
    (sft, sft_data, _, sft_args, _), (reward, reward_data, _, reward_args, _), (ppo, ppo_data, ppo_args, _) = (
        read(FOLDER / f"{stage}_{study}.yaml") for stage in SCRIPTS
    )
    assert sft.model_name_or_path == reward.model_name_or_path == ppo.model_name_or_path
    assert sft.prompt_template == reward.prompt_template == ppo.prompt_template
    assert sft.prompt_template == "chat" or sft.prompt_template == sft.prompt_template.rstrip(" ")
    assert (ppo_args.sft_model_lora_path, ppo_args.reward_model_lora_path) == (
        sft_args.output_dir,
        reward_args.output_dir,
    )
    assert len({sft_args.output_dir, reward_args.output_dir, ppo_args.output_dir}) == 3

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    text = "[user]hi[assistant]" if sft.prompt_template == "chat" else sft.prompt_template.replace("{prompt}", "hi")
    query = tokenizer(text)["input_ids"]
    limits = (sft.prompt_template, tokenizer, 200)

    def row_of(data):
        return Dataset.from_list([ROWS[data.dataset]])

    yo, no = tokenizer("yo")["input_ids"], tokenizer("no")["input_ids"]
    assert tokenize_sft(row_of(sft_data), *limits)["input_ids"] == [[*query, *yo, 2]]
    pair = tokenize_preferences(row_of(reward_data), *limits, "drop").pairs[0]
    assert (pair["chosen_ids"], pair["rejected_ids"]) == ([*query, *yo, 2], [*query, *no, 2])
    assert tokenize_prompts(row_of(ppo_data), *limits)["input_ids"] == [query]
