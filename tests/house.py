"""The structure of the house, measured from its own imports: rooms, lines, arrows.

    python -m tests.house

Rooms are the scripts at the root and the folders.  An arrow is an import from one room in another.
"""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From the ground up: a room may import the rooms before it.
FLOORS = (
    ("utils",),
    ("corpus",),
    ("lora",),
    ("rewards",),
    ("rollout", "reporting"),
    ("runs", "inference"),
    ("sft_training", "reward_modeling", "rl_training", "merge_lora", "compare", "chat", "scripts"),
    ("demo",),
    ("benchmarks",),
)
ROOMS = tuple(room for floor in FLOORS for room in floor)
LARGEST_SHARE = 0.2


def files_of(room: str) -> list[Path]:
    """Source files of a room: Python, shell, and what pages are made of."""
    if (ROOT / f"{room}.py").exists():
        return [ROOT / f"{room}.py"]
    return [path for path in sorted((ROOT / room).rglob("*")) if path.suffix in (".py", ".sh", ".js", ".css")]


def lines_of(room: str) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files_of(room))


def imports_of(path: Path) -> set[str]:
    """Rooms that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
    return found & set(ROOMS)


def arrows() -> dict[str, set[str]]:
    """Room -> other rooms that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for room in ROOMS:
        for path in files_of(room):
            if path.suffix == ".py":
                found[room] |= imports_of(path) - {room}
    return found


def faults() -> list[str]:
    """What is against the plan, in words."""
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    found = [
        f"{room} imports {other}, which is not below it"
        for room, others in arrows().items()
        for other in sorted(others)
        if floor_of[other] >= floor_of[room]
    ]
    lines = {room: lines_of(room) for room in ROOMS}
    whole = sum(lines.values())
    return found + [
        f"{room} holds {n / whole:.0%} of {whole} lines" for room, n in lines.items() if n > LARGEST_SHARE * whole
    ]


def main() -> None:
    lines = {room: lines_of(room) for room in ROOMS}
    whole = sum(lines.values())
    imported = arrows()
    for number, floor in reversed(list(enumerate(FLOORS, 1))):
        for room in floor:
            below = ", ".join(sorted(imported[room])) or "-"
            print(f"floor {number}  {room:16} {lines[room]:6} lines {lines[room] / whole:4.0%}  imports {below}")
    print(f"{whole} lines, {sum(map(len, imported.values()))} arrows")
    for fault in faults():
        raise SystemExit(f"error: {fault}")


if __name__ == "__main__":
    main()
