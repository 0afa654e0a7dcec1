"""Losses on what maps of one example say: of positions, of channels, of both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._maps import (
    check_maps,
    check_same_channels,
    map_pair,
    mean_square,
    resized_pair,
    unit,
)
from attar.losses._rows import wide

# The grid of the official code, to which the published numbers belong.
CLASS_ATTENTION_SIZE = 2


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer (AT): look where the teacher looks. mean_p (a_p(s) - a_p(t))².

    a(f) is the map Σ_c f_c² over positions p, divided by its norm.

    Shapes: student and teacher maps [N, C, H, W], or tokens [N, L, D]; the channels may differ.
    Where heights and widths differ the larger map is average-pooled to the smaller, before it is
    squared; token counts must agree. Returns [N], in [0, 2 / positions]. A map that is zero
    everywhere looks nowhere: its a is zero, without gradient.

    Paper: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017. The official
    code averages over examples and positions, as here: its β = 1000 carries over, for each of
    several layers of 32 x 32 to 8 x 8 positions. The value falls with the number of positions, so
    scale the weight with it (10 at 4 x 4). The paper's β/2 Σ ‖a(s) - a(t)‖₂ is not squared.

    Neighbours: unchanged by the order, signs and common scale of the channels. `factor_transfer`
    is the absolute difference; `channel_similarity` compares channels instead of positions.

    >>> import torch
    >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    >>> attention_transfer(student, torch.tensor([[[[1.0, 0.0]]]]))
    tensor([0.2929])
    """
    seen, wanted = _attention(student, teacher)
    return mean_square(seen - wanted)


def factor_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Factor transfer (FT) without its trained networks: mean_p |a_p(s) - a_p(t)|.

    a(f) is the map Σ_c f_c² over positions p, divided by its norm.

    Shapes: student and teacher maps [N, C, H, W], or tokens [N, L, D]; channels may differ, sizes
    as in `attention_transfer`. Returns [N]. A map that is zero everywhere has a = 0, without
    gradient.

    Paper: Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer",
    NeurIPS 2018. This is what RepDistiller computes, weight 200, the same here; the paper's
    paraphraser and translator are trained networks, and are not part of it.

    Neighbours: `attention_transfer` is the square of the same difference.

    >>> import torch
    >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    >>> factor_transfer(student, torch.tensor([[[[1.0, 0.0]]]]))
    tensor([0.5000])
    """
    seen, wanted = _attention(student, teacher)
    return (seen - wanted).abs().sum(1) / seen.shape[1]


def _attention(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = resized_pair(student, teacher)
    return unit(student.square().sum(1)), unit(teacher.square().sum(1))


def class_attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Class attention transfer (CAT-KD): where each class is seen. mean_{c,p} (a_cp(s) - a_cp(t))².

    a(f) is each channel's map, average-pooled to 2 x 2 positions p and divided by its norm. The
    maps are class activation maps: the output of the last layer as a 1x1 convolution, C = classes.

    Shapes: student and teacher [N, C, H, W] of equal C; heights and widths may differ, since both
    are pooled. Returns [N], in [0, 1]. A map that is zero after pooling has a = 0, without
    gradient.

    Paper: Guo et al., "Class Attention Transfer Based Knowledge Distillation", CVPR 2023. The
    official weight 400 carries over.

    Neighbours: unchanged by a positive scale of each channel. `attention_transfer` adds up the
    channels first.

    >>> import torch
    >>> student = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    >>> class_attention(student, torch.tensor([[[[0.0, 0.0], [0.0, 2.0]]]]))
    tensor([0.5000])
    """
    check_maps(student, teacher)
    if student.ndim != 4:
        raise ValueError(f"class_attention needs maps [N, C, H, W], got {tuple(student.shape)}.")
    check_same_channels(student, teacher)
    seen, wanted = (
        unit(F.adaptive_avg_pool2d(wide(maps), CLASS_ATTENTION_SIZE).flatten(2))
        for maps in (student, teacher.detach())
    )
    return mean_square(seen - wanted)


