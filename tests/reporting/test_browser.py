"""The page in a browser: nothing is refused, nothing is missing, nothing is cut off."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest

from attar.evaluation.steps import table
from attar.reporting import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--proxy-server=127.0.0.1:9", "--enable-logging=stderr", "--v=0"),
]
MEASURE = """
<script>
addEventListener("load", () => {
  const inside = document.querySelector("iframe").contentDocument;
  const boxes = [...inside.querySelectorAll("svg[id], img, table")].map(each => {
    const box = each.getBoundingClientRect();
    return [each.id || each.tagName, box.width, box.height, box.left, box.right];
  });
  const wide = inside.documentElement.scrollWidth;
  const lines = [...inside.querySelectorAll(".steps td")].map(each => {
    const range = inside.createRange();
    range.selectNode(each.firstChild);
    return range.getClientRects().length;
  });
  const tables = [...inside.querySelectorAll(".wide")];
  const cut = tables.filter(each => each.scrollWidth > each.clientWidth).map(e => e.className);
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = JSON.stringify({boxes, wide, cut, lines});
});
</script>
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


def opened(tmp_path: Path, address: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={tmp_path / 'browser'}", *more, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def measured(run: Path, tmp_path: Path, width: int) -> Any:
    """The page has no script, so a page around it measures; without the policy, which it obeys."""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page(run).read_text())
    frame = f'<iframe style="width:{width}px;height:4000px" srcdoc="{escape(text)}"></iframe>'
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}{MEASURE}")
    done = opened(tmp_path, outer.as_uri(), "--dump-dom", "--window-size=1600,1000")
    return json.loads(re.search(r"<pre>(.*)</pre>", done.stdout)[1])  # type: ignore[index]


def test_no_error_with_the_network_off(run: Path, tmp_path: Path) -> None:
    done = opened(tmp_path, page(run).as_uri(), "--dump-dom")
    assert "figure-validation" in done.stdout
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize("width", [390, 1440])
def test_every_figure_has_a_box_inside_the_screen(run: Path, tmp_path: Path, width: int) -> None:
    found = measured(run, tmp_path, width)
    assert len(found["boxes"]) == 9 + 3 + 3  # figures, images, tables
    for name, wide, high, left, right in found["boxes"]:
        assert wide > 80, name
        assert high > 40, name
        assert 0 <= left < right <= width, name
    assert found["wide"] <= width
    assert found["cut"] == []  # no table has to be moved to be read


@pytest.mark.parametrize("width", [390, 640, 1200])
def test_no_number_of_a_stage_is_parted_from_its_unit(
    run: Path, tmp_path: Path, width: int
) -> None:
    told = json.loads((run / "verdict.json").read_text())
    cost = told["models"]["teacher"]["cost"] | {"bytes": 188_400, "macs": 414_500}
    start = {"do": "export torch_export", "cost": cost, "parameters": 44_226, "bytes": 188_400}
    steps = [start | {"score": score, "told": "9,130 weights of 10 layers"} for score in (0.1, 0.9)]
    teacher = {"score": 0.976, "cost": cost}
    rows = table("accuracy", 719, teacher, steps)
    told["chain"] = {"seeds": 1, "teacher": teacher, "steps": steps, "table": rows}
    (run / "verdict.json").write_text(json.dumps(told))
    found = measured(run, tmp_path, width)
    assert len(found["lines"]) == 3 * 6
    assert max(found["lines"]) == 1
    assert found["wide"] <= width
    assert found["cut"] == []
