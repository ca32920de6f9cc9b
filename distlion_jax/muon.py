# SPDX-License-Identifier: Apache-2.0
"""Distributed Lion with orthogonalised ballots: Muon's direction at one bit per parameter.

Before its sign is taken, each worker's blend of a hidden matrix is orthogonalised, as Muon does
with the momentum. Only what is signed changes: the wire, the vote, the state and the rule for who
takes part are :func:`distlion_jax.distributed_lion`'s, bit for bit.
"""

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distlion_jax import matrices
from distlion_jax._orthogonal import newton_schulz
from distlion_jax._promotion import default_promotion
from distlion_jax._rules import (
    Aggregation,
    AxisName,
    Rules,
    VoteOptions,
    by_params,
    check_from_zero,
    check_static,
    takes_vote_options,
)
from distlion_jax._vote.turnout import blend, remember
from distlion_jax.lion import Prepare, check_momenta, scale_by_vote
from distlion_jax.matrices import Choice

__all__ = ["distributed_muon", "scale_by_distributed_muon"]

MAX_STEPS = 100  # of Newton-Schulz: more than anybody means


def _orthogonalised(
    b1: ArrayLike, chosen: Choice, steps: int, dtype: DTypeLike, period: int
) -> Prepare:
    """Replaces gradient and momentum of a hidden matrix by its orthogonalised blend, twice.

    The ballot's own blend of two equal numbers has their sign, and is not finite where they are
    not.
    """

    def prepare(count: Array, updates: Any, mu: Any) -> tuple[Any, Any]:
        gradients, treedef = jax.tree.flatten(updates)
        momenta = treedef.flatten_up_to(mu)
        numbers = matrices.numbers_of(chosen, updates)
        hidden = {i: n for i, n in enumerate(numbers) if n is not None and gradients[i].size}
        blends = [blend(gradients[i], momenta[i], b1) for i in hidden]

        def orthogonalise() -> list[Array]:
            out = []
            for one, c in zip(hidden.values(), blends, strict=True):
                batch = matrices.batch_of(c.shape, one)
                out.append(batch.back(newton_schulz(batch.of(c), steps, dtype)).astype(c.dtype))
            return out

        if period == 1 or not hidden:
            signed = orthogonalise()
        else:  # private to each worker: it sends nothing, so that no branch waits for another
            signed = jax.lax.cond(count % period == 0, orthogonalise, lambda: blends)
        for i, c in zip(hidden, signed, strict=True):
            gradients[i] = momenta[i] = c
        return treedef.unflatten(gradients), treedef.unflatten(momenta)

    return prepare


def _alone(
    b1: ArrayLike, b2: ArrayLike, mu_dtype: DTypeLike | None, prepare: Prepare
) -> optax.GradientTransformationExtraArgs:
    """One worker without an axis, with the state of ``optax.lion``."""
    lion = optax.scale_by_lion(b1, b2, mu_dtype)

    @default_promotion
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        signed = prepare(state.count, updates, state.mu)
        direction = jax.tree.map(
            lambda g, x, m: jnp.sign(blend(x, m, b1)).astype(g.dtype), updates, *signed
        )
        mu = jax.tree.map(lambda g, m: remember(g, m, b2), updates, state.mu)
        count = jnp.asarray(optax.safe_increment(state.count))
        return direction, optax.ScaleByLionState(count, mu)

    return optax.with_extra_args_support(optax.GradientTransformation(lion.init, update))


