"""Arguments that more than one script uses, and how they are read: a YAML file first, then the command line.

Every key of the YAML file is treated as if it stood on the command line in front of the real arguments.  So both are
checked by the same parser: aliases work in both, an unknown key is an error in both, and the command line wins.
"""

import argparse
import copy
import dataclasses
import datetime
import difflib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, get_scheduler

from utils.console import InputError, is_main_process, one_line, say
from utils.offered import INSTEAD, NEEDS, NO_SCHEDULES, OF_BITSANDBYTES, OPTIMIZERS, SECTIONS

DEFAULT_TEMPLATE = "问：{prompt}\n\n答："
# The names that --columns gives to columns.
COLUMNS = (
    "prompt",
    "response",
    "messages",
    "chosen",
    "rejected",
    "system",
    "history",
    "input",
    "tools",
    "score",
    "margin",
)
DEFAULT_PREFERENCES = "beyond/rlhf-reward-single-round-trans_chinese"  # the article's reward data and PPO prompts


def check_numbers(args: Any, above_0: str = "", from_0: str = "", shares: str = "", finite: str = "") -> None:
    """Raise InputError when a number of `args` is out of its range; None stands for "not given" and passes.

    Each range comes with the names of its arguments in one string, as in a namedtuple.  shares: from 0 to 1.
    """
    ranges = (
        (above_0, lambda value: 0 < value < math.inf, "a number above 0"),
        (from_0, lambda value: 0 <= value < math.inf, "0 or a number above it"),
        (shares, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
        (finite, math.isfinite, "a finite number"),
    )
    for names, fits, wanted in ranges:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not fits(value):  # NaN fits nothing
                raise InputError(f"--{name} is {value}; give {wanted}")


@dataclass
class ModelArguments:
    """Base model and prompt format: the same in all three stages."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Base model: a hub name or a folder.  The same one in all three stages.",
            "aliases": ["--model_name", "--base_model_name"],
        },
    )
    prompt_template: str = field(
        default=DEFAULT_TEMPLATE,
        metadata={
            "help": "Text around the prompt, with {prompt} in it (\\n is a new line), or 'chat' for the tokenizer's own "
            "chat template.  The same in all three stages."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the base weights: auto (bfloat16 where --bf16 is on on a GPU, else float32), or one of these.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Hold the base in 4 bit (NF4); adapters and heads stay float32.  Needs requirements-4bit.txt."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow the base model's folder to run its own Python code."}
    )

    def __post_init__(self) -> None:
        self.prompt_template = self.prompt_template.replace("\\n", "\n")
        if self.prompt_template != "chat" and self.prompt_template.count("{prompt}") != 1:
            raise InputError(
                f"--prompt_template needs {{prompt}} in it once, found {self.prompt_template!r}; "
                "write for example 'Question: {prompt}\\n\\nAnswer:' or 'chat'"
            )
        if self.model_name_or_path is None:
            raise InputError("no base model was given; add --model_name_or_path NAME_OR_FOLDER")


@dataclass
class DataArguments:
    """Where the rows come from."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub name, save_to_disk folder, folder of shards, or a file: .jsonl, .json, .csv, .tsv, .parquet, "
            ".xlsx, .txt (a prompt a line); see docs/data.md."
        },
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Own column names, as prompt=Frage,chosen=gut,rejected=schlecht; no other columns are read then.  "
            f"On the left: {', '.join(COLUMNS)}."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset."})
    dataset_data_dir: str | None = field(
        default=None, metadata={"help": "Folder inside a hub dataset, such as data/reward of stack-exchange-paired."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out rows, in the forms of --dataset."})
    eval_dataset_split: str = field(default="train", metadata={"help": "Split of --eval_dataset."})
    eval_dataset_data_dir: str | None = field(default=None, metadata={"help": "As --dataset_data_dir."})
    eval_fraction: float = field(
        default=0.0,
        metadata={"help": "Without --eval_dataset: hold out this share of the prompts (0 to 1) with all their rows."},
    )
    prompt_date: str | None = field(
        default=None,
        metadata={
            "help": "Day, as 2026-11-25, for a chat template that writes today's date.  Default: that of the run to go on "
            "with or of the SFT adapter, else today."
        },
    )

    def __post_init__(self) -> None:
        self.own_columns = None if self.columns is None else split_columns(self.columns)
        try:
            datetime.date.fromisoformat(self.prompt_date or "2026-01-01")
        except ValueError as error:
            raise InputError(f"--prompt_date is {self.prompt_date}; give a day such as 2026-11-25") from error
        if not 0 <= self.eval_fraction < 1:
            raise InputError(f"--eval_fraction is {self.eval_fraction}; give a share from 0 up to, not including, 1")


def split_columns(words: str) -> dict[str, str]:
    """What the columns are called here -> in the data.  Raises InputError for a name that is not known, or there twice."""
    pairs = [pair.partition("=") for pair in words.split(",")]
    for ours, mark, theirs in pairs:
        if ours.strip() not in COLUMNS or not mark or not theirs.strip():
            raise InputError(
                f"--columns {words}: {''.join((ours, mark, theirs))!r} is not NAME=COLUMN with a NAME out of "
                f"{', '.join(COLUMNS)}; give prompt=Frage,response=Antwort, say"
            )
    found = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if len(found) < len(pairs):
        raise InputError(f"--columns {words} names a column twice; give each once")
    return found


STARTS = ("true", "gaussian", "orthogonal")  # of --init_lora_weights: those that leave the base as it is


@dataclass
class LoraArguments:
    """Shape of a new adapter (SFT and reward model; PPO continues the SFT adapter)."""

    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapter while training."})
    lora_target_modules: str = field(
        default="all-linear",
        metadata={
            "help": "Layers that get an adapter: names joined by | or a comma, or all-linear.",
            "aliases": ["--lora_target_models"],
        },
    )
    lora_target_parameters: str | None = field(
        default=None,
        metadata={
            "help": "Weights of experts that get an adapter besides: names joined by | or a comma, such as "
            "mlp.experts.down_proj.  Needs --lora_dropout 0."
        },
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead (rsLoRA): for high ranks."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Learn the length of each row of the weights by itself (DoRA); slower."}
    )
    init_lora_weights: str = field(
        default="true",
        metadata={
            "help": "How the adapter starts: true (PEFT's default) or gaussian, which both add nothing at first, or "
            "orthogonal."
        },
    )

    def __post_init__(self) -> None:
        self.init_lora_weights = self.init_lora_weights.lower()
        if self.init_lora_weights not in STARTS:
            raise InputError(
                f"--init_lora_weights is {self.init_lora_weights}; give one of {', '.join(STARTS)}: starts that change the "
                "base (PiSSA, OLoRA, CorDA, LoftQ) change it for all adapters on it"
            )
        if self.init_lora_weights == "orthogonal" and self.lora_r % 2:
            raise InputError(f"--init_lora_weights orthogonal needs an even --lora_r; it is {self.lora_r}")
        if self.lora_r < 1 or self.lora_alpha < 1:
            raise InputError(f"--lora_r {self.lora_r} and --lora_alpha {self.lora_alpha} have to be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout is {self.lora_dropout}; give a share from 0 up to, not including, 1")


@dataclass
class PlanArguments:
    """Whether to train at all."""

    plan: bool = field(
        default=False, metadata={"help": "Only print how much memory the run would need, part by part; writes nothing."}
    )


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Each argument in one spelling; the parser takes --x-y for --x_y too."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        action = copy.copy(action)
        action.option_strings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        return super()._format_action_invocation(action)


class _Parser(HfArgumentParser):
    """HfArgumentParser whose complaints are InputErrors, so that they end in one line like every other one."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")

    def withhold(self, names: set[str]) -> None:
        """Leave arguments out of --help, and their defaults to the dataclass: what is parsed for them was given."""
        for action in self._actions:
            if action.dest in names or (action.nargs == 0 and action.const is False):  # --no_x
                action.help = argparse.SUPPRESS
            if action.dest in names:
                action.default = argparse.SUPPRESS
                action.type = action.choices = None  # whatever the value is, it is refused for its name

    def sort_into_sections(self) -> None:
        """What `SECTIONS` names in its order, behind --help and --config; the Trainer's other arguments at the end."""
        section_of = {name: title for title, names in SECTIONS.items() for name in names.split()}
        place = {name: number for number, name in enumerate(section_of)}
        actions = {"": [], **{title: [] for title in SECTIONS}, "of the Trainer": []}
        for action in sorted(self._actions, key=lambda action: place.get(action.dest, len(place))):
            first = "" if action.dest in ("help", "config") else "of the Trainer"
            actions[section_of.get(action.dest, first)].append(action)
        self._optionals._group_actions = actions.pop("")
        for title, group in actions.items():
            self.add_argument_group(title)._group_actions = group


def withheld(kind: type) -> set[str]:
    """Arguments that a dataclass has from its library and does not offer.

    What this toolkit's own classes declare is offered, and of the rest what the class names in `offered`, one string.
    """
    if not hasattr(kind, "offered"):
        return set()
    ours = [each for each in kind.__mro__ if not each.__module__.startswith(("transformers.", "trl."))]
    own = {name for each in ours for name in vars(each).get("__annotations__", {})}
    return {each.name for each in dataclasses.fields(kind)} - own - set(kind.offered.split())


def read_yaml(path: str) -> dict[str, Any]:
    """The YAML mapping at `path`.  Raises InputError when the file is missing, is not YAML or is not a mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except OSError as error:
        raise InputError(
            f"cannot read the configuration {path}: {error.strerror}; give --config an existing file"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: broken UTF-8, or 2026-13-45 for a date
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}; correct the file") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds a {type(config).__name__}, not 'key: value' lines; correct the file")
    return config


def as_words(config: dict[str, Any]) -> list[str]:
    """A mapping as command-line words.

    A null value leaves the default; a list becomes several words; a mapping becomes JSON, as TrainingArguments takes it.
    """
    words = []
    for key, value in config.items():
        if isinstance(value, dict):
            words.append(f"--{key}={json.dumps(value, default=str)}")
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words.append(f"--{key}={value}")
    return words


def parse_arguments(
    kinds: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Read `argv` (default: the command line), with `--config FILE.yaml` in front of it, into one object a dataclass.

    Raises InputError on an unknown or malformed argument.  --help prints and exits with 0, as argparse does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    config_parser = _Parser([], add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", help="YAML file with any of these arguments; the command line overrides it.")
    path, words = config_parser.parse_known_args(words)
    config = {} if path.config is None else read_yaml(path.config)
    words = as_words(config) + words
    parser = _Parser(
        kinds,
        parents=[config_parser],
        allow_abbrev=False,
        description=description,
        usage="%(prog)s [--config FILE.yaml] [--ARGUMENT VALUE ...]",
        formatter_class=_Help,
    )
    hidden = set().union(*map(withheld, kinds))
    parser.withhold(hidden)
    if any(hasattr(kind, "offered") for kind in kinds):
        parser.sort_into_sections()
    given, unknown = parser.parse_known_args(words)
    unknown = [f"--{name}" for name in vars(given) if name in hidden] + unknown
    known = [option for action in parser._actions if action.dest not in hidden for option in action.option_strings]
    unknown += [f"--{key}" for key, value in config.items() if value is None and f"--{key}" not in known]
    if unknown:
        name = unknown[0].split("=")[0]
        instead = INSTEAD.get(name.removeprefix("--").replace("-", "_"))
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {close[0]}?" if close else "see --help"
        raise InputError(f"{name} is not offered here: {instead}" if instead else f"unknown argument {name}; {advice}")
    try:
        parsed = parser.parse_dict(vars(given), allow_extra_keys=True)  # extra: --config, which has done its work
    except json.JSONDecodeError as error:  # the one argument that takes JSON
        raise InputError(
            f"--lr_scheduler_kwargs is {given.lr_scheduler_kwargs}; give JSON such as '{{\"num_cycles\": 2}}'"
        ) from error
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:  # how TrainingArguments complains
        raise InputError(f"{one_line(error)}; see --help") from error
    for args in parsed:
        if isinstance(args, TrainingArguments):
            check_trainer_arguments(args)
    warn_of_idle(parsed, hidden)
    return parsed


def warn_of_idle(parsed: Sequence[Any], hidden: set[str]) -> None:
    """One line for each argument that was changed and has no effect beside the others."""
    values = {name: value for args in parsed for name, value in vars(args).items()}
    defaults = {each.name: each.default for args in parsed for each in dataclasses.fields(args)}
    for names, needed, is_met in NEEDS:
        changed = [name for name in names.split() if name in defaults and values[name] != defaults[name]]
        for name in changed:
            if name not in hidden and not is_met(SimpleNamespace(**values)):
                say(f"warning: --{name} has no effect here; it needs {needed}")


def check_trainer_arguments(args: TrainingArguments) -> None:
    """Refuse numbers that the Trainer takes without a word and then fails with, or trains nothing.  Raises InputError."""
    sizes = "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps"
    check_numbers(
        args,
        above_0=f"{sizes} num_train_epochs logging_steps save_steps eval_steps adam_epsilon ddp_timeout",
        from_0="learning_rate weight_decay max_grad_norm warmup_steps eval_delay neftune_noise_alpha",
    )
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; give a share from 0 up to, not including, 1")
    if args.save_total_limit is not None and args.save_total_limit < 1:
        raise InputError(
            f"--save_total_limit is {args.save_total_limit}; give a number above 0, or leave it out for all"
        )
    if args.max_steps == 0 or args.max_steps < -1:
        raise InputError(f"--max_steps is {args.max_steps}; give a number above 0, or -1 to count epochs")
    for name in ("seed", "data_seed"):  # numpy's range
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < 2**32:
            raise InputError(f"--{name} is {getattr(args, name)}; give a number from 0 to {2**32 - 1}")
    if args.fp16 and args.device.type == "cpu":
        raise InputError("--fp16 true needs a GPU; leave it out on a CPU")
    check_optimizer(args)
    metrics = getattr(args, "eval_metrics", "").split()
    wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metrics and wanted not in metrics:
        raise InputError(f"--metric_for_best_model {wanted} is no metric of an evaluation; give {', '.join(metrics)}")
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise InputError("--save_strategy best needs evaluations; add --eval_strategy steps, or epoch")


def check_optimizer(args: TrainingArguments) -> None:
    """Refuse an optimizer that this toolkit was not tried with, and a schedule that cannot be made.  Raises InputError."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in (*OPTIMIZERS, *OF_BITSANDBYTES):
        raise InputError(
            f"--optim {optimizer} is not offered; give one of {', '.join((*OPTIMIZERS, *OF_BITSANDBYTES))}"
        )
    if optimizer in OF_BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"--optim {optimizer} needs bitsandbytes; run `pip install -r requirements-4bit.txt`")
    schedule, options = args.lr_scheduler_type, args.lr_scheduler_kwargs
    if schedule in NO_SCHEDULES:
        raise InputError(f"--lr_scheduler_type {schedule.value} is not offered; give cosine, linear or constant")
    if options is not None and not isinstance(options, dict):
        raise InputError(f"--lr_scheduler_kwargs is {options}; give JSON such as '{{\"num_cycles\": 2}}'")
    try:
        get_scheduler(schedule, torch.optim.SGD([torch.zeros(1)]), 1, 2, options)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--lr_scheduler_type {schedule.value} cannot be made of --lr_scheduler_kwargs {options}: {one_line(error)}"
        ) from error
    if options and schedule in ("constant", "constant_with_warmup"):
        raise InputError(f"--lr_scheduler_type {schedule.value} takes no --lr_scheduler_kwargs; leave them out")


