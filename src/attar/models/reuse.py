"""A student that ends in its teacher's classifier (SimKD)."""

from __future__ import annotations

import copy
import json
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from attar.models.build import construct
from attar.models.layers import chain, convolution
from attar.models.projectors import mlp
from attar.models.state import shape_differences, shapes_of
from attar.models.transfer import head_of
from attar.models.types import Pair, Shape, Size
from attar.runtime import UsageError, eval_mode

FAMILY = "reused"
Factor = Annotated[int, Ge(1), Le(64)]


def reuse_head(
    student: nn.Module, teacher: nn.Module, inputs: Tensor, *, factor: Factor = 2
) -> nn.Sequential:
    """A student that ends in the teacher's own classifier, frozen: SimKD (arXiv:2203.14001).

    A copy of the student without its head, then a new projector, then a copy of the teacher's
    head, which trains nothing. The projector stays in the student, so it counts in its size and
    its time. Where both models have a part ``pool`` that reads a map [N, C, H, W] and feeds the
    head, the projector stands before it: the paper's bottleneck (1x1, 3x3 and 1x1 convolutions,
    each with batch normalisation and a ReLU, inside with D / *factor* channels for the teacher's
    D), after averaging a larger map of the student to the teacher's size. Elsewhere it stands
    before the head, on vectors [N, C]: the projector `mlp`.

    What it is taught is the teacher's feature, and no label::

        model = attar.models.reuse_head(student, teacher, inputs)
        term = attar.Term(attar.losses.mse, student="feature:projector", teacher="input:pool")
        attar.distill(model, teacher, train, task, [term], label_weight=0)

    With a projector on vectors, match the teacher's ``input:head``; where the teacher's map is
    the larger one, add ``teacher_projector=attar.models.projectors.pool``. The parts are
    ``backbone``, ``projector``, ``pool`` and ``head``.

    `save` and `load` keep the result where `build` made the student from a family of attar's;
    any other is loaded with ``load(folder, into=module)``.

    Args:
        student: left as it is; its classes must be the teacher's, in the same order.
        teacher: left as it is.
        inputs: an example batch that both read.
        factor: how many times narrower the bottleneck is inside.

    Errors: a last layer that is no ``nn.Linear``, other numbers of classes, a head that reads no
    vectors [N, C] (UsageError).
    """
    own, other = _ending(student, inputs, "student"), _ending(teacher, inputs, "teacher")
    if own.head.out_features != other.head.out_features:
        raise UsageError(
            f"reuse_head: the student has {own.head.out_features} classes and the teacher "
            f"{other.head.out_features}; they must be the same classes in the same order"
        )
    module, options = _joined(copy.deepcopy(student), own, other, factor)
    module.get_submodule("projector").to(own.head.weight)
    module.get_submodule("head").to(own.head.weight)
    signature = {"shape": list(inputs.shape[1:]), "outputs": other.head.out_features}
    _note(module, student, signature | options)
    return module.train(student.training)


def reused(
    shape: Shape,
    outputs: Size,
    *,
    student: dict[str, Any],
    head: str,
    width: Size,
    bias: bool,
    features: Size,
    map: bool,
    size: Pair,
    factor: Factor,
) -> nn.Sequential:
    """What `reuse_head` made, with random weights: how `load` builds it again."""
    from attar.models.changed import rebuilt

    backbone = rebuilt(student, "student")
    pool = _take(backbone, "pool") if map else nn.Identity()
    _take(backbone, head)
    projector = _projector(features, width, map, size, factor)
    return _parts(backbone, projector, pool, nn.Linear(width, outputs, bias=bias))


class _Ending(NamedTuple):
    """How a model ends: the name of its head, the head, and examples of what enters the end."""

    path: str
    head: nn.Linear
    vector: Tensor
    map: Tensor | None


