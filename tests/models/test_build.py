"""`build`: what data supply, how options are checked, what is recorded."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from annotated_types import Gt
from torch import nn

from attar import models
from attar.runtime import UsageError


class Data:
    """As much of a source as `build` reads."""

    def __init__(self, shape=(2, 8, 8), outputs=5):
        self.shape, self.outputs, self.asked = shape, outputs, 0

    def statistics(self):
        self.asked += 1
        return [0.25] * self.shape[0], [0.5] * self.shape[0]


def tiny(shape, outputs, *, bias: bool = True, scale: Annotated[float, Gt(0)] = 1.0):
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), outputs, bias=bias))


def choosy(shape, outputs, kind: Literal["a", "b"], norm=nn.BatchNorm1d):
    return norm(outputs)


def anything(shape, outputs, **options):
    return nn.Linear(shape[0], outputs)


class Own(nn.Module):
    def __init__(self, shape, outputs, *, hidden: int = 3):
        super().__init__()
        self.hidden = nn.Linear(shape[0], hidden)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, inputs):
        return self.head(self.hidden(inputs))


def test_families_are_the_rooms_functions():
    images = ("mlp", "mobilenet", "pretrained", "resnet", "timm", "transformers", "vit")
    languages = ("language_model", "pretrained_language_model")
    encoders = ("text_encoder", "pretrained_text_encoder")
    texts = ("bilstm", "text_classifier", "pretrained_text_classifier", *languages, *encoders)
    assert models.families() == {name: getattr(models, name) for name in (*images, *texts)}
    assert models.__all__ == sorted(models.__all__)


def test_data_supply_shape_outputs_and_statistics():
    data = Data()
    module = models.build("resnet", data=data, width=4)
    assert module.head.out_features == 5
    assert module.stem.conv.in_channels == 2
    assert module.normalize.mean.shape == (2, 1, 1)
    assert torch.equal(module.normalize.std.flatten(), torch.tensor([0.5, 0.5]))
    assert module.attar_build["options"]["mean"] == [0.25, 0.25]


def test_what_is_given_wins_over_data():
    data = Data()
    module = models.build("mlp", data=data, outputs=9, mean=None)
    assert module.head.out_features == 9
    assert isinstance(module.normalize, nn.Identity)
    assert data.asked == 0
    with pytest.raises(UsageError, match="holds 2 numbers"):
        models.build("mlp", data=data, shape=(3, 4, 4))


def test_a_function_without_statistics_is_not_given_any():
    data = Data()
    assert models.build(tiny, data=data)[1].in_features == 128
    assert data.asked == 0


@pytest.mark.parametrize("known", [{}, {"shape": (3,)}, {"data": Data(outputs=None)}])
def test_missing_shape_or_outputs(known):
    with pytest.raises(UsageError, match=r"(shape|outputs) is not known; pass"):
        models.build("mlp", **known)


def test_everything_needed_to_rebuild_is_recorded_as_json():
    module = models.build("mlp", shape=torch.Size([2, 3]), outputs=4, widths=(5, 6))
    built = module.attar_build
    assert json.loads(json.dumps(built)) == built
    assert built == {
        "family": "mlp",
        "options": {
            "shape": [2, 3],
            "outputs": 4,
            "widths": [5, 6],
            "mean": None,
            "std": None,
        },
    }
    again = models.build(built["family"], **built["options"])
    assert again.attar_build == built
    assert str(again) == str(module)
    assert copy.deepcopy(module).attar_build == built


def test_functions_classes_and_partials():
    assert models.build(tiny, shape=(3,), outputs=2, bias=False)[1].bias is None
    module = models.build(Own, shape=(3,), outputs=2, hidden=7)
    assert module.attar_build == {
        "family": "Own",
        "options": {"shape": [3], "outputs": 2, "hidden": 7},
    }
    narrow = partial(partial(models.resnet, width=4), depth=14)
    module = models.build(narrow, shape=(1, 8, 8), outputs=2, width=2)
    assert module.attar_build["family"] == "resnet"
    assert module.attar_build["options"]["depth"] == 14
    assert module.attar_build["options"]["width"] == 2


def test_a_default_that_is_no_json_stays_with_the_function():
    module = models.build(choosy, shape=(1,), outputs=2, kind="a")
    assert module.attar_build["options"] == {"shape": [1], "outputs": 2, "kind": "a"}
    free = models.build(anything, shape=(1,), outputs=2, depth=[1, {"a": None}])
    assert free.attar_build["options"]["depth"] == [1, {"a": None}]


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("resnett", {}, "model family 'resnett' is unknown; did you mean 'resnet'"),
        ("resnet", {"widht": 3}, "resnet has no option 'widht'; did you mean 'width'"),
        ("resnet", {"width": -4}, "width .*greater than or equal to 1, not -4"),
        ("resnet", {"width": True}, "width .*integer, not True"),
        ("resnet", {"width": 4.0}, "width .*integer, not 4.0"),
        ("resnet", {"width": "4"}, "width .*integer, not '4'"),
        ("resnet", {"width": None}, "width .*integer, not None"),
        ("resnet", {"width": 10**9}, "width .*less than or equal"),
        ("resnet", {"depth": 10}, "depth must be 6 n"),
        ("resnet", {"depth": 6 * 10**6 + 2}, "depth .*less than or equal"),
        ("resnet", {"stem_stride": 4}, "stem_stride"),
        ("resnet", {"outputs": 0}, "outputs .*greater than or equal to 1, not 0"),
        ("resnet", {"outputs": True}, "outputs .*integer"),
        ("resnet", {"shape": ()}, "shape .*at least 1"),
        ("resnet", {"shape": (1, 8, 0)}, r"shape\[2\] .*greater than or equal to 1"),
        ("resnet", {"shape": 64}, "shape .*array"),
        ("mlp", {"widths": (3, -1)}, r"widths\[1\] .*greater than or equal to 1"),
        ("mlp", {"widths": 3}, "widths .*array"),
        ("mlp", {"mean": [float("nan")]}, "mean must be a JSON value"),
        ("mlp", {"mean": ["x"]}, r"mean\[0\] .*number"),
        ("vit", {"heads": 3}, "heads must divide width"),
        (tiny, {"scale": 0.0}, "tiny: scale .*greater than 0"),
        (tiny, {"scale": np.float32(1)}, "scale must be a JSON value"),
        (tiny, {"bias": 1}, "bias .*boolean"),
        (choosy, {}, "choosy needs the option 'kind'"),
        (choosy, {"kind": "c"}, "kind .*'a' or 'b'"),
        (choosy, {"kind": "a", "norm": nn.Identity}, "norm must be a JSON value"),
    ],
)
def test_options_are_checked(family, options, said):
    with pytest.raises(UsageError, match=said):
        models.build(family, **{"shape": (1, 8, 8), "outputs": 2, **options})


def no_outputs(shape, *, outputs):
    return nn.Identity()


def no_module(shape, outputs):
    return 3


def unresolved(shape, outputs, *, a: Nowhere = 1):  # noqa: F821
    return nn.Identity()


def unfit(shape, outputs, *, layer: nn.Module = None):
    return nn.Identity()


def resnet(shape, outputs):
    return nn.Identity()


@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        (no_outputs, {}, "must take the input's shape and the number of outputs first"),
        (no_module, {}, "must return an nn.Module, not int"),
        (unresolved, {"a": 1}, "cannot be resolved"),
        (unfit, {"layer": 1}, "no JSON value can be"),
        (lambda shape, outputs: nn.Identity(), {}, "a function with a name"),
        (3, {}, "a function with a name"),
        (partial(tiny, (3,)), {}, "by keyword"),
        (resnet, {}, "'resnet' exists in attar.models already; rename"),
    ],
)
def test_functions_that_cannot_build(function, options, said):
    with pytest.raises(UsageError, match=said):
        models.build(function, shape=(3,), outputs=2, **options)
