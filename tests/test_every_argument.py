"""Every argument of the three training scripts takes effect, or is refused in one line.

The libraries bring some 120 arguments; tried one by one, a dozen of them ended in a traceback (--packing, --eos_token,
--load_best_model_at_end in stage 3 ...), and some did nothing (--label_smoothing_factor in stage 3).  Here each argument of
each script has its place: refused, seen in a run of this file, or shown by a test of another file.
"""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from transformers import training_args
from transformers.integrations.neftune import activate_neftune

import reward_modeling
import rl_training
import sft_training
from runs.trainer import ResumableTrainer
from tests.conftest import write_rows
from tests.helpers import Stages, make_ppo_trainer
from utils.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    PlanArguments,
    parse_arguments,
    withheld,
)
from utils.console import InputError
from utils.files import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sft": sft_training, "reward": reward_modeling, "ppo": rl_training}
KINDS = {
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
MODEL = ["--model_name_or_path", "m"]


def names_of(stage: str) -> tuple[set[str], set[str]]:
    """Arguments that a script offers, and those that its libraries have besides."""
    hidden = set().union(*map(withheld, KINDS[stage]))
    taken = {each.name for kind in KINDS[stage] for each in dataclasses.fields(kind) if each.init}
    return taken - hidden, hidden


# ---------------------------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------------------------


def other_value(kind: type, name: str) -> str:
    """A word that is not the default of a field."""
    each = next(each for each in dataclasses.fields(kind) if each.name == name)
    if isinstance(each.default, bool):
        return str(not each.default)
    return str(each.default + 1) if isinstance(each.default, (int, float)) else "1"


@pytest.mark.parametrize("stage", SCRIPTS)
def test_what_is_not_offered_is_refused_in_one_line(stage: str, tmp_path: Path) -> None:
    _, hidden = names_of(stage)
    assert len(hidden) > 60
    for number, name in enumerate(sorted(hidden)):
        value = other_value(KINDS[stage][-2], name)
        words = [[f"--{name}", value], [f"--{name.replace('_', '-')}={value}"], ["--config", str(tmp_path / "a.yaml")]]
        (tmp_path / "a.yaml").write_text(f"{name}: '{value}'\n", encoding="utf-8")
        with pytest.raises(InputError, match=rf"^(unknown argument )?--{name}( is not offered here: |; )") as caught:
            parse_arguments(KINDS[stage], [*MODEL, *words[number % 3]])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        ("sft", "--packing true", "--packing is not offered here: each row is one prompt and one reply"),
        ("sft", "--eos_token x", "--eos_token is not offered here: set it in the tokenizer of the base"),
        ("sft", "--gradient_checkpointing true", "it is called --activation_checkpointing$"),
        ("ppo", "--load_best_model_at_end true", "the guard keeps the best policy in best/$"),
        ("ppo", "--save_strategy best", "--save_strategy best: the guard keeps the best policy in best/; give steps"),
        ("ppo", "--label_smoothing_factor 0.1", "--label_smoothing_factor is not offered here"),
        ("reward", "--use_liger_kernel true", "unknown argument --use_liger_kernel"),
        ("sft", "--fp16 true", "--fp16 true needs a GPU; leave it out on a CPU"),
        ("sft", "--tf32 true", "--tf32 requires Ampere"),
        ("sft", "--optim galore_adamw", "--optim galore_adamw is not offered; give one of adamw_torch, "),
        ("sft", "--lr_scheduler_type greedy --eval_strategy steps", "--lr_scheduler_type greedy is not offered; give "),
        ("sft", "--lr_scheduler_type warmup_stable_decay", "warmup_stable_decay cannot be made of .*num_decay_steps"),
        ("ppo", "--lr_scheduler_type cosine_with_min_lr", "cosine_with_min_lr cannot be made of .*min_lr"),
        ("ppo", '--lr_scheduler_kwargs {"cycles":1}', "linear cannot be made of .*'cycles'"),
        ("ppo", '--lr_scheduler_kwargs {"cycles"', '--lr_scheduler_kwargs is {"cycles"; give JSON such as'),
        ("ppo", "--lr_scheduler_kwargs 3", "--lr_scheduler_kwargs is 3; give JSON such as"),
        (
            "sft",
            '--lr_scheduler_type constant_with_warmup --lr_scheduler_kwargs {"a":1}',
            "constant_with_warmup takes no --lr_scheduler_kwargs",
        ),
        ("reward", "--save_strategy best --eval_strategy no", "--save_strategy best needs evaluations; add --eval_str"),
        (
            "reward",
            "--load_best_model_at_end true --save_steps 200 --metric_for_best_model f1",
            "--metric_for_best_model f1 is no metric of an evaluation; give loss, accuracy",
        ),
        ("sft", "--adam_beta1 1", "--adam_beta1 is 1.0; give a share from 0 up to, not including, 1"),
        ("sft", "--adam_epsilon -1", "--adam_epsilon is -1.0; give a number above 0"),
        ("ppo", "--ddp_timeout 0", "--ddp_timeout is 0; give a number above 0"),
        ("sft", "--neftune_noise_alpha -1", "--neftune_noise_alpha is -1.0; give 0 or a number above it"),
        ("ppo", "--save_total_limit 0", "--save_total_limit is 0; give a number above 0"),
    ],
)
def test_what_the_trainer_fails_with_later_is_refused_at_once(stage: str, words: str, message: str) -> None:
    """Each of these was a traceback, most of them after the model was loaded; --lr_scheduler_kwargs was not even named."""
    with pytest.raises(InputError, match=message):
        parse_arguments(KINDS[stage], [*MODEL, "--use_cpu", "true", *words.split()])


