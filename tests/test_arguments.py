"""A YAML file first, the command line over it, one parser for both; and what is worked out from the arguments."""

import ast
import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

import compare
import reward_modeling
import rl_training
import sft_training
from lora.lora_layers import resolve_target_modules, text_layers
from reward_modeling import RewardArguments
from rl_training import PPOArguments
from sft_training import SFTArguments
from tests.conftest import make_model
from tests.house import ROOMS, ROOT, files_of
from utils.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    choose_precision,
    default_autocast,
    parse_arguments,
)
from utils.console import InputError


@dataclass
class Toy:
    """Arguments of every kind."""

    number: int = field(default=1)
    rate: float = field(default=0.5)
    keep: bool = field(default=True)
    drop: bool = field(default=False)
    words: list[str] = field(default_factory=lambda: ["x"])
    text: str | None = field(default="t")


def parse(tmp_path, yaml_text, *argv, kinds=(Toy,)):
    (tmp_path / "config.yaml").write_text(yaml_text, encoding="utf-8")
    parsed = parse_arguments(kinds, [*argv, "--config", str(tmp_path / "config.yaml")])
    return parsed[0] if len(parsed) == 1 else parsed


# ---- YAML and command line ----


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    toy = parse(tmp_path, "number: 2\nrate: 1e-5\n", "--number", "3")
    assert (toy.number, toy.rate, toy.text) == (3, 1e-5, "t")


def test_values_of_every_kind_in_yaml(tmp_path):
    toy = parse(tmp_path, "keep: false\ndrop: True\nwords: [a, b]\ntext: null\nnumber: -1\n")
    assert toy == Toy(keep=False, drop=True, words=["a", "b"], text="t", number=-1)  # null leaves the default


def test_a_text_may_hold_anything(tmp_path):
    toy = parse(tmp_path, 'text: "--on = {x}: 你好\\n\\n# "\n')
    assert toy.text == "--on = {x}: 你好\n\n# "


@pytest.mark.parametrize(("word", "value"), [("False", False), ("false", False), ("0", False), ("True", True)])
def test_booleans_are_read_and_not_just_true_when_they_are_not_empty(tmp_path, word, value):
    """`type=bool` makes "False" True, which the original scripts did."""
    assert parse(tmp_path, "number: 1\n", "--keep", word, "--drop", word) == Toy(keep=value, drop=value)
    assert parse(tmp_path, f"keep: '{word}'\ndrop: '{word}'\n") == Toy(keep=value, drop=value)


def test_a_bare_flag_is_true(tmp_path):
    assert parse(tmp_path, "number: 1\n", "--drop").drop is True


@pytest.mark.parametrize("alias", ["model_name_or_path", "model_name", "base_model_name"])
def test_the_base_models_names(tmp_path, alias):
    assert parse(tmp_path, f"{alias}: m\n", kinds=(ModelArguments,)).model_name_or_path == "m"
    assert parse(tmp_path, "dtype: auto\n", f"--{alias}", "m", kinds=(ModelArguments,)).model_name_or_path == "m"
    assert parse(tmp_path, "model_name: other\n", f"--{alias}=m", kinds=(ModelArguments,)).model_name_or_path == "m"


@pytest.mark.parametrize("alias", ["lora_target_modules", "lora_target_models"])
def test_the_target_modules_names(tmp_path, alias):
    assert parse(tmp_path, f"{alias}: a|b\n", kinds=(LoraArguments,)).lora_target_modules == "a|b"
    assert parse(tmp_path, "lora_r: 4\n", f"--{alias}", "a|b", kinds=(LoraArguments,)).lora_target_modules == "a|b"


@pytest.mark.parametrize(
    ("yaml_text", "argv", "message"),
    [
        ("numbr: 2\n", [], "unknown argument --numbr; did you mean --number?"),
        ("numbr: null\n", [], "unknown argument --numbr; did you mean --number?"),
        ("number: 2\n", ["--numbr", "3"], "unknown argument --numbr; did you mean --number?"),
        ("number: 2\n", ["--numbr=3"], "unknown argument --numbr; did you mean --number?"),
        ("number: 2\n", ["--qqqqqqqq"], "unknown argument --qqqqqqqq; see --help"),
        ("number: 2\n", ["--num", "3"], "unknown argument --num"),  # no guessing at abbreviations
        ("number: two\n", [], "argument --number: invalid int value: 'two'"),
        ("keep: perhaps\n", [], "argument --keep"),
        ("- number\n", [], "holds a list, not 'key: value' lines"),
        ("", [], "holds a NoneType, not 'key: value' lines"),
        ("number: [1\n", [], "is not valid YAML"),
        ("number: 1\n", ["--config"], "argument --config: expected one argument"),
        ("number: 1\n", ["--config", "no/such.yaml"], None),
    ],
)
def test_mistakes_in_both_are_one_line(tmp_path, yaml_text, argv, message):
    (tmp_path / "config.yaml").write_text(yaml_text, encoding="utf-8")
    given = ["--config", str(tmp_path / "config.yaml")] if "--config" not in argv else []
    with pytest.raises(InputError) as caught:
        parse_arguments((Toy,), [*given, *argv])
    assert (message or "cannot read the configuration no/such.yaml: No such file") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_that_only_the_trainer_sees(tmp_path):
    with pytest.raises(InputError, match="load_best_model_at_end requires"):
        parse(tmp_path, f"output_dir: {tmp_path}\nload_best_model_at_end: true\n", kinds=(TrainingArguments,))


