"""How to walk: the options that `train` and `distill` share, checked before the first batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from attar.data.types import Augmentation
from attar.runtime import PreflightError, UsageError, suggest
from attar.training.optimization import OptimizerFactory, Schedule, cosine, sgd


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
class Plan:
    """The options of one stage of training.

    Attributes:
        epochs: passes over the data.
        batch_size: examples in a batch.
        accumulate: batches in one optimiser step; the step is that of one batch as large.
        optimizer: ``attar.training.sgd``, ``adamw``, or any ``torch.optim`` class, with its
            options by ``functools.partial``.
        schedule: factor of the rate as a function of progress, 0 to 1.
        clip: largest norm of the whole gradient.
        average: decay of a moving average of the weights, which then are the result.
        augment: functions of ``attar.data``, in order; keyed by seed, epoch and example.
        views: how many augmented versions of each example there are, the same for every seed;
            new ones in every epoch when left out.
        shuffle_block: shuffle blocks of so many examples, and the examples of some blocks at a
            time, where data or a teacher's cache do not fit in memory; all at once when left out.
        keep: ``best`` epoch by validation, or the ``last``.
        seed: of order, augmentation and dropout.
        device: ``auto``, ``cpu``, ``cuda``, ...
        precision: ``auto``, ``float32``, ``bf16`` or ``fp16``; losses are in float32 always.
        parallel: how the ranks that ``torchrun`` started share the student: ``ddp`` holds all of it
            on each, ``fsdp`` a part; ``auto`` is ``ddp``. One process shares nothing.
        freeze: paths of parts or parameters of the student that are not trained; ``*`` stands for
            any letters, ``!PATH`` takes back what was frozen before, ``head`` is the last layer.
        unfreeze_every: train the head alone at first, then one more block, from the output on,
            every so many epochs.
        layer_decay: rate of each block in the unit of the block above it.
        frozen_batch_norm: batch norms keep their statistics; those of frozen parts always do.
        l2_sp: strength of the pull of inherited weights toward their start, in the place of weight
            decay.
        compile: run the student through ``torch.compile``.
        recompute: keep no activations inside the student's blocks, and compute them again in the
            backward pass: less memory, about a third more time.
        log_every: steps between two records of the training loss.
        log_gradients: beside each record the norm of the gradient that each weighted term gives
            the student, of the step's last batch; a backward pass a term. One process alone.
        checkpoint_every: steps between two checkpoints of a run; by the clock when left out,
            about one a minute.
    """

    epochs: Annotated[int, Ge(1)] = 10
    batch_size: Annotated[int, Ge(1)] = 128
    accumulate: Annotated[int, Ge(1)] = 1
    optimizer: OptimizerFactory = sgd
    schedule: Schedule = partial(cosine, warmup=0.05)
    clip: Annotated[float, Gt(0)] | None = None
    average: Annotated[float, Interval(gt=0, lt=1)] | None = None
    augment: Sequence[Augmentation] = ()
    views: Annotated[int, Ge(1)] | None = None
    shuffle_block: Annotated[int, Ge(1)] | None = None
    keep: Literal["best", "last"] = "best"
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    freeze: Sequence[str] = ()
    unfreeze_every: Annotated[int, Ge(1)] | None = None
    layer_decay: Annotated[float, Interval(gt=0, le=1)] | None = None
    frozen_batch_norm: bool = False
    l2_sp: Annotated[float, Gt(0)] | None = None
    compile: bool = False
    recompute: bool = False
    log_every: Annotated[int, Ge(1)] = 50
    log_gradients: bool = False
    checkpoint_every: Annotated[int, Ge(1)] | None = None


def make_plan(options: dict[str, Any]) -> Plan:
    """Check *options*; what is wrong is one sentence that names the option."""
    known = Plan.__dataclass_fields__
    for name in options:
        if name not in known:
            raise UsageError(f"there is no option '{name}'; {suggest(name, known)}")
    try:
        plan = Plan(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{name} is {first['input']!r}: {first['msg']}") from None
    if (plan.views or 1) > 1 and not plan.augment:
        raise PreflightError(
            f"views is {plan.views}, but nothing is augmented, so every view would be the same; "
            "give augment, or leave views out"
        )
    return plan
