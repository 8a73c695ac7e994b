"""What people get wrong most often: each mistake is one line that names it, exit code 2, and nothing written."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import StateDictType
from transformers import PreTrainedTokenizerFast
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import compare
import merge_lora
import reward_modeling
import rl_training
import sft_training
from corpus.files import read_dataset, train_and_eval_rows
from corpus.tokens import tokenize_preferences, tokenize_prompts, tokenize_sft
from lora.base_model import base_fingerprint
from lora.sharding import check_state_dict
from tests.conftest import make_tokenizer, save_base, write_rows
from tests.forks import run_command
from tests.helpers import load_plain, make_stages, save_sft
from utils.arguments import DEFAULT_TEMPLATE, DataArguments, check_new_folder
from utils.console import InputError, run_script

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "sft": sft_training,
    "reward": reward_modeling,
    "ppo": rl_training,
    "merge": merge_lora,
    "compare": compare,
}
TRAINING = ("sft", "reward", "ppo")

DATA = {  # data files, by name without their ending
    "no_rows.jsonl": b"",
    "blank_lines.jsonl": b"\n\n\n",
    "no_objects.json": b"[]",
    "header_only.csv": b"prompt,response\n",
    "half.jsonl": b'{"prompt": "a", "resp',
    "cut_line.jsonl": b'{"prompt": "a", "response": "b"}\n' * 2 + b'{"prompt": "c", "resp',
    "list_line.jsonl": b'{"prompt": "a", "response": "b"}\n["c", "d"]\n',
    "half_emoji.jsonl": b'{"prompt": "a", "response": "b"}\n{"prompt": "\\ud83d", "response": "b"}\n',
    "latin.jsonl": b'{"prompt": "a", "response": "b"}\n' + '{"prompt": "é", "response": "b"}\n'.encode("latin-1"),
    "latin.csv": "prompt,response\né,ü\n".encode("latin-1"),
    "null.jsonl": b"null",  # of which pyarrow dies
    "null.json": b'[{"prompt": "a", "response": "b"}, null]',
    "twice.jsonl": b'{"prompt": "a", "prompt": "c", "response": "b"}\n',
    "number.json": b"42",
    "half_array.json": b'[{"prompt": "a", "response": "b"}, {"pro',
    "nonsense.parquet": b"PAR1 nonsense",
    "open_quote.csv": b'prompt,response\na,"b\n',
    "too_many_fields.csv": b"prompt,response\nSo, what,is it,yes\n",
    "word.csv": b"prompt response\na b\n",
    "rows.txt": b"a",
    "compressed.gz": b"\x1f\x8b",
}
ROWS = {  # data files of rows that are JSON and still wrong
    "wrong_columns": [{"text": "a", "label": "b"}],
    "numbers": [{"prompt": "6 x 7?", "response": 42}],
    "mixed": [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": 3}],
    "objects": [{"prompt": {"text": "a"}, "response": "b"}],
    "word_lists": [{"prompt": ["a", "b"], "response": "b"}],
    "text_for_turns": [{"messages": "hi"}],
    "turns_without_role": [{"messages": [{"content": "hi"}, {"content": "yo"}]}],
    "turns_in_parts": [{"messages": [{"role": "user", "content": [{"type": "image", "url": "hi"}]}]}],
    "one_answer": [{"question": "hi", "chatgpt_answers": "yo"}],
    "number_input": [{"instruction": "Add", "input": 3, "output": "4"}],
    "few": [{"prompt": "a"}, {"prompt": "b"}],
    "nulls": [{"prompt": None, "response": None}] * 3,
    "empty_replies": [
        {"prompt": "a", "response": ""},
        {"prompt": "a", "response": " \n"},
        {"prompt": "", "response": "b"},
    ],
    "empty_turns": [{"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "yo"}]}],
    "no_reply": [{"messages": [{"role": "user", "content": "hi"}]}],
    "blank_prompts": [{"prompt": " "}, {"prompt": None}, {"prompt": "\n"}],
    "equal_pairs": [{"prompt": f"a{i}", "chosen": "yo", "rejected": "yo"} for i in range(20)],
    "empty_chosen": [{"prompt": f"a{i}", "chosen": "", "rejected": "yo"} for i in range(20)],
    "long_pairs": [{"prompt": f"a{i}", "chosen": "yo " * 2000, "rejected": "no"} for i in range(20)],
    "no_dialogue": [{"chosen": f"good {i}", "rejected": "bad"} for i in range(20)],
    "mixed_dialogues": [{"chosen": [{"role": "user", "content": "hi"}], "rejected": "no"}],
    "number_pairs": [{"prompt": f"6 x {i}?", "chosen": 42, "rejected": 41} for i in range(20)],
    "word_margins": [{"prompt": f"a{i}", "chosen": "yo", "rejected": "no", "margin": "large"} for i in range(20)],
    "long_prompts": [{"prompt": f"{i} " + "word " * 1000} for i in range(5)],
}
YAML = {
    "unknown_key": b"learning_rat: 1e-4\n",
    "unknown_null": b"learning_rat: null\n",
    "malformed": b"learning_rate: [1e-4\n",
    "yaml_list": b"- learning_rate\n",
    "yaml_word": b"learning_rate\n",
    "empty_yaml": b"",
    "two_rates": b"learning_rate: [1e-4, 1e-5]\n",
    "nested": b"learning_rate: {sft: 1e-4}\n",
    "latin_yaml": "prompt_template: 'é {prompt}'\n".encode("latin-1"),
    "no_date": b"run_name: 2026-13-45\n",
    "deep": b"[" * 5000,
    "code": b"run_name: !!python/object/apply:os.mkdir ['made_by_yaml']\n",
}


def change_json(folder, file, **values):
    """Set keys of a JSON file; None takes one away."""
    path = Path(folder) / file
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def write_text(folder, file, text):
    (Path(folder) / file).write_text(text, encoding="utf-8")


def change_weights(folder, change):
    path = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def spoil(tensors, value):
    first = sorted(tensors)[0]
    tensors[first][0, 0] = value


def as_pickle(folder):
    path = Path(folder) / "adapter_model.safetensors"
    torch.save(load_file(path), Path(folder) / "adapter_model.bin")
    path.unlink()


def cut_file(folder, file, size):
    path = Path(folder) / file
    path.write_bytes(path.read_bytes()[:size])


ADAPTERS = {  # name -> stage whose adapter is copied, what is done to the copy
    "cut_sft": ("sft", lambda folder: cut_file(folder, "adapter_model.safetensors", 1000)),
    "zero_sft": ("sft", lambda folder: cut_file(folder, "adapter_model.safetensors", 0)),
    "no_weights": ("sft", lambda folder: (folder / "adapter_model.safetensors").unlink()),
    "no_config": ("sft", lambda folder: (folder / "adapter_config.json").unlink()),
    "pickle_sft": ("sft", as_pickle),
    "pickle_reward": ("reward", as_pickle),
    "nan_sft": ("sft", lambda folder: change_weights(folder, lambda tensors: spoil(tensors, float("nan")))),
    "inf_reward": ("reward", lambda folder: change_weights(folder, lambda tensors: spoil(tensors, float("inf")))),
    "hole": ("sft", lambda folder: change_weights(folder, lambda tensors: tensors.pop(sorted(tensors)[0]))),
    "other_rank": ("sft", lambda folder: change_json(folder, "adapter_config.json", r=2)),
    "rank_0": ("sft", lambda folder: change_json(folder, "adapter_config.json", r=0)),
    "rank_word": ("sft", lambda folder: change_json(folder, "adapter_config.json", r="four")),
    "other_layers": ("sft", lambda folder: change_json(folder, "adapter_config.json", target_modules=["query"])),
    "prefix": ("sft", lambda folder: change_json(folder, "adapter_config.json", peft_type="PREFIX_TUNING")),
    "no_type": ("sft", lambda folder: change_json(folder, "adapter_config.json", peft_type=None)),
    "config_half": ("sft", lambda folder: cut_file(folder, "adapter_config.json", 30)),
    "config_list": ("sft", lambda folder: write_text(folder, "adapter_config.json", "[]")),
    "run_half": ("sft", lambda folder: cut_file(folder, "run.json", 30)),
    "run_list": ("sft", lambda folder: write_text(folder, "run.json", "[1]")),
    "run_bare": ("sft", lambda folder: change_json(folder, "run.json", base_fingerprint=None)),
    "run_arguments": ("reward", lambda folder: change_json(folder, "run.json", arguments={"ensemble_penalty": "x"})),
    "card_half": ("reward", lambda folder: write_text(folder, "reward_card.json", '{"score_mean": 0')),
    "card_nan": (
        "reward",
        lambda folder: write_text(folder, "reward_card.json", '{"score_mean": NaN, "score_std": 1}'),
    ),
    "card_words": (
        "reward",
        lambda folder: write_text(folder, "reward_card.json", '{"score_mean": "", "score_std": ""}'),
    ),
    "card_failed": (
        "reward",
        lambda folder: write_text(
            folder,
            "reward_card.json",
            '{"score_mean": 0, "score_std": 1, "passed": false, "failed": ["probe empty 0.1"]}',
        ),
    ),
    "template_sft": ("sft", lambda folder: change_json(folder, "run.json", prompt_template="Q: {prompt}\nA: ")),
}
BASES = {  # name -> what is done to a copy of the base
    "no_eos": lambda folder: PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer, pad_token="<pad>"
    ).save_pretrained(folder),
    "tokenizer_only": lambda folder: [(folder / file).unlink() for file in ("config.json", "model.safetensors")],
    "no_tensors": lambda folder: (folder / "model.safetensors").unlink(),
    "pickle_base": lambda folder: (
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"),
        (folder / "model.safetensors").unlink(),
    ),
    "cut_base": lambda folder: cut_file(folder, "model.safetensors", 5000),
    "base_hole": lambda folder: save_file(
        {name: part for name, part in load_file(folder / "model.safetensors").items() if "layers.1.mlp.up" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    ),
    "no_layers": lambda folder: change_json(folder, "config.json", num_attention_heads=3),
    "unknown_family": lambda folder: change_json(folder, "config.json", model_type="nonesuch"),
    "config_cut": lambda folder: cut_file(folder, "config.json", 40),
    "tokenizer_cut": lambda folder: cut_file(folder, "tokenizer.json", 500),
    "remote": lambda folder: change_json(
        folder, "config.json", model_type="nonesuch", auto_map={"AutoConfig": "configuration_x.XConfig"}
    ),
}


def with_run_json(adapter, base, template=DEFAULT_TEMPLATE):
    run = {"base_fingerprint": base_fingerprint(load_plain(base)), "base_model": base, "prompt_template": template}
    (Path(adapter) / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return adapter


@pytest.fixture(scope="module")
def paths(tmp_path_factory, base_path, data):
    """Everything that the cases point at, right and wrong, by name."""
    folder = tmp_path_factory.mktemp("wrong")
    stages = make_stages(base_path, folder / "stages")
    found = {**stages._asdict(), "sft_data": data["sft"], "preferences": data["preferences"]}
    with_run_json(stages.sft, base_path)
    with_run_json(stages.reward, base_path)
    for name, (stage, damage) in ADAPTERS.items():
        damage(shutil.copytree(found[stage], folder / name))
    for name, damage in BASES.items():
        damage(shutil.copytree(base_path, folder / name))
    found["other"] = save_base(folder / "other_base", seed=1)
    found["other_sft"] = with_run_json(save_sft(found["other"], folder / "other_sft"), found["other"])
    found["gpt2_sft"] = save_sft(save_base(folder / "gpt2", "gpt2"), folder / "gpt2_sft")
    for name in ("empty", "baichuan", "used", "scripted"):
        (folder / name).mkdir()
    (folder / "baichuan" / "config.json").write_text(
        '{"model_type": "baichuan", "auto_map": {"AutoTokenizer": ["t", null]}}'
    )
    (folder / "used" / "mine.txt").write_text("precious")
    (folder / "scripted" / "scripted.py").write_text("raise SystemExit('the code of a dataset was run')")
    for name, content in DATA.items():
        (folder / name).write_bytes(content)
        found[name.replace(".", "_")] = str(folder / name)
    for name, content in YAML.items():
        (folder / f"{name}.yaml").write_bytes(content)
        found[name] = str(folder / f"{name}.yaml")
    for name, rows in ROWS.items():
        found[name] = write_rows(folder / f"{name}.jsonl", rows)
    Dataset.from_dict({"prompt": [], "response": []}).save_to_disk(folder / "empty_on_disk")
    return {path.name: str(path) for path in folder.iterdir() if path.is_dir()} | found


DEFAULTS = {  # what a right command says; a case changes some of it, None takes it away
    "sft": {"model_name": "{base}", "dataset": "{sft_data}", "use_cpu": "true"},
    "reward": {"model_name": "{base}", "dataset": "{preferences}", "eval_fraction": "0.3", "use_cpu": "true"},
    "ppo": {
        "model_name": "{base}",
        "dataset": "{preferences}",
        "sft_model_lora_path": "{sft}",
        "reward_model_lora_path": "{reward}",
        "allow_weak_reward": "true",
        "batch_size": "4",
        "use_cpu": "true",
    },
    "merge": {"model_name": "{base}", "adapter_path": "{sft}"},
    "compare": {"model_name": "{base}", "adapters": "SFT={sft}", "prompts": "hi"},
}


def wrong_data(script, file, message):
    """A case in which only the dataset is wrong."""
    return (f"{file}, {script}", script, {"dataset": f"{{{file}}}"}, message)


def wrong_adapter(file, message, argument="sft_model_lora_path"):
    """A case in which only an adapter of PPO is wrong."""
    return (f"{file}, ppo", "ppo", {argument: f"{{{file}}}"}, message)


def wrong_value(script, argument, value, message=None):
    """A case in which only one number or word is wrong."""
    return (
        f"--{argument} {value}, {script}",
        script,
        {argument: value},
        message or rf"--{argument} is {value}[.0]*; give ",
    )


READ = r"cannot read the dataset {%s}: "
UNUSABLE = r"none of \d+ training rows is usable: .*"
CASES = [  # name, script, changes, message (paths and regular expression)
    # ---- Data: the file ----
    ("no such file", "ppo", {"dataset": "no/such.jsonl"}, r"there is no file or folder no/such.jsonl"),
    ("no such folder", "sft", {"dataset": "/no/such"}, r"there is no file or folder /no/such"),
    ("no such dataset", "sft", {"dataset": "no-such/dataset"}, r"cannot read the dataset no-such/dataset"),
    ("no such eval file", "sft", {"eval_dataset": "no/such.csv"}, r"there is no file or folder no/such.csv"),
    ("no such split", "sft", {"dataset": "{empty_on_disk}", "dataset_split": "test"}, r"{empty_on_disk} has no rows"),
    wrong_data("sft", "rows_txt", r"found prompt; wanted prompt/response"),
    wrong_data("sft", "compressed_gz", r"compressed.gz ends in .gz; give one of .jsonl, .json"),
    wrong_data("reward", "empty", r"{empty}"),
    wrong_data("sft", "scripted", r"{scripted}"),
    wrong_data("sft", "no_rows_jsonl", r"{no_rows_jsonl} is an empty file"),
    wrong_data("sft", "blank_lines_jsonl", r"{blank_lines_jsonl} has no rows"),
    wrong_data("sft", "no_objects_json", r"{no_objects_json} has no rows"),
    wrong_data("sft", "header_only_csv", r"{header_only_csv} has no rows"),
    wrong_data("sft", "empty_on_disk", r"{empty_on_disk} has no rows"),
    wrong_data(
        "reward", "half_jsonl", READ % "half_jsonl" + r"line 1 is not JSON.*Unterminated string.*correct the file"
    ),
    *(wrong_data(script, "cut_line_jsonl", READ % "cut_line_jsonl" + r"line 3 is not JSON") for script in TRAINING),
    wrong_data("sft", "list_line_jsonl", READ % "list_line_jsonl" + r"line 2 holds list, not an object"),
    wrong_data("sft", "null_jsonl", READ % "null_jsonl" + r"line 1 holds NoneType, not an object"),
    wrong_data("sft", "null_json", READ % "null_json" + r"element 2 holds NoneType, not an object"),
    wrong_data("sft", "half_emoji_jsonl", READ % "half_emoji_jsonl" + r"line 2 is not JSON in UTF-8"),
    wrong_data("sft", "latin_jsonl", READ % "latin_jsonl" + r"line 2 is not JSON in UTF-8"),
    wrong_data("sft", "latin_csv", READ % "latin_csv" + r".*utf-8"),
    wrong_data("sft", "twice_jsonl", READ % "twice_jsonl" + r".*prompt.* was specified twice"),
    wrong_data("sft", "number_json", READ % "number_json"),
    wrong_data("sft", "half_array_json", READ % "half_array_json"),
    wrong_data("sft", "nonsense_parquet", READ % "nonsense_parquet"),
    wrong_data("sft", "open_quote_csv", READ % "open_quote_csv" + r".*unexpected end of data"),
    wrong_data("sft", "too_many_fields_csv", r"line 2 has more fields than its first line names"),
    wrong_data("sft", "word_csv", r"found prompt response; wanted prompt/response"),
    # ---- Data: the columns ----
    wrong_data(
        "sft",
        "wrong_columns",
        r"found text, label; wanted prompt/response, .*; rename yours, or .* --columns",
    ),
    wrong_data("reward", "sft_data", r"found prompt, response; wanted prompt/chosen/rej"),
    wrong_data("ppo", "wrong_columns", r"found text, label; wanted prompt, question"),
    wrong_data("sft", "numbers", r"column response of the dataset holds int \(42\), wanted text; convert it"),
    wrong_data("sft", "mixed", r"column response of the dataset holds int \(3\), wanted text"),
    wrong_data("ppo", "objects", r"column prompt of the dataset holds dict \({'text': .*, wanted turns"),
    wrong_data("sft", "word_lists", r"column prompt of the dataset holds list \(\['a', 'b'\]\), wanted turns"),
    wrong_data(
        "sft", "text_for_turns", r"column messages of the dataset holds str \(hi\), wanted turns with role and content"
    ),
    wrong_data("sft", "turns_without_role", r"column messages of the dataset holds list.*, wanted turns with role"),
    wrong_data("ppo", "turns_in_parts", r"column messages of the dataset holds dict.*, wanted turns with role"),
    wrong_data("sft", "one_answer", r"column chatgpt_answers of the dataset holds str \(yo\), wanted a list of texts"),
    wrong_data("sft", "number_input", r"column input of the dataset holds int \(3\), wanted text"),
    wrong_data("reward", "number_pairs", r"column chosen of the dataset holds int \(42\), wanted text"),
    wrong_data("reward", "mixed_dialogues", r"leaves 0 for|leaves 1 for|'empty': 1"),
    wrong_data("reward", "word_margins", r"column margin of the dataset holds str \(large\), wanted numbers"),
    # ---- Data: nothing is left ----
    wrong_data("sft", "nulls", UNUSABLE + r"'empty': 3.*; check the data"),
    wrong_data("sft", "empty_replies", UNUSABLE + r"'empty': 3"),
    wrong_data("sft", "empty_turns", UNUSABLE + r"'empty': 1"),
    wrong_data("sft", "no_reply", UNUSABLE + r"'empty': 1"),
    wrong_data("ppo", "blank_prompts", UNUSABLE + r"'empty': 3"),
    wrong_data("ppo", "nulls", UNUSABLE + r"'empty': 3"),
    wrong_data("reward", "equal_pairs", UNUSABLE + r"'chosen equals rejected': \d"),
    wrong_data("reward", "empty_chosen", UNUSABLE + r"'empty': \d"),
    wrong_data("reward", "long_pairs", UNUSABLE + r"'too long': \d.*--max_length"),
    wrong_data("reward", "no_dialogue", r"leaves (0 for training|\d+ for training and 0)|'empty': \d"),
    wrong_data("ppo", "long_prompts", UNUSABLE + r"'too long': 5"),
    wrong_data("ppo", "few", r"2 prompts are fewer than the 4 of one iteration"),
    ("all too long", "sft", {"max_length": "3"}, r"none of 12 training rows is usable: .*'prompt too long': 12"),
    ("nothing held out", "reward", {"eval_fraction": "0"}, r"needs held-out pairs; give --eval_dataset"),
    (
        "all held out",
        "sft",
        {"eval_fraction": "0.9999"},
        r"leaves 0 for training and 12 for evaluation; change the share",
    ),
    (
        "none held out",
        "sft",
        {"eval_fraction": "0.0001"},
        r"leaves 12 for training and 0 for evaluation; change the share",
    ),
    (
        "nothing to evaluate, SFT",
        "sft",
        {"eval_strategy": "epoch"},
        r"--eval_strategy and --eval_on_start need held-out",
    ),
    (
        "nothing to evaluate, PPO",
        "ppo",
        {"eval_on_start": "True"},
        r"--eval_strategy and --eval_on_start need held-out",
    ),
    # ---- The base ----
    ("no model", "sft", {"model_name": None}, r"no base model was given; add --model_name_or_path"),
    ("no such model", "sft", {"model_name": "/no/such"}, r"there is no folder /no/such; check --model_name_or_path"),
    ("no such model on the hub", "sft", {"model_name": "no-such/model"}, r"cannot load a tokenizer from no-such/model"),
    ("no weights", "reward", {"model_name": "{tokenizer_only}"}, r"cannot load the base model {tokenizer_only}"),
    ("no tensors", "sft", {"model_name": "{no_tensors}"}, r"there is no .safetensors file in it"),
    (
        "pickle for a base",
        "sft",
        {"model_name": "{pickle_base}"},
        r"no .safetensors file in it, and other formats can run code",
    ),
    (
        "cut base",
        "sft",
        {"model_name": "{cut_base}"},
        r"cannot load the base model {cut_base}: .*; give a complete model",
    ),
    (
        "base with a hole",
        "sft",
        {"model_name": "{base_hole}"},
        r"is not complete: it has no weights for .*mlp.up_proj.weight",
    ),
    ("impossible base", "sft", {"model_name": "{no_layers}"}, r"cannot load .*{no_layers}: .*attention heads"),
    ("unknown family", "sft", {"model_name": "{unknown_family}"}, r"cannot load .*{unknown_family}: .*nonesuch"),
    ("cut configuration", "sft", {"model_name": "{config_cut}"}, r"cannot load .*{config_cut}: "),
    ("cut tokenizer", "sft", {"model_name": "{tokenizer_cut}"}, r"cannot load a tokenizer from {tokenizer_cut}: "),
    (
        "remote code",
        "sft",
        {"model_name": "{remote}"},
        r"needs code of its own \(configuration_x.XConfig\); add --trust_remote",
    ),
    ("an adapter as base", "sft", {"model_name": "{sft}"}, r"cannot load a tokenizer from {sft}"),
    ("no EOS", "sft", {"model_name": "{no_eos}"}, r"the tokenizer of {no_eos} has no EOS token.*; set eos_token in it"),
    *(
        (
            f"Baichuan, {script}",
            script,
            {"model_name": "{baichuan}"},
            r"{baichuan} is a Baichuan model.*convert_baichuan",
        )
        for script in TRAINING
    ),
    # ---- Adapters ----
    ("no SFT adapter", "ppo", {"sft_model_lora_path": None}, r"no adapter was given; add --sft_model_lora_path"),
    (
        "no such adapter",
        "ppo",
        {"reward_model_lora_path": "no/such"},
        r"--reward_model_lora_path no/such: there is no ad",
    ),
    (
        "no such SFT adapter",
        "reward",
        {"sft_model_lora_path": "no/such"},
        r"--sft_model_lora_path no/such: there is no",
    ),
    ("reward as SFT for the card", "reward", {"sft_model_lora_path": "{reward}"}, r"{reward} is a reward adapter"),
    wrong_adapter("empty", r"{empty}: there is no adapter_config.json in it; give an adapter's folder"),
    wrong_adapter("base", r"{base}: there is no adapter_config.json in it"),
    wrong_adapter("no_weights", r"{no_weights}: there is no adapter_model.safetensors in it"),
    wrong_adapter("no_config", r"{no_config}: there is no adapter_config.json in it"),
    wrong_adapter("cut_sft", r"--sft_model_lora_path {cut_sft} cannot be read: .*; is the file complete"),
    wrong_adapter("zero_sft", r"--sft_model_lora_path {zero_sft} cannot be read: .*; is the file complete"),
    wrong_adapter(
        "pickle_sft", r"adapter_model.bin, a pickle, which can run code and is not read; save the adapter as"
    ),
    wrong_adapter("pickle_reward", r"adapter_model.bin, a pickle", "reward_model_lora_path"),
    wrong_adapter("nan_sft", r"{nan_sft} holds NaN or infinity in .*lora_A.*; its training failed, give another one"),
    wrong_adapter("inf_reward", r"{inf_reward} holds NaN or infinity in ", "reward_model_lora_path"),
    wrong_adapter("hole", r"{hole} does not fit this base: 0 of its tensors have no place, 1 places stay empty"),
    wrong_adapter("other_rank", r"{other_rank} does not fit this base: .*size mismatch"),
    wrong_adapter("rank_0", r"{rank_0} does not fit this base: .*r"),
    wrong_adapter("rank_word", r"{rank_word} does not fit this base: "),
    wrong_adapter("other_layers", r"{other_layers} does not fit this base: .*query"),
    wrong_adapter("prefix", r"{prefix} is a PREFIX_TUNING adapter; give a LORA one"),
    wrong_adapter("no_type", r"{no_type} is a None adapter; give a LORA one"),
    wrong_adapter("config_half", r"{config_half}/adapter_config.json is not valid JSON: .*; is the file complete"),
    wrong_adapter("config_list", r"{config_list}/adapter_config.json holds a list, not an object"),
    wrong_adapter("run_half", r"{run_half}/run.json is not valid JSON: .*; is the file complete"),
    wrong_adapter("run_list", r"{run_list}/run.json holds a list, not an object; restore the file or remove it"),
    wrong_adapter("run_bare", r"{run_bare}/run.json has no base_fingerprint; restore the file, or remove it"),
    wrong_adapter("run_arguments", r"the arguments in {run_arguments}/run.json are damaged", "reward_model_lora_path"),
    wrong_adapter("sft", r"--reward_model_lora_path {sft} holds no score head", "reward_model_lora_path"),
    wrong_adapter("reward", r"--sft_model_lora_path {reward} is a reward adapter; give one that sft_training.py wrote"),
    wrong_adapter("other_sft", r"{other_sft} was trained on the base {other}, not on {base}; give the same base"),
    wrong_adapter("gpt2_sft", r"{gpt2_sft} does not fit this base"),
    wrong_adapter(
        "template_sft",
        r"was trained with the prompt template 'Q: {prompt}\\nA: ', not '问：{prompt}\\n\\n答：'; give that",
    ),
    wrong_adapter(
        "card_half",
        r"{card_half}/reward_card.json is not valid JSON: .*; is the file complete",
        "reward_model_lora_path",
    ),
    wrong_adapter("card_nan", r"{card_nan}/reward_card.json is no reward card ", "reward_model_lora_path"),
    wrong_adapter("card_words", r"{card_words}/reward_card.json is no reward card ", "reward_model_lora_path"),
    (
        "failed reward card",
        "ppo",
        {"reward_model_lora_path": "{card_failed}", "allow_weak_reward": None},
        r"{card_failed} did not pass its reward card: probe empty 0.1; train it again with",
    ),
    (
        "no reward card",
        "ppo",
        {"allow_weak_reward": None},
        r"{reward} has no reward_card.json.*--allow_weak_reward true",
    ),
    (
        "merge: SFT as classifier",
        "merge",
        {"as_classifier": "true"},
        r"holds no score head.*; leave out --as_classifier",
    ),
    ("merge: pickle", "merge", {"adapter_path": "{pickle_sft}"}, r"adapter_model.bin, a pickle"),
    ("merge: NaN", "merge", {"adapter_path": "{nan_sft}"}, r"{nan_sft} holds NaN or infinity"),
    (
        "compare: pickle",
        "compare",
        {"adapters": "SFT={pickle_sft}"},
        r"--adapters SFT {pickle_sft} holds its weights as",
    ),
    ("compare: NaN", "compare", {"adapters": "SFT={nan_sft}"}, r"{nan_sft} holds NaN or infinity"),
    # ---- Arguments: keys and words ----
    (
        "unknown argument",
        "reward",
        {"learning_rat": "1"},
        r"unknown argument --learning_rat; did you mean --learning_rate",
    ),
    (
        "unknown key",
        "sft",
        {"config": "{unknown_key}"},
        r"unknown argument --learning_rat; did you mean --learning_rate",
    ),
    (
        "unknown null",
        "sft",
        {"config": "{unknown_null}"},
        r"unknown argument --learning_rat; did you mean --learning_r",
    ),
    ("malformed YAML", "ppo", {"config": "{malformed}"}, r"{malformed} is not valid YAML: .*; correct the file"),
    ("a list for YAML", "sft", {"config": "{yaml_list}"}, r"{yaml_list} holds a list, not 'key: value' lines"),
    ("a word for YAML", "sft", {"config": "{yaml_word}"}, r"{yaml_word} holds a str, not 'key: value' lines"),
    ("empty YAML", "sft", {"config": "{empty_yaml}"}, r"{empty_yaml} holds a NoneType, not 'key: value' lines"),
    ("two values", "sft", {"config": "{two_rates}"}, r"unknown argument 1e-5; see --help"),
    ("nested value", "sft", {"config": "{nested}"}, r"--learning_rate.*: invalid float value"),
    ("YAML in another encoding", "sft", {"config": "{latin_yaml}"}, r"{latin_yaml} is not valid YAML: .*utf-8"),
    ("no day of the calendar", "sft", {"config": "{no_date}"}, r"{no_date} is not valid YAML: month must be in 1..12"),
    ("a YAML without a bottom", "sft", {"config": "{deep}"}, r"{deep} is not valid YAML"),
    ("code in YAML", "sft", {"config": "{code}"}, r"{code} is not valid YAML: could not determine a constructor"),
    ("no such YAML", "ppo", {"config": "no.yaml"}, r"cannot read the configuration no.yaml: No such file"),
    ("a folder for YAML", "ppo", {"config": "{empty}"}, r"cannot read the configuration {empty}: Is a directory"),
    wrong_value("sft", "learning_rate", "fast", r"--learning_rate.*invalid float value: 'fast'"),
    wrong_value("ppo", "steps", "1e3", r"--steps: invalid int value: '1e3'"),
    wrong_value("ppo", "allow_weak_reward", "perhaps", r"--allow_weak_reward.*perhaps"),
    wrong_value("ppo", "guard", "maybe", r"--guard: invalid choice: 'maybe'"),
    wrong_value("ppo", "critic", "model", r"--critic: invalid choice: 'model'"),
    wrong_value("sft", "dtype", "int8", r"--dtype: invalid choice: 'int8'"),
    wrong_value("sft", "optim", "best", r"best.*optim|optim.*best|'best' is not a valid OptimizerNames"),
    wrong_value("sft", "lr_scheduler_type", "up", r"up.*SchedulerType|lr_scheduler_type.*up"),
    wrong_value("sft", "report_to", "carrier_pigeon", r"--report_to carrier_pigeon is no tracker; there are "),
    wrong_value("ppo", "log_with", "carrier_pigeon", r"--report_to carrier_pigeon is no tracker; there are "),
    wrong_value("sft", "lora_target_modules", "query", r"query is no linear layer of this model; it has down_proj"),
    wrong_value("reward", "degenerate_kinds", "emty", r"--degenerate_kinds: 'emty' is no kind; there are empty"),
    wrong_value("reward", "exempt_probes", "cut", r"--exempt_probes: 'cut' is no kind"),
    wrong_value("ppo", "begin_suppress_tokens", "2,x", r"--begin_suppress_tokens 2,x: give eos, none"),
    wrong_value("ppo", "begin_suppress_tokens", "320", r"token ids below 320"),
    # a digit to Python, and no number: it ended in a traceback
    wrong_value("ppo", "begin_suppress_tokens", "2,²", r"--begin_suppress_tokens 2,²: give eos, none"),
    wrong_value("sft", "prompt_template", "Q: A:", r"needs {prompt} in it once, found 'Q: A:'; write for example"),
    wrong_value("sft", "prompt_template", "{prompt} {prompt}", r"needs {prompt} in it once, found "),
    wrong_value("reward", "prompt_template", "chat", r"this tokenizer has no chat template; give one with {prompt}"),
    wrong_value(
        "ppo", "gold_function", "demo.gold", r"demo.gold is not MODULE:NAME; write for example demo.gold:gold_"
    ),
    wrong_value("ppo", "gold_function", ":f", r":f is not MODULE:NAME"),
    wrong_value(
        "ppo", "gold_function", "no.such:f", r"cannot import no.such \(ModuleNotFoundError: No module named 'no'"
    ),
    wrong_value("ppo", "gold_function", "tests.golds:f", r"tests.golds has no function f, found None; correct"),
    wrong_value(
        "ppo", "gold_function", "tests.golds:NOT_A_FUNCTION", r"has no function NOT_A_FUNCTION, found 3; correct"
    ),
    wrong_value(
        "ppo", "gold_function", "tests.golds:infinite", r"on the prompt '.+' and the reply '' gives inf; it has"
    ),
    wrong_value("ppo", "gold_function", "tests.golds:not_a_number", r"the reply '' gives nan; it has to give a finite"),
    wrong_value("ppo", "gold_function", "tests.golds:too_large", r"the reply '' gives 1e\+39; it has to give a finite"),
    wrong_value(
        "ppo", "gold_function", "tests.golds:without_number", r"gives None \(TypeError: .*\); it has to give a number"
    ),
    wrong_value(
        "ppo",
        "gold_function",
        "tests.golds:without_empty_replies",
        r"fails \(ZeroDivisionError: .*\); it has to give a number for every reply",
    ),
    wrong_value("ppo", "gold_function", "operator:neg", r"operator:neg on the prompt .* fails \(TypeError: "),
    wrong_value("compare", "adapters", "{sft}", r"is not NAME=FOLDER; write for example SFT=output/sft"),
    wrong_value("sft", "resume_from_checkpoint", "{cut_sft}", r"the checkpoint {cut_sft} is not whole: there is no"),
    (
        "resume in a folder of something else",
        "sft",
        {"resume_from_checkpoint": "true", "output_dir": "{no_eos}"},
        r"the output folder {no_eos} is not empty",
    ),
    wrong_value("sft", "resume_from_checkpoint", "no/such", r"there is no checkpoint folder no/such"),
    # ---- Arguments: numbers ----
    *(wrong_value(script, "learning_rate", value) for script in TRAINING for value in ("-0.5", "nan", "inf")),
    *(wrong_value(script, "seed", "-1") for script in TRAINING),
    *(wrong_value("sft", name, "0") for name in ("num_train_epochs", "max_steps", "save_steps")),
    wrong_value("sft", "logging_steps", "0", r"requires non-zero --logging_steps"),
    *(wrong_value("reward", "per_device_train_batch_size", value) for value in ("0", "-4")),
    *(wrong_value("reward", name, "0") for name in ("per_device_eval_batch_size", "gradient_accumulation_steps")),
    *(wrong_value("reward", name, "0") for name in ("probe_prompts", "ensemble_size", "max_length", "train_subset")),
    wrong_value("reward", "center_rewards_coefficient", "-1"),
    wrong_value("reward", "degenerate_ratio", "1"),
    wrong_value("reward", "eval_fraction", "10"),
    wrong_value("reward", "lora_r", "0", r"--lora_r 0 .* have to be at least 1"),
    wrong_value(
        "sft", "init_lora_weights", "pissa", r"--init_lora_weights is pissa; give one of true, gaussian, ortho.* base"
    ),
    (
        "start of nothing",
        "reward",
        {"init_from_sft": "true"},
        r"no adapter was given; add --sft_model_lora_path FOLDER",
    ),
    ("equal members", "reward", {"init_from_sft": "true", "ensemble_size": "2"}, r"an ensemble of 2 .* is one model;"),
    (
        "odd rank",
        "sft",
        {"init_lora_weights": "orthogonal", "lora_r": "3"},
        r"orthogonal needs an even --lora_r; it is 3",
    ),
    (
        "values alone",
        "ppo",
        {"value_warmup_iterations": "2", "steps": "2"},
        r"leaves the policy none of the --steps 2;",
    ),
    wrong_value("ppo", "value_learning_rate", "0"),
    wrong_value("sft", "lora_dropout", "1"),
    *(wrong_value("ppo", name, "0") for name in ("steps", "save_freq", "batch_size", "mini_batch_size", "ppo_epochs")),
    *(wrong_value("ppo", name, "0") for name in ("kl_budget", "guard_patience", "guard_freq", "temperature")),
    *(wrong_value("ppo", name, "-3") for name in ("steps", "batch_size", "output_max_length", "init_kl_coef")),
    *(wrong_value("ppo", name, "nan") for name in ("temperature", "score_clip", "gamma", "reward_baseline")),
    *(wrong_value("ppo", name, "1.5") for name in ("gamma", "gae_lambda")),
    wrong_value("compare", "max_prompts", "0"),
    wrong_value("compare", "batch_size", "0"),
    # ---- Arguments: contradictions ----
    ("bf16 and fp16", "sft", {"bf16": "true", "fp16": "true"}, r"At most one of fp16 and bf16"),
    ("best of what", "sft", {"load_best_model_at_end": "true"}, r"load_best_model_at_end requires"),
    ("no room", "ppo", {"max_length": "64", "output_max_length": "64"}, r"--max_length 64 leaves no room .* 64"),
    (
        "batch and mini-batch",
        "ppo",
        {"batch_size": "6", "mini_batch_size": "4"},
        r"--batch_size 6 is no multiple of --mini_batch_size 4; change one",
    ),
    (
        "passes and accumulation",
        "ppo",
        {"batch_size": "12", "mini_batch_size": "4", "gradient_accumulation_steps": "2"},
        r"an epoch has 3 passes .*, no multiple of --gradient_accumulation_steps 2; change one",
    ),
    # ---- The environment ----
    wrong_value("sft", "fp16", "true", r"--fp16 true needs a GPU; leave it out on a CPU"),
    *(
        (
            f"bf16 without a GPU, {script}",
            script,
            {"bf16": "true", "use_cpu": "false"},
            r"doesn't support bf16/gpu.*use_cpu",
        )
        for script in TRAINING
    ),
    wrong_value("sft", "tf32", "true", r"tf32"),
    wrong_value("sft", "deepspeed", "no/such.json", r"no/such.json|deepspeed"),
    wrong_value("sft", "output_dir", "{rows_txt}/out", r"cannot be made: no write access to {rows_txt}; give another"),
]


def fill(text, paths, quote=str):
    """Put paths into {names}; {prompt} and other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda name: quote(paths[name[1]]) if name[1] in paths else name[0], text)


