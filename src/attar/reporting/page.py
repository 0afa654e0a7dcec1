"""``report.html``: the run folder as one page for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

from attar.reporting import figures
from attar.reporting.redaction import redacted
from attar.runtime import DataError, read_json, write_atomic

FORMAT = "attar-verdict/1"


def page(run_folder: str | Path) -> Path:
    """Write ``report.html`` into *run_folder* from what lies there, and return its path.

    Reads ``verdict.json`` and, where they are, ``metrics.jsonl`` and ``recipe.json``. The page is
    one file without script, loads nothing and shows no home folder, host, user or key.

    Raises:
        DataError: ``verdict.json`` is missing, broken or of another version; another file is
            broken.
    """
    folder = Path(run_folder)
    verdict = _verdict(folder / "verdict.json")
    try:
        text = _render(folder, verdict)
    except (TypeError, KeyError, AttributeError, RecursionError, IndexError) as error:
        raise DataError(
            f"{folder / 'verdict.json'}: does not hold what a verdict of {FORMAT} holds "
            f"({type(error).__name__}: {error}); write it again with Verdict.to_json()"
        ) from None
    target = folder / "report.html"
    write_atomic(target, text.encode("utf-8"))
    return target


def _verdict(path: Path) -> dict[str, Any]:
    found = _read(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{path}: is not a verdict of the format {FORMAT}")
    return found


def _read(path: Path) -> Any:
    try:
        return redacted(read_json(path))
    except RecursionError:
        raise DataError(f"{path}: is nested too deeply") from None


def _render(folder: Path, verdict: dict[str, Any]) -> str:
    from jinja2 import UndefinedError

    points = figures.by_arm(_validations(folder / "metrics.jsonl"), verdict["metric"])
    try:
        return _template().render(
            name=redacted(folder.resolve().name),
            verdict=verdict,
            environment=verdict.get("environment") or {},
            dots=figures.dots(verdict),
            curves=redacted(figures.curves(points, verdict["percent"])),
            recipe=_recipe(folder / "recipe.json"),
        )
    except UndefinedError as error:
        raise KeyError(str(error)) from None


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("attar.reporting").joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(source)


def _validations(path: Path) -> Iterator[dict[str, Any]]:
    """The validation records of the log; a last line that was being written is not one yet."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                if not line.endswith("\n"):
                    return
                raise DataError(f"{path}:{number}: is not a JSON record") from None
            if isinstance(record, dict) and record.get("split") == "validation":
                yield record


def _recipe(path: Path) -> str | None:
    if not path.is_file():
        return None
    from ruamel.yaml import YAML

    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    writer.allow_unicode = True
    text = StringIO()
    writer.dump(_read(path), text)
    return text.getvalue()
