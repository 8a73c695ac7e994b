"""What people get wrong most often: each mistake is one line that names it, exit code 2, and nothing written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import reward_modeling
import rl_training
import sft_training
from tests.conftest import make_tokenizer, save_base, write_rows
from tests.helpers import load_plain, make_stages, save_sft
from utils.adapters import base_fingerprint
from utils.arguments import DEFAULT_TEMPLATE, run_script

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sft": sft_training, "reward": reward_modeling, "ppo": rl_training}


def with_run_json(adapter, base, template=DEFAULT_TEMPLATE):
    run = {"base_fingerprint": base_fingerprint(load_plain(base)), "base_model": base, "prompt_template": template}
    (Path(adapter) / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return adapter


@pytest.fixture(scope="module")
def paths(tmp_path_factory, base_path, data):
    """Everything that the cases point at, right and wrong, by name."""
    folder = tmp_path_factory.mktemp("wrong")
    stages = make_stages(base_path, folder / "stages")
    with_run_json(stages.sft, base_path)
    with_run_json(stages.reward, base_path)
    other = save_base(folder / "other_base", seed=1)
    other_sft = with_run_json(save_sft(other, folder / "other_sft"), other)
    gpt2_sft = save_sft(save_base(folder / "gpt2", "gpt2"), folder / "gpt2_sft")
    template_sft = shutil.copytree(stages.sft, folder / "template_sft")
    with_run_json(template_sft, base_path, "Q: {prompt}\nA: ")
    cut = shutil.copytree(stages.sft, folder / "cut_sft")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "empty").mkdir()
    no_eos = shutil.copytree(base_path, folder / "no_eos")
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer, pad_token="<pad>").save_pretrained(
        no_eos
    )
    baichuan = folder / "baichuan"
    baichuan.mkdir()
    (baichuan / "config.json").write_text('{"model_type": "baichuan", "auto_map": {"AutoTokenizer": ["t.T", null]}}')
    tokenizer_only = folder / "tokenizer_only"
    make_tokenizer().save_pretrained(tokenizer_only)
    used = folder / "used"
    used.mkdir()
    (used / "mine.txt").write_text("precious")
    files = {
        "wrong_columns": write_rows(folder / "wrong_columns.jsonl", [{"text": "a", "label": "b"}]),
        "numbers": write_rows(folder / "numbers.jsonl", [{"prompt": "6 x 7?", "response": 42}]),
        "few": write_rows(folder / "few.jsonl", [{"prompt": "a"}, {"prompt": "b"}]),
        "no_rows": str(folder / "no_rows.jsonl"),
        "half": str(folder / "half.jsonl"),
        "text": str(folder / "rows.txt"),
        "unknown_key": str(folder / "unknown_key.yaml"),
        "malformed": str(folder / "malformed.yaml"),
    }
    Path(files["no_rows"]).write_text("")
    Path(files["half"]).write_text('{"prompt": "a", "resp')
    Path(files["text"]).write_text("a")
    Path(files["unknown_key"]).write_text("learning_rat: 1e-4\n")
    Path(files["malformed"]).write_text("learning_rate: [1e-4\n")
    return {
        **stages._asdict(),
        **files,
        **data,
        **{name: str(path) for name, path in locals().items() if isinstance(path, (str, Path))},
        "sft": stages.sft,
        "sft_data": data["sft"],
    }


DEFAULTS = {  # what a right command says; a case changes some of it, None takes it away
    "sft": {"model_name": "{base}", "dataset": "{sft_data}"},
    "reward": {"model_name": "{base}", "dataset": "{preferences}", "eval_fraction": "0.3"},
    "ppo": {
        "model_name": "{base}",
        "dataset": "{preferences}",
        "sft_model_lora_path": "{sft}",
        "reward_model_lora_path": "{reward}",
        "allow_weak_reward": "true",
        "batch_size": "4",
    },
}

CASES = [  # name, script, changes, message (paths and regular expression)
    ("no model", "sft", {"model_name": None}, r"no base model was given; add --model_name_or_path"),
    ("no such model", "sft", {"model_name": "/no/such"}, r"there is no folder /no/such; check --model_name_or_path"),
    ("no such model on the hub", "sft", {"model_name": "no-such/model"}, r"cannot load a tokenizer from no-such/model"),
    ("no weights", "reward", {"model_name": "{tokenizer_only}"}, r"cannot load the base model {tokenizer_only}"),
    *(
        (
            f"Baichuan, {script}",
            script,
            {"model_name": "{baichuan}"},
            r"{baichuan} is a Baichuan model.*convert_baichuan",
        )
        for script in SCRIPTS
    ),
    ("no EOS", "sft", {"model_name": "{no_eos}"}, r"the tokenizer of {no_eos} has no EOS token"),
    ("missing column, SFT", "sft", {"dataset": "{wrong_columns}"}, r"found text, label; wanted prompt/response, "),
    (
        "missing column, reward",
        "reward",
        {"dataset": "{sft_data}"},
        r"found prompt, response; wanted prompt/chosen/rej",
    ),
    ("missing column, PPO", "ppo", {"dataset": "{wrong_columns}"}, r"found text, label; wanted prompt, question"),
    ("numbers for text", "sft", {"dataset": "{numbers}"}, r"column response of the dataset holds int64, wanted text"),
    ("empty file", "sft", {"dataset": "{no_rows}"}, r"{no_rows} is an empty file"),
    ("cut file", "reward", {"dataset": "{half}"}, r"cannot read the dataset {half}: \w+"),
    ("no such file", "ppo", {"dataset": "no/such.jsonl"}, r"there is no file or folder no/such.jsonl"),
    ("no such dataset", "sft", {"dataset": "no-such/dataset"}, r"cannot read the dataset no-such/dataset"),
    ("unknown file type", "sft", {"dataset": "{text}"}, r"rows.txt ends in .txt; give one of .jsonl, .json"),
    ("empty folder", "reward", {"dataset": "{empty}"}, r"{empty}"),
    ("no such eval file", "sft", {"eval_dataset": "no/such.csv"}, r"there is no file or folder no/such.csv"),
    ("nothing held out", "reward", {"eval_fraction": "0"}, r"needs held-out pairs; give --eval_dataset"),
    ("share above 1", "reward", {"eval_fraction": "10"}, r"--eval_fraction is 10.0; give a share"),
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
    ("no pairs", "reward", {"train_subset": "0"}, r"--train_subset is 0"),
    ("all too long", "sft", {"max_length": "3"}, r"none of 12 rows is usable: .*'prompt too long': 12"),
    ("template without prompt", "sft", {"prompt_template": "Q: A:"}, r"needs {prompt} in it once, found 'Q: A:'"),
    ("no chat template", "reward", {"prompt_template": "chat"}, r"this tokenizer has no chat template"),
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
    ("malformed YAML", "ppo", {"config": "{malformed}"}, r"{malformed} is not valid YAML"),
    ("no such YAML", "ppo", {"config": "no.yaml"}, r"cannot read the configuration no.yaml: No such file"),
    ("not a number", "sft", {"learning_rate": "fast"}, r"--learning_rate.*invalid float value: 'fast'"),
    (
        "wrong layer",
        "sft",
        {"lora_target_modules": "query"},
        r"query is no linear layer of this model; it has down_proj",
    ),
    ("rank 0", "reward", {"lora_r": "0"}, r"--lora_r 0"),
    ("nothing to resume", "sft", {"resume_from_checkpoint": "true"}, r"there is no (whole )?checkpoint in out"),
    ("no SFT adapter", "ppo", {"sft_model_lora_path": None}, r"no adapter was given; add --sft_model_lora_path"),
    (
        "no such adapter",
        "ppo",
        {"reward_model_lora_path": "no/such"},
        r"--reward_model_lora_path no/such: there is no ad",
    ),
    ("empty adapter", "ppo", {"sft_model_lora_path": "{empty}"}, r"{empty}: there is no adapter_config.json in it"),
    ("cut adapter", "ppo", {"sft_model_lora_path": "{cut}"}, r"--sft_model_lora_path {cut} cannot be read"),
    (
        "no reward card",
        "ppo",
        {"allow_weak_reward": None},
        r"{reward} has no reward_card.json.*--allow_weak_reward true",
    ),
    ("unknown guard", "ppo", {"guard": "maybe"}, r"--guard: invalid choice: 'maybe'"),
    ("no KL budget", "ppo", {"kl_budget": "0"}, r"--kl_budget is 0.0; give a number above 0"),
    ("no patience", "ppo", {"guard_patience": "0"}, r"--guard_patience is 0; give a number above 0"),
    ("unknown critic", "ppo", {"critic": "model"}, r"--critic: invalid choice: 'model'"),
    ("nothing but broken", "reward", {"degenerate_ratio": "1"}, r"--degenerate_ratio is 1.0; give a share"),
    ("unknown kind", "reward", {"degenerate_kinds": "emty"}, r"--degenerate_kinds: 'emty' is no kind; there are empty"),
    ("unknown exempt kind", "reward", {"exempt_probes": "cut"}, r"--exempt_probes: 'cut' is no kind"),
    ("no probes", "reward", {"probe_prompts": "0"}, r"--probe_prompts is 0; give a number above 0"),
    ("no ensemble", "reward", {"ensemble_size": "0"}, r"--ensemble_size is 0; give a number above 0"),
    (
        "no such SFT adapter",
        "reward",
        {"sft_model_lora_path": "no/such"},
        r"--sft_model_lora_path no/such: there is no",
    ),
    ("reward as SFT for the card", "reward", {"sft_model_lora_path": "{reward}"}, r"{reward} is a reward adapter"),
    (
        "SFT as reward",
        "ppo",
        {"reward_model_lora_path": "{sft}"},
        r"--reward_model_lora_path {sft} holds no score head",
    ),
    (
        "reward as SFT",
        "ppo",
        {"sft_model_lora_path": "{reward}"},
        r"--sft_model_lora_path {reward} is a reward adapter",
    ),
    (
        "adapter of another base",
        "ppo",
        {"sft_model_lora_path": "{other_sft}"},
        r"{other_sft} was trained on the base {other}, not on {base}",
    ),
    ("adapter of another family", "ppo", {"sft_model_lora_path": "{gpt2_sft}"}, r"{gpt2_sft} does not fit this base"),
    (
        "another template",
        "ppo",
        {"sft_model_lora_path": "{template_sft}"},
        r"was trained with the prompt template 'Q: {prompt}\\nA: ', not '问：{prompt}\\n\\n答：'",
    ),
    ("too few prompts", "ppo", {"dataset": "{few}"}, r"2 prompts are fewer than the 4 of one iteration"),
    ("no room", "ppo", {"max_length": "64", "output_max_length": "64"}, r"--max_length 64 leaves no room .* 64"),
    ("bad first tokens", "ppo", {"begin_suppress_tokens": "2,x"}, r"--begin_suppress_tokens 2,x: give eos, none"),
    ("temperature 0", "ppo", {"temperature": "0"}, r"--temperature 0"),
    (
        "sizes",
        "ppo",
        {"batch_size": "6", "mini_batch_size": "4"},
        r"--batch_size 6 is no multiple of --mini_batch_size 4",
    ),
]


def fill(text, paths, quote=str):
    """Put paths into {names}; {prompt} and other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda name: quote(paths[name[1]]) if name[1] in paths else name[0], text)


