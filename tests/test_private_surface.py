"""The private members of other libraries that the toolkit uses: one list, for whoever raises a pin.

What starts with an underscore may move in any release.  The first test fails when one has moved, and names the file of ours
to look at; the second when somebody starts to use another one without putting it here.
"""

import argparse
import ast
import inspect
from pathlib import Path

import accelerate.state
import pytest
import torch._subclasses.fake_tensor
import torch.utils._python_dispatch
import torch.utils._pytree
import transformers.integrations.deepspeed
import transformers.integrations.integration_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedConfig, Trainer
from trl import SFTTrainer

from tests.house import ROOMS, ROOT, files_of

TRACKERS = transformers.integrations.integration_utils
PRIVATE: dict[str, tuple[object, tuple[str, ...]]] = {  # file of ours -> members by their owner
    "runs/trainer.py": (
        Trainer,
        (
            "_run_epoch",
            "_tr_loss",
            "_total_loss_scalar",
            "_globalstep_last_logged",
            "_save_checkpoint",
            "_get_output_dir",
            "_get_dataloader",
            "_load_optimizer_and_scheduler",
            "_save_rng_state",
            "_get_grad_norm",
            "_determine_best_metric",
        ),
    ),
    "rl_training.py": (
        Trainer,
        (
            "_clip_grad_norm",
            "_get_grad_norm",
            "_get_learning_rate",
            "_load_from_checkpoint",
            "_load_optimizer_and_scheduler",
        ),
    ),
    "rl_training.py: gradient_state": (accelerate.state.GradientState, ("_set_sync_gradients",)),
    "reward_modeling.py": (Trainer, ("_prepare_inputs",)),
    "sft_training.py": (SFTTrainer, ("_metrics", "_total_train_tokens")),
    "reporting/trackers.py: wandb": (TRACKERS.WandbCallback, ("_wandb",)),
    "reporting/trackers.py: trackio": (TRACKERS.TrackioCallback, ("_trackio",)),
    "lora/adapters.py": (BaseTunerLayer, ("_active_adapter", "_get_available_adapters")),
    "lora/adapters.py: wrappers": (
        AuxiliaryTrainingWrapper,
        ("_active_adapter", "_adapters", "_get_available_adapters"),
    ),
    "lora/adapters.py: names": (PreTrainedConfig(), ("_name_or_path",)),
    "lora/sharding.py": (transformers.integrations.deepspeed, ("_hf_deepspeed_config_weak_ref",)),
    "runs/memory_plan.py: modules": (torch.nn.Linear(1, 1), ("_buffers", "_parameters")),
    "runs/memory_plan.py: storages": (torch.UntypedStorage, ("_cdata",)),
    "utils/arguments.py": (argparse.ArgumentParser(), ("_actions", "_optionals")),
    "runs/memory_plan.py: fake tensors": (torch._subclasses.fake_tensor, ("FakeTensorMode",)),
    "runs/memory_plan.py: dispatch": (torch.utils._python_dispatch, ("TorchDispatchMode",)),
    "runs/memory_plan.py: experts": (torch.ops.aten, ("_grouped_mm",)),
    "runs/memory_plan.py: trees": (torch.utils._pytree, ("tree_leaves",)),
}


def has(owner: object, name: str) -> bool:
    """Whether a class or module has the member, one that only __init__ or another method sets included."""
    if hasattr(owner, name):
        return True
    classes = inspect.getmro(owner)[:-1] if inspect.isclass(owner) else []
    return any(f"self.{name} =" in inspect.getsource(one) for one in classes)


@pytest.mark.parametrize(
    ("place", "owner", "name"), [(place, owner, name) for place, (owner, names) in PRIVATE.items() for name in names]
)
def test_a_release_has_not_moved_it(place: str, owner: object, name: str) -> None:
    assert has(owner, name), f"{place} uses {name}, which this release does not have any more"


def private_names(path: Path) -> set[str]:
    """Members and modules with an underscore that a file uses and does not define itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used, own = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and "._" in f".{node.module}":
            used |= {f"_.{name.name}" for name in node.names}
        elif isinstance(node, ast.FunctionDef):
            (used if hasattr(Trainer, node.name) else own).add(node.name)
    used = {name for name in used if name.startswith("_") and not name.startswith("__")}
    used -= {"_replace", "_asdict", "_fields", "_exit"}  # of NamedTuple and os: documented
    # what a file sets or defines is its own, unless it sets it on somebody else's object
    listed = {name for _, names in PRIVATE.values() for name in names}
    return {name.removeprefix("_.") for name in used} - (own - listed)


def test_nothing_else_is_used() -> None:
    listed = {(place.split(":")[0], name) for place, (_, names) in PRIVATE.items() for name in names}
    paths = [path for room in ROOMS for path in files_of(room) if path.suffix == ".py"]
    found = {(path.relative_to(ROOT).as_posix(), name) for path in paths for name in private_names(path)}
    assert len(paths) > 30
    assert found == listed