def default_autocast(training_args: TrainingArguments) -> None:
    """Decide bf16 where the user did not: on a GPU that has it, unless fp16 was asked for.

    Has to run before TrainingArguments.__post_init__, which copies the answer to where accelerate reads it.
    """
    if training_args.bf16 is None:
        on_gpu = torch.cuda.is_available() and not training_args.use_cpu
        training_args.bf16 = on_gpu and not training_args.fp16 and torch.cuda.is_bf16_supported()


def set_up_ddp(training_args: TrainingArguments) -> None:
    """Tell DDP that every trainable parameter gets a gradient in each step, unless the user said something else.

    Left to look for itself, it takes what one forward pass does not use for unused, and fails where a step has several.
    """
    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False


def choose_precision(model_args: ModelArguments, training_args: TrainingArguments) -> torch.dtype:
    """Type of the frozen base weights, as torch.dtype; `auto` is bfloat16 under bfloat16 autocast on a GPU, else float32.

    The adapters and heads stay float32: small updates vanish in bfloat16.  On a CPU bfloat16 is about three times slower.
    """
    on_gpu = training_args.device.type == "cuda"
    training_args.dataloader_pin_memory = on_gpu  # elsewhere it only warns
    if model_args.dtype != "auto":
        return getattr(torch, model_args.dtype)
    return torch.bfloat16 if on_gpu and training_args.bf16 else torch.float32


