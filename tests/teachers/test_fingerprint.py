"""A fingerprint changes with whatever changes an answer, and with nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attar
from attar.runtime import UsageError
from attar.teachers import Function

TASK = attar.tasks.ImageClassification(classes=3)


class Net(nn.Module):
    """One of each: statistics, a shared tensor, an option, a function and a name in forward."""

    def __init__(self, slope: float = 0.1, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = act
        self.leak = nn.LeakyReLU(slope)
        self.scale = 1.0
        self.head = nn.Linear(4, 3)
        self.register_buffer("known", torch.ones(3), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.leak(self.act(self.norm(self.conv(images)))))
        return self.head(hidden.mean((2, 3))) * self.scale * self.known


class Softened(Net):
    def forward(self, images: Tensor) -> Tensor:
        hidden = F.gelu(self.leak(self.act(self.norm(self.conv(images)))))
        return self.head(hidden.mean((2, 3))) * self.scale * self.known


Softened.__name__ = "Net"  # the same class as it stands in a file that was edited


def told(model: nn.Module, **options: Any) -> dict[str, str]:
    return attar.Teacher(model, TASK, **options).fingerprint()


def flipped(model: nn.Module, name: str) -> nn.Module:
    """The model with the last bit of one number changed."""
    with torch.no_grad():
        tensor = model.get_parameter(name).view(-1)
        tensor[:1] = torch.nextafter(tensor[:1], torch.tensor(9.0))
    return model


def test_it_says_what_was_asked_in_json() -> None:
    found = told(Net())
    assert set(found) == {"model", "weights", "precision", "task"}
    assert all(isinstance(value, str) for value in found.values())
    assert json.loads(found["task"]) == TASK.describe()
    assert found["model"].startswith("Net ")
    assert found == told(Net())


def scrambled(model: nn.Module) -> nn.Module:
    """The same numbers, each in another place of memory."""
    for _, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)
    return model


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SAME: dict[str, Callable[[nn.Module], nn.Module]] = {
    "training mode": lambda m: m.train(),
    "eval mode": lambda m: m.eval(),
    "frozen": lambda m: m.requires_grad_(False),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "other strides": scrambled,
    "copied": copy.deepcopy,
    "there and back": lambda m: m.double().float(),
    "inference tensors": lambda m: _reloaded(m),
    "compiled in place": lambda m: m.compile(backend="eager") or m,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "device": lambda m: m.to(DEVICES[-1]),
    "saved as": lambda m: _named(m),
}


def _named(model: nn.Module) -> nn.Module:
    model.name_or_path = "another/place"  # type: ignore[assignment]
    return model


def _reloaded(model: nn.Module) -> nn.Module:
    with torch.inference_mode():
        other = Net()
        other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", SAME)
def test_how_a_model_is_used_does_not_change_it(name: str) -> None:
    assert told(SAME[name](Net())) == told(Net())


def test_being_asked_does_not_change_it() -> None:
    teacher = attar.Teacher(Net(), TASK)
    before = teacher.fingerprint()
    teacher.open(["output:logits", "feature:conv"])
    teacher({"inputs": torch.rand(2, 2, 4, 4)})
    assert teacher.fingerprint() == before
    teacher.close()
    assert teacher.fingerprint() == before


def _buffer(model: nn.Module, name: str) -> nn.Module:
    model.get_buffer(name).view(-1)[0] += 1
    return model


def _scaled(model: nn.Module) -> nn.Module:
    model.scale = 2.0  # type: ignore[assignment]
    return model


def _renamed(model: nn.Module) -> nn.Module:
    model.tail, model.head = model.head, nn.Identity()
    return model


def _swapped(model: nn.Module) -> nn.Module:
    model.leak = nn.ELU()
    return model


OTHER: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "a bit of a weight": ("weights", lambda: flipped(Net(), "conv.weight")),
    "a bit of a bias": ("weights", lambda: flipped(Net(), "head.bias")),
    "a statistic": ("weights", lambda: _buffer(Net(), "norm.running_var")),
    "a buffer that is not saved": ("weights", lambda: _buffer(Net(), "known")),
    "the type": ("weights", lambda: Net().double()),
    "a half": ("weights", lambda: Net().bfloat16()),
    "another activation": ("model", lambda: _swapped(Net())),
    "its slope": ("model", lambda: Net(slope=0.2)),
    "a function": ("model", lambda: Net(act=torch.sigmoid)),
    "a number": ("model", lambda: _scaled(Net())),
    "what forward calls": ("model", Softened),
    "a name": ("model", lambda: _renamed(Net())),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_changes_an_answer_changes_it_where_it_says(name: str) -> None:
    key, make = OTHER[name]
    found, before = told(make()), told(Net())
    assert found[key] != before[key]
    if key == "weights":
        assert found["model"] == before["model"]


def test_equal_numbers_of_another_type_or_shape_are_others() -> None:
    class One(nn.Module):
        def __init__(self, tensor: Tensor) -> None:
            super().__init__()
            self.register_buffer("value", tensor)

    made = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(1, 4)]
    assert len({told(One(tensor))["weights"] for tensor in made}) == len(made)
    for one in (torch.tensor(True), torch.tensor(1j), torch.zeros(0), torch.tensor(7)):
        assert told(One(one)) == told(One(one.clone()))


def test_tied_tensors_are_what_equal_ones_are() -> None:
    tied, apart = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    tied[1].weight = tied[0].weight
    apart.load_state_dict(tied.state_dict())
    assert told(tied) == told(apart)


def test_precision_and_task_are_told() -> None:
    model = Net()
    plain, half = told(model), told(model, precision=torch.bfloat16)
    assert {k for k in plain if plain[k] != half[k]} == {"precision"}
    named = attar.tasks.ImageClassification(classes=("a", "b", "c"))
    other = attar.Teacher(model, named).fingerprint()
    assert {k for k in plain if plain[k] != other[k]} == {"task"}


# ---------------------------------------------------------------- of others than one module


def test_an_ensemble_is_its_members_in_order_and_how_they_are_joined() -> None:
    one, two = Net(), flipped(Net(), "head.bias")

    def joined(*members: Any, **options: Any) -> dict[str, str]:
        return attar.Ensemble(members, TASK, **options).fingerprint()

    base = joined(one, two)
    assert base == joined(copy.deepcopy(one), two)
    made = [joined(two, one), joined(one, _scaled(Net()))]
    made += [joined(one, two, temperature=2.0), joined(one, two, weighting="entropy")]
    made += [joined(one, two, weighting=[0.3, 0.7])]
    made += [joined(one, attar.Teacher(two, TASK, precision=torch.bfloat16))]
    texts = {json.dumps(each, sort_keys=True) for each in [base, *made]}
    assert len(texts) == len(made) + 1


class Bare:
    def open(self, addresses: Any = (), device: Any = None) -> Any:
        return self

    def __call__(self, batch: Any) -> Any:
        return {}

    def close(self) -> None: ...


def test_an_ensemble_of_one_that_does_not_say_is_refused() -> None:
    both = attar.Ensemble([Net(), Bare()], TASK)
    with pytest.raises(UsageError, match=r"member 1, a Bare, does not say .* fingerprint\(\)"):
        both.fingerprint()


def test_an_average_of_the_student_has_none() -> None:
    with pytest.raises(UsageError, match="moves with every step"):
        attar.EMA(Net(), TASK).fingerprint()
    with pytest.raises(UsageError, match="moves with every step"):
        attar.Ensemble([Net(), attar.EMA(Net(), TASK)], TASK).fingerprint()


def test_a_function_is_known_by_its_version() -> None:
    def make(**options: Any) -> nn.Module:
        return Function(lambda rows: rows[:, :3], TASK, **options)

    base = told(make(version="1"))
    assert base == told(make(version="1", name="another name"))
    assert told(make(version="2"))["weights"] != base["weights"]
    for options in ({"gives": "probabilities"}, {"floor": 1e-3}, {"channels_last": True}):
        assert told(make(version="1", **options))["model"] != base["model"]
    with pytest.raises(UsageError, match=r"has no version.* give version='1'"):
        told(make())
    within = attar.teachers.adapted(make(), TASK, size=4)
    with pytest.raises(UsageError, match="has no version"):
        told(within)


def test_a_function_without_a_version_teaches_all_the_same(blobs: Any, net: Any) -> None:
    task = attar.tasks.TabularClassification(classes=("a", "b", "c"))
    teacher = Function(lambda rows: np.zeros((len(rows), 3)), task)
    term = attar.Term(attar.losses.kl_divergence)
    attar.distill(net(), teacher, blobs.train, task, [term], epochs=1, batch_size=64)


def test_a_resumed_run_sees_another_version(tmp_path: Any, blobs: Any, net: Any) -> None:
    task = attar.tasks.TabularClassification(classes=("a", "b", "c"))
    term = attar.Term(attar.losses.kl_divergence)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 64, "run": tmp_path / "run"}

    def again(version: str, **more: Any) -> None:
        teacher = Function(lambda rows: np.zeros((len(rows), 3)), task, version=version)
        attar.distill(net(), teacher, blobs.train, task, [term], **options, **more)

    again("1")
    again("1", resume=True)
    with pytest.raises(attar.runtime.PreflightError, match="teacher was"):
        again("2", resume=True)


def test_a_script_is_known_by_its_code() -> None:
    made = []
    for act in (torch.relu, torch.tanh):
        net = nn.Sequential(nn.Linear(3, 3))
        torch.manual_seed(0)
        nn.init.ones_(net[0].weight)
        nn.init.zeros_(net[0].bias)
        made.append(torch.export.export(_Act(net, act), (torch.zeros(2, 3),)).module())
    assert told(made[0])["weights"] == told(made[1])["weights"]
    assert told(made[0])["model"] != told(made[1])["model"]


class _Act(nn.Module):
    def __init__(self, net: nn.Module, act: Any) -> None:
        super().__init__()
        self.net, self.act = net, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.net(x))


def test_two_activations_without_options_are_two() -> None:
    made = [nn.Tanh(), nn.Sigmoid(), nn.Identity(), nn.Hardswish()]
    assert len({told(nn.Sequential(act))["model"] for act in made}) == len(made)
