"""Addresses are read strictly; taps hear what they should, and leave nothing behind."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from attar.runtime import PreflightError, UsageError
from attar.signals import Tap, parse


class Twice(nn.Module):
    """Calls one layer twice and returns several parts from another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.parts = nn.Identity()
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(x))
        return self.parts({"a": x, "b": x + 1})["a"]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_every_part_of_an_address_is_read() -> None:
    address = parse("self:feature:encoder.layers.3@1[last_hidden]")
    assert address.own
    assert (address.kind, address.path) == ("feature", "encoder.layers.3")
    assert (address.call, address.key) == (1, "last_hidden")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stage3", "write output:NAME"),
        ("featur:stage3", "did you mean 'feature'"),
        ("feature:stage3@x", "not the address"),
    ],
)
def test_a_mistyped_address_is_explained(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(text)


def test_a_mistyped_path_gets_the_nearest_name(net: partial[nn.Module]) -> None:
    with pytest.raises(UsageError, match="did you mean 'head'"):
        Tap(net(), ["feature:heda"])


def test_a_tap_hears_features_and_inputs(net: partial[nn.Module]) -> None:
    model, x = net(), torch.randn(4, 2)
    with Tap(model, ["feature:body", "input:head"]) as tap:
        out, heard = tap(model, x)
    torch.testing.assert_close(heard["feature:body"], model.body(x))
    torch.testing.assert_close(heard["input:head"], model.act(model.body(x)))
    torch.testing.assert_close(out, model(x))


def test_a_tap_hears_nothing_outside_its_own_call(net: partial[nn.Module]) -> None:
    model = net()
    with Tap(model, ["feature:body"]) as tap:
        model(torch.ones(7, 2))
        _, heard = tap(model, torch.ones(4, 2))
        assert heard["feature:body"].shape == (4, 8)


def test_no_hook_is_left(net: partial[nn.Module]) -> None:
    model = net()
    tap = Tap(model, ["feature:body", "input:head"]).open()
    assert hooks_of(model) == 2
    with pytest.raises(RuntimeError), tap:
        tap(model, torch.ones(4, 5))
    assert hooks_of(model) == 0


def test_a_module_called_twice_must_be_told_apart() -> None:
    model, x = Twice(), torch.randn(3, 2)
    with (
        Tap(model, ["feature:layer"]) as tap,
        pytest.raises(PreflightError, match=r"2 times.*layer@0"),
    ):
        tap(model, x)
    with Tap(model, ["feature:layer@0", "feature:layer@1"]) as tap:
        out, heard = tap(model, x)
    torch.testing.assert_close(heard["feature:layer@0"], model.layer(x))
    torch.testing.assert_close(heard["feature:layer@1"], out)


def test_parts_must_be_told_apart() -> None:
    model, x = Twice(), torch.randn(3, 2)
    with (
        Tap(model, ["feature:parts"]) as tap,
        pytest.raises(PreflightError, match=r"\[a\], \[b\]"),
    ):
        tap(model, x)
    with Tap(model, ["feature:parts[b]"]) as tap:
        out, heard = tap(model, x)
    torch.testing.assert_close(heard["feature:parts[b]"], out + 1)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("feature:unused", "was not called"),
        ("feature:layer@2", "only 2 times"),
        ("feature:parts[c]", r"no part \[c\]"),
    ],
)
def test_what_is_not_there_is_said(address: str, says: str) -> None:
    with (
        Tap(model := Twice(), [address]) as tap,
        pytest.raises(PreflightError, match=says),
    ):
        tap(model, torch.ones(1, 2))
