#!/usr/bin/env bash
# Every check of the toolkit: lint, format, tests. Makes .venv on the first run; no GPU and no model hub are needed.
#   bash scripts/test.sh                              all of it, the tests in two workers
#   bash scripts/test.sh -m "not slow"                without what trains, starts processes or goes through whole scripts
#   bash scripts/test.sh tests/test_data.py -k csv    arguments go to pytest; files that are named need no second worker
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh requirements-dev.txt

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads that wait for each other on a busy machine cost a factor of six
python -m ruff check .
python -m ruff format --check .
workers=(-n 2 --dist loadfile --no-loadscope-reorder) # a file stays in one worker, which makes its fixtures once
case " $*" in *" tests/"*) workers=() ;; esac
python -m pytest ${workers[@]+"${workers[@]}"} "$@"
