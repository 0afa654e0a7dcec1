"""Pairs of features are proposed as a person would, and terms on them train."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import attar
from attar.losses import kernel_alignment, kl_divergence, mse, variational
from attar.models.projectors import linear, mlp
from attar.runtime import DataError, PreflightError, UsageError
from attar.signals import Pair, pairing, pairs
from attar.training import Objective, Term, check, fit, paired, ramp

TASK = attar.tasks.ImageClassification(classes=10)


@pytest.fixture
def make(digits: attar.data.Splits) -> Callable[..., nn.Module]:
    """``make("resnet", seed=1, width=8)`` builds a net for the digits."""

    def made(name: str, seed: int = 0, **options: Any) -> nn.Module:
        torch.manual_seed(seed)
        return attar.models.build(name, data=digits[0], **options)

    return made


@pytest.fixture
def batch(digits: attar.data.Splits) -> dict[str, Tensor]:
    return digits[0].rows(torch.arange(64))


def named(found: list[Pair]) -> list[tuple[str, str]]:
    return [(p.student.removeprefix("feature:"), p.teacher.removeprefix("feature:")) for p in found]


STAGES = [("stage1", "stage1"), ("stage2", "stage2"), ("stage3", "stage3")]
R20, R8, MOBILE = ("resnet", {"depth": 20}), ("resnet", {"width": 8}), ("mobilenet", {"width": 8})
VIT4 = ("vit", {"patch": 2, "depth": 4, "width": 32})
VIT12 = ("vit", {"patch": 2, "depth": 12, "width": 32})
EVEN = ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
FAMILIES = {
    "resnet to resnet": (R20, R8, STAGES, "linear"),
    "resnet to mobilenet": (R20, MOBILE, STAGES, "linear"),
    "mobilenet to resnet": (MOBILE, R8, STAGES, "linear"),
    "resnet to vit": (
        R20,
        VIT4,
        [("blocks.0", "stage1"), ("blocks.2", "stage2"), ("blocks.3", "stage3")],
        "tokens",
    ),
    "vit to resnet": (
        VIT12,
        R8,
        [("stage1", "blocks.3"), ("stage2", "blocks.7"), ("stage3", "blocks.11")],
        "tokens",
    ),
    "vit to vit": (VIT12, VIT4, [(f"blocks.{i}", EVEN[i]) for i in range(4)], "linear"),
    "small vit to large": (VIT4, VIT12, [(EVEN[i], f"blocks.{i}") for i in range(4)], "linear"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_paired_stage_by_stage(
    name: str, make: Callable[..., nn.Module], batch: dict[str, Tensor]
) -> None:
    (big, large), (small, little), expected, projector = FAMILIES[name]
    found = pairs(make(small, **little), make(big, seed=1, **large), TASK, batch)
    assert named(found) == expected
    assert {p.projector for p in found} == {projector}
    assert all(0 <= p.alignment <= 1 for p in found)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_proposed_passes_the_check_of_a_stage(
    name: str, make: Callable[..., nn.Module], digits: attar.data.Splits
) -> None:
    (big, large), (small, little), expected, _ = FAMILIES[name]
    student, teacher = make(small, **little), attar.Teacher(make(big, seed=1, **large), TASK)
    terms = [Term(kl_divergence), Term(mse, pairing="auto")]
    plan = check(student, teacher, digits[0], TASK, terms, epochs=1, batch_size=64)
    assert [term.student for term in plan.terms[1:]] == [f"feature:{s}" for s, _ in expected]
    assert plan.proposals[0].term == 1
    assert named(plan.proposals[0].pairs) == expected


def test_a_student_whose_maps_are_smaller_pools_the_teachers(
    make: Callable[..., nn.Module], batch: dict[str, Tensor], digits: attar.data.Splits
) -> None:
    student, teacher = make("resnet", width=8, stem_stride=2), make("resnet", seed=1)
    found = pairs(student, teacher, TASK, batch)
    assert named(found) == STAGES
    assert {(p.projector, p.teacher_projector) for p in found} == {("linear", "pool")}
    check(student, teacher, digits[0], TASK, [Term(mse, pairing="auto")], epochs=1)


# ------------------------------------------------------------------ text


class Text(attar.tasks.ImageClassification):
    """Classes of token sequences, by a model of transformers."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(input_ids=batch["inputs"])