def command(script, changes, paths, output_dir):
    words = {**DEFAULTS[script], "output_dir": str(output_dir), **changes}
    pairs = [(f"--{name}", fill(value, paths)) for name, value in words.items() if value is not None]
    return [word for pair in pairs for word in pair] + ["--use_cpu", "true"]


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_output_folder_in_use_is_left_alone(paths, tmp_path, monkeypatch, capfd, script):
    monkeypatch.chdir(tmp_path)
    message = f"the output folder {re.escape(paths['used'])} is not empty; give another --output_dir"
    complain(script, command(script, {}, paths, paths["used"]), monkeypatch, capfd, message)
    assert os.listdir(paths["used"]) == ["mine.txt"]
    file = str(Path(paths["used"]) / "mine.txt")
    complain(script, command(script, {}, paths, file), monkeypatch, capfd, "is a file; give another --output_dir")
    assert Path(file).read_text() == "precious"


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        ("sft", {"dataset": "no/such.jsonl"}, "there is no file or folder no/such.jsonl"),
        ("ppo", {"sft_model_lora_path": "{reward}"}, "{reward} is a reward adapter"),
    ],
)
def test_as_a_command(paths, tmp_path, script, changes, message):
    """The whole of stderr, import warnings and progress bars included, and the exit code that a shell sees."""
    file = ROOT / f"{SCRIPTS[script].__name__}.py"
    words = [sys.executable, str(file), *command(script, changes, paths, "out")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    check(done.returncode, done.stderr, escaped(message, paths))
    assert os.listdir(tmp_path) == []
