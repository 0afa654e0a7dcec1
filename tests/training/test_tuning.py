"""What is frozen does not move, what thaws does, and a pull leads back to the start."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import mse
from attar.runtime import PreflightError, Run, UsageError
from attar.training import Home, adamw, fit, sgd
from attar.training.optimization import make_optimizer, parameter_groups
from attar.training.tuning import Anchor, Tuning, frozen, levels

TASK = attar.tasks.TabularClassification()
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 32, "optimizer": partial(sgd, lr=0.05)}


def net(seed: int, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = {
        "stem": nn.Sequential(nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()),
        "body": nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()),
        "head": nn.Linear(8, outputs),
    }
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def moved(before: nn.Module, after: nn.Module) -> set[str]:
    """Names of the tensors, statistics included, that training has changed."""
    then = before.state_dict()
    return {n for n, t in after.state_dict().items() if not torch.equal(t, then[n])}


def trained(data: Any, start: nn.Module, **options: Any) -> nn.Module:
    return attar.train(copy.deepcopy(start), data, TASK, **QUICK | options)


def names(*parts: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(parts)


# ---------------------------------------------------------------- freezing


@pytest.mark.parametrize(
    ("patterns", "learns"),
    [
        (["stem"], ("body", "head")),
        (["stem", "body.0"], ("body.1", "head")),
        (["*", "!head"], ("head",)),
        (["*", "!head", "!body.1"], ("body.1", "head")),
        (["b*y"], ("stem", "head")),
        (["head"], ("stem", "body")),
    ],
)
def test_what_is_frozen_does_not_move_and_all_else_does(
    blobs: Any, patterns: list[str], learns: tuple[str, ...]
) -> None:
    start = net(1)
    after = trained(blobs.train, start, freeze=patterns)
    assert moved(start, after) == {n for n in start.state_dict() if n.startswith(learns)}


def test_frozen_batch_norms_keep_their_statistics_and_learn_their_scales(blobs: Any) -> None:
    start = net(1)
    found = moved(start, trained(blobs.train, start, frozen_batch_norm=True))
    assert not {n for n in found if "running" in n or "batches" in n}
    assert {"stem.1.weight", "body.1.bias", "stem.0.weight"} <= found


def test_the_last_layer_is_the_head_whatever_it_is_called(blobs: Any) -> None:
    start = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    assert moved(start, trained(blobs.train, start, freeze=["*", "!head"])) == {
        "2.weight",
        "2.bias",
    }


def test_a_pattern_that_names_nothing_is_refused_with_the_nearest() -> None:
    with pytest.raises(PreflightError, match=r"no 'boddy'; did you mean 'body'\?"):
        frozen(net(1), ["boddy"])


def test_a_student_that_is_frozen_as_a_whole_is_refused_and_left_as_it_was(blobs: Any) -> None:
    start = net(1)
    with pytest.raises(PreflightError, match=r"leaves nothing .* spare its head"):
        attar.train(start, blobs.train, TASK, freeze=["*"], **QUICK)
    assert all(p.requires_grad for p in start.parameters())


def test_what_asked_for_no_gradient_before_does_not_ask_after(blobs: Any) -> None:
    start = net(1)
    start.stem.requires_grad_(False)
    attar.train(start, blobs.train, TASK, freeze=["body"], **QUICK)
    assert [p.requires_grad for p in start.parameters()] == [False] * 3 + [True] * 5


def test_the_plan_counts_what_is_trained(blobs: Any) -> None:
    plan = attar.training.check(
        net(1), None, blobs.train, TASK, label_weight=1.0, freeze=["*", "!head"]
    )
    assert plan.trained_parameters == 27


@pytest.mark.parametrize("options", [{"frozen_batch_norm": True}, {"freeze": ["stem", "body"]}, {}])
def test_a_batch_of_one_is_no_trouble_to_norms_that_keep_their_statistics(
    blobs: Any, options: dict[str, Any]
) -> None:
    start = net(1)
    if not options:
        start.stem.eval()
        start.body.eval()
    one_left = attar.data.Subset(blobs.train, torch.arange(33))
    assert moved(start, trained(one_left, start, **options))
    with pytest.raises(PreflightError, match="is a single one"):
        trained(one_left, net(1))


class Tied(nn.Module):
    """The head's weight is that of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.inner = nn.Linear(2, 2)
        self.last = nn.Linear(2, 2, bias=False)
        self.last.weight = self.first.weight


