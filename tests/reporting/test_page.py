"""The page shows what the run wrote, to anyone, and can do nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attar.reporting import page
from attar.runtime import DataError

Verdict = Callable[..., dict[str, Any]]
Read = Callable[[Path], Any]

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</pre><img src=x onerror=alert(1)>",
    "</title><svg onload=alert(1)>",
    "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "<a href=javascript:alert(1)>x</a>",
    "javascript:alert(1)",
    "<iframe src=//evil.example>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href=//evil.example>",
    "<form action=//evil.example><input name=q>",
    "<style>@import '//evil.example'</style>",
    "<object data=//evil.example>",
    "<embed src=//evil.example>",
    "<video><source onerror=alert(1)>",
    "<math><mtext></form><form><mglyph><svg><mtext>",
    "<!--<img src=--><img src=x onerror=alert(1)//>",
    "]]><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "{{ 7 * 7 }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "&lt;script&gt;",
    "&#60;script&#62;",
    "\x1b[31mred\x1b[0m",
    "a\x00b\x07c",
    "\u202egnp.exe",
    "\ud800",
    "x" * 5000,
    "<svg><animate onbegin=alert(1) attributeName=x>",
    "<svg><a xlink:href=javascript:alert(1)><text>x",
    "</text></svg><script>alert(1)</script>",
    "</title></svg><img src=x onerror=alert(1)>",
    "<svg><foreignObject><iframe srcdoc='<script>alert(1)</script>'>",
    "<svg><use href=//evil.example/x.svg#a>",
    "<svg><style>@import url(//evil.example)</style>",
    "<svg><image href=//evil.example/x.png>",
    "url(//evil.example)",
    "expression(alert(1))",
    "data:text/html,<script>alert(1)</script>",
    "data:image/svg+xml,<svg onload=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<body onload=alert(1)>",
    "<input autofocus onfocus=alert(1)>",
    "<marquee onstart=alert(1)>",
    "<template><script>alert(1)</script></template>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<textarea></textarea><script>alert(1)</script>",
    "<plaintext>",
    "<frameset onload=alert(1)>",
    'x" style="background:url(//evil.example)',
    "x' class='stroke' onclick='alert(1)",
    "`onmouseover=alert(1)`",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{# comment #}",
]
OUTSIDE = re.compile(r"(?i)\burl\(|@import|expression\(|-moz-binding")
PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
DRAWN = {
    *("models", "size", "latency", "validation", "loss", "classes"),
    *("calibration-0", "calibration-1", "calibration-2"),
}
LINKS = {
    "src",
    "href",
    "action",
    "formaction",
    "data",
    "poster",
    "srcset",
    "background",
    "xlink:href",
}


def check_harmless(path: Path, found: Any) -> None:
    for tag, attributes in found.tags:
        assert tag not in {
            "script",
            "iframe",
            "object",
            "embed",
            "form",
            "base",
            "link",
            "a",
            "use",
            "image",
        }
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            assert PICTURE.fullmatch(attributes.pop("src"))
        assert not LINKS & set(attributes)
        assert not [value for value in attributes.values() if "url(" in (value or "")]
        if tag == "meta":
            assert attributes.get("http-equiv") in (None, "Content-Security-Policy")
    style = re.findall(r"<style>(.*?)</style>", path.read_text(encoding="utf-8"), re.DOTALL)
    assert len(style) == 1
    assert not OUTSIDE.search(style[0])


def drawn(found: Any) -> list[str]:
    """The names of the figures, each as often as it stands in the page."""
    ids = [a["id"] or "" for tag, a in found.tags if tag == "svg" and "id" in a]
    return sorted(each.removeprefix("figure-") for each in ids)


def test_a_full_run(run: Path, read: Read) -> None:
    path = page(run)
    assert path == run / "report.html"
    found = read(path)
    check_harmless(path, found)
    told = json.loads((run / "verdict.json").read_text())
    for text in (told["headline"], told["goal_line"], *told["notes"], *told["method"]):
        assert text in found.texts
    for row in (row for section in told["table"]["sections"] for row in section["rows"]):
        for cell in row["cells"]:
            assert not cell["text"] or cell["text"] in found.texts
    for row in told["class_table"]["rows"]:
        assert set(row["cells"]) <= set(found.texts)
    assert found.texts.index(told["headline"]) < found.texts.index(told["goal_line"])
    assert {"model.safetensors", "model.pt2", "2.94 kB", "0.0442", "8e-06"} <= set(found.texts)
    assert drawn(found) == sorted(DRAWN)
    assert found.count("polyline") == 3 + 3  # the arms; two terms of the student, one of its twin
    assert found.count("polygon") == 3  # the terms are the same for both seeds
    assert found.count("img") == 3  # 98 answers of the teacher are right and 95 of the student
    assert found.text.count("✓") == 3
    assert "student:\n  name: mlp\n  widths:\n  - 16\n" in found.text


def test_the_policy_and_the_screens(run: Path, read: Read) -> None:
    text = page(run).read_text()
    metas = [attributes for tag, attributes in read(run / "report.html").tags if tag == "meta"]
    policy = [m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert text.startswith("<!doctype html>\n<html lang=")


@pytest.mark.parametrize("missing", [["figures.json"], ["recipe.json"], []])
def test_files_that_may_be_missing(run: Path, read: Read, missing: list[str]) -> None:
    for name in [*missing, "metrics.jsonl"]:  # the log is read before, by who writes the figures
        (run / name).unlink()
    found = read(page(run))
    assert drawn(found) == sorted(
        ["models", "size", "latency"] if "figures.json" in missing else DRAWN
    )
    assert found.count("pre") == (0 if "recipe.json" in missing else 1)
    for heading in ("Learning", "Calibration", "Where teacher and student disagree"):
        assert (heading in found.texts) == ("figures.json" not in missing)


def test_a_run_on_numbers_has_no_figures_of_classes(tmp_path: Path, read: Read) -> None:
    from attar.data import TensorSource
    from attar.evaluation import judge
    from attar.evaluation.curves import figures
    from attar.tasks import Regression

    labels = torch.linspace(0, 1, 40)[:, None]
    source = TensorSource(labels, labels)
    task = Regression().fitted(source)
    rows = {n: {"values": labels + off, "labels": labels} for n, off in (("a", 0.1), ("b", 0.2))}
    models = {"teacher": [rows["a"]], "baseline": [rows["b"]], "distilled": [rows["a"]]}
    told = judge(task, **(models | {"teacher": rows["a"]})).to_json()
    (tmp_path / "verdict.json").write_text(json.dumps(told))
    made = figures(task, source, models, log=tmp_path / "metrics.jsonl")
    (tmp_path / "figures.json").write_text(json.dumps(made))
    found = read(page(tmp_path))
    assert drawn(found) == ["models"]
    assert not {"Learning", "Calibration", "Class by class", "What the quality costs"} & set(
        found.texts
    )


def test_a_verdict_of_little(run: Path, read: Read, verdict: Verdict) -> None:
    rows = {"logits": torch.eye(2), "labels": torch.tensor([0, 1])}
    little = {"teacher": None, "baseline": None, "costs": None, "seconds": None}
    (run / "verdict.json").write_text(json.dumps(verdict(distilled=[rows], **little)))
    found = read(page(run))
    check_harmless(run / "report.html", found)
    assert any(text.startswith("NOT COMPARED") for text in found.texts)
    assert "Goal" not in found.texts
    assert drawn(found) == sorted(DRAWN - {"models", "size", "latency"})


def test_what_surrounds_a_run_is_shown_where_it_was_written(
    run: Path, read: Read, verdict: Verdict
) -> None:
    (run / "verdict.json").write_text(json.dumps(verdict() | {"environment": {"torch": "2.13.0"}}))
    assert "torch: 2.13.0" in read(page(run)).texts


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_text(
    tmp_path: Path, read: Read, verdict: Verdict, figured: Verdict, text: str
) -> None:
    rows = verdict.__globals__["rows"]
    told = verdict(classes=(text, "yes"), others={text: [rows(50)]})
    told["exports"][0] |= {"path": text, "sha256": text}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "verdict.json").write_text(json.dumps(told))
    (folder / "recipe.json").write_text(json.dumps({text: [text, {"name": text}]}))
    made = figured(folder, (text, "yes"), arms=("distilled", text), term=text)
    made["calibration"][text] = made["calibration"].pop("baseline")
    (folder / "figures.json").write_text(json.dumps(made))
    path = page(folder)
    found = read(path)
    check_harmless(path, found)
    assert drawn(found) == sorted(DRAWN)
    if len(text) < 12 and text.isprintable():
        assert found.texts.count(text) > 5
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", found.text)
    plain = all(" " <= sign <= "~" for sign in text)
    if plain:
        assert text in found.texts


@given(st.text(max_size=40), st.sampled_from(["headline", "metric", "outcome"]))
def test_any_text_in_any_place(text: str, place: str) -> None:
    import tempfile

    from attar.evaluation import judge
    from attar.tasks import TabularClassification

    rows = {"logits": torch.eye(2), "labels": torch.tensor([0, 1])}
    told = judge(TabularClassification(classes=2), distilled=[rows], baseline=[rows]).to_json()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "verdict.json").write_text(json.dumps(told | {place: text}))
        path = page(folder)
        assert path.read_text(encoding="utf-8").count("<script") == 0


@pytest.mark.parametrize("exports", [[], None])
def test_a_run_without_exports_says_nothing_of_them(
    run: Path, read: Read, verdict: Verdict, exports: list[Any] | None
) -> None:
    told = verdict() | {"exports": exports}
    if exports is None:
        del told["exports"]  # a run of an earlier version
    (run / "verdict.json").write_text(json.dumps(told))
    assert "The exported files" not in read(page(run)).texts


def test_a_folder_with_a_hostile_name(run: Path, read: Read) -> None:
    folder = run.rename(run.parent / "<img src=x onerror=alert(1)>")
    check_harmless(folder / "report.html", read(page(folder)))


def test_home_host_user_and_keys_are_not_shown(
    run: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SERVICE_API_KEY", "canary-93518274")
    monkeypatch.setattr("socket.gethostname", lambda: "node-17")
    monkeypatch.setattr("getpass.getuser", lambda: "student")
    recipe = {
        "student": "mlp",
        "data": "/home/ada/data and /home/bob/data",
        "teacher": "node-17:8000 with canary-93518274, hf_abcdefghijklmnopqrstuv",
        "contact": "student@node-17",
        "canary-93518274": 1,
    }
    (run / "recipe.json").write_text(json.dumps(recipe))
    found = read(page(run)).text
    for secret in ("ada", "bob", "node-17", "canary", "hf_abc", "student@"):
        assert secret not in found
    assert "student: mlp" in found
    assert "~/data and /home/[user]/data" in found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("verdict.json", None, "there is no such file"),
        ("verdict.json", "{", "not a JSON file"),
        ("verdict.json", "[]", "not a verdict of the format attar-verdict/1"),
        ("verdict.json", '{"format": "attar-verdict/9"}', "not a verdict of the format"),
        ("verdict.json", '{"format": "attar-verdict/1"}', "does not hold what a verdict"),
        ("verdict.json", "[" * 100_000, "nested too deeply|not a JSON file"),
        ("recipe.json", "{", "not a JSON file"),
        ("figures.json", "{", "not a JSON file"),
        ("figures.json", "[]", "not a file of figures of the format attar-figures/1"),
        ("figures.json", '{"format": "attar-figures/2"}', "not a file of figures"),
        ("figures.json", "[" * 100_000, "nested too deeply|not a JSON file"),
    ],
)
def test_broken_files_are_named(run: Path, name: str, text: str | None, message: str) -> None:
    (run / name).unlink() if text is None else (run / name).write_text(text)
    with pytest.raises(DataError, match=message) as error:
        page(run)
    assert name in str(error.value)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "key", ["table", "models", "summary", "notes", "class_table", "highlights", "exports"]
)
@pytest.mark.parametrize("wrong", [3, [3], {"a": 3}, "text"])
def test_a_verdict_of_another_make_is_an_error_or_a_page(
    run: Path, verdict: Verdict, key: str, wrong: Any
) -> None:
    (run / "verdict.json").write_text(json.dumps(verdict() | {key: wrong}))
    with suppress(DataError):
        page(run)


@pytest.mark.parametrize("key", ["validation", "loss", "classes", "calibration", "disagreements"])
@pytest.mark.parametrize("wrong", [3, [3], {"a": 3}, "text", [{"points": [[1]]}]])
def test_figures_of_another_make_are_an_error_or_a_page(run: Path, key: str, wrong: Any) -> None:
    told = json.loads((run / "figures.json").read_text())
    (run / "figures.json").write_text(json.dumps(told | {key: wrong}))
    with suppress(DataError):
        page(run)


def test_a_picture_is_not_redacted_and_its_words_are(
    run: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = json.loads((run / "figures.json").read_text())
    example = told["disagreements"]["examples"][0]
    before = [a["src"] for tag, a in read(page(run)).tags if tag == "img"]
    monkeypatch.setenv("SERVICE_TOKEN", example["pixels"][:20])
    example["label"] = f"has {example['pixels'][:20]}"
    (run / "figures.json").write_text(json.dumps(told))
    found = read(page(run))
    assert [a["src"] for tag, a in found.tags if tag == "img"] == before
    assert "has [redacted]" in found.texts


def test_a_page_of_a_thousand_classes_is_small(
    tmp_path: Path, verdict: Verdict, figured: Verdict
) -> None:
    told = verdict()
    row = told["class_table"]["rows"][0]
    told["class_table"]["rows"] = [row] * 1000
    (tmp_path / "verdict.json").write_text(json.dumps(told))
    names = tuple(f"class {number}" for number in range(1000))
    (tmp_path / "figures.json").write_text(json.dumps(figured(tmp_path, names)))
    assert page(tmp_path).stat().st_size < 1_000_000