def bert(layers: int, width: int = 32) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(layers)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def texts(count: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 50, (count, 12), generator=generator)
    return {"inputs": inputs, "labels": torch.arange(count) % 3, "ids": torch.arange(count)}


def layers(found: list[Pair]) -> list[tuple[int, int]]:
    return [tuple(int(a.rpartition(".")[2]) + 1 for a in pair) for pair in named(found)]  # type: ignore[misc]


def test_bert_of_twelve_layers_teaches_one_of_four_by_every_third() -> None:
    task = Text(classes=3)
    found = pairs(bert(4), bert(12, width=48), task, texts())
    assert layers(found) == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert found[0].student == "feature:bert.encoder.layer.0"
    assert found[0].teacher_shape == (12, 48)
    assert layers(pairs(bert(12), bert(4), task, texts())) == [(3, 1), (6, 2), (9, 3), (12, 4)]


def test_terms_on_the_pairs_of_bert_are_compared() -> None:
    task, rows = Text(classes=3), texts()
    student, teacher = bert(4), bert(12, width=48)

    class Rows:
        name, labels, classes = "texts", rows["labels"], ("a", "b", "c")

        def epoch(self, *_: Any, **__: Any) -> Any:
            yield rows

    terms = paired(student, teacher, Rows(), task, weight=0.5)
    told = attar.Teacher(teacher, task).open([str(term.teacher) for term in terms])(rows)
    with Objective(student, task, terms, label_weight=0, example=(rows, told)) as objective:
        objective(rows, told).loss.backward()
    assert [term.weight for term in terms] == [0.5] * 4
    assert all(p.grad is not None for p in objective.adapters.parameters())


# ------------------------------------------------------------------ candidates


def paths(model: nn.Module, inputs: Tensor, classes: int = 3) -> list[str]:
    rows = {"inputs": inputs, "labels": torch.zeros(len(inputs), dtype=torch.long)}
    task = attar.tasks.ImageClassification(classes=classes)
    found = pairing.candidates(model, task, rows)
    return [one.address.removeprefix("feature:") for one in found]


def ends(name: str, config: str, **options: Any) -> list[str]:
    """The last candidates of each resolution, of a net of transformers."""
    transformers = pytest.importorskip("transformers")
    net = getattr(transformers, name)(getattr(transformers, config)(num_labels=3, **options))
    rows = {"inputs": torch.rand(4, 3, 64, 64), "labels": torch.zeros(4, dtype=torch.long)}
    found = pairing.candidates(net, attar.tasks.ImageClassification(classes=3), rows)
    return [one.address for one in pairing._ends(found)]


