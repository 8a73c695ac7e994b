"""One PPO iteration of this toolkit beside one of TRL 1.12.0, the last release that had a PPOTrainer.

    python -m benchmarks.ppo_iteration --output_dir speed             both settings, about 25 minutes on two cores
    python -m benchmarks.ppo_iteration --output_dir speed --growth    ours alone, over lengths, batch, vocabulary, size
    python -m benchmarks.ppo_iteration --output_dir speed --profile   ours alone: where the time goes

Base: random weights in the shape of a Llama with 70 million parameters (see `Shapes`), float32, LoRA on q, k and v.
Settings: full, where every prompt and reply is as long as it may be; ragged, where prompts have 16 to 64 tokens and replies
end after 1 to 64, the same ones on both sides.  The sides run in turn, each in a process of its own
(benchmarks/ppo_sides.py), and the medians over the rounds are compared.  TRL is installed into --output_dir, beside the
libraries of this environment.  It runs twice: as it comes, with its value model trained in full and activation
checkpointing on; and tuned, with LoRA on the value model and activations kept, which is as near to our side as it gets.

The floor is the time that the floating-point operations nobody can leave out take at the rate of large matrix products,
measured in the same run: real tokens only, no padding, nothing computed twice.  Writes ppo_iteration.md and .json,
growth.md, .json and .png, or profile.md; what is in --output_dir already is not measured again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.ppo_sides import KINDS, Shapes, make_inputs
from utils.console import run_script

TRL = "trl==1.12.0"
SETTINGS = {"full": Shapes(), "ragged": Shapes(prompts=(16, 64), replies=(1, 64))}
PHASES = ("generate", "score", "train")
SMALL = Shapes(layers=4, rows=8, mini_batch=4, vocabulary=16384)
GROWTH = {  # what grows -> its values, each a change of SMALL
    "prompt tokens": {value: {"prompts": (value, value)} for value in (32, 64, 128, 256, 512)},
    "reply tokens": {value: {"replies": (value, value)} for value in (32, 64, 128, 256)},
    "replies": {value: {"rows": value} for value in (4, 8, 16, 32, 64)},
    "vocabulary": {value: {"vocabulary": value} for value in (8192, 32768, 65536, 152064)},
    "layers": {value: {"layers": value} for value in (2, 4, 8, 16)},
    "hidden width": {value: {"hidden": value, "feed_forward": 8 * value // 3} for value in (288, 576, 1152)},
}


def operations(shapes: Shapes) -> dict[str, float]:
    """Floating-point operations of an iteration that cannot be left out, by phase.  A product of [n, k] and [k, m] has 2nkm.

    P, T: tokens of prompt and reply of a row.  The last reply token is only ever a target, so P + T - 1 positions go through
    the decoder; T of them reach the output embedding.  Attention counts the lower triangle of its matrix.
    generate: prompt and reply once.  score: the reference once, with logits; the reward model once, without them, on P + T.
    The policy's own log-probs and values are by-products of generate.  train: in each epoch a forward pass and the gradient
    with respect to the activations, which has the same products (twice those of attention); weights are frozen, and
    the gradients of the LoRA matrices are the products of their forward pass once more.
    """
    head = shapes.hidden // shapes.heads
    keys = shapes.kv_heads * head
    linear = shapes.layers * (2 * shapes.hidden**2 + 2 * shapes.hidden * keys + 3 * shapes.hidden * shapes.feed_forward)
    lora = shapes.layers * shapes.lora_r * (3 * shapes.hidden + shapes.hidden + 2 * keys)
    output = shapes.hidden * shapes.vocabulary
    found = dict.fromkeys(PHASES, 0.0)
    for prompt, reply in shapes.lengths():
        positions = prompt + reply - 1
        attention = 2 * shapes.layers * shapes.hidden * positions * (positions + 1)  # two products, half of each matrix
        forward = 2 * positions * (linear + lora) + attention
        logits = 2 * reply * output
        found["generate"] += forward + logits
        found["score"] += 2 * forward + 2 * (linear + lora) + logits
        found["train"] += shapes.ppo_epochs * (2 * forward + attention + 2 * positions * lora + 2 * logits)
    return found


def install_trl(folder: Path) -> None:
    """TRL alone, without what it needs: this environment has that."""
    if not (folder / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TRL]
        subprocess.run(command, check=True)


def run_side(side: str, folder: Path, args: argparse.Namespace, more: Sequence[str] = ()) -> dict[str, Any]:
    """What benchmarks/ppo_sides.py found, in a process of its own.  more: arguments of rl_training.py."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": str(args.threads), "TRL_FOLDER": str(args.output_dir.resolve() / "trl")}
    command = [sys.executable, "-m", "benchmarks.ppo_sides", side, str(folder)]
    command += ["--iterations", str(args.iterations), "--threads", str(args.threads), *more]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def summary(runs: list[dict[str, Any]], shapes: Shapes) -> dict[str, float]:
    """Medians over the runs: seconds by phase and in all, reply tokens a second, GiB at the peak."""
    iterations = [one for run in runs for one in run["iterations"]]
    found = {phase: median(one[phase] for one in iterations) for phase in PHASES}
    found["seconds"] = median(sum(one.values()) for one in iterations)
    found["tokens_per_second"] = sum(reply for _, reply in shapes.lengths()) / found["seconds"]
    found["gibibytes"] = median(run["peak_bytes"] for run in runs) / 2**30
    return found


