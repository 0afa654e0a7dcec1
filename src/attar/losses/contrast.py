"""Losses that tell an example's teacher from the teachers of other examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._maps import check_same_examples, flat_pair, unit
from attar.losses._rows import check_positive, check_same_shape, wide
from attar.losses._softmax import divergence
from attar.losses.types import Positive


def contrast(student: Tensor, teacher: Tensor, *, temperature: Positive = 0.07) -> Tensor:
    """Contrast within the batch (InfoNCE): -mean_i log(e^(c_ii / T) / Σ_j e^(c_ij / T)).

    c_ij = cos(s_i, t_j): each example of the student picks its own teacher's features out of those
    of the batch.

    Shapes: student and teacher [N, D] or [N, ...] of equal shape, flattened (add
    `projector: linear` where D differs). Returns a scalar, in nats; chance is log N. The other
    examples of the batch are what it is compared with, so the value depends on the batch: give it
    many; one example alone gives 0. It is not zero at equality. A zero vector is at cosine 0 from
    all, without gradient.

    Papers: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018;
    between student and teacher Tian et al., "Contrastive Representation Distillation" (CRD), ICLR
    2020, which takes 16384 negatives from a memory of past features and another estimator, so that
    its weight 0.8 does not carry over: start at 0.1 to 1.

    Neighbours: `cosine_distance` pulls to the own teacher and pushes from no other.

    >>> import torch
    >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> contrast(student, torch.tensor([[1.0, 0.0], [1.0, 1.0]]), temperature=1.0)
    tensor(0.4791)
    """
    check_same_shape(student, teacher)
    check_positive("temperature", temperature)
    student, teacher = flat_pair(student, teacher)
    similar = (unit(student) / temperature) @ unit(teacher).T
    own = torch.arange(len(similar), device=similar.device)
    return F.cross_entropy(similar, own, reduction="sum") / max(len(similar), 1)


def affinity_kl(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    *,
    temperature: Positive = 0.07,
    teacher_temperature: Positive = 0.01,
) -> Tensor:
    """Affinities of two modalities (CLIP-KD's CRD part, TinyCLIP): who goes with whom, as KL.

    ½ mean_i (KL(p_i ‖ q_i) + KL(p'_i ‖ q'_i)): q_i is the softmax over j of cos(a_i, b_j) / T of
    the student's first embeddings a (images) and second b (texts), and q'_i that of
    cos(b_i, a_j) / T; p and p' are those of the teacher at its own temperature.

    Shapes: student and teacher are pairs (a, b) of embeddings [N, D]; D may differ between the
    sides. Returns a scalar, in nats (no T²). It compares the examples of the batch with one
    another, so the value depends on the batch: give it many; one example alone gives 0. A zero
    vector is at cosine 0 from all, without gradient.

    Papers: Yang et al., "CLIP-KD: An Empirical Study of CLIP Model Distillation", CVPR 2024, weight
    1, T as CLIP starts with (0.07) and the teacher's as CLIP ends with (1 / 100); Wu et al.,
    "TinyCLIP", ICCV 2023. There the student's T is trained; here it stays. The strongest part of
    CLIP-KD is another: `cosine_distance` to each embedding (its mean squared error of unit vectors
    is 2 / D of it, so their 2000 at D = 512 is 7.8).

    Neighbours: `contrast` asks for the own partner alone; with the student's images and the
    teacher's texts it is CLIP-KD's interactive part (ICL). `probabilistic_transfer` compares within
    one modality.

    >>> import torch
    >>> one, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> affinity_kl((one, one), (one, other), temperature=1.0, teacher_temperature=1.0)
    tensor(0.0468)
    """
    check_positive("temperature", temperature)
    check_positive("teacher_temperature", teacher_temperature)
    mine = _affinities("student", student, temperature)
    theirs = _affinities("teacher", tuple(side.detach() for side in teacher), teacher_temperature)
    check_same_examples(mine, theirs)
    both = zip((mine, mine.T), (theirs, theirs.T), strict=True)
    costs = [divergence(F.log_softmax(q, dim=1), F.log_softmax(p, dim=1)) for q, p in both]
    return torch.stack(costs).sum() / (2 * max(len(mine), 1))


def _affinities(side: str, pair: tuple[Tensor, ...], temperature: float) -> Tensor:
    shapes = [tuple(part.shape) for part in pair]
    if len(pair) != 2 or shapes[0] != shapes[1] or len(shapes[0]) != 2 or not shapes[0][1]:
        raise ValueError(
            f"{side} must be two tensors of features [N, D] with values in them, got {shapes}."
        )
    one, other = (wide(part) for part in pair)
    return (unit(one) / temperature) @ unit(other).T
