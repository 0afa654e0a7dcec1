"""The loop: the same weights as a loop by hand, and what it refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attar
from attar.losses import kl_divergence, mse
from attar.runtime import DivergedError, PreflightError, Ranks, UsageError
from attar.training import Term, adamw, constant, cosine, fit, linear, sgd
from attar.training.loop import windows
from attar.training.optimization import Average, parameter_groups
from attar.training.record import Record

SOFT = Term(partial(kl_divergence, temperature=4.0), weight=0.9)
PLAIN = partial(sgd, lr=0.1, momentum=0.9, weight_decay=0.0)


def task_of(splits: attar.data.Splits) -> attar.tasks.Task:
    return attar.tasks.TabularClassification().fitted(splits.train)


def by_hand(student: nn.Module, teacher: nn.Module, data: Any, epochs: int, size: int) -> None:
    """The loop anyone would write."""
    steps = epochs * math.ceil(len(data) / size)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    done = 0
    for epoch in range(epochs):
        for batch in data.epoch(epoch, batch_size=size, seed=0):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * cosine((done + 0.5) / steps, warmup=0.05)
            with torch.no_grad():
                goal = teacher(batch["inputs"])
            logits = student(batch["inputs"])
            soft = F.kl_div(
                F.log_softmax(logits / 4, 1), F.log_softmax(goal / 4, 1), log_target=True,
                reduction="batchmean",
            )  # fmt: skip
            (0.9 * 16 * soft + 0.1 * F.cross_entropy(logits, batch["labels"])).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1


def test_distill_is_the_loop_by_hand(blobs: attar.data.Splits, net: partial[nn.Module]) -> None:
    teacher, ours, theirs = net(seed=5), net(seed=1), net(seed=1)
    by_hand(theirs, teacher, blobs.train, epochs=3, size=16)
    attar.distill(
        ours, teacher, blobs.train, task_of(blobs), [SOFT], epochs=3, batch_size=16, optimizer=PLAIN
    )
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_accumulation_is_a_larger_batch(blobs: attar.data.Splits, net: partial[nn.Module]) -> None:
    """10 batches of 16 in windows of 4, 4 and 2 are batches of 64, 64 and 32."""
    task, teacher, results = task_of(blobs), net(seed=5), []
    for size, accumulate in ((64, 1), (16, 4)):
        student = net(seed=1)
        attar.distill(
            student,
            teacher,
            blobs.train,
            task,
            [SOFT],
            epochs=2,
            batch_size=size,
            accumulate=accumulate,
            optimizer=PLAIN,
        )
        results.append(student)
    for one, many in zip(*(r.parameters() for r in results), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    def trained(seed: int) -> Tensor:
        student = nn.Sequential(net(seed=1), nn.Dropout(0.2))
        attar.train(student, blobs.train, task_of(blobs), epochs=1, batch_size=16, seed=seed)
        return student[0].head.weight

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_the_callers_random_state_is_untouched(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    student = net()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    attar.train(student, blobs.train, task_of(blobs), epochs=1)
    assert torch.equal(torch.rand(1), expected)


def test_a_student_comes_out_as_it_went_in(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    student = net(seed=1).eval()
    student.body.weight.requires_grad_(False)
    frozen = student.body.weight.clone()
    term = Term(mse, "feature:body", projector=attar.models.projectors.linear)
    back = attar.distill(
        student, net(seed=5, width=20), blobs.train, task_of(blobs), [SOFT, term], epochs=1
    )
    assert back is student
    assert type(student) is nn.Sequential
    assert not student.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert [p.requires_grad for p in student.parameters()] == [False, True, True, True]
    assert torch.equal(student.body.weight, frozen)
    assert list(student.state_dict()) == list(net().state_dict())


def test_the_teacher_is_not_changed(blobs: attar.data.Splits) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))

    teacher, fresh = make(), make()
    attar.distill(make(), teacher, blobs.train, task_of(blobs), [SOFT], epochs=1)
    for mine, expected in zip(
        teacher.state_dict().values(), fresh.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, expected)
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_the_best_epoch_by_validation_is_kept(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    """A rate that ruins the net in the end: the best epoch is an earlier one."""
    ruin = lambda progress: 1.0 if progress < 0.5 else 500.0  # noqa: E731
    done = fit(
        net(seed=1),
        None,
        blobs.train,
        task_of(blobs),
        label_weight=1.0,
        validation=blobs.test,
        epochs=6,
        batch_size=16,
        optimizer=PLAIN,
        schedule=ruin,
    )
    accuracies = [record["accuracy"] for record in done.history]
    latest = max(i for i, accuracy in enumerate(accuracies) if accuracy == max(accuracies))
    assert done.best_epoch == latest < 5
    kept = attar.evaluate(done.student, blobs.test, task_of(blobs))["accuracy"]
    assert kept == max(accuracies) > accuracies[-1]
    done.student.load_state_dict(done.last)
    assert attar.evaluate(done.student, blobs.test, task_of(blobs))["accuracy"] == accuracies[-1]


class Poisoned(attar.data.TensorSource):
    """Gives a non-finite input in the given batch of the first epoch after the dry pass."""

    def __init__(self, source: attar.data.Source, at: int) -> None:
        ids = torch.arange(len(source))
        rows = source.rows(ids)
        super().__init__(rows["inputs"], rows["labels"], classes=source.classes)
        self.at = at

    def epoch(self, number: int, **options: Any) -> Any:
        for index, batch in enumerate(super().epoch(number, **options)):
            if index == self.at:
                batch["inputs"] = batch["inputs"].clone()
                batch["inputs"][0] = float("nan")
            yield batch


def test_a_non_finite_loss_stops_before_the_weights_change(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    clean, poisoned = net(seed=1), net(seed=1)
    two = attar.data.TensorSource(
        *(blobs.train.rows(torch.arange(160))[k] for k in ("inputs", "labels")),
        classes=blobs.train.classes,
    )
    seen: list[Tensor] = []

    def watching(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=0.1)
        optimizer.register_step_post_hook(
            lambda *_: seen.append(poisoned.head.weight.detach().clone())
        )
        return optimizer

    with pytest.raises(DivergedError, match=r"step 3 of 10: the value of the term 'kl_div") as told:
        attar.distill(
            poisoned,
            net(seed=5),
            Poisoned(two, at=2),
            task_of(blobs),
            [SOFT],
            epochs=1,
            batch_size=16,
            optimizer=watching,
        )
    assert len(seen) == 2
    assert torch.equal(poisoned.head.weight, seen[-1])
    assert not torch.equal(clean.head.weight, seen[-1])
    first = next(iter(two.epoch(0, batch_size=16, seed=0, start=2)))["ids"][0]
    assert f"rows {int(first)}, " in str(told.value)


def test_a_non_finite_gradient_names_its_term(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    def cusp(student: Tensor) -> Tensor:
        """sqrt at 0: the value is 0, the gradient is not finite."""
        return (student - student.detach()).square().sum(1).sqrt()

    with pytest.raises(DivergedError, match="the gradient of the term 'cusp' is not finite"):
        attar.distill(net(), net(seed=5), blobs.train, task_of(blobs), [SOFT, Term(cusp)], epochs=1)


def test_clipping_bounds_the_step(blobs: attar.data.Splits, net: partial[nn.Module]) -> None:
    student = net(seed=1)
    before = torch.cat([p.detach().flatten().clone() for p in student.parameters()])
    attar.train(
        student,
        blobs.train,
        task_of(blobs),
        epochs=1,
        batch_size=160,
        clip=1e-3,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        schedule=constant,
    )
    after = torch.cat([p.detach().flatten() for p in student.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_averaging_gives_the_averaged_weights(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    states: list[Tensor] = []
    student = net(seed=1)
    states.append(student.head.weight.detach().clone())

    def watching(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=0.1)
        optimizer.register_step_post_hook(
            lambda *_: states.append(student.head.weight.detach().clone())
        )
        return optimizer

    attar.train(
        student, blobs.train, task_of(blobs), epochs=2, batch_size=40, average=0.9,
        optimizer=watching,
    )  # fmt: skip
    mean = states[0]
    for count, state in enumerate(states[1:], start=1):
        decay = min(0.9, (1 + count) / (10 + count))
        mean = decay * mean + (1 - decay) * state
    torch.testing.assert_close(student.head.weight, mean)


def test_swapping_an_average_twice_changes_nothing(net: partial[nn.Module]) -> None:
    model = net()
    average = Average(model, 0.5)
    with torch.no_grad():
        model.head.weight.add_(1)
    before = copy.deepcopy(model.state_dict())
    average.swap()
    assert not torch.equal(model.head.weight, before["head.weight"])
    average.swap()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    decayed, spared = parameter_groups(model)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in spared["params"]] == [1, 1, 1, 1]
    assert spared["weight_decay"] == 0.0
    assert "weight_decay" not in decayed


@pytest.mark.parametrize("shape", [constant, linear, cosine])
def test_schedules_warm_up_and_end_where_they_say(shape: Any) -> None:
    assert shape(0.05, warmup=0.1) == pytest.approx(0.5)
    assert shape(0.1, warmup=0.1) == pytest.approx(1.0)
    end = 1.0 if shape is constant else 0.0
    assert shape(1.0) == pytest.approx(end)
    if shape is not constant:
        assert shape(1.0, final=0.2) == pytest.approx(0.2)
        assert shape(0.5, final=0.2) == pytest.approx(0.6)


def test_the_logged_rate_is_the_planned_one(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    records: list[dict[str, Any]] = []
    fit(
        net(), None, blobs.train, task_of(blobs), label_weight=1.0, log=records.append,
        epochs=2, batch_size=16, log_every=1, optimizer=PLAIN,
    )  # fmt: skip
    rates = [record["lr"] for record in records]
    planned = [0.1 * cosine((step + 0.5) / 20, warmup=0.05) for step in range(20)]
    assert rates == pytest.approx(planned)
    assert [record["step"] for record in records] == list(range(1, 21))


def test_the_log_holds_the_mean_of_the_steps_since_the_last_record(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    def logged(every: int) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        fit(
            net(seed=1), net(seed=5) and attar.Teacher(net(seed=5), task_of(blobs)), blobs.train,
            task_of(blobs), [SOFT], log=records.append, epochs=1, batch_size=8, accumulate=2,
            log_every=every,
        )  # fmt: skip
        return records

    single, grouped = logged(1), logged(4)
    assert [r["step"] for r in grouped] == [4, 8, 10]
    for index, (start, stop) in enumerate([(0, 4), (4, 8), (8, 10)]):
        mean = sum(r["loss"] for r in single[start:stop]) / (stop - start)
        assert grouped[index]["loss"] == pytest.approx(mean, rel=1e-5)
        terms = grouped[index]["terms"]
        assert grouped[index]["loss"] == pytest.approx(
            0.9 * terms["kl_divergence"] + 0.1 * terms["labels"], rel=1e-5
        )


def test_a_rank_without_rows_adds_zeros_to_the_record_that_others_wait_for() -> None:
    class Asked(Ranks):
        def sums(self, values: Sequence[float]) -> Sequence[float]:
            return [value + 6.0 for value in values]  # what another rank has

    record = Record(["labels", "match"])
    record.step(3.0)
    found = record.take(Asked(), 0, 2, 0.1)
    assert found is not None
    assert found["terms"] == {"labels": 3.0, "match": 3.0}


def test_windows_are_whole_but_for_the_last() -> None:
    batches = [{"inputs": torch.tensor(i)} for i in range(5)]
    assert [len(w) for w in windows(batches, 2)] == [2, 2, 1]
    assert [len(w) for w in windows(batches, 1)] == [1] * 5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_keeps_float32_weights(
    blobs: attar.data.Splits, net: partial[nn.Module], precision: str
) -> None:
    student, teacher = net(seed=1), net(seed=5)
    task = task_of(blobs)
    attar.train(teacher, blobs.train, task, epochs=5, batch_size=16)
    attar.distill(
        student, teacher, blobs.train, task, [SOFT], epochs=5, batch_size=16, precision=precision
    )
    assert student.head.weight.dtype == torch.float32
    assert attar.evaluate(student, blobs.test, task)["accuracy"] > 0.9


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"epochs": -1}, r"epochs is -1.*greater than or equal to 1"),
    ({"epochs": 1.5}, "epochs is 1.5"),
    ({"epoch": 3}, "no option 'epoch'; did you mean 'epochs'"),
    ({"batch_size": True}, "batch_size is True"),
    ({"keep": "first"}, "'best' or 'last'"),
    ({"average": 1.0}, "less than 1"),
    ({"device": "cpuu"}, "device 'cpuu' is unknown; did you mean 'cpu'"),
    ({"optimizer": "sgd"}, "optimizer is 'sgd'.*callable"),
    ({"optimizer": partial(torch.optim.SGD, lr=-1)}, "optimizer cannot be built: Invalid learning"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_wrong_options_are_refused_before_training(
    blobs: attar.data.Splits,
    net: partial[nn.Module],
    tmp_path: Any,
    options: dict[str, Any],
    says: str,
) -> None:
    student = net(seed=1)
    with pytest.raises(UsageError, match=says):
        attar.train(student, blobs.train, task_of(blobs), run=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    assert torch.equal(student.head.weight, net(seed=1).head.weight)


def test_what_cannot_be_matched_is_refused(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    task = task_of(blobs)

    def refused(
        terms: list[Term], says: str, student: nn.Module | None = None, **more: Any
    ) -> None:
        with pytest.raises(attar.runtime.AttarError, match=says):
            attar.distill(student or net(), net(seed=5, width=20), blobs.train, task, terms, **more)

    refused([Term(mse, "feature:body")], r"\[128, 8\] with .* \[128, 20\]")
    refused([Term(mse, "feature:bdy")], "did you mean 'body'")
    refused([SOFT], "3 classes", student=net(outputs=5))
    refused([SOFT], "nothing can be trained", student=net().requires_grad_(False))
    half = net(width=20)
    half.body.requires_grad_(False)
    refused([Term(mse, "feature:body")], "carries no gradient", student=half)
    unlabelled = attar.data.TensorSource(torch.randn(40, 2))
    with pytest.raises(PreflightError, match="label_weight: 0"):
        attar.distill(net(), net(seed=5), unlabelled, task, [SOFT])
    shared = net()
    with pytest.raises(PreflightError, match=r"teacher's own tensor.*deepcopy"):
        attar.distill(shared, shared, blobs.train, task, [SOFT])


def test_unlabelled_data_teach(blobs: attar.data.Splits, net: partial[nn.Module]) -> None:
    task, teacher = task_of(blobs), net(seed=5)
    attar.train(teacher, blobs.train, task, epochs=5, batch_size=16)
    unlabelled = attar.data.TensorSource(blobs.train.rows(torch.arange(160))["inputs"])
    student = attar.distill(
        net(seed=1), teacher, unlabelled, task, [SOFT], label_weight=0, epochs=5, batch_size=16
    )
    assert attar.evaluate(student, blobs.test, task)["accuracy"] > 0.9


def test_any_torch_optimizer_works(blobs: attar.data.Splits, net: partial[nn.Module]) -> None:
    task = task_of(blobs)
    for optimizer in (partial(adamw, lr=0.01), partial(torch.optim.Adagrad, lr=0.1)):
        student = attar.train(
            net(seed=1), blobs.train, task, epochs=5, batch_size=16, optimizer=optimizer
        )
        assert attar.evaluate(student, blobs.test, task)["accuracy"] > 0.9


def test_a_run_folder_holds_the_model_the_plan_and_the_log(
    blobs: attar.data.Splits, net: partial[nn.Module], tmp_path: Any
) -> None:
    student = attar.models.build("mlp", data=blobs.train)
    attar.train(student, blobs.train, task_of(blobs), epochs=1, run=tmp_path / "run")
    names = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*.*")}
    shown = {name for name in names if not name.startswith(("checkpoints/", "."))}
    assert shown == {"metrics.jsonl", "plan.json", "model/model.json", "model/model.safetensors"}
    steps = {path.name for path in (tmp_path / "run/checkpoints/stage").glob("step-*")}
    assert steps == {"step-000000000", "step-000000002"}
    with pytest.raises(attar.runtime.RunExistsError, match="already holds a run"):
        attar.train(student, blobs.train, task_of(blobs), epochs=1, run=tmp_path / "run")


def test_a_tied_tensor_is_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    average = Average(model, 0.9)
    with torch.no_grad():
        model[0].weight.add_(1)
    average.update()
    before = model[0].weight.detach().clone()
    average.swap()
    assert not torch.equal(model[0].weight, before)
    average.swap()
    assert torch.equal(model[0].weight, before)


def norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def test_a_divergence_leaves_sound_statistics(blobs: attar.data.Splits) -> None:
    model = norms()
    with pytest.raises(DivergedError):
        attar.train(model, Poisoned(blobs.train, at=2), task_of(blobs), epochs=1, batch_size=16)
    assert all(bool(torch.isfinite(t).all()) for t in model.state_dict().values())


def test_a_norm_frozen_on_purpose_stays_frozen(blobs: attar.data.Splits) -> None:
    model = norms().train()
    model[1].eval()
    attar.train(model, blobs.train, task_of(blobs), epochs=1, batch_size=16)
    assert model[1].num_batches_tracked == 0
    loaded = norms().eval()
    attar.train(loaded, blobs.train, task_of(blobs), epochs=1, batch_size=16)
    assert loaded[1].num_batches_tracked == 10


def test_a_last_batch_of_one_is_refused_where_it_cannot_be_trained_on(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    with pytest.raises(PreflightError, match="a batch of the 160 examples is a single one"):
        attar.train(norms(), blobs.train, task_of(blobs), epochs=1, batch_size=53)
    attar.train(net(), blobs.train, task_of(blobs), epochs=1, batch_size=53)


def test_a_failed_projector_leaves_no_hook(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    def broken(student: Tensor, teacher: Tensor) -> nn.Module:
        raise UsageError("no projector today")

    student, term = net(), Term(mse, "feature:body", projector=broken)
    with pytest.raises(UsageError, match="today"):
        attar.distill(student, net(seed=5), blobs.train, task_of(blobs), [term], epochs=1)
    assert not any(m._forward_hooks for m in student.modules())


@pytest.mark.parametrize(
    ("teacher", "says"),
    [(lambda batch: {}, r"open\(addresses, device\)"), ("gpt", "the teacher is a str")],
)
def test_what_is_no_teacher_is_refused(
    blobs: attar.data.Splits, net: partial[nn.Module], teacher: Any, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        attar.distill(net(), teacher, blobs.train, task_of(blobs), [SOFT], epochs=1)


@pytest.mark.parametrize("weight", [-1, float("nan"), None])
def test_a_label_weight_that_is_none_is_refused(
    blobs: attar.data.Splits, net: partial[nn.Module], weight: Any
) -> None:
    with pytest.raises(PreflightError, match="label_weight is"):
        attar.distill(net(), net(seed=5), blobs.train, task_of(blobs), [SOFT], label_weight=weight)


def test_recomputing_changes_no_bit(digits: attar.data.Splits) -> None:
    """Weights and running statistics, with dropout and accumulation."""
    task = attar.tasks.ImageClassification().fitted(digits.train)
    students = []
    for recompute in (False, True):
        torch.manual_seed(0)
        student = attar.models.build("resnet", data=digits.train, depth=8, width=4)
        student.add_module("drop", nn.Dropout(0.1))
        options = {"epochs": 1, "batch_size": 128, "accumulate": 2, "recompute": recompute}
        students.append(attar.train(student, digits.train, task, **options))
    plain, again = (student.state_dict() for student in students)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert not any("forward" in part.__dict__ for part in students[1].modules())


def test_compiling_on_a_cpu_is_refused(blobs: attar.data.Splits, net: partial[nn.Module]) -> None:
    with pytest.raises(PreflightError, match="compile is for accelerators"):
        attar.train(net(), blobs.train, task_of(blobs), compile=True, device="cpu")