def test_help_is_complete_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments((ModelArguments, DataArguments, PPOArguments), ["--help"], description="Stage 3.")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for word in ("Stage 3.", "--config", "--base_model_name", "--sft_model_lora_path", "--seed"):
        assert word in shown


# ---- No dead flag ----

OURS = [
    ModelArguments,
    reward_modeling.RewardModelArguments,
    DataArguments,
    LoraArguments,
    reward_modeling.RewardDataArguments,
    reward_modeling.RewardArguments,
    sft_training.SFTArguments,
    PPOArguments,
    compare.CompareArguments,
]


def names_read(path):
    """Names of the attributes that a file reads anywhere.  A dataclass field is defined by a plain name, not by one."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
    return names


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_every_argument_is_read(kind):
    sources = [path for room in ROOMS for path in files_of(room) if path.suffix == ".py"]
    used = set().union(*map(names_read, sources))
    base = next((parent for parent in kind.__mro__[1:] if parent in (TrainingArguments, sft_training.SFTConfig)), None)
    inherited = {each.name for each in dataclasses.fields(base)} if base else set()  # the Trainer reads these
    own = [each.name for each in dataclasses.fields(kind) if each.name not in inherited]
    assert own or kind is sft_training.SFTArguments
    assert [name for name in own if name not in used] == []


# ---- Target modules ----


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


ALL_LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("q_proj|v_proj", ["q_proj", "v_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (" q_proj , v_proj|", ["q_proj", "v_proj"]),
        ("o_proj", ["o_proj"]),
        ("all-linear", ALL_LINEAR),  # of the decoder: not the output embedding
    ],
)
def test_target_modules(llama, capsys, names, wanted):
    assert sorted(resolve_target_modules(names, text_layers(llama))) == wanted
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("names", "wanted"),
    [("W_pack", ["k_proj", "q_proj", "v_proj"]), ("W_pack|o_proj", ["k_proj", "o_proj", "q_proj", "v_proj"])],
)
def test_w_pack_means_q_k_and_v_where_they_are_apart(llama, capsys, names, wanted):
    assert sorted(resolve_target_modules(names, text_layers(llama))) == wanted
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert warning.count("\n") == 1
    assert "q_proj, k_proj and v_proj" in warning


def test_all_linear_of_a_model_with_another_layout():
    """GPT-2 has Conv1D where others have Linear."""
    assert resolve_target_modules("all-linear", text_layers(make_model("gpt2"))) == ["c_attn", "c_fc", "c_proj"]


@pytest.mark.parametrize("names", ["query", "q_proj|query", "lm_head", "|", "W_pack"])
def test_unknown_target_modules_list_the_layers_there_are(llama, names):
    model = make_model("gpt2") if names == "W_pack" else llama
    layers = "c_attn, c_fc, c_proj" if names == "W_pack" else ", ".join(ALL_LINEAR)
    with pytest.raises(InputError) as caught:
        resolve_target_modules(names, text_layers(model))
    assert f"--lora_target_modules {names}: " in str(caught.value)
    assert layers in str(caught.value)


# ---- Precision ----


@pytest.mark.parametrize(
    ("given", "fp16", "use_cpu", "gpu_has_it", "wanted"),
    [
        (None, False, False, True, True),
        (None, False, False, False, False),
        (None, True, False, True, False),
        (None, False, True, True, False),
        (False, False, False, True, False),
        (True, False, False, False, True),
    ],
)
def test_autocast_default(monkeypatch, given, fp16, use_cpu, gpu_has_it, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: gpu_has_it)
    args = SimpleNamespace(bf16=given, fp16=fp16, use_cpu=use_cpu)
    default_autocast(args)
    assert args.bf16 is wanted


def test_autocast_reaches_accelerate(tmp_path):
    """bf16 was once switched on after TrainingArguments had copied it: accelerate read "no" and autocast was never on."""
    for kind in (SFTArguments, RewardArguments, PPOArguments):
        assert kind(output_dir=str(tmp_path), use_cpu=True, bf16=True).mixed_precision == "bf16"
        assert kind(output_dir=str(tmp_path), use_cpu=True).mixed_precision == "no"


@pytest.mark.parametrize(
    ("dtype", "device", "bf16", "wanted"),
    [
        ("auto", "cpu", False, torch.float32),
        ("auto", "cpu", True, torch.float32),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float32),
        ("float32", "cuda", True, torch.float32),
        ("float16", "cuda", False, torch.float16),
        ("bfloat16", "cpu", False, torch.bfloat16),
    ],
)
def test_type_of_the_base(dtype, device, bf16, wanted):
    args = SimpleNamespace(device=torch.device(device), bf16=bf16)
    assert choose_precision(ModelArguments(model_name_or_path="m", dtype=dtype), args) is wanted
    assert args.dataloader_pin_memory is (device == "cuda")


# ---- PPO's sizes ----


def ppo(tmp_path, **sizes):
    return PPOArguments(output_dir=str(tmp_path), use_cpu=True, **sizes)


@pytest.mark.parametrize(
    ("batch", "mini", "accumulation", "passes"),
    [(32, 8, 1, 1), (32, 8, 2, 2), (32, 8, 4, 4), (8, 8, 1, 1), (8, 64, 1, 1)],
)
def test_batch_sizes_that_divide(tmp_path, capsys, batch, mini, accumulation, passes):
    args = ppo(tmp_path, batch_size=batch, mini_batch_size=mini, gradient_accumulation_steps=accumulation)
    assert args.passes_per_step == passes
    assert args.mini_batch_size == min(mini, batch)
    assert args.gradient_accumulation_steps == 1  # for the Trainer one step is one iteration
    assert args.per_device_train_batch_size == batch
    said = f"note: --mini_batch_size {mini} is above --batch_size {batch}, the replies of a process; a pass takes {batch}\n"
    assert capsys.readouterr().err == (said if mini > batch else "")


def test_the_articles_sizes_warn(tmp_path, capsys):
    """Batch 8 and accumulation 16: an epoch has one pass of 8 replies, which cannot be accumulated sixteen times."""
    assert ppo(tmp_path, batch_size=8, mini_batch_size=8, gradient_accumulation_steps=16).passes_per_step == 1
    warning = capsys.readouterr().err
    assert warning.startswith("warning: --gradient_accumulation_steps 16 is more than the 1 passes")
    assert warning.count("\n") == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 30, "mini_batch_size": 8}, "--batch_size 30 is no multiple of --mini_batch_size 8"),
        (
            {"batch_size": 32, "mini_batch_size": 8, "gradient_accumulation_steps": 3},
            r"4 passes \(--batch_size 32 / --mini_batch_size 8\), no multiple of --gradient_accumulation_steps 3",
        ),
        ({"steps": 0}, "--steps is 0; give a number above 0"),
        ({"batch_size": -1}, "--batch_size is -1"),
        ({"clip_range": 0.0}, "--clip_range is 0.0"),
    ],
)
def test_sizes_that_cannot_be(tmp_path, sizes, message):
    with pytest.raises(InputError, match=message):
        ppo(tmp_path, **sizes)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"merged_sft_model_path": "x"}, "merged_sft_model_path"),
        ({"batched_gen": True}, "batched_gen"),
        ({"batched_gen": False}, "batched_gen"),
    ],
)
def test_arguments_without_effect_warn_once(tmp_path, capsys, given, name):
    args = ppo(tmp_path, steps=7, save_freq=3, batch_size=16, **given)
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: --{name} has no effect")
    assert warning.count("\n") == 1
    assert (args.max_steps, args.save_steps, args.per_device_train_batch_size, args.logging_steps) == (7, 3, 16, 1)


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ("max_steps", "steps"),
        ("num_train_epochs", "steps"),
        ("save_steps", "save_freq"),
        ("per_device_train_batch_size", "batch_size"),
    ],
)
def test_names_that_ppo_does_not_share_with_the_trainer(given, instead):
    """They were taken with a warning, and the run then was another one than the one that was asked for."""
    with pytest.raises(InputError, match=f"--{given} is not offered here: use --{instead}$"):
        parse_arguments((PPOArguments,), [f"--{given}", "4"])


def test_ppo_names_for_the_trainers_arguments(tmp_path):
    args = ppo(tmp_path, log_with="tensorboard", adafactor=True)
    assert args.report_to == ["tensorboard"]
    assert args.optim == "adafactor"
    assert rl_training.DEFAULT_PREFERENCES == "beyond/rlhf-reward-single-round-trans_chinese"


def test_a_log_file_has_the_lines_in_order(tmp_path):
    """Python keeps what goes to a file until there are some kilobytes: in `script > log 2>&1` the error stood in front of
    the console lines of the iterations before it, and a long run's log stayed empty.
    """
    script = (
        "from utils.console import InputError, run_script\n"
        "def main():\n    print('iteration 1')\n    raise InputError('it ends here')\nrun_script(main)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        command = [sys.executable, "-c", script]
        subprocess.run(command, check=False, stdout=log, stderr=log, env=environment, cwd=ROOT, timeout=300)
    assert (tmp_path / "log").read_text(encoding="utf-8").splitlines()[-2:] == ["iteration 1", "error: it ends here"]
