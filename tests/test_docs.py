"""What the pages say is what happens: blocks run; keys, names, links and messages are real."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer

import attar
from attar.recipes import Goal, Recipe, Search, TeacherPlan, load_recipe, parse, resolve, rooms
from attar.recipes.resolve import shown, spelt
from attar.runtime import PreflightError, UsageError
from attar.training.plan import make_plan

cli = importlib.import_module("attar.cli.main")
ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RUN = ["README.md", "docs/start.md", "docs/python.md"]
REST = sorted(
    str(page.relative_to(ROOT))
    for page in PAGES
    if "```python" in page.read_text() and str(page.relative_to(ROOT)) not in RUN
)
EXAMPLES = sorted(ROOT.glob("examples/*.yaml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def with_blocks(language: str) -> list[tuple[str, str]]:
    found = [(p, block) for p in PAGES for block in blocks(p.read_text(), language)]
    return [(str(page.relative_to(ROOT)), block) for page, block in found]


# ---------------------------------------------------------------- what can be run


def run_python(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = "\n".join(blocks(read(name), "python"))
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("name", RUN)
def test_the_python_of_a_page_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    done = run_python(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.skipif(not os.environ.get("ATTAR_DEEP"), reason="run by make test-deep")
@pytest.mark.parametrize("name", REST)
def test_the_python_of_every_other_page_runs_and_prints_what_is_said(
    name: str, tmp_path: Path
) -> None:
    done = run_python(name, tmp_path)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^```python\n.*?^```\n\n```text\n(.*?)^```$", read(name), re.M | re.S)
    for output in said:
        assert output in done.stdout


def commands(text: str) -> list[list[str]]:
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_of_a_page_parses(page: Path) -> None:
    """Flags and words are read as the command reads them; nothing is run."""
    group: Any = typer.main.get_command(cli.app)
    for words in commands(page.read_text()):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", read("Makefile"), re.MULTILINE), words
        elif words[0] == "attar":
            assert words[1] in group.commands, words
            group.commands[words[1]].make_context(words[1], words[2:])
        else:
            assert words[0] in {"source", "export", "python"}, words


def test_every_recipe_that_the_readme_checks_passes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    checked = [w for w in commands(read("README.md")) if w[:2] == ["attar", "check"]]
    assert checked
    for words in checked:
        assert called(words[1:]) == 0
        assert "Nothing was trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "run",
        "check",
        "distill",
        "evaluate",
        "list",
        "report",
        "demo",
        "export",
        "import",
        "track",
        "cache",
        "search",
    ],
)
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called([name, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def called(words: list[str]) -> int:
    return cli._guarded(lambda: cli.app(words, standalone_mode=False))


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_resolves(path: Path) -> None:
    own = path.with_suffix(".py")
    plugins = [str(own)] if own.is_file() else []
    loaded = load_recipe(path, plugins=plugins)
    assert resolve(parse(json.dumps(loaded.full)), plugins=plugins).full == loaded.full


def test_the_recipes_of_the_pages_resolve() -> None:
    found = [(name, text) for name, text in with_blocks("yaml") if "stages:" in text]
    assert {name for name, _ in found} >= {"README.md", "docs/start.md", "docs/recipes.md"}
    for name, text in found:
        resolve(parse(text, name))


def test_the_readme_shows_the_example() -> None:
    """Shortened, but no value of it is another."""
    (text,) = blocks(read("README.md"), "yaml")
    shown_, real = parse(text).value, parse(read("examples/few_labels.yaml")).value
    assert within(shown_, real), shown_


def within(part: Any, whole: Any) -> bool:
    if isinstance(part, dict):
        return all(key in whole and within(value, whole[key]) for key, value in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(within, part, whole))
    return part == whole


def keys(heading: str) -> dict[str, str]:
    """The rows of the table under a heading of the recipes or the search: key to default."""
    page = "docs/search.md" if "search" in heading else "docs/recipes.md"
    section = read(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = section.split("\n| key | default |")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| `?(.+?)`? \|", table, re.MULTILINE))


def fields(kind: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(kind)}


def stage_fields() -> dict[str, Any]:
    supplied = {"seed", "device", "precision", "parallel"}
    plan = {k: v for k, v in fields(attar.Plan).items() if k not in supplied}
    return {
        "do": dataclasses.MISSING,
        "terms": dataclasses.MISSING,
        "label_weight": 0.1,
        "init": None,
    } | plan


SCHEMA = {
    "Keys of a recipe": fields(Recipe),
    "Keys of `teacher`": fields(TeacherPlan),
    "Keys of `goal`": fields(Goal),
    "Keys of `search`": fields(Search),
    "Keys of a stage": stage_fields(),
    "Keys of a term": fields(attar.Term),
}


@pytest.mark.parametrize("heading", SCHEMA)
def test_the_keys_of_a_recipe_and_their_defaults_are_the_schema(heading: str) -> None:
    told = keys(heading)
    assert set(told) == set(SCHEMA[heading])
    for key, default in SCHEMA[heading].items():
        if default is dataclasses.MISSING:
            assert told[key] == "required", key
            continue
        known, written = spelt(default)
        assert known, key
        said = parse(told[key], key).value
        named = isinstance(written, dict)
        assert said in (written, written["name"]) if named else said == written, key


# ---------------------------------------------------------------- names


PAGE_OF = {
    "augmentations": "docs/data.md",
    "losses": "docs/losses.md",
    "models": "docs/models.md",
    "projectors": "docs/projectors.md",
    "readers": "docs/data.md",
    "schedules": "docs/recipes.md",
    "stages": "docs/recipes.md",
    "tasks": "docs/tasks.md",
}


@pytest.mark.parametrize("room", PAGE_OF)
def test_every_public_name_and_option_stands_on_its_page(room: str) -> None:
    text = read(PAGE_OF[room])
    for name in rooms()[room]:
        assert f"`{shown(name)}`" in text, name
    if room == "losses":
        for name in rooms()[room]:
            assert f"\n## `{name}`\n" in text
    assert set(re.findall(r"^\| \[`(\w+)`\]", text, re.MULTILINE)) <= set(rooms()[room])


def test_the_door_stands_on_the_page_of_python() -> None:
    text = read("docs/python.md")
    verbs = [n for n in attar.__all__ if n[0] != "_" and not hasattr(getattr(attar, n), "__path__")]
    missing = [name for name in verbs if f"attar.{name}" not in text]
    assert not missing


@pytest.mark.parametrize("name", ["README.md", "docs/errors.md"])
def test_every_exit_code_is_told(name: str) -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", read(name), re.MULTILINE)}
    assert told == {int(code) for code in re.findall(r"(?:^|[:;] )(\d+) ", cli.EPILOG)}


def test_every_room_stands_in_the_tree() -> None:
    text = read("README.md")
    for room in (ROOT / "src" / "attar").glob("*/__init__.py"):
        assert f"`src/attar/{room.parent.name}/`" in text


# ---------------------------------------------------------------- messages


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that docs/errors.md speaks of."""
    (tmp_path / "digits.yaml").write_text(read("examples/digits.yaml"))
    net = attar.models.build("mlp", shape=(1, 8, 8), outputs=10)
    for name in ("student", "teacher"):
        attar.models.save(net, tmp_path / "runs" / "digits" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said_errors() -> Iterable[tuple[int, str, str]]:
    for section in read("docs/errors.md").split("\n## ")[1:]:
        code = re.match(r"(\d+):", section)
        for block in blocks(section, "console"):
            assert code is not None, section
            for command, message in re.findall(r"^\$ (.+)\n(.+)$", block, re.MULTILINE):
                yield int(code[1]), command, message


@pytest.mark.usefixtures("workplace")
def test_every_message_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(said_errors())
    assert len(found) > 20
    for code, command, message in found:
        words = shlex.split(command)
        assert words[0] == "attar"
        assert called(words[1:]) == code, command
        assert capsys.readouterr().err.strip() == message


def test_what_the_pages_say_of_a_recipe_is_refused() -> None:
    """The messages with a place, which need files of their own."""
    for name, text, says in (
        ("twice.yaml", "task: a\ntask: b\n", "the key 'task' stands here a second time"),
        ("anchor.yaml", "a: &x 1\nb: *x\n", "anchors (&) and aliases (*) are not allowed"),
        (
            "part.yaml",
            "task: regression\ndata: digits\n",
            "'teacher' and 'student' and 'stages' are missing here",
        ),
    ):
        with pytest.raises(PreflightError) as caught:
            resolve(parse(text, name))
        assert f"attar: {caught.value}\n" in read("docs/errors.md")
        assert says in str(caught.value)
    with pytest.raises(UsageError) as wrong:
        make_plan({"epoch": 3})
    assert str(wrong.value) in read("docs/python.md")


# ---------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", head).strip().lower() for head in heads]
    return {head.replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere() -> None:
    config = parse(read("mkdocs.yml"), "mkdocs.yml").value
    assert config["theme"]["font"] is False
    assert config["plugins"] == ["search"]
    listed = set(re.findall(r"[\w-]+\.md", read("mkdocs.yml")))
    assert listed == {page.name for page in ROOT.glob("docs/*.md")}
    assert not {"extra_css", "extra_javascript", "repo_url"} & set(config)
