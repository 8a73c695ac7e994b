"""Put a downloaded Baichuan-7B or Baichuan2-7B folder into Llama's layout: see scripts/baichuan/convert.py.

python scripts/convert_baichuan.py --model DOWNLOADED --output models/baichuan2-7b [--adapter W_PACK_ADAPTER ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, Python looks in scripts/ alone

from scripts.baichuan.convert import main
from utils.console import run_script

if __name__ == "__main__":
    run_script(main)