def compare(name: str, shapes: Shapes, args: argparse.Namespace, progress: tqdm) -> dict[str, Any]:
    """Both sides in turn; everything that was measured."""
    file = args.output_dir / f"{name}.json"
    if file.exists():
        progress.update(4 * args.rounds)
        return json.loads(file.read_text(encoding="utf-8"))
    folder = args.output_dir / name
    if not folder.exists():
        make_inputs(folder, shapes)
    found: dict[str, Any] = {"rate": [], "ours": [], "trl": [], "trl_tuned": []}
    for _ in range(args.rounds):
        for side in found:
            found[side].append(run_side(side, folder, args))
            progress.update()
    file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def table(name: str, shapes: Shapes, found: dict[str, Any]) -> str:
    """Markdown: both sides, their ratio, and what is left above the floor."""
    ours, trl, tuned = (summary(found[side], shapes) for side in ("ours", "trl", "trl_tuned"))
    rate = median(run["rate"] for run in found["rate"])
    floor = {phase: count / rate for phase, count in operations(shapes).items()}
    floor["seconds"] = sum(floor.values())
    titles = {"generate": "generate, s", "score": "score, s", "train": "train, s", "seconds": "**iteration, s**"}
    lines = [f"**{name}** ({rate / 1e9:.0f} GFLOP/s in matrix products)", ""]
    lines += ["| | ours | TRL 1.12.0 | ratio | TRL, tuned | ratio | floor | floor / ours |", "|" + "---|" * 8]
    for key, title in titles.items():
        cells = [f"{ours[key]:.1f}"]
        for peer in (trl, tuned):
            cells += [f"{peer[key]:.1f}", f"{ours[key] / peer[key]:.2f}"]
        cells += [f"{floor[key]:.1f}", f"{floor[key] / ours[key]:.0%}"]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    for key, title in {"tokens_per_second": "reply tokens a second", "gibibytes": "**peak memory, GiB**"}.items():
        cells = [f"{ours[key]:.2f}"]
        for peer in (trl, tuned):
            cells += [f"{peer[key]:.2f}", f"{ours[key] / peer[key]:.2f}"]
        lines.append(f"| {title} | " + " | ".join(cells) + " | | |")
    return "\n".join(lines) + "\n"


def profile_table(name: str, shapes: Shapes, found: dict[str, dict[str, float]], rate: float) -> str:
    """Markdown: seconds by phase and kind of operation, and how near the matrix products come to the rate of large ones."""
    lines = [f"**{name}** ({rate / 1e9:.0f} GFLOP/s in matrix products alone)", ""]
    lines += ["| | " + " | ".join(f"{kind}, s" for kind in KINDS) + " | products, GFLOP/s |", "|" + "---|" * 5]
    for phase, counted in operations(shapes).items():
        cells = [f"{found[phase][kind]:.1f} ({found[phase][kind] / sum(found[phase].values()):.0%})" for kind in KINDS]
        lines.append(f"| {phase} | " + " | ".join(cells) + f" | {counted / found[phase][KINDS[0]] / 1e9:.0f} |")
    return "\n".join(lines) + "\n"


