# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz: a matrix to its nearest orthogonal one, nearly, by matrix products alone.

In:  a batch of matrices. Out: matrices with the same singular vectors, and singular values near 1.
Nothing is sent, and nobody need agree on the result: only its signs leave the worker.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

# The quintic of Keller Jordan's Muon: steep at 0, so that five steps lift singular values from
# 0.01 of the norm to between 0.7 and 1.2. It does not converge to 1, and a sign does not mind.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrices: Array, steps: int, dtype: DTypeLike) -> Array:
    """Nearly ``U V^T`` of every matrix ``U S V^T``, in the dtype that it is computed in.

    ``X = C / |C|_F``, then ``steps`` times ``A = X X^T``, ``X <- a X + (b A + c A A) X``. A row or
    column of zeros stays exactly zero, and so does a matrix of zeros. A matrix with a number that
    is not finite becomes NaN.

    Args:
      matrices: ``[batch, rows, columns]``.
      steps: how many.
      dtype: of the products; their precision is JAX's ``jax_default_matmul_precision``.
    """
    a, b, c = COEFFICIENTS
    # Divided by its largest number first, a matrix of 1e30 or 1e-30 has a norm too.
    largest = jnp.max(jnp.abs(matrices), axis=(1, 2), keepdims=True)
    x = (matrices / jnp.where(largest == 0, 1, largest)).astype(dtype)
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(1, 2), keepdims=True))
    x = (x / jnp.where(norm == 0, 1, norm)).astype(dtype)
    tall = x.shape[1] > x.shape[2]
    x = jnp.swapaxes(x, 1, 2) if tall else x  # X X^T is then the smaller of the two squares
    for _ in range(steps):
        square = jnp.einsum("bij,bkj->bik", x, x)
        x = a * x + (b * square + c * (square @ square)) @ x
    return jnp.swapaxes(x, 1, 2) if tall else x


def flops(shape: tuple[int, int, int], steps: int) -> int:
    """Floating-point operations of a batch: two a multiplication with its addition.

    With r the smaller side and s the larger, a step is ``2 r r s + 2 r r r + 2 r r s``.
    """
    batch, small, large = shape[0], min(shape[1:]), max(shape[1:])
    return steps * batch * small**2 * (4 * large + 2 * small)
