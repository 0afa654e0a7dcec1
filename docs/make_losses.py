"""Makes the generated part of docs/losses.md from the docstrings and the tests of the losses.

What stands between the two marks of the page is made; the rest of it is written by hand.

    python docs/make_losses.py [--check]
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn

from attar import losses

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "losses.md"
BEGIN, END = "<!-- made by docs/make_losses.py -->", "<!-- end of what is made -->"
# Losses that a law's own test leaves out, by the name of its list in tests/laws/test_losses.py.
LEFT_OUT = {
    "zero at equality": "NEVER_ZERO",
    "gradient is that of the value": "HELD_WEIGHT",
}
LABELS = {"Shapes": "Shapes", "Paper": "Weight and paper", "Papers": "Weight and papers"}
Loss = Callable[..., Any]
NAMES = [name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))]


def main() -> int:
    before = PAGE.read_text(encoding="utf-8")
    after = page(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print("docs/losses.md is not what the docstrings give: run python docs/make_losses.py")
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


def page(text: str) -> str:
    """The page with its generated part as the sources give it now."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return head + BEGIN + "\n\n" + generated() + "\n" + END + tail


def generated() -> str:
    golden, laws = goldens_by_loss(), laws_by_loss()
    parts = [index(), "\n".join(law_lines(laws))]
    for names in families().values():
        parts += [section(name, golden.get(name, [])) for name in names]
    return "\n\n".join(parts) + "\n"


def families() -> dict[str, list[str]]:
    """The names by module, in the order in which the modules define them."""
    found: dict[str, list[str]] = {}
    for name in NAMES:
        found.setdefault(getattr(losses, name).__module__, []).append(name)
    for names in found.values():
        names.sort(key=lambda name: inspect.getsourcelines(getattr(losses, name))[1])
    return dict(sorted(found.items()))


# Docstrings


def paragraphs(loss: Loss) -> list[str]:
    """The docstring in paragraphs, its example left out."""
    found = (inspect.getdoc(loss) or "").split("\n\n")
    return [p if ">>>" in p else " ".join(p.split()) for p in found]


def title(loss: Loss) -> tuple[str, str]:
    """The first line: the method's name, and what follows it, a formula more often than not."""
    name, _, formula = paragraphs(loss)[0].rstrip(".").partition(": ")
    return name, formula


def has_state(loss: Loss) -> bool:
    return issubclass(get_type_hints(loss)["return"], nn.Module)


def needs(loss: Loss) -> list[str]:
    """What a stage hands to the loss beside the student's signal."""
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY][1:]


def returns(loss: Loss) -> str:
    """`[N]`, a scalar, or both in words, as the docstring's sentence says."""
    text = " ".join(paragraphs(loss))
    if found := re.search(r"(?:Returns|[Gg]ives|[Vv]alue is) (\[N\]|a scalar)", text):
        return "`[N]`" if found[1] == "[N]" else "scalar"
    return ""


def citation(loss: Loss) -> str:
    """The first paper: its authors and year."""
    for paragraph in paragraphs(loss):
        if found := re.match(r"Papers?: (?:on \w+ )?(.*)", paragraph):
            authors = re.split(r", [\"“]|, \d{4}|, where", found[1])[0]
            years = re.findall(r"\b(?:19|20)\d\d\b", found[1])
            return f"{authors}, {years[0]}" if years else authors
    return ""


def section(name: str, golden: list[str]) -> str:
    """All that is known of one loss."""
    loss = getattr(losses, name)
    method, formula = title(loss)
    lines = [f"## `{name}`", f"{escape(method)}."]
    if formula:
        lines.append(f"```text\n{formula}\n```")
    if has_state(loss):
        lines.append(
            "*Has a state:* it is called once, with example signals, and gives the module that "
            "compares; what that holds is trained or kept with the student."
        )
    for paragraph in paragraphs(loss)[1:]:
        lines.append(shown(paragraph))
    lines.insert(-1, f"**Signature:** `{name}{signature(loss)}`")
    cases = f"published values {', '.join(golden)}" if golden else "no published values"
    lines.append(f"**Tested:** {cases}; in {', '.join(files_of(name))}.")
    return "\n\n".join(lines)


def files_of(name: str) -> list[str]:
    """The files of tests that name the loss."""
    files = sorted((ROOT / "tests" / "losses").glob("test_*.py"))
    named = [f for f in files if re.search(rf"\b{name}\b", f.read_text(encoding="utf-8"))]
    return [f"`tests/losses/{f.name}`" for f in named]


def shown(paragraph: str) -> str:
    if ">>>" in paragraph:
        return f"```pycon\n{paragraph.strip()}\n```"
    label, _, rest = paragraph.partition(": ")
    if label in LABELS or label == "Neighbours":
        return f"**{LABELS.get(label, label)}:** {linked(escape(rest))}"
    return linked(escape(paragraph))


def signature(loss: Loss) -> str:
    """Names and defaults, without the types."""
    words: list[str] = []
    for p in inspect.signature(loss).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        words.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    return f"({', '.join(words)})"


def escape(text: str) -> str:
    """Formulas in prose are no Markdown: outside of code, `_`, `*` and `<` stand for themselves."""
    text = re.sub(r"(?<![`\w])(\[[^\[\]`]+\])", r"`\1`", text)  # shapes and intervals
    parts = text.split("`")
    parts[::2] = [re.sub(r"([_*|\[\]])", r"\\\1", p).replace("<", "&lt;") for p in parts[::2]]
    return "`".join(parts)


