"""The plan of the house holds: see CONTRIBUTING.md and tests/house.py."""

import subprocess
import sys

import pytest

from tests import house


def test_no_arrow_goes_up_and_no_room_is_too_large() -> None:
    """utils, called small, had grown to half of all lines on one flat floor."""
    assert house.faults() == []


def test_an_arrow_that_goes_up_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    arrows = house.arrows()
    arrows["utils"].add("rollout")
    monkeypatch.setattr(house, "arrows", lambda: arrows)
    assert house.faults() == ["utils imports rollout, which is not below it"]


def test_every_source_file_is_in_a_room() -> None:
    """What is in no room is in no picture."""
    known = {path for room in house.ROOMS for path in house.files_of(room)}
    found = set(house.ROOT.glob("*.py")) | {
        path
        for folder in house.ROOT.iterdir()
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in ("tests", "docs")
        for path in folder.rglob("*.py")
        if "site-packages" not in path.parts and not path.is_relative_to(house.ROOT / "demo_output")
    }
    assert found - known == set()


@pytest.mark.slow
def test_nothing_heavy_happens_at_import() -> None:
    """matplotlib, wandb, gradio and deepspeed take seconds that --help should not pay."""
    rooms = ("utils", "corpus", "lora", "rewards", "rollout", "runs", "reporting", "inference")
    paths = [path.relative_to(house.ROOT) for room in rooms for path in house.files_of(room) if path.suffix == ".py"]
    modules = [".".join(path.with_suffix("").parts) for path in paths if path.stem not in ("__init__", "__main__")]
    heavy = ("matplotlib.pyplot", "wandb", "gradio", "deepspeed")
    code = (
        "import importlib, sys\n"
        f"for module in {modules}:\n"
        "    importlib.import_module(module)\n"
        f"    assert not set({heavy}) & set(sys.modules), module\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=house.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
