"""The losses of other libraries, each brought to attar's scale by the factor that is named.

A library is ``open() -> {method: Peer}``; what it needs is imported there, so that one that is
not installed says so by an ImportError.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Compare = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A loss as the library has it, what it is called there, and how it becomes attar's."""

    loss: Compare
    called: str
    conversion: str = ""


def torchdistill() -> dict[str, Peer]:
    from torchdistill.losses import mid_level as td

    def of(loss: Any, student: Tensor, teacher: Tensor) -> Tensor:
        """The losses of torchdistill take what the hooks of two models have heard."""
        return loss({"m": {"output": student}}, {"m": {"output": teacher}})

    def plain(loss: Any, factor: Callable[[Tensor], float] = lambda s: 1.0) -> Compare:
        return lambda s, t: of(loss, s, t) * factor(s)

    where = {
        "student_module_path": "m",
        "student_module_io": "output",
        "teacher_module_path": "m",
        "teacher_module_io": "output",
    }
    pair = {"student_output_path": "m", "teacher_output_path": "m"}
    maps = {"pair": {side: {"io": "output", "path": "m"} for side in ("student", "teacher")}}
    congruence = td.CCKDLoss("m", "m", {"type": "gaussian", "gamma": 0.4, "max_p": 2}, "sum")

    def context(s: Tensor, t: Tensor) -> Tensor:
        loss = td.HierarchicalContextLoss(**where)
        return loss({"m": {"output": (s, None)}}, {"m": {"output": t}})

    return {
        "KD, T = 1": Peer(plain(td.KDLoss(**where, temperature=1.0, alpha=0)), "KDLoss"),
        "KD, T = 4": Peer(
            plain(td.KDLoss(**where, temperature=4.0, alpha=0), lambda s: 16.0), "KDLoss", "· T²"
        ),
        "LS-KD, T = 2": Peer(
            plain(td.LogitStdKDLoss(**where, temperature=2.0, alpha=0), lambda s: 4.0),
            "LogitStdKDLoss",
            "· T²",
        ),
        "DIST": Peer(plain(td.DISTLoss(**where)), "DISTLoss"),
        "AT": Peer(plain(td.ATLoss(maps)), "ATLoss, code"),
        "HCL": Peer(context, "HierarchicalContextLoss"),
        "ICKD": Peer(plain(td.ChSimLoss(maps), len), "ChSimLoss", "· N"),
        "SP": Peer(plain(td.SPKDLoss(**pair, reduction="batchmean")), "SPKDLoss"),
        "RKD-D": Peer(plain(td.RKDLoss("m", "m", 1.0, 0.0, "mean")), "RKDLoss, distance"),
        "RKD-A": Peer(plain(td.RKDLoss("m", "m", 0.0, 1.0, "mean")), "RKDLoss, angle"),
        "PKT": Peer(plain(td.PKTLoss(**where), len), "PKTLoss", "· N"),
        "CC": Peer(
            lambda s, t: of(congruence, F.normalize(s), F.normalize(t)).square() / len(s) ** 2,
            "CCKDLoss, gaussian",
            "of unit vectors, squared, / N²",
        ),
    }


def keras() -> dict[str, Peer]:
    """As its documentation has it: the loss by its name."""
    os.environ["KERAS_BACKEND"] = "torch"
    from keras.distillation import FeatureDistillation, LogitsDistillation

    def hint(s: Tensor, t: Tensor) -> Tensor:
        return FeatureDistillation(loss="mse").compute_loss(t, s)

    return {
        **_keras_soft(LogitsDistillation, "LogitsDistillation", {}),
        "FitNets": Peer(hint, "FeatureDistillation, mse"),
    }


def keras_instance() -> dict[str, Peer]:
    """The same, the loss given as an object."""
    os.environ["KERAS_BACKEND"] = "torch"
    from keras.distillation import LogitsDistillation
    from keras.losses import KLDivergence

    options = {"loss": KLDivergence()}
    return _keras_soft(LogitsDistillation, "LogitsDistillation, loss=KLDivergence()", options)


