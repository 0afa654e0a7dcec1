"""Losses: plain functions of (student, teacher, what else they name), one value a row."""

import attar.losses.wide as _wide  # noqa: F401  # reachable as attar.losses.wide
from attar.losses.agreement import correlation, probability_gram
from attar.losses.attention import (
    attention_transfer,
    channel_similarity,
    class_attention,
    factor_transfer,
    gram,
    neuron_selectivity,
)
from attar.losses.contrast import affinity_kl, contrast
from attar.losses.dense import channel_correlation, channel_kl, pixel_relation
from attar.losses.detection import focal_features, localization_kl, quality_focal
from attar.losses.divergence import (
    adaptive_kl,
    alpha_beta_divergence,
    earth_mover,
    jensen_shannon,
    reverse_kl,
    skewed_kl,
    total_variation,
)
from attar.losses.encoder import absolute_and_cosine, attention_relation, attention_scores
from attar.losses.feature import (
    activation_boundary,
    active_mse,
    bounded_mse,
    cosine_distance,
    hierarchical_context,
    mse,
    normalized_smooth_l1,
    partial_mse,
)
from attar.losses.gradient import jacobian_matching, sobolev
from attar.losses.labelled import decoupled_kl, normalized_kl, target_enhanced_kl, weighted_kl
from attar.losses.multilabel import label_embeddings, partial_softmax_kl
from attar.losses.parameter import l1_starting_point, l2_starting_point
from attar.losses.projected import Projected
from attar.losses.ranking import margin_mse, ranking_distillation, relaxed_ranking
from attar.losses.relation import (
    correlation_congruence,
    cosine_relation,
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
from attar.losses.sparse import TopK, sampled_kl
from attar.losses.stateful import (
    curriculum_kl,
    global_context,
    masked_generative,
    memory_contrast,
    variational,
)

__all__ = [
    "Projected",
    "TopK",
    "absolute_and_cosine",
    "activation_boundary",
    "active_mse",
    "adaptive_kl",
    "affinity_kl",
    "alpha_beta_divergence",
    "attention_relation",
    "attention_scores",
    "attention_transfer",
    "binary_kl",
    "bounded_mse",
    "centered_mse",
    "channel_correlation",
    "channel_kl",
    "channel_similarity",
    "class_attention",
    "contrast",
    "correlation",
    "correlation_congruence",
    "cosine_distance",
    "cosine_relation",
    "cross_entropy",
    "curriculum_kl",
    "decoupled_kl",
    "earth_mover",
    "factor_transfer",
    "focal_features",
    "global_context",
    "gram",
    "hard_distillation",
    "hierarchical_context",
    "jacobian_matching",
    "jensen_shannon",
    "kernel_alignment",
    "kl_divergence",
    "l1_starting_point",
    "l2_starting_point",
    "label_embeddings",
    "localization_kl",
    "margin_mse",
    "masked_generative",
    "memory_contrast",
    "mse",
    "neuron_selectivity",
    "normalized_kl",
    "normalized_smooth_l1",
    "partial_mse",
    "partial_softmax_kl",
    "pixel_relation",
    "probabilistic_transfer",
    "probability_gram",
    "quality_focal",
    "ranking_distillation",
    "relation_angle",
    "relation_distance",
    "relaxed_ranking",
    "reverse_kl",
    "sampled_kl",
    "similarity_preserving",
    "skewed_kl",
    "sobolev",
    "standardized_kl",
    "target_enhanced_kl",
    "total_variation",
    "transformed_teacher_kl",
    "variational",
    "virtual_teacher",
    "weighted_kl",
]
