"""The training loops that are compared: by hand, attar's, and those of other frameworks.

Each is ``loop(problem, gate) -> student`` and is written as its own documentation would write it.
Where a framework offers a leaner mode, that mode is measured too.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from _pace import Gate
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

import attar

Loop = Callable[["Problem", Gate], nn.Module]

TEMPERATURE, SOFT, HARD = 4.0, 0.9, 0.1
LEARNING_RATE, MOMENTUM = 0.01, 0.9
POOL = 50  # batches in memory; an epoch
LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class Problem:
    """A student and a teacher by their widths, and noise to teach on."""

    name: str
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    batch: int
    steps: int = 0

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        count = POOL * self.batch
        inputs = torch.randn(count, self.student[0], generator=generator)
        return inputs, torch.randint(self.student[-1], (count,), generator=generator)

    @cached_property
    def pool(self) -> list[tuple[Tensor, Tensor]]:
        inputs, labels = (part.split(self.batch) for part in self.data)
        return list(zip(inputs, labels, strict=True))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One long epoch of batches that are ready in memory."""
        return islice(cycle(self.pool), self.steps)

    def models(self) -> tuple[nn.Module, nn.Module]:
        """Student and teacher, the same in every loop."""
        return mlp(self.student, seed=1), mlp(self.teacher, seed=2).eval().requires_grad_(False)


