"""Nothing that somebody has downloaded runs code, or drives the terminal that shows it.

Each file that could is a trap here: it makes a folder "sprung" where it is run.  YAML that calls functions is a case of
test_input_errors.py; HTML and Markdown out of replies are in test_html_report.py and test_compare.py.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import compare
import sft_training
from corpus.files import read_dataset
from lora.adapters import POLICY, attach_adapter, load_weights, read_adapter
from lora.base_model import load_base, load_tokenizer
from runs.checkpoints import seal
from tests.conftest import make_tokenizer
from tests.helpers import Stages, load_plain, make_stages, run_main
from utils.arguments import ModelArguments
from utils.console import InputError, printable, run_script, say


class Trap:
    """Unpickled, it makes the folder that it was given."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


@pytest.fixture
def trap(tmp_path: Path) -> bytes:
    return pickle.dumps({"weight": Trap(tmp_path / "sprung")})


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, base_path: str) -> Stages:
    return make_stages(base_path, tmp_path_factory.mktemp("stages"))


def test_the_trap_works(tmp_path: Path, trap: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(trap)
    with (tmp_path / "x.bin").open("rb") as file:
        pickle.load(file)
    assert (tmp_path / "sprung").is_dir()


@pytest.mark.parametrize("as_torch_file", [False, True])
def test_no_pickle_of_a_base_is_read(tmp_path: Path, base_path: str, trap: bytes, as_torch_file: bool) -> None:
    base = shutil.copytree(base_path, tmp_path / "base")
    (base / "model.safetensors").unlink()
    if as_torch_file:
        torch.save({"weight": Trap(tmp_path / "sprung")}, base / "pytorch_model.bin")
    else:
        (base / "pytorch_model.bin").write_bytes(trap)
    with pytest.raises(InputError, match=r"no .safetensors file in it, and other formats can run code"):
        load_base(ModelArguments(model_name_or_path=str(base)), torch.float32)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_beside_safetensors_is_not_touched(tmp_path: Path, base_path: str, trap: bytes) -> None:
    base = shutil.copytree(base_path, tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(trap)
    load_base(ModelArguments(model_name_or_path=str(base)), torch.float32)
    assert not (tmp_path / "sprung").exists()


def test_no_pickle_of_an_adapter_is_read(tmp_path: Path, stages: Stages, trap: bytes) -> None:
    adapter = shutil.copytree(stages.sft, tmp_path / "sft")
    read = read_adapter(str(adapter), "--sft_model_lora_path")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(trap)
    with pytest.raises(InputError, match=r"adapter_model.bin, a pickle, which can run code and is not read"):
        read_adapter(str(adapter), "--sft_model_lora_path")
    model = attach_adapter(load_plain(stages.base), read_adapter(stages.sft, "--sft"), read.config)
    with pytest.raises(InputError, match="cannot be read"):  # what a resumed run calls: PEFT would take the pickle
        load_weights(model, str(adapter), POLICY)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_from_elsewhere_runs_no_code(
    tmp_path: Path, stages: Stages, data: dict[str, str], monkeypatch: pytest.MonkeyPatch, trap: bytes, file: str
) -> None:
    """The Trainer's own state is in torch's format, and read as plain tensors."""
    words = ["--model_name", stages.base, "--dataset", data["sft"], "--output_dir", str(tmp_path / "run")]
    words += ["--max_length", "64", "--save_steps", "1"]
    run_main(sft_training, [*words, "--max_steps", "1"], monkeypatch)
    assert (tmp_path / "run" / "checkpoint-1" / file).is_file()
    torch.save({"state": Trap(tmp_path / "sprung")}, tmp_path / "run" / "checkpoint-1" / file)
    seal(tmp_path / "run" / "checkpoint-1")  # as whoever made the trap would
    with pytest.raises((pickle.UnpicklingError, InputError)):
        run_main(sft_training, [*words, "--max_steps", "2", "--resume_from_checkpoint", "true"], monkeypatch)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_runs_only_where_it_is_trusted_and_is_named(
    tmp_path: Path, base_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, trusted: bool
) -> None:
    base = shutil.copytree(base_path, tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "configuration_trap.TrapConfig"}}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (base / "configuration_trap.py").write_text(
        "import os\n"
        "from transformers import LlamaConfig\n"
        f"os.makedirs({str(tmp_path / 'sprung')!r}, exist_ok=True)\n"
        "class TrapConfig(LlamaConfig):\n    model_type = 'trap'\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = ModelArguments(model_name_or_path=str(base), trust_remote_code=trusted)
    load_tokenizer(arguments)
    with pytest.raises(InputError, match="it needs code of its own" if not trusted else "cannot load the base model"):
        load_base(arguments, torch.float32)
    assert (tmp_path / "sprung").exists() == trusted
    shown = capsys.readouterr().err
    named = f"warning: --trust_remote_code: {base} may run code of its own: configuration_trap.TrapConfig"
    assert (named in shown.splitlines()) == trusted


def test_code_of_a_dataset_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n", encoding="utf-8")
    with pytest.raises(InputError, match="cannot read the dataset"):
        read_dataset(str(folder))
    assert not (tmp_path / "sprung").exists()


# Clears the screen, sets the window's title, writes to the clipboard, moves up (one byte long), and turns text around.
ESCAPES = "\x1b[2J\x1b]0;title\x07\x1b]52;c;eA==\x07\x9b2A\u202etxt.exe\u2066"


def test_what_a_file_says_cannot_drive_the_terminal(capsys: pytest.CaptureFixture) -> None:
    assert printable(f"a{ESCAPES}\tb\n好 😀 مرحبا 👩‍💻") == "a[2J]0;title]52;c;eA==2Atxt.exe\tb\n好 😀 مرحبا 👩‍💻"
    say(f"warning: {ESCAPES}")

    def fail() -> None:
        raise InputError(f"found {ESCAPES}")

    with pytest.raises(SystemExit):
        run_script(fail)
    shown = capsys.readouterr().err
    assert shown == "warning: [2J]0;title]52;c;eA==2Atxt.exe\nerror: found [2J]0;title]52;c;eA==2Atxt.exe\n"


def test_a_column_name_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Names of columns come out of downloaded files, and an error shows them."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({ESCAPES: "a"}) + "\n", encoding="utf-8")

    def main() -> None:
        from corpus.tokens import tokenize_sft

        tokenize_sft(read_dataset(str(path)), "{prompt}=", make_tokenizer(), 64)

    with pytest.raises(SystemExit):
        run_script(main)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "found [2J" in line
    assert "\x1b" not in line


def test_a_reply_in_a_markdown_table_cannot_drive_the_terminal() -> None:
    """People read compare.md with cat."""
    cell = compare.markdown_cell(f"a{ESCAPES}b")
    assert not any(character in cell for character in "\x1b\x07\x9b\u202e")