def test_an_optimizer_of_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match="--optim adamw_8bit needs bitsandbytes; run `pip install -r requirements-4bit"
    ):
        parse_arguments(KINDS["sft"], [*MODEL, "--use_cpu", "true", "--optim", "adamw_8bit"])


def test_rows_that_would_all_be_dropped(base_path: str, data: dict[str, str], tmp_path: Path) -> None:
    """--dataloader_drop_last with fewer rows than a batch holds trained on nothing, and said so with a traceback."""
    words = ["--model_name_or_path", base_path, "--dataset", data["sft"], "--output_dir", str(tmp_path / "run")]
    words += ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "13"]
    with pytest.raises(InputError, match="leaves nothing to train on: 12 rows are fewer than the 13 of a batch"):
        start("sft", words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "words", "warning"),
    [
        ("sft", "--eval_steps 5", "--eval_steps has no effect here; it needs --eval_strategy steps"),
        ("sft", "--eval_strategy epoch --eval_delay 1", None),
        ("sft", "--eval_delay 1", "--eval_delay has no effect here; it needs an --eval_strategy"),
        ("sft", "--save_strategy no --save_steps 5", "--save_steps has no effect here"),
        ("ppo", "--save_strategy no --save_freq 5", "--save_freq has no effect here"),
        ("ppo", "--save_strategy no", None),
        ("ppo", "--save_strategy no --save_total_limit 5", "--save_total_limit has no effect here"),
        ("sft", "--logging_strategy epoch --logging_steps 5", "--logging_steps has no effect here"),
        (
            "sft",
            "--num_train_epochs 5 --max_steps 5",
            "--num_train_epochs has no effect here; it needs leaving out --max",
        ),
        ("sft", "--metric_for_best_model entropy", "--metric_for_best_model has no effect here"),
        ("sft", "--optim sgd --adam_beta1 0.5", "--adam_beta1 has no effect here; it needs an AdamW"),
        ("ppo", "--lr_scheduler_type constant --warmup_steps 5", "--warmup_steps has no effect here"),
        ("ppo", "--run_name x", "--run_name has no effect here; it needs a tracker"),
        ("ppo", "--run_name x --log_with tensorboard", None),
        ("ppo", "--project x --log_with tensorboard", "--project has no effect here"),
        ("reward", "--eval_dataset x --eval_fraction 0.3", "--eval_fraction has no effect here"),
        ("reward", "--eval_dataset_split x", "--eval_dataset_split has no effect here"),
        ("sft", f"--dataset {__file__} --dataset_split x", "--dataset_split has no effect here"),
        ("sft", "--dataset on/the_hub --dataset_split x", None),
        ("reward", "--degenerate_kinds empty --degenerate_ratio 0", "--degenerate_kinds has no effect here"),
        ("reward", "--output_max_length 5", "--output_max_length has no effect here; it needs --sft_model_lora_path"),
        (
            "reward",
            "--ensemble_penalty 5",
            "--ensemble_penalty has no effect here; it needs an --ensemble_size above 1",
        ),
        ("ppo", "--adap_kl_target 5", "--adap_kl_target has no effect here; it needs --adap_kl_ctrl true"),
        ("ppo", "--target_kl 5", "--target_kl has no effect here; it needs --early_stopping true"),
        ("ppo", "--guard off --kl_budget 5", "--kl_budget has no effect here; it needs a --guard"),
        ("ppo", "--advantage rloo --value_coef 1", "--value_coef has no effect here; it needs --advantage gae"),
        ("ppo", "--divide_by_std false", "--divide_by_std has no effect here; it needs --advantage grpo"),
        ("ppo", "--merged_sft_model_path x", "--merged_sft_model_path has no effect"),
        ("ppo", "--batched_gen true", "--batched_gen has no effect"),
    ],
)
def test_what_has_no_effect_beside_the_others_is_named(
    stage: str, words: str, warning: str | None, capsys: pytest.CaptureFixture
) -> None:
    parse_arguments(KINDS[stage], [*MODEL, "--use_cpu", "true", *words.split()])
    shown = capsys.readouterr().err
    assert shown.startswith(f"warning: {warning}") if warning else shown == ""


