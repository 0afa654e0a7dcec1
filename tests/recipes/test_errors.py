"""What a new user gets wrong: one sentence, its place, the nearest right name, no training."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import attar
from attar.recipes import load_recipe
from attar.runtime import PreflightError, UsageError

# (what is written, what stands there instead, line:column, what is said)
WRONG = [
    ("stages:", "stage:", "7:1", "there is no 'stage' here; did you mean 'stages'?"),
    ("epochs: 2", "epoch: 2", "9:5", "there is no 'epoch' here; did you mean 'epochs'?"),
    ("temperature: 4", "temprature: 4", "12:38", "did you mean 'temperature'?"),
    ("do: distill", "do: distil", "8:9", "no 'distil' in stages; did you mean 'distill'?"),
    ("kl_divergence", "kl_divergense", "12:23", "did you mean 'kl_divergence'?"),
    ("name: mlp, widths: [8]", "name: mpl", "6:17", "no 'mpl' in models; did you mean 'mlp'?"),
    ("data: digits", "data: digit", "2:7", "no 'digit' in readers; did you mean 'digits'?"),
    ("image-classification", "imageclasification", "1:7", "did you mean 'image-classification'?"),
    ("epochs: 2", "epochs: two", "9:13", "epochs is 'two': it must be a valid integer"),
    ("epochs: 2", "epochs: 2.5", "9:13", "epochs is 2.5: it must be a valid integer"),
    ("epochs: 2", "epochs: true", "9:13", "epochs is True: it must be a valid integer"),
    ("epochs: 2", "epochs: -1", "9:13", "epochs is -1: it must be greater than or equal to 1"),
    ("weight: 0.9", "weight: -0.9", "12:65", "weight is -0.9: it must be greater than or equal"),
    ("temperature: 4.0", "temperature: 0", "12:51", "temperature is 0: it must be greater than 0"),
    ("weight: 0.9", "weight: yes", "12:65", "'yes'"),
    ("[8]", "8", "6:30", "widths is 8: it must be a list, such as [32]"),
    ("[8]", "[8, x]", "6:30", "it must be a valid integer"),
    ("- {loss", "{loss", None, "expected a list"),
    ("label_weight: 0.1", "label_weight: 0.1\n    epochs: 3", "14:5", "'epochs' stands here a se"),
    ("widths: [8]", "widths: !!int 8", "6:30", "tags (!) are not allowed"),
    ("widths: [8]", "widths: !!python/object/apply:os.mkdir [x]", "6:30", "tags (!) are not"),
    ("widths: [8]", "widths: &w [8]", "6:30", "anchors (&) and aliases (*) are not allowed"),
    ("widths: [8]", "widths: *w", "6:30", "anchors (&) and aliases (*) are not allowed"),
    ("widths: [8]", "<<: {a: 1}", "6:22", "a key must be a plain word"),
    ("widths: [8]", "outputs: 8", "6:22", "'outputs' is supplied and cannot be written here"),
    ("label_weight: 0.1", "seed: 3", "13:5", "'seed' is supplied and cannot be written here"),
    ("loss: {name: kl_divergence, temperature: 4.0}", "student: output:logits", "12:9",
     "'loss' is missing here"),
    ("data: digits\n", "", "1:1", "'data' is missing here"),
    ("  train: {epochs: 4, batch_size: 32}\n", "", "4:3", "a model but no knowledge"),
    ("  train:", "  load: x\n  train:", "4:3", "either loaded or trained"),
    ("stages:", "goal: {retain: 1.5}\nstages:", "7:16", "less than or equal to 1"),
    ("stages:", "seeds: 0\nstages:", "7:8", "seeds is 0: it must be greater"),
    ("stages:", "goal: 0.9\nstages:", "7:7", "expected a table of keys and values, not 0.9"),
    ("stages:", "stages: [", None, "expected"),
    ("task:", "\ttask:", "1:1", "cannot start any token"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "place", "says"), WRONG, ids=[w[1][:30] for w in WRONG])
def test_a_mistake_is_one_sentence_with_its_place(
    write: Callable[..., Path], old: str, new: str, place: str | None, says: str
) -> None:
    path = write(old, new)
    with pytest.raises(PreflightError) as told:
        load_recipe(path)
    message = str(told.value)
    assert says in message
    assert "\n" not in message
    assert re.match(re.escape(str(path)) + r":\d+:\d+: ", message)
    if place is not None:
        assert message.startswith(f"{path}:{place}: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "is a table of keys"),
        ("task: a\n---\ntask: b\n", "one document"),
        ("a: " + "[" * 40 + "]" * 40, "deeper than 32 levels"),
        ("a: " + "x" * (1 << 20), "larger than 1 MiB"),
    ],
    ids=["empty", "comment", "list", "two", "deep", "large"],
)
def test_what_is_no_recipe_is_said(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(PreflightError, match=says):
        load_recipe(path)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="there is no such file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(PreflightError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PreflightError, match="not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.0.epochs", "write PATH=VALUE"),
        ("stages.0.epochs=-1", "override 'stages.0.epochs=-1'.*: epochs is -1"),
        ("stages.0.epoch=1", "did you mean 'epochs'"),
        ("stages.1.epochs=1", "has no 'stages.1'"),
        ("stages.0.epochs.x=3", "nowhere to put 'stages.0.epochs.x'"),
        ("seed=!!int 3", "tags"),
        ("stages.².epochs=1", "has no 'stages.²'"),
        ("data.0=5", "nowhere to put 'data.0'"),
        ("seed=2001-99-99", "'2001-99-99' is no value"),
        ("seed=99999999999999999999", "less than"),
        ("stages=[]", "no stages"),
        ("teachr.load=x", "no 'teachr' here; did you mean 'teacher'"),
        ("search.trials=2", "'space' is missing here"),
        (
            "stages.0.optimizer.lr=0.1",
            r"^override .*: expected a name of opt.*{name: NAME, lr: ...}",
        ),
        ("stages.0.terms=[kl_divergence]", r"not 'kl_divergence'; write {loss: kl_divergence}$"),
        ("stages.0.terms=[3]", "keys and values, not 3$"),
    ],
)
def test_a_wrong_override_is_said(write: Callable[..., Path], override: str, says: str) -> None:
    with pytest.raises(PreflightError, match=says):
        load_recipe(write(), overrides=[override])


def test_an_override_makes_the_tables_on_its_way(write: Callable[..., Path]) -> None:
    told = load_recipe(write(), overrides=["goal.retain=0.9", "teacher.cache.dtype=float16"])
    assert told.recipe.goal is not None
    assert told.recipe.goal.retain == 0.9
    assert told.full["teacher"]["cache"]["dtype"] == "float16"
    assert load_recipe(
        write("stages:", "goal:\nstages:"), overrides=["goal.retain=0.9"]
    ).recipe.goal


@pytest.mark.parametrize(
    ("rows", "share", "more"), [(40, 0.1, "validation: 0.3"), (18, 0.3, "of the data")]
)
def test_a_right_teacher_that_few_rows_cannot_show_is_not_called_wrong(
    rows: int, share: float, more: str
) -> None:
    """It has every one of them right; the interval of so few reaches below a constant answer."""
    inputs = torch.linspace(-1, 1, rows)[
        torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    ]
    labels = (inputs > 0).long()
    teacher = nn.Linear(1, 2)
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor([[-9.0], [9.0]]))
        teacher.bias.zero_()
    recipe = attar.Recipe(
        task=attar.tasks.TabularClassification(classes=2),
        data=attar.data.tensors(inputs[:, None], labels, inputs[:, None], labels),
        teacher=teacher,
        student=lambda: nn.Linear(1, 2),
        stages=[partial(attar.distill, terms=[attar.Term(attar.losses.kl_divergence)], epochs=1)],
        validation=share,
    )
    with pytest.raises(PreflightError) as told:
        attar.check(recipe)
    said = str(told.value)
    assert said.startswith(f"{round(share * rows)} validation rows are too few to tell")
    assert "accuracy on them is 1 [" in said
    assert more in said
    assert "train" not in said


def test_a_bomb_of_aliases_is_refused_at_its_first_anchor(tmp_path: Path) -> None:
    lines = ["a: &a [x, x]"] + [f"b{i}: &b{i} [*a, *a]" for i in range(20)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(PreflightError, match=":1:4: anchors"):
        load_recipe(path)


def test_no_name_in_a_file_selects_code(write: Callable[..., Path]) -> None:
    """Only public names of the rooms: never a module's path, a dunder or a helper."""
    for name in ("os.system", "attar.losses.mse", "__import__", "check_logits", "F", "torch"):
        with pytest.raises(PreflightError, match="in losses"):
            load_recipe(write("kl_divergence, temperature: 4.0", f"'{name}'"))


PLUGIN = """\
from torch import nn
__all__ = ["tiny"]
def tiny(shape, outputs, *, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, outputs))
"""


def test_a_plugin_adds_its_names_and_only_when_it_is_named(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("{name: mlp, widths: [8]}", "{name: tiny, width: 3}")
    with pytest.raises(PreflightError, match="no 'tiny' in models"):
        load_recipe(path)
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    recipe = load_recipe(path, plugins=[str(plugin)]).recipe
    assert recipe.student.keywords == {"width": 3}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "has no __all__"),
        ("__all__ = ['gone']", "'gone', which is not callable"),
        ("__all__ = ['mlp']\ndef mlp(): pass", "already the name of something in attar"),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_wrong_plugin_is_said(
    write: Callable[..., Path], tmp_path: Path, text: str, says: str
) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(text)
    with pytest.raises(UsageError, match=says):
        load_recipe(write(), plugins=[str(plugin)])


def test_a_plugin_that_is_not_there_is_said(write: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        load_recipe(write(), plugins=["absent.py"])
