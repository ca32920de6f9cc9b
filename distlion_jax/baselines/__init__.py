# SPDX-License-Identifier: Apache-2.0
"""What Distributed Lion is compared with, behind the same interface."""

from distlion_jax.baselines.compress import CompressedAverageState as CompressedAverageState
from distlion_jax.baselines.compress import Compressor as Compressor
from distlion_jax.baselines.compress import compressed_average as compressed_average
from distlion_jax.baselines.ef_sign import EFSign as EFSign
from distlion_jax.baselines.power_sgd import PowerSGD as PowerSGD
from distlion_jax.baselines.qsgd import QSGD as QSGD
from distlion_jax.baselines.signs import distributed_signum as distributed_signum
from distlion_jax.baselines.signs import sign_sgd as sign_sgd
from distlion_jax.baselines.terngrad import TernGrad as TernGrad
from distlion_jax.baselines.top_k import (
    DeepGradientCompressionState as DeepGradientCompressionState,
)
from distlion_jax.baselines.top_k import TopK as TopK
from distlion_jax.baselines.top_k import deep_gradient_compression as deep_gradient_compression