# ---------------------------------------------------------------------------------------------------------------------
# Seen in a run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run did, noted while it went on."""

    folder: Path
    trainer: ResumableTrainer | None = None
    rates: dict[int, float] = field(default_factory=dict)  # learning rate of each step
    batches: list[Any] = field(default_factory=list)  # what each pass was given
    clips: set[float] = field(default_factory=set)  # norms that gradients were clipped to
    asked: set[int] = field(default_factory=set)  # prompts of the data sets that PPO's policy responded to as a whole
    verbosity: int = 0
    mixed_precision: str = ""
    deterministic: bool = False
    coefficients: set[float] = field(default_factory=set)  # of the reward model's centering, and of NEFTune's noise
    first_weights: float = 0.0  # sum of the adapter's first matrices before the first step

    def steps(self, key: str) -> list[int]:
        """The steps of the lines of metrics.jsonl that have this key."""
        rows = read_jsonl(str(self.folder / "metrics.jsonl"))
        return [row.get("step", row.get("iteration")) for row in rows if key in row]

    def evaluations(self) -> list[int]:
        """The steps that were evaluated; the last one may have been twice."""
        return sorted(set(self.steps("eval_kl" if isinstance(self.trainer, rl_training.PPOTrainer) else "eval_loss")))

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.partition("-")[2]) for path in self.folder.glob("checkpoint-*"))

    def group(self) -> dict[str, Any]:
        """The optimizer's options for LoRA's matrices."""
        return self.trainer.optimizer.param_groups[0]

    def order(self, size: int) -> list[set[int]]:
        """Numbers of the training rows of the first epoch, in steps of `size`; inside a step they may be sorted."""
        if isinstance(self.trainer, rl_training.PPOTrainer):
            rows = [row["index"] for batch in self.batches for row in batch]
        else:
            column = "chosen_ids" if isinstance(self.trainer, reward_modeling.RewardTrainer) else "input_ids"
            number_of = {tuple(ids): number for number, ids in enumerate(self.trainer.train_dataset[column])}
            rows = [number_of[ids] for batch in self.batches for ids in examples(batch)]
        rows = rows[: len(self.trainer.train_dataset)]
        return [set(rows[start : start + size]) for start in range(0, len(rows), size)]


def examples(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """Token ids of each example of a batch, without the padding; of a pair the chosen side."""
    count = len(batch["lengths"]) if "lengths" in batch else len(batch["input_ids"])
    masks = batch["attention_mask"][:count].bool()
    return [tuple(row[mask].tolist()) for row, mask in zip(batch["input_ids"][:count], masks, strict=True)]


def random_order(seed: int, count: int, size: int) -> list[set[int]]:
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [set(rows[start : start + size]) for start in range(0, count, size)]


def start(stage: str, words: list[str]) -> Run:
    """Run the script's main() in this process; what it changes for the whole process is taken back."""
    script: ModuleType = SCRIPTS[stage]
    run = Run(Path(words[words.index("--output_dir") + 1]))

    def noted_train(train: Callable) -> Callable:
        def note(trainer: ResumableTrainer, *args: Any, **kwargs: Any) -> Any:
            run.trainer, run.verbosity = trainer, transformers.logging.get_verbosity()
            run.mixed_precision = trainer.accelerator.mixed_precision  # accelerate forgets it with the next trainer
            run.deterministic = torch.are_deterministic_algorithms_enabled()
            run.first_weights = float(
                sum(p.detach().sum() for n, p in trainer.model.named_parameters() if ".lora_A." in n)
            )
            return train(trainer, *args, **kwargs)

        return note

    def noted_step(step: Callable) -> Callable:
        def note(trainer: ResumableTrainer, model: Any, inputs: Any, *args: Any) -> Any:
            run.rates[trainer.state.global_step] = round(trainer.optimizer.param_groups[0]["lr"], 9)
            run.batches.append(inputs)
            return step(trainer, model, inputs, *args)

        return note

    def noted_clip(clip: Callable) -> Callable:
        def note(accelerator: Accelerator, parameters: Any, max_norm: float, *args: Any) -> Any:
            run.clips.add(max_norm)
            return clip(accelerator, parameters, max_norm, *args)

        return note

    def noted_prompts(respond: Callable) -> Callable:
        def note(trainer: ResumableTrainer, dataset: Dataset, *args: Any) -> Any:
            run.asked.add(len(dataset))
            return respond(trainer, dataset, *args)

        return note

    def noted_coefficient(function: Callable, place: int) -> Callable:
        def note(*args: Any) -> Any:
            run.coefficients.add(args[place])
            return function(*args)

        return note

    verbosity = transformers.logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(ResumableTrainer, "train", noted_train(ResumableTrainer.train))
        for kind in (ResumableTrainer, rl_training.PPOTrainer):
            patch.setattr(kind, "training_step", noted_step(kind.training_step))
        patch.setattr(Accelerator, "clip_grad_norm_", noted_clip(Accelerator.clip_grad_norm_))
        patch.setattr(rl_training.PPOTrainer, "respond_to_all", noted_prompts(rl_training.PPOTrainer.respond_to_all))
        patch.setattr(reward_modeling, "pairwise_loss", noted_coefficient(reward_modeling.pairwise_loss, 2))
        patch.setattr(transformers.trainer, "activate_neftune", noted_coefficient(activate_neftune, 1))
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(run.folder / "tensorboard"))
        patch.setattr(sys, "argv", [f"{script.__name__}.py", "--use_cpu", "true", *words])
        try:
            script.main()
        finally:
            transformers.logging.set_verbosity(verbosity)
            torch.use_deterministic_algorithms(False)
    return run


