"""All three stages in two processes that share the parameters, against one process alone: the same numbers and weights.

    pip install deepspeed==0.19.8        (needs a C++ compiler; its first run builds an extension, 2 minutes and more)
    python -m tests.stress.sharded                      FSDP2, ZeRO-2 and ZeRO-3
    python -m tests.stress.sharded zero3 --only reward

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
from tests.helpers import make_stages, save_lively_base
from tests.test_two_processes import (
    EACH_OF_TWO,
    SHARDED,
    check_ppo,
    check_reward,
    check_sft,
    make_commands,
    run_alone,
    run_sharded,
)

RAN = {"fsdp2": "FSDP 2", "zero2": "DEEPSPEED 2", "zero3": "DEEPSPEED 2"}


def check(name: str, config: str, root: Path) -> None:
    """Raise AssertionError where the run of two processes differs from that of one, or was none of two at all."""
    two, alone = root / f"{name} {config}", root / f"{name} alone"
    assert [(two / f"ran_{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)] == [RAN[config]] * 2
    if name == "reward":
        check_reward(two, alone)
    elif name == "sft":
        check_sft(two, alone)
    else:
        check_ppo(two, alone, optimizer_steps=2 if name == "accumulation" else 4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.sharded", description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=list(RAN), help=f"of {', '.join(RAN)}; default: all")
    parser.add_argument(
        "--only", nargs="*", default=["accumulation", *SHARDED], help=f"runs, of {', '.join(EACH_OF_TWO)}"
    )
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stages = make_stages(save_lively_base(root / "base"), root)
        data = {"sft": write_sft(root / "sft.jsonl"), "preferences": write_preferences(root / "preferences.jsonl")}
        commands = make_commands(stages, data, root)
        for name in args.only:
            run_alone(name, commands[name], root / f"{name} alone")
        for config in args.configs:
            for name in args.only:
                started, outcome = time.perf_counter(), "the same as one process"
                try:
                    run_sharded(config, {name: commands[name]}, root)
                    check(name, config, root)
                except AssertionError as error:
                    failed, outcome = True, f"FAILED\n{error}"
                print(f"{config}, {name}: {outcome} ({time.perf_counter() - started:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
