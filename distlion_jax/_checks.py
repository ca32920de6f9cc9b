# SPDX-License-Identifier: Apache-2.0
"""What is wrong with an input, said where it is met: argument, value, and the way out.

In:  what a caller passed to ``init`` or ``update`` (shapes, dtypes, replication; never values of
     traced arrays, which abstain instead).
Out: nothing, or a ``ValueError``. Options are checked in ``_rules``, who takes part is decided in
     ``_vote.turnout``.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distlion_jax._rules import AxisName, Rules, concrete_value
from distlion_jax._vote import wire


def check_decay(b2: ArrayLike, mu_dtype: DTypeLike) -> None:
    """Raises for a momentum that cannot decay because b2 rounds to 1 in its dtype."""
    value = concrete_value(b2)
    if value is not None and value.astype(mu_dtype) >= 1:
        raise ValueError(
            f"`b2` {value} is 1 in {jnp.dtype(mu_dtype)}: the momentum would never decay. Pass "
            "mu_dtype=jnp.float32, or a smaller b2."
        )


def check_axis_name(axis_name: AxisName | None) -> None:
    """Raises for an axis name that names no axis."""
    if axis_name is None or not wire.axes(axis_name):
        raise ValueError(
            f"`axis_name` must name at least one axis; got {axis_name!r}. One worker alone needs "
            "no vote: distributed_lion(..., axis_name=None) is optax.lion."
        )


def check_params(tree: Any, mu_dtype: DTypeLike | None, b2: ArrayLike) -> None:
    """Raises unless all parameters are real, and their momentum can decay."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = f"`params{jax.tree_util.keystr(path)}`"
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{name} has dtype {dtype}: a vote needs real floating-point parameters. Keep "
                "what is not trained out of the parameters, or split complex numbers in two."
            )
        check_mu_dtype(f"{name}: the momentum's dtype", mu_dtype or dtype)
        check_decay(b2, mu_dtype or dtype)


def check_mu_dtype(name: str, dtype: DTypeLike) -> None:
    """Raises for a momentum that cannot decay: float16, float8, integers."""
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).minexp > -100:
        raise ValueError(
            f"{name} must be float32 or bfloat16; got {dtype}. A float16 momentum never decays to "
            "0: 0.99 times its smallest number rounds back to it, and a coordinate touched once "
            "would vote for ever. Pass mu_dtype=jnp.float32 or mu_dtype=jnp.bfloat16."
        )


def check_wire_dtype(wire_dtype: DTypeLike | None) -> None:
    """Raises for a dtype in which sums of gradients or momenta overflow, or lose all."""
    if wire_dtype is not None and jnp.dtype(wire_dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"`wire_dtype` must be float32, bfloat16 or None; got {jnp.dtype(wire_dtype)}: in "
            "float16 a sum of gradients overflows, and integers have no fractions."
        )


def check_state(count: Array) -> None:
    """Raises for a state that still has its worker axis."""
    if jnp.ndim(count):
        raise ValueError(
            f"`state` has a worker axis (its count has shape {jnp.shape(count)}): inside the "
            "mapped function take it off first, state = distlion_jax.unstack(state), and put it "
            "back on after, distlion_jax.stack(state)."
        )


def _named(updates: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    return [(f"updates{jax.tree_util.keystr(path)}", x) for path, x in leaves]


def check_momentum(updates: Any, mu: Any) -> None:
    """Raises unless the momentum is of the gradients' structure and shapes, and can decay."""
    if jax.tree.structure(updates) != jax.tree.structure(mu):
        raise ValueError(
            f"`updates` (gradients) and the state's momentum differ in structure: "
            f"{jax.tree.structure(updates)} against {jax.tree.structure(mu)}. Initialise the state "
            "from the same parameters that are differentiated."
        )
    for (name, g), m in zip(_named(updates), jax.tree.leaves(mu), strict=True):
        if jnp.shape(m) not in (jnp.shape(g), (1, *jnp.shape(g))):
            raise ValueError(
                f"`{name}` has shape {jnp.shape(g)}, its momentum {jnp.shape(m)}. Inside the "
                "mapped function both have the parameter's shape: take the leading worker axis "
                "off the state (distlion_jax.unstack), and do not stack gradients."
            )
        check_mu_dtype(f"the momentum of `{name}`", m.dtype)


def check_like(updates: Any, params: Any) -> None:
    """Raises for gradients that are not of the parameters' shapes: they would be broadcast."""
    if jax.tree.structure(updates) != jax.tree.structure(params):
        return  # optax's own errors say what is wrong
    for (name, g), x in zip(_named(updates), jax.tree.leaves(params), strict=True):
        if jnp.shape(g) != jnp.shape(x):
            raise ValueError(
                f"`{name}` has shape {jnp.shape(g)}, its parameter {jnp.shape(x)}: gradients have "
                "the shapes of what is differentiated."
            )


def check_local(updates: Any, axis_name: AxisName) -> None:
    """Raises for gradients that JAX knows to be the same on all workers: summed by autodiff."""
    named = _named(updates)
    if summed := wire.unvarying(named, axis_name):
        raise ValueError(
            f"`{summed[0]}` is the same on all workers of axis {axis_name!r} ({len(summed)} of "
            f"{len(named)} leaves are): it has been summed over them already. Under jax.shard_map "
            "autodiff does so for replicated parameters. Full-precision gradients then cross the "
            "network, and a vote on them saves nothing. Differentiate with "
            "distlion_jax.local_value_and_grad, or with respect to what distlion_jax.local(params, "
            f"{axis_name!r}) returns."
        )


def check_workers(n: int, axis_name: AxisName, rules: Rules) -> None:
    """Raises for an axis of one worker that was not asked for."""
    if n < 2 and not rules.allow_single_worker:
        raise ValueError(
            f"`axis_name` {axis_name!r} has {n} worker: nobody to vote with. Check the mesh (on "
            "CPU, jax.config.update('jax_num_cpu_devices', 8) makes 8 workers); or pass "
            "axis_name=None "
            "for plain Lion, or allow_single_worker=True to run the same code on one device."
        )


def check_weights(rules: Rules, n: int) -> None:
    """Raises where float32 could not hold the sum of all weights exactly."""
    if n * rules.top_weight > 2**24:
        raise ValueError(
            f"`max_weight` {rules.top_weight} times {n} workers is more than 2**24, as "
            "far as their sums are exact. Divide all weights by a common factor."
        )