def command(script, changes, paths, output_dir):
    words = {**DEFAULTS[script], "output_dir": str(output_dir), **changes}
    pairs = [(f"--{name}", fill(value, paths)) for name, value in words.items() if value is not None]
    return [word for pair in pairs for word in pair]


def check(returncode, stderr, message):
    assert returncode == 2, stderr
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, stderr
    assert stderr.splitlines()[-1] == errors[0]
    assert re.search(message, errors[0]), errors[0]


def complain(script, argv, monkeypatch, capfd, message):
    monkeypatch.setattr(sys, "argv", [f"{SCRIPTS[script].__name__}.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        run_script(SCRIPTS[script].main)
    unset_hf_deepspeed_config()  # transformers remembers the half made one of a file that is not there
    check(stopped.value.code, capfd.readouterr().err, message)


def escaped(message, paths):
    return fill(message, paths, re.escape).replace("{prompt}", r"\{prompt\}")


@pytest.mark.parametrize(
    ("script", "changes", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_one_line_and_nothing_written(paths, tmp_path, monkeypatch, capfd, script, changes, message):
    monkeypatch.chdir(tmp_path)
    complain(script, command(script, changes, paths, "out"), monkeypatch, capfd, escaped(message, paths))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("script", TRAINING)
def test_an_output_folder_in_use_is_left_alone(paths, tmp_path, monkeypatch, capfd, script):
    monkeypatch.chdir(tmp_path)
    message = f"the output folder {re.escape(paths['used'])} is not empty; give another --output_dir"
    complain(script, command(script, {}, paths, paths["used"]), monkeypatch, capfd, message)
    assert os.listdir(paths["used"]) == ["mine.txt"]
    file = str(Path(paths["used"]) / "mine.txt")
    complain(script, command(script, {}, paths, file), monkeypatch, capfd, "is a file; give another --output_dir")
    assert Path(file).read_text() == "precious"


def test_as_a_command(paths, tmp_path):
    """The whole of stderr, import warnings and progress bars included, and the exit code that a shell sees."""
    file = ROOT / f"{SCRIPTS['sft'].__name__}.py"
    words = [sys.executable, str(file), *command("sft", {"dataset": "no/such.jsonl"}, paths, "out")]
    done = subprocess.run(words, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    check(done.returncode, done.stderr, "there is no file or folder no/such.jsonl")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("script", "changes", "environment", "message"),
    [
        ("ppo", {"sft_model_lora_path": "{reward}"}, {}, "{reward} is a reward adapter"),
        (
            "sft",
            {"report_to": "wandb"},
            {"WANDB_MODE": "online", "WANDB_API_KEY": ""},
            "wandb cannot be used: No API key configured.*; log in with `wandb login`, or set WANDB_MODE=offline",
        ),
        (
            "reward",
            {"report_to": "wandb"},
            {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_HTTP_TIMEOUT": "1"},  # seconds; 10 by default
            "wandb cannot be used: Failed to authenticate with http://127.0.0.1:9.*, or set WANDB_MODE=offline",
        ),
    ],
    ids=["wrong adapter", "no wandb account", "no network for wandb"],
)
def test_in_a_process_of_its_own(paths, tmp_path, tmp_path_factory, monkeypatch, script, changes, environment, message):
    """Nobody's wandb account, an address where nothing answers, and not the wandb service of the tests' own process."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    nobody = {"HOME": str(tmp_path_factory.mktemp("home")), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    file = ROOT / f"{SCRIPTS[script].__name__}.py"
    done = run_command([file, *command(script, changes, paths, "out")], tmp_path, **nobody, **environment)
    check(done.returncode, done.stderr, escaped(message, paths))
    assert os.listdir(tmp_path) == []


def test_an_output_folder_without_write_access():
    """Said before anything is computed.  Root may write anywhere, so as root the test asks as nobody."""
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder, "locked")
        locked.mkdir()
        for path, mode in ((folder, 0o755), (locked, 0o555)):
            os.chmod(path, mode)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(
                InputError, match=f"cannot be made: no write access to {locked}; give another --output_dir"
            ):
                check_new_folder(str(locked / "new" / "out"))
        finally:
            os.seteuid(user)
        locked.chmod(0o755)
        check_new_folder(str(locked / "new" / "out"))
        assert os.listdir(locked) == []


# ---- Odd, and no mistake: the run goes on, and one line says so ----

LIMITS = ("Q: {prompt}\nA:", make_tokenizer(), 200)
TOKENIZE = {
    "sft": lambda rows: tokenize_sft(rows, *LIMITS),
    "reward": lambda rows: tokenize_preferences(rows, *LIMITS, "drop").pairs,
    "ppo": lambda rows: tokenize_prompts(rows, *LIMITS),
}
PAIR = {"prompt": "a", "chosen": "yo", "rejected": "no"}
AS_TEXT = r"warning: 1 of the training %s hold </s> as text, which is read as the end of a reply; "
ODD = [  # name, stage, rows, how many are kept, the line that says so
    (
        "repeated examples",
        "sft",
        [{"prompt": "a", "response": "b"}] * 3,
        3,
        "warning: 2 of the training SFT examples are there twice",
    ),
    ("repeated pairs", "reward", [PAIR] * 2, 2, "warning: 1 of the training preference pairs are there twice or more"),
    ("repeated prompts", "ppo", [{"prompt": "a"}] * 3, 1, "prompts: 1 kept, 2 repeated$"),
    ("equal pair", "reward", [PAIR, {**PAIR, "rejected": "yo"}], 1, "pairs: 1 chosen equals rejected, 1 kept$"),
    ("empty rejected reply", "reward", [{**PAIR, "rejected": ""}], 1, "pairs: 1 kept$"),
    ("empty chosen reply", "reward", [PAIR, {**PAIR, "chosen": ""}], 1, "pairs: 1 empty, 1 kept$"),
    ("empty reply", "sft", [{"prompt": "a", "response": r} for r in ("b", "", None)], 1, "examples: 2 empty, 1 kept$"),
    ("blank prompt", "ppo", [{"prompt": p} for p in ("a", " ", None)], 1, "prompts: 2 empty, 1 kept$"),
    ("long prompt", "ppo", [{"prompt": "a"}, {"prompt": "long " * 300}], 1, "prompts: 1 kept, 1 too long$"),
    ("long reply", "sft", [{"prompt": "a", "response": "long " * 300}], 1, "examples: 1 cut$"),
    (
        "NaN margin",
        "reward",
        [{**PAIR, "margin": size} for size in (1.0, float("nan"))],
        1,
        "pairs: 1 kept, 1 margin is no number$",
    ),
    (
        "no text in a turn",
        "sft",
        [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "b"}]} for c in ("a", None)],
        1,
        "examples: 1 empty, 1 kept$",
    ),
    (
        "no text in a turn of a pair",
        "reward",
        [{**PAIR, "prompt": [{"role": "user", "content": c}]} for c in ("a", None, "")],
        1,
        "pairs: 2 empty, 1 kept$",
    ),
    ("blank prompt of a pair", "reward", [{**PAIR, "prompt": p} for p in ("a", " \n", None)], 1, "2 empty, 1 kept$"),
    ("EOS in a prompt", "ppo", [{"prompt": "what is </s>?"}, {"prompt": "b"}], 2, AS_TEXT % "prompts"),
    ("EOS in an example", "sft", [{"prompt": "what is </s>?", "response": "b"}], 1, AS_TEXT % "SFT examples"),
    ("EOS in a pair", "reward", [{**PAIR, "rejected": "no</s>"}], 1, AS_TEXT % "preference pairs"),
]


@pytest.mark.parametrize(("stage", "rows", "kept", "line"), [case[1:] for case in ODD], ids=[case[0] for case in ODD])
def test_odd_rows_are_counted_and_said(capsys, stage, rows, kept, line):
    assert len(TOKENIZE[stage](Dataset.from_list(rows))) == kept
    said = [text for text in capsys.readouterr().err.splitlines() if re.search(line, text)]
    assert len(said) == 1


def test_a_reply_that_spells_eos_out_has_one_eos():
    """People write EOS into their data, for other trainers.  A second one taught the model to go on after an end."""
    tokenizer = LIMITS[1]
    query, reply = tokenizer("Q: </s>?\nA:")["input_ids"], tokenizer("yo")["input_ids"]
    (row,) = tokenize_sft(Dataset.from_list([{"prompt": "</s>?", "response": "yo</s></s>"}]), *LIMITS)
    assert row["input_ids"] == [*query, *reply, tokenizer.eos_token_id]
    assert query.count(tokenizer.eos_token_id) == 1  # in the prompt it stays what the tokenizer makes of it
    (pair,) = TOKENIZE["reward"](Dataset.from_list([{**PAIR, "chosen": "yo</s>"}]))
    assert pair["chosen_ids"][pair["query_length"] :] == [*reply, tokenizer.eos_token_id]


def test_a_line_of_10_mb_is_read(tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "a", "note": "word " * 2_000_000}, {"prompt": "b", "note": ""}]
    )
    assert [row["prompt"] for row in read_dataset(path)] == ["a", "b"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
@pytest.mark.parametrize(("before", "end"), [(b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n")], ids=["BOM", "CRLF"])
def test_files_as_windows_writes_them(tmp_path, name, before, end):
    lines = [b'{"prompt": "a"}', b'{"prompt": "b"}'] if name == "rows.jsonl" else [b"prompt", b"a", b"b"]
    (tmp_path / name).write_bytes(before + end.join(lines) + end)
    assert [row["prompt"] for row in read_dataset(str(tmp_path / name))] == ["a", "b"]


def test_held_out_prompts_that_are_trained_on_are_said(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{**PAIR, "prompt": text} for text in "abcd"])
    held_out = write_rows(tmp_path / "held_out.jsonl", [{**PAIR, "prompt": text} for text in "cdef"])
    train_and_eval_rows(DataArguments(dataset=rows, eval_dataset=held_out), "nothing")
    assert "warning: 2 of the 4 rows of --eval_dataset have a prompt that is trained on" in capsys.readouterr().err
    train_and_eval_rows(DataArguments(dataset=rows, eval_fraction=0.5), "nothing")
    assert "warning" not in capsys.readouterr().err


def test_a_chat_template_that_refuses_a_dialogue(tokenizer):
    """Many templates want user and assistant in turn; jinja's exception reached users as a traceback."""
    strict = make_tokenizer()
    strict.chat_template = (
        "{% for turn in messages %}{% if (turn.role == 'user') != (loop.index0 is even) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ turn.content }}{% endfor %}"
    )
    rows = Dataset.from_list(
        [{"messages": [{"role": role, "content": "hi"} for role in ("user", "user", "assistant")]}]
    )
    with pytest.raises(
        InputError, match=r"chat template refuses a dialogue \(user, user\): roles must alternate; correct"
    ):
        tokenize_sft(rows, "chat", strict, 200)


def test_a_state_dict_that_only_fsdp_can_read():
    """The Trainer then writes no adapter_model.safetensors, and says nothing."""

    def trainer(kind):
        plugin = SimpleNamespace(state_dict_type=kind)
        return SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))

    check_state_dict(trainer(StateDictType.FULL_STATE_DICT))
    check_state_dict(SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace())))
    with pytest.raises(InputError, match="SHARDED_STATE_DICT no adapter would be written; set it to FULL_STATE_DICT"):
        check_state_dict(trainer(StateDictType.SHARDED_STATE_DICT))
