"""The house stands as its plan says: shelves, doors, sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "attar"
SHELVES = [
    {"losses", "runtime"},
    {"tasks", "models", "data"},
    {"signals", "evaluation", "reporting"},
    {"teachers"},
    {"training", "compression", "exporting"},
    {"recipes", "integrations"},
    {"cli"},
]
SHELF = {room: number for number, rooms in enumerate(SHELVES) for room in rooms}
FILES = sorted(SOURCE.rglob("*.py"))
MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_FUNCTION = 80


def _typing_only(tree: ast.Module) -> set[ast.AST]:
    """Imports under ``if TYPE_CHECKING`` are objects passed in, not dependencies."""
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            guarded.update(child for part in node.body for child in ast.walk(part))
    return guarded


def _imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    skipped = _typing_only(tree)
    names = [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node not in skipped
    ]
    names += [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and node not in skipped
        for alias in node.names
    ]
    return {name.split(".")[1] for name in names if name.startswith("attar.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_rooms_import_only_downward(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0]
    if room.endswith(".py"):
        return
    upward = {r for r in _imported_rooms(path) - {room} if SHELF[r] >= SHELF[room]}
    assert not upward, f"{room} stands below or beside {upward}"


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*/__init__.py")), ids=lambda p: p.parent.name)
def test_every_door_is_sorted_and_complete(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    listed = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert set(listed) == imported
    assert listed == sorted(listed, key=lambda n: (not n.isupper(), not n[0].isupper(), n))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES_OF_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno - docstring.count("\n")
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {lines} lines"


FORBIDDEN = {
    "pickle", "marshal", "shelve", "joblib", "dill", "torchvision", "torchaudio",
}  # fmt: skip
CALLS = {"eval", "exec", "torch.load", "torch.hub.load", "os.system", "yaml.load"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_file_can_run_code(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & FORBIDDEN
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.module.split(".")[0] not in FORBIDDEN
        if isinstance(node, ast.Call):
            if path.name == "unpickling.py" and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node)  # tensors, and no code
                continue
            assert ast.unparse(node.func) not in CALLS
            assert not any(k.arg == "shell" or k.arg == "allow_pickle" for k in node.keywords)


def test_the_door_is_light() -> None:
    heavy = "transformers datasets matplotlib sklearn scipy rich typer pydantic jinja2 numpy.ma"
    code = (
        f"import sys, attar\nprint([m for m in {heavy.split()!r} + ['torch'] if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_door_opens_every_name() -> None:
    import attar

    for name in attar.__all__:
        assert getattr(attar, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        attar.distil  # noqa: B018
