"""Kill a run again and again, resume it each time, and compare it with the run that nobody killed, byte for byte.

    python -m tests.stress.kill_and_resume --stage ppo --kills 20
    python -m tests.stress.kill_and_resume --stage sft --kills 5
    python -m tests.stress.kill_and_resume --stage reward --kills 5

The first SIGKILL falls while best/ is written (stage 3), the last one behind the last step; of the others every second one
while a checkpoint is written, the rest at any moment.  Every file of the output folder is compared, checkpoints included;
only what a clock says is left aside.  Exit code 1 where anything differs.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import write_rows
from tests.forks import start, wait_until
from tests.helpers import PROMPTS, make_stages, save_lively_base
from utils.checkpoints import UNFINISHED, find_fault
from utils.report import read_jsonl

STEPS, SAVE = 24, 4
CLOCK = re.compile("seconds|per_second|runtime")


def arguments_of(stage: str, folder: Path) -> list[str]:
    """Command line of the run; everything that has a state is switched on.  The output folder is run, a relative path."""
    base = save_lively_base(folder / "base")
    prompts = [*PROMPTS, *(f"{prompt} {number}" for number in range(3) for prompt in PROMPTS)]
    values: dict[str, Any] = {
        "model_name": base,
        "output_dir": "run",
        "resume_from_checkpoint": "true",
        "max_length": 64,
    }
    values |= {"warmup_steps": 3, "eval_strategy": "steps", "save_total_limit": 3}
    if stage == "ppo":
        stages = make_stages(base, folder)
        rows = write_rows(folder / "rows.jsonl", [{"prompt": prompt} for prompt in prompts])
        values |= {"sft_model_lora_path": stages.sft, "reward_model_lora_path": stages.reward, "dataset": rows}
        values |= {"steps": STEPS, "save_freq": SAVE, "batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2}
        values |= {"output_max_length": 8, "learning_rate": 0.001, "adap_kl_ctrl": "true", "adap_kl_horizon": 50}
        values |= {
            "temperature": 0.9,
            "allow_weak_reward": "true",
            "guard": "warn",
            "guard_freq": 1,
            "guard_prompts": 4,
        }
        values |= {"eval_dataset": rows, "eval_steps": 12, "kl_budget": 1000, "critic": "adapter"}
    else:
        reply = {"response": "yes"} if stage == "sft" else {"chosen": "yes!", "rejected": "no"}
        rows = [{"prompt": prompt, **{name: f"{text} {prompt}" for name, text in reply.items()}} for prompt in prompts]
        values |= {"dataset": write_rows(folder / "rows.jsonl", rows), "eval_fraction": 0.2, "eval_steps": SAVE}
        values |= {
            "max_steps": STEPS,
            "save_steps": SAVE,
            "logging_steps": 3,
            "learning_rate": 0.01,
            "lora_dropout": 0.3,
        }
        values |= {"per_device_train_batch_size": 3, "load_best_model_at_end": "true"}
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def steps_done(run: Path) -> int:
    """The last step that metrics.jsonl tells of; whole lines only."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return 0
    return max((row.get("iteration", row.get("step", 0)) for row in map(json.loads, lines)), default=0)


def starts_of(folder: Path) -> int:
    """How many starts have found out where they go on, by their lines in the log."""
    try:
        log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return 0
    return len(re.findall(r"^(going on from|there is no whole checkpoint)", log, re.MULTILINE))


def newest_whole(run: Path) -> str:
    checkpoints = [path for path in run.glob("checkpoint-*") if find_fault(path) is None]
    return max(checkpoints, key=lambda path: int(path.name.partition("-")[2])).name if checkpoints else "the beginning"


def finish(process: BaseProcess, folder: Path) -> None:
    process.join(300)
    if process.exitcode != 0:
        sys.exit(f"error: a run ended with {process.exitcode}:\n{(folder / 'log.txt').read_text()[-3000:]}")


class Times(NamedTuple):
    """Seconds that these take in the reference run."""

    step: float
    save: float
    tail: float  # from the last line of the log to the end


