"""Scripts run in float64 throughout, for tests that compare two ways to the same numbers.

In float32 the last digit of a matrix product is another one on another kind of CPU, and three iterations of PPO make it a
hundred times larger: that is no smaller than what a fault does.  In float64 the two ways are 1e-13 apart on any CPU.

    python -m tests.double rl_training.py --steps 3 ...
"""

import runpy
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def use_float64() -> None:
    """From here on what Python code of this process calls float32 is float64, casts in the libraries included.

    Not for a process that goes on with other work.  Its safetensors files have to hold float64: see `store_as_float64`.
    """
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double


def store_as_float64(folder: Path) -> None:
    """Widen all weights in the folder."""
    for path in folder.rglob("*.safetensors"):
        save_file({name: value.double() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


if __name__ == "__main__":
    use_float64()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
