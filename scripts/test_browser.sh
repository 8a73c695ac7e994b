#!/usr/bin/env bash
# Opens the pages of the toolkit in headless Chromium, report.html, compare.html and chat.py --web: filter, sort,
# light and dark, hostile texts, a chat with several models.
# Apart from scripts/test.sh because Chromium is no Python package: on Debian and Ubuntu `apt-get install chromium`.
#   bash scripts/test_browser.sh                arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v chromium chromium-browser google-chrome > /dev/null; then
  echo "error: there is no Chromium; on Debian and Ubuntu: apt-get install chromium" >&2
  exit 2
fi
source scripts/setup_venv.sh requirements-dev.txt

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest tests/browser/check_*.py "$@"