def neuron_selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    """Neuron selectivity transfer (NST): channels that respond at the same places.

    The squared maximum mean discrepancy (MMD²) between the two sets of channels, with the kernel
    k(x, y) = (x · y)²: mean_{cc'} k(s_c, s_c') + mean_{dd'} k(t_d, t_d') - 2 mean_{cd} k(s_c, t_d),
    where s_c and t_d are the maps of single channels, divided by their norms.

    Shapes: student and teacher maps [N, C, H, W], or tokens [N, L, D]; channels may differ, sizes
    as in `attention_transfer`. Returns [N], in [0, 2]. A channel that is zero everywhere is a zero
    vector, without gradient. Takes N · C² or N · (HW)² values of memory, whichever form is cheaper.

    Paper: Huang & Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
    2017. The weight 50 of mdistiller and RepDistiller carries over.

    Neighbours: it is the squared distance of the mean products of positions, mean_c s_c s_cᵀ;
    `gram` compares mean products of channels.

    >>> import torch
    >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    >>> neuron_selectivity(student, torch.tensor([[[[1.0, 0.0]]]]))
    tensor([0.5000])
    """
    s, t = (unit(maps) for maps in resized_pair(student, teacher))
    mine, theirs, positions = s.shape[1], t.shape[1], s.shape[2]
    if positions * (mine + theirs) <= mine**2 + mine * theirs + theirs**2:
        gap = _gap_of_moments(s.transpose(1, 2), t.transpose(1, 2))
        return mean_square(gap) * positions**2
    own, other, cross = _products(s), _products(t), s @ t.transpose(1, 2)
    return mean_square(own) + mean_square(other) - 2 * mean_square(cross)


def _products(maps: Tensor) -> Tensor:
    """[N, A, B] to the products of its rows [N, A, A]."""
    return maps @ maps.transpose(1, 2)


def _gap_of_moments(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean products of rows, mean_b x_ab x_cb, of the student less those of the teacher."""
    return torch.baddbmm(
        _products(teacher),
        student,
        student.transpose(1, 2),
        beta=-1 / teacher.shape[2],
        alpha=1 / student.shape[2],
    )


def channel_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Inter-channel correlation (ICKD): Σ_cd (G_cd(s) - G_cd(t))² / C.

    G is the product of each pair of channels, Σ_p f_cp f_dp, each row of it divided by its norm.

    Shapes: student and teacher maps [N, C, H, W], or tokens [N, L, D] with D channels; equal
    channels (add `projector: linear` where they differ), any number of positions. Returns [N], in
    [0, 4]. A channel that is zero everywhere has a zero row, without gradient.

    Paper: Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
    Distillation" (ICKD-C), ICCV 2021. The official code divides by N and C, as here.

    Neighbours: `similarity_preserving` is the same between examples; `gram` keeps the scale.

    >>> import torch
    >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    >>> channel_similarity(student, torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]]))
    tensor([0.5858])
    """
    student, teacher = map_pair(student, teacher)
    check_same_channels(student, teacher)
    gap = unit(_products(student)) - unit(_products(teacher))
    return mean_square(gap) * gap.shape[2]


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Gram matrices, as in the flow of solution procedure (FSP): mean_cd (G_cd(s) - G_cd(t))².

    G is the mean product of each pair of channels, mean_p f_cp f_dp.

    Shapes: student and teacher maps [N, C, H, W], or tokens [N, L, D] with D channels; equal
    channels (add `projector: linear` where they differ), any number of positions. Returns [N], in
    the fourth power of the signal's unit: features of size 100 give values of 1e8, so scale the
    weight, or use `channel_similarity`, which has no unit.

    Paper: Yim et al., "A Gift from Knowledge Distillation", CVPR 2017, takes G between the channels
    of two layers; here both are the same layer, as in Gatys et al., "Image Style Transfer", 2016.
    RepDistiller averages over G, weight 50, the same here.

    Neighbours: `channel_similarity` normalises the rows of G.

    >>> import torch
    >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    >>> gram(student, torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]]))
    tensor([0.1250])
    """
    student, teacher = map_pair(student, teacher)
    check_same_channels(student, teacher)
    return mean_square(_gap_of_moments(student, teacher))