def test_blocks_are_neither_their_layers_nor_the_stem_nor_the_neck() -> None:
    stages = [f"feature:resnet.encoder.stages.{i}" for i in range(4)]
    sizes = {"hidden_sizes": [8, 8, 8, 8], "embedding_size": 8, "depths": [2, 2, 3, 2]}
    assert ends("ResNetForImageClassification", "ResNetConfig", **sizes) == stages
    mobile = ends("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.3)
    assert mobile == [f"feature:mobilenet_v2.layer.{i}" for i in (1, 4, 11, 15)]


def test_a_plain_net_offers_what_its_layers_read() -> None:
    conv = partial(nn.Conv2d, kernel_size=3, padding=1)
    net = nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        conv(4, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    assert paths(net, torch.rand(4, 3, 8, 8)) == ["3", "6"]
    dense = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    assert paths(dense, torch.rand(4, 5)) == ["1", "3"]


class Layer(nn.Module):
    """A block that returns its feature in a tuple, like some encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return tokens + self.inner(tokens), None


class Odd(nn.Module):
    """One layer is called twice, and the third's result is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(5))
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        for index in (0, 1, 1, 2, 3, 4):
            tokens, _ = self.layers[index](tokens)
            if index == 2:
                tokens.relu_()
        return self.head(tokens.mean(1))


def test_what_a_tap_would_refuse_is_no_candidate() -> None:
    assert paths(Odd(), torch.rand(4, 7, 6)) == ["layers.0[0]", "layers.3[0]", "layers.4[0]"]


def test_the_nets_are_left_as_they_were(
    make: Callable[..., nn.Module], batch: dict[str, Tensor]
) -> None:
    student, teacher = make("resnet").train(), make("mobilenet").train()
    teacher.get_submodule("stage1").eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    pairs(student, teacher, TASK, batch)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert student.training
    assert teacher.training
    assert not teacher.get_submodule("stage1").training
    assert not any(m._forward_hooks for net in (student, teacher) for m in net.modules())


def test_a_person_can_ask_for_another_number_of_pairs(
    make: Callable[..., nn.Module], batch: dict[str, Tensor]
) -> None:
    student, teacher = make("resnet", depth=14), make("resnet", depth=20)
    assert named(pairs(student, teacher, TASK, batch, count=1)) == [("stage3", "stage3")]
    assert len(pairs(student, teacher, TASK, batch, count=6)) == 6
    with pytest.raises(UsageError, match=r"7 pairs .* the student has 6 features .* choose 1 to 6"):
        pairs(student, teacher, TASK, batch, count=7)


def test_what_cannot_be_paired_is_said(
    make: Callable[..., nn.Module], batch: dict[str, Tensor]
) -> None:
    net = make("resnet")
    with pytest.raises(UsageError, match="4 rows or more, not 3"):
        pairs(net, net, TASK, {k: v[:3] for k, v in batch.items()})
    with pytest.raises(PreflightError, match="the student offers no feature to pair"):
        pairs(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), net, TASK, batch)
    with pytest.raises(DataError, match="the teacher cannot read inputs"):
        pairs(net, nn.Linear(3, 10), TASK, batch)


# ------------------------------------------------------------------ the choice


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit"])
def test_a_net_with_itself_gives_the_identity(
    name: str, make: Callable[..., nn.Module], batch: dict[str, Tensor]
) -> None:
    net = make(name, **({"patch": 2, "depth": 12} if name == "vit" else {}))
    found = pairs(net, net, TASK, batch)
    assert named(found) == ([(p, p) for p in EVEN] if name == "vit" else STAGES)
    assert all(p.alignment == pytest.approx(1) for p in found)


def test_trained_nets_of_two_seeds_are_paired_by_their_own_names(
    make: Callable[..., nn.Module], batch: dict[str, Tensor], digits: attar.data.Splits
) -> None:
    nets = [make("resnet", seed=seed, depth=14, width=8) for seed in (1, 2)]
    for net in nets:
        attar.train(net, digits[0], TASK, epochs=2, batch_size=64, progress=False)
    assert named(pairs(*nets, TASK, batch)) == STAGES
    found = pairs(*nets, TASK, batch, count=6)
    assert len(found) == 6
    assert all(p.student == p.teacher for p in found)


def side(*parts: tuple[float, int]) -> list[pairing.Candidate]:
    return [pairing.Candidate(f"feature:{d}", (8, size, size), d) for d, size in parts]


def test_the_choice_is_the_best_of_all_monotone_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    mine = side((0.2, 8), (0.4, 8), (0.6, 4), (0.8, 2), (1.0, 2))
    theirs = side((0.25, 8), (0.5, 4), (0.75, 2), (1.0, 1))
    for count in (1, 2, 3, 4):
        aligned = torch.rand(5, 4, generator=generator).tolist()

        def score(choice: list[tuple[int, int]], aligned: Any = aligned) -> float:
            total = 0.0
            for k, (i, j) in enumerate(choice, 1):
                one, two = mine[i], theirs[j]
                halvings = abs(torch.tensor(one.shape[1] / two.shape[1]).log2().item())
                total += 0.1 * aligned[i][j] - abs(one.depth - two.depth) - 0.25 * halvings
                total -= 0.5 * abs(one.depth - k / len(choice))
            return total

        every = (
            list(zip(a, b, strict=True))
            for a in itertools.combinations(range(5), count)
            for b in itertools.combinations(range(4), count)
        )
        best = max(map(score, every))
        assert score(pairing.matched(mine, theirs, aligned, count)) == pytest.approx(best)


def test_alignment_breaks_ties_and_does_not_outweigh_depth() -> None:
    mine, theirs = side((1.0, 4)), side((0.9, 4), (1.0, 4))
    assert pairing.matched(mine, theirs, [[0.9, 0.0]], 1) == [(0, 1)]
    tied = side((1.0, 4), (1.0, 4), (1.0, 4))
    assert pairing.matched(mine, tied, [[0.1, 0.9, 0.2]], 1) == [(0, 1)]


def test_resolution_decides_between_nets_of_other_numbers_of_stages() -> None:
    mine = side((0.5, 8), (1.0, 4))
    theirs = side((0.25, 16), (0.5, 8), (0.75, 4), (1.0, 4))
    assert pairing.matched(mine, theirs, [[0.0] * 4] * 2, 2) == [(0, 1), (1, 3)]
    theirs = side((0.2, 16), (0.45, 16), (0.7, 8), (1.0, 4))
    assert pairing.matched(mine, theirs, [[0.0] * 4] * 2, 2) == [(0, 2), (1, 3)]


def test_one_resolution_alone_says_nothing_of_depth() -> None:
    mine = side((0.5, 4), (1.0, 4))
    theirs = side((0.25, 128), (0.5, 64), (0.75, 8), (1.0, 4))
    assert pairing.matched(mine, theirs, [[0.0] * 4] * 2, 2) == [(0, 1), (1, 3)]
    assert pairing.matched(theirs, mine, [[0.0] * 2] * 4, 2) == [(1, 0), (3, 1)]


def cka(one: Tensor, two: Tensor) -> float:
    return float(pairing._kernel(one) @ pairing._kernel(two))


def test_alignment_is_the_unbiased_estimate() -> None:
    torch.manual_seed(0)
    one, two = torch.randn(20, 5), torch.randn(20, 7)
    two[:, :3] += one[:, :3]

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        n, ones = len(a), torch.ones(len(a), dtype=torch.double)
        k = (a.double() @ a.double().T).fill_diagonal_(0)
        m = (b.double() @ b.double().T).fill_diagonal_(0)
        first = (k @ m).trace() + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return (first - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    expected = hsic(one, two) / (hsic(one, one) * hsic(two, two)).sqrt()
    assert cka(one, two) == pytest.approx(float(expected))
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    assert cka(one, 3 * one @ turn + 1) == pytest.approx(1, abs=1e-5)
    assert cka(one, torch.ones(20, 4)) == 0


def test_wide_features_that_have_nothing_in_common_are_not_aligned() -> None:
    torch.manual_seed(0)
    one, two = torch.randn(64, 4096), torch.randn(64, 4096)
    assert 1 - float(kernel_alignment(one, two)) > 0.9  # the plain estimate
    assert abs(cka(one, two)) < 0.05


def test_alignment_does_not_depend_on_how_a_batch_is_cut(
    make: Callable[..., nn.Module], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = make("vit", patch=2), make("resnet")
    whole = [p.alignment for p in pairs(*nets, TASK, batch)]
    monkeypatch.setattr(pairing, "CHUNK", 7)
    assert [p.alignment for p in pairs(*nets, TASK, batch)] == pytest.approx(whole, abs=1e-5)


# ------------------------------------------------------------------ terms


def test_a_term_stands_for_its_pairs_with_its_own_weight_on_each(
    make: Callable[..., nn.Module], digits: attar.data.Splits
) -> None:
    student, teacher = make("mobilenet", width=8), make("resnet", seed=1)
    moving = ramp
    terms = paired(student, teacher, digits[0], TASK, weight=moving)
    assert [term.weight for term in terms] == [moving] * 3
    found = fit(
        student, teacher, digits[0], TASK, [Term(mse, pairing="auto", weight=0.5)], epochs=2
    )
    names = {f"mse(feature:stage{i})" for i in (1, 2, 3)}
    assert {term.name for term in found.plan.terms} == names


def test_distilling_with_the_proposal_brings_every_pair_nearer(
    make: Callable[..., nn.Module], digits: attar.data.Splits
) -> None:
    student, teacher = make("mobilenet", width=8), make("resnet", seed=1)
    seen: list[dict[str, Any]] = []
    terms = [Term(mse, pairing="auto", weight=1.0)]
    fit(
        student, attar.Teacher(teacher, TASK), digits[0], TASK, terms,
        epochs=4, batch_size=64, log=seen.append,
    )  # fmt: skip
    steps = [record["terms"] for record in seen if "terms" in record]
    for name in (f"mse(feature:stage{i})" for i in (1, 2, 3)):
        assert steps[-1][name] < 0.5 * steps[0][name]


def test_projectors_stand_where_the_loss_needs_them(
    make: Callable[..., nn.Module], digits: attar.data.Splits
) -> None:
    student, teacher = make("mobilenet", width=16), make("resnet", seed=1)

    def projectors(loss: Any, **options: Any) -> set[Any]:
        terms = paired(student, teacher, digits[0], TASK, loss, **options)
        return {term.projector for term in terms}

    assert projectors(mse) == {linear}  # also where channels are equal
    assert projectors(kernel_alignment) == {None}
    assert projectors(variational) == {None}
    own = Term(mse, pairing="auto", projector=mlp)
    plan = check(student, teacher, digits[0], TASK, [own], epochs=1)
    assert {pair.projector for pair in plan.proposals[0].pairs} == {"mlp"}
    assert all("GELU" in str(term.projector) for term in plan.terms)


def test_what_is_tried_leaves_no_trace(
    make: Callable[..., nn.Module], digits: attar.data.Splits
) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            self.calls += 1
            return kernel_alignment(student, teacher)

    loss = Counting()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    nets = make("mobilenet", width=8), make("resnet", seed=1)
    torch.set_rng_state(state)
    paired(*nets, digits[0], TASK, loss)
    assert loss.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_pairs_are_the_same_for_every_seed_of_a_run(
    make: Callable[..., nn.Module], digits: attar.data.Splits
) -> None:
    student, teacher = make("vit", patch=2), make("resnet", seed=1)
    plans = [
        check(student, teacher, digits[0], TASK, [Term(mse, pairing="auto")], epochs=1, seed=seed)
        for seed in (0, 7)
    ]
    assert plans[0].proposals == plans[1].proposals


def test_a_term_of_pairs_says_what_it_cannot_be(
    make: Callable[..., nn.Module], digits: attar.data.Splits
) -> None:
    student, teacher, train = make("mobilenet"), make("resnet"), digits[0]
    auto = Term(mse, pairing="auto")
    with pytest.raises(UsageError, match="leave student and teacher out"):
        Term(mse, "feature:stage1", pairing="auto")
    with pytest.raises(UsageError, match="pairing is 'best'; it is auto"):
        Term(mse, pairing="best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cross_entropy does not; leave pairing out"):
        Term(attar.losses.cross_entropy, pairing="auto")
    with pytest.raises(UsageError, match=r"use attar\.training\.paired"):
        Objective(student, TASK, [auto])
    with pytest.raises(PreflightError, match="there is no teacher"):
        check(student, None, train, TASK, [auto], epochs=1)
    both = attar.Ensemble([teacher, make("resnet", seed=1)], TASK)
    with pytest.raises(PreflightError, match="an ensemble has several"):
        check(student, both, train, TASK, [auto], epochs=1)


# ------------------------------------------------------------------ recipes

RECIPE = """\
task: image-classification
data: digits
teacher: {model: {name: resnet, width: 8}, train: {epochs: 1}}
student: {name: mobilenet, width: 8, depth: 1}
stages:
  - do: distill
    epochs: 1
    terms:
      - {loss: kl_divergence, weight: 0.9}
      TERM
"""


def checked(folder: Path, *lines: str) -> str:
    from attar.cli.main import app

    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("TERM", "\n      ".join(lines)))
    done = CliRunner().invoke(app, ["check", str(path)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    "loss", ["loss: mse", "loss: {name: kernel_alignment}", "loss: {name: variational}"]
)
def test_check_prints_lines_that_say_the_same_in_a_recipe(loss: str, tmp_path: Path) -> None:
    said = checked(tmp_path, f"- {{{loss}, pairing: auto, weight: 0.00001}}")
    lines = [line.strip() for line in said.splitlines() if line.strip().startswith("- {")]
    assert len(lines) == 3
    assert all("CKA 0." in line for line in lines)
    again = checked(tmp_path, *lines)
    cut = said.index("\nproposed for stage 0")
    assert again[:cut].split() == said[:cut].split()
    assert "proposed" not in again


def test_options_schedules_and_own_projectors_stand_in_the_lines(tmp_path: Path) -> None:
    said = checked(
        tmp_path,
        "- {loss: {name: channel_kl, temperature: 2.0}, pairing: auto, "
        "weight: {name: ramp, end: 0.5}, projector: {name: mlp, hidden: 4}}",
    )
    assert (
        '- {loss: {name: channel_kl, temperature: 2.0}, student: "feature:stage1", teacher: '
        '"feature:stage1", weight: {name: ramp, end: 0.5}, projector: {name: mlp, hidden: 4}}'
    ) in said
