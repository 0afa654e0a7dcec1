"""Golden values for the tests of this room."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FILES = sorted((Path(__file__).parents[1] / "oracles").glob("*.json"))


def finite_or_not(value: Any) -> Any:
    if isinstance(value, list):
        return [finite_or_not(item) for item in value]
    return float(value) if isinstance(value, str) else value


@dataclass
class Case:
    """One published case: inputs ready for autograd, expected numbers, tolerance."""

    inputs: dict[str, Tensor]
    expected: dict[str, Any]
    gradients: dict[str, Tensor]
    rtol: float

    def assert_value(self, value: Tensor, expected: str = "loss", factor: float = 1.0) -> None:
        self.close(value, torch.tensor(self.expected[expected], dtype=torch.float64) * factor)

    def close(self, value: Tensor, wanted: Any) -> None:
        wanted = torch.as_tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(value.double(), wanted, rtol=self.rtol, atol=1e-12)

    def assert_gradient(self, value: Tensor, name: str = "z_s", output: str = "") -> None:
        (gradient,) = torch.autograd.grad(value, self.inputs[name], retain_graph=True)
        wanted = self.gradients[output + name]
        torch.testing.assert_close(gradient.double(), wanted, rtol=self.rtol, atol=self.rtol / 10)


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for file in FILES:
        cases |= json.loads(file.read_text())["cases"]
    return cases


@pytest.fixture
def oracle(golden: dict[str, Any]) -> Any:
    def case(name: str) -> Case:
        found = golden[name]
        inputs = {
            key: torch.tensor(finite_or_not(item["value"]), dtype=getattr(torch, item["dtype"]))
            for key, item in found["inputs"].items()
        }
        for value in inputs.values():
            value.requires_grad_(value.is_floating_point())
        gradients = {
            key: torch.tensor(finite_or_not(value), dtype=torch.float64)
            for key, value in found["expected_grads"].items()
        }
        rtol = 1e-9 if found["dtype"] == "float64" else 2e-5
        return Case(inputs, finite_or_not_all(found["expected"]), gradients, rtol)

    return case


def finite_or_not_all(expected: dict[str, Any]) -> dict[str, Any]:
    return {key: finite_or_not(value) for key, value in expected.items()}
