"""Smaller models made from a model: each way is a plan, which is data, and its application."""

from attar.compression.averaging import interpolate, reestimate_batch_norm, soup
from attar.compression.factorize import Factorization, factorize, plan_factorize
from attar.compression.inherit import Inheritance, plan_inheritance, transfer
from attar.compression.prune import Pruning, plan_prune, prune
from attar.compression.quantize import Quantization, plan_quantize, quantize
from attar.compression.shrink import Shrink, plan_shrink, shrink
from attar.compression.sparsify import Sparsity, keep_zeros, plan_sparsify, schedule, sparsify

__all__ = [
    "Factorization",
    "Inheritance",
    "Pruning",
    "Quantization",
    "Shrink",
    "Sparsity",
    "factorize",
    "interpolate",
    "keep_zeros",
    "plan_factorize",
    "plan_inheritance",
    "plan_prune",
    "plan_quantize",
    "plan_shrink",
    "plan_sparsify",
    "prune",
    "quantize",
    "reestimate_batch_norm",
    "schedule",
    "shrink",
    "soup",
    "sparsify",
    "transfer",
]
