"""What a term can say: several signals, parameters, built losses, fixed maps, schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import cross_entropy, kl_divergence, mse
from attar.models import projectors
from attar.models.projectors import linear
from attar.runtime import PreflightError, UsageError
from attar.training import Objective, Term, check, fit, ramp
from attar.training.loop import Loop

TASK = attar.tasks.ImageClassification(classes=3)
SOFT = Term(kl_divergence)


def batch(n: int = 12, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 2, generator=generator)
    return {"inputs": inputs, "labels": torch.arange(n) % 3, "ids": torch.arange(n)}


def told_by(teacher: nn.Module, *addresses: str) -> dict[str, Tensor]:
    return attar.Teacher(teacher, TASK).open(addresses)(batch())


def of_pair(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """A loss of several signals at once."""
    return sum((s - t).square().mean(1) for s, t in zip(student, teacher, strict=True))  # type: ignore[return-value]


def test_several_addresses_give_the_loss_tuples(net: partial[nn.Module]) -> None:
    student, teacher = net(seed=1), net(seed=2)
    both = ["feature:body", "output:logits"]
    told = told_by(teacher, *both)
    pair = Objective(student, TASK, [Term(of_pair, both)], label_weight=0)
    apart = Objective(student, TASK, [Term(mse, a) for a in both], label_weight=0)
    torch.testing.assert_close(pair(batch(), told).loss, apart(batch(), told).loss)


def test_a_projector_is_built_for_each_of_several_signals(net: partial[nn.Module]) -> None:
    student, teacher = net(width=5), net(width=9, outputs=3)
    both = ["feature:body", "feature:act"]
    told = told_by(teacher, *both)
    term = Term(of_pair, both, projector=linear)
    objective = Objective(student, TASK, [term], label_weight=0, example=(batch(), told))
    assert [tuple(p.shape) for p in objective.bound[0].projector.parameters()] == [
        (9, 5), (9,), (9, 5), (9,),
    ]  # fmt: skip
    objective(batch(), told).loss.backward()
    assert all(p.grad is not None for p in objective.bound[0].projector.parameters())


def test_a_projector_of_whole_tuples_gets_them(net: partial[nn.Module]) -> None:
    class Sum(nn.Module):
        def forward(self, signals: tuple[Tensor, ...]) -> Tensor:
            return sum(signals)  # type: ignore[return-value]

    def added(student: tuple[Tensor, ...], teacher: Tensor) -> nn.Module:
        assert len(student) == 2
        return Sum()

    told = told_by(net(seed=2), "feature:body")
    term = Term(mse, ["feature:body", "feature:act"], "feature:body", projector=added)
    objective = Objective(net(), TASK, [term], label_weight=0, example=(batch(), told))
    objective(batch(), told).loss.backward()


def test_a_loss_of_one_signal_refuses_two(blobs: attar.data.Splits, net: partial) -> None:
    term = Term(mse, ["feature:body", "feature:act"])
    with pytest.raises(PreflightError, match="compares one signal, and is given 2"):
        check(net(), net(seed=1), blobs.train, TASK, [term])


def test_parameters_are_pulled_to_the_teachers(net: partial[nn.Module]) -> None:
    student, teacher = net(seed=1), net(seed=2)
    told = told_by(teacher, "param:body.weight")
    objective = Objective(student, TASK, [Term(mse, "param:body.weight")], label_weight=0)
    loss = objective(batch(), told).loss
    loss.backward()
    gap = student.body.weight - teacher.body.weight
    torch.testing.assert_close(loss, gap.square().mean())
    torch.testing.assert_close(student.body.weight.grad, 2 * gap.detach() / gap.numel())
    assert teacher.body.weight.grad is None


def test_what_a_term_pulls_is_not_decayed(
    blobs: attar.data.Splits, net: partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[int, float]] = []
    step = Loop.step

    def noting(loop: Loop, window: list) -> float:
        groups = loop.optimizer.param_groups
        seen.append({id(p): g["weight_decay"] for g in groups for p in g["params"]})
        return step(loop, window)

    monkeypatch.setattr(Loop, "step", noting)
    student = net()
    terms = [Term(mse, "param:body.weight"), SOFT]
    attar.distill(student, net(seed=1), blobs.train, TASK, terms, epochs=1, progress=False)
    assert seen[0][id(student.body.weight)] == 0
    assert seen[0][id(student.head.weight)] > 0


class Remembering(nn.Module):
    """A loss with a weight and a memory."""

    memory: Tensor

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("memory", torch.zeros(rows))

    def forward(self, student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        self.memory[ids] += 1
        return (self.scale * student - teacher).square().mean(1)


def remembering(student: Tensor, teacher: Tensor, *, rows: int, factor: float = 1.0) -> nn.Module:
    """A factory as those of `attar.losses`."""
    assert student.shape == teacher.shape
    return Remembering(student.shape[1], int(rows * factor))


def test_a_loss_with_a_state_is_built_trained_and_remembers(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    kept: list[Remembering] = []

    def noted(student: Tensor, teacher: Tensor, *, rows: int) -> nn.Module:
        kept.append(remembering(student, teacher, rows=rows))  # type: ignore[arg-type]
        return kept[-1]

    attar.distill(
        net(), net(seed=1), blobs.train, TASK, [Term(noted)], epochs=2, progress=False
    )  # fmt: skip
    assert len(kept) == 1
    assert kept[0].memory.shape == (160,)
    assert kept[0].memory.min() >= 2  # every row in both epochs
    assert not torch.equal(kept[0].scale, torch.ones(3))


def test_a_built_loss_takes_its_options_and_its_name(net: partial[nn.Module]) -> None:
    term = Term(partial(remembering, factor=0.5))
    told = told_by(net(seed=1), "output:logits")
    asked = batch() | {"ids": torch.arange(12) % 6}
    with pytest.raises(PreflightError, match="give Objective"):
        Objective(net(), TASK, [term])
    objective = Objective(net(), TASK, [term], example=(asked, told), rows=12)
    assert objective.names[0] == "remembering"
    assert objective.bound[0].loss.memory.shape == (6,)
    assert "adapters.0.loss.scale" in dict(objective.named_parameters())


def fixed(teacher: Tensor, student: Tensor) -> nn.Module:
    return nn.LayerNorm(teacher.shape[1:], elementwise_affine=False)


def test_a_fixed_map_stands_on_the_teachers_side(net: partial[nn.Module]) -> None:
    student, told = net(seed=1), told_by(net(seed=2), "output:logits")
    term = Term(mse, teacher_projector=fixed)
    objective = Objective(student, TASK, [term], label_weight=0, example=(batch(), told))
    goal = nn.functional.layer_norm(told["output:logits"], (3,))
    expected = mse(student(batch()["inputs"]), goal).mean()
    torch.testing.assert_close(objective(batch(), told).loss, expected)


def test_a_map_that_would_have_to_learn_is_refused_there(net: partial[nn.Module]) -> None:
    told = told_by(net(seed=2), "output:logits")
    with pytest.raises(UsageError, match="must train nothing, and linear does"):
        Objective(net(), TASK, [Term(mse, teacher_projector=linear)], example=(batch(), told))


def test_a_factory_may_hold_a_part_of_the_teacher(net: partial[nn.Module]) -> None:
    teacher, seen = net(seed=2), []

    def through(student: Tensor, teacher: Tensor, *, model: nn.Module) -> nn.Module:
        seen.append(model)
        return nn.Identity()

    told = told_by(teacher, "output:logits")
    term = Term(mse, projector=through)
    Objective(net(), TASK, [term], example=(batch(), told), model=teacher)
    assert seen == [teacher]


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_an_option_may_follow_a_schedule(net: partial[nn.Module], progress: float) -> None:
    moving = Term(partial(kl_divergence, temperature=partial(ramp, start=8.0, end=2.0)))
    still = Term(partial(kl_divergence, temperature=8 - 6 * progress))
    told, student = told_by(net(seed=2), "output:logits"), net()
    losses = [
        Objective(student, TASK, [term], label_weight=0)(batch(), told, progress=progress).loss
        for term in (moving, still)
    ]
    torch.testing.assert_close(*losses)


def test_a_schedule_that_ends_where_the_loss_refuses_is_found_at_once(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    term = Term(partial(kl_divergence, temperature=partial(ramp, start=4.0, end=0.0)))
    with pytest.raises(PreflightError, match="temperature must be a number above 0"):
        check(net(), net(seed=1), blobs.train, TASK, [term])


def test_ramps_are_monotone_and_meet_their_ends() -> None:
    for shape in ("linear", "cosine"):
        values = [ramp(p / 20, start=1.0, end=3.0, after=0.2, until=0.8, shape=shape)  # type: ignore[arg-type]
                  for p in range(21)]  # fmt: skip
        assert values[:5] == [1.0] * 5
        assert values[16:] == [3.0] * 5
        assert values == sorted(values)
        assert values[10] == pytest.approx(2.0)
    with pytest.raises(UsageError, match="until must be later"):
        ramp(0.5, after=0.6, until=0.5)


def test_a_term_that_drowns_another_is_said(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    terms = [SOFT, Term(mse, "feature:body", weight=1e4)]
    plan = check(net(), net(seed=1), blobs.train, TASK, terms)
    assert plan.lopsided is not None
    assert "'mse(feature:body)' pulls" in plan.lopsided
    assert check(net(), net(seed=1), blobs.train, TASK, [SOFT]).lopsided is None


def test_the_pull_of_a_term_is_the_norm_of_its_weighted_gradient(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    student, teacher = net(), net(seed=1)
    weight: Callable[[float], float] = lambda progress: 4 * progress  # noqa: E731
    plan = check(student, teacher, blobs.train, TASK, [Term(mse, weight=weight)], batch_size=160)
    x, y = blobs.train.rows(torch.arange(160))["inputs"], blobs.train.labels
    values = {
        "mse": 2 * mse(student(x), teacher(x).detach()).mean(),
        "labels": 0.1 * cross_entropy(student(x), y).mean(),
    }
    for name, value in values.items():
        grads = torch.autograd.grad(value, list(student.parameters()), allow_unused=True)
        norm = torch.cat([g.flatten() for g in grads if g is not None]).norm()
        assert plan.gradients[name] == pytest.approx(float(norm), rel=1e-4)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 8)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)))


def test_what_is_overwritten_in_place_is_refused(blobs: attar.data.Splits) -> None:
    with pytest.raises(
        PreflightError, match=r"'body' .*changes that in place|in place after 'body'"
    ):
        check(InPlace(), InPlace(), blobs.train, TASK, [Term(mse, "feature:body")])
    check(InPlace(), InPlace(), blobs.train, TASK, [Term(mse, "feature:act")])


class Reentrant(nn.Module):
    """Recomputes its body in the old way, whose features carry no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        hidden = checkpoint(self.body, x.requires_grad_(), use_reentrant=True)
        return self.head(hidden)