def measure_times(process: BaseProcess, folder: Path) -> Times:
    """Watch the reference run to its end."""
    run, saves, began, last = folder / "run", [], time.monotonic(), 0.0
    for step in range(STEPS):
        while wait_until(lambda step=step: (run / UNFINISHED).exists() or steps_done(run) > step, process):
            if steps_done(run) > step:
                break
            since = time.monotonic()
            wait_until(lambda: not (run / UNFINISHED).exists(), process)
            saves.append(time.monotonic() - since)
        last = time.monotonic()
    finish(process, folder)
    return Times((last - began) / STEPS, sum(saves) / len(saves), time.monotonic() - last)


def strike(process: BaseProcess, folder: Path, aim: str, moment: float, times: Times, chance: random.Random) -> bool:
    """Kill the process when what `aim` says has come; whether it still ran then."""
    run = folder / "run"
    if aim == "while it wrote best/":
        wait_until((run / "best.new").exists, process)
        time.sleep(chance.uniform(0, times.save / 2))
    elif aim == "behind the last step":
        wait_until(lambda: steps_done(run) >= STEPS, process)
        time.sleep(chance.uniform(0, times.tail))
    else:
        wait_until(lambda: steps_done(run) >= int(moment), process)
        if aim == "while it saved":
            wait_until((run / UNFINISHED).exists, process)
        time.sleep(chance.uniform(0, times.save if aim == "while it saved" else times.step))
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def comparable(path: Path) -> Any:
    """A file without what a clock says."""
    if path.name == "metrics.jsonl":
        return [_without_clock(row) for row in read_jsonl(str(path))]
    if path.name in ("trainer_state.json", "complete.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "complete.json":  # sizes; the state's depends on the digits of its times
            return {**content, "trainer_state.json": None}
        return {**content, "log_history": [_without_clock(row) for row in content["log_history"]]}
    return path.read_bytes()


def _without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {name: repr(value) for name, value in row.items() if not CLOCK.search(name)}  # repr: NaN is itself


def differences(one: Path, other: Path) -> list[str]:
    files = [{str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} for run in (one, other)]
    missing = [f"{name} is in one of them alone" for name in sorted(files[0] ^ files[1])]
    both = sorted(files[0] & files[1])
    return missing + [f"{name} differs" for name in both if comparable(one / name) != comparable(other / name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", choices=["ppo", "sft", "reward"], default="ppo")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        os.environ["HF_DATASETS_CACHE"] = os.path.join(root, "cache")
        folders = [Path(root, "reference"), Path(root, "killed")]
        for folder in folders:
            folder.mkdir()
        arguments = arguments_of(args.stage, Path(root))
        began = time.monotonic()
        times = measure_times(start(args.stage, arguments, folders[0]), folders[0])
        print(
            f"reference: {STEPS} steps in {time.monotonic() - began:.0f} s, a save takes {times.save:.3f} s", flush=True
        )

        folder, run = folders[1], folders[1] / "run"
        moments = sorted(chance.uniform(0, STEPS - SAVE - 1) for _ in range(args.kills))
        aims = ["while it saved" if number % 2 else "at any moment" for number in range(args.kills)]
        if args.stage == "ppo":
            aims[0] = "while it wrote best/"
        aims[-1] = "behind the last step"
        kills = saving = ended = 0
        while kills < args.kills:
            process = start(args.stage, arguments, folder)
            wait_until(lambda before=kills + ended: starts_of(folder) > before, process)
            if not strike(process, folder, aims[kills], moments[kills], times, chance):
                ended += 1  # before the kill came: the next start has only to be wound up
                continue
            kills += 1
            half = [
                f"{path.relative_to(run)} with {len(list(path.rglob('*')))} files" for path in run.glob("unfinished/*")
            ]
            half += [str(path.relative_to(run)) for path in run.glob("*.new")]
            saving += bool(half)
            left = f", leaving {', '.join(half)}" if half else ""
            line = f"kill {kills}/{args.kills} {aims[kills - 1]}: after step {steps_done(run)}{left}"
            print(f"{line}; back to {newest_whole(run)}", flush=True)
        finish(start(args.stage, arguments, folder), folder)
        found = differences(folders[0] / "run", run)
        for line in found:
            print(line)
        count = sum(1 for path in run.rglob("*") if path.is_file())
        verdict = "DIFFERENT" if found else f"the same {count} files, byte for byte"
        print(f"{args.stage}: {kills} kills, {saving} of them in the middle of a save: {verdict}")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
