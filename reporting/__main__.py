"""python -m reporting output/ppo                     writes output/ppo/report.html
python -m reporting output/ppo other/ppo --output both.html
"""

import argparse
import os

from reporting.html_report import write_report
from utils.console import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reporting",
        description="Write report.html: curves, samples, reward card and run.json of one or several runs on one page.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training script")
    parser.add_argument("--output", help="file to write; by default report.html in the first RUN")
    parser.add_argument("--max_samples", type=int, default=20000, help="show about so many replies of each run")
    args = parser.parse_args()
    write_report(args.runs, args.output or os.path.join(args.runs[0], "report.html"), args.max_samples)


if __name__ == "__main__":
    run_script(main)