def rows_for(stage: str) -> list[dict[str, str]]:
    if stage == "sft":
        return [{"prompt": f"{i} good?", "response": "yes" + "!" * (i % 4)} for i in range(16)]
    return [{"prompt": f"{i} good?", "chosen": "yes" + "!" * (i % 4), "rejected": "no" * (i + 1)} for i in range(16)]


def needed(stage: str, stages: Stages, folder: Path) -> list[str]:
    """What a run of a stage has to have beside its rows."""
    words = ["--model_name_or_path", stages.base, "--max_length", "64", "--output_dir", str(folder / "run")]
    if stage == "reward":
        words += ["--degenerate_ratio", "0", "--probe_prompts", "1"]
    if stage == "ppo":
        reward = shutil.copytree(stages.reward, folder / "reward")
        (reward / "reward_card.json").write_text('{"passed": true, "score_mean": 3.0, "score_std": 2.0}')
        words += ["--sft_model_lora_path", stages.sft, "--reward_model_lora_path", str(reward)]
        words += ["--output_max_length", "4", "--guard", "off", "--ppo_epochs", "1"]
    return words


def as_words(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


# ---- As good as nothing given ----


@pytest.fixture(scope="module")
def plain(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs with no more than they need: 12 rows to train on, 4 held out."""
    runs = {}
    for stage in SCRIPTS:
        folder, rows = tmp_path_factory.mktemp(stage), rows_for(stage)
        words = [*needed(stage, stages, folder), "--dataset", write_rows(folder / "rows.jsonl", rows[:12])]
        words += ["--eval_dataset", write_rows(folder / "held_out.jsonl", rows[12:])]
        runs[stage] = start(stage, [*words, *(("--steps", "2", "--batch_size", "4") if stage == "ppo" else ())])
    return runs


# ---- Many arguments at once ----

MANY = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler_kwargs": '{"num_cycles":2}',
    "warmup_steps": 1,
    "optim": "adamw_torch",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "prompt_template": "Q{prompt}A",
    "bf16": "true",
    "activation_checkpointing": "true",
    "log_level": "error",
    "report_to": "tensorboard",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_delay": 3,
    "eval_on_start": "true",
    "per_device_eval_batch_size": 1,
    "save_total_limit": 2,
    "seed": 7,
    "data_seed": 3,
    "full_determinism": "true",
    "disable_tqdm": "true",
}
MANY_OF_FIRST = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "logging_steps": 2,
    "logging_first_step": "true",
    "save_steps": 1,
}
MANY_OF_PPO = {"steps": 5, "save_freq": 1, "batch_size": 5, "mini_batch_size": 5, "guard": "warn", "guard_prompts": 2}
MANY_OF_PPO["normalize_scores"] = "false"
# One step of warmup, then twice half a cosine from 1e-3 down to 0, in two steps each.
RATES = {0: 0.0, 1: 1e-3, 2: 5e-4, 3: 1e-3, 4: 5e-4}


@pytest.fixture(scope="module")
def many(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs with all of `MANY`: on a save_to_disk folder with 10 rows in the split "ours", and 3 held out in "theirs"."""
    runs = {}
    for stage in SCRIPTS:
        folder, rows = tmp_path_factory.mktemp(stage), rows_for(stage)
        splits = {"train": rows[:1], "ours": rows[:10], "theirs": rows[10:13]}
        DatasetDict({name: Dataset.from_list(part) for name, part in splits.items()}).save_to_disk(folder / "rows")
        words = [*needed(stage, stages, folder), "--dataset", str(folder / "rows"), "--dataset_split", "ours"]
        words += ["--eval_dataset", str(folder / "rows"), "--eval_dataset_split", "theirs"]
        values = MANY | (MANY_OF_PPO if stage == "ppo" else MANY_OF_FIRST)
        runs[stage] = start(stage, [*words, *as_words(values)])
    return runs


def first_prompt(run: Run) -> str:
    """A prompt as the model sees it."""
    row = run.trainer.train_dataset[0]
    ids = row["chosen_ids"][: row["query_length"]] if "chosen_ids" in row else row["input_ids"]
    prompt = [i for i, label in zip(ids, row.get("labels", ids), strict=False) if "labels" not in row or label == -100]
    return run.trainer.processing_class.decode(prompt, skip_special_tokens=True)


def checkpoints_layers(run: Run) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in run.trainer.model.modules())


OF_ALL = {  # argument -> what is seen of it, and what that is in the runs of `many`
    "output_dir": (lambda run: run.folder.is_dir(), True),
    "learning_rate": (lambda run: run.rates, RATES),
    "lr_scheduler_type": (lambda run: run.rates, RATES),
    "lr_scheduler_kwargs": (lambda run: run.rates, RATES),
    "warmup_steps": (lambda run: run.rates, RATES),
    "optim": (lambda run: run.group()["fused"], None),  # adamw_torch_fused has True
    "weight_decay": (lambda run: run.group()["weight_decay"], 0.1),
    "adam_beta1": (lambda run: run.group()["betas"][0], 0.8),
    "adam_beta2": (lambda run: run.group()["betas"][1], 0.9),
    "adam_epsilon": (lambda run: run.group()["eps"], 1e-6),
    "max_grad_norm": (lambda run: run.clips, {0.5}),
    "prompt_template": (lambda run: first_prompt(run)[:: len(first_prompt(run)) - 1], "QA"),
    "bf16": (lambda run: run.mixed_precision, "bf16"),
    "activation_checkpointing": (checkpoints_layers, True),
    "log_level": (lambda run: run.verbosity, transformers.logging.ERROR),
    "report_to": (lambda run: any((run.folder / "tensorboard").glob("*tfevents*")), True),
    "per_device_eval_batch_size": (lambda run: len(run.trainer.get_eval_dataloader()), 3),
    "eval_strategy": (lambda run: run.evaluations(), [0, 4, 5]),  # the last one is after the training
    "eval_steps": (lambda run: run.evaluations(), [0, 4, 5]),
    "eval_delay": (lambda run: run.evaluations(), [0, 4, 5]),
    "eval_on_start": (lambda run: run.evaluations(), [0, 4, 5]),
    "save_total_limit": (lambda run: run.checkpoints(), [4, 5]),
    "full_determinism": (lambda run: run.deterministic, True),
    "disable_tqdm": (lambda run: run.trainer.args.disable_tqdm, True),
    "dataset": (lambda run: len(run.trainer.train_dataset), 10),
    "dataset_split": (lambda run: len(run.trainer.train_dataset), 10),
    "eval_dataset": (lambda run: len(run.trainer.eval_dataset), 3),
    "eval_dataset_split": (lambda run: len(run.trainer.eval_dataset), 3),
}
OF_FIRST = {
    "per_device_train_batch_size": (lambda run: len(examples(run.batches[0])), 2),
    "gradient_accumulation_steps": (lambda run: len(run.batches), 9),  # 2, 2 and 1 of the first epoch, 2 and 2
    "max_steps": (lambda run: run.trainer.state.max_steps, 5),
    "logging_steps": (lambda run: run.steps("grad_norm"), [1, 2, 4]),
    "logging_first_step": (lambda run: run.steps("grad_norm"), [1, 2, 4]),
    "save_steps": (lambda run: run.checkpoints(), [4, 5]),
    "data_seed": (lambda run: run.order(4), random_order(3, 10, 4)),
}
OF_PPO = {
    "steps": (lambda run: run.trainer.state.max_steps, 5),
    "save_freq": (lambda run: run.checkpoints(), [4, 5]),
    "batch_size": (lambda run: len(run.batches[0]), 5),
    "guard_prompts": (lambda run: run.asked, {2, 3}),  # the guard's and the held-out ones
    "normalize_scores": (
        lambda run: run.trainer.score_rules.statistics["reward_model"],
        (0.0, 1.0),
    ),  # and not those of the card
    "data_seed": (lambda run: run.order(5), random_order(3, 10, 5)),
}
SEEN_IN_MANY = {"sft": OF_ALL | OF_FIRST, "reward": OF_ALL | OF_FIRST, "ppo": OF_ALL | OF_PPO}


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, seen in SEEN_IN_MANY.items() for name in seen])
def test_it_has_its_effect(plain: dict[str, Run], many: dict[str, Run], stage: str, name: str) -> None:
    see, wanted = SEEN_IN_MANY[stage][name]
    assert see(many[stage]) == wanted
    assert name == "output_dir" or see(plain[stage]) != wanted  # it is not so by itself


