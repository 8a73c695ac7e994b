"""All three stages in two processes that share the parameters, against one process alone: the same numbers and weights.

    pip install deepspeed==0.19.8        (needs a C++ compiler; its first run builds an extension, 2 minutes and more)
    python -m tests.stress.sharded                      FSDP2, ZeRO-2 and ZeRO-3
    python -m tests.stress.sharded zero3 --only reward resumed

No GPU is needed: see tests/sharded.py for what that shows and what not.  test_two_processes.py runs the FSDP2 part.
A build that was killed leaves ~/.cache/torch_extensions/*/deepspeed_shm_comm/lock behind, and the next one waits for it.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

from tests.conftest import write_preferences, write_sft
from tests.double import store_as_float64
from tests.helpers import make_stages, save_lively_base
from tests.test_two_processes import (
    ALONE,
    EACH_OF_TWO,
    SCRIPTS,
    SHARDED,
    assert_close,
    assert_same_weights,
    check_ppo,
    check_reward,
    check_sft,
    make_commands,
    rows_of,
    run_alone,
    run_sharded,
)

# A run of 2 iterations that goes on to 3 from its checkpoint, against one that was never interrupted.
RESUMED = ["--lr_scheduler_type", "constant", "--save_freq", "2", "--eval_strategy", "no"]
RAN = {"fsdp2": "FSDP 2", "zero2": "DEEPSPEED 2", "zero3": "DEEPSPEED 2"}
RUNS = ["accumulation", *SHARDED, "resumed"]


def check(name: str, config: str, root: Path) -> None:
    """Raise AssertionError where the run of two processes differs from that of one, or was none of two at all."""
    two, alone = root / f"{name} {config}", root / f"{name} alone"
    assert [(two / f"ran_{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)] == [RAN[config]] * 2
    if name == "resumed":
        check_resumed(two, alone)
    elif name == "reward":
        check_reward(two, alone)
    elif name == "sft":
        check_sft(two, alone)
    else:
        check_ppo(two, alone, optimizer_steps=2 if name == "accumulation" else 4)


def check_resumed(two: Path, alone: Path) -> None:
    """KL coefficient and guard were lost under DeepSpeed, which resumes without asking the trainer."""
    clocks = {"seconds", "tokens_per_second", "ratio_first"}
    assert_close(rows_of(two, "score_mean"), rows_of(alone, "score_mean"), clocks)
    for file in ("adapter_model.safetensors", "value_head.safetensors", "critic/adapter_model.safetensors"):
        assert_same_weights(two, alone, file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.sharded", description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=list(RAN), help=f"of {', '.join(RAN)}; default: all")
    parser.add_argument("--only", nargs="*", default=RUNS, help=f"of {', '.join(RUNS)}; default: all")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stages = make_stages(save_lively_base(root / "base"), root)
        data = {"sft": write_sft(root / "sft.jsonl"), "preferences": write_preferences(root / "preferences.jsonl")}
        commands = make_commands(stages, data, root)
        commands["resumed"] = [*commands["critic"], *RESUMED]
        for table in (ALONE, EACH_OF_TWO, SCRIPTS):
            table["resumed"] = table["critic"]
        for made in map(Path, stages):
            store_as_float64(made)
        run_alone({name: commands[name] for name in args.only}, root)
        for config in args.configs:
            for name in args.only:
                started, outcome = time.perf_counter(), "the same as one process"
                try:
                    if name == "resumed":
                        run_sharded(config, {name: [*commands[name], "--steps", "2"]}, root)
                    more = ["--resume_from_checkpoint", "true"] if name == "resumed" else []
                    run_sharded(config, {name: [*commands[name], *more]}, root)
                    check(name, config, root)
                except AssertionError as error:
                    failed, outcome = True, f"FAILED\n{error}"
                print(f"{config}, {name}: {outcome} ({time.perf_counter() - started:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
