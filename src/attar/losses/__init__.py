"""Losses: plain functions of (student, teacher, what else they name), one value a row."""

from attar.losses.agreement import correlation, probability_gram
from attar.losses.attention import (
    attention_transfer,
    channel_similarity,
    class_attention,
    factor_transfer,
    gram,
    neuron_selectivity,
)
from attar.losses.contrast import contrast
from attar.losses.dense import channel_correlation, channel_kl, pixel_relation
from attar.losses.divergence import (
    adaptive_kl,
    alpha_beta_divergence,
    earth_mover,
    jensen_shannon,
    reverse_kl,
    skewed_kl,
    total_variation,
)
from attar.losses.feature import (
    activation_boundary,
    cosine_distance,
    hierarchical_context,
    mse,
    normalized_smooth_l1,
    partial_mse,
)
from attar.losses.labelled import decoupled_kl, normalized_kl, target_enhanced_kl, weighted_kl
from attar.losses.relation import (
    correlation_congruence,
    kernel_alignment,
    probabilistic_transfer,
    relation_angle,
    relation_distance,
    similarity_preserving,
)
from attar.losses.response import (
    binary_kl,
    centered_mse,
    cross_entropy,
    hard_distillation,
    kl_divergence,
    standardized_kl,
    transformed_teacher_kl,
    virtual_teacher,
)

__all__ = [
    "activation_boundary",
    "adaptive_kl",
    "alpha_beta_divergence",
    "attention_transfer",
    "binary_kl",
    "centered_mse",
    "channel_correlation",
    "channel_kl",
    "channel_similarity",
    "class_attention",
    "contrast",
    "correlation",
    "correlation_congruence",
    "cosine_distance",
    "cross_entropy",
    "decoupled_kl",
    "earth_mover",
    "factor_transfer",
    "gram",
    "hard_distillation",
    "hierarchical_context",
    "jensen_shannon",
    "kernel_alignment",
    "kl_divergence",
    "mse",
    "neuron_selectivity",
    "normalized_kl",
    "normalized_smooth_l1",
    "partial_mse",
    "pixel_relation",
    "probabilistic_transfer",
    "probability_gram",
    "relation_angle",
    "relation_distance",
    "reverse_kl",
    "similarity_preserving",
    "skewed_kl",
    "standardized_kl",
    "target_enhanced_kl",
    "total_variation",
    "transformed_teacher_kl",
    "virtual_teacher",
    "weighted_kl",
]