def _ending(model: nn.Module, inputs: Tensor, whose: str) -> _Ending:
    path = (head_of(model) or [""])[-1].rpartition(".")[0]
    head = model.get_submodule(path)
    if not path or not isinstance(head, nn.Linear):
        raise UsageError(
            f"reuse_head: the {whose}'s last layer must be an nn.Linear, and "
            f"'{path}' is a {type(head).__name__}; give a model that ends in one"
        )
    pool = getattr(model, "pool", None)
    watched: list[nn.Module] = [head, pool] if isinstance(pool, nn.Module) else [head]
    read = _inputs_of(model, watched, inputs)
    vector, before = read[0], read[1] if len(read) > 1 else None
    if vector is None or vector.ndim != 2:
        found = "nothing" if vector is None else list(vector.shape)
        raise UsageError(
            f"reuse_head: the {whose}'s head '{path}' must read vectors [N, C], not {found}; "
            "give another model"
        )
    if before is None or before.ndim != 4 or not isinstance(pool, nn.Module):
        return _Ending(path, head, vector, None)
    with eval_mode(pool), torch.no_grad():
        feeds = before.shape[1] == vector.shape[1] and torch.equal(pool(before), vector)
    return _Ending(path, head, vector, before if feeds else None)


def _inputs_of(model: nn.Module, parts: list[nn.Module], inputs: Tensor) -> list[Tensor | None]:
    """What each part is given in a pass over *inputs*."""
    heard: dict[nn.Module, Any] = {}
    handles = [
        part.register_forward_pre_hook(lambda part, args: heard.update({part: args[0]}))
        for part in parts
    ]
    try:
        with eval_mode(model), torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [heard.get(part) for part in parts]


def _joined(
    backbone: nn.Module, own: _Ending, other: _Ending, factor: int
) -> tuple[nn.Sequential, dict[str, Any]]:
    """The new student, and the options by which `reused` builds one like it."""
    pool: nn.Module = nn.Identity()
    features, width, size = own.vector.shape[1], other.head.in_features, None
    mapped = own.map is not None and other.map is not None
    if own.map is not None and other.map is not None:
        pool, features = _take(backbone, "pool"), own.map.shape[1]
        size = _smaller(own.map, other.map)
    _take(backbone, own.path)
    options = {
        "head": own.path,
        "width": width,
        "bias": other.head.bias is not None,
        "features": features,
        "map": mapped,
        "size": size,
        "factor": factor,
    }
    projector = _projector(features, width, mapped, size, factor)
    return _parts(backbone, projector, pool, copy.deepcopy(other.head)), options


def _smaller(own: Tensor, other: Tensor) -> Pair:
    """The smaller height and width; None where the student's are that already."""
    (height, width), (h, w) = own.shape[2:], other.shape[2:]
    return None if height <= h and width <= w else (min(height, h), min(width, w))


def _take(model: nn.Module, path: str) -> nn.Module:
    """The part at *path*, of which the model keeps only the place."""
    part = model.get_submodule(path)
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.Identity())
    return part


def _projector(features: int, width: int, mapped: bool, size: Pair, factor: int) -> nn.Module:
    if not mapped:
        return mlp(torch.empty(1, features), torch.empty(1, width))
    inner = max(1, width // factor)
    parts: dict[str, nn.Module] = {} if size is None else {"average": nn.AdaptiveAvgPool2d(size)}
    parts["narrow"] = convolution(features, inner, kernel=1, activation=nn.ReLU())
    parts["filter"] = convolution(inner, inner, activation=nn.ReLU())
    parts["widen"] = convolution(inner, width, kernel=1, activation=nn.ReLU())
    return chain(**parts)


def _parts(
    backbone: nn.Module, projector: nn.Module, pool: nn.Module, head: nn.Linear
) -> nn.Sequential:
    return chain(backbone=backbone, projector=projector, pool=pool, head=head.requires_grad_(False))


def _note(module: Any, student: nn.Module, options: dict[str, Any]) -> None:
    """Record how *module* is built again, where attar's families can."""
    from attar.models.changed import builders

    built = getattr(student, "attar_build", None)
    if built is None or built["family"] not in builders():
        return
    record = json.loads(json.dumps({**options, "student": built}))
    with torch.random.fork_rng(devices=[]):
        again = construct(reused, FAMILY, record)
    if not shape_differences(shapes_of(again.state_dict()), shapes_of(module.state_dict())):
        module.attar_build = {"family": FAMILY, "options": record}
