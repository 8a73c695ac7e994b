#!/usr/bin/env bash
# Every check of the toolkit: lint, format, tests. Makes .venv on the first run; no GPU and no model hub are needed.
#   bash scripts/test.sh                      all of it
#   bash scripts/test.sh -k template -x       arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh requirements-dev.txt

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads that wait for each other on a busy machine cost a factor of six
python -m ruff check .
python -m ruff format --check .
python -m pytest "$@"
