"""Every package that the code imports is pinned, though another one may bring it along today."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {"deepspeed"}  # docs say how to install it, for machines with GPUs


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name.split(".")[0] for name in found} - sys.stdlib_module_names


def test_what_is_imported_is_pinned() -> None:
    """jinja2, numpy, tqdm and PIL came with other packages only: a new release of those could have left them out."""
    files = [
        *ROOT.glob("*.py"),
        *(p for p in ROOT.glob("*/**/*.py") if not p.relative_to(ROOT).parts[0].startswith(".")),
    ]
    ours = {path.stem if path.suffix else path.name for path in ROOT.iterdir()}
    wanted = {name for path in files for name in imports(path)} - ours - ELSEWHERE
    assert {"torch", "numpy", "jinja2"} <= wanted
    pinned = re.findall(
        r"^([\w-]+)==", "".join(path.read_text() for path in ROOT.glob("requirements*.txt")), re.MULTILINE
    )
    names = {name.lower().replace("_", "-") for name in pinned}
    made_by = packages_distributions()
    missing = {
        name for name in wanted if not names & {dist.lower().replace("_", "-") for dist in made_by.get(name, [name])}
    }
    assert missing == set()
