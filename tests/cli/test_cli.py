"""The command as a shell sees it: words, streams, exit codes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from attar.cli import main

RECIPE = (Path(__file__).parents[1] / "recipes" / "conftest.py").read_text()
RECIPE = RECIPE.split('RECIPE = """\\\n')[1].split('"""')[0]


class Done(NamedTuple):
    """What a call of the command left behind."""

    returncode: int
    stdout: str
    stderr: str


Attar = Callable[..., Done]


@pytest.fixture
def attar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Attar:
    """Call the command in a folder of its own that holds recipe.yaml.

    In this process, by the same entry point as the console script: a new one would spend most
    of its time importing torch.
    """
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def called(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["attar", *words])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return Done(int(left.value.code or 0), out, err)

    return called


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("runs/x/.verdict.json.tmp-71", "runs/x/verdict.json"),
        ("runs/x/checkpoints/stage/step-000000003.tmp-71/FACTS",
         "runs/x/checkpoints/stage/step-000000003/FACTS"),
        ("data/mine.tmp-71-kept", "data/mine.tmp-71-kept"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_named_as_it_will_be(
    attar: Attar, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    def denied(*words: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("attar.recipes.check", denied)
    done = attar("check", "recipe.yaml")
    assert (done.returncode, done.stderr) == (74, f"attar: {said}: Permission denied\n")


def test_the_console_script_is_installed(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("attar")
    done = subprocess.run(
        [script, "run", "absent.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert done.stderr == "attar: absent.yaml: there is no such file\n"


def test_run_prints_the_table_the_verdict_and_where_the_report_is(
    attar: Attar, tmp_path: Path
) -> None:
    done = attar("run", "recipe.yaml", "seeds=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines()[:-3])) <= 80
    assert "teacher" in done.stdout
    assert "distilled 2/2" in done.stdout
    assert any(
        line.startswith(("BETTER", "NO DIFFERENCE", "WORSE")) for line in done.stdout.splitlines()
    )
    assert "runs/recipe/report.html" in done.stdout
    assert (tmp_path / "runs" / "recipe" / "report.html").is_file()
    again = attar("run", "recipe.yaml")
    assert again.returncode == 73
    assert again.stderr.startswith("attar: runs/recipe: already holds a run")


def test_json_is_the_verdict_and_nothing_else(attar: Attar, tmp_path: Path) -> None:
    done = attar("run", "recipe.yaml", "--json", "--run", "out")
    verdict = json.loads(done.stdout)
    assert verdict == json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert done.stderr == ""


def test_a_missed_goal_is_exit_1_and_quiet_is_two_lines(attar: Attar) -> None:
    """Two epochs of a tiny student cannot keep all that the teacher knows."""
    done = attar("run", "recipe.yaml", "goal={retain: 1.0}", "stages.0.epochs=1", "--quiet")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 2
    assert done.stdout.splitlines()[1].startswith("MISSED")


@pytest.mark.parametrize(("drop", "code"), [("0.0", 1), ("0.9", 0)])
def test_an_int8_file_that_lost_more_than_it_may_is_exit_1(
    attar: Attar, tmp_path: Path, drop: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    exporting = importlib.import_module("attar.exporting.export")
    real = exporting.lost

    def worse(*given: Any) -> Any:  # by 0.1, however few answers eight bits change
        found = real(*given)
        lost = found.drop + 0.1
        return replace(found, drop=lost, missed=lost > found.budget)

    monkeypatch.setattr(exporting, "lost", worse)
    stage = f"  - {{do: export, formats: [onnx_int8], drop: {drop}}}\n"
    (tmp_path / "recipe.yaml").write_text(RECIPE + stage)
    done = attar("run", "recipe.yaml")
    assert done.returncode == code
    assert ("more than the 0 it may lose" in done.stdout) == bool(code)


def test_a_saved_float_model_becomes_an_int8_file_by_its_training_rows(
    attar: Attar, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    assert attar("run", "recipe.yaml", "--quiet").returncode == 0
    words = ["runs/recipe/student", "--data", "digits", "--into", "out", "--formats", "onnx_int8"]
    done = attar("export", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.int8.onnx").is_file()


def test_check_prints_the_plan(attar: Attar, tmp_path: Path) -> None:
    done = attar("check", "recipe.yaml")
    assert done.returncode == 0
    for words in ("970 train", "4,810 parameters", "kl_divergence", "Nothing was trained"):
        assert words in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]
    assert json.loads(attar("check", "recipe.yaml", "--json").stdout)["seeds"] == 1


def test_distill_writes_a_recipe_that_runs_again(attar: Attar, tmp_path: Path) -> None:
    words = ("--teacher", "mlp", "--student", "mlp", "--data", "digits", "--epochs", "2")
    done = attar("distill", *words, "student.widths=[4]", "--run", "out")
    assert done.returncode == 0, done.stderr
    assert "do: distill" in done.stdout
    assert attar("check", "out/recipe.json").returncode == 0


def test_distill_takes_a_csv_file(attar: Attar, tmp_path: Path) -> None:
    lines = ["a,b,kind"] + [f"{i % 7},{i % 5},{'xyz'[i % 3]}" for i in range(200)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    words = ("--teacher", "mlp", "--student", "mlp", "--data", "table.csv", "--epochs", "30")
    assert attar("distill", *words).returncode == 64
    done = attar("distill", *words, "--target", "knd", "--run", "out")
    assert done.returncode == 65
    assert "did you mean 'kind'?" in done.stderr


def test_evaluate_scores_a_saved_model(attar: Attar, tmp_path: Path) -> None:
    assert attar("run", "recipe.yaml", "--run", "out", "--quiet").returncode == 0
    done = attar("evaluate", "out/student", "--data", "digits", "--json")
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    scores = verdict["models"]["distilled"]["scores"]
    assert json.loads(done.stdout) == pytest.approx(scores)
    assert "accuracy" in attar("evaluate", "out/student", "--data", "digits").stdout


def test_list_shows_every_room_and_the_options_of_one(attar: Attar) -> None:
    everything = attar("list").stdout
    for name in ("losses", "kl_divergence", "resnet", "digits", "sgd", "cosine", "mixup", "linear"):
        assert name in everything
    one = attar("list", "losses").stdout
    assert "temperature: 4.0" in one
    assert "student" not in one.split("kl_divergence")[1].split("\n")[1]
    wrong = attar("list", "losess")
    assert wrong.returncode == 64
    assert "did you mean 'losses'?" in wrong.stderr


def test_report_can_be_written_again(attar: Attar, tmp_path: Path) -> None:
    attar("run", "recipe.yaml", "--run", "out", "--quiet")
    (tmp_path / "out" / "report.html").unlink()
    assert attar("report", "out").stdout.strip().endswith("report.html")
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("run", "absent.yaml"), 78, "attar: absent.yaml: there is no such file"),
        (("run", "recipe.yaml", "stages.0.epochs=-1"), 78, "epochs is -1"),
        (("run", "recipe.yaml", "--fast"), 64, "--fast"),
        (("rnu", "recipe.yaml"), 64, "rnu"),
        (("run", "recipe.yaml", "--plugin", "absent.py"), 64, "there is no such file"),
        (("run", "recipe.yaml", "data={name: fashion_mnist, folder: absent}"), 65, "absent"),
        (
            ("run", "recipe.yaml", "data={name: csv, train: absent.csv, target: y}"),
            65,
            "absent.csv",
        ),
        (("run", "recipe.yaml", "teacher={load: absent}"), 65, "absent"),
        (("run", "recipe.yaml", "stages.0.optimizer={name: sgd, lr: 1.0e+6}"), 3, "not finite"),
        (("evaluate", "absent", "--data", "digits"), 65, "absent"),
        (("evaluate", "absent", "--data", "digts"), 64, "did you mean 'digits'"),
        (("report", "absent"), 65, "absent"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_an_error_is_one_line_and_a_documented_code(
    attar: Attar, words: tuple[str, ...], code: int, says: str
) -> None:
    done = attar(*words)
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("attar: ")
    assert says in line


def test_help_names_every_command_and_code_without_torch(attar: Attar) -> None:
    done = attar("--help")
    assert done.returncode == 0
    for word in ("run", "check", "distill", "evaluate", "list", "report", "78 wrong", "73 the run"):
        assert word in " ".join(done.stdout.split())
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, attar.cli; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == "False"