def linked(text: str) -> str:
    """Names of losses lead to their sections."""
    known = "|".join(NAMES)
    return re.sub(rf"`({known})`", r"[`\1`](#\1)", text)


def index() -> str:
    """One table a family."""
    parts = ["## All losses"]
    for module, names in families().items():
        lead = (importlib.import_module(module).__doc__ or "").split("\n")[0]
        rows = [
            "| loss | method | given | returns | paper |",
            "|---|---|---|---|---|",
            *(row(name) for name in names),
        ]
        parts += [f"### {module.split('.')[-1].capitalize()}", escape(lead), "\n".join(rows)]
    return "\n\n".join(parts)


def row(name: str) -> str:
    loss = getattr(losses, name)
    form = "a module" if has_state(loss) else returns(loss)
    cells = [escape(title(loss)[0]), ", ".join(needs(loss)), form, escape(citation(loss))]
    return f"| [`{name}`](#{name}) | {' | '.join(cells)} |"


# Tests


def laws_by_loss() -> dict[str, list[str]]:
    """Each law of the family, by its sentence, and the losses that are held to it."""
    module = load(ROOT / "tests" / "laws" / "test_losses.py")
    found: dict[str, list[str]] = {}
    for name, test in vars(module).items():
        for mark in getattr(test, "pytestmark", []) if name.startswith("test_") else []:
            if mark.name == "parametrize" and mark.args[0] == "loss":
                sentence = name.removeprefix("test_").replace("_", " ")
                out = getattr(module, LEFT_OUT.get(sentence, ""), set())
                ids = [case.id for case in mark.args[1] if hasattr(case, "id")]
                found[sentence] = [i for i in ids if i not in out]
    return found


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"made_from_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def law_lines(laws: Mapping[str, list[str]]) -> Iterator[str]:
    every = set(NAMES)
    plain = {name for name in every if not has_state(getattr(losses, name))}
    yield "## Laws"
    yield ""
    yield (
        f"What the {len(plain)} losses without a state are held to by `tests/laws/test_losses.py`. "
        "A new loss is held to it by being there."
    )
    yield ""
    yield "| law | losses |"
    yield "|---|---|"
    for law, held in sorted(laws.items(), key=lambda item: -len(item[1])):
        missing = sorted(plain - set(held))
        word = "all" if not missing else f"{len(held)}"
        if missing and len(missing) <= 12:
            word = "all but " + ", ".join(f"`{name}`" for name in missing)
        yield f"| {law} | {word} |"
    yield ""
    states = ", ".join(f"[`{n}`](#{n})" for n in NAMES if n in every - plain)
    yield (
        f"The losses with a state ({states}) have tests of their own. Zero at equality is not "
        "asked of losses that full agreement leaves above zero, and the gradient's law not of "
        "those with a weight through which no gradient flows."
    )


def goldens_by_loss() -> dict[str, list[str]]:
    """For each loss the published cases its tests compare it with, each with its source."""
    cases: dict[str, Any] = {}
    for file in sorted((ROOT / "tests" / "oracles").glob("*.json")):
        cases |= json.loads(file.read_text(encoding="utf-8"))["cases"]
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "tests" / "losses").glob("test_*.py")):
        for name, case in pairs(ast.parse(file.read_text(encoding="utf-8")), set(cases)):
            found.setdefault(name, set()).add(case)
    return {name: [source(case, cases[case]) for case in sorted(s)] for name, s in found.items()}


def source(case: str, about: Mapping[str, Any]) -> str:
    origin = "worked by hand" if case.startswith("indep_") else about["repo"]
    return f"`{case}` ({origin})"


def pairs(tree: ast.Module, cases: set[str]) -> Iterator[tuple[str, str]]:
    """(loss, golden case) of each test that loads the case; from one row where rows pair them."""
    known: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            known |= {t.id: node.value for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("test_"):
            known[node.name] = node
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield from _of_test(node, known, cases)


def _of_test(
    test: ast.FunctionDef, known: Mapping[str, ast.AST], cases: set[str]
) -> Iterator[tuple[str, str]]:
    parts = [part for mark in test.decorator_list for part in ast.walk(mark)]
    rows = [_words(part, known, cases) for part in parts if isinstance(part, ast.Tuple | ast.Call)]
    paired = [(names, found) for names, found in rows if len(names) == 1 and found]
    if any(len(found) == 1 for _, found in paired):
        yield from (
            (n, c) for names, found in paired if len(found) == 1 for n in names for c in found
        )
        return
    words = [_words(part, known, cases) for part in (*test.body, *test.decorator_list)]
    called = {name for names, _ in words for name in names}
    yield from ((name, case) for name in called for _, found in words for case in found)


def _words(
    node: ast.AST, known: Mapping[str, ast.AST], cases: set[str]
) -> tuple[set[str], set[str]]:
    """The losses and the golden cases that are named in a piece of a test."""
    names: set[str] = set()
    found: set[str] = set()
    for part in ast.walk(node):
        word = part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", None)
        if word in known:
            more = _words(known[word], {k: v for k, v in known.items() if k != word}, cases)
            names |= more[0]
            found |= more[1]
        elif word in NAMES:
            names.add(str(word))
        if isinstance(part, ast.Constant) and part.value in cases:
            found.add(str(part.value))
    return names, found


if __name__ == "__main__":
    sys.exit(main())