def test_a_signal_without_gradient_is_refused_even_behind_a_projector(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    term = Term(mse, "feature:body.0", "feature:body", projector=linear)
    with pytest.raises(PreflightError, match="reentrant checkpointing"):
        check(Reentrant(), net(width=5), blobs.train, TASK, [term])


def test_one_term_cannot_compare_with_both_sides(net: partial[nn.Module]) -> None:
    term = Term(of_pair, ["feature:body"] * 2, ["feature:body", "self:feature:body"])
    with pytest.raises(UsageError, match="make it two terms"):
        Objective(net(), TASK, [term])


def test_gradients_are_refused_where_they_would_be_wrong(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    term = Term(mse, "grad:top/inputs")
    with pytest.raises(PreflightError, match="underflow in fp16"):
        check(net(), net(seed=1), blobs.train, TASK, [term], precision="fp16")


def test_matching_input_gradients_brings_them_together(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    teacher = attar.train(net(width=32), blobs.train, TASK, epochs=10, progress=False)
    gaps = []
    for weight in (0.0, 1.0):
        student = net(seed=3)
        terms = [SOFT, Term(mse, "grad:top/inputs", weight=weight)]
        attar.distill(student, teacher, blobs.train, TASK, terms, epochs=20, progress=False)
        told = told_by(teacher, "grad:top/inputs")
        with Objective(student, TASK, terms[1:], label_weight=0) as objective:
            own = objective.signals(batch(), told)
        gap = mse(own["grad:top/inputs"].detach(), told["grad:top/inputs"])
        gaps.append(float(gap.mean()))
    assert gaps[1] < gaps[0] / 2


def test_a_student_goes_out_as_it_came(blobs: attar.data.Splits, net: partial) -> None:
    student = net()
    before = copy.deepcopy(student)
    terms = [Term(mse, "grad:top/inputs"), Term(mse, "param:body.weight"),
             Term(of_pair, ["feature:body", "feature:act"])]  # fmt: skip
    attar.distill(student, net(seed=1), blobs.train, TASK, terms, epochs=1, progress=False)
    assert [(n, type(m)) for n, m in student.named_modules()] == [
        (n, type(m)) for n, m in before.named_modules()
    ]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_the_norms_of_the_terms_gradients_are_logged(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    records: list[dict] = []
    options = {"epochs": 2, "batch_size": 40, "log_every": 3, "progress": False}
    told = {"student": net(), "teacher": net(seed=1), "data": blobs.train, "task": TASK}
    fit(**told, terms=[SOFT], log=records.append, log_gradients=True, **options)
    train = [r for r in records if r["split"] == "train"]
    seen = {r["step"]: r.get("gradients") for r in train}
    assert set(seen) == {3, 4, 6, 8}
    assert {step for step, norms in seen.items() if norms} == {3, 6}
    assert set(seen[3]) == {"kl_divergence", "labels"}
    plain: list[dict] = []
    told |= {"student": net()}
    fit(**told, terms=[SOFT], log=plain.append, **options)
    for with_norms, without in zip(train, plain, strict=True):  # nothing else changes
        with_norms.pop("gradients", None)
        assert with_norms == without


MANY = attar.tasks.MultiLabelClassification(classes=3)


def many_labels() -> attar.data.TensorSource:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(64, 3, generator=generator) > 0.5).float()
    inputs = torch.randn(64, 2, generator=generator)
    return attar.data.TensorSource(inputs, labels, classes=("a", "b", "c"))


SOFTMAX = {
    "adaptive_kl", "alpha_beta_divergence", "centered_mse", "correlation", "decoupled_kl",
    "earth_mover", "hard_distillation", "jensen_shannon", "kl_divergence", "normalized_kl",
    "reverse_kl", "skewed_kl", "standardized_kl", "target_enhanced_kl", "total_variation",
    "transformed_teacher_kl", "weighted_kl",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SOFTMAX - {"decoupled_kl", "normalized_kl", "weighted_kl",
                                                   "target_enhanced_kl"}))  # fmt: skip
def test_a_softmax_over_labels_that_hold_together_is_refused(
    net: partial[nn.Module], name: str
) -> None:
    term = Term(getattr(attar.losses, name))
    with pytest.raises(PreflightError, match=r"each is an answer of its own; use binary_kl"):
        check(net(), net(seed=1), many_labels(), MANY, [term])


@pytest.mark.parametrize("name", ["binary_kl", "mse", "similarity_preserving", "margin_mse"])
def test_what_reads_each_label_by_itself_is_not(net: partial[nn.Module], name: str) -> None:
    check(net(), net(seed=1), many_labels(), MANY, [Term(getattr(attar.losses, name))])


def test_crd_remembers_its_rows_and_pulls(blobs: attar.data.Splits, net: partial) -> None:
    """The factory of a real method, through the whole verb."""
    student = net(width=5)
    term = Term(
        partial(attar.losses.memory_contrast, negatives=32, dimensions=8), "feature:body",
        "feature:body", weight=0.8,
    )  # fmt: skip
    done = fit(student, net(width=9, seed=1), blobs.train, TASK, [SOFT, term], epochs=3,
               progress=False)  # fmt: skip
    assert done.plan.projector_parameters > 0
    assert done.plan.gradients["memory_contrast(feature:body)"] > 0


def test_a_small_layer_is_pulled_to_a_part_of_a_large_one(net: partial[nn.Module]) -> None:
    student, teacher = net(width=4), net(width=8, seed=1)
    told = told_by(teacher, "param:body.*")
    term = Term(
        attar.losses.l2_starting_point, "param:body.*", teacher_projector=projectors.select
    )  # fmt: skip
    objective = Objective(student, TASK, [term], label_weight=0, example=(batch(), told))
    loss = objective(batch(), told).loss
    gaps = [
        student.body.weight - teacher.body.weight[::2], student.body.bias - teacher.body.bias[::2],
    ]  # fmt: skip
    torch.testing.assert_close(loss, sum(gap.square().sum() for gap in gaps) / 2)
    loss.backward()
    torch.testing.assert_close(student.body.weight.grad, gaps[0].detach())


def test_labels_reach_a_loss_in_the_units_of_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 2, generator=generator)
    targets = 100 + 50 * inputs[:, :1]
    source = attar.data.TensorSource(inputs, targets)
    task = attar.tasks.Regression().fitted(source)
    asked = source.rows(torch.arange(64))
    student = nn.Linear(2, 1)
    told = {"output:values": (targets - targets.mean()) / targets.std(correction=0)}  # no error
    term = Term(attar.losses.bounded_mse)
    objective = Objective(student, task, [term], label_weight=1.0)
    parts = objective(asked, told)
    torch.testing.assert_close(parts.terms["bounded_mse"], parts.terms["labels"])


def test_what_is_equal_at_the_start_drowns_nowhere(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    assert check(net(), net(), blobs.train, TASK, [SOFT]).lopsided is None


def test_layers_of_other_sizes_are_told_of_the_index_map(
    blobs: attar.data.Splits, net: partial[nn.Module]
) -> None:
    term = Term(mse, "param:body.weight")
    with pytest.raises(PreflightError, match="add teacher_projector: select"):
        check(net(width=4), net(width=8), blobs.train, TASK, [term])