def check_evaluation(training_args: TrainingArguments, has_rows: bool) -> None:
    """Refuse a run that is to evaluate and has nothing held out.  Raises InputError."""
    if (training_args.eval_strategy != "no" or training_args.eval_on_start) and not has_rows:
        raise InputError(
            "--eval_strategy and --eval_on_start need held-out rows; give --eval_dataset or an --eval_fraction above 0"
        )


def check_batches(training_args: TrainingArguments, rows: int) -> None:
    """Refuse a run whose only batch would be dropped.  Raises InputError."""
    size = training_args.per_device_train_batch_size * training_args.world_size
    if training_args.dataloader_drop_last and rows < size:
        raise InputError(
            f"--dataloader_drop_last true leaves nothing to train on: {rows} rows are fewer than the {size} of a batch; "
            "leave it out, or lower --per_device_train_batch_size"
        )


def check_new_folder(folder: str, advice: str = "", argument: str = "--output_dir") -> None:
    """Refuse an output folder that already holds something.  Raises InputError, which ends in `advice`."""
    if os.path.isdir(folder) and os.listdir(folder):
        raise InputError(f"the output folder {folder} is not empty; give another {argument}{advice}")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"the output folder {folder} is a file; give another {argument}")
    place = os.path.abspath(folder)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(
            f"the output folder {folder} cannot be made: no write access to {place}; give another {argument}"
        )


def check_output_dir(training_args: TrainingArguments) -> None:
    """Refuse an output folder that already holds something, unless the run resumes.  Raises InputError."""
    resumes = str(training_args.resume_from_checkpoint or False).lower() != "false"
    if is_main_process() and not resumes:
        check_new_folder(training_args.output_dir, ", or --resume_from_checkpoint true to go on with the run in it")
