"""Kill a run again and again, resume it each time, and compare it with the run that nobody killed, byte for byte.

    python -m tests.stress.kill_and_resume --stage ppo --kills 20
    python -m tests.stress.kill_and_resume --stage sft --kills 5
    python -m tests.stress.kill_and_resume --stage reward --kills 5

The first SIGKILL falls while best/ is written (stage 3), the last one behind the last step; of five others two at any
moment, two while a checkpoint is written, one while the run starts.  Every file of the output folder is compared, also in
the checkpoints; only what a clock says is left aside.  Exit code 1 where anything differs.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from runs.checkpoints import UNFINISHED, find_fault
from tests.conftest import write_rows
from tests.forks import start, wait_until
from tests.helpers import PROMPTS, make_stages, save_lively_base
from utils.files import read_jsonl

STEPS, SAVE = 24, 4
AIMS = ("at any moment", "while it saved", "at any moment", "while it saved", "while it started")
CLOCK = re.compile("seconds|per_second|runtime")


def arguments_of(stage: str, folder: Path, steps: int = STEPS) -> list[str]:
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
        values |= {"steps": steps, "save_freq": SAVE, "batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2}
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
            "max_steps": steps,
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


def started_at(run: Path) -> int:
    """When the training began last: it then writes run.json, and has cleared away what a kill left."""
    return (run / "run.json").stat().st_mtime_ns if (run / "run.json").exists() else 0


def newest_whole(run: Path) -> str:
    checkpoints = [path for path in run.glob("checkpoint-*") if find_fault(path) is None]
    return max(checkpoints, key=lambda path: int(path.name.partition("-")[2])).name if checkpoints else "the beginning"


def finish(process: BaseProcess, folder: Path) -> None:
    process.join(300)
    if process.exitcode != 0:
        sys.exit(f"error: a run ended with {process.exitcode}:\n{(folder / 'log.txt').read_text()[-3000:]}")


class Times(NamedTuple):
    """Seconds that these take in the reference run."""

    start: float  # to the first step
    step: float
    save: float
    tail: float  # from the last line of the log to the end


def measure_times(process: BaseProcess, folder: Path, steps: int) -> Times:
    """Watch the reference run to its end."""
    run, saves, began = folder / "run", [], time.monotonic()
    wait_until((run / "run.json").exists, process)
    started = last = time.monotonic()
    for step in range(steps):
        while wait_until(lambda step=step: (run / UNFINISHED).exists() or steps_done(run) > step, process):
            if steps_done(run) > step:
                break
            since = time.monotonic()
            wait_until(lambda: not (run / UNFINISHED).exists(), process)
            saves.append(time.monotonic() - since)
        last = time.monotonic()
    finish(process, folder)
    return Times(started - began, (last - started) / steps, sum(saves) / len(saves), time.monotonic() - last)


def strike(process: BaseProcess, run: Path, aim: str, moment: float, times: Times, chance: random.Random) -> bool:
    """Kill the process when what `aim` says has come, after step `moment` at the earliest; whether it still ran then."""
    if aim == "while it started":
        time.sleep(chance.uniform(0, times.start))
    elif aim == "while it wrote best/":
        wait_until((run / "best.new").exists, process)
        time.sleep(chance.uniform(0, times.save / 2))
    elif aim == "behind the last step":
        wait_until(lambda: steps_done(run) >= moment, process)
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
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root, "reference"), Path(root, "killed")]
        for folder in folders:
            folder.mkdir()
        arguments = arguments_of(args.stage, Path(root), args.steps)
        began = time.monotonic()
        times = measure_times(start(args.stage, arguments, folders[0]), folders[0], args.steps)
        seconds = time.monotonic() - began
        print(f"reference: {args.steps} steps in {seconds:.0f} s, a save takes {times.save:.3f} s", flush=True)

        folder, run = folders[1], folders[1] / "run"
        moments = [*sorted(chance.uniform(0, args.steps - SAVE - 1) for _ in range(args.kills - 1)), args.steps]
        aims = [AIMS[number % len(AIMS)] for number in range(args.kills)]
        if args.stage == "ppo":
            aims[0] = "while it wrote best/"
        aims[-1] = "behind the last step"
        kills = saving = 0
        while kills < args.kills:
            before, aim = started_at(run), aims[kills]
            process = start(args.stage, arguments, folder)
            if aim != "while it started":
                wait_until(lambda before=before: started_at(run) > before, process)
            if not strike(process, run, aim, moments[kills], times, chance):
                continue  # it ended before the kill came; the next start has only to be wound up
            kills += 1
            half = [
                f"{path.relative_to(run)} with {len(list(path.rglob('*')))} files" for path in run.glob("unfinished/*")
            ]
            half += [str(path.relative_to(run)) for path in run.glob("*.new")]
            saving += bool(half) and aim != "while it started"
            left = f", leaving {', '.join(half)}" if half else ""
            print(
                f"kill {kills}/{args.kills} {aim}: after step {steps_done(run)}{left}; back to {newest_whole(run)}",
                flush=True,
            )
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