def mlp(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def sgd(student: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(student.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Hinton's loss as everybody writes it."""
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, dim=1),
        F.softmax(teacher / TEMPERATURE, dim=1),
        reduction="batchmean",
    )
    return SOFT * TEMPERATURE**2 * soft + HARD * F.cross_entropy(student, labels)


# By hand


def hand(problem: Problem, gate: Gate) -> nn.Module:
    """The reference: teacher, student, losses, non-finite guard, step, and nothing else."""
    return _by_hand(problem, gate(problem.batches()))


def hand_bare(problem: Problem, gate: Gate) -> nn.Module:
    """The reference without its guard: the floor."""
    return _by_hand(problem, gate(problem.batches()), guarded=False)


def hand_slicing(problem: Problem, gate: Gate) -> nn.Module:
    """The same with data by hand: a permutation an epoch, an indexing a batch."""
    inputs, labels = problem.data

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for ids in torch.randperm(len(inputs)).split(problem.batch):
            yield inputs[ids], labels[ids]

    batches = (batch for _ in range(problem.steps // POOL) for batch in epoch())
    return _by_hand(problem, gate(batches))


def _by_hand(
    problem: Problem, batches: Iterator[tuple[Tensor, Tensor]], *, guarded: bool = True
) -> nn.Module:
    student, teacher = problem.models()
    parameters = list(student.parameters())
    optimizer = sgd(student)
    student.train()
    for inputs, labels in batches:
        with torch.no_grad():
            told = teacher(inputs)
        loss = kd_loss(student(inputs), told, labels)
        loss.backward()
        if guarded:
            norm = get_total_norm([p.grad for p in parameters])
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise FloatingPointError("the loss or a gradient is not finite")
        optimizer.step()
        optimizer.zero_grad()
    return student


# attar


class Ready(attar.data.TensorSource):
    """A source whose batches are ready in memory, as the reference has them."""

    def __init__(self, problem: Problem, gate: Gate) -> None:
        super().__init__(*problem.data, classes=problem.student[-1])
        self._gate = gate
        ids = torch.arange(len(self)).split(problem.batch)
        self._pool = [
            {"inputs": x, "labels": y, "ids": i}
            for (x, y), i in zip(problem.pool, ids, strict=True)
        ]

    def epoch(self, number: int, **options: Any) -> Iterator[dict[str, Tensor]]:
        return self._gate(self._pool)


class Own(attar.data.TensorSource):
    """attar's own batching: keyed shuffle, rows by their ids."""

    def __init__(self, problem: Problem, gate: Gate) -> None:
        super().__init__(*problem.data, classes=problem.student[-1])
        self._gate = gate

    def epoch(self, number: int, **options: Any) -> Iterator[dict[str, Tensor]]:
        return self._gate(super().epoch(number, **options))


def attar_distill(
    problem: Problem,
    gate: Gate,
    *,
    source: Callable[[Problem, Gate], Any] = Ready,
    cache: Path | None = None,
) -> nn.Module:
    """With a run folder for its log, validation every epoch and the guard.

    Where there is a *cache*, it is asked and not the teacher.
    """
    student, teacher = problem.models()
    task = attar.tasks.ImageClassification()
    asked = attar.Teacher(teacher, task) if cache is None else attar.Cached(cache)
    kl = partial(attar.losses.kl_divergence, temperature=TEMPERATURE)
    with tempfile.TemporaryDirectory() as folder:
        return attar.distill(
            student,
            asked,
            source(problem, gate),
            task,
            [attar.Term(kl, weight=SOFT)],
            label_weight=HARD,
            epochs=problem.steps // POOL,
            batch_size=problem.batch,
            optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM),
            schedule=attar.training.constant,
            validation=attar.data.TensorSource(*problem.data, classes=problem.student[-1]),
            keep="last",
            device="cpu",
            log_every=LOG_EVERY,
            run=Path(folder) / "run",
            progress=False,
        )


# Others


class Batches:
    """What a framework sees as its data loader: batches that are ready in memory."""

    def __init__(self, problem: Problem, gate: Gate, make: Callable[..., Any]) -> None:
        self._problem, self._gate = problem, gate
        self._pool = [make(*batch) for batch in problem.pool]

    def __len__(self) -> int:
        return self._problem.steps

    def __iter__(self) -> Iterator[Any]:
        return self._gate(islice(cycle(self._pool), len(self)))


class Samples(torch.utils.data.Dataset):
    """One example at a time, as tutorials have it; waits before the first of each batch."""

    def __init__(self, problem: Problem, gate: Gate, make: Callable[..., Any]) -> None:
        self._problem, self._gate, self._make = problem, gate, make
        self._served = 0

    def __len__(self) -> int:
        return self._problem.steps * self._problem.batch

    def __getitem__(self, index: int) -> Any:
        if self._served % self._problem.batch == 0:
            self._gate.wait()
        self._served += 1
        inputs, labels = self._problem.data
        return self._make(inputs[index % len(inputs)], labels[index % len(labels)])


def as_pair(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, labels


def as_dict(inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"inputs": inputs, "labels": labels}


def torchdistill_loop(*, bare: bool = False, guarded: bool = False) -> Loop:
    """Its DistillationBox with the meters and the check of the loss of its examples.

    *bare*: the box alone. *guarded*: with the guard by hand as well, as a hook before the step.
    """
    with _torchvision():
        from torchdistill.core.distillation import DistillationBox
        from torchdistill.misc.log import MetricLogger

    ends = {f"{who}_module_{key}": value for who in ("student", "teacher") for key, value in _END}
    loss = {"temperature": TEMPERATURE, "alpha": HARD, "reduction": "batchmean", **ends}
    term = {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": term}}},
    }

    def loop(problem: Problem, gate: Gate) -> nn.Module:
        student, teacher = problem.models()
        rates = {"kwargs": {"lr": LEARNING_RATE, "momentum": MOMENTUM}}
        stage = config | {"optimizer": {"key": "SGD", **rates}}
        box = DistillationBox(
            teacher, student, {}, stage, torch.device("cpu"), None, distributed=False, lr_factor=1
        )
        box.pre_epoch_process(epoch=0)
        if guarded:
            parameters = list(student.parameters())
            box.optimizer.register_step_pre_hook(lambda *_: _check_norm(parameters))
        batches, meters = Batches(problem, gate, as_pair), MetricLogger()
        for inputs, labels in batches if bare else meters.log_every(batches, LOG_EVERY):
            loss = box.forward_process(inputs, labels, None)
            box.post_forward_process(loss=loss)
            if not bare:
                meters.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
                if torch.isnan(loss) or torch.isinf(loss):
                    raise FloatingPointError("the loss is not finite")
        box.post_epoch_process()
        return student

    return loop


def _check_norm(parameters: list[nn.Parameter]) -> None:
    if not math.isfinite(get_total_norm([p.grad for p in parameters]).item()):
        raise FloatingPointError("a gradient is not finite")


_END = (("path", "."), ("io", "output"))


# What torchdistill imports of torchvision for its model zoo, which is not used here.
_ZOO: dict[str, dict[str, Any]] = {
    "torchvision": {},
    "torchvision.models": {"detection": ModuleType("none"), "segmentation": ModuleType("none")},
    "torchvision.models.densenet": {"_DenseBlock": object, "_Transition": object},
    "torchvision.models.resnet": {"BasicBlock": object, "conv1x1": None},
    "torchvision.datasets": {},
}


@contextmanager
def _torchvision() -> Iterator[None]:
    """Names that stand in for torchvision, whose wheels need a CUDA build of torch.

    They are gone again afterwards, so that the other frameworks, which look for torchvision,
    rightly find none.
    """
    modules = {name: ModuleType(name) for name in _ZOO}
    for name, content in _ZOO.items():
        modules[name].__dict__.update(content)
    modules["torchvision"].__dict__["models"] = modules["torchvision.models"]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def accelerate_loop() -> Loop:
    """The loop of its quick tour, without a guard."""
    from accelerate import Accelerator

    def loop(problem: Problem, gate: Gate) -> nn.Module:
        accelerator = Accelerator(cpu=True)
        student, teacher = problem.models()
        student, optimizer, batches = accelerator.prepare(
            student, sgd(student), Batches(problem, gate, as_pair)
        )
        student.train()
        for inputs, labels in batches:
            with accelerator.accumulate(student):
                with torch.no_grad():
                    told = teacher(inputs)
                loss = kd_loss(student(inputs), told, labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return student

    return loop


def hugging_face_loop(*, bare: bool) -> Loop:
    """A Trainer with its own compute_loss; *bare* turns off all that arguments can turn off."""
    from transformers import Trainer, TrainingArguments

    off = {
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "logging_nan_inf_filter": False,
    }

    def loop(problem: Problem, gate: Gate) -> nn.Module:
        student, teacher = problem.models()

        class Distiller(Trainer):
            def compute_loss(self, model: nn.Module, inputs: Any, **options: Any) -> Tensor:
                with torch.no_grad():
                    told = teacher(inputs["inputs"])
                return kd_loss(model(inputs["inputs"]), told, inputs["labels"])

        class Bare(Distiller):
            def get_train_dataloader(self) -> Any:
                return Batches(problem, gate, as_dict)

        with tempfile.TemporaryDirectory() as folder:
            (Bare if bare else Distiller)(
                model=student,
                args=TrainingArguments(
                    folder,
                    num_train_epochs=1,
                    per_device_train_batch_size=problem.batch,
                    remove_unused_columns=False,
                    use_cpu=True,
                    **(off if bare else {}),
                ),
                train_dataset=None if bare else Samples(problem, gate, as_dict),
                optimizers=(optimizer := sgd(student), _no_schedule(optimizer)),
            ).train()
        return student

    return loop


def _no_schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def lightning_loop(*, bare: bool) -> Loop:
    """A LightningModule; *bare* is the Trainer's own ``barebones`` mode."""
    import lightning

    class Distiller(lightning.LightningModule):
        def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
            super().__init__()
            self.student, self.teacher = student, teacher

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            inputs, labels = batch
            with torch.no_grad():
                told = self.teacher(inputs)
            loss = kd_loss(self.student(inputs), told, labels)
            if not bare:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.student)

    def loop(problem: Problem, gate: Gate) -> nn.Module:
        student, teacher = problem.models()
        batches = Batches(problem, gate, as_pair) if bare else _loader(problem, gate)
        with tempfile.TemporaryDirectory() as folder:
            own = {"barebones": True} if bare else {"default_root_dir": folder}
            trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, **own)
            trainer.fit(Distiller(student, teacher), batches)
        return student

    return loop


def _loader(problem: Problem, gate: Gate) -> torch.utils.data.DataLoader:
    samples = Samples(problem, gate, as_pair)
    return torch.utils.data.DataLoader(samples, batch_size=problem.batch, shuffle=True)


# The peers by the name of their row, each a function that imports the framework: first those that
# can be handed ready batches, then those that are left their usual data loaders.
READY_DATA: dict[str, Callable[[], Loop]] = {
    "torchdistill, guarded": partial(torchdistill_loop, guarded=True),
    "torchdistill, loss guard": torchdistill_loop,
    "torchdistill, bare": partial(torchdistill_loop, bare=True),
    "Accelerate": accelerate_loop,
    "HF Trainer, bare": partial(hugging_face_loop, bare=True),
    "Lightning, bare": partial(lightning_loop, bare=True),
}
OWN_DATA: dict[str, Callable[[], Loop]] = {
    "HF Trainer, default": partial(hugging_face_loop, bare=False),
    "Lightning, default": partial(lightning_loop, bare=False),
}