def test_a_tied_tensor_is_frozen_and_spared_by_any_of_its_names() -> None:
    inner = {"inner.weight", "inner.bias"}
    for name in ("first", "last", "last.weight", "head"):
        assert frozen(Tied(), [name]) == {"first.weight"}
        assert frozen(Tied(), ["*", f"!{name}"]) == inner
    assert levels(Tied()) == [["inner.weight", "inner.bias"], ["first.weight"]]


# ---------------------------------------------------------------- levels and thawing


@pytest.mark.parametrize(
    ("family", "options", "shape", "first", "count"),
    [
        ("resnet", {"depth": 14}, (1, 8, 8), ["stem", "stage1.0", "stage1.1", "stage2.0"], 8),
        ("vit", {"depth": 2}, (1, 8, 8), ["stem", "blocks.0", "blocks.1", "norm", "head"], 5),
        ("mlp", {"widths": [4, 4]}, (6,), ["blocks.0", "blocks.1", "head"], 3),
    ],
)
def test_levels_go_from_input_to_output_and_hold_each_parameter_once(
    family: str, options: dict[str, Any], shape: tuple[int, ...], first: list[str], count: int
) -> None:
    model = attar.models.build(family, shape=shape, outputs=3, **options)
    found = levels(model)
    assert len(found) == count
    assert sorted(chain(*found)) == sorted(n for n, _ in model.named_parameters())
    for names_, prefix in zip(found, first, strict=False):
        assert all(n.startswith(prefix) for n in names_), names_
    assert found[-1] == ["head.weight", "head.bias"]


def test_a_tied_tensor_stands_in_one_level() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(chain(*levels(model))) == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize(
    ("epochs", "learns"),
    [(1, ("head",)), (2, ("head",)), (3, ("head", "body")), (5, ("head", "body", "stem"))],
)
def test_levels_thaw_from_the_output_on(blobs: Any, epochs: int, learns: tuple[str, ...]) -> None:
    start = net(1)
    options = {"unfreeze_every": 2, "epochs": epochs, "optimizer": partial(adamw, lr=0.01)}
    after = trained(blobs.train, start, **options)
    assert moved(start, after) == {n for n in start.state_dict() if n.startswith(learns)}


@pytest.mark.parametrize(
    ("frozen_parts", "epochs", "learns"),
    [
        (["head"], 1, ("body",)),
        (["head"], 2, ("body", "stem")),
        (["body"], 1, ("head",)),
        (["body"], 2, ("head", "stem")),
    ],
)
def test_levels_that_are_frozen_are_passed_over(
    blobs: Any, frozen_parts: list[str], epochs: int, learns: tuple[str, ...]
) -> None:
    start = net(1)
    after = trained(blobs.train, start, unfreeze_every=1, epochs=epochs, freeze=frozen_parts)
    assert moved(start, after) == {n for n in start.state_dict() if n.startswith(learns)}


def test_norms_without_parameters_sleep_with_the_layers_around_them(blobs: Any) -> None:
    norm = partial(nn.BatchNorm1d, 2, affine=False)
    plain = partial(nn.Linear, 2, 2, bias=False)
    start = nn.Sequential(plain(), norm(), nn.Sequential(norm(), plain()), norm())
    start.append(nn.Linear(2, 3))
    for epochs, learns in ((1, ("4",)), (2, ("2", "3", "4")), (3, ("0", "1", "2", "3", "4"))):
        after = trained(blobs.train, start, unfreeze_every=1, epochs=epochs)
        assert moved(start, after) == {n for n in start.state_dict() if n.startswith(learns)}


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_projector_learns_from_the_first_step_while_the_student_sleeps(
    blobs: Any, optimizer: Any
) -> None:
    """torch's fused kernels refuse a group in which some have momentum and some have none."""
    start, student = net(1), net(1)
    projector = attar.models.projectors.linear
    terms = [attar.training.Term(mse, "feature:body", "feature:stem", projector=projector)]
    options = QUICK | {"optimizer": partial(optimizer, lr=0.01), "epochs": 3}
    attar.distill(student, net(2), blobs.train, TASK, terms, unfreeze_every=1, **options)
    assert moved(start, student) == set(start.state_dict())


