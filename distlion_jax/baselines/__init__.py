# SPDX-License-Identifier: Apache-2.0
"""What Distributed Lion is compared with, behind the same interface.

A lossy mean of gradients is a :class:`Compressor` (``qsgd`` is the shortest). A method with state
of its own before the mean is an exchange on ``_rounds.in_rounds`` (``top_k`` holds one). Optimizer
state that all workers share goes into a stage of its own after it, ``replicated(...)``. The
comparison lists methods in ``benchmarks.quality.methods`` and, for tables, in ``benchmarks.rows``.
"""

from distlion_jax.baselines.compress import CompressedAverageState, Compressor, compressed_average
from distlion_jax.baselines.ef_sign import EFSign
from distlion_jax.baselines.full_precision import full_precision, full_precision_lion
from distlion_jax.baselines.power_sgd import PowerSGD
from distlion_jax.baselines.qsgd import QSGD
from distlion_jax.baselines.signs import distributed_signum, sign_muon, sign_sgd
from distlion_jax.baselines.terngrad import TernGrad
from distlion_jax.baselines.top_k import (
    DeepGradientCompressionState,
    TopK,
    deep_gradient_compression,
)

__all__ = [
    "QSGD",
    "CompressedAverageState",
    "Compressor",
    "DeepGradientCompressionState",
    "EFSign",
    "PowerSGD",
    "TernGrad",
    "TopK",
    "compressed_average",
    "deep_gradient_compression",
    "distributed_signum",
    "full_precision",
    "full_precision_lion",
    "sign_muon",
    "sign_sgd",
]