@takes_vote_options
def scale_by_distributed_muon(
    b1: ArrayLike = 0.8,
    b2: ArrayLike = 0.9,
    mu_dtype: DTypeLike | None = None,
    *,
    axis_name: AxisName | None = "data",
    aggregation: Aggregation = "majority",
    muon_weight_dimension_numbers: Choice = None,
    ns_steps: int | None = None,
    ns_dtype: DTypeLike | None = None,
    period: int | None = None,
    **options: Unpack[VoteOptions],
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by a vote of orthogonalised signs; see :func:`distributed_muon`.

    Returns the direction ``Delta`` with no sign flip, learning rate or weight decay.

    Args:
      b1, b2, mu_dtype, axis_name, aggregation: as in :func:`distlion_jax.distributed_lion`.
      muon_weight_dimension_numbers, ns_steps, ns_dtype, period: as in :func:`distributed_muon`.
      **options: as listed below.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = scale_by_distributed_muon(axis_name="data")
      >>> g = jnp.array([[[2.0, 1.0], [1.0, 2.0]]] * 3)  # of 3 workers; its U V^T is 1
      >>> def direction(g):
      ...     return tx.update(g, tx.init(g))[0]
      >>> print(jax.vmap(direction, axis_name="data")(g)[0])
      [[ 1. -1.]
       [-1.  1.]]
    """
    mu_dtype = check_momenta(b1, b2, mu_dtype)
    rules = Rules(aggregation, **options)
    # None by default: optax.inject_hyperparams would trace a number, and call a dtype.
    steps = 5 if ns_steps is None else ns_steps
    period = 1 if period is None else period
    ns_dtype = jnp.float32 if ns_dtype is None else ns_dtype
    check_static("ns_steps", steps, "int or None", MAX_STEPS)
    check_static("period", period, "int or None", 2**31 - 1)
    dtype = jax.dtypes.canonicalize_dtype(ns_dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).minexp > -100:
        raise ValueError(
            f"`ns_dtype` must be float32 or bfloat16; got {dtype}, in which small numbers of a "
            "matrix are lost."
        )
    prepare = _orthogonalised(b1, muon_weight_dimension_numbers, steps, dtype, period)
    if axis_name is None:
        return _alone(b1, b2, mu_dtype, prepare)
    return scale_by_vote(rules, b1, b2, mu_dtype, axis_name, prepare)


def _scale_others(factor: ArrayLike, chosen: Choice) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of all leaves but hidden matrices."""

    def scale(updates: Any, params: Any) -> Any:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        numbers = matrices.numbers_of(chosen, updates)
        scaled = [
            u * jnp.asarray(factor, u.dtype) if one is None else u
            for u, one in zip(leaves, numbers, strict=True)
        ]
        return treedef.unflatten(scaled)

    return optax.with_extra_args_support(optax.stateless(scale))


@takes_vote_options
def distributed_muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.8,
    b2: ArrayLike = 0.9,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    axis_name: AxisName | None = "data",
    aggregation: Aggregation = "majority",
    muon_weight_dimension_numbers: Choice = None,
    ns_steps: int | None = None,
    ns_dtype: DTypeLike | None = None,
    period: int | None = None,
    rest_factor: ArrayLike = 1.0,
    **options: Unpack[VoteOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Distributed Lion with orthogonalised ballots: one bit per parameter, Muon's direction.

    As :func:`distlion_jax.distributed_lion`, but each worker orthogonalises the blend of every
    hidden matrix, by a few steps of Newton and Schulz, before it takes the sign. With n workers,
    worker i with gradient g_i and momentum m_i does, per step t:

    .. math::

      c_i &= \beta_1 m_i + (1 - \beta_1) g_i \\
      \delta_i &= \mathrm{sign}(\mathrm{NS}(c_i)) \text{ for a hidden matrix}, \quad
      \mathrm{sign}(c_i) \text{ for all other leaves} \\
      m_i &\leftarrow \beta_2 m_i + (1 - \beta_2) g_i \\
      x &\leftarrow x - \alpha_t (\mathrm{sign}(\textstyle\sum_i \delta_i) + \lambda x)

    where :math:`\mathrm{NS}(U S V^T) \approx U V^T`. The same bits travel as in Distributed Lion,
    and the state is the same. NS is each worker's own affair: devices that round it differently
    still agree on every parameter, since only votes are sent.

    A matrix of zeros (frozen, or not yet used) stays zero and casts no vote; so do its rows and
    columns of zeros. ``threshold`` and ``noise`` are of what is signed: an orthogonalised matrix
    has a root mean square of about ``1 / sqrt(larger side)``.

    NS costs arithmetic, not bytes: about ``5 r / B`` of a step, for matrices with a smaller side r
    and B tokens a worker and step. ``ns_steps`` and ``period`` make it cheaper.

    Args:
      learning_rate: step size or schedule. Lion's, or up to twice that.
      b1: weight of the momentum in the blend, in [0, 1).
      b2: decay of the momentum, in [0, 1).
      mu_dtype, weight_decay, mask, axis_name, aggregation: as in ``distributed_lion``.
      muon_weight_dimension_numbers: which leaves are hidden matrices, as in
        ``optax.contrib.muon``: a tree of ``optax.contrib.MuonDimensionNumbers`` and of None for
        the other leaves, a prefix of one, or a function of the parameters that returns one. Axes
        that are not named count a matrix each, as heads do in ``MuonDimensionNumbers(0, 2)`` of
        ``[width, heads, features]``. None: :func:`distlion_jax.hidden_matrices`.
      ns_steps: steps of Newton and Schulz; None: 5.
      ns_dtype: what they are computed in, float32 or bfloat16; None: float32.
      period: orthogonalise in one round of so many, the first included, and take plain signs in
        the others; None: 1.
      rest_factor: learning rate of the leaves that are no hidden matrix, in units of the other.
      **options: as listed below.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, used as ``distributed_lion``'s.

    Raises:
      TypeError: for an option that does not exist.
      ValueError: as ``distributed_lion``; and for dimension numbers that do not fit a leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = distributed_muon(learning_rate=0.1, axis_name="data")
      >>> targets = jnp.stack([jnp.eye(2), 2 * jnp.eye(2), jnp.ones((2, 2))])  # of 3 workers
      >>> def train(target):
      ...     x = jnp.zeros((2, 2))
      ...     state = tx.init(x)
      ...     for _ in range(3):
      ...         g = jax.grad(lambda x: jnp.sum((x - target) ** 2))(x)
      ...         updates, state = tx.update(g, state, x)
      ...         x = optax.apply_updates(x, updates)
      ...     return x
      >>> print(jax.vmap(train, axis_name="data")(targets)[0].round(3).diagonal())
      [0.3 0.3]

    References:
      Liu et al, `Communication Efficient Distributed Training with Distributed Lion
      <https://arxiv.org/abs/2404.00438>`_, 2024; Jordan et al, `Muon: An optimizer for hidden
      layers in neural networks <https://kellerjordan.github.io/posts/muon/>`_, 2024; `SignMuon
      <https://arxiv.org/abs/2605.16311>`_, 2026, which signs the orthogonalised momentum
    """
    check_from_zero("rest_factor", rest_factor)
    chosen = muon_weight_dimension_numbers
    return optax.chain(
        scale_by_distributed_muon(
            b1,
            b2,
            mu_dtype,
            axis_name=axis_name,
            aggregation=aggregation,
            muon_weight_dimension_numbers=chosen,
            ns_steps=ns_steps,
            ns_dtype=ns_dtype,
            period=period,
            **options,
        ),
        optax.add_decayed_weights(weight_decay, None if mask is None else by_params(mask)),
        _scale_others(rest_factor, chosen),
        optax.scale_by_learning_rate(learning_rate),
    )
