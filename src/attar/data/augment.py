"""Augmentations: functions of a batch and a :class:`~attar.data.draw.Draw`.

Each returns a new batch and leaves the one it was given as it was. Everything random comes from
``draw``, which is keyed by row: a row alone and the same row in any batch are equal to the bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F

from attar.data.draw import Draw
from attar.data.types import Augmentation, Batch
from attar.runtime import DataError, UsageError, described


def spelled(augment: Sequence[Augmentation]) -> list[Any]:
    """Augmentations as JSON, with the defaults of their options.

    So they are equal where they do the same, whether or not a default was written.

    >>> spelled([crop]) == spelled([partial(crop, pixels=2)])
    True
    """
    return [_spelled(change) for change in augment]


def _spelled(change: Augmentation) -> Any:
    function = change.func if isinstance(change, partial) else change
    if not inspect.isfunction(function):  # an object tells of itself as it is
        return described(change)
    given = change.keywords if isinstance(change, partial) else {}
    usual = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }
    options = usual | given
    return {"name": described(function)} | described(options) if options else described(function)


def crop(batch: Batch, draw: Draw, *, pixels: Annotated[int, Ge(1)] = 2) -> Batch:
    """Shift every image by up to ``pixels``, up or down and left or right.

    What comes in at the border is zero; zero padding followed by a random crop, as in He et al.,
    "Deep Residual Learning" (2016), section 4.2, with ``pixels=4`` there.

    Parameters
    ----------
    pixels:
        The largest shift; both shifts are uniform over the integers from -pixels to pixels.
        Smaller than either side of the image.
    """
    images = _images(batch, "crop")
    height, width = images.shape[2:]
    if not 1 <= pixels < min(height, width):
        raise UsageError(
            f"crop: pixels must be from 1 to {min(height, width) - 1} for images of "
            f"{height} x {width}, not {pixels}"
        )
    down = (draw.uniform("down") * (2 * pixels + 1)).to(torch.int64)
    right = (draw.uniform("right") * (2 * pixels + 1)).to(torch.int64)
    padded = F.pad(images, (pixels,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return {**batch, "inputs": windows[torch.arange(len(images)), :, down, right]}


def flip(batch: Batch, draw: Draw) -> Batch:
    """Mirror every image left to right with probability 1/2."""
    images = _images(batch, "flip")
    mirrored = _column(draw.uniform("flip") < 0.5, images)
    return {**batch, "inputs": torch.where(mirrored, images.flip(-1), images)}


def mixup(batch: Batch, draw: Draw, *, alpha: Annotated[float, Gt(0)] = 0.2) -> Batch:
    """Mix every row with another one: ``x = s x_i + (1 - s) x_j``, and the labels likewise.

    ``s ~ Beta(alpha, alpha)`` and the partner j, any other row of the source, are drawn for each
    row. Class numbers become float32 probabilities [n, C]; multi-label rows and values of
    regression are mixed as they are; rows without labels have their inputs mixed. Zhang et al.,
    "mixup: Beyond Empirical Risk Minimization" (2018).

    Parameters
    ----------
    alpha:
        Small: one of the two nearly alone; 1: every share equally likely.
    """
    partner = draw.partner()
    share = _beta(draw.uniform("share"), alpha).float()
    inputs = _mixed(batch["inputs"], partner["inputs"], share)
    return {**batch, "inputs": inputs, **_mixed_labels(batch, partner, share, draw)}


def cutmix(batch: Batch, draw: Draw, *, alpha: Annotated[float, Gt(0)] = 1.0) -> Batch:
    """Paste a box of another image into every image and mix the labels by area.

    With ``s ~ Beta(alpha, alpha)`` the box has sides ``sqrt(1 - s)`` of the image's and a uniform
    centre, and is cut at the border; the share of the image's own label is then exactly the share
    of its own pixels. Partner and labels are as in :func:`mixup`. Yun et al., "CutMix:
    Regularization Strategy to Train Strong Classifiers" (2019).

    Multi-label rows are refused: how much of an image is left does not say which of several
    things in it can still be seen.
    """
    images = _images(batch, "cutmix")
    _refuse_multi_label(draw)
    height, width = images.shape[2:]
    side = (1 - _beta(draw.uniform("share"), alpha)).sqrt()
    rows = _interval(draw.uniform("row"), side, height)
    columns = _interval(draw.uniform("column"), side, width)
    share = 1 - (rows.sum(1) * columns.sum(1)).float() / (height * width)
    box = (rows[:, :, None] & columns[:, None, :])[:, None]
    partner = draw.partner()
    inputs = torch.where(box, partner["inputs"], images)
    return {**batch, "inputs": inputs, **_mixed_labels(batch, partner, share, draw)}


def _images(batch: Batch, name: str) -> Tensor:
    inputs = batch["inputs"]
    if inputs.ndim != 4:
        raise DataError(
            f"{name} needs images [channels, height, width], and the inputs are "
            f"{list(inputs.shape[1:])}; leave {name} out"
        )
    return inputs


def _refuse_multi_label(draw: Draw) -> None:
    source = draw.source
    if source.classes is None:
        return
    # The source is asked and not the batch: mixing before this makes floats of class numbers too.
    labels = source.rows(draw.ids[:1]).get("labels")
    if labels is not None and labels.is_floating_point():
        raise DataError(
            f"{source.name}: cutmix mixes labels by area, which says nothing of which of several "
            "labels can still be seen; use mixup for multi-label data"
        )


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _mixed(own: Tensor, other: Tensor, share: Tensor) -> Tensor:
    share = _column(share, own)
    return own * share + other * (1 - share)


def _beta(uniform: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) by its inverse distribution function, float64 as ``uniform``."""
    from scipy.special import betaincinv

    if not alpha > 0:
        raise UsageError(f"alpha must be greater than 0, not {alpha}; leave mixing out for none")
    return torch.from_numpy(betaincinv(alpha, alpha, uniform.numpy()))


def _interval(centre: Tensor, side: Tensor, size: int) -> Tensor:
    """bool [n, size]: the positions within ``side`` (of 1) around ``centre``, cut at the border."""
    middle = (centre * size).to(torch.int64)
    half = (side * size).to(torch.int64) // 2
    position = torch.arange(size)
    return (position >= (middle - half)[:, None]) & (position < (middle + half)[:, None])


def _mixed_labels(batch: Batch, partner: Batch, share: Tensor, draw: Draw) -> Batch:
    if "labels" not in batch:
        return {}
    own, other = (_mixable(part["labels"], draw) for part in (batch, partner))
    return {"labels": _mixed(own, other, share)}


def _mixable(labels: Tensor, draw: Draw) -> Tensor:
    if labels.is_floating_point():
        return labels
    if draw.source.classes is None:
        raise DataError(
            f"{draw.source.name}: mixing class labels needs the number of classes; give classes="
            " to the source"
        )
    return F.one_hot(labels, len(draw.source.classes)).float()
