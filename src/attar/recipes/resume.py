"""Whether a run folder may be gone on with, by the recipe that is given now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attar.recipes.recipe import Loaded
from attar.runtime import PreflightError, RunExistsError, read_json
from attar.training import FREE, differences

# What may change between two parts of one run: how far it goes and what is asked of the result.
OPEN = (*FREE, "seeds", "goal")


def check_resumable(folder: Path, loaded: Loaded, allow: Sequence[str]) -> bool:
    """Whether *folder* holds a run of this recipe; False where it holds nothing yet.

    Raises:
        RunExistsError: it holds something else.
        PreflightError: the recipe differs where it may not.
    """
    if not (folder / "recipe.json").is_file():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise RunExistsError(f"{folder}: holds no run to resume, but other files; choose --run")
        return False
    before = flat(read_json(folder / "recipe.json"))
    plugins = folder / "plugins.json"
    before |= {
        f"plugin.{k}": v for k, v in (read_json(plugins) if plugins.is_file() else {}).items()
    }
    now = flat(loaded.full) | {f"plugin.{k}": v for k, v in loaded.plugins.items()}
    for path, (then, value) in differences(before, now).items():
        parts = path.split(".")
        if not any(part in OPEN or part in allow for part in parts) and path not in allow:
            raise PreflightError(
                f"{path} was {shown(then)} in {folder} and is {shown(value)} now; put it back, "
                f"go on with the difference by --allow-drift {path}, or start a new run. What may "
                f"change: {', '.join(OPEN)}"
            )
    return True


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree of tables and lists, by their paths."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, item in items:
        leaves |= flat(item, f"{path}.{key}" if path else key)
    return leaves


def shown(value: Any) -> str:
    """A value as a recipe has it."""
    return "left out" if value is None else str(value)