def write_profile(args: argparse.Namespace) -> None:
    """One iteration of our side under a profiler, in each setting."""
    tables = []
    for name in args.settings:
        folder = args.output_dir / name
        if not folder.exists():
            make_inputs(folder, SETTINGS[name])
        rate = run_side("rate", folder, args)["rate"]
        found = run_side("profile", folder, args)["profile"]
        tables.append(profile_table(name, SETTINGS[name], found, rate))
    report = "\n".join(tables)
    (args.output_dir / "profile.md").write_text(report, encoding="utf-8")
    print(report)


def growth(args: argparse.Namespace) -> None:
    """Seconds and memory of our side over each thing that grows, beside the operations that it cannot leave out."""
    file = args.output_dir / "growth.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    points = [(name, value, change) for name, values in GROWTH.items() for value, change in values.items()]
    for name, value, change in tqdm(points, desc="points"):
        key = f"{name} {value}"
        if key in found:
            continue
        folder = args.output_dir / key.replace(" ", "_")
        shapes = replace(SMALL, **change)
        if not folder.exists():
            make_inputs(folder, shapes)
        runs = [run_side("ours", folder, args) for _ in range(args.rounds)]
        found[key] = {**summary(runs, shapes), "operations": sum(operations(shapes).values())}
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    lines = ["| what grows | value | s | GiB | s / least | operations / least |", "|---|---|---|---|---|---|"]
    for name, values in GROWTH.items():
        first = found[f"{name} {min(values)}"]
        for value in values:
            one = found[f"{name} {value}"]
            cells = [name, value, f"{one['seconds']:.1f}", f"{one['gibibytes']:.2f}"]
            cells += [f"{one['seconds'] / first['seconds']:.2f}", f"{one['operations'] / first['operations']:.2f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    report = "\n".join(lines) + "\n"
    (args.output_dir / "growth.md").write_text(report, encoding="utf-8")
    draw_growth(found, args.output_dir / "growth.png")
    print(report)


def draw_growth(found: dict[str, dict[str, float]], path: Path) -> None:
    """A panel for each thing that grows: seconds, the operations as a dashed line through the first point, and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(14, 8), dpi=110)
    for axes, (name, values) in zip(panels.flat, GROWTH.items(), strict=True):
        rows = [found[f"{name} {value}"] for value in values]
        scale = rows[0]["seconds"] / rows[0]["operations"]
        axes.plot(list(values), [row["seconds"] for row in rows], "o-", color="#0072b2", label="seconds")
        axes.plot(list(values), [row["operations"] * scale for row in rows], "--", color="#888888", label="operations")
        top = 1.4 * max(*(row["seconds"] for row in rows), rows[-1]["operations"] * scale)  # room for the legend
        axes.set(xlabel=name, ylabel="seconds", ylim=(0, top), xlim=(0, None))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
        memory = axes.twinx()
        memory.plot(list(values), [row["gibibytes"] for row in rows], "s-", color="#d55e00", label="GiB at the peak")
        memory.set(ylabel="GiB", ylim=(0, 1.4 * max(row["gibibytes"] for row in rows)))
        lines = [*axes.get_lines(), *memory.get_lines()]
        axes.legend(lines, [line.get_label() for line in lines], frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for inputs, TRL and the report")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs")
    parser.add_argument("--iterations", type=int, default=1, help="of each run")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--growth", action="store_true", help="our side alone, on smaller shapes that grow")
    parser.add_argument("--profile", action="store_true", help="our side alone, under torch's profiler")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.growth or args.profile:
        growth(args) if args.growth else write_profile(args)
        return
    install_trl(args.output_dir / "trl")
    tables = []
    with tqdm(total=4 * args.rounds * len(args.settings), desc="runs") as progress:
        for name in args.settings:
            found = compare(name, SETTINGS[name], args, progress)
            tables.append(table(name, SETTINGS[name], found))
    report = "\n".join(tables)
    (args.output_dir / "ppo_iteration.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    run_script(main)
