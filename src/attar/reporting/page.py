"""``report.html``: the run folder as one page for people."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

from attar.reporting.figures import EMPTY, drawings
from attar.reporting.many import FORMAT as FORMAT_OF_MANY
from attar.reporting.many import drawing
from attar.reporting.png import data_uri
from attar.reporting.redaction import redacted
from attar.reporting.svg import unit
from attar.reporting.waterfall import waterfall
from attar.runtime import DataError, read_json, write_atomic

FORMAT = "attar-verdict/1"
FIGURES = "attar-figures/1"
SEARCH = "search.json"


def page(run_folder: str | Path) -> Path:
    """Write ``report.html`` into *run_folder* from what lies there, and return its path.

    Reads ``verdict.json`` and, where they are, ``figures.json`` and ``recipe.json``. The page is
    one file without script, loads nothing and shows no home folder, host, user or key. Of a run
    with several students it compares them; each of them has a page of its own in its folder. Of a
    search it reads ``search.json`` in their place.

    Raises:
        DataError: ``verdict.json`` is missing, broken or of another version; another file is
            broken.
    """
    folder = Path(run_folder)
    if (folder / SEARCH).is_file():
        return _page_of_search(folder)
    verdict = read_verdict(folder / "verdict.json", FORMAT, FORMAT_OF_MANY)
    figures = _figures(folder / "figures.json")
    try:
        if verdict["format"] == FORMAT_OF_MANY:
            text = _render_many(folder, verdict)
        else:
            text = _render(folder, verdict, figures)
    except (TypeError, KeyError, AttributeError, RecursionError, IndexError, ValueError) as error:
        raise DataError(
            f"{folder / 'verdict.json'}: does not hold what a verdict of {verdict['format']} "
            f"holds, or figures.json not what figures of {FIGURES} hold "
            f"({type(error).__name__}: {error}); run the recipe again"
        ) from None
    target = folder / "report.html"
    write_atomic(target, text.encode("utf-8"))
    return target


def _page_of_search(folder: Path) -> Path:
    from attar.reporting.search import FORMAT, drawing

    found = redacted(_read(folder / SEARCH))
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{folder / SEARCH}: is not a search of the format {FORMAT}")
    try:
        text = _filled(
            "search.html",
            name=redacted(folder.resolve().name),
            search=found,
            drawing=drawing(found),
            environment=found["environment"],
            recipe=_recipe(folder / "recipe.json"),
        )
    except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
        raise DataError(
            f"{folder / SEARCH}: does not hold what a search of {FORMAT} holds "
            f"({type(error).__name__}: {error}); go on with the search by --resume"
        ) from None
    write_atomic(folder / "report.html", text.encode("utf-8"))
    return folder / "report.html"


def read_verdict(path: Path, *formats: str) -> dict[str, Any]:
    """The verdict that a run wrote, fit to be shown.

    Args:
        formats: that are right; that of a single student when none is given.

    Raises:
        DataError: it is broken or of another version.
    """
    found = redacted(_read(path))
    wanted = formats or (FORMAT,)
    if not isinstance(found, dict) or found.get("format") not in wanted:
        raise DataError(f"{path}: is not a verdict of the format {' or '.join(wanted)}")
    return found


def _figures(path: Path) -> dict[str, Any]:
    """What is to be drawn beside the verdict; nothing for a run that did not write it."""
    if not path.is_file():
        return EMPTY
    found = _read(path)
    if not isinstance(found, dict) or found.get("format") != FIGURES:
        raise DataError(f"{path}: is not a file of figures of the format {FIGURES}")
    try:
        # The pictures first: by chance, their base64 can hold what looks like a name or a key.
        pictures = _pictures(found)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: its disagreements are not as attar writes them ({error!r}); remove the file "
            "to have a page without figures"
        ) from None
    shown = EMPTY | redacted(found)
    for example, picture in zip(_examples(shown), pictures, strict=True):
        example["picture"] = picture
    return shown


def _pictures(found: dict[str, Any]) -> list[str]:
    return [data_uri(example) for example in _examples(found)]


def _examples(found: dict[str, Any]) -> list[dict[str, Any]]:
    told = found.get("disagreements")
    return told["examples"] if told else []


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except RecursionError:
        raise DataError(f"{path}: is nested too deeply") from None


def _render(folder: Path, verdict: dict[str, Any], figures: dict[str, Any]) -> str:
    from jinja2 import UndefinedError

    try:
        return _template("report.html").render(
            name=redacted(folder.resolve().name),
            verdict=verdict,
            environment=verdict.get("environment") or {},
            drawings=drawings(verdict, figures),
            waterfall=waterfall(verdict),
            size=_size,
            disagreements=figures["disagreements"],
            recipe=_recipe(folder / "recipe.json"),
        )
    except UndefinedError as error:
        raise KeyError(str(error)) from None


def _render_many(folder: Path, verdict: dict[str, Any]) -> str:
    from jinja2 import UndefinedError

    try:
        return _template("many.html").render(
            name=redacted(folder.resolve().name),
            verdict=verdict,
            environment=verdict.get("environment") or {},
            drawing=drawing(verdict),
            recipe=_recipe(folder / "recipe.json"),
        )
    except UndefinedError as error:
        raise KeyError(str(error)) from None


def _filled(template: str, **values: Any) -> str:
    from jinja2 import UndefinedError

    try:
        return str(_template(template).render(**values))
    except UndefinedError as error:
        raise KeyError(str(error)) from None


def _size(count: float) -> str:
    """Bytes to three digits."""
    return unit(float(f"{count:.3g}"), "B")


@cache
def _template(name: str) -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _source(name: str) -> str:
    return files("attar.reporting").joinpath(name).read_text(encoding="utf-8")


def _recipe(path: Path) -> str | None:
    if not path.is_file():
        return None
    from ruamel.yaml import YAML

    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    writer.allow_unicode = True
    text = StringIO()
    writer.dump(redacted(_read(path)), text)
    return text.getvalue()