def test_what_is_asleep_gathers_no_momentum(blobs: Any) -> None:
    """The steps after the thaw are those of an optimiser that begins with it."""
    start = net(1)
    seen: list[set[int]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            seen.append(
                {p.numel() for g in self.param_groups for p in g["params"] if p in self.state}
            )
            super().step(closure)

    factory = partial(Watched, lr=0.1, momentum=0.9, weight_decay=0.1)
    trained(blobs.train, start, optimizer=factory, unfreeze_every=1, epochs=2)
    half = len(seen) // 2
    assert seen[half] == {24, 3}  # the head's own, at the first step after the thaw
    assert {64, 8} <= seen[-1]


# ---------------------------------------------------------------- rates


def test_rates_fall_with_the_distance_from_the_output() -> None:
    model = net(1)
    tuning = Tuning.of(model, attar.training.Plan(layer_decay=0.5), None)
    optimizer = make_optimizer(partial(sgd, lr=0.4), model, tuning.places)
    rates = {id(p): g["initial_lr"] for g in optimizer.param_groups for p in g["params"]}
    found = {name.split(".")[0]: rates[id(p)] for name, p in model.named_parameters()}
    assert found == {"stem": 0.1, "body": 0.2, "head": 0.4}
    assert optimizer.param_groups[0]["initial_lr"] == 0.4  # the one that the log shows


def test_decay_is_spared_as_without_rates() -> None:
    model = net(1)
    plain = {id(p) for g in parameter_groups(model) if "weight_decay" in g for p in g["params"]}
    tuning = Tuning.of(model, attar.training.Plan(layer_decay=0.5), None)
    groups = parameter_groups(model, tuning.places)
    assert plain == {id(p) for g in groups if "weight_decay" in g for p in g["params"]}


def test_one_step_moves_each_level_by_its_rate(blobs: Any) -> None:
    start = net(1)
    options = {"epochs": 1, "batch_size": len(blobs.train), "schedule": attar.training.constant}
    options |= {"optimizer": partial(sgd, lr=0.1, momentum=0.0, weight_decay=0.0)}
    whole = dict(trained(blobs.train, start, **options).named_parameters())
    part = dict(trained(blobs.train, start, layer_decay=0.5, **options).named_parameters())
    for name, then in start.named_parameters():
        share = {"stem": 0.25, "body": 0.5, "head": 1.0}[name.split(".")[0]]
        torch.testing.assert_close(
            part[name] - then, share * (whole[name] - then), atol=1e-7, rtol=1e-3
        )


# ---------------------------------------------------------------- the pull toward the start


def test_the_pull_is_the_gradient_step_of_half_the_squared_distance() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    anchor = Anchor([weight], 0.1)
    weight.data += torch.tensor([0.5, 4.0])
    expected = weight.detach() - 0.2 * 0.1 * torch.tensor([0.5, 4.0])
    weight.grad = torch.zeros_like(weight)
    anchor.pull(torch.optim.SGD([weight], lr=0.2))
    torch.testing.assert_close(weight.detach(), expected)


def test_a_stronger_pull_stays_nearer_to_the_start_and_the_head_is_free(blobs: Any) -> None:
    start = net(1)

    def distance(after: nn.Module, part: str) -> float:
        pairs = zip(
            start.get_submodule(part).parameters(),
            after.get_submodule(part).parameters(),
            strict=True,
        )
        return sum(float((a - b).detach().square().sum()) for a, b in pairs)

    runs = [trained(blobs.train, start, l2_sp=s) for s in (1e-6, 2.0, 10.0)]
    far = [distance(r, "stem") + distance(r, "body") for r in runs]
    assert far[0] > 1.2 * far[1] > 1.2 * far[2] > 0
    assert distance(runs[2], "head") > 0.5 * distance(runs[0], "head")


def test_what_is_pulled_to_its_start_does_not_decay_to_zero() -> None:
    model = net(1)
    tuning = Tuning.of(model, attar.training.Plan(l2_sp=0.1), None)
    groups = parameter_groups(model, None, tuning.anchored)
    decayed = [p for g in groups if "weight_decay" not in g for p in g["params"]]
    assert [id(p) for p in decayed] == [id(model.head.weight)]


# ---------------------------------------------------------------- a start from another model


def test_init_takes_the_body_and_leaves_the_head_fresh(blobs: Any) -> None:
    source, start = net(7, outputs=5), net(1)
    after = trained(blobs.train, start, init=source, freeze=["*", "!head"])
    assert torch.equal(after.stem[0].weight, source.stem[0].weight)
    assert torch.equal(after.body[1].running_mean, source.body[1].running_mean)
    first = trained(blobs.train, start, freeze=["*", "!head"], epochs=1)
    assert not torch.equal(first.stem[0].weight, source.stem[0].weight)


def test_a_folder_of_the_same_classes_gives_its_head_too(blobs: Any, tmp_path: Path) -> None:
    task = TASK.fitted(blobs.train)
    source = attar.models.build("mlp", data=blobs.train, widths=[4])
    attar.models.save(source, tmp_path / "same", extra={"task": task.describe()})
    other = attar.tasks.TabularClassification(classes=["x", "y", "z"])
    attar.models.save(source, tmp_path / "other", extra={"task": other.describe()})
    torch.manual_seed(3)
    start = attar.models.build("mlp", data=blobs.train, widths=[4])
    for folder, kept in (("same", True), ("other", False)):
        after = trained(
            blobs.train, start, init=str(tmp_path / folder), freeze=["head", "blocks.0.linear.bias"]
        )
        assert torch.equal(after.head.weight, source.head.weight) is kept, folder


def test_the_preflight_changes_no_weight(blobs: Any) -> None:
    start = net(1)
    before = copy.deepcopy(start.state_dict())
    attar.training.check(start, None, blobs.train, TASK, label_weight=1.0, init=net(7), l2_sp=0.1)
    assert all(torch.equal(t, before[n]) for n, t in start.state_dict().items())


@pytest.mark.parametrize("wrong", [{"freeze": ["nothing"]}, {"compile": True}, {"device": "nope"}])
def test_a_stage_that_is_refused_takes_no_weights(blobs: Any, wrong: dict[str, Any]) -> None:
    start = net(1)
    with pytest.raises(attar.runtime.AttarError):
        attar.train(start, blobs.train, TASK, init=net(7), **QUICK | wrong)
    assert not moved(net(1), start)


def test_a_source_of_another_architecture_is_refused(blobs: Any) -> None:
    with pytest.raises(UsageError, match="nothing of the source fits the student"):
        attar.train(net(1), blobs.train, TASK, init=nn.Linear(5, 5), **QUICK)


# ---------------------------------------------------------------- resume


class Crash(Exception):
    """A process that dies."""


class Dies(attar.data.Subset):
    def __init__(self, source: Any, at: int) -> None:
        super().__init__(source, torch.arange(len(source)))
        self.left = at + 1  # the preflight takes a batch too

    def epoch(self, number: int, **options: Any) -> Any:
        for batch in super().epoch(number, **options):
            if self.left == 0:
                raise Crash
            self.left -= 1
            yield batch


TUNED: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 32,
    "optimizer": partial(adamw, lr=0.01),
    "unfreeze_every": 1,
    "layer_decay": 0.7,
    "l2_sp": 0.3,
    "freeze": ["stem.0"],
    "checkpoint_every": 1,
}


def go(
    data: Any, folder: Path, at: int = 10**6, source: int = 7, **changes: Any
) -> dict[str, Tensor]:
    head = os.getpid() if folder.exists() else 1  # the head of a new process is another one
    with Run(folder, resume=True) as run:
        home = Home(run, resume=True)
        told = {"init": net(source), "home": home, "label_weight": 1.0}
        done = fit(net(head), None, Dies(data, at), TASK, **told, **TUNED | changes)
    return done.student.state_dict()


@pytest.mark.parametrize("batch", [1, 4, 5, 6, 9, 13, 19])
def test_a_tuned_training_resumes_to_the_same_bits(blobs: Any, tmp_path: Path, batch: int) -> None:
    whole = go(blobs.train, tmp_path / "whole")
    with pytest.raises(Crash):
        go(blobs.train, tmp_path / "run", at=batch)
    found = go(blobs.train, tmp_path / "run")
    assert all(torch.equal(t, found[n]) for n, t in whole.items())


def test_another_start_is_another_run(blobs: Any, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        go(blobs.train, tmp_path / "run", at=6)
    with pytest.raises(PreflightError, match=r"start was .* and is .* now"):
        go(blobs.train, tmp_path / "run", source=8)