def _keras_soft(make: Any, called: str, options: dict[str, Any]) -> dict[str, Peer]:
    def soft(temperature: float) -> Compare:
        loss = make(temperature=temperature, **options)
        return lambda s, t: loss.compute_loss(t, s)

    return {f"KD, T = {t:.0f}": Peer(soft(t), called) for t in (1.0, 4.0)}


def trl() -> dict[str, Peer]:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def jsd(beta: float, s: Tensor, t: Tensor, temperature: float = 1.0) -> Tensor:
        loss = GKDTrainer.generalized_jsd_loss(
            s.unsqueeze(1), t.unsqueeze(1), beta=beta, temperature=temperature
        )
        return loss * temperature**2

    name = "generalized_jsd_loss"
    return {
        "KD, T = 1": Peer(partial(jsd, 0.0), f"{name}, beta 0"),
        "KD, T = 4": Peer(partial(jsd, 0.0, temperature=4.0), f"{name}, beta 0", "· T²"),
        "reverse KL": Peer(partial(jsd, 1.0), f"{name}, beta 1"),
        "JSD": Peer(partial(jsd, 0.5), f"{name}, beta 0.5"),
    }


def torchtune() -> dict[str, Peer]:
    """Its file of losses alone, which needs torch only; the package needs more to be imported."""
    found = importlib.util.find_spec("torchtune")
    if found is None or not found.submodule_search_locations:
        raise ImportError("No module named 'torchtune'")
    path = f"{found.submodule_search_locations[0]}/modules/loss/kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def forward(s: Tensor, t: Tensor) -> Tensor:
        wide = t.double()
        entropy = -torch.special.xlogy(wide.softmax(1), wide.softmax(1)).sum(1).mean()
        return module.ForwardKLLoss()(s, t, counted(s)) - entropy

    def counted(s: Tensor) -> Tensor:
        return torch.zeros(len(s), dtype=torch.long)

    return {
        "KD, T = 1": Peer(forward, "ForwardKLLoss", "less the teacher's entropy"),
        "reverse KL": Peer(lambda s, t: module.ReverseKLLoss()(s, t, counted(s)), "ReverseKLLoss"),
    }


def modelopt() -> dict[str, Peer]:
    from modelopt.torch.distill import LogitsDistillationLoss

    def soft(temperature: float) -> Compare:
        loss = LogitsDistillationLoss(temperature=temperature)
        return lambda s, t: loss(s, t) * s.shape[1]

    return {
        f"KD, T = {temperature:.0f}": Peer(soft(temperature), "LogitsDistillationLoss", "· C")
        for temperature in (1.0, 4.0)
    }


def timm() -> dict[str, Peer]:
    """Its loss stands inside a task that is given a model and images; here with both given."""
    from timm.task.distillation import LogitDistillationTask  # noqa: F401

    raise ImportError("its loss is inside LogitDistillationTask and cannot be called alone")


LIBRARIES: dict[str, tuple[str, Callable[[], dict[str, Peer]]]] = {
    "torchdistill": ("torchdistill", torchdistill),
    "Keras": ("keras", keras),
    "Keras, object": ("keras", keras_instance),
    "TRL": ("trl", trl),
    "torchtune": ("torchtune", torchtune),
    "ModelOpt": ("nvidia-modelopt", modelopt),
    "timm": ("timm", timm),
}


def installed() -> tuple[dict[str, dict[str, Peer]], dict[str, str]]:
    """The libraries that can be imported, and why the others cannot."""
    found, absent = {}, {}
    logging.disable(logging.WARNING)
    for name, (_, load) in LIBRARIES.items():
        try:
            with warnings.catch_warnings(action="ignore"):
                found[name] = load()
        except Exception as error:  # a package that fails as it is imported is as good as absent
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    logging.disable(logging.NOTSET)
    return found, absent