# ---- The other ones of the first two stages ----

OTHERS = {
    "num_train_epochs": 2,
    "logging_strategy": "epoch",
    "eval_strategy": "epoch",
    "save_strategy": "best",
    "load_best_model_at_end": "true",
    "metric_for_best_model": "loss",
    "greater_is_better": "true",
    "train_sampling_strategy": "sequential",
    "dataloader_drop_last": "true",
    "per_device_train_batch_size": 5,
    "learning_rate": 0.003,
    "lora_r": 3,
    "lora_alpha": 5,
    "lora_dropout": 0.3,
    "lora_target_modules": "q_proj",
    "use_rslora": "true",
    "use_dora": "true",
    "init_lora_weights": "gaussian",
    "seed": 7,
}
OTHERS_OF = {
    "sft": {"neftune_noise_alpha": 100},
    "reward": {
        "train_subset": 11,
        "eval_subset": 2,
        "max_length": 36,
        "overlong_pairs": "cut",
        "probe_prompts": 2,
        "center_rewards_coefficient": 0.5,
    },
}


@pytest.fixture(scope="module")
def others(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs with all of `OTHERS`, on a folder with a folder of 13 rows to train on and one of 4 to evaluate."""
    runs = {}
    for stage, own in OTHERS_OF.items():
        folder, rows = tmp_path_factory.mktemp(stage), rows_for(stage)
        for name, part in (("many", [*rows[:12], rows[15]]), ("few", rows[:4])):
            (folder / "rows" / name).mkdir(parents=True)
            write_rows(folder / "rows" / name / "rows.jsonl", part)
        words = [*needed(stage, stages, folder), *as_words(OTHERS | own)]
        for name, part in (("dataset", "many"), ("eval_dataset", "few")):
            words += [f"--{name}", str(folder / "rows"), f"--{name}_data_dir", part]
        runs[stage] = start(stage, words)
    return runs


def card(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "reward_card.json").read_text(encoding="utf-8"))


OF_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights")


def layers(run: Run) -> dict[str, Any]:
    config = json.loads((run.folder / "adapter_config.json").read_text(encoding="utf-8"))
    return {name: config[name] for name in (*OF_LORA, "target_modules")}


def best_step(run: Run) -> int:
    """The checkpoint that the saved adapter is of."""
    weights = (run.folder / "adapter_model.safetensors").read_bytes()
    files = {step: run.folder / f"checkpoint-{step}" / "adapter_model.safetensors" for step in run.checkpoints()}
    return next((step for step, file in files.items() if file.read_bytes() == weights), None)


OF_OTHERS = {
    "num_train_epochs": (lambda run: run.trainer.state.max_steps, 4),
    "dataloader_drop_last": (lambda run: [len(examples(batch)) for batch in run.batches], [5, 5, 5, 5]),
    "logging_strategy": (lambda run: run.steps("grad_norm"), [2, 4]),
    "train_sampling_strategy": (lambda run: run.order(5)[:2], [set(range(5)), set(range(5, 10))]),
    # the loss falls, so the one that is called best is the first, and not the last
    "save_strategy": (lambda run: run.checkpoints(), [2]),
    "load_best_model_at_end": (lambda run: (best_step(run), run.trainer.state.max_steps), (2, 4)),
    "metric_for_best_model": (lambda run: run.trainer.state.best_global_step, 2),
    "greater_is_better": (lambda run: run.trainer.state.best_global_step, 2),
    "lora_r": (lambda run: layers(run)["r"], 3),
    "lora_alpha": (lambda run: layers(run)["lora_alpha"], 5),
    "lora_dropout": (lambda run: layers(run)["lora_dropout"], 0.3),
    "lora_target_modules": (lambda run: layers(run)["target_modules"], ["q_proj"]),
    "use_rslora": (lambda run: layers(run)["use_rslora"], True),
    "use_dora": (lambda run: layers(run)["use_dora"], True),
    "init_lora_weights": (lambda run: layers(run)["init_lora_weights"], "gaussian"),
}
OF_SFT = {
    "neftune_noise_alpha": (lambda run: run.coefficients, {100.0}),
    "dataset_data_dir": (lambda run: len(run.trainer.train_dataset), 13),
    "eval_dataset_data_dir": (lambda run: len(run.trainer.eval_dataset), 4),
}
OF_REWARD = {
    "center_rewards_coefficient": (lambda run: run.coefficients, {0.5}),
    "overlong_pairs": (lambda run: any(ids[-1] != 2 for ids in run.trainer.train_dataset["rejected_ids"]), True),
    "train_subset": (lambda run: len(run.trainer.train_dataset), 11),
    "eval_subset": (lambda run: len(run.trainer.eval_dataset), 2),
    "probe_prompts": (lambda run: max(card(run)["probe_counts"].values()), 2),
}
SEEN_IN_OTHERS = {"sft": OF_OTHERS | OF_SFT, "reward": OF_OTHERS | OF_REWARD}


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, seen in SEEN_IN_OTHERS.items() for name in seen])
def test_the_others_have_their_effect(plain: dict[str, Run], others: dict[str, Run], stage: str, name: str) -> None:
    see, wanted = SEEN_IN_OTHERS[stage][name]
    assert see(others[stage]) == wanted
    # the plain run of the reward model has two steps in all
    assert name in ("eval_dataset_data_dir", "save_strategy") or see(plain[stage]) != wanted


def test_a_seed_makes_another_adapter(plain: dict[str, Run], others: dict[str, Run], many: dict[str, Run]) -> None:
    for stage in OTHERS_OF:
        assert plain[stage].first_weights != many[stage].first_weights


# ---- PPO's own ----

CHANGES = {  # argument -> a value, with what it needs, and the metrics of the first iteration that it changes
    "seed": ({"seed": 1}, "score_mean response_length"),
    "output_max_length": ({"output_max_length": 2}, "response_length"),
    "temperature": ({"temperature": 0.5}, "entropy score_mean"),
    "repetition_penalty": ({"repetition_penalty": 3.0}, "entropy score_mean"),
    "begin_suppress_tokens": ({"begin_suppress_tokens": "5,6"}, "entropy"),
    "mini_batch_size": ({"mini_batch_size": 2}, "optimizer_steps"),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, "optimizer_steps"),
    "ppo_epochs": ({"ppo_epochs": 3}, "optimizer_steps"),
    "init_kl_coef": ({"init_kl_coef": 0.5}, "kl_coef"),
    "reward_baseline": ({"reward_baseline": 0.5}, "normalized_score_mean reward_mean"),
    "score_clip": ({"score_clip": 0.01}, "normalized_score_mean reward_mean"),
    "missing_eos_penalty": ({"missing_eos_penalty": 0.1}, "normalized_score_mean reward_mean"),
    "gamma": ({"gamma": 0.5}, "returns_mean"),
    "gae_lambda": ({"gae_lambda": 0.5}, "returns_mean"),
    "clip_range": ({"clip_range": 50.0}, "clip_fraction"),
    "value_clip_range": ({"value_clip_range": 0.001}, "value_clip_fraction"),
    "value_coef": ({"value_coef": 2.0}, "loss grad_norm"),
    "critic": ({"critic": "adapter"}, "value_loss"),
    "value_learning_rate": ({"value_learning_rate": 0.1}, "value_loss"),
    "value_warmup_iterations": ({"value_warmup_iterations": 1, "steps": 2}, "learning_rate"),
    "early_stopping": ({"early_stopping": True, "target_kl": 1e-6}, "stopped_early"),
    "target_kl": ({"early_stopping": True, "target_kl": 1e-6}, "optimizer_steps"),
    "adafactor": ({"adafactor": True}, "approx_kl"),
    "divide_by_std": ({"advantage": "grpo", "divide_by_std": False}, "policy_loss grad_norm"),
}


@pytest.fixture(scope="module")
def iteration(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, float]]:
    """Function arguments -> metrics of the first iteration."""

    def train(**arguments: Any) -> dict[str, float]:
        folder = tmp_path_factory.mktemp("ppo")
        arguments = {"steps": 1, "ppo_epochs": 1, "learning_rate": 0.02, "output_max_length": 3} | arguments
        make_ppo_trainer(stages, folder, **arguments).train()
        return read_jsonl(str(folder / "metrics.jsonl"))[0]

    return train


@pytest.fixture(scope="module")
def usual(iteration: Callable[..., dict[str, float]]) -> dict[str, float]:
    return iteration()


@pytest.mark.parametrize("name", CHANGES)
def test_ppos_own_arguments_change_what_they_are_for(
    iteration: Callable[..., dict[str, float]], usual: dict[str, float], name: str
) -> None:
    values, changed = CHANGES[name]
    metrics = iteration(**values)
    assert [metric for metric in changed.split() if metrics[metric] == pytest.approx(usual[metric], rel=1e-6)] == []


# ---------------------------------------------------------------------------------------------------------------------
# None is left out
# ---------------------------------------------------------------------------------------------------------------------

ELSEWHERE = {  # file -> arguments whose effect is its subject, or that it gives to a run in order to see it
    "test_arguments": "model_name_or_path log_with merged_sft_model_path batched_gen dtype",
    "test_baichuan": "trust_remote_code",
    "test_four_bit": "load_in_4bit",
    "test_memory_plan": "plan",
    "test_launch": "use_cpu",
    "test_resume": "resume_from_checkpoint adap_kl_ctrl adap_kl_target adap_kl_horizon",
    "test_nonfinite": "max_nonfinite_steps",
    "test_data": "eval_fraction columns train_on_turns",
    "test_trackers": "run_name project",
    "test_reward_training": "sft_model_lora_path degenerate_ratio degenerate_kinds exempt_probes "
    "length_penalty_coefficient ensemble_size ensemble_penalty output_max_length init_from_sft",
    "test_guarded_run": "reward_model_lora_path guard guard_freq guard_patience kl_budget",
    "test_always_true": "floor_broken_replies",
    "test_families": "lora_target_parameters",
    "test_gold": "gold_function",
    "test_reward_functions": "reward_function reward_weights",
    "test_reward_server": "reward_server",
    "test_ready_made": "reward_model reward_dtype reward_load_in_4bit reward_device reward_card card_only",
    "test_group_advantages": "advantage replies_per_prompt kl_in",
    "test_resume_changed": "prompt_date",
    "test_input_errors": "allow_weak_reward max_length",
}


@pytest.mark.parametrize("stage", SCRIPTS)
def test_each_argument_has_its_place(stage: str) -> None:
    """A new argument, of ours or of a new release of the Trainer that is offered, has to be tried somewhere."""
    offered, _ = names_of(stage)
    seen = set(SEEN_IN_MANY[stage]) | set(SEEN_IN_OTHERS.get(stage, ())) | (set(CHANGES) if stage == "ppo" else set())
    for file, names in ELSEWHERE.items():
        text = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        seen |= {name for name in names.split() if re.search(rf"\b{name}\b", text)}
    seen |= set(SEEN_IN_OTHERS["sft"]) & {"dataset_data_dir", "eval_dataset_data_dir"}  # one reader for all stages
    seen |= {"fp16", "tf32", "ddp_timeout", "local_rank", "seed", "save_strategy"}  # by tests of this file
    assert sorted(offered - seen) == []


class Reached(Exception):
    """Accelerate was asked for the processes."""


def test_timeout_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process waits for none, so what reaches accelerate is all there is to see."""

    def note(**options: Any) -> None:
        assert options["timeout"] == timedelta(seconds=5)
        raise Reached

    monkeypatch.setattr(training_args, "PartialState", note)
    for kind in (sft_training.SFTArguments, reward_modeling.RewardArguments, rl_training.PPOArguments):
        with pytest.raises(Reached):
            kind(output_dir="x", ddp_timeout=5)


def test_ppo_saves_at_the_end_of_an_epoch(stages: Stages, tmp_path: Path) -> None:
    """12 prompts are one batch of 8, and a rest: each iteration is an epoch."""
    make_ppo_trainer(stages, tmp_path, save_strategy="epoch", output_max_length=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_help_shows_ours_first_and_each_argument_once(capsys: pytest.CaptureFixture) -> None:
    """It listed 160 arguments in two spellings each, --no_x for many, and --sft_model_lora_path among the last ones."""
    for stage in SCRIPTS:
        with pytest.raises(SystemExit):
            parse_arguments(KINDS[stage], ["--help"])
        shown = capsys.readouterr().out
        options = re.findall(r"^  (?:-h, )?--(\S+?),?(?: |$)", shown, re.MULTILINE)
        offered, _ = names_of(stage)
        assert sorted(options) == sorted([*offered, "help", "config"])
        sections = re.findall(r"^(\S.*):$", shown, re.MULTILINE)
        assert sections[:3] == ["options", "what to train", "on what"]
        assert sections[-1] == "of the Trainer"
        of_trainer = re.findall(r"^  --(\w+)", shown[shown.index("of the Trainer:") :], re.MULTILINE)
        ours = {each.name for kind in KINDS[stage] for each in dataclasses.fields(kind)} - set(
            transformers.TrainingArguments.__dataclass_fields__
        )
        assert ours & set(of_trainer) <= {"neftune_noise_alpha"}
