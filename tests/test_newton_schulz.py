# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz iterations: against an SVD, Optax's, and the operations that XLA counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Numbers

import distlion_jax as dl
from distlion_jax import reference
from distlion_jax._orthogonal import flops, newton_schulz


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 8, 20), (2, 20, 8), (1, 1, 7), (4, 33, 64)])
def test_singular_values_near_one_and_vectors_kept(shape):
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    s = np.linspace(0.05, 1.0, min(shape[1:]))
    out = np.asarray(newton_schulz(jnp.asarray((u * s) @ vt, jnp.float32), 5, jnp.float32))
    inside = np.swapaxes(u, 1, 2) @ out @ np.swapaxes(vt, 1, 2)
    diagonal = np.diagonal(inside, axis1=1, axis2=2)
    assert (diagonal > 0.65).all()
    assert (diagonal < 1.25).all()
    np.testing.assert_allclose(inside, diagonal[:, None] * np.eye(len(s)), atol=2e-5)


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
@pytest.mark.parametrize("shape", [(7, 7), (5, 19), (19, 5)])
def test_equals_the_reference_s_svd(shape, steps):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    got = newton_schulz(jnp.asarray(x)[None], steps, jnp.float32)[0]
    np.testing.assert_allclose(got, reference.newton_schulz(x, steps), atol=3e-5)


def test_equals_optax_s_muon():
    """Of the first update without Nesterov's momentum: what is orthogonalised is the gradient."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(12, 30)), jnp.float32)
    tx = optax.contrib.scale_by_muon(nesterov=False, weight_dimension_numbers=Numbers(), eps=0.0)
    want, _ = tx.update(x, tx.init(x))
    np.testing.assert_allclose(newton_schulz(x[None], 5, jnp.float32)[0], want, atol=2e-5)


def test_bfloat16_agrees_on_nearly_all_signs():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 64, 96)), jnp.float32)
    fine, coarse = (newton_schulz(x, 5, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert coarse.dtype == jnp.bfloat16
    assert np.mean(np.sign(fine) == np.sign(coarse.astype(jnp.float32))) > 0.97


@pytest.mark.parametrize("size", [2.0**100, 2.0**-100])
def test_size_does_not_matter(size):
    """Powers of two, whose quotients are exact; their squares would overflow, or be zeros."""
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 5, 9)), jnp.float32)
    np.testing.assert_array_equal(
        newton_schulz(x * size, 5, jnp.float32), newton_schulz(x, 5, jnp.float32)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_stay_zeros(dtype):
    x = np.random.default_rng(5).normal(size=(2, 9, 6)).astype(np.float32)
    x[0, [1, 4]], x[0, :, 2], x[1] = 0, 0, 0
    for turned in (x, x.swapaxes(1, 2)):
        out = np.asarray(newton_schulz(jnp.asarray(turned), 5, dtype).astype(jnp.float32))
        np.testing.assert_array_equal(out == 0, turned == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_matrix_nan(bad):
    x = jnp.ones((2, 3, 4)).at[0, 1, 1].set(bad)
    out = newton_schulz(x, 5, jnp.float32)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_counts_the_operations_that_xla_counts():
    """Of the products: XLA adds what is done to each number."""
    shape, steps = (2, 64, 256), 5
    f = jax.jit(lambda x: newton_schulz(x, steps, jnp.float32))
    counted = f.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().cost_analysis()["flops"]
    assert flops(shape, steps) <= counted < 1.1 * flops(shape, steps)
    assert flops(shape, steps) == flops((2, 256, 64), steps)


def test_flops_of_a_model():
    """Of hidden matrices alone, stacks too, and spread over a period."""
    params = {"w": jnp.zeros((8, 16)), "embed": jnp.zeros((99, 9)), "vector": jnp.zeros(7)}
    params["layers"] = {"w": jnp.zeros((3, 8, 16)), "bias": jnp.zeros((3, 16))}
    one = 4 * 8 * 8 * 16 + 2 * 8**3
    assert dl.newton_schulz_flops(params) == 5 * 4 * one
    assert dl.newton_schulz_flops(params, period=2) == 10 * one
    chosen = jax.tree.map(lambda x: None, params) | {"embed": Numbers()}
    assert dl.newton_schulz_flops(params, chosen, ns_steps=3) == 3 * (4 * 81 * 99 + 2 * 729)
